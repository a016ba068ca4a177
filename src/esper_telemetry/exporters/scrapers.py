"""Who scrapes a run, how often, and what each of them has been shown."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from itertools import pairwise

from esper_telemetry.snapshot import Snapshot

LONGEST_WAIT = 90.0
"""Seconds to wait for a scraper at most, whatever its interval."""

_MOST = 16
_VISITS = 8
_INTERVALS = 1.5
_LOST_AFTER = 3.0  # intervals without a visit


@dataclass(slots=True)
class _Scraper:
    """Hold the last visits from one place, where several scrapers may be, each with a connection of its own.

    patient: whether it says its timeout, as Prometheus does: then it comes again, even if it came once so far.
    visits: by connection.
    shown: what each connection was shown last.
    """

    patient: bool
    visits: dict[int, deque[float]] = field(default_factory=dict)
    shown: dict[int, Snapshot] = field(default_factory=dict)

    def note(self, port: int, now: float, shown: Snapshot) -> None:
        """Take note of a visit; of too many connections forget the oldest."""
        self.visits.setdefault(port, deque(maxlen=_VISITS)).append(now)
        before = self.shown.get(port, shown)
        self.shown[port] = shown if shown.checks >= before.checks else before  # a page that was kept may be older
        while len(self.visits) > _MOST:
            oldest = next(iter(self.visits))
            del self.visits[oldest], self.shown[oldest]

    def wait(self, now: float) -> float:
        """Return the seconds for which the next visit of one that does not know the end is worth waiting."""
        kept = {port: visits for port, visits in self.visits.items() if len(visits) > 1}
        if kept:
            waits = (_worth(list(visits), now) for port, visits in kept.items() if not self.shown[port].ended)
            return max(waits, default=0.0)
        if any(shown.ended for shown in self.shown.values()):
            return 0.0
        together = sorted(visit for visits in self.visits.values() for visit in visits)
        if len(together) == 1:  # it may not come again
            return LONGEST_WAIT if self.patient and now - together[0] <= LONGEST_WAIT else 0.0
        return _worth(together[-_VISITS:], now)


def _worth(visits: list[float], now: float) -> float:
    """Return one and a half of the longest pause lately; 0 where the scraper has gone."""
    interval = max(later - visit for visit, later in pairwise(visits))
    return 0.0 if now - visits[-1] > _LOST_AFTER * interval else min(_INTERVALS * interval, LONGEST_WAIT)


class Scrapers:
    """Remember the scrapers of a run."""

    def __init__(self) -> None:
        self._scrapers: OrderedDict[str, _Scraper] = OrderedDict()
        self._lock = threading.Lock()
        self.visited = threading.Event()

    def note(self, name: str, port: int, patient: bool, shown: Snapshot, now: float | None = None) -> None:
        """Take note of a visit.

        name: who it is, as far as an address and a user agent tell.
        port: of its connection.
        """
        with self._lock:
            scraper = self._scrapers.setdefault(name, _Scraper(patient))
            self._scrapers.move_to_end(name)
            scraper.note(port, time.monotonic() if now is None else now, shown)
            while len(self._scrapers) > _MOST:
                self._scrapers.popitem(last=False)
        self.visited.set()

    def waiting_for_the_end(self) -> dict[str, float]:
        """Return those who have not been shown that the run has ended: name -> seconds worth waiting."""
        now = time.monotonic()
        with self._lock:
            waits = {name: scraper.wait(now) for name, scraper in self._scrapers.items()}
        return {name: wait for name, wait in waits.items() if wait > 0}
