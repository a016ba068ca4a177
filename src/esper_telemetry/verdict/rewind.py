"""The way back: the last good state of a model and its optimizers, kept in host memory."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from esper_telemetry import arguments
from esper_telemetry.scan.layers import parameters_of
from esper_telemetry.scan.layouts import local_numel
from esper_telemetry.verdict.state import Watched

logger = logging.getLogger("esper_telemetry")

_SCHEDULED = frozenset(
    {"lr", "initial_lr", "min_lr", "max_lr", "swa_lr", "betas", "momentum", "base_momentum", "max_momentum"}
    | {"weight_decay", "params"}
)
"""What schedulers write into a parameter group: the schedule goes on."""


class _Kept(NamedTuple):
    """Hold the copy of a tensor, and where the tensor was."""

    host: Tensor
    device: torch.device


class Rewind:
    """Keep the last good state, and put it back.

    On CUDA copies are pinned, and made in the order of the stream, for which nobody waits.

    every: good checks between two copies; the parameters and what the optimizers keep are also copied at a bad check,
        before the step, so that no good step is lost. Buffers are then those of the last good copy.
    most: how many times it may be put back in a run.

    Raise ValueError when one of these numbers is invalid.
    """

    def __init__(self, model: Watched, optimizers: Callable[[], Sequence[Optimizer]], every: int, most: int) -> None:
        for name, parameter in zip(model.names, model.parameters(), strict=True):
            if hasattr(parameter, "to_local"):
                raise ValueError(f"on_critical: 'rewind' expects whole parameters on each rank, got a shard of {name}")
        self._model = model
        self._optimizers = optimizers
        self._every = arguments.whole("rewind_every", every, at_least=1)
        self._parameters: dict[str, _Kept] = {}
        self._buffers: dict[str, _Kept] = {}
        self._states: dict[int, Any] = {}
        self._has_copy = False
        self._since_copy = 0
        self._has_stepped = False
        self.left = arguments.whole("max_rewinds", most, at_least=1)

    def set_up(self) -> None:
        """Make the first copy, and log what it costs."""
        started = time.perf_counter()
        self.keep()
        seconds = time.perf_counter() - started
        numbers = sum(local_numel(each) for each in self._model.parameters())
        logger.warning(
            "esper: on_critical='rewind' keeps a copy in host memory: %.1f MiB now, plus the optimizer's state as it "
            "grows (for Adam, twice the %s parameters); the first copy took %.3f s, and one is made every %d checks",
            *(self._size() / 2**20, f"{numbers:,}", seconds, self._every),
        )

    def stepped(self) -> None:
        """Take note that an optimizer steps."""
        self._has_stepped = True

    def is_due(self) -> bool:
        """Count a good check; tell whether a copy is to be made at this one."""
        self._since_copy += 1
        return self._since_copy >= self._every

    def keep(self) -> None:
        """Copy the whole state, which is good."""
        self._since_copy = 0
        self._buffers = {name: _keep(each, self._buffers.get(name)) for name, _, each in self._model.buffers()}
        self._keep_trained()

    def keep_before_step(self) -> None:
        """Copy what the optimizer is about to change, where it has changed it since the last copy."""
        if self._has_stepped:
            self._keep_trained()

    def put_back(self) -> bool:
        """Restore the state; tell whether that was possible."""
        if not self._has_copy or not self.left:
            return False
        self.left -= 1
        with torch.no_grad():
            for name, parameter in zip(self._model.names, self._model.parameters(), strict=True):
                if name in self._parameters:
                    _put_back(self._parameters[name], parameter.detach())
            for name, _, buffer in self._model.buffers():
                if name in self._buffers:
                    _put_back(self._buffers[name], buffer)
            for optimizer in self._optimizers():
                _put_back_optimizer(optimizer, self._states.get(id(optimizer)))
        self._has_stepped = False
        return True

    def _keep_trained(self) -> None:
        named = zip(self._model.names, self._model.parameters(), strict=True)
        self._parameters = {name: _keep(each.detach(), self._parameters.get(name)) for name, each in named}
        before = self._states
        self._states = {id(each): _keep_optimizer(each, before.get(id(each))) for each in self._optimizers()}
        self._has_copy, self._has_stepped = True, False

    def _size(self) -> int:
        kept = [*self._parameters.values(), *self._buffers.values()]
        return sum(each.host.nbytes for each in kept) + sum(map(_size_of, self._states.values()))


def _keep(value: Any, before: Any) -> Any:
    """Copy a value and all within it; the memory of an earlier copy is used again."""
    if isinstance(value, Tensor):
        host = before.host if isinstance(before, _Kept) else None
        if host is None or (host.shape, host.dtype) != (value.shape, value.dtype):
            host = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=value.is_cuda)
        return _Kept(host.copy_(value.detach(), non_blocking=True), value.device)
    if isinstance(value, Mapping):
        known = before if isinstance(before, Mapping) else {}
        return {key: _keep(each, known.get(key)) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_keep(each, None) for each in value])
    return copy.deepcopy(value)


def _put_back(kept: Any, now: Any) -> Any:
    """Return what was kept, in the memory that it has now where it fits."""
    if isinstance(kept, _Kept):
        if isinstance(now, Tensor) and (now.shape, now.dtype) == (kept.host.shape, kept.host.dtype):
            return now.copy_(kept.host, non_blocking=True)
        return kept.host.to(kept.device, copy=True)
    if isinstance(kept, Mapping):
        known = now if isinstance(now, Mapping) else {}
        return {key: _put_back(each, known.get(key)) for key, each in kept.items()}
    if isinstance(kept, list | tuple):
        return type(kept)([_put_back(each, None) for each in kept])
    return copy.deepcopy(kept)


def _keep_optimizer(optimizer: Optimizer, before: Any) -> dict[str, Any]:
    known = before or {"states": [], "copies": []}
    states, copies = [], []
    for index, parameter in enumerate(parameters_of(optimizer)):
        old = [part[index] if index < len(part) else None for part in (known["states"], known["copies"])]
        states.append(_keep(optimizer.state[parameter], old[0]) if parameter in optimizer.state else None)
        copies.append(_keep(parameter, old[1]) if before is None or old[1] is not None else None)
    groups = [
        {name: copy.deepcopy(value) for name, value in group.items() if name not in _SCHEDULED}
        for group in optimizer.param_groups
    ]
    counters = {name: value for name, value in vars(optimizer).items() if _counts(name, value)}
    return {"states": states, "copies": copies, "groups": groups, "counters": counters}


def _put_back_optimizer(optimizer: Optimizer, kept: Any) -> None:
    if kept is None:  # it was not known when the copy was made, and had no state
        optimizer.state.clear()
        return
    for parameter, state, own in zip(parameters_of(optimizer), kept["states"], kept["copies"], strict=False):
        if own is not None:
            _put_back(own, parameter.detach())
        if state is None:
            optimizer.state.pop(parameter, None)
        else:
            optimizer.state[parameter] = _put_back(state, optimizer.state.get(parameter))
    for group, values in zip(optimizer.param_groups, kept["groups"], strict=False):
        group.update(copy.deepcopy(values))
    vars(optimizer).update(kept["counters"])


def _counts(name: str, value: Any) -> bool:
    return not name.startswith("_") and isinstance(value, int | float)


def _size_of(value: Any) -> int:
    if isinstance(value, _Kept):
        return value.host.nbytes
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return sum(map(_size_of, inside))
