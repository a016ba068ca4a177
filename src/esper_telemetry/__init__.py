"""Numerical health of gradients, from `param.grad` to the on-call phone.

Names are imported when they are first used: counting needs no exporter, and `esper --version` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esper_telemetry.exporters.http import Exporter, start_exporter
    from esper_telemetry.exporters.otlp import OtlpExporter, start_otlp
    from esper_telemetry.exporters.textfile import TextfileExporter, start_textfile
    from esper_telemetry.health import (
        GradientHealth,
        HealthTier,
        LayerGradientStats,
        aggregate_layer_gradient_health,
    )
    from esper_telemetry.monitor import GradientMonitor, GradientsCritical, VoteFailed, watch
    from esper_telemetry.scan import collect_per_layer_gradients
    from esper_telemetry.snapshot import Snapshot
    from esper_telemetry.snapshot.ppo_update import PPOUpdatePayload

    __version__: str

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
    "VoteFailed",
    "aggregate_layer_gradient_health",
    "collect_per_layer_gradients",
    "start_exporter",
    "start_otlp",
    "start_textfile",
    "watch",
]

_HOMES = {
    "exporters.http": ("Exporter", "start_exporter"),
    "exporters.otlp": ("OtlpExporter", "start_otlp"),
    "exporters.textfile": ("TextfileExporter", "start_textfile"),
    "health": ("GradientHealth", "HealthTier", "LayerGradientStats", "aggregate_layer_gradient_health"),
    "monitor": ("GradientMonitor", "GradientsCritical", "VoteFailed", "watch"),
    "scan": ("collect_per_layer_gradients",),
    "snapshot": ("Snapshot",),
    "snapshot.ppo_update": ("PPOUpdatePayload",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("esper-telemetry")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
