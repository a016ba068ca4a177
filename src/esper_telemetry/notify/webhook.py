"""Post a run's alerts to a webhook, without Prometheus."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Protocol

from esper_telemetry import arguments
from esper_telemetry.exporters.bell import Bell
from esper_telemetry.exporters.exit import at_exit, not_at_exit
from esper_telemetry.exporters.urls import without_secrets
from esper_telemetry.notify.alerts import Alert, Alerts, for_alertmanager, message
from esper_telemetry.notify.post import checked_url, post
from esper_telemetry.snapshot import Snapshot

logger = logging.getLogger("esper_telemetry")

_LOOK_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 30.0
_REQUEST_SECONDS = 10.0
_SAY_AGAIN_SECONDS = 60.0
_ALERTMANAGER = "/api/v2/alerts"


class Watched(Protocol):
    """A monitor: a snapshot, and news of each check."""

    @property
    def snapshot(self) -> Snapshot:
        """Return what the last check found."""

    def on_check(self, listener: Callable[[Snapshot], None]) -> Callable[[], None]:
        """Call `listener` with each new snapshot."""


class Webhook:
    """Post a run's alerts until `close()`, until its monitor is closed, or until the process ends.

    One thread posts: at once after a bad check, and when a whole recent window was clean. There is no queue: a failed
    post is retried after 1, 2, 4 and so on up to 30 s, with the state at that time. A forked child posts nothing.
    """

    def __init__(self, monitor: Watched, url: str, deadline: float) -> None:
        self._target = checked_url(url)
        if not callable(getattr(monitor, "on_check", None)):
            raise arguments.no_monitor("monitor", monitor)
        self.url = without_secrets(url)
        self.failures = 0
        self._to_alertmanager = self.url.endswith(_ALERTMANAGER)
        self._monitor = monitor
        self._alerts = Alerts()
        self._said: float | None = None
        self._trouble: str | None = None
        self._deadline_seconds = arguments.seconds("deadline", deadline)
        self._deadline: float | None = None
        self._closed = False
        self._pid = os.getpid()
        self._news = Bell()
        self._stop = Bell()
        self._forget = monitor.on_check(self._see)
        self._thread = threading.Thread(target=self._run, name="esper-webhook", daemon=True)
        self._thread.start()
        at_exit(self.close)

    def close(self) -> None:
        """Post what the receiver does not know yet, and wait until the deadline at most; a second call does nothing."""
        if self._closed or os.getpid() != self._pid:
            return
        if self._deadline is None:  # else a signal interrupts the first call: wait here
            self._deadline = time.monotonic() + self._deadline_seconds
            self._forget()
            self._stop.ring()
            self._news.ring()
        self._thread.join(max(self._deadline - time.monotonic(), 0.0))
        if self._closed:
            return
        self._closed = True
        not_at_exit(self.close)
        if self._alerts.pending():
            reason = self._trouble or f"no answer in {self._deadline_seconds:g} s"
            logger.warning("esper: the last state did not reach %s: %s", self.url, reason)

    def _see(self, snapshot: Snapshot) -> None:
        if snapshot.inf_grad_count or snapshot.nan_grad_count:
            self._news.ring()

    def _run(self) -> None:
        pause, rung = 0.0, False
        while self._deadline is None and not (snapshot := self._monitor.snapshot).ended:
            self._alerts.see(snapshot, time.monotonic(), time.time())
            pause = 0.0 if self._deliver(_REQUEST_SECONDS) else min(max(2 * pause, 1.0), _LONGEST_PAUSE_SECONDS)
            if pause or rung:  # while checks stay bad, look once a second
                self._stop.wait(pause or _LOOK_SECONDS)
            rung = not pause and self._news.wait(_LOOK_SECONDS)
        self._finish()

    def _finish(self) -> None:
        """Deliver the last state, in as many posts as the deadline allows."""
        deadline = self._deadline or time.monotonic() + self._deadline_seconds
        snapshot = self._monitor.snapshot
        self._alerts.see(snapshot, time.monotonic(), time.time())
        self._alerts.see_last(snapshot, time.time())
        while self._alerts.pending() and (left := deadline - time.monotonic()) > 0:
            if not self._deliver(min(left, _REQUEST_SECONDS)):
                time.sleep(min(0.5, max(deadline - time.monotonic(), 0.0)))

    def _deliver(self, timeout: float) -> bool:
        """Post what the receiver does not know yet; return whether it knows everything now."""
        again = self._to_alertmanager and self._alerts.firing() and self._is_old()
        if not (self._alerts.pending() or again):
            return True
        alerts = self._alerts.to_send()
        try:
            post(self._target, self._body(alerts), timeout)
        except Exception as error:
            self._fail(str(error) or repr(error))
            return False
        self._said, self._trouble = time.monotonic(), None
        self._alerts.sent()
        return not self._alerts.pending()

    def _is_old(self) -> bool:
        return self._said is None or time.monotonic() - self._said > _SAY_AGAIN_SECONDS

    def _body(self, alerts: list[Alert]) -> bytes:
        body = for_alertmanager(alerts) if self._to_alertmanager else message(alerts, self._monitor.snapshot.run)
        return json.dumps(body).encode()

    def _fail(self, reason: str) -> None:
        self._trouble = reason
        self.failures += 1
        if self.failures == 1:
            logger.warning("esper: a post to %s failed: %s (later failures are not logged)", self.url, reason)


def webhook(monitor: Watched, url: str, *, deadline: float = 5.0) -> Webhook:
    """Post the alerts of `monitor` to `url` as Alertmanager would, and return the Webhook that does it.

    A webhook gets version 4 of Alertmanager's format. A URL that ends in /api/v2/alerts is Alertmanager itself: it gets
    what Prometheus would post there.

    url: http or https; a user and password in it are sent as basic authentication.
    deadline: how many seconds the last posts may take at exit.

    Raise ValueError when the URL is invalid or `monitor` is not a monitor.
    """
    return Webhook(monitor, url, deadline)
