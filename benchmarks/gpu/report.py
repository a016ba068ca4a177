"""Tell what was measured: short tables for a terminal, and GPU.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.contenders import FOREACH_NORM, ORIGINAL, RECORD, TORCH_CLIP
from benchmarks.gpu.contenders import AMP, CHECK
from benchmarks.gpu.step import NOTHING
from benchmarks.gpu.targets import MET, UNDECIDED, Verdict, ratios, verdicts
from benchmarks.measurement import Spread

_SHORTLY = """\
The check reads every element of every gradient once, and counts Inf and NaN in each layer. Times are device times from
CUDA events: medians over rounds in which all contenders take turns in one process. The read bandwidth is the best of
several kernels that only add up 4 GiB.
"""

_METHOD = """\
All contenders run in one process and take turns: each round runs every one of them once, in random order. The tables
show the median over the rounds and, in brackets, the lowest and the highest. Ratios are computed within a round.

*Device* is the time between two CUDA events around calls that were all queued while the device was busy, so that it
never waits for the host; if a contender waits for the device within a call, those gaps are included. *Host* is the time
until a call returns. *Elapsed* is the time of consecutive calls until the device is done. The result of a check is
fetched as a monitor does it: when it is there.

Before anything is timed, every check is compared with what `isinf` and `isnan` find, layer by layer. Gradients larger
than the last-level cache are copied until all copies together are eight times its size, at most four copies, and the
copies take turns. `monitor.update()` gets gradients that no backward pass has made, so it tags every parameter again;
in real training the host does not pay for that. In the training step, the noise is the difference of the run without a
monitor from itself, plus two standard errors. If it exceeds the target, the target is not decided.
"""

_FACTS = {
    "steps": "steps observed",
    "synchronisations_without": "synchronisations that torch warns about, in steps without a monitor",
    "synchronisations_with": "the same, in steps with a monitor",
    "errors_where_they_are_errors": "failed checks when torch raises at each synchronisation",
    "checks": "checks so far",
    "update_seconds_behind": "longest update() while the device lags behind",
    "device_seconds_behind": "how far it lags behind",
    "results_published_early": "results published before the device was done (must be 0)",
    "results_published_late": "and after",
    "errors_behind": "failed checks during that time",
    "device_allocations_per_step": "device allocations that a monitor adds per step",
    "pinned_allocations_per_step": "pinned allocations that it adds per step",
    "side_stream_counts": "Inf and NaN found in a gradient with one Inf that arrives late on another stream",
    "side_stream_ready_early": "reported before it arrived",
    "side_stream_left_the_current_one_idle": "current stream left idle",
    "publish_seconds": "time from update() until its result is published, by polling",
    "publish_seconds_at_most": "longest of these",
    "update_seconds": "of that, update() itself",
    "capture_refused": "error of a check while a CUDA graph is captured",
    "capture_survived": "graph still valid",
    "capture_errors_counted": "checks that this counted as failed",
}


def text(results: Mapping[str, Any]) -> str:
    """Return short tables, the targets last."""
    parts = [f"{name}: {value}" for name, value in results["machine"].items()]
    for name, section in results["sections"].items():
        parts.append(f"\n{name}: {section.get('title', '')}, {section.get('took_seconds', 0):.0f} s")
        head, rows = _rows(section, results["sections"])
        parts.append(_plain_table([head, *rows] if head else rows))
    parts += ["", _plain_table([list(each) for each in verdicts(results["sections"])])]
    return "\n".join(parts)


def markdown(results: Mapping[str, Any]) -> str:
    """Return GPU.md."""
    sections = results["sections"]
    machine = results["machine"]
    targets = [[*each[:3], _emphasised(each)] for each in verdicts(sections)]
    parts = ["# What the check costs on a GPU\n", f"{machine['GPU']}, torch {machine['torch'].split(',')[0]}, "]
    parts[-1] += f"triton {machine['triton']}; measured {results['date']} by `python -m benchmarks.gpu`.\n"
    parts += [_SHORTLY, "## Targets\n", _markdown_table(["what", "target", "reached", ""], targets)]
    parts += ["## Side by side\n", _markdown_table(*_overview(sections))]
    parts += ["[gpu.json](gpu.json) has every measured time.\n"]
    parts += ["![Device time of each contender, a panel per model](gpu.png)\n"]
    parts += ["## How it is measured\n", _METHOD]
    for section in sections.values():
        head, rows = _rows(section, sections)
        parts += [f"## {section.get('title', 'Not measured')}\n", *_remarks(section)]
        parts.append(_markdown_table(head or ["", ""], rows))
    parts += ["## Machine\n", _markdown_table(["", ""], [[name, str(value)] for name, value in machine.items()])]
    return "\n".join(parts)


def _emphasised(verdict: Verdict) -> str:
    return verdict.verdict if verdict.verdict in (MET, UNDECIDED) else f"**{verdict.verdict}**"


def _overview(sections: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return a line per model: what the check takes, and what others take."""
    others = {FOREACH_NORM: "_foreach_norm", AMP: "AMP's check", TORCH_CLIP: "clip_grad_norm_"}
    others |= {RECORD: "isinf and isnan", ORIGINAL: "ten statistics"}
    ceiling = sections.get("ceiling", {}).get("read_bytes_per_second")
    rows = []
    for section in (each for each in sections.values() if each.get("kind") == "checks"):
        times = {name: Spread.of(samples["device"]).median for name, samples in section["contenders"].items()}
        share = f"{section['bytes'] / times[CHECK] / ceiling:.0%}" if ceiling and not section["in_cache"] else ""
        theirs = [_time(times[name]) if name in times else "refuses bf16" for name in others]
        rows.append([section["title"], f"**{_time(times[CHECK])}**", share, *theirs])
    return ["gradients", "the check", "of the read bandwidth", *others.values()], rows


