"""What rank 0 knows of the whole run: how many ranks report, what they found together, and which went bad first."""

from __future__ import annotations

from dataclasses import dataclass

from esper_telemetry.snapshot.damage import INTACT, GoodCheck
from esper_telemetry.snapshot.recent import RecentWindow

WORST = 5
SHOWN = 20


@dataclass(frozen=True, slots=True)
class BadRank:
    """Describe a rank whose own backward was bad within the recent window.

    inf_count, nan_count: the most in one of its checks, before any reduction.
    layer: where it began in the first of them.
    check, timestamp: of the first of them.
    last: monotonic time at which rank 0 heard of the last of them.
    cause: where its trouble began, as far as the rank has seen that.
    """

    rank: int
    host: str
    inf_count: int
    nan_count: int
    layer: str | None
    check: int
    timestamp: float
    last: float
    cause: str | None = None


@dataclass(frozen=True, slots=True)
class DamagedRank:
    """Describe a rank whose part of the model holds Inf or NaN.

    part: the worst part that does: "parameters", "buffers" or "optimizer".
    elements, tensor: how many elements of it, and the worst tensor.
    """

    rank: int
    host: str
    part: str
    elements: int
    tensor: str


@dataclass(frozen=True, slots=True)
class RankPlace:
    """Say where a rank runs and where its page is.

    address: host and port; None while it has no exporter.
    """

    rank: int
    local_rank: int
    host: str
    address: str | None
    secure: bool = False

    @property
    def url(self) -> str | None:
        """Return the URL of its page."""
        return None if self.address is None else f"{'https' if self.secure else 'http'}://{self.address}"


@dataclass(frozen=True, slots=True)
class Ranks:
    """Hold what rank 0 has read from every rank; of other ranks only where rank 0's page is.

    expected: ranks of the run.
    reporting: ranks that were heard from lately, or reported their end; None if that cannot be known.
    gone: ranks that were heard from, went silent, and never reported their end.
    silent: the first of those that do not report.
    recent: the run's counts within the recent window, each element once, by checks of the same number.
    exact: whether every rank knew which elements are its own; else the counts are of the worst rank.
    attributed: whether all that were heard of measure what their own backward made.
    bad: the ranks whose own backward was bad within the recent window, the earliest first.
    scanned: whether any rank has scanned its part of the model.
    damaged: the ranks whose part of the model is damaged, the worst first.
    good: whether the last check was good on every rank. Else, last_good: the last that was, if any.
    places: every rank that was heard from, in order.
    leader: URL of rank 0's page, where it is known.
    """

    expected: int
    reporting: int | None
    gone: int
    silent: tuple[int, ...]
    recent: RecentWindow
    exact: bool
    attributed: bool
    bad: tuple[BadRank, ...]
    scanned: bool
    damaged: tuple[DamagedRank, ...]
    good: bool
    last_good: GoodCheck | None
    places: tuple[RankPlace, ...]
    leader: str | None

    @classmethod
    def unknown(cls, expected: int, window_seconds: float) -> Ranks:
        """Build what is known before anybody was heard of."""
        return cls(expected, None, 0, (), RecentWindow(window_seconds), True, True, (), False, (), True, None, (), None)

    def bad_at(self, now: float) -> tuple[BadRank, ...] | None:
        """Return the ranks that are bad at `now`, in monotonic seconds, the earliest first.

        None if that is not known: nothing hears from them, or not all of them measure it and none that does is bad.
        """
        bad = tuple(rank for rank in self.bad if now - rank.last <= self.recent.seconds)
        return None if self.reporting is None or not (bad or self.attributed) else bad

    def last_good_check(self, own: GoodCheck | None) -> GoodCheck | None:
        """Return the last check that was good on every rank; `own` is that of rank 0. None if it is not known."""
        if self.reporting is None:
            return None
        return own if self.good else self.last_good

    @property
    def damage(self) -> str | None:
        """Return "intact", or the worst part of the model that is damaged on a rank; None before the first scan."""
        if not self.scanned:
            return None
        return self.damaged[0].part if self.damaged else INTACT


def worst_of(bad: tuple[BadRank, ...]) -> list[tuple[int, BadRank]]:
    """Return the five with the most bad elements, the earliest first, each with its place among all, from 1 on."""
    placed = list(enumerate(bad, start=1))
    return sorted(sorted(placed, key=lambda each: -max(each[1].inf_count, each[1].nan_count))[:WORST])
