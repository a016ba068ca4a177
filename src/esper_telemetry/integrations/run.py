"""What the integrations do alike."""

from __future__ import annotations

import logging
from collections.abc import Callable

from esper_telemetry.exporters.http import Exporter, start_exporter
from esper_telemetry.monitor import GradientMonitor, GradientsCritical, Policy
from esper_telemetry.snapshot import Snapshot

logger = logging.getLogger("esper_telemetry")


def serve(monitor: GradientMonitor, address: str | None) -> Exporter | None:
    """Start the exporter where an address is given; a port in use is logged, and training goes on."""
    if address is None:
        return None
    try:
        return start_exporter(monitor, address)
    except OSError as error:
        logger.warning("esper: training goes on without an exporter: %s", error)
        return None


def stopping(on_critical: Policy, stop: Callable[[], None]) -> Policy:
    """Return the policy of a framework that stops when it is asked to: "halt" drops the step and calls `stop`."""
    if isinstance(on_critical, str) and on_critical != "halt":
        return on_critical

    def decide(snapshot: Snapshot) -> str | None:
        policy = on_critical(snapshot) if callable(on_critical) else on_critical
        if policy != "halt":
            return policy
        logger.error("esper: training is asked to stop: %s", GradientsCritical(snapshot))
        stop()
        return "skip"

    return decide
