"""Push a monitor's snapshot over OTLP, for trainers that cannot be scraped."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from esper_telemetry import arguments
from esper_telemetry.exporters.bell import Bell
from esper_telemetry.exporters.exit import at_exit, not_at_exit
from esper_telemetry.exporters.otlp.environment import metrics_url, read_settings, read_silence, set_log_level
from esper_telemetry.exporters.otlp.variables import logger
from esper_telemetry.exporters.samples import snapshot_of
from esper_telemetry.exporters.urls import without_secrets
from esper_telemetry.snapshot import Snapshot

if TYPE_CHECKING:
    from esper_telemetry.exporters.otlp.sender import OtlpSender

_RETRY_SECONDS = 5.0
_REPEAT_SECONDS = 1.0


class Watched(Protocol):
    """A monitor: a snapshot, and news of each check."""

    @property
    def snapshot(self) -> Snapshot:
        """Return what the last check found."""

    def on_check(self, listener: Callable[[Snapshot], None]) -> Callable[[], None]:
        """Call `listener` with each new snapshot."""


class OtlpExporter:
    """Push a monitor's snapshot until `close()`, or until the process ends.

    One thread pushes: at once after a bad check, once a second while checks stay bad, and otherwise at the interval.
    There is no queue: each push sends the current snapshot, whose counters and recent maxima hold what happened before.
    A forked child pushes nothing.
    """

    def __init__(self, monitor: Watched, endpoint: str | None, deadline: float) -> None:
        snapshot_of("monitor", monitor)
        self._deadline_seconds = arguments.seconds("deadline", deadline)
        set_log_level()
        self.url = without_secrets(metrics_url(endpoint))
        self._sender: OtlpSender | None = None
        self._closed = False
        self._pid = os.getpid()
        if silence := read_silence():
            logger.warning("esper: nothing is pushed to %s: %s", self.url, silence)
            self._closed = True
            return
        settings = read_settings(endpoint)
        from esper_telemetry.exporters.otlp.sender import OtlpSender  # OpenTelemetry takes a while to import

        self._sender = OtlpSender(monitor, settings)
        self._interval = settings.interval
        self._deadline: float | None = None
        self._news = Bell()
        self._stop = Bell()
        self._forget = monitor.on_check(self._see)
        self._thread = threading.Thread(target=self._run, args=(self._sender,), name="esper-otlp", daemon=True)
        self._thread.start()
        at_exit(self.close)

    @property
    def failures(self) -> int:
        """Return how many pushes failed."""
        return 0 if self._sender is None else self._sender.failures

    def close(self) -> None:
        """Push the last state, and wait for it until the deadline at most; a second call does nothing."""
        if self._sender is None or self._closed or os.getpid() != self._pid:
            return
        if self._deadline is None:  # else a signal interrupts the first call and ends the process: wait here
            self._deadline = time.monotonic() + self._deadline_seconds
            self._forget()
            self._stop.ring()
            self._news.ring()
            self._sender.interrupt()
        self._thread.join(max(self._deadline - time.monotonic(), 0.0))
        if self._closed:
            return
        self._closed = True
        not_at_exit(self.close)
        if self._thread.is_alive() or self._sender.trouble:
            reason = self._sender.trouble or f"no answer in {self._deadline_seconds:g} s"
            logger.warning("esper: the last state did not reach %s: %s", self.url, reason)

    def _see(self, snapshot: Snapshot) -> None:
        if snapshot.inf_grad_count or snapshot.nan_grad_count:
            self._news.ring()

    def _run(self, sender: OtlpSender) -> None:
        rung = False
        while self._deadline is None:
            started = time.monotonic()
            self._push(sender)
            if rung:
                self._stop.wait(_REPEAT_SECONDS)
            left = self._interval - (time.monotonic() - started)
            rung = self._news.wait(min(self._interval, _RETRY_SECONDS) if sender.trouble else max(left, 0.0))
        sender.send(timeout=max(self._deadline - time.monotonic(), 0.1))

    def _push(self, sender: OtlpSender) -> None:
        first = sender.failures == 0
        sender.send()
        if sender.trouble and first and self._deadline is None:
            reason = sender.trouble
            logger.warning("esper: a push to %s failed: %s (later failures are counted, not logged)", self.url, reason)


def start_otlp(monitor: Watched, endpoint: str | None = None, *, deadline: float = 5.0) -> OtlpExporter:
    """Push what `monitor` measures over OTLP (HTTP, protobuf), and return the exporter.

    The standard OTEL_* variables also set headers, interval, certificates and resource attributes, and can turn pushing
    off.

    endpoint: URL of the receiver; a base such as http://localhost:4318 gets the path /v1/metrics. Default: as the
        OTEL_* variables say, or http://localhost:4318.
    deadline: how many seconds the last push may take at exit.

    Raise ValueError when the endpoint or one of the variables is invalid, ImportError without the extra `otlp`.
    """
    return OtlpExporter(monitor, endpoint, deadline)
