"""Numerical health of gradients, from `param.grad` to the on-call phone."""

from importlib.metadata import version

from esper_telemetry.exporters.http import Exporter, start_exporter
from esper_telemetry.exporters.otlp import OtlpExporter, start_otlp
from esper_telemetry.exporters.textfile import TextfileExporter, start_textfile
from esper_telemetry.health import (
    GradientHealth,
    HealthTier,
    LayerGradientStats,
    aggregate_layer_gradient_health,
)
from esper_telemetry.monitor import GradientMonitor, GradientsCritical, watch
from esper_telemetry.scan import collect_per_layer_gradients
from esper_telemetry.snapshot import Snapshot
from esper_telemetry.snapshot.ppo_update import PPOUpdatePayload

__version__ = version("esper-telemetry")

__all__ = [
    "Exporter",
    "GradientHealth",
    "GradientMonitor",
    "GradientsCritical",
    "HealthTier",
    "LayerGradientStats",
    "OtlpExporter",
    "PPOUpdatePayload",
    "Snapshot",
    "TextfileExporter",
    "aggregate_layer_gradient_health",
    "collect_per_layer_gradients",
    "start_exporter",
    "start_otlp",
    "start_textfile",
    "watch",
]
