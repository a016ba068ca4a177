"""Drop optimizer steps: torch's optimizers leave a parameter without a gradient, and its state, alone."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from esper_telemetry.monitor.engine import is_engine
from esper_telemetry.scan.layers import parameters_of

logger = logging.getLogger("esper_telemetry")

_VALUES = (bool, int, float, str, tuple, type(None))
"""What an optimizer counts with besides its tensors."""


def one_or_several(optimizer: Any) -> list[Any]:
    """List what was given, whatever it is."""
    if isinstance(optimizer, Iterable) and not isinstance(optimizer, Tensor):
        return list(optimizer)
    return [] if optimizer is None else [optimizer]


def list_optimizers(optimizer: Optimizer | Iterable[Optimizer] | None) -> list[Optimizer]:
    """List the optimizers, and see through wrappers such as those of Accelerate and Lightning.

    Raise ValueError when one is not an optimizer.
    """
    given = [getattr(each, "optimizer", each) for each in one_or_several(optimizer)]
    for each in given:
        if not isinstance(each, Optimizer):
            raise ValueError(f"optimizer: expected a torch.optim.Optimizer, got {type(each).__name__}")
    return given


def check_can_drop(optimizers: Sequence[Optimizer], policy: str = "skip") -> None:
    """Raise ValueError when there is no optimizer, or one whose steps cannot be dropped."""
    if not optimizers:
        raise ValueError(f"on_critical: {policy!r} expects optimizer=, whose steps it drops, and none was given")
    for each in optimizers:
        name, inner = type(each).__name__, _inner(each)
        if isinstance(each, LBFGS):
            raise ValueError(
                f"on_critical: {policy!r} cannot drop a step of LBFGS, which takes several gradients; use 'halt'"
            )
        if others := _steps_of_other_names(each):
            instead = f"optimizer=...{inner}" if inner else "use 'halt'"
            raise ValueError(f"on_critical: {policy!r} cannot drop {name}.{others[0]}(); expected {instead}")
        if inner:
            logger.warning(
                "esper: on_critical=%r drops the gradients of %s; what it does to parameters outside its %s continues",
                *(policy, name, inner),
            )


def check_can_vote(optimizers: Sequence[Optimizer], roots: Iterable[object]) -> None:
    """Raise ValueError when ranks cannot vote before the update of one of the optimizers."""
    if any(map(is_engine, roots)):
        raise ValueError(
            "on_critical: DeepSpeed steps copies of the parameters, and skips by itself; expected 'continue'"
        )
    for each in optimizers:
        name = type(each).__name__
        if isinstance(each, LBFGS):
            raise ValueError(f"on_critical: ranks cannot vote within a step of {name}; expected 'continue'")
        if any(hasattr(parameter, "_in_backward_optimizers") for parameter in parameters_of(each)):
            raise ValueError(
                f"on_critical: ranks cannot vote while {name} steps during backward(); expected 'continue'"
            )


def _inner(optimizer: Optimizer) -> str | None:
    """Return the attribute where an optimizer keeps another one that it wraps."""
    return next((name for name, value in vars(optimizer).items() if isinstance(value, Optimizer)), None)


def _steps_of_other_names(optimizer: Optimizer) -> list[str]:
    """Return methods such as SAM's `first_step`, around which torch calls no hooks."""
    names = [name for name in dir(type(optimizer)) if name.endswith("_step") and not name.startswith("_")]
    return [name for name in names if not hasattr(Optimizer, name) and callable(getattr(optimizer, name, None))]


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
        self._under_way: weakref.WeakKeyDictionary[Optimizer, list[_Counters]] = weakref.WeakKeyDictionary()
        self._on_drop = on_drop
        self._hooks = [each.register_step_pre_hook(self._begin) for each in own]
        self._hooks += [each.register_step_post_hook(self._end) for each in own]

    def drop(self) -> None:
        """Drop the steps to come, until `allow()`; and those under way, whose closures made the gradients."""
        self._any_barred = True
        self._barred.update(self._optimizers)
        for optimizer in list(self._under_way):
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
        # An optimizer whose step calls that of its base class is under way twice.
        self._under_way.setdefault(optimizer, []).append(_Counters(optimizer))
        if self._any_barred and optimizer in self._barred:
            self._drop(optimizer)

    def _end(self, optimizer: Optimizer, *_: object) -> None:
        under_way = self._under_way.get(optimizer)
        if not under_way:
            return
        counters = under_way.pop()
        if counters.dropped:
            counters.restore(optimizer)
        if not under_way:
            del self._under_way[optimizer]

    def _drop(self, optimizer: Optimizer) -> None:
        if getattr(optimizer, "found_inf", False):
            return  # a GradScaler told a fused optimizer to skip this step by itself
        for counters in self._under_way.get(optimizer, ()):
            counters.dropped = True
        with_gradients = [each for each in parameters_of(optimizer) if each.grad is not None]
        for parameter in with_gradients:
            parameter.grad = None
        if with_gradients:
            self._on_drop()


class _Counters:
    """Remember what an optimizer counts in Python, which goes on without gradients too.

    dropped: whether the step that has begun since was dropped.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.dropped = False
        self._own = _values(vars(optimizer))
        self._groups = [(set(group), _values(group)) for group in optimizer.param_groups]

    def restore(self, optimizer: Optimizer) -> None:
        """Set it back."""
        vars(optimizer).update(self._own)
        for group, (names, values) in zip(optimizer.param_groups, self._groups, strict=False):
            for new in [name for name in group if name not in names]:
                del group[new]
            group.update(values)


def _values(named: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in named.items() if isinstance(value, _VALUES)}
