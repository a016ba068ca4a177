"""A bound on the processor time of an event loop, whatever is thrown at it.

The loop lives in the trainer's process: what a flood of clients makes it do is taken from the training. So whatever
costs something needs a turn. There are four kinds of turns, each with a share of one core, so that no kind waits for
another: to come in; to shake hands and ask for the first time; to ask again after a pause; and all else, which is to
ask at once again, to ask without ever being let in, or to send a request in bits. While a share is used up, those who
want a turn of that kind wait, and what they say stays in the kernel, where it costs nothing, since nobody reads it.

Of newcomers the last one is the next: the others have been overtaken already, and whoever floods is among them; but
every other turn is for the oldest of the last few, so that none is overtaken for ever by those that come again and
again. All others have their turns in the order in which they came. In either case addresses take turns. A loop that is
not busy never makes anybody wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic, thread_time

DOOR_SHARE, NEWCOMERS_SHARE, REGULARS_SHARE, OTHERS_SHARE = 0.005, 0.025, 0.01, 0.005
"""How much of one core each kind may take in the long run."""

BURST_SECONDS = 0.1
"""How much processor time each kind may take at once, after a quiet while."""

_LAST_FEW = 4
_ROUND_SECONDS = 0.001  # between two rests: after each the processor's caches are cold, and the first turn is expensive
_LONGEST_TURN = 0.01  # what takes longer is a garbage collection of the whole process, which falls on any thread


class Pace:
    """Hold the four kinds of turns of one thread."""

    def __init__(self) -> None:
        self._counted: float | None = None  # what the thread did before its first turn is not counted
        self.door = Turns(DOOR_SHARE, self._spent)
        self.newcomers = Turns(NEWCOMERS_SHARE, self._spent, last_first=True)
        self.regulars = Turns(REGULARS_SHARE, self._spent)
        self.others = Turns(OTHERS_SHARE, self._spent)

    @property
    def strained(self) -> bool:
        """Tell whether so much is asked that work is to be saved."""
        return any(turns.strained for turns in (self.newcomers, self.regulars, self.others))

    def _spent(self) -> float:
        """Return what the thread did since the last call."""
        used = thread_time()
        before, self._counted = self._counted, used
        return 0.0 if before is None else min(used - before, _LONGEST_TURN)


class Turns:
    """Give one kind of turns.

    share: of one core, in the long run.
    spent: tells what the thread did since it was asked last.
    """

    def __init__(self, share: float, spent: Callable[[], float], last_first: bool = False) -> None:
        self._share = share
        self._spent = spent
        self._last_first = last_first
        self._paid_until = 0.0
        self._resting = False
        self._waiting: dict[asyncio.Future[None], str] = {}
        self._last_address = ""
        self._last_is_next = True
        self._release_is_due = False

    @property
    def strained(self) -> bool:
        """Tell whether more than half of what may be taken at once is used up."""
        return self._paid_until - monotonic() > BURST_SECONDS / self._share / 2

    async def next(self, address: str = "") -> None:
        """Wait for a turn, for a client of this address."""
        if not self._waiting and not self._rest():
            return
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        self._waiting[turn] = address
        if not self._release_is_due:
            self._release_is_due = True
            loop.call_soon(self._release)
        try:
            await turn
        finally:
            self._waiting.pop(turn, None)

    def charge(self) -> None:
        """Charge what the thread did since anything was charged."""
        self._paid_until = max(self._paid_until, monotonic()) + self._spent() / self._share

    def _rest(self) -> float:
        """Return the seconds until the next turn may begin."""
        over = self._paid_until - monotonic() - BURST_SECONDS / self._share
        a_round = _ROUND_SECONDS / self._share
        self._resting = over > (-a_round if self._resting else 0)
        return over + a_round if self._resting else 0.0

    def _release(self, rested: bool = False) -> None:
        """Let one have its turn, and see what is left after it.

        rested: whether the rest that was due is over. To wake up costs something too, which is for the next rest: a
            share so small that waking up alone uses it would never have its turn else.
        """
        self.charge()
        loop = asyncio.get_running_loop()
        self._release_is_due = bool(self._waiting)
        if not self._waiting:
            return
        if rested:
            self._resting = False
        elif rest := self._rest():
            loop.call_later(rest, self._release, True)
            return
        turn = self._choose()
        self._last_address = self._waiting.pop(turn)
        if not turn.done():
            turn.set_result(None)
        loop.call_soon(self._release)  # after it

    def _choose(self) -> asyncio.Future[None]:
        in_order = list(self._waiting)
        if self._last_first:
            in_order = in_order[::-1] if self._last_is_next else in_order[-_LAST_FEW:]
            self._last_is_next = not self._last_is_next
        others = (turn for turn in in_order if self._waiting[turn] != self._last_address)
        return next(others, in_order[0])
