"""What one of several ranks knows of a check: what it made itself, what it owns, and what its numbers cover."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from esper_telemetry.snapshot.recent import LayerCounts, RecentWindow


@dataclass(frozen=True, slots=True)
class GradScope:
    """Say what the numbers of a check cover.

    scope: "whole": there is no other rank; "replica": after the reduction, the same on every rank that holds it;
        "shard": the part that this rank holds; "mixed": of both; "local": before whatever reduces it.
    exact: whether the sum of what ranks own counts each element of the run once.
    when: "backward": at the end of the backward pass; "update": where `update()` was called; "step": before the
        optimizer's step, and so after a clip.
    """

    scope: str
    exact: bool
    when: str


@dataclass(frozen=True, slots=True)
class LocalCheck:
    """Count what this rank's own backward pass made, before any reduction.

    inf_count, nan_count: None where the last check did not measure them.
    recent: the worst of the recent window.
    origin_layer: of the last check that was bad here, the layer that gradients reached first.
    """

    inf_count: int | None
    nan_count: int | None
    recent: RecentWindow
    origin_layer: str | None = None

    def after(self, now: float, layers: Sequence[LayerCounts], bad_layers: int, origin_layer: str | None) -> LocalCheck:
        """Return what is known after a check that found these bad layers here, none where all is well."""
        if not layers:
            good = (self.inf_count, self.nan_count) == (0, 0)
            return self if good else replace(self, inf_count=0, nan_count=0)
        inf, nan = sum(layer.inf_count for layer in layers), sum(layer.nan_count for layer in layers)
        return LocalCheck(inf, nan, self.recent.after(now, layers, bad_layers), origin_layer)

    def unmeasured(self) -> LocalCheck:
        """Return what is known after a check that did not measure what this rank made."""
        return replace(self, inf_count=None, nan_count=None)

    def within(self, seconds: float) -> LocalCheck:
        """Return the same for a recent window of another length."""
        return replace(self, recent=replace(self.recent, seconds=seconds))
