"""Lightning's checkpoints: the last good one outlives what would remove it."""

from __future__ import annotations

import logging
import os
from typing import Any

from esper_telemetry.monitor import GradientMonitor

try:
    from lightning.fabric.plugins import CheckpointIO
except ImportError:
    from lightning_fabric.plugins import CheckpointIO  # type: ignore[assignment, unused-ignore]

logger = logging.getLogger("esper_telemetry")


class KeepingCheckpointIO(CheckpointIO):
    """Save and remove as another one does, but leave the last good checkpoint where it is.

    What it did not remove is removed when a newer good one was saved.
    """

    def __init__(self, inner: CheckpointIO, monitor: GradientMonitor) -> None:
        self._inner: CheckpointIO = inner
        self._monitor = monitor
        self._good: str | None = None
        self._unwanted = False
        if isinstance(inner, KeepingCheckpointIO):  # of the fit() before
            self._inner, self._good, self._unwanted = inner._inner, inner._good, inner._unwanted

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save, but never what is damaged over what is good."""
        safe, place = self._monitor.safe_to_save(), os.fspath(path)
        if not safe and place == self._good:
            logger.warning("esper: %s is not overwritten, because it is the last good checkpoint: %s", place, safe.why)
            return
        self._inner.save_checkpoint(checkpoint, path, storage_options)
        if safe:
            before, unwanted = self._good, self._unwanted
            self._good, self._unwanted = place, False
            if unwanted and before is not None and before != place:
                self._inner.remove_checkpoint(before)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove, but not the last good one while there is no newer one."""
        if os.fspath(path) != self._good:
            self._inner.remove_checkpoint(path)
        elif not self._unwanted:
            self._unwanted = True
            logger.warning("esper: %s is not removed yet: it is the last good checkpoint", self._good)

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        """Load."""
        loaded: dict[str, Any] = self._inner.load_checkpoint(path, *args, **options)
        return loaded

    def teardown(self) -> None:
        """Leave the other one as it wants to be left."""
        self._inner.teardown()
