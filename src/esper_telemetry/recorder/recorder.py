"""The flight recorder: remembers the last checks, and writes them to a file when trouble begins."""

from __future__ import annotations

import logging
import os
import platform
import re
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from esper_telemetry import arguments
from esper_telemetry.recorder.recording import BadLayer, Element, PastCheck, Recording
from esper_telemetry.scan import first_bad_elements
from esper_telemetry.snapshot import Snapshot
from esper_telemetry.snapshot.arrival import by_arrival
from esper_telemetry.snapshot.damage import INTACT
from esper_telemetry.snapshot.recent import MAX_LAYERS, LayerCounts

logger = logging.getLogger("esper_telemetry")

HISTORY = 256
"""Checks that are remembered."""

QUIET_CHECKS = 32
"""Good checks in a row that end an episode of trouble."""

RECORDINGS_PER_RUN = 20
RECORDINGS_PER_FOLDER = 200

_FIRST_BAD = 16
_SERIES = 8
_NORMS = 1 << 18
"""Layer norms that are remembered: those of a model with very many layers for fewer checks."""
_RATES = 8
_WAIT_SECONDS = 1.0
_BATCH_ID_LENGTH = 200

BatchId = int | str | None


class _Found(NamedTuple):
    """Hold what a bad gradient is and where it is bad."""

    shape: tuple[int, ...]
    dtype: str
    first_bad: tuple[Element, ...]

    @classmethod
    def of(cls, gradient: Tensor) -> _Found:
        """Look into a gradient."""
        elements = (
            Element(each.index, each.flat, str(each.value)) for each in first_bad_elements(gradient, _FIRST_BAD)
        )
        return cls(tuple(gradient.shape), str(gradient.dtype).removeprefix("torch."), tuple(elements))


class _Moment(NamedTuple):
    """Hold what is known only while a check is made: its result may come later.

    order: indices of the layers as gradients reached them.
    found: what is in the bad layers, where an episode begins and gradients are still there.
    """

    batch_id: BatchId
    learning_rates: tuple[float | None, ...]
    order: Sequence[int]
    found: Mapping[str, _Found]


_UNKNOWN = _Moment(None, (), (), {})


