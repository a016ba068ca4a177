"""One backward pass: what arrived, what was measured, judged, published, told, and reacted to."""

from esper_telemetry.health import POLICIES
from esper_telemetry.monitor.monitor import GradientMonitor
from esper_telemetry.monitor.reaction import GradientsCritical, Policy
from esper_telemetry.monitor.watching import watch
from esper_telemetry.ranks.vote import VoteFailed

__all__ = ["POLICIES", "GradientMonitor", "GradientsCritical", "Policy", "VoteFailed", "watch"]
