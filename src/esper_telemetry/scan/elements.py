"""Find where in a gradient its bad elements are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import cast

import torch
from torch import Tensor

from esper_telemetry.scan.layouts import widen

_CHUNK = 1 << 16
_NORMED = frozenset({torch.float32, torch.float64, torch.bfloat16})


@dataclass(frozen=True, slots=True)
class BadElement:
    """Name one element: its index in the gradient's own shape, the same in row-major order, and what it is."""

    index: tuple[int, ...]
    flat: int
    value: complex


def first_bad_elements(gradient: Tensor, limit: int) -> list[BadElement]:
    """Return the first Inf and NaN elements in row-major order, and read no further than to the last of them.

    A DTensor is searched in its local shard. Duplicates of a sparse gradient are summed first, as in a scan.
    """
    to_local = getattr(gradient, "to_local", None)
    if to_local is not None:
        return first_bad_elements(cast(Tensor, to_local()), limit)
    if gradient.layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):
        gradient = gradient.to_sparse()
    if gradient.layout is torch.sparse_coo:
        return _in_sparse(gradient.coalesce(), limit)
    dense = gradient if gradient.layout is torch.strided else gradient.to_dense()
    shape = dense.shape
    return [BadElement(_unravel(flat, shape), flat, value) for flat, value in islice(_bad(dense), limit)]


def _in_sparse(gradient: Tensor, limit: int) -> list[BadElement]:
    """Search the stored values, which are in row-major order of their indices."""
    places, values, shape = gradient.indices(), gradient.values(), gradient.shape
    found = []
    for stored, value in islice(_bad(values), limit):
        row, *rest = _unravel(stored, values.shape)
        index = (*places[:, row].tolist(), *rest)
        found.append(BadElement(index, _ravel(index, shape), value))
    return found


def _bad(tensor: Tensor, start: int = 0) -> Iterator[tuple[int, complex]]:
    """Yield (flat index, value) of every bad element of a strided tensor, in row-major order."""
    if tensor.numel() > _CHUNK:
        outermost = next(dimension for dimension in range(tensor.dim()) if tensor.size(dimension) > 1)
        for part in torch.split(tensor.view(-1), _CHUNK) if tensor.is_contiguous() else tensor.chunk(2, outermost):
            yield from _bad(part, start)
            start += part.numel()
    elif not _is_proven_finite(tensor):
        wide = widen(tensor.reshape(-1))
        places = torch.isfinite(wide).logical_not_().nonzero().view(-1)
        yield from zip((start + places).tolist(), wide[places].tolist(), strict=True)


def _is_proven_finite(tensor: Tensor) -> bool:
    """Tell that a norm is finite, and so is every element; the proof takes much less time than the search."""
    return tensor.dtype in _NORMED and math.isfinite(torch.linalg.vector_norm(tensor).item())


def _unravel(flat: int, shape: Sequence[int]) -> tuple[int, ...]:
    index = []
    for size in reversed(shape):
        flat, place = divmod(flat, size)
        index.append(place)
    return tuple(reversed(index))


def _ravel(index: Sequence[int], shape: Sequence[int]) -> int:
    flat = 0
    for place, size in zip(index, shape, strict=True):
        flat = flat * size + place
    return flat
