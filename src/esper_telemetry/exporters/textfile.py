"""A file for node_exporter's textfile collector: it outlives the process, so even SIGKILL loses nothing.

Every rank of every run has its own file, and its series carry `run_id` and `rank`: node_exporter refuses a series that
is in two files, and a restarted run must not overwrite the last values of the previous one.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Protocol

from prometheus_client import generate_latest

from esper_telemetry import arguments
from esper_telemetry.exporters.exit import at_exit, not_at_exit
from esper_telemetry.exporters.prometheus import EsperCollector
from esper_telemetry.exporters.samples import snapshot_of
from esper_telemetry.snapshot import RunInfo, Snapshot

logger = logging.getLogger("esper_telemetry")

INTERVAL_SECONDS = 5.0
_REPEAT_SECONDS = 1.0
_FORGOTTEN_SECONDS = 3600.0
_LONGEST_NAME = 100
_OURS = re.compile(r"esper-.+-\d+(\.\d+)?\.prom(\.[0-9a-f]+\.tmp)?")


class Watched(Protocol):
    """A monitor: a snapshot, and news of each check."""

    @property
    def snapshot(self) -> Snapshot:
        """Return what the last check found."""

    def on_check(self, listener: Callable[[Snapshot], None]) -> Callable[[], None]:
        """Call `listener` with each new snapshot."""


class TextfileExporter:
    """Write a monitor's page to a folder until `close()`, or until the process ends.

    A bad check is written at once, in the training thread, before the optimizer steps; one that is no worse than what
    the file already shows waits a second at most. Otherwise the file is written every 5 s.
    """

    def __init__(self, monitor: Watched, directory: str | os.PathLike[str]) -> None:
        run = snapshot_of("monitor", monitor).run
        self.path = arguments.path("directory", directory) / _file_name(run)
        # node_exporter reads *.prom only. A write that SIGTERM interrupts is finished by the one of its handler.
        self._draft = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}.tmp")
        self._monitor = monitor
        self._collector = EsperCollector(monitor, labels=_labels(run))
        self._pid = os.getpid()
        self._lock = threading.RLock()  # SIGTERM may come in the middle of a write, and writes once more
        self._failed = False
        self._written: tuple[int, int] = (0, 0)
        self._written_at = 0.0
        self._stopped = threading.Event()
        _remove_forgotten(self.path.parent)
        self._write_first()
        self._forget = monitor.on_check(self._see)
        self._thread = threading.Thread(target=self._keep_fresh, name="esper-textfile", daemon=True)
        self._thread.start()
        at_exit(self.close)

    def close(self) -> None:
        """Write the last state, or remove the file if nothing in it is bad; a second call does nothing."""
        if self._stopped.is_set() or os.getpid() != self._pid:
            return
        self._stopped.set()
        not_at_exit(self.close)
        self._forget()
        self._try_to_write()
        if self._written == (0, 0):
            with suppress(OSError):
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

    def _write_first(self) -> None:
        try:
            self._write()
        except OSError as error:
            if error.filename2 is not None:  # the folder took the draft; it is the file that cannot be replaced
                self._say(error)
                return
            text = f"textfile-dir: expected a writable folder, got {str(self.path.parent)!r}: "
            raise OSError(error.errno, text + str(error.strerror)) from None

    def _try_to_write(self) -> None:
        if os.getpid() != self._pid:
            return
        try:
            self._write()
        except OSError as error:
            self._say(error)

    def _say(self, error: OSError) -> None:
        if not self._failed:
            reason = error.strerror
            if error.filename2 is not None and isinstance(error, PermissionError):
                reason = "another user owns the file"
            logger.warning("esper: %s cannot be written: %s (later failures are not logged)", self.path, reason)
        self._failed = True

    def _write(self) -> None:
        with self._lock:
            recent = self._monitor.snapshot.recent.read(time.monotonic())
            page = generate_latest(self._collector)
            try:
                _write_for_all(self._draft, page)
                self._draft.replace(self.path)
            except OSError:
                with suppress(OSError):
                    self._draft.unlink()
                raise
            self._written = recent.inf_max, recent.nan_max
            self._written_at = time.monotonic()


def start_textfile(monitor: Watched, directory: str | os.PathLike[str]) -> TextfileExporter:
    """Write a monitor's metrics to a file in `directory` for node_exporter, and return the exporter.

    Raise OSError when the folder cannot be written to.
    """
    return TextfileExporter(monitor, directory)


def _labels(run: RunInfo) -> Mapping[str, str]:
    labels = {"run_id": run.run_id, "rank": str(run.rank)}
    return labels | {"attempt": str(run.attempt)} if run.attempt else labels


def _file_name(run: RunInfo) -> str:
    """Return a name that every file system takes and that no other run has."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", run.run_id)[:_LONGEST_NAME]
    if name != run.run_id:
        name = f"{name}~{sha256(run.run_id.encode()).hexdigest()[:16]}"  # no name above has a ~
    attempt = f".{run.attempt}" if run.attempt else ""
    return f"esper-{name}-{run.rank}{attempt}.prom"


def _write_for_all(path: Path, page: bytes) -> None:
    """Write a file that everybody may read; prometheus_client's write_to_textfile leaves the mode to the umask.

    Under umask 077 node_exporter could not read it, and setting the mode after the rename would leave a moment in which
    it fails.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    with open(os.open(path, flags, 0o644), "wb") as file:
        with suppress(OSError):  # some mounts fix the mode
            os.fchmod(file.fileno(), 0o644)
        file.write(page)


def _remove_forgotten(folder: Path) -> None:
    """Remove files that killed runs left over an hour ago: they no longer page, and a live one is rewritten every 5 s.

    A failure does not matter: another rank was faster, or the file is not ours to remove.
    """
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _OURS.fullmatch(entry.name):
                with suppress(OSError):
                    if time.time() - entry.stat(follow_symlinks=False).st_mtime > _FORGOTTEN_SECONDS:
                        os.unlink(entry)
