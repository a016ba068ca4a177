"""The last minutes at a coarse grain, for a reader who comes late: what was measured when, and the worst of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

SLOT_SECONDS = 10.0
SLOTS = 90

_STALLED_SECONDS = 60.0
_PAUSES = 3.0


@dataclass(frozen=True, slots=True)
class Slot:
    """Hold the worst check of the seconds from `number * SLOT_SECONDS` on; without a check there is no slot."""

    number: int
    inf_max: int
    nan_max: int


@dataclass(frozen=True, slots=True)
class Trouble:
    """Hold how the present trouble began, or the last one: bad checks with no quiet recent window between them.

    since: unix time of its first bad check.
    origin_layer: where that one began.
    checks: bad checks in it so far.
    last: monotonic time of the last of them.
    """

    since: float
    origin_layer: str | None
    checks: int
    last: float


@dataclass(frozen=True, slots=True)
class History:
    """Keep the last slots and how trouble began. It is bounded, and a healthy check only writes the first in a slot.

    Times are monotonic seconds, but for those that are shown.

    began: unix time of the first check.
    """

    quiet_seconds: float
    began: float | None = None
    slots: tuple[Slot, ...] = ()
    trouble: Trouble | None = None

    def after(self, now: float, timestamp: float, inf: int, nan: int, origin_layer: str | None) -> History:
        """Return the history after a check that found so many elements of each kind."""
        number = int(now // SLOT_SECONDS)
        kept = self.slots
        slot = Slot(number, inf, nan)
        if kept and kept[-1].number == number:
            if not (inf or nan):
                return self
            slot = Slot(number, max(inf, kept[-1].inf_max), max(nan, kept[-1].nan_max))
            kept = kept[:-1]
        return History(
            self.quiet_seconds,
            timestamp if self.began is None else self.began,
            (*kept[1 - SLOTS :], slot),
            self._trouble_after(now, timestamp, origin_layer) if inf or nan else self.trouble,
        )

    def read(self, now: float) -> list[Slot | None]:
        """Return the slots up to that of `now`, the oldest first; None where nothing was measured."""
        newest = int(now // SLOT_SECONDS)
        measured = {slot.number: slot for slot in self.slots}
        return [measured.get(number) for number in range(newest + 1 - SLOTS, newest + 1)]

    @property
    def stalled_seconds(self) -> float:
        """Return the age of a last check from which a run counts as stalled.

        That is three times the longest pause that the kept slots show, as rollouts and evaluations make pauses too, and
        a minute at least.
        """
        pauses = (later.number - slot.number for slot, later in zip(self.slots, self.slots[1:], strict=False))
        return max(_STALLED_SECONDS, _PAUSES * SLOT_SECONDS * max(pauses, default=0))

    def _trouble_after(self, now: float, timestamp: float, origin_layer: str | None) -> Trouble:
        if self.trouble is None or now - self.trouble.last > self.quiet_seconds:
            return Trouble(timestamp, origin_layer, 1, now)
        return replace(self.trouble, checks=self.trouble.checks + 1, last=now)
