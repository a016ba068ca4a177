"""Choose the kernel by where a gradient lives."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from operator import attrgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from esper_telemetry.scan.cpu import scan_cpu, scan_single
from esper_telemetry.scan.device import scan_device
from esper_telemetry.scan.result import PendingScan, Scan

if TYPE_CHECKING:
    from esper_telemetry.scan.cuda import CudaScanner

logger = logging.getLogger("esper_telemetry")

_IS_CPU = attrgetter("is_cpu")
_IS_CUDA = attrgetter("is_cuda")
_DTYPE = attrgetter("dtype")


def scan(gradients: Sequence[Tensor | None]) -> Scan:
    """Count the Inf and NaN elements of every gradient exactly, and take its L2 norm.

    Any dtype and layout that a gradient can have. A finite norm proves that nothing is bad, so all of memory is read
    once; only what is bad is counted element by element. A complex element with an Inf and a NaN part is in both
    counts, as in `torch.isinf` and `torch.isnan`. Of a DTensor, the local shard is scanned. None is skipped.
    """
    return scan_cpu(gradients) if _on_cpu(gradients) else scan_device(gradients)


class Scanner:
    """Scan as `scan()` does, but leave a result on CUDA devices until somebody wants it."""

    def __init__(self) -> None:
        self._cuda: CudaScanner | None = None

    def __call__(self, gradients: Sequence[Tensor | None]) -> Scan | PendingScan:
        """Return the scan, or what will be one; raise RuntimeError during CUDA graph capture."""
        if len(gradients) == 1 and (found := scan_single(gradients[0])) is not None:
            return found
        if _on_cpu(gradients):
            return scan_cpu(gradients)
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("gradients cannot be measured during CUDA graph capture")
        if not _suit_kernel(gradients) or not _kernel_works():
            return scan_device(gradients)
        if self._cuda is None:
            from esper_telemetry.scan.cuda import CudaScanner

            self._cuda = CudaScanner()
        return self._cuda.launch(gradients)


def _on_cpu(gradients: Sequence[Tensor | None]) -> bool:
    return all(map(_IS_CPU, [gradient for gradient in gradients if gradient is not None]))


def _suit_kernel(gradients: Sequence[Tensor | None]) -> bool:
    present = [gradient for gradient in gradients if gradient is not None]
    return all(map(_IS_CUDA, present)) and all(dtype.is_floating_point for dtype in set(map(_DTYPE, present)))


@cache
def _kernel_works() -> bool:
    """Find out once whether Triton is installed and can compile and launch here."""
    try:
        from esper_telemetry.scan.cuda import CudaScanner

        CudaScanner().launch([torch.zeros(1, device="cuda")])
    except Exception as error:
        logger.warning("esper: no kernel for CUDA, so each check waits for the device: %s", error)
        return False
    return True
