"""Drop optimizer steps: torch's optimizers leave a parameter without a gradient, and its state, alone."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

from torch.optim import LBFGS, Optimizer


class Steps:
    """Hook optimizers until `remove()`; they are not kept alive.

    LBFGS is left alone: it takes gradients several times in one step, and keeps what it made of the earlier ones.

    on_drop: called once per step that was dropped.
    """

    def __init__(self, optimizers: Sequence[Optimizer], on_drop: Callable[[], None]) -> None:
        own = [each for each in optimizers if not isinstance(each, LBFGS)]
        self._optimizers = weakref.WeakSet(own)
        self._barred: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._any_barred = False
        self._under_way: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._on_drop = on_drop
        self._hooks = [each.register_step_pre_hook(self._begin) for each in own]
        self._hooks += [each.register_step_post_hook(self._end) for each in own]

    def drop(self) -> None:
        """Drop the steps to come, until `allow()`; and those under way, whose closures made the gradients."""
        self._any_barred = True
        self._barred.update(self._optimizers)
        for optimizer in self._under_way:
            self._drop(optimizer)
            self._barred.discard(optimizer)

    def allow(self) -> None:
        """Let the optimizers step again."""
        if self._any_barred:  # a WeakSet takes long to find out that it is empty
            self._any_barred = False
            self._barred.clear()

    def remove(self) -> None:
        """Leave every optimizer as it was before."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _begin(self, optimizer: Optimizer, *_: object) -> None:
        if self._any_barred and optimizer in self._barred:
            self._drop(optimizer)
        self._under_way.add(optimizer)

    def _end(self, optimizer: Optimizer, *_: object) -> None:
        self._under_way.discard(optimizer)

    def _drop(self, optimizer: Optimizer) -> None:
        if getattr(optimizer, "found_inf", False):
            return  # a GradScaler told a fused optimizer to skip this step by itself
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        self._on_drop()