def _rows(section: Mapping[str, Any], sections: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    match section.get("kind"):
        case "ceiling":
            head = ["", "GB/s"]
            return head, [[name, spread(rates, 1e-9)] for name, rates in section["rates"].items()]
        case "checks":
            return _contender_rows(section, sections, CHECK)
        case "step":
            head = ["", "added", "step"]
            base = section["samples"][NOTHING]
            rows = [
                [name, added(ratios(seconds, base)), f"{spread(seconds, 1e3)} ms"]
                for name, seconds in section["samples"].items()
            ]
            return head, [*rows, ["host, of each check", f"{section['host_seconds_per_check'] * 1e6:.0f} us", ""]]
        case "behaviour":
            facts = section["facts"]
            return ["", ""], [[_FACTS.get(name, name), _value(name, value)] for name, value in facts.items()]
    return ["", ""], [["not measured", str(section.get("why", section.get("error", "")))]]


def _contender_rows(
    section: Mapping[str, Any], sections: Mapping[str, Any], base: str
) -> tuple[list[str], list[list[str]]]:
    ceiling = sections.get("ceiling", {}).get("read_bytes_per_second")
    rows = []
    for name, samples in section["contenders"].items():
        device = samples["device"]
        rate = section["bytes"] / Spread.of(device).median
        share = f"{rate / ceiling:.0%}" if ceiling else ""
        ratio = spread(ratios(device, section["contenders"][base]["device"]), 1)
        rows.append([name, seconds(device), share, ratio, seconds(samples["host"]), seconds(samples["elapsed"])])
    return ["", "device", "of the read bandwidth", f"x {base}", "host", "elapsed"], rows


def _remarks(section: Mapping[str, Any]) -> list[str]:
    remarks = [f"Not measured: {name}: {why}.\n" for name, why in section.get("skipped", {}).items()]
    if section.get("kind") == "checks":
        where = "fits in the last cache" if section["in_cache"] else f"copies that take turns: {section['copies']}"
        remarks.append(f"{section['bytes']:,} bytes; {where}; first check {section['first_check_seconds']:.2f} s.\n")
    return remarks


def spread(values: Sequence[float], factor: float) -> str:
    """Return the median with its range."""
    found = Spread.of([value * factor for value in values])
    return f"{_short(found.median)} ({_short(found.low)} to {_short(found.high)})"


def added(found: Sequence[float]) -> str:
    """Return ratios as what is added, with their range."""
    low, middle, high = (f"{value - 1:+.2%}" for value in (min(found), Spread.of(list(found)).median, max(found)))
    return f"{middle} ({low} to {high})"


def seconds(values: Sequence[float]) -> str:
    """Return times with their range in a unit that suits them."""
    unit, factor = _unit(Spread.of(list(values)).median)
    return f"{spread(values, factor)} {unit}"


def _time(value: float) -> str:
    unit, factor = _unit(value)
    return f"{_short(value * factor)} {unit}"


def _unit(value: float) -> tuple[str, float]:
    return ("us", 1e6) if value < 1e-3 else ("ms", 1e3)


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"


def _value(name: str, value: object) -> str:
    return _time(value) if isinstance(value, float) and "seconds" in name else str(value)


def _plain_table(rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    columns = max(map(len, rows))
    widths = [max(len(row[column]) for row in rows if len(row) == columns) for column in range(columns)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows
    )


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
