"""A fire drill for operators: does a bad gradient reach the pager? Watched station by station, then cleared."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlencode

from esper_telemetry.cli.parser import EXIT_FAILED, EXIT_USAGE, Commands, seconds, whole
from esper_telemetry.exporters.address import DEFAULT_PORT
from esper_telemetry.health import CRITICAL_ABOVE
from esper_telemetry.metrics import KINDS

if TYPE_CHECKING:
    from esper_telemetry.cli.client import Client

ALERTS = {"inf": "EsperInfGradients", "nan": "EsperNaNGradients"}
_POLL_SECONDS = 0.5
_DRILL = (
    "Rehearse a page: make a running exporter, started with --allow-drill, show a made-up value labelled as a drill; "
    "report when it reaches Prometheus, the rule and Alertmanager; then clear it."
)


@dataclass(frozen=True, slots=True)
class Options:
    """Hold what `esper drill` was asked to do; see its `--help`."""

    exporter: str
    prometheus: str
    alertmanager: str
    kind: str
    count: int
    timeout: float


@dataclass(frozen=True, slots=True)
class Station:
    """Say when the drill arrived somewhere; seconds since its start, None when it did not in time."""

    name: str
    seconds: float | None


def add_drill(commands: Commands) -> None:
    """Add the command."""
    command = commands.add_parser("drill", help="rehearse a page with a made-up bad gradient", description=_DRILL)
    command.set_defaults(run=_drill)
    for server, port in (("exporter", DEFAULT_PORT), ("prometheus", 9090), ("alertmanager", 9093)):
        url = f"http://127.0.0.1:{port}"
        command.add_argument(f"--{server}", metavar="URL", default=url, help=f"the {server} (default: {url})")
    command.add_argument("--kind", choices=KINDS, default="inf", help="what the made-up check found (default: inf)")
    command.add_argument("--count", type=whole, default=6, help="number of elements; 6 or more page (default: 6)")
    command.add_argument(
        "--timeout", metavar="SECONDS", type=seconds, default=120.0, help="give up after this long (default: 120)"
    )
    command.add_argument("--ca-file", metavar="FILE", help="CA certificates to trust, for servers that use TLS")
    command.add_argument("--user", metavar="NAME", help="user name, for servers that ask for one")
    command.add_argument("--password-file", metavar="FILE", help="file that holds the password")


def run_drill(asked: Options, client: Client) -> Iterator[Station]:
    """Start a drill, yield each station as it is reached, and clear the drill in the end.

    It stops at the first station that is not reached in time. Raise ValueError when what was asked is wrong or one of
    the three servers refuses or does not answer at all.
    """
    _check(asked, client)
    severity = "critical" if asked.count > CRITICAL_ABOVE else "warning"
    labels = f'alertname="{ALERTS[asked.kind]}",severity="{severity}",drill="true"'
    path = f"{asked.exporter}/-/drill"
    query = urlencode({"kind": asked.kind, "count": asked.count, "seconds": int(asked.timeout) + 60})
    client.ask("--exporter", f"{path}?{query}", "POST")
    started = time.monotonic()
    scraped = f'esper_{asked.kind}_grad_recent_max{{drill="true"}}'
    stations: list[tuple[str, Callable[[], bool]]] = [
        ("Prometheus scraped it", lambda: _found(asked, client, scraped)),
        ("the rule fired", lambda: _found(asked, client, f'ALERTS{{{labels},alertstate="firing"}}')),
        ("Alertmanager received it", lambda: _taken(asked, client, labels)),
    ]
    try:
        for name, reached in stations:
            after = _wait(reached, started, asked.timeout)
            yield Station(name, after)
            if after is None:
                return
    finally:
        client.ask("--exporter", path, "DELETE")


def _drill(options: argparse.Namespace) -> int:
    from esper_telemetry.cli.client import Client, Login

    asked = Options(
        exporter=options.exporter.rstrip("/"),
        prometheus=options.prometheus.rstrip("/"),
        alertmanager=options.alertmanager.rstrip("/"),
        kind=options.kind,
        count=options.count,
        timeout=options.timeout,
    )
    print(f"esper drill: {asked.kind} {asked.count} at {asked.exporter}", flush=True)
    reached = False
    try:
        login = Login(options.ca_file, options.user, options.password_file)
        for station in run_drill(asked, Client((asked.exporter, asked.prometheus, asked.alertmanager), login)):
            reached = station.seconds is not None
            when = f"after {station.seconds:.1f} s" if reached else f"NOT within {asked.timeout:g} s"
            print(f"{station.name:<22} {when}", flush=True)
    except ValueError as error:
        print(f"esper drill: {error}", file=sys.stderr)
        return EXIT_USAGE
    print("the drill is cleared; its page resolves by itself", flush=True)
    return 0 if reached else EXIT_FAILED


def _check(asked: Options, client: Client) -> None:
    if asked.count < 1:
        raise ValueError(f"--count: expected at least 1, got {asked.count}")
    if not 1 <= asked.timeout <= 600:
        raise ValueError(f"--timeout: expected 1 to 600 seconds, got {asked.timeout:g}")
    client.ask("--prometheus", f"{asked.prometheus}/-/healthy")
    client.ask("--alertmanager", f"{asked.alertmanager}/-/healthy")


def _wait(reached: Callable[[], bool], started: float, timeout: float) -> float | None:
    while (after := time.monotonic() - started) < timeout:
        if reached():
            return after
        time.sleep(_POLL_SECONDS)
    return None


def _found(asked: Options, client: Client, expression: str) -> bool:
    url = f"{asked.prometheus}/api/v1/query?{urlencode({'query': expression})}"
    try:
        return bool(json.loads(client.ask("--prometheus", url))["data"]["result"])
    except (json.JSONDecodeError, LookupError, TypeError):
        raise ValueError(f"--prometheus: expected a Prometheus response from {url}, got something else") from None


def _taken(asked: Options, client: Client, labels: str) -> bool:
    filters = urlencode([("filter", label) for label in labels.split(",")])
    url = f"{asked.alertmanager}/api/v2/alerts?{filters}"
    try:
        return bool(json.loads(client.ask("--alertmanager", url)))
    except json.JSONDecodeError:
        raise ValueError(f"--alertmanager: expected an Alertmanager response from {url}, got something else") from None
