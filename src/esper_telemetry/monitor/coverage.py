"""Which of the gradients that arrived were measured: those that stay at the end of a pass, others as they arrive."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from esper_telemetry.monitor.held import MeasureEach
from esper_telemetry.monitor.passes import Arrival, Pass
from esper_telemetry.monitor.tags import Tag
from esper_telemetry.scan import PendingScan, Scan, with_early

Measure = Callable[[Sequence[Tensor | None]], Scan | PendingScan]


def look_on_arrival(tag: Tag, gradient: Tensor | None, measure: MeasureEach) -> Arrival | None:
    """Look at a gradient that has just arrived, and measure it where it may be gone when the pass ends.

    That is so in the first pass, which shows what other code does with it; where it was gone or altered before; and
    where other hooks wait for it. Return None where another hook was faster and has taken it.
    """
    if gradient is None:
        return None
    found = measure([gradient])[0] if tag.early or tag.has_company else None
    return id(gradient), gradient._version, found


class _Early(NamedTuple):
    """Hold what was measured of a gradient as it arrived, and whether it is still that one."""

    tag: Tag
    same: bool
    found: Scan | PendingScan


class Coverage:
    """Say how each gradient of one check is measured.

    late: what is to be measured now, by layer; what was measured as it arrived, and is still the same, is left out.
    unmeasured: the layers whose gradient arrived, and was gone or altered before it could be measured.
    freed: whether gradients were taken away during the pass.

    by_hand: whether others may have worked on the gradients since the pass ended, as before `update()`: what they
        altered is then measured as it is.
    """

    def __init__(self, gradients: Sequence[Tensor | None], ended: Pass, by_hand: bool = False) -> None:
        self.late = list(gradients)
        self.unmeasured: list[int] = []
        self.freed = False
        self._early: dict[int, _Early] = {}
        self._by_hand = by_hand
        for tag, seen in ended.arrived.items():
            index = tag.index
            if index is None:
                continue
            if tag.reduced:
                self._take_in_reduced(index)
                continue
            gradient = self.late[index]
            same = gradient is not None and seen is not None and seen[:2] == (id(gradient), gradient._version)
            if not same or seen is None or seen[2] is not None:
                self._take_in(index, tag, same, None if seen is None else seen[2])
        if self.unmeasured:  # other code has changed its ways: all of it is to be seen once more
            for tag in ended.arrived:
                tag.early = True

    def all_now(self, gradients: Sequence[Tensor | None]) -> None:
        """Measure every gradient now, those that were measured before too."""
        self.late = list(gradients)

    def merge(self, late: Scan | PendingScan) -> Scan | PendingScan:
        """Return the scan of all that was measured, now and before."""
        if not self._early:
            return late
        for index, early in self._early.items():
            if early.same and self.late[index] is not None and _alike(late, index, early.found):
                early.tag.early = False
        return with_early(late, {index: early.found for index, early in self._early.items()})

    def _take_in_reduced(self, index: int) -> None:
        """Take in a gradient that was altered since it arrived, by the reduction."""
        if self.late[index] is None:
            self.freed = True
            self.unmeasured.append(index)

    def _take_in(self, index: int, tag: Tag, same: bool, found: Scan | PendingScan | None) -> None:
        """Take in a gradient that is not what it was when it arrived, or that was measured then."""
        gone = self.late[index] is None
        self.freed |= gone
        if found is None:
            if gone or not self._by_hand:
                self.unmeasured.append(index)
        elif self._by_hand and not gone:
            tag.early = False  # who owns the loop may have unscaled it, and wants it measured as it is
        else:
            self._early[index] = _Early(tag, same, found)
            if not same:
                tag.early = True
            elif not tag.early:
                self.late[index] = None


def _alike(late: Scan | PendingScan, index: int, early: Scan | PendingScan) -> bool:
    """Tell whether a gradient is at the end of a pass what it was when it arrived.

    Its version does not tell of changes through `.data`, its norm does; where that is still on a device nobody waits.
    """
    if not isinstance(late, Scan) or not isinstance(early, Scan):
        return True
    one, two = late.norms[index], early.norms[0]
    if one is None or two is None or not math.isfinite(one + two):
        return str(one) == str(two)
    return math.isclose(one, two, rel_tol=0.01)
