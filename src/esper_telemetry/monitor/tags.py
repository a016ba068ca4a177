"""A mark on each watched parameter: torch calls it when a gradient has arrived there."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor
from torch.utils.hooks import RemovableHandle

Arrive = Callable[["Tag", Tensor], None]


class Tag:
    """Mark a parameter as watched by one monitor.

    torch runs it as a post-accumulate hook, which is also when FSDP2 has a gradient. The tag lies on the parameter and
    holds no reference to it: a weak one would keep `torch.utils.swap_tensors` from moving it.

    index: its place among the layers; None while it is not listed.
    thread: the thread in which its last backward pass ended; None before the first.
    early: whether its gradient is to be measured as it arrives, because it may be gone when the pass ends.
    """

    __slots__ = ("_arrive", "early", "hooks", "index", "thread")

    def __init__(self, arrive: Arrive, hooks: dict[int, Any]) -> None:
        self._arrive = arrive
        self.hooks = hooks
        self.index: int | None = None
        self.thread: int | None = None
        self.early = True

    def __call__(self, parameter: Tensor) -> None:
        """Tell the monitor that a gradient has arrived."""
        self._arrive(self, parameter)

    @property
    def has_company(self) -> bool:
        """Tell whether hooks that are no monitor's wait for the gradient: they may take it away."""
        return len(self.hooks) > 1 and not all(type(hook) is Tag for hook in self.hooks.values())

    def leave_if_unlisted(self) -> None:
        """Come off a parameter that is no longer the model's."""
        if self.index is None:
            for key in [key for key, hook in self.hooks.items() if hook is self]:
                del self.hooks[key]

    def is_of(self, arrive: Arrive) -> bool:
        """Tell whose tag this is."""
        return self._arrive == arrive


def tag(parameter: Tensor, arrive: Arrive) -> Tag:
    """Return this monitor's tag of a parameter, a new one where there is none; it runs before all other hooks.

    A frozen parameter is tagged too: it may be trained later.
    """
    hooks = _hooks_of(parameter)
    for each in hooks.values():
        if type(each) is Tag and each.is_of(arrive):
            return each
    others = list(hooks)
    new = hooks[RemovableHandle(hooks).id] = Tag(arrive, hooks)
    for other in others:
        hooks[other] = hooks.pop(other)  # torch reads the plain dict, which move_to_end() leaves as it is
    return new


def untag(parameter: Tensor, arrive: Arrive) -> None:
    """Take this monitor's tag off a parameter, and leave no empty dict behind."""
    hooks = parameter._post_accumulate_grad_hooks
    if hooks is None:
        return
    for key, each in tuple(hooks.items()):
        if type(each) is Tag and each.is_of(arrive):
            del hooks[key]
    if not hooks:
        parameter._post_accumulate_grad_hooks = None  # type: ignore[assignment]


def retag(parameter: Tensor) -> None:
    """Let torch know the hooks again: `swap_tensors` leaves them on the object, but not on what it now holds."""
    parameter._post_accumulate_grad_hooks = parameter._post_accumulate_grad_hooks


def has_other_monitor(parameter: Tensor, arrive: Arrive) -> bool:
    """Tell whether another monitor watches a parameter."""
    hooks = parameter._post_accumulate_grad_hooks or {}
    return any(type(each) is Tag and not each.is_of(arrive) for each in hooks.values())


def _hooks_of(parameter: Tensor) -> dict[int, Any]:
    if parameter._post_accumulate_grad_hooks is None:
        parameter._post_accumulate_grad_hooks = OrderedDict()
    return cast(dict[int, Any], parameter._post_accumulate_grad_hooks)
