"""What ranks train, and faults that one of them makes in its own backward."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor


class Poison(torch.autograd.Function):
    """Pass a parameter on, and write bad elements into its gradient on the way back."""

    @staticmethod
    def forward(ctx, weight, before, count, value):
        ctx.place, ctx.value = slice(before, before + count), value
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        local.view(-1)[ctx.place] = ctx.value
        return gradient, None, None, None


class FaultyLinear(nn.Linear):
    """Make `bad` elements of `value` in the gradient of its weight, after those `before`."""

    before = 0
    bad = 0
    value = math.nan

    def forward(self, given):
        weight = Poison.apply(self.weight, self.before, self.bad, self.value) if self.bad else self.weight
        return nn.functional.linear(given, weight, self.bias)


def faulty_mlp():
    """Return a model whose middle layer can make bad elements, and that layer; equal on all ranks."""
    torch.manual_seed(0)
    faulty = FaultyLinear(16, 16)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), faulty, nn.ReLU(), nn.Linear(16, 4)), faulty


def batch(rank):
    """Return a batch of a rank's own."""
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(rank))


def true_counts(model):
    """Return the NaN and Inf elements of the whole run's gradient; every rank has to ask."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    whole = [each.full_tensor() if isinstance(each, DTensor) else each for each in gradients]
    return sum(int(g.isnan().sum()) for g in whole), sum(int(g.isinf().sum()) for g in whole)


def seen(monitor):
    """Return what tests compare of a snapshot."""
    snapshot = monitor.snapshot
    scope = snapshot.scope
    return {
        "checks": snapshot.checks,
        "nan": snapshot.nan_grad_count,
        "inf": snapshot.inf_grad_count,
        "owned": snapshot.owned_nan_count,
        "owned_inf": snapshot.owned_inf_count,
        "local": snapshot.local_nan_count,
        "local_inf": snapshot.local_inf_count,
        "layer": snapshot.local_origin_layer,
        "scope": scope and (scope.scope, scope.exact, scope.when),
        "unmeasured": snapshot.unmeasured_layers,
        "errors": snapshot.monitor_errors,
        "elements": snapshot.elements,
        "norm": snapshot.grad_norm,
    }
