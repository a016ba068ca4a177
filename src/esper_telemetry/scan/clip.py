"""One norm pass for the check and for torch's clip."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from esper_telemetry.scan.cpu import scan_with_norms
from esper_telemetry.scan.dispatch import scan
from esper_telemetry.scan.result import PendingScan, Scan

_NORMED_BY_TORCH = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


class ClipScan:
    """Scan gradients from the norms that `torch.nn.utils.clip_grad_norm_` would take.

    total_norm: after the call the 0-d norm over all gradients, bit-equal to torch's; None where torch goes about it
    in another way, several dtypes or layouts other than strided, and on devices; `otherwise` scans these.
    """

    total_norm: Tensor | None = None

    def __init__(self, otherwise: Callable[[Sequence[Tensor | None]], Scan | PendingScan] = scan) -> None:
        self._otherwise = otherwise

    def __call__(self, gradients: Sequence[Tensor | None]) -> Scan | PendingScan:
        """Scan, and keep the total norm."""
        present = [gradient for gradient in gradients if gradient is not None]
        if len({gradient.dtype for gradient in present}) != 1 or not all(map(_is_plain, present)):
            return self._otherwise(gradients)
        norms = torch._foreach_norm(present, 2.0)
        self.total_norm = torch.linalg.vector_norm(torch.stack(norms), 2.0)
        return scan_with_norms(gradients, [norm.item() for norm in norms])

    def clip(
        self,
        parameters: Sequence[Tensor],
        max_norm: float,
        norm_type: float,
        error_if_nonfinite: bool,
        foreach: bool | None,
    ) -> Tensor:
        """Clip with the norm that was taken, where it was; torch does the rest."""
        total_norm = self.total_norm
        if total_norm is None or foreach is not None or (error_if_nonfinite and not total_norm.isfinite()):
            return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total_norm)
        return total_norm


def _is_plain(gradient: Tensor) -> bool:
    return (
        type(gradient) is Tensor
        and gradient.is_cpu
        and gradient.layout is torch.strided
        and gradient.dtype in _NORMED_BY_TORCH
    )
