"""Everything that looks at gradients: ours, and what people use today."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.gradients import BAD, count_by_isinf_and_isnan
from esper_telemetry import GradientMonitor
from esper_telemetry.scan import describe, scan

READ = "one read pass: sum() per tensor"
CHECK = "check, healthy"
CHECK_BAD = {f"check, {way}": make for way, make in BAD.items()}
EVERY_LAYER_BAD = [name for name in CHECK_BAD if "every layer" in name]
LOOK = "looking whether the model has changed"
UPDATE = "monitor.update(), healthy"
UPDATE_BAD = "monitor.update(), every layer bad, one element"
CLIP = "monitor.clip_grad_norm_(): check and clip"
STATISTICS = "full ten statistics"
FOREACH_NORM = "torch._foreach_norm"
GRAD_SCALER = "GradScaler's foreach check"
TORCH_CLIP = "torch.nn.utils.clip_grad_norm_"
RECORD = "the record's formula: isinf and isnan"
ORIGINAL = "the original's ten statistics"

OURS = frozenset({CHECK, *CHECK_BAD, LOOK, UPDATE, UPDATE_BAD, CLIP, STATISTICS})

Run = Callable[[], object]


def contenders(gradients: list[Tensor]) -> dict[str, Run]:
    """Return name -> what is timed, over the same healthy gradients or over bad ones of the same shapes.

    A check that does not find exactly what `isinf` and `isnan` find is an AssertionError here, before it is timed.
    """
    bad = {name: make(gradients) for name, make in CHECK_BAD.items()}
    for each in (gradients, *bad.values()):
        _assert_exact(each)
    model = _model(gradients)
    every_layer_bad = _model(bad[EVERY_LAYER_BAD[0]])
    # A norm above the limit would be scaled only once; the limit just halves it, so that nothing ever underflows.
    # torch multiplies every gradient at each call, whatever the factor is.
    max_norm = torch.nn.utils.get_total_norm(gradients).item() / 2
    return {
        READ: partial(_read, gradients),
        CHECK: partial(scan, gradients),
        **{name: partial(scan, each) for name, each in bad.items()},
        LOOK: partial(_look, GradientMonitor(model), model),
        UPDATE: partial(_update, GradientMonitor(model), model),
        UPDATE_BAD: partial(_update, GradientMonitor(every_layer_bad), every_layer_bad),
        CLIP: partial(GradientMonitor(model).clip_grad_norm_, max_norm),
        STATISTICS: partial(_full_statistics, gradients),
        FOREACH_NORM: partial(torch._foreach_norm, gradients, 2),
        GRAD_SCALER: partial(_grad_scaler_check, gradients),
        TORCH_CLIP: partial(torch.nn.utils.clip_grad_norm_, list(model.parameters()), max_norm),
        RECORD: partial(count_by_isinf_and_isnan, gradients),
        ORIGINAL: partial(_original_collector, gradients),
    }


def _assert_exact(gradients: list[Tensor]) -> None:
    found = scan(gradients)
    assert (found.inf_count, found.nan_count) == count_by_isinf_and_isnan(gradients)


def _model(gradients: list[Tensor]) -> nn.Module:
    """Return a model with these gradients, a module for each; parameters are zeros, so that they are not damaged."""
    model = nn.ModuleList(nn.ParameterList([torch.zeros_like(gradient)]) for gradient in gradients)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient
    return model


def _read(gradients: list[Tensor]) -> None:
    for gradient in gradients:
        gradient.sum()


def _update(monitor: GradientMonitor, _model: nn.Module) -> None:
    """Check through the public method; a monitor does not keep its model alive, so it comes along."""
    monitor.update()


def _look(monitor: GradientMonitor, _model: nn.Module) -> None:
    """Find the parameters that the model has now, as each check does."""
    monitor._gathering.watched.parameters()


def _full_statistics(gradients: list[Tensor]) -> None:
    for gradient in gradients:
        describe("layer", gradient)


def _grad_scaler_check(gradients: list[Tensor]) -> float:
    """Look as `GradScaler.unscale_` does: it multiplies by 1 / scale, here 1, and notes whether anything was bad."""
    found = torch.zeros(1)
    torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, torch.ones(1))
    return found.item()


def _original_collector(gradients: list[Tensor]) -> list[list[float]]:
    """Collect what the original did, as it did: ten values per layer, stacked, and one transfer at the end."""
    return torch.stack([_ten_statistics(gradient.view(-1)) for gradient in gradients]).tolist()


def _ten_statistics(flat: Tensor) -> Tensor:
    size = flat.abs()
    return torch.stack(
        [
            flat.norm(),
            flat.mean(),
            flat.std() if flat.numel() > 1 else flat.new_zeros(()),
            flat.min(),
            flat.max(),
            (flat == 0).float().mean(),
            (size < 1e-6).float().mean(),
            (size > 10.0).float().mean(),
            torch.isnan(flat).sum(),
            torch.isinf(flat).sum(),
        ]
    )
