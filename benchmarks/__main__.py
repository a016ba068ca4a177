"""`python -m benchmarks`: measure, print, and write the results."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import NoReturn

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # read when torch is imported

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.contenders import READ, contenders
from benchmarks.gradients import GRADIENT_SETS, GradientSet
from benchmarks.hooks import measure_hooks
from benchmarks.machine import machine
from benchmarks.measurement import Repeated, Section, Tick, alternate, footprint
from benchmarks.report import Report
from benchmarks.steps import WORKLOADS, measure_workload

HERE = Path(__file__).parent
EXIT_USAGE = 2
_ROUNDS, _QUICK_ROUNDS = 9, 2

_Measure = Callable[[int, Tick], Section]


class _Parser(argparse.ArgumentParser):
    """Say what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {message.removeprefix('argument ')}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return its exit code."""
    options = _options(arguments)
    started = datetime.now(UTC)
    described = machine()
    report = Report(
        date=started.strftime("%Y-%m-%d %H:%M UTC"),
        rounds=options.rounds,
        machine=described,
        sections=_measure([name for name in MEASURES if name in options.only], options.rounds),
    )
    console = Console() if sys.stdout.isatty() else Console(width=160)
    report.show(console)
    if options.output is not None:
        report.write(options.output)
        console.print(f"written to {options.output}", highlight=False)
    return 0


def measure_gradients(gradient_set: GradientSet, rounds: int, tick: Tick) -> Section:
    """Let all contenders look at one set of gradients."""
    runs = contenders(gradient_set.make())
    timed = {name: Repeated(run) for name, run in runs.items()}
    samples = alternate(timed, rounds, tick)
    memory = {name: footprint(run) for name, run in runs.items()}
    return Section(gradient_set.name, gradient_set.title, READ, samples, memory, gradient_set.largest_layer)


MEASURES: dict[str, _Measure] = {
    **{each.name: partial(measure_gradients, each) for each in GRADIENT_SETS},
    "hooks": measure_hooks,
    **{each.name: partial(measure_workload, each) for each in WORKLOADS},
}


def _measure(names: Sequence[str], rounds: int) -> dict[str, Section]:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    sections = {}
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for name in names:
            task = progress.add_task(name, total=None)
            sections[name] = MEASURES[name](rounds, partial(progress.advance, task))
            progress.update(task, total=sum(map(len, sections[name].samples.values())))
            gc.collect()  # the gradients of one set are gone before the next is made
    return sections


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser("benchmarks", description="Measure what looking at gradients costs.")
    how_long = parser.add_mutually_exclusive_group()
    how_long.add_argument("--rounds", type=_rounds, default=_ROUNDS, help="samples of each (default: %(default)s)")
    how_long.add_argument(
        "--quick", action="store_const", dest="rounds", const=_QUICK_ROUNDS, help="just see that it works"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="SET", choices=MEASURES, default=MEASURES, help=f"some of: {', '.join(MEASURES)}"
    )
    parser.add_argument(
        "--output",
        type=_directory,
        metavar="DIR",
        help="where to write results.json, results.png and RESULTS.md (default: benchmarks/ after a full run, and "
        "nowhere with --quick or --only)",
    )
    options = parser.parse_args(arguments)
    if options.output is None and options.only is MEASURES and options.rounds != _QUICK_ROUNDS:
        options.output = HERE
    return options


def _rounds(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _directory(text: str) -> Path:
    try:
        Path(text).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write to {text!r}: {error.strerror}") from None
    return Path(text)


if __name__ == "__main__":
    sys.exit(main())
