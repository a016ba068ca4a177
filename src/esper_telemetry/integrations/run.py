"""What the integrations share: run after run in one process, and "halt" for frameworks that stop when asked."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable

from esper_telemetry import arguments
from esper_telemetry.exporters.address import parse_address
from esper_telemetry.exporters.http import Exporter
from esper_telemetry.integrations.page import Page, Run, find_page, make_page, shown
from esper_telemetry.monitor import GradientMonitor, GradientsCritical, Policy
from esper_telemetry.snapshot import Snapshot

logger = logging.getLogger("esper_telemetry")

_last_runs: weakref.WeakKeyDictionary[object, Run] = weakref.WeakKeyDictionary()
"""By what they trained."""

_lock = threading.RLock()


class Runs:
    """The runs of one callback: each continues the counters of the one before, and is shown on the same page.

    Another callback that asks for the address takes the page over when the run on it has ended.

    address: where the page is; None makes no page.
    strict: raise OSError if exactly that address is not available.

    Raise ValueError when the address is invalid.
    """

    def __init__(self, address: str | int | None, strict: bool) -> None:
        self.exporter: Exporter | None = None
        self._address = None if address is None else shown(*parse_address(address))
        self._strict = arguments.flag("strict", strict)
        self._last: Run | None = None

    def begin(self, trained: object, start: Callable[[], GradientMonitor]) -> GradientMonitor:
        """Start a monitor, which counts on from the run before, and show it.

        trained: what is trained. The monitor of a run that died there is closed first.
        """
        with _lock:
            if self._last is not None:
                self._last.bury()
            if (other := _last_runs.get(trained)) is not None and other.has_measured:
                other.bury()
            page = self._find_page()
            before = self._last if page is None else page.run
            monitor = start()
            if before is not None:
                monitor.carry_on(before.monitor.snapshot)
            self._last = _last_runs[trained] = Run(monitor, carries_on=before is not None)
            try:
                self._show(self._last, page)
            except OSError:
                monitor.close()
                raise
        return monitor

    def show(self, monitor: GradientMonitor) -> None:
        """Show a monitor that somebody else has made, and will close."""
        with _lock:
            self._show(Run(monitor, carries_on=False), self._find_page())

    def _find_page(self) -> Page | None:
        return None if self._address is None else find_page(self._address, self.exporter, self._strict)

    def _show(self, run: Run, page: Page | None) -> None:
        if page is not None:
            page.show(run)
        elif self._address is not None:
            page = make_page(self._address, run, self._strict)
        self.exporter = None if page is None else page.exporter


def stopping(on_critical: Policy, stop: Callable[[], None]) -> Policy:
    """Return the policy of a framework that stops when it is asked to: "halt" drops the step and calls `stop`."""
    if isinstance(on_critical, str) and on_critical != "halt":
        return on_critical

    def decide(snapshot: Snapshot) -> str | None:
        policy = on_critical(snapshot) if callable(on_critical) else on_critical
        if policy != "halt":
            return policy
        logger.error("esper: asking the trainer to stop: %s", GradientsCritical(snapshot))
        stop()
        return "skip"

    return decide
