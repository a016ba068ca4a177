"""One run of the benchmark: section after section, each written as soon as it is there."""

from __future__ import annotations

import contextlib
import gc
import json
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.behaviour import SMALL, measure_behaviour
from benchmarks.gpu.ceiling import measure_ceiling
from benchmarks.gpu.checks import measure_checks
from benchmarks.gpu.machine import machine
from benchmarks.gpu.models import MODELS, Model
from benchmarks.gpu.rehearsal import stand_ins
from benchmarks.gpu.report import markdown, text
from benchmarks.gpu.step import TINY, Size, measure_step
from esper_telemetry.scan import Scanner

REPORT, CHART, RESULTS = "GPU.md", "gpu.png", "gpu.json"

Measure = Callable[[], dict[str, object]]


class Place(NamedTuple):
    """Say where it is measured, and how large everything may be."""

    device: torch.device
    processors: int
    cache: int
    rehearsal: bool

    @classmethod
    def of(cls, rehearsal: bool) -> Place:
        """Look at the first device."""
        if rehearsal:
            return cls(torch.device("cpu"), 2, 1 << 10, True)
        properties = torch.cuda.get_device_properties(0)
        return cls(torch.device("cuda", 0), properties.multi_processor_count, properties.L2_cache_size, False)

    def model(self, name: str) -> Model:
        """Return a model that fits here."""
        return MODELS[name].shrunk() if self.rehearsal else MODELS[name]


def sections(place: Place) -> dict[str, Measure]:
    """Return name -> what measures it; the most important ones first."""
    launch = Scanner()
    seconds = 0.01 if place.rehearsal else 1.0

    def checks(name: str, budget: float) -> Measure:
        return lambda: measure_checks(
            place.model(name), launch, place.device, place.cache, budget * seconds, 1 if place.rehearsal else 15
        )

    numel = 1 << (14 if place.rehearsal else 30)
    size = TINY if place.rehearsal else Size()
    return {
        "ceiling": partial(measure_ceiling, place.device, numel, place.processors, 12 * seconds),
        "behaviour": partial(measure_behaviour, place.device, launch, *((TINY, 2) if place.rehearsal else (SMALL, 20))),
        "small-fp32": checks("small-fp32", 15),
        "ppo-fp32": checks("ppo-fp32", 8),
        "xl-fp32": checks("xl-fp32", 15),
        "xl-bf16": checks("xl-bf16", 15),
        "step": partial(measure_step, place.device, size, 75 * seconds, 3 if place.rehearsal else 60),
        "gpt2-fp32": checks("gpt2-fp32", 12),
        "gpt2-bf16": checks("gpt2-bf16", 12),
        "7b-fp32": checks("7b-fp32", 20),
        "7b-bf16": checks("7b-bf16", 15),
    }


def run(out: Path, only: Sequence[str] | None, seconds: float, rehearsal: bool) -> None:
    """Measure, and write after each section."""
    started = time.monotonic()
    with stand_ins() if rehearsal else contextlib.nullcontext():
        place = Place.of(rehearsal)
        results: dict[str, Any] = {
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "machine": machine(place.device),
            "sections": {},
        }
        measures = sections(place)
        if unknown := set(only or ()) - measures.keys():
            raise SystemExit(f"benchmarks.gpu: --only: no {', '.join(sorted(unknown))} among {', '.join(measures)}")
        for name, measure in measures.items():
            if only is not None and name not in only:
                continue
            if time.monotonic() - started > seconds:
                results["sections"][name] = {"kind": "skipped", "title": name, "why": "no time was left"}
            else:
                with _timed(name, results["sections"]):
                    results["sections"][name] = measure()
            (out / RESULTS).write_text(json.dumps(results, indent=1) + "\n")
    write_report(results, out)


@contextlib.contextmanager
def _timed(name: str, found: dict[str, Any]) -> Iterator[None]:
    """Note what a section took; one that fails leaves its error, and the memory, to the others."""
    began = time.monotonic()
    try:
        yield
    except Exception as error:
        found[name] = {
            "kind": "error",
            "title": name,
            "error": f"{type(error).__name__}: {error}",
            "traceback": traceback.format_exc(),
        }
    found[name]["took_seconds"] = time.monotonic() - began
    print(f"{name}: {found[name]['took_seconds']:.1f} s {found[name].get('error', '')}", flush=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def write_report(results: Mapping[str, Any], out: Path) -> None:
    """Print tables; write GPU.md, and gpu.png where Matplotlib is installed."""
    (out / REPORT).write_text(markdown(results))
    try:
        from benchmarks.gpu.chart import draw
    except ImportError:
        print(f"no Matplotlib: `python -m benchmarks.gpu --draw {out / RESULTS}` draws the chart")
    else:
        draw(results, out / CHART)
    print(text(results), flush=True)
