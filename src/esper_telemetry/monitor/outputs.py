"""Passes that no parameter tells of: FSDP1 puts gradients in place where no hook of a parameter runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle


class Outputs:
    """Call `begin` when a backward pass reaches what a module has put out, until `close()`."""

    def __init__(self, begin: Callable[[], object]) -> None:
        self._begin = begin
        self._hooks: list[RemovableHandle] = []

    @property
    def followed(self) -> bool:
        """Tell whether there is a module to follow."""
        return bool(self._hooks)

    def follow(self, modules: Sequence[nn.Module]) -> None:
        """Follow these modules, and no others."""
        self.close()
        self._hooks += [each.register_forward_hook(_Mark(self._begin)) for each in modules]

    def close(self) -> None:
        """Follow none any more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


class _Mark:
    """Mark the outputs of a module; it keeps nobody alive who wants to hear of them."""

    def __init__(self, begin: Callable[[], object]) -> None:
        self._begin = weakref.WeakMethod(begin)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, arguments: object, output: Any) -> None:
        for each in tree_leaves(output):
            if isinstance(each, Tensor) and each.requires_grad:
                each.register_hook(self._reached)  # type: ignore[no-untyped-call]

    def _reached(self, gradient: Tensor) -> None:
        begin = self._begin()
        if begin is not None:
            begin()
