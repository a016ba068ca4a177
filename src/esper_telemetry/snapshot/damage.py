"""Damage: which parameters, buffers and optimizer state hold Inf or NaN, and the last check before that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from esper_telemetry.snapshot.recent import LayerCounts

INTACT = "intact"
PARTS = ("parameters", "buffers", "optimizer")
"""What a model consists of, the worst to lose first."""

WORDS: Mapping[str, str] = {
    INTACT: "intact",
    "optimizer": "optimizer state damaged",
    "buffers": "buffers damaged",
    "parameters": "parameters damaged",
}
"""How the verdict is told to people, the worst last."""


def severity_of(word: str) -> int:
    """Return 0 for an intact model, and 1, 2 or 3 for damaged optimizer state, buffers or parameters."""
    return tuple(WORDS).index(word)


@dataclass(frozen=True, slots=True)
class Damage:
    """Hold what one look found: tensors with a bad element, worst first in each part."""

    parameters: tuple[LayerCounts, ...] = ()
    buffers: tuple[LayerCounts, ...] = ()
    optimizer: tuple[LayerCounts, ...] = ()

    @property
    def word(self) -> str:
        """Return the worst of the parts that are damaged, "intact" when none is."""
        return next((part for part in PARTS if getattr(self, part)), INTACT)

    @property
    def worst(self) -> LayerCounts | None:
        """Return the worst tensor of the worst part that is damaged; None when none is."""
        return next((getattr(self, part)[0] for part in PARTS if getattr(self, part)), None)

    def elements(self, part: str) -> int:
        """Return the bad elements of one part."""
        return sum(each.inf_count + each.nan_count for each in getattr(self, part))


@dataclass(frozen=True, slots=True)
class GoodCheck:
    """Name a check that found nothing, of a model that was not known to be damaged.

    check: its number, as `snapshot.checks` counts.
    step: what the loop had told of its step by then.
    """

    check: int
    timestamp: float
    step: int | None
