"""What a run of very many ranks costs: rows in a real store, rank 0's reading, its page and targets, and the rules.

`python -m benchmarks.rank_rows` writes RANK_ROWS.md, rank_rows.json and rank_rows.png; about 10 minutes. Ranks are
simulated by their rows and their series: both are what real ones write.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.machine import machine
from benchmarks.rank_rules import in_prometheus, in_victoria_metrics, page_of
from esper_telemetry.exporters.routes.targets import read_targets
from esper_telemetry.exporters.samples import read_samples
from esper_telemetry.ranks.board import Board
from esper_telemetry.ranks.reader import Reader
from esper_telemetry.ranks.row import KEPT, BadCheck, ModelState, Row
from esper_telemetry.ranks.rows import RankRows
from esper_telemetry.snapshot import RunInfo, Snapshot
from esper_telemetry.snapshot.ranks import RankPlace, Ranks

SIZES = (100, 1_000, 10_000)
WINDOW = 120.0
_SERVERS: list[Any] = []


def row_of(rank: int, beat: int, bad: int) -> bytes:
    """Return a rank's row, with so many bad checks in it that damaged its model."""
    place = RankPlace(rank, rank % 8, f"gpu{rank // 8}", f"10.0.{rank // 2048}.{rank // 8 % 256}:{19301 + rank % 8}")
    checks = (BadCheck(beat * KEPT + k, 0, 7, 0, 7 * (rank == 0), 0, 7, "blocks.0.up.weight", 1e9) for k in range(bad))
    damaged = ModelState("parameters", 7, "blocks.0.up.weight", "forward of blocks.0", False, (beat * KEPT - 1, 1e9))
    return Row(place, 4711, beat, False, True, tuple(checks), damaged if bad else ModelState()).encode()


def seconds(work: Callable[[], object], rounds: int = 5) -> float:
    """Return the median seconds of a few rounds."""
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def store_of(name: str) -> Any:
    """Return a connection to a store of its own, whose server is in this process."""
    server = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, None, False, timedelta(seconds=30), wait_for_workers=False)
    _SERVERS.append(server)  # it ends with its object
    return dist.PrefixStore(name, client)


def write_all(store: Any, ranks: int, beat: int, bad: int) -> float:
    """Write every rank's row, and return the seconds for one; a rank's own news is one write and one addition."""
    began = time.perf_counter()
    for rank in range(ranks):
        store.set(f"row/{rank + 1}", row_of(rank, beat, bad))
        store.add("news", 1)
    return (time.perf_counter() - began) / ranks


def measure_store(ranks: int) -> dict[str, float]:
    """Measure what rank 0 does with so many rows."""
    store, published = store_of(f"run{ranks}"), []
    store.add("joined", ranks)
    write = write_all(store, ranks, 1, 0)
    reader = Reader(store, Board(ranks, WINDOW), lambda ranks: bool(published.append(ranks)) or True)
    began = time.perf_counter()
    reader._read()
    first = time.perf_counter() - began
    same = seconds(reader._read)
    write_all(store, ranks, 2, 0)
    began = time.perf_counter()
    reader._read()
    beats = time.perf_counter() - began
    write_bad = write_all(store, ranks, 3, KEPT)
    began = time.perf_counter()
    reader._read()
    trouble = time.perf_counter() - began
    known = reader._board.read(time.monotonic())
    assert (known.reporting, known.recent.read(time.monotonic()).nan_max) == (ranks, 7)
    return {
        "publish": write,
        "publish_bad": write_bad,
        "first_reading": first,
        "reading_unchanged": same,
        "reading_beats": beats,
        "reading_all_bad": trouble,
        "summary": seconds(lambda: reader._board.read(time.monotonic())),
        **measure_serving(known, ranks),
    }


def measure_serving(known: Ranks, ranks: int) -> dict[str, float]:
    """Measure rank 0's samples and its list of targets."""
    run = RunInfo("b1946ac9", 0, ranks, 0, 0, "gpu0", 1)
    snapshot = replace(Snapshot.before_first_check(run, WINDOW), ranks=known)
    targets = json.dumps(list(read_targets(snapshot, known.places)))
    leaders = [each for each in json.loads(targets) if "scrape" in each["labels"]]
    return {
        "targets": seconds(lambda: json.dumps(list(read_targets(snapshot, known.places)))),
        "targets_bytes": len(targets),
        "leaders": len(leaders),
        "samples": seconds(lambda: list(read_samples(snapshot))),
        "series_of_rank_0": len(list(read_samples(snapshot))),
        "series_of_run": page_of(ranks).count(b"\n"),
    }


