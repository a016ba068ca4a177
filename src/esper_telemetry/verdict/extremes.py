"""The smallest and the largest element of tensors: enough to tell Inf and NaN, and nobody waits for a device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from esper_telemetry.scan.scalars import Scalars

FINITE, LOWEST, BAD = 0, 1, 2
"""What a tensor holds: finite elements; -Inf too and no worse, which may be a mask; +Inf or NaN."""

_DEEPEST = 4


class Extremes:
    """Take the extremes of many tensors, and know later what they were.

    Each is named by its place, the number of the extremes taken before.
    """

    def __init__(self) -> None:
        self._taken: list[tuple[Tensor, Tensor]] = []
        self._arriving: list[tuple[list[int], Scalars]] = []

    def take(self, tensor: Tensor) -> int | None:
        """Note a tensor's extremes; None where it can hold neither Inf nor NaN, or nobody can look."""
        if tensor.numel() == 0 or not (tensor.is_floating_point() or tensor.is_complex()):
            return None
        if tensor.is_meta or tensor.layout is not torch.strided:
            return None
        with torch.no_grad():
            plain = tensor.detach()
            plain = torch.view_as_real(plain.resolve_conj()) if plain.is_complex() else plain
            low, high = torch.aminmax(plain if plain.dtype.itemsize > 1 else plain.float())
        self._taken.append((low, high))
        return len(self._taken) - 1

    def send(self) -> None:
        """Begin to bring them to the host."""
        for device in {low.device for low, _ in self._taken}:
            places = [place for place, (low, _) in enumerate(self._taken) if low.device == device]
            self._arriving.append((places, Scalars([each for place in places for each in self._taken[place]])))

    def read(self) -> dict[int, int]:
        """Return what each tensor held, by place; wait for those that are on the way."""
        found = {}
        for places, scalars in self._arriving:
            values = scalars.values()
            for index, place in enumerate(places):
                found[place] = _kind(values[2 * index], values[2 * index + 1])
        return found


def _kind(low: float, high: float) -> int:
    if high != high or low != low or high == torch.inf:
        return BAD
    return LOWEST if low == -torch.inf else FINITE


def tensors_among(values: Iterable[Any], depth: int = _DEEPEST) -> Iterator[Tensor]:
    """Yield the tensors among arguments or results, and those in what they consist of."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif depth and isinstance(value, Mapping):
            yield from tensors_among(value.values(), depth - 1)
        elif depth and isinstance(value, list | tuple):
            yield from tensors_among(value, depth - 1)
        elif depth and is_dataclass(value):
            yield from tensors_among([getattr(value, each.name, None) for each in fields(value)], depth - 1)
