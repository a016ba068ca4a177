"""Bad checks at random, through real servers, to the pager: is each delivered, at the right severity, and when.

`python -m deploy.stack.soak --placements 50` takes some five minutes. Each placement is a single bad check, of random
kind and size, in a trainer of its own: before its first scrape, in the middle of its run, or right before its exit.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple
from urllib.parse import urlencode

from deploy.stack import configs, servers
from deploy.stack.pager import Notice, Pager
from esper_telemetry.health import HealthTier

INTERVAL_SECONDS = 1
TARGET_SECONDS = 2 * INTERVAL_SECONDS + 2.0
LIMIT_SECONDS = 40.0
AFTER_SECONDS = 5.0
"""How long a second, wrong notice is listened for after the last one."""

PLACES = ("before the first scrape", "mid-run", "right before exit")
LARGEST = 12
_LARGEST_CHECK = 150
_PATHS = {HealthTier.CRITICAL: "/page", HealthTier.WARNING: "/slack"}


class Placement(NamedTuple):
    """Say where a bad check falls, and of what kind and size it is."""

    number: int
    place: str
    kind: str
    count: int
    check: int

    def __str__(self) -> str:
        """Return it in words."""
        return f"{self.count:2d} {self.kind} {self.place}"

    @property
    def path(self) -> str:
        """Return where it has to be heard."""
        return _PATHS[HealthTier.of(self.count)]


class Heard(NamedTuple):
    """A notice of one trainer's bad check."""

    at: float
    path: str
    text: str


class Result(NamedTuple):
    """Hold what came of a placement; `bad_at` is the time of the bad check."""

    placement: Placement
    target: str
    bad_at: float


def placements(count: int, seed: int) -> list[Placement]:
    """Draw placements; the same seed gives the same ones."""
    draw = random.Random(seed)
    kinds = ("Inf", "NaN")
    return [
        Placement(
            number + 1,
            draw.choice(PLACES),
            draw.choice(kinds),
            draw.randint(1, LARGEST),
            draw.randint(1, _LARGEST_CHECK),
        )
        for number in range(count)
    ]


class Soak:
    """One stack of real servers, and small trainers before it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.heard: list[Heard] = []
        self._exit = ExitStack()
        self._targets: dict[str, str] = {}
        self._ports: set[int] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> Soak:
        """Start the servers."""
        enter = self._exit.enter_context
        pager = enter(Pager(listener=self._hear))
        config = configs.alertmanager_config(self.folder / "alertmanager", pager.url, group_wait="1s")
        alertmanager = enter(servers.alertmanager(config, self.folder))
        interval = f"{INTERVAL_SECONDS}s"
        config = configs.prometheus_config(self.folder / "prometheus", alertmanager.url, interval=interval)
        self._prometheus = enter(servers.prometheus(config, self.folder))
        return self

    def __exit__(self, *_: object) -> None:
        """Stop them."""
        self._exit.close()

    def run(self, placement: Placement) -> Result:
        """Run one trainer through its bad check, and wait for the first notice of it."""
        target = f"127.0.0.1:{self._port()}"
        with self._trainer(placement, target) as trainer, ExitStack() as listed:
            trainer.stdout.readline()
            list_it = partial(listed.enter_context, self._listed(target, f"soak-{placement.number}"))
            if placement.place == PLACES[0]:
                bad_at = trainer.train()
                list_it()
            else:
                list_it()
                self._wait_until_scraped(target)
                bad_at = trainer.train()
            result = Result(placement, target, bad_at)
            deadline = time.monotonic() + LIMIT_SECONDS
            while not self.notices(result) and time.monotonic() < deadline:
                time.sleep(0.1)
            trainer.end()
        return result

    def notices(self, result: Result) -> list[Heard]:
        """Return the first notices of a placement's bad check, on either way; not their all-clear."""
        return [heard for heard in list(self.heard) if f" in the gradient of {result.target}\n" in heard.text]

    def _hear(self, notice: Notice) -> None:
        if notice.path == "/page" and notice.body["status"] == "firing":
            lines = [alert["annotations"]["summary"] for alert in notice.body["alerts"]]
        elif notice.path == "/slack":
            titles = [attachment["title"] for attachment in notice.body["attachments"]]
            lines = [title.removeprefix("[firing] ") for title in titles if title.startswith("[firing] ")]
        else:
            return
        self.heard.append(Heard(time.time(), notice.path, "".join(f"{line}\n" for line in lines)))

    def _port(self) -> int:
        with self._lock:
            while (port := servers.free_port()) in self._ports:
                pass
            self._ports.add(port)
        return port

    @contextmanager
    def _trainer(self, placement: Placement, target: str) -> Iterator[_Trainer]:
        fault = f"{placement.kind.lower()}:{placement.count}@{placement.check}:2.weight"
        command = [sys.executable, "-m", "deploy.stack.soak_trainer", "--address", target, "--inject", fault]
        if placement.place == PLACES[2]:
            command.append("--exit")
        with (
            (self.folder / "trainers.log").open("a") as log,
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True) as process,
        ):
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                yield _Trainer(process.stdin, process.stdout, process.wait)
            finally:
                process.kill()

    @contextmanager
    def _listed(self, target: str, run: str) -> Iterator[None]:
        """Have a trainer scraped, with its own `run`, so that it has pages of its own."""
        self._list(target, run)
        try:
            yield
        finally:
            self._list(target, None)

    def _list(self, target: str, run: str | None) -> None:
        with self._lock:
            if run is None:
                del self._targets[target]
            else:
                self._targets[target] = run
            groups = [{"targets": [target], "labels": {"run": run}} for target, run in self._targets.items()]
            file = self.folder / "prometheus" / "targets" / "trainers.json"
            draft = file.with_suffix(".draft")
            draft.write_text(json.dumps(groups))
            draft.replace(file)

    def _wait_until_scraped(self, target: str) -> None:
        query = urlencode({"query": f'up{{instance="{target}"}} == 1'})
        deadline = time.monotonic() + LIMIT_SECONDS
        while time.monotonic() < deadline:
            with urllib.request.urlopen(f"{self._prometheus.url}/api/v1/query?{query}", timeout=10) as response:
                if json.load(response)["data"]["result"]:
                    return
            time.sleep(0.1)
        raise TimeoutError(f"{target} was not scraped within {LIMIT_SECONDS:.0f} s")


