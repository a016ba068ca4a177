"""The trap: forward hooks that are on the modules for the few passes after trouble began."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from esper_telemetry.verdict.passage import Passage

PASSES = 16
"""The most passes that are watched in one episode of trouble."""


class Modules(Protocol):
    """The modules of a model as it is now."""

    def modules(self, enter: Callable[[nn.Module], bool]) -> Iterable[tuple[str, nn.Module]]:
        """Return each with its name; `enter` tells whether to go on to those within."""


class Trap:
    """Hook the modules of a model between `arm()` and `disarm()`, to see where trouble begins.

    No module that is compiled is hooked where that would compile it again, and none within one. Hooks change neither
    what a module returns, nor a random state, nor the graph. Both methods are for the thread that trains: torch walks
    through the hooks while a module is called.

    on_forward: called when a forward begins, before anything is computed.
    watching: whether to look at what goes through; else only `on_forward` is called.
    fail: takes note of an exception.
    """

    def __init__(
        self, modules: Modules, on_forward: Callable[[], None], watching: bool, fail: Callable[[str], None]
    ) -> None:
        self._modules = modules
        self._on_forward = on_forward
        self._watching = watching
        self._fail = fail
        self._handles: list[RemovableHandle] = []
        self._passage: Passage | None = None
        self._left = PASSES

    @property
    def is_armed(self) -> bool:
        """Tell whether hooks are on the modules."""
        return bool(self._handles)

    @property
    def is_spent(self) -> bool:
        """Tell whether no passes are left."""
        return not self._left

    def renew(self) -> None:
        """Allow the full number of passes again, for a new episode."""
        self._left = PASSES

    def arm(self) -> None:
        """Put hooks on the modules, where passes are left."""
        if self._handles or not self._left:
            return
        for name, module in self._modules.modules(_may_enter):
            if getattr(module, "_compiled_call_impl", None) is not None:
                continue
            before, after = _Hook(self._before, name), _Hook(self._after, name)
            # First of all: FSDP's hook puts whole parameters in place of the shards, and a look is for the shards.
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
            if self._watching:
                self._handles.append(module.register_forward_hook(after))

    def disarm(self) -> None:
        """Take them off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._passage = None

    def end_pass(self) -> Passage | None:
        """Return what was seen since the last call; one more pass is over."""
        seen, self._passage = self._passage, None
        if self._handles:
            self._left -= 1
        if seen is not None:
            seen.end()
        return seen

    def _before(self, name: str, module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        if self._passage is None or self._passage.outermost:
            self._on_forward()
        if self._watching:
            self._passage = self._passage or Passage()
            self._passage.enter(name, module, (*inputs, *named.values()))

    def _after(self, _: str, module: nn.Module, inputs: object, outputs: Any) -> None:
        if self._passage is not None:
            self._passage.leave(module, outputs)

    def run(self, hook: Callable[..., None], name: str, *seen: Any) -> None:
        """Run a hook where it can see something and be in nobody's way."""
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or _nobody_may_look():
            return
        try:
            hook(name, *seen)
        except Exception:
            self._fail("the trap could not inspect a module")


class _Hook:
    """Call a method of a trap; a copy of it, or a pickle, does nothing and knows nothing of us."""

    def __init__(self, method: Callable[..., None], name: str) -> None:
        self._method = method
        self._name = name

    def __call__(self, *seen: Any) -> None:
        trap: Trap = self._method.__self__  # type: ignore[attr-defined]
        trap.run(self._method, self._name, *seen)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")  # takes anything, and returns None


def _may_enter(module: nn.Module) -> bool:
    """Tell whether the modules within one are called from Python, and not from compiled code."""
    if isinstance(module, torch.jit.ScriptModule) or getattr(module, "_compiled_call_impl", None) is not None:
        return False
    return not hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")


def _nobody_may_look() -> bool:
    """Tell whether this is the recomputation of a checkpoint, a transform of functions, or a capture of a graph."""
    if torch._C._current_graph_task_id() != -1 or torch._C._functorch.maybe_current_level() is not None:
        return True
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return True
    compiled = sys.modules.get("torch._dynamo.compiled_autograd")
    return bool(getattr(compiled, "compiled_autograd_enabled", False))
