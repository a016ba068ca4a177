"""Dead and exploding layers: looked for now and then, and looked at again until they are gone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from esper_telemetry import arguments
from esper_telemetry.scan import Scan, find_dead_and_exploding

_SHARE = 8  # trouble that has lasted n checks is looked at again after n / 8


class DeadLayers:
    """Add dead and exploding layers to the scans of some checks.

    All layers are looked at in the first check, in every `every`-th, and in a bad one that follows a good one. What is
    found is looked at again in the checks that follow: in each at first, less often the longer it lasts, as an
    embedding of which few rows are used is dead for good. A layer that was zero-initialised is dead in one check only.
    """

    def __init__(self, every: int) -> None:
        self._every = arguments.whole("statistics_every", every, at_least=1)
        self.forget()

    def forget(self) -> None:
        """Start over, as when the layers are numbered anew."""
        self._checks = 0
        self._trouble: set[int] = set()
        self._since = 0
        self._next = 0
        self._was_bad = False

    def add_to(self, found: Scan, gradients: Sequence[Tensor | None], scales: Sequence[float] | None) -> Scan:
        """Return the scan of a check with its dead and exploding layers, where this check looks for them."""
        number, self._checks = self._checks, self._checks + 1
        begins, self._was_bad = bool(found.bad) and not self._was_bad, bool(found.bad)
        among: set[int] | None = self._trouble
        if begins or number % self._every == 0:
            among = None
            self._since = number if not self._trouble else self._since
        elif not self._trouble or number < self._next:
            return found
        dead, exploding = find_dead_and_exploding(found, gradients, scales, among)
        self._trouble = dead | exploding
        self._next = number + max(1, (number - self._since) // _SHARE)
        return replace(found, dead_layers=len(dead), exploding_layers=len(exploding))
