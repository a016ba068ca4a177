"""A bound on the processor time of an event loop, whatever is thrown at it."""

from __future__ import annotations

import random
import selectors
from time import monotonic, sleep, thread_time

SHARE = 0.02
"""How much of one core the loop may take in the long run."""

BURST_SECONDS = 0.25
"""How much processor time it may take at once, after a quiet while: enough to let 600 clients in without a rest."""

_SHORTEST_REST = 0.01  # so that what comes meanwhile is handled together
_LONGEST_REST = 0.2  # so that nobody waits long for a turn
_EVENTS_PER_ROUND = 64


class PacedSelector(selectors.DefaultSelector):
    """Rest between two rounds of an event loop, so that it takes no more than its share of one core.

    While the loop rests, what clients do waits in the kernel, where it costs nothing. In the next round they have their
    turn, or, where they are very many, some of them by chance. A loop that is not busy never rests.
    """

    def __init__(self) -> None:
        super().__init__()
        self._used = 0.0
        self._paid_until = 0.0

    @property
    def strained(self) -> bool:
        """Tell whether more than half of what the loop may take at once is used up."""
        return self._paid_until - monotonic() > BURST_SECONDS / SHARE / 2

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Rest for what the last round has cost, then wait for events as usual."""
        now = monotonic()
        before, self._used = self._used, thread_time()
        self._paid_until = max(self._paid_until, now) + (self._used - before) / SHARE
        over = self._paid_until - now - BURST_SECONDS / SHARE
        if over <= 0:
            return super().select(timeout)
        if timeout == 0:  # the loop is amid a round: what is ready is done first, and nothing new is taken in
            return []
        sleep(min(max(over, _SHORTEST_REST), _LONGEST_REST))
        events = super().select(timeout)
        return random.sample(events, min(len(events), _EVENTS_PER_ROUND))
