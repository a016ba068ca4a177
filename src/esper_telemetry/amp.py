"""What a GradScaler does with overflows: it expects them, skips the step, halves its scale, and goes on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch.amp import GradScaler

from esper_telemetry.scan import Scan

MAX_CONSECUTIVE_SKIPS = 8
MIN_SCALE = 1.0
"""Below 1 unscaling itself makes Infs, which the scaler does not look for any more."""


@dataclass(frozen=True, slots=True)
class AmpState:
    """Hold what the scaler came to: its scale, the steps that it skipped in all, and those in a row.

    warm: whether a step was taken yet.
    """

    scale: float
    skips: int
    consecutive_skips: int
    warm: bool

    def judge(self, found: Scan) -> Scan:
        """Return what the optimizer would see: unscaled norms, and no bad element that the scaler handles.

        Exploding layers counted before were counted among scaled elements, which says nothing.
        """
        norms = [None if norm is None else norm / self.scale for norm in found.norms]
        return replace(found, norms=norms, bad={} if self._explains_overflows() else found.bad, exploding_layers=None)

    def _explains_overflows(self) -> bool:
        return self.scale >= MIN_SCALE and (self.consecutive_skips <= MAX_CONSECUTIVE_SKIPS or not self.warm)


class ScalerWatch:
    """Follow a GradScaler from check to check by its public state, and so tell whether an overflow is explained.

    An overflow is expected while the scale is at least 1 and at most 8 steps in a row were skipped; before the first
    step that was taken the scale alone decides, as a new scaler starts far too high on purpose.
    """

    @classmethod
    def of(cls, scaler: GradScaler | None) -> ScalerWatch | None:
        """Watch a scaler; one that is None or disabled scales nothing and explains nothing.

        Raise ValueError when it is no GradScaler.
        """
        if scaler is not None and not isinstance(scaler, GradScaler):
            raise ValueError(f"scaler: expected a torch.amp.GradScaler, got {type(scaler).__name__}")
        return cls(scaler) if scaler is not None and scaler.is_enabled() else None

    def __init__(self, scaler: GradScaler) -> None:
        self._scaler = scaler
        self._state = AmpState(scaler.get_scale(), skips=0, consecutive_skips=0, warm=False)

    def follow(self) -> AmpState:
        """Read what became of the steps since the last check: a skip lowers the scale, a step taken does not."""
        saved = self._scaler.state_dict()
        before, scale = self._state, saved["scale"]
        if scale < before.scale:
            skips = max(1, round(math.log(before.scale / scale) / -math.log(saved["backoff_factor"])))
            self._state = replace(
                before, scale=scale, skips=before.skips + skips, consecutive_skips=before.consecutive_skips + skips
            )
        elif scale > before.scale or saved["_growth_tracker"] > 0:
            self._state = replace(before, scale=scale, consecutive_skips=0, warm=True)
        return self._state
