"""End to end, natively: a real PPO run with a fault, Prometheus, Alertmanager, node_exporter, and a pager.

`python -m deploy.stack` starts them on loopback with the shipped configurations and shows a page arriving.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlencode

from rich.console import Console
from rich.live import Live
from rich.table import Table

from deploy.stack import configs, servers
from deploy.stack.pager import Pager

FAULT = "inf:7@200:action_net.weight"
LIMIT_SECONDS = 120.0
_FIRING = 'ALERTS{alertname=~"EsperInfGradients|EsperNaNGradients",severity="critical",alertstate="firing"}'


class Stack:
    """Every server on a free loopback port, with the shipped configurations; `folder` keeps their logs.

    leader: `host:port` of the rank 0 that lists the ranks of a run.
    """

    def __init__(self, folder: Path, leader: str | None = None) -> None:
        self.folder = folder
        self._leader = leader
        self._exit = ExitStack()
        self.pager = Pager()
        self.textfiles = folder / "textfiles"
        self.textfiles.mkdir()

    def __enter__(self) -> Stack:
        """Start them all, the receiving end first."""
        enter = self._exit.enter_context
        enter(self.pager)
        config = configs.alertmanager_config(self.folder / "alertmanager", self.pager.url)
        self.alertmanager = enter(servers.alertmanager(config, self.folder))
        self.node_exporter = enter(servers.node_exporter(self.textfiles, self.folder))
        config = configs.prometheus_config(self.folder / "prometheus", self.alertmanager.url, leader=self._leader)
        self.prometheus = enter(servers.prometheus(config, self.folder))
        self.list("nodes", self.node_exporter.url)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop them all."""
        self._exit.close()

    def list(self, kind: str, *urls: str) -> None:
        """Scrape these trainers or nodes and no others."""
        targets = self.folder / "prometheus" / "targets" / f"{kind}.json"
        configs.list_targets(targets, [url.removeprefix("http://") for url in urls])

    def holds(self, expression: str) -> bool:
        """Tell whether a query has a result."""
        url = f"{self.prometheus.url}/api/v1/query?{urlencode({'query': expression})}"
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(json.load(response)["data"]["result"])

    @contextmanager
    def trainer(self, fault: str) -> Iterator[str]:
        """Train PPO with a fault while the block lasts, and yield the address of its exporter."""
        port = servers.free_port()
        esper = Path(sys.executable).with_name("esper")
        arguments = ["--episodes", "100000", "--listen-address", f"127.0.0.1:{port}", "--inject", fault]
        more = ["--on-critical", "skip", "--textfile-dir", str(self.textfiles), "--linger", "0", "--allow-drill"]
        with (self.folder / "esper.log").open("wb") as log:
            run = subprocess.Popen([esper, "ppo", *arguments, *more], stdout=log, stderr=log)
        self.list("trainers", f"127.0.0.1:{port}")
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            self.list("trainers")
            run.terminate()
            run.wait()


class Stages:
    """Show when each stage was reached."""

    def __init__(self, stages: dict[str, Callable[[], bool]], console: Console) -> None:
        self._stages = stages
        self._reached: dict[str, float] = {}
        self._live = Live(console=console, get_renderable=self._table, refresh_per_second=4)
        self._started = time.monotonic()

    def watch(self) -> bool:
        """Wait for one stage after the other; return whether the last was reached in time."""
        with self._live:
            for name, holds in self._stages.items():
                while not _quietly(holds):
                    if time.monotonic() - self._started > LIMIT_SECONDS:
                        return False
                    time.sleep(0.1)
                self._reached[name] = time.monotonic() - self._started
        return True

    def _table(self) -> Table:
        table = Table(box=None, show_header=False)
        for name in self._stages:
            seconds = self._reached.get(name)
            table.add_row(name, "..." if seconds is None else f"{seconds:5.1f} s")
        return table


def _quietly(holds: Callable[[], bool]) -> bool:
    """Ask; a server that does not answer yet has not got there."""
    try:
        return holds()
    except OSError:
        return False


def _exporter_shows(url: str) -> bool:
    with urllib.request.urlopen(f"{url}/metrics", timeout=5) as page:
        return '_checks_total{kind="inf",tier="critical"} 1.0' in page.read().decode()


def main() -> int:
    """Show a page arriving; on a terminal keep everything up until Ctrl-C."""
    parser = argparse.ArgumentParser("python -m deploy.stack", description=__doc__)
    parser.add_argument("--once", action="store_true", help="end after the page, on a terminal too")
    options = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory(prefix="esper-stack-") as folder:
        try:
            with Stack(Path(folder)) as stack, stack.trainer(FAULT) as trainer:
                return _show(stack, trainer, console, hold=console.is_terminal and not options.once)
        except (servers.ProgramNotFound, servers.ServerFailed) as error:
            print(error, file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 0


def _show(stack: Stack, trainer: str, console: Console, *, hold: bool) -> int:
    console.print(f"esper {trainer}   prometheus {stack.prometheus.url}   alertmanager {stack.alertmanager.url}")
    stages = {
        f"injected ({FAULT})": lambda: _exporter_shows(trainer),
        "scraped": lambda: stack.holds("esper_inf_grad_recent_max > 5"),
        "rule firing": lambda: stack.holds(_FIRING),
        "page received": lambda: bool(stack.pager.pages()),
    }
    return hold_on(stack, stages, console, hold=hold)


def hold_on(stack: Stack, stages: dict[str, Callable[[], bool]], console: Console, *, hold: bool) -> int:
    """Watch the stages, print the page, and keep everything up if asked; return the exit code."""
    if not Stages(stages, console).watch():
        console.print(f"no page within {LIMIT_SECONDS:.0f} s; esper's log ends:\n{_log_end(stack.folder)}")
        return 1
    for alert in stack.pager.pages()[0]["alerts"]:
        console.print(f"\n[bold]{alert['annotations']['summary']}[/]\n{alert['annotations']['description']}")
    if hold:
        console.print("\neverything stays up until Ctrl-C")
        while True:
            time.sleep(3600)
    return 0


def _log_end(folder: Path) -> str:
    return "\n".join((folder / "esper.log").read_text().splitlines()[-5:])


if __name__ == "__main__":
    sys.exit(main())
