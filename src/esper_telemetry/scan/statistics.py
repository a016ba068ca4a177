"""The full statistics of each layer, slower than a scan and exact over its finite elements."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from esper_telemetry.health import DEAD_ZERO_FRACTION, EXPLODING_LARGE_FRACTION, LayerGradientStats
from esper_telemetry.scan.layers import Model, named_layers
from esper_telemetry.scan.layouts import flats, local_numel, materialize, widen
from esper_telemetry.scan.result import Scan

SMALL = 1e-6
LARGE = 10.0

_CHUNK = 1 << 17
_TINY = 1e-30  # below it float32 has lost squares to underflow


@torch.no_grad()
def collect_per_layer_gradients(model: Model) -> list[LayerGradientStats]:
    """Describe the gradient of every parameter that has one, in the model's order; tied parameters once.

    Statistics cover what this process holds: the local shard of a DTensor. A complex gradient is described by the
    magnitudes of its elements; an element with an Inf and a NaN part is in both counts, as in `torch.isinf` and
    `torch.isnan`. The implicit zeros of a sparse gradient count as elements.
    """
    return [describe(name, parameter.grad) for name, parameter in named_layers(model) if parameter.grad is not None]


def describe(layer_name: str, gradient: Tensor) -> LayerGradientStats:
    """Describe one gradient."""
    numel = local_numel(gradient)
    stored = materialize(gradient)
    moments = _Moments()
    for flat in flats(stored):
        for chunk in torch.split(flat, _CHUNK if flat.is_cpu else max(1, flat.numel())):
            moments.add_chunk(widen(chunk))
    moments.add_zeros(numel - stored.numel())
    return moments.stats(layer_name, numel)


def find_dead_and_exploding(
    found: Scan,
    gradients: Sequence[Tensor | None],
    scales: Sequence[float] | None = None,
    among: Collection[int] | None = None,
) -> tuple[set[int], set[int]]:
    """Return the dead layers and the exploding ones, found in one more read of the gradients.

    scales: what each gradient was multiplied by, and has to be divided by before "large" means anything.
    among: the layers to look at; all, where it is None.
    """
    dead, exploding = set(), set()
    for index in range(len(gradients)) if among is None else sorted(among):
        gradient, norm = gradients[index], found.norms[index]
        scale = 1.0 if scales is None else scales[index]
        if gradient is None or norm is None:
            continue
        if _is_dead(gradient):
            dead.add(index)
        if _can_explode(gradient, norm) and describe("", gradient if scale == 1.0 else gradient / scale).exploding:
            exploding.add(index)
    return dead, exploding


def _is_dead(gradient: Tensor) -> bool:
    stored, numel = materialize(gradient), local_numel(gradient)
    if stored.dtype.itemsize == 1:
        return describe("", gradient).dead  # torch counts no zeros in float8
    return numel > 0 and (numel - int(torch.count_nonzero(stored))) / numel > DEAD_ZERO_FRACTION


def _can_explode(gradient: Tensor, norm: float) -> bool:
    """Tell whether enough elements could be large: so many would make the norm large too."""
    return not norm < 0.99 * LARGE * math.sqrt(EXPLODING_LARGE_FRACTION * local_numel(gradient))


@dataclass(slots=True)
class _Moments:
    """Merge chunks by the parallel update of Chan, Golub and LeVeque: exact where the mean is far from zero."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # summed squared distance from the mean
    low: float = math.inf
    high: float = -math.inf
    zeros: int = 0
    small: int = 0
    large: int = 0
    inf: int = 0
    nan: int = 0

    def add_zeros(self, count: int) -> None:
        if count:
            self._merge(count, 0.0, 0.0, 0.0, 0.0)
            self.zeros += count
            self.small += count

    def add_chunk(self, chunk: Tensor) -> None:
        if chunk.numel() == 0:
            return
        mean = chunk.mean().item()
        if chunk.is_complex() or not math.isfinite(mean):
            chunk = self._finite_part(chunk)
            if chunk.numel() == 0:
                return
            mean = chunk.mean().item()
        low, high = (bound.item() for bound in torch.aminmax(chunk))
        scratch = torch.sub(chunk, mean)
        squares = torch.dot(scratch, scratch).item()
        if not math.isfinite(mean + squares) or (low < high and squares <= _TINY):
            squares, mean = _wide_moments(chunk)
        self._merge(chunk.numel(), mean, squares, low, high)
        self._count_sizes(chunk, torch.abs(chunk, out=scratch), max(-low, high))

    def _finite_part(self, chunk: Tensor) -> Tensor:
        self.inf += int(torch.isinf(chunk).sum())
        self.nan += int(torch.isnan(chunk).sum())
        finite = chunk[torch.isfinite(chunk)]
        return finite.abs() if finite.is_complex() else finite

    def _count_sizes(self, chunk: Tensor, size: Tensor, largest: float) -> None:
        """Count by magnitude, and only what can be there; float marks add up faster than bools."""
        marks = torch.empty_like(size)
        small = int(torch.lt(size, SMALL, out=marks).sum())
        if small:
            self.small += small
            self.zeros += int(torch.eq(chunk, 0, out=marks).sum())
        if largest > LARGE:
            self.large += int(torch.gt(size, LARGE, out=marks).sum())

    def _merge(self, count: int, mean: float, squares: float, low: float, high: float) -> None:
        total = self.count + count
        distance = mean - self.mean
        self.squares += squares + distance * distance * (self.count * count / total)
        self.mean += distance * (count / total)
        self.count = total
        self.low = min(self.low, low)
        self.high = max(self.high, high)

    def stats(self, layer_name: str, numel: int) -> LayerGradientStats:
        counted = self.count > 0
        return LayerGradientStats(
            layer_name=layer_name,
            param_count=numel,
            norm=math.hypot(math.sqrt(self.squares), math.sqrt(self.count) * self.mean),
            mean=self.mean,
            std=math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0,
            min=self.low if counted else 0.0,
            max=self.high if counted else 0.0,
            zero_fraction=self.zeros / numel if numel else 0.0,
            small_fraction=self.small / numel if numel else 0.0,
            large_fraction=self.large / numel if numel else 0.0,
            nan_count=self.nan,
            inf_count=self.inf,
        )


def _wide_moments(chunk: Tensor) -> tuple[float, float]:
    """Return (squares, mean) of finite elements whose squares do not fit float32, as they are too large or small."""
    wide = chunk.double()
    mean = wide.mean()
    return float(((wide - mean) ** 2).sum()), float(mean)
