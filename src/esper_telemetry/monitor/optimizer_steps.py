"""Notice optimizers that step: one that steps again without a check between shows what the backward hooks missed."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from esper_telemetry.monitor.watched import Watched
from esper_telemetry.scan.layers import parameter_ids

OnStep = Callable[[Optimizer], None]


def follow_steps(on_step: OnStep) -> Callable[[], None]:
    """Call `on_step` before each step of every optimizer in this process; return a function that ends that.

    Steps within a backward pass are left out. A bound method's object is not kept alive.
    """
    reference = weakref.WeakMethod(on_step)
    _followers.append(reference)
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(_tell))

    def stop() -> None:
        if reference in _followers:
            _followers.remove(reference)

    return stop


class UncheckedSteps:
    """Find the optimizer that is about to step with gradients of the model, and has had no check since its last step.

    Whatever keeps gradients from being seen as they arrive is noticed here, if late: after the clip.
    """

    def __init__(self) -> None:
        self._checks_at: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()

    def is_so(self, optimizer: Optimizer, checks: int, watched: Watched, by_itself: bool = True) -> bool:
        """Tell whether this optimizer is, when so many checks were made; one that is new is if nothing ever arrived.

        by_itself: whether the monitor makes checks automatically; if not, a new optimizer is unchecked only if there
            was no check at all.
        """
        before = self._checks_at.get(optimizer)
        self._checks_at[optimizer] = checks
        if before is not None and before != checks:
            return False
        own = parameter_ids(optimizer)
        layers = zip(watched.parameters(), watched.tags, strict=True)
        with_gradients = [tag for each, tag in layers if id(each) in own and each.grad is not None]
        unseen = [tag for tag in with_gradients if (tag.thread is None if by_itself else checks == 0)]
        missed = bool(unseen if before is None else with_gradients)
        for tag in with_gradients:
            tag.thread = tag.thread or threading.get_ident()  # the thread that steps them trains them
        self._checks_at[optimizer] += missed and by_itself  # it is checked now
        return missed


_followers: list[weakref.WeakMethod[OnStep]] = []
_handles: list[RemovableHandle] = []


def _tell(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch._C._current_graph_task_id() != -1:
        return
    for reference in tuple(_followers):
        on_step = reference()
        if on_step is None:
            _followers.remove(reference)
        else:
            on_step(optimizer)