class _Trainer(NamedTuple):
    stdin: IO[str]
    stdout: IO[str]
    wait: Callable[[float], int]

    def end(self) -> None:
        """Let the run end well, still listed."""
        self.stdin.close()
        self.wait(LIMIT_SECONDS)

    def train(self) -> float:
        """Let it train, and return the time of its bad check."""
        self.stdin.write("\n")
        self.stdin.flush()
        return float(self.stdout.readline())


def right(result: Result, notices: Sequence[Heard]) -> bool:
    """Tell whether there was one notice, where it belongs, with the right count and kind."""
    expected = f"{result.placement.count} {result.placement.kind} in the gradient of {result.target}\n"
    return [(heard.path, heard.text) for heard in notices] == [(result.placement.path, expected)]


def main() -> int:
    """Run the soak; exit 0 only if every bad check was delivered as it should."""
    parser = argparse.ArgumentParser("soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--placements", type=int, default=50, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=3, metavar="N", help="trainers side by side (default: 3)")
    options = parser.parse_args()
    if min(options.placements, options.at_once) < 1:
        parser.error("--placements and --at-once: expected at least 1")
    drawn = placements(options.placements, options.seed)
    try:
        with tempfile.TemporaryDirectory(prefix="esper-soak-") as folder, Soak(Path(folder)) as soak:
            return _soak(soak, drawn, options.at_once)
    except (servers.ProgramNotFound, servers.ServerFailed, TimeoutError, subprocess.TimeoutExpired) as error:
        print(f"soak: {error}", file=sys.stderr)
        return 1


def _soak(soak: Soak, drawn: list[Placement], at_once: int) -> int:
    results = []
    with ThreadPoolExecutor(at_once) as pool:
        for result in pool.map(soak.run, drawn):
            results.append(result)
            notices = soak.notices(result)
            print(f"{result.placement.number:3d}/{len(drawn)} {_story(result, notices)}", flush=True)
    time.sleep(AFTER_SECONDS)
    return _report(soak, results)


def _story(result: Result, notices: Sequence[Heard]) -> str:
    if not notices:
        return f"{result.placement}: NOT heard within {LIMIT_SECONDS:.0f} s"
    heard = ", ".join(f"{notice.path} after {notice.at - result.bad_at:.2f} s" for notice in notices)
    wrong = "" if right(result, notices) else f"  WRONG: {[notice.text.strip() for notice in notices]}"
    return f"{result.placement}: {heard}{wrong}"


def _report(soak: Soak, results: list[Result]) -> int:
    delivered = 0
    for result in results:
        notices = soak.notices(result)
        if right(result, notices):
            delivered += 1
        else:
            print(f"wrong in the end: {result.placement.number} {_story(result, notices)}")
    print(f"{delivered} of {len(results)} delivered once, at the right severity, with the right count")
    for place in (None, *PLACES):
        _print_delays(soak, [result for result in results if place in (None, result.placement.place)], place)
    return 0 if delivered == len(results) else 1


def _print_delays(soak: Soak, results: list[Result], place: str | None) -> None:
    delays = sorted(notices[0].at - result.bad_at for result in results if (notices := soak.notices(result)))
    if not delays:
        return
    median = statistics.median(delays)
    p90 = delays[min(len(delays) - 1, round(0.9 * len(delays)))]
    print(
        f"{place or 'delay from bad check to notice'}: min {delays[0]:.2f} s, median {median:.2f} s, "
        f"p90 {p90:.2f} s, max {delays[-1]:.2f} s ({len(delays)})"
    )
    if place is None:
        print(f"target for the median: under {TARGET_SECONDS:.1f} s")


if __name__ == "__main__":
    sys.exit(main())
