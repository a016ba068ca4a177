"""Who scrapes a run, how often, and what each of them has been shown."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

from esper_telemetry.snapshot import Snapshot

LONGEST_WAIT = 90.0
"""Seconds to wait for a scraper at most, whatever its interval."""

_MOST = 16
_VISITS = 8
_INTERVALS = 1.5
_LOST_AFTER = 3.0  # intervals without a visit


@dataclass(slots=True)
class _Scraper:
    """Hold one scraper's last visits.

    patient: whether it says its timeout, as Prometheus does: then it comes again, even if it came once so far.
    """

    patient: bool
    shown: Snapshot
    visits: deque[float] = field(default_factory=lambda: deque(maxlen=_VISITS))

    @property
    def interval(self) -> float | None:
        """Return the seconds between two visits; None where there was only one, of somebody who may not come again."""
        pauses = [later - visit for visit, later in pairwise(self.visits)]
        if pauses:
            return median(pauses)
        return LONGEST_WAIT / _INTERVALS if self.patient else None

    def wait(self, now: float) -> float:
        """Return the seconds for which its next visit is worth waiting; 0 where it has gone."""
        if self.interval is None or now - self.visits[-1] > _LOST_AFTER * self.interval:
            return 0.0
        return min(_INTERVALS * self.interval, LONGEST_WAIT)


class Scrapers:
    """Remember the scrapers of a run."""

    def __init__(self) -> None:
        self._scrapers: OrderedDict[tuple[str, str], _Scraper] = OrderedDict()
        self._lock = threading.Lock()
        self.visited = threading.Event()

    def note(self, client: str, agent: str, patient: bool, shown: Snapshot) -> None:
        """Take note of a visit."""
        key = client, agent
        with self._lock:
            scraper = self._scrapers.setdefault(key, _Scraper(patient, shown))
            self._scrapers.move_to_end(key)
            scraper.visits.append(time.monotonic())
            if shown.checks >= scraper.shown.checks:  # a page that was kept may be older
                scraper.shown = shown
            while len(self._scrapers) > _MOST:
                self._scrapers.popitem(last=False)
        self.visited.set()

    def waiting_for_the_end(self) -> dict[str, float]:
        """Return those who have not been shown that the run has ended: name -> seconds worth waiting."""
        now = time.monotonic()
        with self._lock:
            waits = {key: each.wait(now) for key, each in self._scrapers.items() if not each.shown.ended}
        return {" ".join(filter(None, key)): wait for key, wait in waits.items() if wait > 0}
