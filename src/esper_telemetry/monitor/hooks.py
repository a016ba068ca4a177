"""Notice gradients as they arrive: in which order, and when the last one of a backward pass is there."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch.autograd.graph import Node
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

_Hooks = dict[int, Callable[[torch.Tensor], None]]


class BackwardHooks:
    """Hook parameters until `remove()`; the parameters are not kept alive.

    The hooks run after a gradient is accumulated, which is also when FSDP2 has it. `on_end` runs once per backward
    pass, in the thread that called `backward()`, when every gradient of that pass is there and nothing has clipped
    it; what it raises reaches the caller of `backward()`. A pass within a pass, as reentrant checkpointing makes
    them, ends with the outermost. `on_early` is given the index and the parameter when a gradient arrives that other
    hooks wait for, and runs before them: an optimizer that steps during backward frees the gradient there.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        on_end: Callable[[], None] | None = None,
        on_early: Callable[[int, torch.Tensor], None] | None = None,
    ) -> None:
        self._on_end = on_end
        self._on_early = on_early
        self._arrived: dict[int, None] = {}
        self._awaited: set[int] = set()
        self._undo = [
            _register(parameter, partial(self._arrive, index, _hooks_of(parameter)))
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

    def _arrive(self, index: int, hooks: _Hooks, parameter: torch.Tensor) -> None:
        self._arrived[index] = None
        if len(hooks) > 1 and self._on_early is not None and not all(map(_is_ours, hooks.values())):
            self._on_early(index, parameter)
        # The id tells one backward pass from the next even when a pass died half-way and never ran its callback.
        # torch's own register_multi_grad_hook(mode="any") keeps an entry per pass for ever.
        if self._on_end is not None and torch._C._current_graph_task_id() not in self._awaited:
            self._await_end()

    def _await_end(self) -> None:
        self._awaited.add(torch._C._current_graph_task_id())
        engine = cast(Any, torch.autograd.Variable)._execution_engine
        engine.queue_callback(self._end)

    def _end(self) -> None:
        """Find out which pass has ended: one that a node of another pass runs goes on with the nodes after that."""
        node = torch._C._current_autograd_node()
        if node is not None and (following := [each for each, _ in node.next_functions if each is not None]):
            self._await_end_after(following[0])
            return
        self._awaited.clear()
        if self._on_end is not None:
            self._on_end()

    def _await_end_after(self, node: Node) -> None:
        def go_on(_: object) -> None:
            handle.remove()
            if torch._C._current_graph_task_id() not in self._awaited:
                self._await_end()

        handle = node.register_prehook(go_on)


def _hooks_of(parameter: Parameter) -> _Hooks:
    """Return the hooks of a parameter, those to come included."""
    if parameter._post_accumulate_grad_hooks is None:
        parameter._post_accumulate_grad_hooks = OrderedDict()
    return cast(_Hooks, parameter._post_accumulate_grad_hooks)


def _is_ours(hook: object) -> bool:
    return isinstance(hook, partial) and getattr(hook.func, "__func__", None) is BackwardHooks._arrive


def _register(parameter: Parameter, hook: Callable[[torch.Tensor], None]) -> Callable[[], None]:
    """Register a hook before all others."""
    handle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    hooks = _hooks_of(parameter)
    for other in [each for each in hooks if each != handle.id]:
        hooks[other] = hooks.pop(other)  # torch reads the plain dict, which move_to_end() leaves as it is
    return partial(_unregister, weakref.ref(parameter), handle)


def _unregister(reference: weakref.ref[Parameter], handle: RemovableHandle) -> None:
    """Remove a hook, and the empty dict that torch would leave behind."""
    handle.remove()
    parameter = reference()
    if parameter is not None and not parameter._post_accumulate_grad_hooks:
        parameter._post_accumulate_grad_hooks = None  # type: ignore[assignment]
