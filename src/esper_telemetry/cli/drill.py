"""A fire drill for operators: does a bad gradient reach the pager? Watched station by station, then cleared."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from esper_telemetry.health import CRITICAL_ABOVE

ALERTS = {"inf": "EsperInfGradients", "nan": "EsperNaNGradients"}
_POLL_SECONDS = 0.5
_REQUEST_SECONDS = 5.0


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


def run_drill(options: Options) -> Iterator[Station]:
    """Start a drill, yield each station as it is reached, and clear the drill in the end.

    It stops at the first station that is not reached in time. Raise ValueError when the options are wrong or one of
    the three servers refuses or does not answer at all.
    """
    _check(options)
    severity = "critical" if options.count > CRITICAL_ABOVE else "warning"
    labels = f'alertname="{ALERTS[options.kind]}",severity="{severity}",drill="true"'
    drill = f"{options.exporter}/-/drill"
    query = urlencode({"kind": options.kind, "count": options.count, "seconds": int(options.timeout) + 60})
    _request("--exporter", f"{drill}?{query}", "POST")
    started = time.monotonic()
    stations: list[tuple[str, Callable[[], bool]]] = [
        ("Prometheus scraped it", lambda: _query(options, f'esper_{options.kind}_grad_recent_max{{drill="true"}}')),
        ("the rule fired", lambda: _query(options, f'ALERTS{{{labels},alertstate="firing"}}')),
        ("Alertmanager took it", lambda: _taken(options, labels)),
    ]
    try:
        for name, reached in stations:
            seconds = _wait(reached, started, options.timeout)
            yield Station(name, seconds)
            if seconds is None:
                return
    finally:
        _request("--exporter", drill, "DELETE")


def _check(options: Options) -> None:
    if options.count < 1:
        raise ValueError(f"--count: expected at least 1, got {options.count}")
    if not 1 <= options.timeout <= 600:
        raise ValueError(f"--timeout: expected 1 to 600 seconds, got {options.timeout:g}")
    _request("--prometheus", f"{options.prometheus}/-/healthy")
    _request("--alertmanager", f"{options.alertmanager}/-/healthy")


def _wait(reached: Callable[[], bool], started: float, timeout: float) -> float | None:
    while (seconds := time.monotonic() - started) < timeout:
        if reached():
            return seconds
        time.sleep(_POLL_SECONDS)
    return None


def _query(options: Options, expression: str) -> bool:
    url = f"{options.prometheus}/api/v1/query?{urlencode({'query': expression})}"
    return bool(json.loads(_request("--prometheus", url))["data"]["result"])


def _taken(options: Options, labels: str) -> bool:
    filters = urlencode([("filter", label) for label in labels.split(",")])
    alerts: list[Any] = json.loads(_request("--alertmanager", f"{options.alertmanager}/api/v2/alerts?{filters}"))
    return bool(alerts)


def _request(option: str, url: str, method: str = "GET") -> bytes:
    try:
        request = urllib.request.Request(url, method=method, headers={"X-Esper-Drill": "1"})
        with urllib.request.urlopen(request, timeout=_REQUEST_SECONDS) as response:
            body: bytes = response.read()
            return body
    except urllib.error.HTTPError as error:
        reason = error.read().decode(errors="replace").strip().partition("\n")[0] or error.reason
        raise ValueError(f"{option}: {url} answered {error.code}: {reason}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{option}: expected the URL of a server that answers, got {url!r}: {error}") from None
