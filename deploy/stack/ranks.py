"""A run of two ranks natively: torchrun, a fault in one rank, Prometheus that finds both through rank 0, and the page.

`python -m deploy.stack.ranks` shows it arriving.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from deploy.stack import servers
from deploy.stack.__main__ import Stack, hold_on
from deploy.stack.configs import ROOT

FAULT = "nan:7@100:rank=1"
EXAMPLE = ROOT / "examples" / "ddp_gpt.py"
_FIRING = 'ALERTS{alertname="EsperNaNGradients",severity="critical",alertstate="firing"}'


@contextmanager
def torchrun(folder: Path, leader: str) -> Iterator[None]:
    """Train on two ranks while the block lasts; rank 0 serves at `leader`."""
    fault = ("--inject", FAULT, "--on-critical", "skip", "--steps", "1000000", "--pause", "0.05")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (folder / "esper.log").open("wb") as log:
        run = subprocess.Popen(
            [*command, "--listen-address", leader, "--linger", "0", *fault],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield
    finally:
        os.killpg(run.pid, signal.SIGTERM)  # launcher and ranks
        run.wait()


def main() -> int:
    """Show a page about a run of two ranks; on a terminal keep everything up until Ctrl-C."""
    parser = argparse.ArgumentParser("python -m deploy.stack.ranks", description=__doc__)
    parser.add_argument("--once", action="store_true", help="end after the page, on a terminal too")
    options = parser.parse_args()
    console = Console()
    leader = f"127.0.0.1:{servers.free_port()}"
    with tempfile.TemporaryDirectory(prefix="esper-ranks-") as folder:
        try:
            with Stack(Path(folder), leader=leader) as stack, torchrun(stack.folder, leader):
                return _show(stack, f"http://{leader}", console, hold=console.is_terminal and not options.once)
        except (servers.ServerNotFound, servers.ServerFailed) as error:
            print(error, file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 0


def _show(stack: Stack, leader: str, console: Console, *, hold: bool) -> int:
    console.print(f"rank 0 {leader}   prometheus {stack.prometheus.url}   alertmanager {stack.alertmanager.url}")
    stages = {
        "both ranks train": lambda: _page(leader, "esper_ranks_reporting 2.0"),
        "both are found through rank 0": lambda: stack.holds('count(up{job="esper"} == 1) == 2'),
        f"injected ({FAULT})": lambda: _page(leader, "esper_global_nan_grad_recent_max 7.0"),
        "rule firing": lambda: stack.holds(_FIRING),
        "page received": lambda: bool(stack.pager.pages()),
    }
    return hold_on(stack, stages, console, hold=hold)


def _page(leader: str, line: str) -> bool:
    with urllib.request.urlopen(f"{leader}/metrics", timeout=5) as page:
        return line in page.read().decode()


if __name__ == "__main__":
    sys.exit(main())
