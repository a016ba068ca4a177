"""Choose the kernel by where a gradient lives."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from esper_telemetry.scan.cpu import scan_cpu
from esper_telemetry.scan.device import scan_device
from esper_telemetry.scan.result import Scan


def scan(gradients: Sequence[Tensor | None]) -> Scan:
    """Count the Inf and NaN elements of every gradient exactly, and take its L2 norm.

    Any dtype and layout that a gradient can have. A finite norm proves that nothing is bad, so all of memory is read
    once; only what is bad is counted element by element. A complex element with an Inf and a NaN part is in both
    counts, as in `torch.isinf` and `torch.isnan`. Of a DTensor the local shard is looked at. None is passed over.
    """
    if all(gradient is None or gradient.is_cpu for gradient in gradients):
        return scan_cpu(gradients)
    return scan_device(gradients)
