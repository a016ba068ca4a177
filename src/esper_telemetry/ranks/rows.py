"""A thread that tells the job's store what this rank found, and reads on rank 0 what all of them did.

Training hands it a snapshot and goes on: it makes no collective, takes no lock and waits for nothing here.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import sys
import threading
import time
import weakref
from collections.abc import Callable

from esper_telemetry.ranks.link import Link
from esper_telemetry.ranks.row import BEAT_SECONDS, KEPT, BadCheck, ModelState
from esper_telemetry.ranks.store import job_store
from esper_telemetry.ranks.wrappers import several
from esper_telemetry.snapshot import Snapshot
from esper_telemetry.snapshot.ranks import Ranks

logger = logging.getLogger("esper_telemetry")

POLL_SECONDS = 0.25
STAY_SECONDS = 90.0
"""How long rank 0 goes on reading after its own end, for what others say last."""

_PAUSE_SECONDS = 0.05  # between two turns at least: a run that is bad at every check writes 20 rows a second
_EXIT_SECONDS = 2.0

_numbers = itertools.count()
_working: weakref.WeakSet[RankRows] = weakref.WeakSet()


class RankRows:
    """Keep this rank's row in the job's store, and on rank 0 read all of them.

    Monitors of several ranks belong together by the order in which their processes made them.

    read: returns the newest snapshot.
    publish: is given what is known of the ranks; returns whether it was taken.
    fail: takes note of the exception at hand.
    """

    def __init__(
        self, read: Callable[[], Snapshot], publish: Callable[[Ranks], bool], fail: Callable[[str], None]
    ) -> None:
        self._read = read
        self._publish = publish
        self._fail = fail
        self._number = next(_numbers)
        self._url: str | None = None
        self._bad: tuple[BadCheck, ...] = ()
        self._state = ModelState()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._alone = False
        self._link: Link | None = None
        self._ended_at: float | None = None
        self._leaving = False
        self._said = False
        self._begin()

    def see(self, snapshot: Snapshot) -> None:
        """Take note of a new snapshot; the first one after the process group was made starts the thread."""
        if self._thread is None:
            self._begin()
        if self._thread is None:
            return
        bad, state = BadCheck.of(snapshot), ModelState.of(snapshot)
        if bad is not None:
            self._bad = (*self._bad[1 - KEPT :], bad)
        if bad is not None or state != self._state:
            self._state = state
            self._wake.set()

    def announce(self, url: str) -> None:
        """Tell the others where this rank's page is."""
        self._url = url
        self._wake.set()

    def hear(self, seconds: float) -> None:
        """On rank 0, wait until every rank has reported its end, `seconds` at most; elsewhere return at once."""
        if self._thread is not None and self._read().run.rank == 0:
            self._wake.set()
            self._thread.join(seconds)

    def leave(self) -> None:
        """Say the last word before the interpreter goes; wait a moment for it."""
        self._leaving = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(_EXIT_SECONDS)

    def _begin(self) -> None:
        if self._alone or job_store() is None:
            return
        self._alone = not several()
        if not self._alone:
            arguments = (weakref.ref(self), self._wake)
            self._thread = threading.Thread(target=_work, args=arguments, name="esper-ranks", daemon=True)
            self._thread.start()
            _working.add(self)

    def turn(self) -> float | None:
        """Write and read what is due; return the seconds until the next turn, None when there is none."""
        snapshot = self._read()
        ended = snapshot.ended or (self._leaving and getattr(sys, "last_value", None) is None)
        try:
            if self._link is None:
                self._link = Link(self._number, snapshot, self._publish)
            self._link.turn(snapshot, self._bad, self._url, ended)
        except (RuntimeError, OSError) as error:  # the store is gone, as at the end of a job, or was never reached
            self._lose(error, snapshot)
        except Exception:
            self._fail("ranks could not exchange what they know")
        if self._leaving or (ended and self._is_over()):
            return None
        return BEAT_SECONDS if self._link is None or self._link.reader is None else POLL_SECONDS

    def _lose(self, error: Exception, snapshot: Snapshot) -> None:
        self._link = None
        known = snapshot.ranks
        if known is not None and known.reporting is not None and not snapshot.ended:  # keep it after the end
            self._publish(Ranks.unknown(known.expected, known.recent.seconds))
        if not self._said:
            self._said = True
            logger.info("esper: the job's store is unreachable, so ranks do not hear from each other: %s", error)

    def _is_over(self) -> bool:
        """Tell whether nobody has anything to say or to hear any more."""
        if self._link is None or self._link.reader is None or self._link.reader.is_done:
            return True
        self._ended_at = self._ended_at or time.monotonic()
        return time.monotonic() - self._ended_at > STAY_SECONDS


def _work(rows: weakref.ref[RankRows], wake: threading.Event) -> None:
    """Take turns until there are no more, or nobody holds the rows any longer."""
    pause: float | None = 0.0
    while pause is not None:
        wake.wait(pause)
        wake.clear()
        held = rows()
        pause = None if held is None else held.turn()
        del held
        time.sleep(_PAUSE_SECONDS)


def _leave_all() -> None:
    for rows in tuple(_working):
        rows.leave()


atexit.register(_leave_all)
