"""What all rows say together."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from esper_telemetry.ranks.row import BadCheck, Row
from esper_telemetry.snapshot.damage import INTACT, GoodCheck, severity_of
from esper_telemetry.snapshot.ranks import SHOWN, BadRank, DamagedRank, Ranks
from esper_telemetry.snapshot.recent import LayerCounts, RecentWindow

SILENT_SECONDS = 30.0
"""How long a rank may be silent, six turns of its thread, before it no longer counts as reporting."""

HOLD_SECONDS = 1.0
"""How long to hold back a bad check while it is unknown who made it bad, so that a page can name that rank."""

_CHECKS = 64


@dataclass(slots=True)
class _Sums:
    """Add up one check over ranks: what each owns, and the most that one of them sees, whoever owns it.

    A rank sees elements of the run alone, so the run has at least those.

    since: when it was first heard of.
    """

    since: float
    own: list[int] = field(default_factory=lambda: [0, 0])
    seen: list[int] = field(default_factory=lambda: [0, 0])
    exact: bool = True
    rows: int = 0
    admitted: bool = False

    def add(self, check: BadCheck) -> None:
        self.rows += 1
        self.admitted |= bool(check.local_inf or check.local_nan)
        for kind, (own, seen) in enumerate(((check.own_inf, check.inf), (check.own_nan, check.nan))):
            self.own[kind] += own or 0
            self.exact &= own is not None
            self.seen[kind] = max(self.seen[kind], seen)

    def is_settled(self, expected: int, now: float) -> bool:
        """Tell whether it is known who made the check bad, or nobody is waited for any more."""
        return self.admitted or self.rows >= expected or now - self.since >= HOLD_SECONDS

    def counts(self) -> tuple[int, int]:
        inf, nan = map(max, self.own, self.seen)
        return inf, nan


class Board:
    """Put the rows of a run together, whenever and in whatever order they come.

    Times are monotonic seconds of the reader: no clock of another host decides anything but the order of two ranks
    that went bad in the same check.
    """

    def __init__(self, expected: int, window_seconds: float) -> None:
        self._expected = expected
        self._rows: dict[int, Row] = {}
        self._heard: dict[int, float] = {}
        self._sums: OrderedDict[int, _Sums] = OrderedDict()
        self._grown: set[int] = set()
        self._counted: dict[int, int] = {}
        self._bad: dict[int, BadRank] = {}
        self._damaged: dict[int, DamagedRank] = {}
        self._inexact_until = -1.0
        self._recent = RecentWindow(window_seconds)

    def take(self, row: Row, now: float) -> None:
        """Take in a row that is new, or has changed."""
        rank = row.place.rank
        before = self._rows.get(rank)
        if before is not None and (before.place.host, before.process) != (row.place.host, row.process):
            self._counted.pop(rank, None)  # another process in its place begins to count anew
        self._rows[rank], self._heard[rank] = row, now
        counted = self._counted.get(rank, 0)
        if new := [check for check in row.bad if check.check > counted]:
            self._counted[rank] = max(check.check for check in new)
            for check in new:
                self._add(check, now)
            self._blame(row, [check for check in new if check.local_inf or check.local_nan], now)
        self._take_state(row)

    def read(self, now: float) -> Ranks:
        """Return what is known at `now`."""
        self._take_in_sums(now)
        rows = self._rows
        silent = {rank for rank, row in rows.items() if not row.ended and now - self._heard[rank] > SILENT_SECONDS}
        return Ranks(
            expected=self._expected,
            reporting=len(rows) - len(silent),
            gone=len(silent),
            silent=self._first_silent(silent),
            recent=self._recent,
            exact=now > self._inexact_until,
            attributed=all(row.attributes for row in rows.values()),
            bad=self._bad_ranks(now),
            scanned=any(row.state.damage is not None for row in rows.values()),
            damaged=tuple(sorted(self._damaged.values(), key=_worst_first)),
            good=all(row.state.good for row in rows.values()),
            last_good=self._last_good(),
            places=tuple(rows[rank].place for rank in sorted(rows)),
            leader=None,
        )

    def _add(self, check: BadCheck, now: float) -> None:
        sums = self._sums.setdefault(check.check, _Sums(now))
        sums.add(check)
        self._grown.add(check.check)
        if not sums.exact:
            self._inexact_until = now + self._recent.seconds

    def _take_in_sums(self, now: float) -> None:
        """Put the checks that have grown into the recent window, when they are settled; forget the oldest."""
        oldest = set(islice(self._sums, max(0, len(self._sums) - _CHECKS)))
        over = all(row.ended for row in self._rows.values())
        settled = {
            each for each in self._grown if over or each in oldest or self._sums[each].is_settled(self._expected, now)
        }
        if counts := [self._sums[check].counts() for check in settled]:
            inf, nan = map(max, zip(*counts, strict=True))
            if inf or nan:
                self._recent = self._recent.after(now, (LayerCounts("", inf, nan, 0),), 0)
        self._grown -= settled
        for check in oldest:
            del self._sums[check]

    def _blame(self, row: Row, bad: Sequence[BadCheck], now: float) -> None:
        """Take note of what the rank's own backward made."""
        if not bad:
            return
        rank, first = row.place.rank, bad[0]
        inf, nan = (max(counts) for counts in zip(*((b.local_inf or 0, b.local_nan or 0) for b in bad), strict=True))
        known = self._bad.get(rank)
        if known is None or now - known.last > self._recent.seconds:
            self._bad[rank] = BadRank(rank, row.place.host, inf, nan, first.layer, first.check, first.timestamp, now)
        else:
            worst = max(inf, known.inf_count), max(nan, known.nan_count)
            self._bad[rank] = replace(known, inf_count=worst[0], nan_count=worst[1], last=now)

    def _take_state(self, row: Row) -> None:
        """Take note of whether the rank's part of the model is damaged, and of where its trouble began."""
        rank, state = row.place.rank, row.state
        if state.damage in (None, INTACT):
            self._damaged.pop(rank, None)
        else:
            self._damaged[rank] = DamagedRank(rank, row.place.host, state.damage, state.elements, state.tensor)
        known = self._bad.get(rank)
        if known is not None and known.cause != state.cause:
            self._bad[rank] = replace(known, cause=state.cause)

    def _bad_ranks(self, now: float) -> tuple[BadRank, ...]:
        """Return those of the recent window, the earliest first; forget the others."""
        self._bad = {rank: bad for rank, bad in self._bad.items() if now - bad.last <= self._recent.seconds}
        return tuple(sorted(self._bad.values(), key=lambda bad: (bad.check, bad.timestamp, bad.rank)))

    def _last_good(self) -> GoodCheck | None:
        """Return the last check before any rank was bad; None where a rank never was good, and while all are."""
        last = [row.state.last_good for row in self._rows.values() if not row.state.good]
        known = [GoodCheck(check, timestamp, None) for check, timestamp in filter(None, last)]
        return min(known, key=lambda good: good.check) if known and len(known) == len(last) else None

    def _first_silent(self, silent: Iterable[int]) -> tuple[int, ...]:
        never = (rank for rank in range(self._expected) if rank not in self._rows)
        return tuple(sorted((*silent, *never)))[:SHOWN]


def _worst_first(rank: DamagedRank) -> tuple[int, int, int]:
    return -severity_of(rank.part), -rank.elements, rank.rank
