"""A bound on the processor time of an event loop, whatever is thrown at it."""

from __future__ import annotations

import math
import selectors
from itertools import count
from time import monotonic, sleep, thread_time

SHARE = 0.02
"""How much of one core the loop may take in the long run."""

BURST_SECONDS = 0.1
"""How much processor time it may take at once, after a quiet while: enough to let 600 clients in without a rest."""

_SHORTEST_REST = 0.01  # so that what comes meanwhile is handled together
_LONGEST_REST = 0.1  # so that nobody waits long for a turn
_LONGEST_ROUND = 0.01  # what takes longer is a garbage collection of the whole process, which falls on any thread
_STRANGERS_SHARE = 0.25  # of the time, while others wait: a handshake takes as long as ten scrapes
_FIRST_TURNS = 4
_MOST_TURNS = 8  # so that no round is long

_Event = tuple[selectors.SelectorKey, int]


class PacedSelector(selectors.DefaultSelector):
    """Rest between two rounds of an event loop, so that it takes no more than its share of one core.

    While the loop rests, what clients do waits in the kernel, where it costs nothing. In the next round they have their
    turn, or, where they want more than the loop may give, some of them: those that are known first, and of them those
    whose last turn is the longest ago, so that who asks now and then is not kept waiting by strangers or by those who
    always ask. Strangers have a share of the time all the same. A loop that is not busy never rests.

    known: file descriptors of clients that were answered before.
    """

    def __init__(self) -> None:
        super().__init__()
        self._used = math.inf  # what the thread did before its first round is not counted
        self._paid_until = 0.0
        self._owed = 0.0
        self._due_to_strangers = 0.0  # seconds, never more than none: what they did not ask for is not kept for them
        self._due_per_second = 0.0  # of the round that runs
        self._turns = _FIRST_TURNS
        self._turn_numbers = count(1)
        self._last_turn: dict[int, int] = {}  # by file descriptor, of which there are as many as clients at most
        self.known: set[int] = set()

    @property
    def strained(self) -> bool:
        """Tell whether more than half of what the loop may take at once is used up."""
        return self._paid_until - monotonic() > BURST_SECONDS / SHARE / 2

    def select(self, timeout: float | None = None) -> list[_Event]:
        """Rest for what the last round has cost, then wait for events as usual."""
        owed = self._account()
        if owed <= 0:
            self._turns = _FIRST_TURNS
            return self._in_turn(super().select(timeout), _MOST_TURNS)
        if timeout == 0:  # the loop is amid a round: what is ready is done first, and nothing new is taken in
            return []
        sleep(min(max(owed, _SHORTEST_REST), _LONGEST_REST))
        if owed <= _LONGEST_REST or owed < self._owed - _SHORTEST_REST:
            self._turns = min(self._turns + 1, _MOST_TURNS)
        else:  # what is owed does not shrink
            self._turns = max(self._turns // 2, 1)
        self._owed = owed
        return self._in_turn(super().select(timeout), self._turns)

    def _account(self) -> float:
        """Charge what the thread did since the last call, and return for how many seconds it is to rest."""
        now = monotonic()
        before, self._used = self._used, thread_time()
        spent = min(max(self._used - before, 0.0), _LONGEST_ROUND)
        self._due_to_strangers = min(self._due_to_strangers + spent * self._due_per_second, 0.0)
        self._paid_until = min(
            max(self._paid_until, now) + spent / SHARE, now + (BURST_SECONDS + _LONGEST_ROUND) / SHARE
        )
        return self._paid_until - now - BURST_SECONDS / SHARE

    def _in_turn(self, events: list[_Event], turns: int) -> list[_Event]:
        events.sort(key=lambda event: self._last_turn.get(event[0].fd, 0))
        known = [event for event in events if event[0].fd in self.known][:turns]
        strangers = [event for event in events if event[0].fd not in self.known]
        self._due_per_second, room = 0.0, turns
        if known and strangers:
            # A round with both counts as one of the strangers, who are the dear ones.
            theirs = self._due_to_strangers >= 0
            self._due_per_second = -1.0 if theirs else _STRANGERS_SHARE / (1 - _STRANGERS_SHARE)
            room = max(turns - len(known), 1) if theirs else 0
        taken = known + strangers[:room]
        self._last_turn.update((key.fd, next(self._turn_numbers)) for key, _ in taken)
        return taken
