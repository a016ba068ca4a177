"""What a scan found: norms and counts by layer index. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Scan:
    """Hold what one look at a list of gradients found.

    norms: one per gradient, None where there was none; Inf or NaN where the layer holds a bad element.
    bad: index -> (inf_count, nan_count), only layers with a bad element.
    elements: how many elements were looked at.
    dead_layers, exploding_layers: as in LayerGradientStats; None where the scan did not look for them.
    """

    norms: list[float | None]
    bad: dict[int, tuple[int, int]]
    elements: int
    dead_layers: int | None = None
    exploding_layers: int | None = None

    def apart(self, numels: Sequence[int]) -> list[Scan]:
        """Return what was found in each gradient, of so many elements, as if it had been looked at alone."""
        bad = self.bad
        return [
            Scan([norm], {0: bad[index]} if index in bad else {}, numel)
            for index, (norm, numel) in enumerate(zip(self.norms, numels, strict=True))
        ]

    @property
    def inf_count(self) -> int:
        """Return the Inf elements of all layers."""
        return sum(inf for inf, _ in self.bad.values())

    @property
    def nan_count(self) -> int:
        """Return the NaN elements of all layers."""
        return sum(nan for _, nan in self.bad.values())


class PendingScan(Protocol):
    """Hold a scan that may still be on its way."""

    def ready(self) -> bool:
        """Tell whether `result()` would return at once; never wait."""

    def result(self) -> Scan:
        """Return what was found; wait for it when it is not there yet."""