def measure_training() -> dict[str, float]:
    """Measure what the training thread pays in each check, whatever the number of ranks."""
    run = RunInfo("b1946ac9", 0, 2, 0, 0, "gpu0", 1)
    good = Snapshot.before_first_check(run, WINDOW)
    bad = replace(good, nan_grad_count=7, owned_nan_count=7)
    rows = RankRows(lambda: good, lambda _: True, lambda _: None)
    rows._thread = object()  # type: ignore[assignment]  # it has begun
    return {
        "healthy_check": seconds(lambda: [rows.see(good) for _ in range(1000)]) / 1000,
        "bad_check": seconds(lambda: [rows.see(bad) for _ in range(1000)]) / 1000,
    }


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw everything that grows with the ranks on logarithmic axes, with a line that grows as they do."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    sizes = [int(size) for size in results["runs"]]
    for name, label in LINES.items():
        values = [run.get(name) for run in results["runs"].values()]
        if all(values):
            axes.plot(sizes, [1000 * value for value in values], marker="o", label=label)
    first = 1000 * results["runs"][str(sizes[0])]["reading_all_bad"]
    axes.plot(sizes, [first * size / sizes[0] for size in sizes], ls=":", color="#333333", label="as the ranks grow")
    axes.set(xscale="log", yscale="log", xlabel="ranks", ylabel="milliseconds", title="What a run of many ranks costs")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


LINES = {
    "reading_beats": "rank 0 reads all rows, each with a new heartbeat",
    "reading_all_bad": "rank 0 reads all rows, each with 8 bad checks",
    "targets": "list of targets",
    "samples": "rank 0's samples for a scrape",
    "prometheus": "one evaluation of all rules, Prometheus",
    "victoria_metrics": "one evaluation of all rules, VictoriaMetrics",
    "publish": "a rank publishes its row",
}


def report(results: dict[str, Any]) -> str:
    """Return the results as a page."""
    runs = results["runs"]
    lines = ["# Many ranks", "", f"Measured by `make bench-ranks` on {results['machine']}.", ""]
    lines += ["| | " + " | ".join(f"{int(size):,} ranks" for size in runs) + " |", "|---|" + "---|" * len(runs)]
    rows: dict[str, Callable[[dict[str, float]], str]] = {
        label: lambda run, name=name: _milliseconds(run.get(name))
        for name, label in LINES.items()  # type: ignore[misc]
    }
    rows |= {
        "rank 0 reads all rows, none changed": lambda run: _milliseconds(run["reading_unchanged"]),
        "rank 0 reads all rows for the first time": lambda run: _milliseconds(run["first_reading"]),
        "a rank publishes a row with 8 bad checks": lambda run: _milliseconds(run["publish_bad"]),
        "size of the list of targets": lambda run: f"{run['targets_bytes'] / 1024:,.0f} KiB",
        "targets with `?scrape=leader`": lambda run: f"{run['leaders']:,.0f}",
        "series of rank 0's page": lambda run: f"{run['series_of_rank_0']:,.0f}",
        "series that the rules read": lambda run: f"{run['series_of_run']:,.0f}",
        "firing alerts on NaN and on damage": lambda run: f"{run['alerts']:,.0f}" if "alerts" in run else "-",
    }
    lines += [f"| {name} | " + " | ".join(tell(run) for run in runs.values()) + " |" for name, tell in rows.items()]
    training = results["training"]
    lines += ["", f"The training thread pays {1e6 * training['healthy_check']:.2f} us in a healthy check and "]
    lines[-1] += f"{1e6 * training['bad_check']:.2f} us in a bad one, whatever the number of ranks."
    lines += ["", "![Milliseconds over ranks](rank_rows.png)", "", NOTES]
    return "\n".join(lines) + "\n"


NOTES = """Every rank of the simulated run sees 7 NaN, and every rank is scraped. The rows are like those of real
ranks, in a real TCPStore whose server shared these cores. All series are served at one address, because one machine
cannot hold so many targets. With more than about 500 ranks, scrape only the leaders. Rank 0 reads in a background
thread and pauses 20 times as long as it has read; when nothing is bad, it reads every 5 s."""


def _milliseconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{1000 * value:,.0f} ms" if value >= 0.1 else f"{1000 * value:.3g} ms"


def main() -> None:
    """Measure, and write the page, the numbers and the chart."""
    parser = argparse.ArgumentParser("benchmarks.rank_rows", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--no-servers", action="store_true", help="leave the rules out")
    options = parser.parse_args()
    results: dict[str, Any] = {
        "machine": ", ".join(f"{k} {v}" for k, v in machine().items()),
        "training": measure_training(),
        "runs": {},
    }
    for size in options.sizes:
        run = results["runs"][str(size)] = measure_store(size)
        if not options.no_servers:
            for name, evaluate in (("prometheus", in_prometheus), ("victoria_metrics", in_victoria_metrics)):
                with tempfile.TemporaryDirectory() as folder:
                    run[name], alerts = evaluate(size, Path(folder))
                    run["alerts"] = max(run.get("alerts", 0), alerts)
        print(size, json.dumps(run), flush=True)
    (options.out / "rank_rows.json").write_text(json.dumps(results, indent=2) + "\n")
    (options.out / "RANK_ROWS.md").write_text(report(results))
    draw(results, options.out / "rank_rows.png")


if __name__ == "__main__":
    main()
