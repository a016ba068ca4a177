"""Turn whatever a gradient can be into a plain strided tensor of the elements this process holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

_COMPARED = frozenset({torch.float32, torch.float64, torch.complex64, torch.complex128})
_COPIED = 1 << 16


def materialize(gradient: Tensor) -> Tensor:
    """Return the stored elements of `gradient` as a strided tensor.

    A DTensor gives its local shard. A sparse COO gradient is coalesced first: two finite duplicates can add up to
    Inf, and it is the sum that the optimizer applies. Elements that a sparse layout leaves out are zeros.
    """
    to_local = getattr(gradient, "to_local", None)
    if to_local is not None:
        return materialize(cast(Tensor, to_local()))
    if gradient.layout is torch.sparse_coo:
        return gradient.coalesce().values()
    if gradient.layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):
        return gradient.values()
    if gradient.layout is not torch.strided:
        return gradient.to_dense()
    return gradient


def local_numel(gradient: Tensor) -> int:
    """Return how many elements this process is responsible for; a sparse layout's implicit zeros count."""
    to_local = getattr(gradient, "to_local", None)
    return gradient.numel() if to_local is None else cast(Tensor, to_local()).numel()


def flats(tensor: Tensor) -> Iterator[Tensor]:
    """View a strided tensor as one dimension; what has no such view is halved until a copy of a part is small."""
    flat = _flatten(tensor)
    if flat is not None:
        yield flat
    elif tensor.numel() <= _COPIED:
        yield tensor.reshape(-1)
    else:
        for half in tensor.chunk(2, dim=max(range(tensor.dim()), key=tensor.size)):
            yield from flats(half)


def _flatten(tensor: Tensor) -> Tensor | None:
    if tensor.is_contiguous():
        return tensor.view(-1)
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    dense = tensor.permute(order)
    return dense.view(-1) if dense.is_contiguous() else None


def widen(chunk: Tensor) -> Tensor:
    """Copy a chunk of a narrow dtype into one that torch can compare: bfloat16, float16, float8, complex32."""
    if chunk.dtype in _COMPARED:
        return chunk
    return chunk.to(torch.complex64 if chunk.is_complex() else torch.float32)
