"""Which alerts a run has, their state, and what the receiver knows of them: no threads, no HTTP, no clock."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from esper_telemetry.health import CRITICAL_ABOVE, HealthTier
from esper_telemetry.snapshot import Snapshot
from esper_telemetry.snapshot.snapshot import KindHistory, RunInfo

_NAMES = {"inf": ("Inf", "EsperInfGradients"), "nan": ("NaN", "EsperNaNGradients")}
_ADVICE = {
    "inf": "Inf can recover: see whether the next checks are clean. If not, go back to the last good checkpoint and "
    "lower the learning rate or the loss scale.",
    "nan": "NaN does not recover once a step has been taken with it: stop the run and go back to the last good "
    "checkpoint.",
}
_NO_TIME = "0001-01-01T00:00:00Z"  # how Go writes "no time"
_FNV_OFFSET, _FNV_PRIME = 0xCBF29CE484222325, 0x100000001B3


@dataclass(frozen=True, slots=True)
class Alert:
    """Hold one alert.

    starts, ends: unix time; it fires while `ends` is None.
    told: whether the receiver knows that it fires.
    """

    labels: dict[str, str]
    annotations: dict[str, str]
    starts: float
    ends: float | None = None
    told: bool = False

    @property
    def fires(self) -> bool:
        """Tell whether it is to be sent as firing: it does, or the receiver has to hear first that it did."""
        return self.ends is None or not self.told

    def to_json(self) -> dict[str, Any]:
        """Return it as a webhook of Alertmanager has it."""
        return {
            "status": "firing" if self.fires else "resolved",
            "labels": self.labels,
            "annotations": self.annotations,
            "startsAt": _time(self.starts),
            "endsAt": _NO_TIME if self.fires or self.ends is None else _time(self.ends),
            "generatorURL": "",
            "fingerprint": fingerprint(self.labels),
        }


class Alerts:
    """Follow a run's snapshots, and know what its receiver has yet to hear.

    The same maxima decide as in the Prometheus rules, so an all-clear comes when a whole recent window was clean. An
    alert that came and went while the receiver was away is sent all the same.
    """

    def __init__(self) -> None:
        self._alerts: dict[tuple[str, str], Alert] = {}

    def see(self, snapshot: Snapshot, monotonic: float, now: float) -> None:
        """Take in what the recent window of a snapshot holds."""
        recent = snapshot.recent.read(monotonic)
        self._judge("inf", snapshot, recent.inf_max, now)
        self._judge("nan", snapshot, recent.nan_max, now)

    def see_last(self, snapshot: Snapshot, now: float) -> None:
        """Take in the last snapshot: nobody is there to wait for the window, so the last check has the last word."""
        for (kind, severity), alert in self._alerts.items():
            last = snapshot.inf_grad_count if kind == "inf" else snapshot.nan_grad_count
            if last == 0 and alert.ends is None:
                self._alerts[kind, severity] = replace(alert, ends=now)

    def pending(self) -> bool:
        """Tell whether the receiver has yet to hear something."""
        return any(not alert.told or alert.ends is not None for alert in self._alerts.values())

    def firing(self) -> bool:
        """Tell whether any alert is to be sent as firing."""
        return any(alert.fires for alert in self._alerts.values())

    def to_send(self) -> list[Alert]:
        """Return every alert there is; those that fire come first, and of them the critical ones."""
        return sorted(self._alerts.values(), key=lambda alert: (not alert.fires, alert.labels["severity"]))

    def sent(self) -> None:
        """Note that the receiver took them all."""
        self._alerts = {key: replace(alert, told=True) for key, alert in self._alerts.items() if alert.fires}

    def _judge(self, kind: str, snapshot: Snapshot, count: int, now: float) -> None:
        tier = HealthTier.of(count)
        for severity in ("critical", "warning"):
            alert = self._alerts.get((kind, severity))
            if severity != tier.value:
                self._end(kind, severity, alert, tier, now)
            elif alert is None:
                self._alerts[kind, severity] = _new(kind, severity, snapshot, count, now)
            elif alert.ends is not None:
                self._alerts[kind, severity] = replace(alert, ends=None)

    def _end(self, kind: str, severity: str, alert: Alert | None, tier: HealthTier, now: float) -> None:
        if alert is None or alert.ends is not None:
            return
        if tier is HealthTier.CRITICAL and not alert.told:
            del self._alerts[kind, severity]  # it got worse before anybody heard of it
        else:
            self._alerts[kind, severity] = replace(alert, ends=now)


def message(alerts: list[Alert], run: RunInfo) -> dict[str, Any]:
    """Return what Alertmanager posts to its webhooks, version 4 of the format: one message for one run."""
    group = {"run": run.run_id}
    firing = any(alert.fires for alert in alerts)
    return {
        "version": "4",
        "groupKey": f"{{}}:{{run={_quoted(run.run_id)}}}",
        "truncatedAlerts": 0,
        "status": "firing" if firing else "resolved",
        "receiver": "esper",
        "groupLabels": group,
        "commonLabels": _common([alert.labels for alert in alerts]),
        "commonAnnotations": _common([alert.annotations for alert in alerts]),
        "externalURL": "",
        "alerts": [alert.to_json() for alert in alerts],
    }


def for_alertmanager(alerts: list[Alert]) -> list[dict[str, Any]]:
    """Return what Prometheus posts to Alertmanager; an alert that fires has no end, and has to be said again."""
    keys = ("labels", "annotations", "startsAt", "endsAt")
    return [{key: each[key] for key in keys if each[key] != _NO_TIME} for each in (alert.to_json() for alert in alerts)]


def fingerprint(labels: dict[str, str]) -> str:
    """Return what Prometheus and Alertmanager call this set of labels: FNV-1a over its names and values, in order."""
    found = _FNV_OFFSET
    for byte in b"".join(f"{name}\0{labels[name]}\0".encode().replace(b"\0", b"\xff") for name in sorted(labels)):
        found = ((found ^ byte) * _FNV_PRIME) & 0xFFFFFFFFFFFFFFFF
    return f"{found:016x}"


def _new(kind: str, severity: str, snapshot: Snapshot, count: int, now: float) -> Alert:
    run = snapshot.run
    word, name = _NAMES[kind]
    history: KindHistory = getattr(snapshot, kind)
    instance = f"{run.run_id}:{run.rank}"
    labels = {
        "alertname": name,
        "severity": severity,
        "job": "esper/esper-telemetry",
        "instance": instance,
        "run": run.run_id,
        "run_id": run.run_id,
        "rank": str(run.rank),
        "host": run.host,
    }
    starts = now if history.last_timestamp is None else history.last_timestamp
    return Alert(labels, dict(_annotations(word, kind, instance, run, history, count)), starts)


def _annotations(
    word: str, kind: str, instance: str, run: RunInfo, history: KindHistory, count: int
) -> Iterator[tuple[str, str]]:
    yield "summary", f"{count} {word} in the gradient of {instance}"
    elements = "element" if count == 1 else "elements"
    began = f" It began in layer {history.origin_layer}." if history.origin_layer else ""
    yield (
        "description",
        f"One check of {run.run_id} (rank {run.rank} of {run.world_size}, on {run.host}) found {count} {word} "
        f"{elements} in the gradient; above {CRITICAL_ABOVE} is critical.{began} {_ADVICE[kind]}",
    )


def _common(each: list[dict[str, str]]) -> dict[str, str]:
    return {key: value for key, value in each[0].items() if all(other.get(key) == value for other in each)}


def _time(unix: float) -> str:
    return datetime.fromtimestamp(unix, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
