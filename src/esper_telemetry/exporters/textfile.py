"""A file for node_exporter's textfile collector: it outlives the process, so that even SIGKILL loses nothing.

Every run has a file of its own, and its series carry `run_id` and `rank`: node_exporter refuses a series that stands in
two files, and a restarted run must not overwrite the last words of the one before.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from prometheus_client import generate_latest

from esper_telemetry.exporters.exit import at_exit, not_at_exit
from esper_telemetry.exporters.prometheus import EsperCollector
from esper_telemetry.snapshot import Snapshot

logger = logging.getLogger("esper_telemetry")

INTERVAL_SECONDS = 5.0
_REPEAT_SECONDS = 1.0
_FORGOTTEN_SECONDS = 3600.0


class Watched(Protocol):
    """A monitor: a snapshot, and news of each check."""

    @property
    def snapshot(self) -> Snapshot:
        """Return what the last check found."""

    def on_check(self, listener: Callable[[Snapshot], None]) -> Callable[[], None]:
        """Call `listener` with each new snapshot."""


class TextfileExporter:
    """Write a monitor's page to a folder until `close()`, or until the process ends.

    A bad check is written at once, in the training thread, before the optimizer steps; a bad check that is no worse
    than what stands in the file already waits a second at most. Otherwise the file is written every 5 s.
    """

    def __init__(self, monitor: Watched, directory: str | os.PathLike[str]) -> None:
        run = monitor.snapshot.run
        self.path = Path(directory) / f"esper-{run.run_id}-{run.rank}.prom"
        self._monitor = monitor
        self._collector = EsperCollector(monitor, labels={"run_id": run.run_id, "rank": str(run.rank)})
        self._pid = os.getpid()
        self._lock = threading.RLock()  # SIGTERM may come in the middle of a write, and writes once more
        self._failed = False
        self._written: tuple[int, int] = (0, 0)
        self._written_at = 0.0
        self._stopped = threading.Event()
        try:
            _remove_forgotten(self.path.parent)
            self._write()
        except OSError as error:
            text = f"textfile-dir: expected a folder that can be written, got {str(directory)!r}: {error.strerror}"
            raise OSError(error.errno, text) from None
        self._forget = monitor.on_check(self._see)
        self._thread = threading.Thread(target=self._keep_fresh, name="esper-textfile", daemon=True)
        self._thread.start()
        at_exit(self.close)

    def close(self) -> None:
        """Write the last state, or take the file away when there is nothing bad in it; a second call does nothing."""
        if self._stopped.is_set() or os.getpid() != self._pid:
            return
        self._stopped.set()
        not_at_exit(self.close)
        self._forget()
        self._try_to_write()
        if self._written == (0, 0):
            self.path.unlink(missing_ok=True)

    def _see(self, snapshot: Snapshot) -> None:
        if not (snapshot.inf_grad_count or snapshot.nan_grad_count):
            return
        worse = snapshot.inf_grad_count > self._written[0] or snapshot.nan_grad_count > self._written[1]
        if worse or time.monotonic() - self._written_at > _REPEAT_SECONDS:
            self._try_to_write()

    def _keep_fresh(self) -> None:
        while not self._stopped.wait(INTERVAL_SECONDS):
            self._try_to_write()

    def _try_to_write(self) -> None:
        try:
            self._write()
        except OSError as error:
            if not self._failed:
                logger.warning("esper: %s cannot be written, and this is not logged again: %s", self.path, error)
            self._failed = True

    def _write(self) -> None:
        with self._lock:
            recent = self._monitor.snapshot.recent.read(time.monotonic())
            page = generate_latest(self._collector)
            draft = self.path.with_suffix(".tmp")  # node_exporter reads *.prom only
            try:
                draft.write_bytes(page)
                draft.replace(self.path)
            except OSError:
                draft.unlink(missing_ok=True)
                raise
            self._written = recent.inf_max, recent.nan_max
            self._written_at = time.monotonic()


def start_textfile(monitor: Watched, directory: str | os.PathLike[str]) -> TextfileExporter:
    """Write the page of a monitor to a file in `directory` for node_exporter, and return the exporter.

    Raise OSError when the folder cannot be written.
    """
    return TextfileExporter(monitor, directory)


def _remove_forgotten(folder: Path) -> None:
    """Remove what killed runs left over an hour ago: it pages no more, and a live file is rewritten every 5 s."""
    for path in folder.glob("esper-*.prom"):
        if time.time() - path.stat().st_mtime > _FORGOTTEN_SECONDS:
            path.unlink(missing_ok=True)
