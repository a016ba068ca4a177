"""Which parameters a model has, and what they are called."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

Model = nn.Module | Mapping[str, nn.Module | Tensor]

_WRAPPED = frozenset({"_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""What torch.compile, Fabric, FSDP and activation checkpointing call the module that they wrap."""

_PARAMETRIZED = re.compile(r"parametrizations\.([^.]+)\.original\d*$")


class Layer(NamedTuple):
    """Name one parameter.

    name: without the wrappers that torch and frameworks put around a module.
    aliases: every other name by which it can be known: with its wrappers, in the modules that it is tied to, without
        its parametrization.
    """

    name: str
    parameter: Tensor
    aliases: tuple[str, ...]


def named_layers(model: Model) -> Iterator[tuple[str, Tensor]]:
    """Yield (layer name, parameter) once per parameter; a mapping's names become prefixes."""
    for layer in list_layers(model):
        yield layer.name, layer.parameter


def list_layers(model: Model) -> list[Layer]:
    """List every parameter once, in the model's order."""
    parameters: dict[int, Tensor] = {}
    names: dict[int, dict[str, None]] = {}
    taken: dict[str, int] = {}
    for prefix, root in named_roots(model).items():
        for shown, raw, parameter in _walk(root, prefix):
            key = id(parameter)
            parameters.setdefault(key, parameter)
            ours = names.setdefault(key, {})
            if taken.setdefault(shown, key) == key:
                ours.setdefault(shown)
            ours.setdefault(raw)
            if (plain := _PARAMETRIZED.sub(r"\1", shown)) not in taken:
                ours.setdefault(plain)
    return [Layer(first, parameters[key], tuple(rest)) for key, (first, *rest) in names.items()]


def layers_by_name(model: Model) -> dict[str, Layer]:
    """Return each layer by every name that it has."""
    layers = list_layers(model)
    return {alias: layer for layer in layers for alias in layer.aliases} | {layer.name: layer for layer in layers}


def named_modules(model: Model, enter: Callable[[nn.Module], bool] = lambda _: True) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) once per module, named without wrappers, from the outside in; a wrapper has the name within.

    enter: tells whether to go on to the modules within one.
    """
    seen: set[int] = set()
    for prefix, root in named_roots(model).items():
        if isinstance(root, nn.Module):
            yield from _modules_in(root, prefix, enter, seen)


def list_buffers(model: Model) -> list[tuple[str, nn.Module, Tensor]]:
    """List every buffer once, with its module."""
    found: dict[int, tuple[str, nn.Module, Tensor]] = {}
    for prefix, module in named_modules(model):
        for name, buffer in module._buffers.items():
            if buffer is not None:
                found.setdefault(id(buffer), (f"{prefix}.{name}" if prefix else name, module, buffer))
    return list(found.values())


def named_roots(model: Model) -> dict[str, nn.Module | Tensor]:
    """Return the model as prefix -> module or tensor; raise ValueError when it is neither a module nor such a dict."""
    roots: dict[str, nn.Module | Tensor] = {"": model} if isinstance(model, nn.Module) else {}
    if isinstance(model, Mapping):
        roots = dict(model)
    for name, root in roots.items():
        if isinstance(root, Tensor) and not root.is_leaf:
            raise ValueError(f"model: expected a leaf tensor for {name!r}, got the result of an operation")
        if not isinstance(root, nn.Module | Tensor):
            raise ValueError(f"model: expected a torch.nn.Module or a tensor for {name!r}, got {type(root).__name__}")
        if not isinstance(name, str):
            raise ValueError(f"model: expected names that are strings, got {type(name).__name__}")
    if not roots:
        raise ValueError(f"model: expected a torch.nn.Module or a dict of them, got {type(model).__name__}")
    return roots


def _walk(root: nn.Module | Tensor, prefix: str) -> Iterator[tuple[str, str, Tensor]]:
    """Yield (name without wrappers, full name, parameter), a shared one once per name."""
    if isinstance(root, Tensor):
        yield prefix, prefix, root
    else:
        start = f"{prefix}." if prefix else ""
        yield from _walk_module(root, start, start, ())


def _walk_module(
    module: nn.Module, shown: str, raw: str, above: tuple[nn.Module, ...]
) -> Iterator[tuple[str, str, Tensor]]:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield shown + name, raw + name, parameter
    above = (*above, module)
    for name, child in module._modules.items():
        if child is not None and not any(child is each for each in above):
            inner = shown if _is_wrapper(module, name) else f"{shown}{name}."
            yield from _walk_module(child, inner, f"{raw}{name}.", above)


def _modules_in(
    module: nn.Module, name: str, enter: Callable[[nn.Module], bool], seen: set[int]
) -> Iterator[tuple[str, nn.Module]]:
    if id(module) in seen:
        return
    seen.add(id(module))
    yield name, module
    if not enter(module):
        return
    for child, inner in module._modules.items():
        if inner is not None:
            within = name if _is_wrapper(module, child) else f"{name}.{child}" if name else child
            yield from _modules_in(inner, within, enter, seen)


def _is_wrapper(module: nn.Module, child: str) -> bool:
    if child in _WRAPPED:
        return True
    return child == "module" and isinstance(module, DataParallel | DistributedDataParallel)


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters that an optimizer steps, in the order of its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def parameter_ids(optimizer: Optimizer) -> set[int]:
    """Return which parameters an optimizer steps, by their ids."""
    return set(map(id, parameters_of(optimizer)))
