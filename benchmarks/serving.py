"""`python -m benchmarks.serving`: what a training thread feels of an exporter that is attacked.

The trainer, its exporter included, has one core to itself, so that everything the exporter does is taken from the
training. The attackers have another core. What they cost by themselves, in caches and memory bandwidth, is seen by
pointing them at the exporter of another process, and is what the trainer is compared with.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean, median, quantiles

import bcrypt
import torch
import trustme
from prometheus_client import CollectorRegistry, generate_latest
from torch import nn

from benchmarks.abuse import ABUSES, PASSWORD, SCRAPE, USER, Target
from benchmarks.machine import machine
from esper_telemetry import GradientMonitor, start_exporter, watch
from esper_telemetry.exporters.prometheus import EsperCollector

HERE = Path(__file__).parent
TRAINER_CORE, ABUSER_CORE = 0, 1
_WARM_UP_SECONDS = 3.0
_AFTERMATH_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Felt:
    """Hold what one stretch of training felt.

    step: mean seconds of a step.
    waited: share of the time in which the training thread did not run, but for that in which another process did.
    exporter_share: processor time of the exporter's thread, of the time that passed.
    kept, new: seconds that each good scrape took, over a kept and over a new connection, while the attack went on.
    after: those of the scrapes that began in the first second after the attack had ended.
    """

    step: float
    waited: float
    exporter_share: float
    kept: list[float]
    new: list[float]
    after: list[float]
    threads: int
    memory: int


def main() -> None:
    """Measure, print, and write the report where asked to."""
    options = _options()
    torch.set_num_threads(1)
    described = machine()
    os.sched_setaffinity(0, {TRAINER_CORE})
    measured = _kept_from_before(options.add_to)
    with tempfile.TemporaryDirectory() as folder, _elsewhere(Path(folder)) as elsewhere:
        trainer = Trainer(_web_config(Path(folder)))
        for name in options.attacks or ABUSES:
            for _ in range(options.rounds):
                theirs = trainer.feel(name, elsewhere, options.seconds)
                measured.setdefault(name, []).append((theirs, trainer.feel(name, trainer.target, options.seconds)))
            print(_row(name, measured[name]), flush=True)
            if options.add_to is not None:
                options.add_to.write_text(json.dumps(measured, default=asdict))
        trainer.close()
    if options.add_to is not None:
        options.add_to.write_text(json.dumps(measured, default=asdict))
    lines = [*_heading(described, measured, options.seconds), *(_row(name, measured[name]) for name in measured)]
    lines += ["", _page_of_ten_thousand(), ""]
    if options.output is not None:
        options.output.write_text("\n".join(lines))


class Trainer:
    """Train a small network, the worst case: its steps are short and need Python's lock often."""

    def __init__(self, web_config: Path) -> None:
        self._model = nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 8))
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=1e-3)
        self._inputs = torch.randn(256, 256)
        self._monitor = watch(self._model)
        self._exporter = start_exporter(self._monitor, "127.0.0.1:0", linger=0, web_config_file=web_config)
        self.target = Target(int(self._exporter.url.rpartition(":")[2]))
        serving = next(thread for thread in threading.enumerate() if thread.name == "esper-exporter")
        self._exporter_clock = time.pthread_getcpuclockid(serving.ident or 0)
        self.train(_WARM_UP_SECONDS)

    def train(self, seconds: float) -> float:
        """Train so long, and return the mean seconds of a step."""
        steps, started = 0, time.perf_counter()
        while (passed := time.perf_counter() - started) < seconds:
            self._optimizer.zero_grad()
            self._model(self._inputs).square().mean().backward()
            self._optimizer.step()
            steps += 1
        return passed / steps

    def feel(self, name: str, target: Target, seconds: float) -> Felt:
        """Train while the target is abused and scraped, and a little longer."""
        with _scraper(target) as scraper:
            with _process(name, target):
                self.train(_WARM_UP_SECONDS)
                used, started = time.clock_gettime(self._exporter_clock), time.perf_counter()
                ran, strange = time.thread_time(), _strangers_seconds()
                step = self.train(seconds)
                passed = time.perf_counter() - started
                waited = 1 - (time.thread_time() - ran + _strangers_seconds() - strange) / passed
                share = (time.clock_gettime(self._exporter_clock) - used) / passed
                threads, memory = threading.active_count(), _resident_bytes()
                ended = time.monotonic()
            self.train(_AFTERMATH_SECONDS + 0.5)
            scrapes: dict[str, list[tuple[float, float]]] = json.loads(scraper.communicate()[0])
        kept, new = ([took for began, took in scrapes[each] if began < ended] for each in ("kept", "new"))
        after = [took for each in scrapes.values() for began, took in each if 0 <= began - ended < _AFTERMATH_SECONDS]
        return Felt(step, waited, share, kept, new, after, threads, memory)

    def close(self) -> None:
        """Stop to watch and to serve."""
        self._exporter.close()
        self._monitor.close()


def serve_elsewhere(web_config: Path, ready: Connection) -> None:
    """Serve in a process of its own, on the attackers' core."""
    os.sched_setaffinity(0, {ABUSER_CORE})
    exporter = start_exporter(GradientMonitor(nn.Linear(2, 2)), "127.0.0.1:0", linger=0, web_config_file=web_config)
    ready.send(int(exporter.url.rpartition(":")[2]))
    threading.Event().wait()


