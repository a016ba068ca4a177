"""Which layers of a model belong to the heads that its user has named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from esper_telemetry.scan.layers import Model, list_layers
from esper_telemetry.snapshot.heads import WatchedHeads

Heads = Mapping[str, str | Sequence[str]]


def heads_of(model: Model, heads: Heads) -> WatchedHeads | None:
    """Find the layers of each head, by any name that they have; raise ValueError when a head has none."""
    if not isinstance(heads, Mapping):
        raise ValueError(f"heads: expected a dict of head -> module name, got {type(heads).__name__}")
    if not heads:
        return None
    layers = list_layers(model)
    aliases = {alias: layer.name for layer in layers for alias in layer.aliases}
    return WatchedHeads.of(heads, [layer.name for layer in layers], aliases)
