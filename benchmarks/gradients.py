"""The sets of gradients that are measured, healthy and bad."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SCALE = 1e-3
"""The standard deviation of a healthy element: a GPT-2's gradients then have an L2 norm near 10."""

_CARTPOLE_NETWORK = [(64, 4), (64,), (64, 64), (64,)]
_PPO_POLICY = [*_CARTPOLE_NETWORK, *_CARTPOLE_NETWORK, (2, 64), (2,), (1, 64), (1,)]

_WIDTH = 768
_NORM = [(_WIDTH,), (_WIDTH,)]
_ATTENTION = [(_WIDTH, 3 * _WIDTH), (3 * _WIDTH,), (_WIDTH, _WIDTH), (_WIDTH,)]
_FEED_FORWARD = [(_WIDTH, 4 * _WIDTH), (4 * _WIDTH,), (4 * _WIDTH, _WIDTH), (_WIDTH,)]
_GPT2_SMALL = [(50257, _WIDTH), (1024, _WIDTH), *12 * (_NORM + _ATTENTION + _NORM + _FEED_FORWARD), *_NORM]


@dataclass(frozen=True, slots=True)
class GradientSet:
    """Describe the gradients of one model."""

    name: str
    model: str
    shapes: list[tuple[int, ...]]
    dtype: torch.dtype = torch.float32

    @property
    def title(self) -> str:
        """Return the model with its size in words."""
        tensors = "1 tensor" if len(self.shapes) == 1 else f"{len(self.shapes):,} tensors"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.model}, {dtype}: {tensors}, {sum(map(math.prod, self.shapes)):,} elements"

    @property
    def largest_layer(self) -> int:
        """Return the elements of the largest tensor."""
        return max(map(math.prod, self.shapes))

    def make(self) -> list[Tensor]:
        """Return healthy gradients."""
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(shape, generator=generator).mul_(SCALE).to(self.dtype) for shape in self.shapes]


GRADIENT_SETS = [
    GradientSet("ppo", "PPO policy", _PPO_POLICY),
    GradientSet("small", "Many small layers", [(1000,)] * 1000),
    GradientSet("gpt2", "GPT-2 small", _GPT2_SMALL),
    GradientSet("gpt2-bf16", "GPT-2 small", _GPT2_SMALL, torch.bfloat16),
    GradientSet("large", "One large layer", [(100_000_000,)]),
]


def one_layer_bad(gradients: list[Tensor]) -> list[Tensor]:
    """Return the gradients with one Inf in the middle of the largest; the healthy ones are shared, not copied."""
    largest = max(range(len(gradients)), key=lambda index: gradients[index].numel())
    bad = list(gradients)
    bad[largest] = _with_one(gradients[largest], math.inf)
    return bad


def every_layer_bad(gradients: list[Tensor]) -> list[Tensor]:
    """Return copies with one bad element in the middle of each: Inf and NaN by turns."""
    return [_with_one(gradient, (math.inf, math.nan)[index % 2]) for index, gradient in enumerate(gradients)]


def all_bad(gradients: list[Tensor], *pattern: float) -> list[Tensor]:
    """Return gradients of the same shapes whose elements repeat `pattern`."""
    copies = [torch.empty_like(gradient) for gradient in gradients]
    for copy in copies:
        for place, value in enumerate(pattern):
            copy.view(-1)[place :: len(pattern)] = value
    return copies


def count_by_isinf_and_isnan(gradients: list[Tensor]) -> tuple[int, int]:
    """Return the Inf and NaN elements by the record's formula: one sum over all layers per kind."""
    inf = sum(torch.isinf(gradient).sum() for gradient in gradients)
    nan = sum(torch.isnan(gradient).sum() for gradient in gradients)
    return int(inf), int(nan)


def _with_one(gradient: Tensor, value: float) -> Tensor:
    copy = gradient.clone()
    copy.view(-1)[copy.numel() // 2] = value
    return copy


BAD: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "one layer bad": one_layer_bad,
    "every layer bad, one element": every_layer_bad,
    "every layer bad, all NaN": lambda gradients: all_bad(gradients, math.nan),
    "every layer bad, all Inf": lambda gradients: all_bad(gradients, math.inf),
    "every layer bad, half NaN, half +-Inf": lambda gradients: all_bad(
        gradients, math.nan, math.inf, math.nan, -math.inf
    ),
}
"""Ways to be bad, from the usual to the worst."""
