"""A mark on each watched parameter: torch calls it when a gradient has arrived there."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from esper_telemetry.scan import PendingScan, Scan

Arrive = Callable[["Tag", Tensor], None]


class Tag:
    """Mark a parameter as watched by one monitor.

    It lies in a post-accumulate hook of the parameter, which is also run when FSDP2 has a gradient. It holds no
    reference to the parameter: a weak one would keep `torch.utils.swap_tensors` from moving it.

    index: its place among the layers; None while it is not listed.
    thread: the thread in which its last backward pass ended; None before the first.
    early: whether its gradient is to be measured as it arrives, because it may be gone when the pass ends.
    reduced: whether what arrives is this rank's own, and becomes that of all ranks before the pass ends.
    fleeting: whether what arrives may lie in a bucket, and is then to be measured at once: it is reduced in place.
    own: what was measured of this rank's own gradient since the last check, where it is reduced; None where nobody
        wants to know.
    """

    __slots__ = ("early", "fleeting", "hooks", "index", "own", "reduced", "thread")

    def __init__(self, hooks: dict[int, Any]) -> None:
        self.hooks = hooks
        self.index: int | None = None
        self.thread: int | None = None
        self.early = True
        self.reduced = False
        self.fleeting = False
        self.own: list[Scan | PendingScan] | None = None

    @property
    def has_company(self) -> bool:
        """Tell whether other hooks than a monitor's wait for the gradient: they may take it away."""
        return len(self.hooks) > 1 and not all(_tag_of(hook) for hook in self.hooks.values())

    def leave_if_unlisted(self) -> None:
        """Remove the mark from a parameter that is no longer the model's."""
        if self.index is None:
            for key in [key for key, hook in self.hooks.items() if _tag_of(hook) is self]:
                del self.hooks[key]


def tag(parameter: Tensor, arrive: Arrive) -> Tag:
    """Return this monitor's tag of a parameter, a new one where there is none; its hook runs before all others.

    A frozen parameter is tagged too: it may be trained later.
    """
    hooks = _hooks_of(parameter)
    for hook in hooks.values():
        if (known := _tag_of(hook, arrive)) is not None:
            return known
    others, new = list(hooks), Tag(hooks)
    hooks[RemovableHandle(hooks).id] = partial(arrive, new)
    for other in others:
        hooks[other] = hooks.pop(other)  # torch reads the plain dict, which move_to_end() leaves as it is
    return new


def untag(parameter: Tensor, arrive: Arrive) -> None:
    """Take this monitor's tag off a parameter, and leave no empty dict behind.

    Where another thread trains it the dict stays: torch may be running its hooks, and replacing them would crash.
    """
    hooks = parameter._post_accumulate_grad_hooks
    if hooks is None:
        return
    for key, known in [(key, _tag_of(hook, arrive)) for key, hook in hooks.items()]:
        if known is not None:
            del hooks[key]
            if not hooks and known.thread in (None, threading.get_ident()):
                parameter._post_accumulate_grad_hooks = None  # type: ignore[assignment]


def retag(parameter: Tensor) -> None:
    """Let torch know the hooks again: `swap_tensors` leaves them on the object, but not on what it now holds."""
    parameter._post_accumulate_grad_hooks = parameter._post_accumulate_grad_hooks


def has_other_monitor(parameter: Tensor, arrive: Arrive) -> bool:
    """Tell whether another monitor watches a parameter."""
    hooks = parameter._post_accumulate_grad_hooks or {}
    return any(_tag_of(hook) and not _tag_of(hook, arrive) for hook in hooks.values())


def _tag_of(hook: object, arrive: Arrive | None = None) -> Tag | None:
    """Return the tag that a hook is for; None if it is not a monitor's, or not this one's."""
    if isinstance(hook, partial) and hook.args and type(hook.args[0]) is Tag and arrive in (None, hook.func):
        return hook.args[0]
    return None


def _hooks_of(parameter: Tensor) -> dict[int, Any]:
    if parameter._post_accumulate_grad_hooks is None:
        parameter._post_accumulate_grad_hooks = OrderedDict()
    return cast(dict[int, Any], parameter._post_accumulate_grad_hooks)