class FlightRecorder:
    """Write a recording at the first bad check of each episode of trouble; an episode ends after 32 good checks.

    The training thread waits for the file, because the process may die in the next step, but a second at most: after
    that, the file is finished in the background. A run makes 20 recordings at most, and a folder keeps the newest 200.

    optimizers: whose learning rates are recorded; they are not kept alive.
    on_failure: called with what went wrong when a file cannot be written, while that exception is handled.

    Raise OSError when the folder cannot be written; it is made when it is missing.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        optimizers: Sequence[Optimizer],
        on_failure: Callable[[str], None],
    ) -> None:
        self._folder = arguments.path("record_dir", directory)
        self._optimizers = [weakref.ref(optimizer) for optimizer in optimizers]
        self._on_failure = on_failure
        self._noted: dict[int, _Moment] = {}
        self._history: deque[PastCheck] = deque(maxlen=HISTORY)
        self._norms: deque[Sequence[float | None]] = deque()
        self._layer_names: Sequence[str] = ()
        self._devices: tuple[str, ...] = ()
        self._good_in_a_row = QUIET_CHECKS
        self._recordings = 0
        self._writer: threading.Thread | None = None
        self._open: Recording | None = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self._folder).close()
        except OSError as error:
            text = f"record_dir: expected a writable folder, got {str(directory)!r}: {error.strerror}"
            raise OSError(error.errno, text) from None

    def note(
        self,
        check: int,
        batch_id: BatchId,
        order: Sequence[int],
        names: Sequence[str],
        gradients: Sequence[Tensor | None],
        snapshot: Snapshot,
    ) -> None:
        """Note what will be gone by the time the result of this check is known.

        snapshot: the newest; only where it is of this check are its bad layers known while the gradients are there.
        """
        if not self._devices:
            self._devices = tuple(sorted({_device(each) for each in gradients if each is not None}))
        found = {}
        if snapshot.checks == check and snapshot.layers and self._begins_episode():
            telling = {layer.layer_name for layer in _most_telling(snapshot)}
            layers = zip(names, gradients, strict=True)
            found = {name: _Found.of(each) for name, each in layers if each is not None and name in telling}
        if batch_id is not None and not isinstance(batch_id, int):
            batch_id = str(batch_id)[:_BATCH_ID_LENGTH]
        self._noted[check] = _Moment(batch_id, tuple(self._learning_rates()), order, found)

    def see(self, snapshot: Snapshot) -> None:
        """Remember a check, and record it where an episode begins."""
        moment = self._noted.pop(snapshot.checks, _UNKNOWN)
        self._remember(snapshot, moment)
        begins = bool(snapshot.layers) and self._begins_episode()
        if self._begins_episode():
            self._open = None
        self._good_in_a_row = 0 if snapshot.layers else self._good_in_a_row + 1
        if begins and self._recordings < RECORDINGS_PER_RUN:
            self._recordings += 1
            self._open = self._recording(snapshot, moment)
            self._record(self._open)
        else:
            self.amend(snapshot)

    def amend(self, snapshot: Snapshot) -> None:
        """Write the verdict into the file of this episode, where it has become known or has changed."""
        before = self._open
        if self._writer is not None and self._writer.is_alive():
            return  # the next look tries again
        if before is not None and (before.damage, before.cause) != (snapshot.damage, snapshot.cause):
            self._open = replace(before, damage=snapshot.damage, cause=snapshot.cause)
            self._record(self._open)

    def close(self) -> None:
        """Wait for a file that is being written, a second at most."""
        if self._writer is not None:
            self._writer.join(_WAIT_SECONDS)

    def _begins_episode(self) -> bool:
        return self._good_in_a_row >= QUIET_CHECKS

    def _learning_rates(self) -> Iterator[float | None]:
        groups = [group for each in self._optimizers if (optimizer := each()) for group in optimizer.param_groups]
        for group in groups[:_RATES]:
            rate = group.get("lr")
            known = isinstance(rate, int | float) or (isinstance(rate, Tensor) and rate.is_cpu)
            yield float(rate) if known else None  # type: ignore[arg-type]

    def _remember(self, snapshot: Snapshot, moment: _Moment) -> None:
        if snapshot.layer_names is not self._layer_names:
            self._layer_names = snapshot.layer_names
            self._norms = deque(maxlen=min(HISTORY, max(1, _NORMS // max(1, len(snapshot.layer_names)))))
        self._norms.append(snapshot.layer_norms)
        self._history.append(
            PastCheck(
                snapshot.checks,
                snapshot.timestamp or 0.0,
                snapshot.inf_grad_count,
                snapshot.nan_grad_count,
                snapshot.grad_norm or 0.0,
                None if snapshot.amp is None else snapshot.amp.scale,
                moment.learning_rates,
                moment.batch_id,
            )
        )

    def _recording(self, snapshot: Snapshot, moment: _Moment) -> Recording:
        run, origin = snapshot.run, snapshot.origin_layer or ""
        before, after = _clean_neighbours(snapshot, moment.order)
        layers = _most_telling(snapshot)
        shown = [origin, *filter(None, (before, after)), *(layer.layer_name for layer in layers)]
        return Recording(
            run_id=run.run_id,
            rank=run.rank,
            world_size=run.world_size,
            host=run.host,
            pid=run.pid,
            devices=self._devices,
            versions=_versions(),
            check=snapshot.checks,
            timestamp=snapshot.timestamp or 0.0,
            batch_id=moment.batch_id,
            inf_count=snapshot.inf_grad_count,
            nan_count=snapshot.nan_grad_count,
            elements=snapshot.elements or 0,
            watched_layers=len(snapshot.layer_names),
            origin_layer=origin,
            clean_before=before,
            clean_after=after,
            layers=tuple(_bad_layer(layer, moment.found.get(layer.layer_name)) for layer in layers),
            layers_left_out=len(snapshot.layers) - len(layers),
            history=tuple(self._history),
            layer_norms=self._series(list(dict.fromkeys(shown))[:_SERIES]),
            damage=None if snapshot.damage == INTACT else snapshot.damage,  # the step is still to come
            cause=snapshot.cause,
        )

    def _series(self, layer_names: Sequence[str]) -> dict[str, tuple[float | None, ...]]:
        """Return the norms of these layers, one for each check of the history."""
        place = {name: index for index, name in enumerate(self._layer_names)}
        forgotten = (None,) * (len(self._history) - len(self._norms))
        return {name: (*forgotten, *(norms[place[name]] for norms in self._norms)) for name in layer_names}

    def _record(self, recording: Recording) -> None:
        if self._writer is not None and self._writer.is_alive():
            raise TimeoutError(f"the previous recording is still being written to {self._folder}")
        self._writer = threading.Thread(target=self._write, args=(recording,), name="esper-recorder", daemon=True)
        self._writer.start()
        self._writer.join(_WAIT_SECONDS)

    def _write(self, recording: Recording) -> None:
        when = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(recording.timestamp))
        run = re.sub(r"[^\w.=+-]+", "_", recording.run_id)
        path = self._folder / f"esper-{when}-{run}-{recording.rank}-check{recording.check}.json"
        try:
            recording.write(path)
            _remove_oldest(self._folder)
        except Exception:
            self._open = None
            self._on_failure(f"{path} was not written")
        else:
            if recording.damage is not None:
                return  # it was said when the file was made
            logger.warning(
                "esper: check %d found Inf %d, NaN %d, first in %s; recorded in %s",
                *(recording.check, recording.inf_count, recording.nan_count, recording.origin_layer, path),
            )


def _most_telling(snapshot: Snapshot) -> tuple[LayerCounts, ...]:
    """Return the worst bad layers, and the origin in any case."""
    worst = snapshot.layers[:MAX_LAYERS]
    origin = [layer for layer in snapshot.layers if layer.layer_name == snapshot.origin_layer]
    return worst if origin[0] in worst else (*worst[:-1], *origin)


def _bad_layer(counts: LayerCounts, found: _Found | None) -> BadLayer:
    shape, dtype, first_bad = found or (None, None, None)
    return BadLayer(counts.layer_name, counts.inf_count, counts.nan_count, counts.numel, shape, dtype, first_bad)


def _clean_neighbours(snapshot: Snapshot, order: Sequence[int]) -> tuple[str | None, str | None]:
    """Return the nearest clean layers that gradients reached before and after the origin."""
    names, norms = snapshot.layer_names, snapshot.layer_norms
    bad = {layer.layer_name for layer in snapshot.layers}
    reached = [names[index] for index in by_arrival(range(len(names)), order) if norms[index] is not None]
    place = reached.index(snapshot.origin_layer or "")
    before = reached[place - 1] if place else None  # whatever came before the first bad one is clean
    return before, next((name for name in reached[place:] if name not in bad), None)


def _device(gradient: Tensor) -> str:
    device = gradient.device
    return f"{device} {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)


def _versions() -> dict[str, str]:
    return {
        "esper-telemetry": version("esper-telemetry"),
        "torch": version("torch"),
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def _remove_oldest(folder: Path) -> None:
    """Bound what all runs together leave in the folder, drafts of killed ones included."""
    found = []
    for path in folder.glob("esper-*.json*"):
        with suppress(FileNotFoundError):  # another rank was faster
            found.append((path.stat().st_mtime, path))
    for _, path in sorted(found)[:-RECORDINGS_PER_FOLDER]:
        path.unlink(missing_ok=True)
