"""What a model's state consists of: parameters, buffers, and what its optimizers keep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from esper_telemetry.scan.layers import parameters_of


class Watched(Protocol):
    """The model as it is now."""

    names: tuple[str, ...]

    def parameters(self) -> Sequence[Tensor]:
        """Return the parameters, in the order of `names`."""

    def buffers(self) -> Sequence[tuple[str, nn.Module, Tensor]]:
        """Return each buffer with its name and its module."""


class Held(NamedTuple):
    """Hold one tensor of the state.

    part: "parameters", "buffers" or "optimizer".
    may_be_meant: whether Inf may be there on purpose, as in the buffer of an attention mask.
    """

    part: str
    name: str
    tensor: Tensor
    may_be_meant: bool


def list_state(watched: Watched, optimizers: Sequence[Optimizer]) -> list[Held]:
    """List every tensor that can hold Inf or NaN, once."""
    parameters, names = watched.parameters(), watched.names
    state = [
        Held("parameters", name, each, not each.requires_grad) for name, each in zip(names, parameters, strict=True)
    ]
    state += [Held("buffers", name, each, not isinstance(owner, _NormBase)) for name, owner, each in watched.buffers()]
    own = dict(zip(map(id, parameters), names, strict=True))
    for optimizer in optimizers:
        state += _state_of(optimizer, own)
    return [each for each in state if _can_be_bad(each.tensor)]


def _state_of(optimizer: Optimizer, own: Mapping[int, str]) -> Iterator[Held]:
    """Yield what an optimizer keeps; parameters that are not the model's are its own copies of them."""
    for index, parameter in enumerate(parameters_of(optimizer)):
        name = own.get(id(parameter))
        if name is None:
            name = f"parameter {index} of {type(optimizer).__name__}"
            yield Held("optimizer", name, parameter.detach(), False)
        for key, tensor in tensors_in(optimizer.state.get(parameter, {})):
            yield Held("optimizer", f"{key} of {name}", tensor, False)


def tensors_in(value: Any, key: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested dicts and sequences, each with the keys on the way to it."""
    if isinstance(value, Tensor):
        yield key, value
        return
    inside: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(value, Mapping):
        inside = iter(value.items())
    elif isinstance(value, list | tuple):
        inside = iter(enumerate(value))
    for name, each in inside:
        yield from tensors_in(each, f"{key}.{name}" if key else str(name))


def _can_be_bad(tensor: Tensor) -> bool:
    """Leave out integers, and tensors that stand for others: quantized ones, and those without memory."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.is_meta:
        return False
    return hasattr(tensor, "to_local") or not is_traceable_wrapper_subclass(tensor)


def without_grad(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the same memory as plain tensors: the scan is quickest with these."""
    with torch.no_grad():
        return [tensor.detach() if tensor.layout is torch.strided else tensor for tensor in tensors]
