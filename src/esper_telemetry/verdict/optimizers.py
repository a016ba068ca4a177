"""Which optimizers train a model: those that were given, and those that were seen to step it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

from torch import Tensor
from torch.optim import Optimizer

from esper_telemetry.scan.layers import parameter_ids


class Optimizers:
    """Know the optimizers of a model; none is kept alive.

    given: belong to it in any case, also where they step copies of its parameters.
    parameters: returns what the model has now.
    """

    def __init__(self, given: Sequence[Optimizer], parameters: Callable[[], Sequence[Tensor]]) -> None:
        self._own = {id(each): weakref.ref(each) for each in given}
        self._strangers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._parameters = parameters

    def __call__(self) -> list[Optimizer]:
        """Return them."""
        return [optimizer for reference in self._own.values() if (optimizer := reference()) is not None]

    def steps(self, optimizer: Optimizer) -> bool:
        """Take note that an optimizer steps; tell whether it is one of the model's."""
        known = self._own.get(id(optimizer))
        if known is not None and known() is optimizer:
            return True
        if optimizer in self._strangers:
            return False
        if not parameter_ids(optimizer).isdisjoint(map(id, self._parameters())):
            self._own[id(optimizer)] = weakref.ref(optimizer)
            return True
        self._strangers.add(optimizer)
        return False
