"""Count on any device with torch's own operations: one transfer when all is well, one more when something is bad."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from esper_telemetry.scan.layouts import local_numel, materialize, widen
from esper_telemetry.scan.result import Scan


def scan_device(gradients: Sequence[Tensor | None]) -> Scan:
    """Count Inf and NaN in every gradient, and take its L2 norm."""
    stored = {index: materialize(gradient) for index, gradient in enumerate(gradients) if gradient is not None}
    norms: list[float | None] = [None] * len(gradients)
    for index, norm in zip(stored, _fetch([_norm(tensor) for tensor in stored.values()]), strict=True):
        norms[index] = norm
    suspects = [index for index in stored if not math.isfinite(norms[index] or 0.0)]
    counts = _fetch([count for index in suspects for count in _counts(stored[index])])
    bad = {}
    for position, index in enumerate(suspects):
        inf, nan = int(counts[2 * position]), int(counts[2 * position + 1])
        if inf or nan:
            bad[index] = inf, nan
        else:
            norms[index] = _scaled_norm(stored[index])
    return Scan(norms, bad, sum(local_numel(gradient) for gradient in gradients if gradient is not None))


def _norm(tensor: Tensor) -> Tensor:
    narrow = tensor.dtype in (torch.float16, torch.bfloat16)
    norm: Tensor = (
        torch.linalg.vector_norm(tensor, dtype=torch.float32) if narrow else torch.linalg.vector_norm(widen(tensor))
    )
    return norm


def _counts(tensor: Tensor) -> tuple[Tensor, Tensor]:
    wide = widen(tensor)
    return torch.isinf(wide).sum(), torch.isnan(wide).sum()


def _scaled_norm(tensor: Tensor) -> float:
    """Take the norm of finite elements whose squares do not fit their dtype."""
    wide = widen(tensor)
    largest = wide.abs().max()
    norm: float = torch.linalg.vector_norm(wide / largest).item()
    return norm * largest.item()


def _fetch(scalars: list[Tensor]) -> list[float]:
    """Bring 0-d tensors to the host with one transfer per device."""
    values: list[float] = [0] * len(scalars)
    for device in {scalar.device for scalar in scalars}:
        places = [place for place, scalar in enumerate(scalars) if scalar.device == device]
        fetched = torch.stack([scalars[place] for place in places]).tolist()
        for place, value in zip(places, fetched, strict=True):
            values[place] = value
    return values
