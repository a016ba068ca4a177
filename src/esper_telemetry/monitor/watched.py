"""What is watched: the parameters that a model has now, however it changes during training."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from esper_telemetry.monitor.tags import Arrive, Tag, has_other_monitor, tag, untag
from esper_telemetry.scan.layers import Layer, Model, list_buffers, list_layers, named_modules, named_roots

logger = logging.getLogger("esper_telemetry")


class Watched:
    """Tag the parameters of a model until `close()`, and find those that come later.

    Modules are not kept alive, and no reference to their parameters is held. What its owner does to a module is found
    out in three ways: frozen parameters are tagged from the start; torch tells what is registered; and each look
    compares what is there with what was listed.

    names, tags: of the layers, as listed.
    wrapped: whether a DistributedDataParallel was put around something since this was last set to False.

    Raise ValueError when it is not a model, or has parameters without a shape yet.
    """

    def __init__(self, model: Model, arrive: Arrive) -> None:
        layers = list_layers(model)
        _check(layers)
        _warn(layers, arrive)
        self._arrive = arrive
        self._closed = False
        self._roots: dict[str, Callable[[], nn.Module | _Plain | None]] = {
            name: weakref.ref(root) if isinstance(root, nn.Module) else _Plain(root)
            for name, root in named_roots(model).items()
        }
        self.names: tuple[str, ...] = ()
        self.tags: list[Tag] = []
        self.wrapped = False
        self._relist()
        _follow_registrations(self)

    def refresh(self) -> None:
        """List the parameters again if torch has reported a change."""
        if self._changed:
            self._relist()

    def parameters(self) -> Sequence[Tensor]:
        """Return the parameters that the model has now, in the order of `names`."""
        parameters = None if self._changed else self._look()
        if parameters is None:
            parameters = self._relist()
        return parameters

    def buffers(self) -> list[tuple[str, nn.Module, Tensor]]:
        """Return the buffers that the model has now, each with its name and its module."""
        alive = self._modules_alive()
        return list_buffers(alive) if alive else []

    def modules(self, enter: Callable[[nn.Module], bool]) -> list[tuple[str, nn.Module]]:
        """Return the modules that the model has now, with their names; `enter` tells whether to look within one."""
        alive = self._modules_alive()
        return list(named_modules(alive, enter)) if alive else []

    def _modules_alive(self) -> dict[str, nn.Module | Tensor]:
        found = {name: ref() for name, ref in self._roots.items()}
        return {name: root for name, root in found.items() if isinstance(root, nn.Module)}

    def close(self) -> None:
        """Leave every parameter as it was before, and forget it."""
        _all.discard(self)
        for parameter in self._relist():
            untag(parameter, self._arrive)
        self._closed = True
        self._roots = {name: root for name, root in self._roots.items() if not isinstance(root, _Plain)}
        self._relist()

    def registered(self, module: nn.Module, new: nn.Module | Tensor | None) -> None:
        """Take note that a module has got another part, which may be trained before anybody looks."""
        self.wrapped |= isinstance(module, DistributedDataParallel)
        known = self._known.get(id(module))
        if known is None or known() is not module:
            return
        self._changed = True
        if isinstance(new, nn.Module):
            self._known.update((id(each), weakref.ref(each)) for each in new.modules())
        for parameter in new.parameters() if isinstance(new, nn.Module) else [new]:
            if parameter is not None and not is_lazy(parameter):
                tag(parameter, self._arrive)

    def _look(self) -> list[Tensor] | None:
        """Return the parameters, or None where the model is not what was listed."""
        try:
            modules: list[Any] = [ref() for ref in self._owners]
            if self._children != [id(child) for module in modules for child in module._modules.values()]:
                return None
            found = [parameter for module in modules for parameter in module._parameters.values()]
            hooks = [None if each is None else each._post_accumulate_grad_hooks for each in found]
        except (AttributeError, ValueError):  # a module is gone, or a parameter has no shape yet
            return None
        same = len(hooks) == len(self._hooks) and all(map(is_, hooks, self._hooks))
        return [found[place] for place in self._places] if same else None

    def _relist(self) -> list[Tensor]:
        self._changed = False
        roots = {name: root for name, ref in self._roots.items() if (root := ref()) is not None}
        model = {name: root.tensor if isinstance(root, _Plain) else root for name, root in roots.items()}
        layers = [layer for layer in list_layers(model) if not is_lazy(layer.parameter)] if model else []
        before = self.tags
        self.tags = [] if self._closed else [tag(layer.parameter, self._arrive) for layer in layers]
        for each in before:
            each.index = None
        for index, each in enumerate(self.tags):
            each.index = index
        for each in before:
            each.leave_if_unlisted()
        self.names = tuple(layer.name for layer in layers)
        self._remember(list(roots.values()), layers)
        return [layer.parameter for layer in layers]

    def _remember(self, roots: Sequence[nn.Module | _Plain], layers: Sequence[Layer]) -> None:
        """Take down what the model looks like, for the next look."""
        modules: dict[int, Any] = {}
        for root in roots:
            modules |= {id(each): each for each in (root.modules() if isinstance(root, nn.Module) else [root])}
        found = [parameter for module in modules.values() for parameter in module._parameters.values()]
        self._owners = [each if isinstance(each, _Plain) else weakref.ref(each) for each in modules.values()]
        self._known = dict(zip(modules, self._owners, strict=True))
        self._children = [id(child) for module in modules.values() for child in module._modules.values()]
        self._hooks = [None if p is None or is_lazy(p) else p._post_accumulate_grad_hooks for p in found]
        places = {id(parameter): place for place, parameter in enumerate(found)}
        self._places = [places[id(layer.parameter)] for layer in layers]


class _Plain:
    """Hold a tensor that belongs to no module, and look like a module that has nothing else."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._parameters = {"": tensor}
        self._modules: dict[str, nn.Module] = {}

    def __call__(self) -> _Plain:
        return self


_all: weakref.WeakSet[Watched] = weakref.WeakSet()
_registrations: list[RemovableHandle] = []


def _follow_registrations(watched: Watched) -> None:
    """Ask torch, once per process, to tell what modules register."""
    _all.add(watched)
    if not _registrations:
        _registrations.append(register_module_parameter_registration_hook(_registered))
        _registrations.append(register_module_module_registration_hook(_registered))


def _registered(module: nn.Module, name: str, new: Any) -> None:
    for watched in tuple(_all):
        try:
            watched.registered(module, new)
        except Exception:
            logger.exception("esper: %s of %s is not watched yet", name, type(module).__name__)


def _check(layers: Sequence[Layer]) -> None:
    for layer in layers:
        if is_lazy(layer.parameter):
            raise ValueError(f"model: expected parameters that have a shape, got {layer.name!r} of a lazy module")


def _warn(layers: Sequence[Layer], arrive: Arrive) -> None:
    if not any(layer.parameter.requires_grad for layer in layers):
        logger.warning("esper: nothing is measured: none of the model's %d parameters is trainable", len(layers))
    if any(has_other_monitor(layer.parameter, arrive) for layer in layers):
        logger.warning("esper: this model is already watched; each monitor measures separately until its close()")
