"""Scalars on their way from a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Scalars:
    """Bring 0-d tensors to the host: from CUDA in the order of the stream, and nobody waits before `values()`."""

    def __init__(self, scalars: Sequence[Tensor]) -> None:
        self._arrived: torch.cuda.Event | None = None
        device = scalars[0].device
        if device.type != "cuda":
            self._values: list[float] | Tensor = [scalar.item() for scalar in scalars]
            return
        with torch.cuda.device(device):
            stacked = torch.stack([scalar.to(device, torch.float64, non_blocking=True) for scalar in scalars])
            self._values = stacked.to("cpu", non_blocking=True)
            self._arrived = torch.cuda.current_stream(device).record_event()

    def ready(self) -> bool:
        """Tell whether `values()` would return at once."""
        return self._arrived is None or bool(self._arrived.query())  # type: ignore[no-untyped-call]

    def values(self) -> list[float]:
        """Return them; wait for those that are not there yet."""
        if isinstance(self._values, Tensor):
            assert self._arrived is not None
            self._arrived.synchronize()
            self._values = self._values.tolist()
        return self._values
