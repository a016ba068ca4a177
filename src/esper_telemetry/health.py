"""What a gradient check means: tiers, norms, per-layer statistics and their sum over layers. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

WARNING_ABOVE = 0
CRITICAL_ABOVE = 5
"""Bad elements of one kind in one check; `alerts/rules.yml` carries the same two numbers."""

POLICIES = ("continue", "skip", "halt", "rewind")
"""What a monitor can do about a critical check."""

DEAD_ZERO_FRACTION = 0.9
EXPLODING_LARGE_FRACTION = 0.1


class HealthTier(Enum):
    """Rate a count of Inf or NaN elements in one check."""

    HEALTHY = "healthy"
    WARNING = "warning"
    CRITICAL = "critical"

    @classmethod
    def of(cls, count: int) -> HealthTier:
        """Return the tier of `count` bad elements of one kind."""
        if count > CRITICAL_ABOVE:
            return cls.CRITICAL
        return cls.WARNING if count > WARNING_ABOVE else cls.HEALTHY


@dataclass(frozen=True, slots=True)
class LayerGradientStats:
    """Describe one layer's gradient.

    norm, mean, std, min and max are over the finite elements, so that one Inf does not erase the rest; they are 0.0 if
    no element is finite. The fractions are shares of all `param_count` elements: exactly zero, |g| < 1e-6 (including
    zeros), and |g| > 10 (finite ones only).
    """

    layer_name: str
    param_count: int
    norm: float
    mean: float
    std: float
    min: float
    max: float
    zero_fraction: float
    small_fraction: float
    large_fraction: float
    nan_count: int
    inf_count: int

    @property
    def dead(self) -> bool:
        """Tell whether nearly all of the gradient is exactly zero."""
        return self.zero_fraction > DEAD_ZERO_FRACTION

    @property
    def exploding(self) -> bool:
        """Tell whether much of the gradient is far too large."""
        return self.large_fraction > EXPLODING_LARGE_FRACTION

    @property
    def tier(self) -> HealthTier:
        """Return the worse of the layer's two tiers."""
        return HealthTier.of(max(self.inf_count, self.nan_count))


@dataclass(frozen=True, slots=True)
class GradientHealth:
    """Sum the layers' statistics over a model. No field has a default, so that none can be left out."""

    inf_grad_count: int
    nan_grad_count: int
    dead_layers: int
    exploding_layers: int
    layer_gradient_health: dict[str, HealthTier]


def aggregate_layer_gradient_health(stats: Iterable[LayerGradientStats]) -> GradientHealth:
    """Sum per-layer statistics; no layers give zeros and an empty mapping."""
    try:
        layers = list(stats)
    except TypeError:  # not everything with an __iter__ can be iterated: a 0-d tensor cannot
        layers = [stats]  # type: ignore[list-item]
    for layer in layers:
        if not isinstance(layer, LayerGradientStats):
            raise ValueError(f"stats: expected LayerGradientStats of layers, got {type(layer).__name__}")
    return GradientHealth(
        inf_grad_count=sum(layer.inf_count for layer in layers),
        nan_grad_count=sum(layer.nan_count for layer in layers),
        dead_layers=sum(layer.dead for layer in layers),
        exploding_layers=sum(layer.exploding for layer in layers),
        layer_gradient_health={layer.layer_name: layer.tier for layer in layers},
    )


def total_norm(norms: Iterable[float | None]) -> float:
    """Combine L2 norms as torch would: NaN where one is NaN, else Inf where one is, never an overflow of squares."""
    taken = [norm for norm in norms if norm is not None]
    total = math.hypot(*taken)
    return total if math.isfinite(total) else sum(taken)
