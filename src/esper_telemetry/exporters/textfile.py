"""A file for node_exporter's textfile collector: it outlives the process, so that even SIGKILL loses nothing."""

from __future__ import annotations

import errno
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from prometheus_client import CollectorRegistry, generate_latest

from esper_telemetry.exporters.exit import at_exit, not_at_exit
from esper_telemetry.exporters.prometheus import EsperCollector
from esper_telemetry.snapshot import Snapshot

logger = logging.getLogger("esper_telemetry")

FILE_NAME = "esper.prom"
INTERVAL_SECONDS = 5.0
_REPEAT_SECONDS = 1.0


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
        self.path = Path(directory) / FILE_NAME
        self._monitor = monitor
        self._registry = CollectorRegistry()
        self._registry.register(EsperCollector(monitor))
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._failed = False
        self._written: tuple[int, int] = (0, 0)
        self._written_at = 0.0
        self._stopped = threading.Event()
        self._refuse_a_second_writer()
        try:
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

    def _refuse_a_second_writer(self) -> None:
        """Raise OSError where a live run writes already: node_exporter takes no series twice."""
        try:
            match = re.search(r'esper_run_info\{.*pid="(\d+)"', self.path.read_text())
        except OSError:
            return
        if match and int(match[1]) != self._pid and _alive(int(match[1])):
            text = f"textfile-dir: expected a folder that no other run writes to, got {str(self.path.parent)!r}"
            raise FileExistsError(errno.EEXIST, text)

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
            page = generate_latest(self._registry)
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
    """Write the page of a monitor to `directory`/esper.prom for node_exporter, and return the exporter.

    Raise OSError when the folder cannot be written, or when another live run writes there.
    """
    return TextfileExporter(monitor, directory)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
