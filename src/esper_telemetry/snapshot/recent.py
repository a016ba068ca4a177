"""A maximum over the last seconds, so that a bad check of a millisecond is still there when the scraper comes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

MAX_LAYERS = 50
_BUCKETS = 24


@dataclass(frozen=True, slots=True)
class LayerCounts:
    """Count the bad elements of one layer."""

    layer_name: str
    inf_count: int
    nan_count: int
    numel: int


@dataclass(frozen=True, slots=True)
class Recent:
    """Hold the worst of the recent window: per kind, and per layer, worst layers first.

    unmeasured_max: the most layers that one check could not measure.
    """

    inf_max: int
    nan_max: int
    unmeasured_max: int
    layers: tuple[LayerCounts, ...]
    layers_dropped: int


@dataclass(frozen=True, slots=True)
class _Bucket:
    opened: float
    last: float
    inf_max: int
    nan_max: int
    unmeasured_max: int
    layers: tuple[LayerCounts, ...]
    bad_layers: int  # a bit per layer


@dataclass(frozen=True, slots=True)
class RecentWindow:
    """Keep the worst check of the last `seconds`, bad or incomplete, in a bounded number of buckets.

    A bad check stays at least that long and at most a bucket (1/24 of it) longer. Healthy checks cost nothing.
    Times are monotonic seconds, so that a step of the wall clock neither loses nor prolongs anything.
    """

    seconds: float
    buckets: tuple[_Bucket, ...] = ()

    def after(self, now: float, layers: Iterable[LayerCounts], bad_layers: int, unmeasured: int = 0) -> RecentWindow:
        """Return the window after a check that was bad, or that could not measure `unmeasured` layers.

        Bit i of `bad_layers` says that layer i was bad.
        """
        layers = tuple(layers)
        bucket = _Bucket(
            opened=now,
            last=now,
            inf_max=sum(layer.inf_count for layer in layers),
            nan_max=sum(layer.nan_count for layer in layers),
            unmeasured_max=unmeasured,
            layers=layers[:MAX_LAYERS],
            bad_layers=bad_layers,
        )
        kept = self._live(now)
        if kept and now - kept[-1].opened < self.seconds / _BUCKETS:
            bucket = replace(_worst((kept[-1], bucket)), opened=kept[-1].opened)
            kept = kept[:-1]
        return replace(self, buckets=(*kept, bucket))

    def read(self, now: float) -> Recent:
        """Return the worst of the window that ends at `now`."""
        live = self._live(now)
        if not live:
            return Recent(0, 0, 0, (), 0)
        worst = _worst(live)
        dropped = worst.bad_layers.bit_count() - len(worst.layers)
        return Recent(worst.inf_max, worst.nan_max, worst.unmeasured_max, worst.layers, dropped)

    def _live(self, now: float) -> tuple[_Bucket, ...]:
        return tuple(bucket for bucket in self.buckets if now - bucket.last <= self.seconds)


def _worst(buckets: tuple[_Bucket, ...]) -> _Bucket:
    bad_layers = 0
    for bucket in buckets:
        bad_layers |= bucket.bad_layers
    return _Bucket(
        opened=buckets[0].opened,
        last=buckets[-1].last,
        inf_max=max(bucket.inf_max for bucket in buckets),
        nan_max=max(bucket.nan_max for bucket in buckets),
        unmeasured_max=max(bucket.unmeasured_max for bucket in buckets),
        layers=_worst_layers(layer for bucket in buckets for layer in bucket.layers),
        bad_layers=bad_layers,
    )


def _worst_layers(layers: Iterable[LayerCounts]) -> tuple[LayerCounts, ...]:
    merged: dict[str, LayerCounts] = {}
    for layer in layers:
        seen = merged.get(layer.layer_name, layer)
        merged[layer.layer_name] = replace(
            layer, inf_count=max(layer.inf_count, seen.inf_count), nan_count=max(layer.nan_count, seen.nan_count)
        )
    return worst_first(merged.values())[:MAX_LAYERS]


def worst_first(layers: Iterable[LayerCounts]) -> tuple[LayerCounts, ...]:
    """Sort by the number of bad elements, most first."""
    return tuple(sorted(layers, key=lambda layer: -(layer.inf_count + layer.nan_count)))
