"""The state of a GradScaler, as read from check to check."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AmpState:
    """Hold the scaler's state: its scale, the steps that it skipped in total, and those in a row.

    warm: whether a step was taken yet.
    """

    scale: float
    skips: int
    consecutive_skips: int
    warm: bool

    def after(self, scale: float, growth_tracker: float, backoff_factor: float) -> AmpState:
        """Return the state after the steps since: a skip lowers the scale and sets the tracker of good steps to 0."""
        skips = _backoffs(self.scale, scale, backoff_factor)
        taken = growth_tracker > 0 or scale > self.scale
        return AmpState(
            scale,
            self.skips + skips,
            0 if taken else self.consecutive_skips + skips,
            self.warm or taken,
        )


def _backoffs(before: float, after: float, factor: float) -> int:
    if after >= before:
        return 0
    return max(1, round(math.log(before / after) / -math.log(factor))) if after > 0 else 1
