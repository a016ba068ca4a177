"""Backward passes under way: what has arrived in each, and when the last gradient is there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch.autograd.graph import Node

from esper_telemetry.monitor.tags import Tag
from esper_telemetry.scan import PendingScan, Scan

_MOST = 64  # passes that died half-way never end; no more than these are remembered


class Arrival(NamedTuple):
    """Hold what a gradient was when it arrived: its id, its version, and what was measured of it then, if anything."""

    gradient: int
    version: int
    found: Scan | PendingScan | None


class Pass:
    """Hold the gradients that have arrived in one backward pass, in their order."""

    def __init__(self) -> None:
        self.arrived: dict[Tag, Arrival | None] = {}
        self.thread = threading.get_ident()

    def take_in(self, inner: Pass) -> None:
        """Add what arrived in a pass within this one."""
        self.arrived |= inner.arrived

    @property
    def order(self) -> list[int]:
        """Return the layers in the order in which gradients reached them."""
        return [tag.index for tag in self.arrived if tag.index is not None]


class SinceUpdate(Pass):
    """Hold what has arrived since the last `update()` by hand, in one pass or several."""

    def __init__(self) -> None:
        super().__init__()
        self._task = -1
        self._before: dict[Tag, None] = {}

    def now(self) -> Pass:
        """Return this; what arrived in passes before the present one is kept for its order, and if it was measured."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task = task
            self._before |= dict.fromkeys(self.arrived)
            self.arrived = {tag: seen for tag, seen in self.arrived.items() if seen is not None and seen.found}
        return self

    @property
    def order(self) -> list[int]:
        """Return the layers in the order in which gradients reached them."""
        return [tag.index for tag in self._before | dict.fromkeys(self.arrived) if tag.index is not None]


class Passes:
    """Follow backward passes from their first arrival to their end.

    A pass within a pass, as reentrant checkpointing makes them, ends with the outermost.

    on_begin: called before the first arrival of a pass is noted.
    on_end: called once per pass, in the thread that called `backward()`, when every gradient of that pass is there and
        nothing has clipped it; what it raises reaches the caller of `backward()`.
    """

    def __init__(self, on_begin: Callable[[], None], on_end: Callable[[Pass], object]) -> None:
        self._on_begin = on_begin
        self._on_end = on_end
        self._under_way: dict[int, Pass] = {}
        self.lock = threading.Lock()
        """Held while a pass begins: whoever holds it may touch gradients that no pass under way has reached."""

    def now(self) -> Pass:
        """Return the pass in which this thread's autograd is."""
        return self._under_way.get(torch._C._current_graph_task_id()) or self._begin()

    def others_than(self, ended: Pass) -> bool:
        """Tell whether a pass is under way besides the one that has ended."""
        return any(each is not ended for each in self._under_way.values())

    def _begin(self) -> Pass:
        # The id tells one backward pass from the next even when a pass died half-way and never ran its callback.
        # torch's own register_multi_grad_hook(mode="any") keeps an entry per pass for ever.
        task = torch._C._current_graph_task_id()
        self._on_begin()
        engine = cast(Any, torch.autograd.Variable)._execution_engine
        engine.queue_callback(lambda: self._end(task))
        with self.lock:
            begun = self._under_way[task] = Pass()
            while len(self._under_way) > _MOST:
                del self._under_way[next(iter(self._under_way))]
        return begun

    def _end(self, task: int) -> None:
        """Find out which pass has ended: one that a node of another pass runs goes on with the nodes after that."""
        ended = self._under_way.pop(task, None)
        if ended is None:
            return
        node = torch._C._current_autograd_node()
        if node is not None and (following := [each for each, _ in node.next_functions if each is not None]):
            self._go_on_after(following[0], ended)
            return
        for other, begun in tuple(self._under_way.items()):
            if other < task and begun.thread == ended.thread:  # it died
                self._under_way.pop(other, None)
        self._on_end(ended)

    def _go_on_after(self, node: Node, inner: Pass) -> None:
        def go_on(_: object) -> None:
            handle.remove()
            self.now().take_in(inner)

        handle = node.register_prehook(go_on)
