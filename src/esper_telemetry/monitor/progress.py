"""Take in what the loop reports of its progress, without waiting for a device."""

from __future__ import annotations

from collections import deque
from typing import Any

from torch import Tensor

from esper_telemetry.monitor.latest import Latest
from esper_telemetry.scan.scalars import Scalars
from esper_telemetry.snapshot.train_progress import TrainProgress

_MOST = 16  # of a loss that is still on its device; who reads is behind by no more


class Progress:
    """Put what the loop reports into the snapshot; a tensor on a device follows when it has arrived."""

    def __init__(self, latest: Latest) -> None:
        self._latest = latest
        self._on_the_way: deque[tuple[Scalars, dict[str, Any]]] = deque(maxlen=_MOST)

    @property
    def pending(self) -> bool:
        """Tell whether something is still on a device."""
        return bool(self._on_the_way)

    def tell(self, **told: Any) -> None:
        """Take in what was reported; anything but a number is counted as an error, never raised."""
        try:
            with self._latest.lock:
                self._tell(told)
        except Exception:
            self._latest.fail("the values given to record() could not be used")

    def take_in(self) -> None:
        """Take in what has arrived meanwhile."""
        while self._on_the_way and self._on_the_way[0][0].ready():
            scalars, told = self._on_the_way.popleft()
            names = [name for name, value in told.items() if isinstance(value, Tensor)]
            self._publish(told | dict(zip(names, scalars.values(), strict=True)))

    def _tell(self, told: dict[str, Any]) -> None:
        tensors = {name: value.detach() for name, value in told.items() if isinstance(value, Tensor)}
        for name, tensor in tensors.items():
            if tensor.numel() != 1:
                raise ValueError(f"record: expected one number for {name}, got a tensor of shape {tuple(tensor.shape)}")
        if not tensors:
            self._publish(told)
            return
        self._on_the_way.append((Scalars([each.reshape(()) for each in tensors.values()]), told))
        self.take_in()

    def _publish(self, told: dict[str, Any]) -> None:
        self._latest.change(progress=_after(self._latest.snapshot.progress, told))


def _after(before: TrainProgress | None, told: dict[str, Any]) -> TrainProgress:
    numbers = {name: None if value is None else float(value) for name, value in told.items()}
    step, samples = (None if (value := numbers[name]) is None else int(value) for name in ("step", "samples"))
    return (before or TrainProgress()).after(numbers["loss"], numbers["lr"], step, samples)
