"""One backward pass: what arrived, what was measured, judged, published, told, and reacted to."""

from esper_telemetry.monitor.monitor import POLICIES, GradientMonitor, GradientsCritical, Policy, watch

__all__ = ["POLICIES", "GradientMonitor", "GradientsCritical", "Policy", "watch"]
