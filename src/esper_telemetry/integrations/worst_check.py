"""The worst check between two moments, so that none is lost on a reader that looks now and then."""

from __future__ import annotations

from esper_telemetry.monitor import GradientMonitor
from esper_telemetry.snapshot import Snapshot


class WorstCheck:
    """Keep the largest counts of a monitor's checks, each kind by itself, from its making to `close()`.

    checks: how many there were; 0 means that the counts say nothing.
    grad_norm: of the last one.
    """

    def __init__(self, monitor: GradientMonitor) -> None:
        self.close = monitor.on_check(self._see)
        self.clear()

    def clear(self) -> None:
        """Start over."""
        self.checks = self.inf_grad_count = self.nan_grad_count = 0
        self.grad_norm: float | None = None

    def _see(self, snapshot: Snapshot) -> None:
        self.checks += 1
        self.inf_grad_count = max(self.inf_grad_count, snapshot.inf_grad_count)
        self.nan_grad_count = max(self.nan_grad_count, snapshot.nan_grad_count)
        self.grad_norm = snapshot.grad_norm

    def take_values(self) -> dict[str, float]:
        """Return what a framework's logger is given, nothing if there was no check, and start over."""
        values: dict[str, float] = {}
        if self.checks:
            values = {"esper/inf_grad_count": self.inf_grad_count, "esper/nan_grad_count": self.nan_grad_count}
        if self.grad_norm is not None:
            values["esper/grad_norm"] = self.grad_norm
        self.clear()
        return values
