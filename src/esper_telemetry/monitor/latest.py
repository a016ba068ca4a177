"""The newest snapshot: written by the monitor alone, read by everybody."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from esper_telemetry.ranks.identity import run_info
from esper_telemetry.snapshot import Snapshot
from esper_telemetry.snapshot.ranks import Ranks

logger = logging.getLogger("esper_telemetry")


class Latest:
    """Hold the newest snapshot. Readers take no lock; who changes it holds `lock`, or calls `change()`."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.lock = threading.RLock()

    def change(self, **changes: Any) -> None:
        """Replace it by one with these fields changed."""
        with self.lock:
            self.snapshot = self.snapshot.but(**changes)

    def count_dropped_step(self) -> None:
        """Count an optimizer step that was dropped."""
        with self.lock:
            self.snapshot = self.snapshot.skipping("intervention")

    def count_unmonitored_step(self) -> None:
        """Count an optimizer step that no check preceded."""
        with self.lock:
            self.snapshot = self.snapshot.but(unmonitored_steps=self.snapshot.unmonitored_steps + 1)

    def read(self) -> Snapshot:
        """Return the newest snapshot."""
        return self.snapshot

    def take_ranks(self, ranks: Ranks) -> bool:
        """Store what is known of the ranks, unless another thread is changing the snapshot; training never waits.

        Return whether it was put in.
        """
        taken = self.lock.acquire(blocking=False)
        if taken:
            self.snapshot = self.snapshot.but(ranks=ranks)
            self.lock.release()
        return taken

    def join(self, run_id: object) -> None:
        """Learn who this process is, now that it has joined the others of its run."""
        self.change(run=run_info(run_id, before=self.snapshot.run))

    def try_to(self, *work: Callable[[], None]) -> None:
        """Do work that changes it, unless somebody else is changing it now."""
        if self.lock.acquire(blocking=False):
            try:
                for each in work:
                    each()
            finally:
                self.lock.release()

    def fail(self, what: str) -> None:
        """Count the exception at hand, and log it when it is the first: training goes on."""
        if self.snapshot.monitor_errors == 0:
            logger.exception("esper: %s; training continues; later failures are counted, not logged", what)
        with self.lock:
            self.snapshot = self.snapshot.but(monitor_errors=self.snapshot.monitor_errors + 1)
