"""What ranks train, and faults that one of them makes in its own backward."""

from __future__ import annotations

import math

import torch
from torch import nn


def mlp():
    """Return a model of three blocks; equal on all ranks."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


class Poison(torch.autograd.Function):
    """Pass a parameter on, and write bad elements into its gradient on the way back."""

    @staticmethod
    def forward(ctx, weight, count, value):
        ctx.count, ctx.value = count, value
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        gradient.view(-1)[: ctx.count] = ctx.value
        return gradient, None, None


class FaultyLinear(nn.Linear):
    """Make `bad` elements of `value` in the gradient of its weight."""

    bad = 0
    value = math.nan

    def forward(self, given):
        weight = Poison.apply(self.weight, self.bad, self.value) if self.bad else self.weight
        return nn.functional.linear(given, weight, self.bias)


def faulty_mlp():
    """Return a model whose middle layer can make bad elements, and that layer; equal on all ranks."""
    torch.manual_seed(0)
    faulty = FaultyLinear(16, 16)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), faulty, nn.ReLU(), nn.Linear(16, 4)), faulty


def batch(rank):
    """Return a batch of a rank's own."""
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(rank))
