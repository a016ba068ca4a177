"""Notice gradients as they arrive: in which order, and when the last one of a backward pass is there."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle


class BackwardHooks:
    """Hook parameters until `remove()`; the parameters are not kept alive.

    The hooks run after a gradient is accumulated, which is also when FSDP2 has it. `on_end` runs once per backward
    pass, in the thread that called `backward()`, when every gradient of that pass is there and nothing has clipped
    it; what it raises reaches the caller of `backward()`.
    """

    def __init__(self, parameters: Sequence[Parameter], on_end: Callable[[], None] | None = None) -> None:
        self._on_end = on_end
        self._arrived: dict[int, None] = {}
        self._graph_task = -1
        self._undo = [
            _register(parameter, partial(self._arrive, index))
            for index, parameter in enumerate(parameters)
            if parameter.requires_grad
        ]

    def take_order(self) -> list[int]:
        """Return the indices of the parameters in the order in which gradients reached them since the last call."""
        order = list(self._arrived)
        self._arrived.clear()
        return order

    def remove(self) -> None:
        """Leave every parameter as it was before."""
        for undo in self._undo:
            undo()
        self._undo.clear()

    def _arrive(self, index: int, _: torch.Tensor) -> None:
        self._arrived[index] = None
        if self._on_end is None:
            return
        # The id tells one backward pass from the next even when a pass died half-way and never ran its callback.
        # torch's own register_multi_grad_hook(mode="any") keeps an entry per pass for ever.
        graph_task = torch._C._current_graph_task_id()
        if graph_task != self._graph_task:
            self._graph_task = graph_task
            engine = cast(Any, torch.autograd.Variable)._execution_engine
            engine.queue_callback(self._on_end)


def by_arrival(layers: Iterable[int], order: Sequence[int]) -> list[int]:
    """Sort layers, first the one that gradients reached first; unhooked ones last, the last registered first."""
    place = {index: position for position, index in enumerate(order)}
    return sorted(layers, key=lambda index: (place.get(index, math.inf), -index))


def _register(parameter: Parameter, hook: Callable[[torch.Tensor], None]) -> Callable[[], None]:
    handle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    return partial(_unregister, weakref.ref(parameter), handle)


def _unregister(reference: weakref.ref[Parameter], handle: RemovableHandle) -> None:
    """Remove a hook, and the empty dict that torch would leave behind."""
    handle.remove()
    parameter = reference()
    if parameter is not None and not parameter._post_accumulate_grad_hooks:
        parameter._post_accumulate_grad_hooks = None  # type: ignore[assignment]
