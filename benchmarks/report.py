"""Tell what was measured: tables for a terminal and for Markdown, and JSON with every sample."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.chart import draw
from benchmarks.measurement import Section
from benchmarks.targets import size, verdicts

_MET = {True: "met", False: "**not met**", None: "not decided"}

_METHOD = """\
All contenders run in one process and take turns: each round runs every one of them once, in random order. Short calls
are repeated until a sample lasts 50 ms. Ratios are computed within a round; the tables show the median over the rounds
and, in brackets, the lowest and the highest. Before anything is timed, every check is compared with what `isinf` and
`isnan` find. "Temporary" is the largest single allocation of a call, "at once" the most that it held at the same time.
In whole training runs, `watch()` and the run without it have three turns per round. If the run without it differs from
itself by more than the target, the machine was too noisy and the target is not decided.

"The record's formula" is one `isinf().sum()` and one `isnan().sum()` per tensor. "The original's ten statistics" are
the same ten values as ours, each computed by its own torch call.
"""

_NOT_HERE = "This program times the CPU only.\n"


@dataclass(frozen=True, slots=True)
class Report:
    """Hold all that was measured in one run of the program."""

    date: str
    rounds: int
    machine: Mapping[str, str]
    sections: Mapping[str, Section]

    def show(self, console: Console) -> None:
        """Print every table."""
        for section in self.sections.values():
            console.print(_table(section.title, _head(section), _rows(section)))
            console.print(*_remarks(section), sep="\n", highlight=False)
        console.print(_table("Targets", _VERDICT_HEAD, self._verdict_rows()))

    def write(self, directory: Path) -> None:
        """Write results.json, results.png and RESULTS.md."""
        (directory / "results.json").write_text(json.dumps(self._plain(), indent=1) + "\n")
        (directory / "RESULTS.md").write_text(self._markdown())
        draw(self.sections, f"{self.machine['CPU']}, torch {self.machine['torch']}", directory / "results.png")

    def _plain(self) -> dict[str, object]:
        return {
            "date": self.date,
            "rounds": self.rounds,
            "machine": dict(self.machine),
            "sections": {name: _plain_section(section) for name, section in self.sections.items()},
            "targets": [asdict(verdict) for verdict in verdicts(self.sections)],
        }

    def _markdown(self) -> str:
        machine = _markdown_table(["", ""], [["date", self.date], *self.machine.items(), ["rounds", str(self.rounds)]])
        targets = _markdown_table(_VERDICT_HEAD, self._verdict_rows())
        parts = ["# What the check costs\n", "Written by `make bench`.\n", "![Ratios](results.png)\n", machine]
        parts += ["## Targets\n", targets, _NOT_HERE, "## How it is measured\n", _METHOD]
        for section in self.sections.values():
            parts += [f"## {section.title}\n", _markdown_table(_head(section), _rows(section))]
            parts += [f"{remark}\n" for remark in _remarks(section)]
        return "\n".join(parts)

    def _verdict_rows(self) -> list[list[str]]:
        return [[each.what, each.target, each.reached, _MET[each.met]] for each in verdicts(self.sections)]


_VERDICT_HEAD = ["what", "target", "reached", ""]


def _head(section: Section) -> list[str]:
    if section.memory:
        return ["", "ratio to one read pass", "time", "temporary", "at once"]
    return ["", "added", "time"]


def _rows(section: Section) -> list[list[str]]:
    return [_row(section, name) for name in section.samples]


def _row(section: Section, name: str) -> list[str]:
    ratio, seconds = section.ratio(name), section.seconds(name)
    unit, factor = _unit(seconds.median)
    low, median, high = (f"{value * factor:.3g}" for value in (seconds.low, seconds.median, seconds.high))
    time = f"{median} {unit} ({low} to {high})"
    if not section.memory:
        return [name, f"{ratio.median - 1:+.1%} ({ratio.low - 1:+.1%} to {ratio.high - 1:+.1%})", time]
    memory = section.memory[name]
    spread = f"{ratio.median:.3g} ({ratio.low:.3g} to {ratio.high:.3g})"
    return [name, spread, time, size(memory.largest), size(memory.peak)]


def _unit(seconds: float) -> tuple[str, float]:
    if seconds < 1e-3:
        return "us", 1e6
    return ("ms", 1e3) if seconds < 1 else ("s", 1)


def _remarks(section: Section) -> list[str]:
    return [*section.notes, *(f"Not measured: {name}: {why}." for name, why in section.skipped.items())]


def _plain_section(section: Section) -> dict[str, object]:
    return {
        "title": section.title,
        "base": section.base,
        "contenders": {
            name: {
                "seconds": asdict(section.seconds(name)),
                "ratio": asdict(section.ratio(name)),
                "memory_bytes": asdict(section.memory[name]) if name in section.memory else None,
                "samples": samples,
            }
            for name, samples in section.samples.items()
        },
        "remarks": _remarks(section),
    }


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in head:
        table.add_column(column)
    for row in rows:
        table.add_row(*(cell.replace("**", "") for cell in row))
    return table


def _markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
