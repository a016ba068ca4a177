"""Tell what was measured: short tables for a terminal, and GPU.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu.contenders import CHECK
from benchmarks.gpu.step import NOTHING
from benchmarks.gpu.targets import ratios, verdicts
from benchmarks.measurement import Spread

_METHOD = """\
All contenders run in one process and take turns: each round runs every one of them once, in another order; given are
the median over the rounds and, in brackets, the lowest and the highest. *Device* is the time between two CUDA events
around calls that were all queued while the device was kept busy, so that it never waits for the host; a contender
that waits for the device within a call is timed with its gaps. *Host* is the time until a call returns, *elapsed* the
time of calls one after the other until the device is done. A check is launched and its result fetched as a monitor
does it, when it is there. Ratios are taken within a round. Before anything is timed, every check is held to what
`isinf` and `isnan` find, layer by layer. Gradients larger than the last cache are copied until all copies are eight
times as large as it, up to four, and the copies take turns. In the training step the noise is what the run without a
monitor differs from itself, and two standard errors of that; where it exceeds the target, nothing is decided.
"""


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
    machine = [["date", results["date"]], *([name, str(value)] for name, value in results["machine"].items())]
    targets = _markdown_table(["what", "target", "reached", ""], [list(each) for each in verdicts(sections)])
    parts = ["# What the check costs on a GPU\n", "Written by `python -m benchmarks.gpu`.\n"]
    parts += ["![Times of the check](gpu.png)\n", _markdown_table(["", ""], machine)]
    parts += ["## Targets\n", targets, "## How it is measured\n", _METHOD]
    for section in sections.values():
        head, rows = _rows(section, sections)
        parts += [f"## {section.get('title', 'Not measured')}\n", *_remarks(section)]
        parts.append(_markdown_table(head or ["", ""], rows))
    return "\n".join(parts)


def _rows(section: Mapping[str, Any], sections: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    match section.get("kind"):
        case "ceiling":
            head = ["", "GB/s"]
            return head, [[name, spread(rates, 1e-9)] for name, rates in section["rates"].items()]
        case "checks":
            return _contender_rows(section, sections, CHECK)
        case "variants":
            head, rows = _contender_rows(section, sections, next(iter(section["contenders"]), ""))
            first = section["first_check_seconds"]
            rows = [[*row, f"{first[row[0]]:.2f} s"] for row in rows]
            return [*head, "first check"], rows + [[name, why] for name, why in section["failed"].items()]
        case "step":
            head = ["", "added", "step"]
            base = section["samples"][NOTHING]
            rows = [
                [name, added(ratios(seconds, base)), f"{spread(seconds, 1e3)} ms"]
                for name, seconds in section["samples"].items()
            ]
            return head, [*rows, ["host, of each check", f"{section['host_seconds_per_check'] * 1e6:.0f} us", ""]]
        case "behaviour":
            return ["", ""], [[name.replace("_", " "), _value(name, value)] for name, value in section["facts"].items()]
        case "host":
            return ["", "us"], [[name, f"{value * 1e6:.2f}"] for name, value in section["seconds"].items()]
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
    return f"{found.median:.3g} ({found.low:.3g} to {found.high:.3g})"


def added(found: Sequence[float]) -> str:
    """Return ratios as what is added, with their range."""
    low, middle, high = (f"{value - 1:+.2%}" for value in (min(found), Spread.of(list(found)).median, max(found)))
    return f"{middle} ({low} to {high})"


def seconds(values: Sequence[float]) -> str:
    """Return times with their range in a unit that suits them."""
    unit, factor = ("us", 1e6) if Spread.of(list(values)).median < 1e-3 else ("ms", 1e3)
    return f"{spread(values, factor)} {unit}"


def _value(name: str, value: object) -> str:
    if isinstance(value, float) and "seconds" in name:
        return f"{value * 1e3:.3g} ms"
    return str(value)


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
