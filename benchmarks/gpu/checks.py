"""The check of one model's gradients, and everything else that looks at them."""

from __future__ import annotations

import time

import torch

from benchmarks.gpu.clock import take_turns
from benchmarks.gpu.contenders import Launch, contenders
from benchmarks.gpu.models import Model
from esper_telemetry.scan import Scan

_SPARE = 3 << 30
_MOST_COPIES = 4


def measure_checks(
    model: Model, launch: Launch, device: torch.device, cache: int, seconds: float, rounds: int = 15
) -> dict[str, object]:
    """Let all contenders look at the gradients of one model.

    cache: bytes of the device's last cache. What is larger is copied until all of it is several times as large.
    """
    free = torch.cuda.mem_get_info(device)[0]
    if model.bytes + _SPARE > free:
        return {"kind": "skipped", "title": model.title, "why": f"{model.bytes:,} bytes, and {free:,} are free"}
    copies = min(_MOST_COPIES, max(1, -(-8 * cache // model.bytes))) if model.bytes > cache else 1
    gradients = [model.make(device, seed) for seed in range(copies)]
    first = _first_check(launch, gradients[0])
    room = torch.cuda.mem_get_info(device)[0] - _SPARE
    timed, skipped = contenders(launch, gradients, room)
    samples = take_turns(timed, rounds, seconds)
    return {
        "kind": "checks",
        "title": model.title,
        "bytes": model.bytes,
        "copies": copies,
        "in_cache": model.bytes <= cache,
        "first_check_seconds": first,
        "contenders": {name: each.plain() for name, each in samples.items()},
        "skipped": skipped,
    }


def _first_check(launch: Launch, gradients: list[torch.Tensor]) -> float:
    """Return what the first check takes, which compiles and makes tables."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    found = launch(gradients)
    if not isinstance(found, Scan):
        found.result()
    return time.perf_counter() - started
