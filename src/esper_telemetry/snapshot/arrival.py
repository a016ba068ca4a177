"""In which order gradients reached the layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def by_arrival(layers: Iterable[int], order: Sequence[int]) -> list[int]:
    """Sort layers, first the one that gradients reached first; unhooked ones last, the last registered first."""
    place = {index: position for position, index in enumerate(order)}
    return sorted(layers, key=lambda index: (place.get(index, math.inf), -index))
