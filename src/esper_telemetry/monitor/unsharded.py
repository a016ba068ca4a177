"""The whole parameters that FSDP2 puts in place of its shards while a module runs: gradients arrive there first."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from esper_telemetry.monitor.tags import Tag
from esper_telemetry.ranks.wrappers import FSDP2, is_one

Arrive = Callable[[Tag, Tensor], None]


class Unsharded:
    """Call `arrive` with the tag of a shard when the whole parameter has got this rank's gradient, until `close()`.

    A whole parameter can be had only while the module that FSDP2 has taken over runs. It is marked by its hook: its id
    may be that of another one later.
    """

    def __init__(self, arrive: Arrive) -> None:
        self._arrive = arrive
        self._hooks: list[RemovableHandle] = []

    def follow(self, modules: Iterable[nn.Module], tags: Mapping[int, Tag]) -> None:
        """Follow the modules that FSDP2 has taken over.

        tags: by the ids of the shards, which the modules hold now.
        """
        self.close()
        for module in modules:
            own = [
                (weakref.ref(owner), name, tags[id(parameter)])
                for owner in _own_modules(module)
                for name, parameter in owner._parameters.items()
                if parameter is not None and id(parameter) in tags
            ]
            if own:
                self._hooks.append(module.register_forward_pre_hook(_Mark(self._arrive, own)))

    def close(self) -> None:
        """Follow none any more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


class _Mark:
    """Mark the whole parameters as their module begins to run."""

    def __init__(self, arrive: Arrive, own: list[tuple[weakref.ref[nn.Module], str, Tag]]) -> None:
        self._arrive = weakref.WeakMethod(arrive)
        self._own = own

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, arguments: object) -> None:
        for reference, name, tag in self._own:
            owner = reference()
            parameter = None if owner is None else owner._parameters.get(name)
            if parameter is not None and parameter._post_accumulate_grad_hooks is not tag.hooks:
                self._mark(parameter, tag)

    def _mark(self, parameter: Any, tag: Tag) -> None:
        hooks = parameter._post_accumulate_grad_hooks or {}
        if parameter.requires_grad and not any(
            isinstance(each, _Arrived) and each.tag is tag for each in hooks.values()
        ):
            parameter.register_post_accumulate_grad_hook(_Arrived(self._arrive, tag))


class _Arrived:
    """Tell that a whole parameter has got its gradient; it keeps nobody alive who wants to hear it."""

    def __init__(self, arrive: weakref.WeakMethod[Arrive], tag: Tag) -> None:
        self._arrive = arrive
        self.tag = tag

    def __call__(self, parameter: Tensor) -> None:
        arrive = self._arrive()
        if arrive is not None:
            arrive(self.tag, parameter)


def _own_modules(module: nn.Module) -> Iterable[nn.Module]:
    """Yield a module that FSDP2 has taken over and those in it that belong to it, and not to one further in."""
    yield module
    for child in module.children():
        if not is_one(child, FSDP2):
            yield from _own_modules(child)