def _kept_from_before(path: Path | None) -> dict[str, list[tuple[Felt, Felt]]]:
    """Return what was measured by earlier calls: by attack, pairs of what was felt with it elsewhere, and here."""
    if path is None or not path.exists():
        return {}
    return {name: [(Felt(**a), Felt(**b)) for a, b in pairs] for name, pairs in json.loads(path.read_text()).items()}


def _row(name: str, measured: list[tuple[Felt, Felt]]) -> str:
    felt = [ours for _, ours in measured]
    ratios = [ours.step / theirs.step - 1 for theirs, ours in measured]
    waited = mean(ours.waited - theirs.waited for theirs, ours in measured)
    return (
        f"| {name} | {waited:.1%} | {median(ratios):+.1%} ({min(ratios):+.1%} to {max(ratios):+.1%}) "
        f"| {mean(each.exporter_share for each in felt):.1%} "
        f"| {_times([took for each in felt for took in each.kept])} "
        f"| {_times([took for each in felt for took in each.new])} "
        f"| {max((took for each in felt for took in each.after), default=math.nan) * 1e3:.0f} ms "
        f"| {max(each.threads for each in felt)} | {max(each.memory for each in felt) / 2**20:.0f} MiB |"
    )


def _times(took: list[float]) -> str:
    p99 = quantiles(took, n=100, method="inclusive")[98]
    return f"{median(took) * 1e3:.0f} / {p99 * 1e3:.0f} / {max(took) * 1e3:.0f} ms, {len(took)}"


def _heading(described: dict[str, str], measured: dict[str, list[tuple[Felt, Felt]]], seconds: float) -> list[str]:
    rounds = max(len(pairs) for pairs in measured.values())
    return [
        "# An exporter under attack",
        "",
        f"{datetime.now(UTC):%Y-%m-%d %H:%M UTC}, by `make bench-serving`: TLS and a password, {rounds} rounds "
        f"of {seconds:g} s each.",
        "",
        *(f"- {name}: {value}" for name, value in described.items()),
        "",
        "Training and exporter share one core; the attackers have another. Step time is compared with the same attack",
        "on an exporter in another process: the median of the rounds, and the lowest and highest. Six well-behaved",
        "scrapers scrape twice a second each, four over kept connections and two over a new connection each time,",
        'also at the moment when all attackers arrive. `inf` would be a failed scrape. The column "right after" has',
        "the longest scrape of those that began within a second after the end of the attack.",
        "",
        "The first column is the steadiest: the share of the time in which the training thread could not run because",
        "it waited for the core or for the GIL, minus the same share under the attack on the other process. Time that",
        "other processes of the machine took from that core is not included.",
        "",
        "| attack | taken from the training thread | step time | exporter's processor time "
        "| scrape, kept connection: median / p99 / max, count | scrape, new connection | right after | threads "
        "| memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]


def _page_of_ten_thousand() -> str:
    model = nn.ModuleList(nn.Linear(2, 1, bias=False) for _ in range(10_000))
    monitor = GradientMonitor(model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    for _ in range(3):
        monitor.update()
    registry = CollectorRegistry()
    registry.register(EsperCollector(monitor))
    took = []
    for _ in range(20):
        started = time.perf_counter()
        size = len(generate_latest(registry))
        took.append(time.perf_counter() - started)
    line = (
        f"A page of 10,000 layers, all bad: {size / 1024:.0f} KiB in {median(took) * 1e3:.1f} ms "
        f"({max(took) * 1e3:.1f} ms at most, of 20)."
    )
    print(line, flush=True)
    return line


@contextmanager
def _scraper(target: Target) -> Iterator[subprocess.Popen[str]]:
    with _process(SCRAPE, target) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process


@contextmanager
def _process(what: str, target: Target) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "benchmarks.abuse", what, str(target.port), str(ABUSER_CORE)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def _elsewhere(folder: Path) -> Iterator[Target]:
    spawn = get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=serve_elsewhere, args=(_web_config(folder), theirs), daemon=True)
    process.start()
    try:
        yield Target(ours.recv())
    finally:
        process.kill()
        process.join()


def _web_config(folder: Path) -> Path:
    trustme.CA().issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(folder / "both.pem")
    hashed = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(10)).decode()
    path = folder / "web.yml"
    path.write_text(
        f"tls_server_config:\n  cert_file: both.pem\n  key_file: both.pem\nbasic_auth_users:\n  {USER}: {hashed}\n"
    )
    return path


def _strangers_seconds() -> float:
    """Return for how long other processes have run on the trainer's core."""
    lines = Path("/proc/stat").read_text().splitlines()
    user, nice, system, _, _, _, _, steal = map(int, lines[1 + TRAINER_CORE].split()[1:9])
    return (user + nice + system + steal) / os.sysconf("SC_CLK_TCK") - time.process_time()


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.serving", description="Attack an exporter while it trains.")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default: 3)")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of one stretch (default: 10)")
    parser.add_argument("--attacks", nargs="+", choices=ABUSES, metavar="NAME", help="only these (default: all)")
    parser.add_argument("--add-to", type=Path, help="keep what was measured in this file, together with what it holds")
    parser.add_argument("--output", type=Path, help="where to write the report")
    return parser.parse_args()


if __name__ == "__main__":
    main()
