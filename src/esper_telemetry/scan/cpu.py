"""Count on the CPU: a finite norm proves a piece of memory healthy in one read, only the rest is read again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import cast

import torch
from torch import Tensor

from esper_telemetry.health import total_norm
from esper_telemetry.scan.layouts import flats, local_numel, materialize, widen
from esper_telemetry.scan.result import Scan

CHUNK = 1 << 16
"""Elements whose norm is taken together: rows of this length keep every core reading."""

_RUN = 8
"""Chunks that are counted together: fewer calls, and their marks still fit the caches. A large layer's marks take at
most a byte per element, so a layer of few chunks counts fewer together."""

_NORMED = frozenset({torch.float32, torch.float64, torch.bfloat16})
"""The dtypes whose norm torch computes at the speed of memory, in an accumulator that holds their range."""

_PLAIN = frozenset((torch.strided, dtype) for dtype in _NORMED)
_LAYOUT_AND_DTYPE = attrgetter("layout", "dtype")

_Layer = tuple[int, Tensor]
_MANY = 64
_STACKED_FROM = 8
_STACKED_NUMEL = 4096
_SERIAL_NUMEL = (1 << 15) - 1  # one more, and torch wakes a second thread for it


def scan_cpu(gradients: Sequence[Tensor | None]) -> Scan:
    """Count Inf and NaN in every gradient, and take its L2 norm."""
    return _scan_small_model(gradients) or _scan(gradients)


def _scan_small_model(gradients: Sequence[Tensor | None]) -> Scan | None:
    """Scan a few small gradients if all is well with them: reading them takes less than a loop over them does."""
    if len(gradients) >= _MANY or set(map(type, gradients)) != {Tensor}:
        return None
    plain = cast(list[Tensor], gradients)
    numels = list(map(Tensor.numel, plain))
    if max(numels) > CHUNK or not _PLAIN.issuperset(map(_LAYOUT_AND_DTYPE, plain)):
        return None
    norms: list[float | None] = list(map(Tensor.item, torch._foreach_norm(plain, 2)))
    return Scan(norms, {}, sum(numels)) if math.isfinite(total_norm(norms)) else None


def scan_single(gradient: Tensor | None) -> Scan | None:
    """Scan one small gradient if all is well with it, and be quick: it is looked at while autograd waits."""
    if type(gradient) is not Tensor or not gradient.is_cpu or (gradient.layout, gradient.dtype) not in _PLAIN:
        return None
    numel = gradient.numel()
    if numel > CHUNK:
        return None
    norm: float = torch.linalg.vector_norm(gradient).item()
    return Scan([norm], {}, numel) if math.isfinite(norm) else None


def _scan(gradients: Sequence[Tensor | None]) -> Scan:
    norms: list[float | None] = [None] * len(gradients)
    bad: dict[int, tuple[int, int]] = {}
    elements = 0
    small: list[_Layer] = []
    for index, gradient in enumerate(gradients):
        if gradient is None:
            continue
        plain = type(gradient) is Tensor and gradient.layout is torch.strided
        stored = gradient if plain else materialize(gradient)
        numel = stored.numel()
        elements += numel if plain else local_numel(gradient)
        if numel <= CHUNK and stored.dtype in _NORMED and type(stored) is Tensor:
            small.append((index, stored))
        else:
            norms[index] = _inspect(stored, index, bad)
    for (index, gradient), norm in _small_norms(small):
        norms[index] = norm if math.isfinite(norm) else _inspect(gradient, index, bad)
    return Scan(norms, bad, elements)


def scan_with_norms(gradients: Sequence[Tensor | None], taken: Sequence[float]) -> Scan:
    """Count in strided gradients of one dtype whose norms were taken; None has none."""
    norms: list[float | None] = [None] * len(gradients)
    bad: dict[int, tuple[int, int]] = {}
    present = [(index, gradient) for index, gradient in enumerate(gradients) if gradient is not None]
    for (index, gradient), norm in zip(present, taken, strict=True):
        norms[index] = norm if math.isfinite(norm) else _inspect(gradient, index, bad)
    return Scan(norms, bad, sum(gradient.numel() for _, gradient in present))


def _small_norms(small: list[_Layer]) -> Iterator[tuple[_Layer, float]]:
    """Take the norms of small gradients; among many, tiny ones of one shape are stacked."""
    single = small
    if len(small) >= _MANY:
        alike: dict[tuple[torch.Size, torch.dtype], list[_Layer]] = {}
        for layer in small:
            alike.setdefault((layer[1].shape, layer[1].dtype), []).append(layer)
        single = []
        for (shape, _), layers in alike.items():
            if len(layers) < _STACKED_FROM or shape.numel() > _STACKED_NUMEL:
                single += layers
            else:
                yield from zip(layers, _stacked_norms(shape, layers), strict=True)
    if single:
        norms = torch._foreach_norm([gradient for _, gradient in single], 2)
        yield from zip(single, map(Tensor.item, norms), strict=True)


def _stacked_norms(shape: torch.Size, layers: list[_Layer]) -> list[float]:
    """Take the norms of many tiny gradients of one shape: a call for each would cost more than a copy."""
    width = _SERIAL_NUMEL // max(1, shape.numel())
    norms: list[float] = []
    for start in range(0, len(layers), width):
        rows = torch.stack([gradient for _, gradient in layers[start : start + width]])
        norms += torch.linalg.vector_norm(rows.view(len(rows), -1), dim=1).tolist()
    return norms


def _inspect(tensor: Tensor, index: int, bad: dict[int, tuple[int, int]]) -> float:
    """Return the norm of one layer, and enter it into `bad` where it has bad elements."""
    marks: Tensor | None = None
    inf_count = nan_count = 0
    norms = []
    longest = min(_RUN, max(1, tensor.numel() // (4 * CHUNK)))
    for flat in flats(tensor):
        taken = _chunk_norms(flat)
        for first, last, norm in _suspicious_runs(taken, longest):
            run = widen(flat[first * CHUNK : last * CHUNK])
            marks = torch.empty(min(longest * CHUNK, tensor.numel())) if marks is None else marks
            inf, nan = _count(run, norm, marks)
            inf_count += inf
            nan_count += nan
            taken[first:last] = [norm if inf or nan else _scaled_norm(run)] + [0.0] * (last - first - 1)
        norms += taken
    if inf_count or nan_count:
        bad[index] = inf_count, nan_count
    return total_norm(norms)


def _suspicious_runs(norms: list[float], longest: int) -> list[tuple[int, int, float]]:
    """Find consecutive chunks whose norms are not finite: (first, one past the last, their sum)."""
    runs: list[tuple[int, int, float]] = []
    for number, norm in enumerate(norms):
        if math.isfinite(norm):
            continue
        if runs and runs[-1][1] == number and number - runs[-1][0] < longest:
            first, _, together = runs[-1]
            runs[-1] = first, number + 1, together + norm
        else:
            runs.append((number, number + 1, norm))
    return runs


def _chunk_norms(flat: Tensor) -> list[float]:
    """Take the norm of each chunk; torch reads one row on one core, so it gets the whole ones as rows."""
    if flat.dtype not in _NORMED:
        return [torch.linalg.vector_norm(widen(chunk)).item() for chunk in torch.split(flat, CHUNK)]
    whole = flat.numel() // CHUNK * CHUNK
    norms: list[float] = torch.linalg.vector_norm(flat[:whole].view(-1, CHUNK), dim=1).tolist()
    if whole < flat.numel():
        norms.append(torch.linalg.vector_norm(flat[whole:]).item())
    return norms


def _count(run: Tensor, norm: float, marks: Tensor) -> tuple[int, int]:
    """Count (Inf, NaN) in a run whose norm is not finite, and stop where nothing can be left.

    Squares are never negative, so their sum is NaN only where an element is. Marks are floats, not bools: torch
    compares into and sums floats four times as fast, and a sum of 2^19 ones is exact in float32.
    """
    if run.is_complex():
        return int(torch.isinf(run).sum()), int(torch.isnan(run).sum())
    marks = marks[: run.numel()]
    nan = int(torch.ne(run, run, out=marks).sum()) if math.isnan(norm) else 0
    inf = 0
    for value in (math.inf, -math.inf):
        if nan + inf < run.numel():
            inf += int(torch.eq(run, value, out=marks).sum())
    return inf, nan


def _scaled_norm(run: Tensor) -> float:
    """Take the norm of finite elements whose squares do not fit their dtype."""
    wide = run.to(torch.complex128 if run.is_complex() else torch.float64)
    largest = wide.abs().max()
    norm: float = (torch.linalg.vector_norm(wide / largest) * largest).item()
    return norm
