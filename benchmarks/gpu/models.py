"""The gradients that are checked: shapes of models that people train."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gradients import GRADIENT_SETS, SCALE

_SHAPES = {each.name: each.shapes for each in GRADIENT_SETS}

_XL = 1600
_GPT2_XL_BLOCK = [
    *[(_XL,), (_XL,), (_XL, 3 * _XL), (3 * _XL,), (_XL, _XL), (_XL,)],
    *[(_XL,), (_XL,), (_XL, 4 * _XL), (4 * _XL,), (4 * _XL, _XL), (_XL,)],
]
_GPT2_XL = [(50257, _XL), (1024, _XL), *48 * _GPT2_XL_BLOCK, (_XL,), (_XL,)]

_L, _FEED_FORWARD = 4096, 11008
_LLAMA2_BLOCK = [*4 * [(_L, _L)], *2 * [(_FEED_FORWARD, _L)], (_L, _FEED_FORWARD), (_L,), (_L,)]
_LLAMA2_7B = [(32000, _L), *32 * _LLAMA2_BLOCK, (_L,), (32000, _L)]


@dataclass(frozen=True, slots=True)
class Model:
    """Describe the gradients of one model."""

    name: str
    title: str
    shapes: list[tuple[int, ...]]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Return the elements of all gradients."""
        return sum(map(math.prod, self.shapes))

    @property
    def bytes(self) -> int:
        """Return what one look at every gradient reads."""
        return self.numel * self.dtype.itemsize

    def shrunk(self) -> Model:
        """Return a model with a few tiny tensors, on which everything runs that would run on this one."""
        shapes = [tuple(min(size, 40) for size in shape) for shape in self.shapes[:5]]
        return Model(self.name, self.title, shapes, self.dtype)

    def make(self, device: torch.device, seed: int = 0) -> list[Tensor]:
        """Return healthy gradients."""
        generator = torch.Generator(device).manual_seed(seed)
        return [
            torch.empty(shape, dtype=self.dtype, device=device).normal_(0, SCALE, generator=generator)
            for shape in self.shapes
        ]


def _of(name: str, words: str, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> Model:
    short = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    elements = sum(map(math.prod, shapes))
    return Model(f"{name}-{short}", f"{words}, {short}: {len(shapes):,} tensors, {elements:,} elements", shapes, dtype)


_SIZES = {"gpt2": ("GPT-2 small", _SHAPES["gpt2"]), "xl": ("GPT-2 XL", _GPT2_XL), "7b": ("Llama 2 7B", _LLAMA2_7B)}

MODELS = {
    model.name: model
    for model in [
        *(
            _of(name, *_SIZES[name], dtype)
            for name in ("gpt2", "xl", "7b")
            for dtype in (torch.float32, torch.bfloat16)
        ),
        _of("small", "1,000 small layers", _SHAPES["small"], torch.float32),
        _of("ppo", "PPO policy", _SHAPES["ppo"], torch.float32),
    ]
}
