"""Backward passes under way: what has arrived in each, and when the last gradient is there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch.autograd.graph import Node

from esper_telemetry.monitor.tags import Tag
from esper_telemetry.scan import PendingScan, Scan

_MOST = 64  # passes that died half-way never end; no more than these are remembered


Arrival = tuple[int, int, Scan | PendingScan | None]
"""What a gradient was when it arrived: its id, its version, and what was measured of it then, if anything."""

task_id = torch._C._current_graph_task_id
"""Return the number of the backward pass in which this thread is, -1 in none."""


def at_end_of_pass(callback: Callable[[], None]) -> None:
    """Call it when the backward pass that is under way in this thread ends, after what was queued before."""
    cast(Any, torch.autograd.Variable)._execution_engine.queue_callback(callback)


class Pass:
    """Hold the gradients that have arrived in one backward pass, in their order.

    before: what had arrived in earlier passes, where no check was made after them.
    when: is its check made, as in GradScope.
    """

    def __init__(self, when: str = "backward") -> None:
        self.when = when
        self.arrived: dict[Tag, Arrival | None] = {}
        self.before: dict[Tag, None] = {}
        self.thread = threading.get_ident()

    def take_in(self, inner: Pass) -> None:
        """Add what arrived in a pass within this one."""
        self.arrived |= inner.arrived

    @property
    def order(self) -> list[int]:
        """Return the layers in the order in which gradients reached them."""
        tags = self.before | dict.fromkeys(self.arrived) if self.before else self.arrived
        return [tag.index for tag in tags if tag.index is not None]


class SinceUpdate:
    """Hold what has arrived since the last `update()` by hand, in one pass or several.

    on_begin: called before the first arrival of a pass is noted.
    """

    def __init__(self, on_begin: Callable[[], None]) -> None:
        self._on_begin = on_begin
        self._latest = Pass("update")
        self._task = -1

    def now(self) -> dict[Tag, Arrival | None]:
        """Return what has arrived in the pass in which autograd is; of those before their order is kept."""
        task = task_id()
        latest = self._latest
        if task != self._task:
            self._on_begin()
            self._task = task
            latest.before |= dict.fromkeys(latest.arrived)
            latest.arrived = {tag: seen for tag, seen in latest.arrived.items() if seen is not None and seen[2]}
        return latest.arrived

    def take_in(self, ended: Pass) -> None:
        """Add what a pass has brought of which nobody makes a check."""
        self._latest.before |= dict.fromkeys(ended.arrived)

    def take(self) -> Pass:
        """Return it, and start over."""
        taken, self._latest = self._latest, Pass("update")
        return taken


class Passes:
    """Follow backward passes from their first arrival to their end.

    A pass within a pass, as reentrant checkpointing makes them, ends with the outermost.

    on_begin: called before the first arrival of a pass is noted.
    hops: returns how many times the end is put off. What is queued as a pass ends runs after all that was queued
        before: DDP and FSDP finish their gradients there.
    on_end: called once per pass, in the thread that called `backward()`, when every gradient of that pass is there and
        nothing has clipped it; what it raises reaches the caller of `backward()`.
    """

    def __init__(self, on_begin: Callable[[], None], hops: Callable[[], int], on_end: Callable[[Pass], object]) -> None:
        self._on_begin = on_begin
        self._hops = hops
        self._on_end = on_end
        self._under_way: dict[int, Pass] = {}
        self.lock = threading.Lock()
        """Held while a pass begins: whoever holds it may touch gradients that no pass under way has reached."""

    def now(self) -> dict[Tag, Arrival | None]:
        """Return what has arrived in the pass in which this thread's autograd is."""
        return (self._under_way.get(task_id()) or self._begin()).arrived

    def others_than(self, ended: Pass) -> bool:
        """Tell whether a pass is under way besides the one that has ended."""
        return any(each is not ended for each in self._under_way.values())

    def _begin(self) -> Pass:
        # The id tells one backward pass from the next even when a pass died half-way and never ran its callback.
        # torch's own register_multi_grad_hook(mode="any") keeps an entry per pass for ever.
        task = task_id()
        self._on_begin()
        at_end_of_pass(partial(self._end, task))
        with self.lock:
            begun = self._under_way[task] = Pass()
            while len(self._under_way) > _MOST:
                del self._under_way[next(iter(self._under_way))]
        return begun

    def _end(self, task: int, hops: int = 0) -> None:
        """Find out which pass has ended: one that a node of another pass runs goes on with the nodes after that."""
        ended = self._under_way.get(task)
        if ended is None:
            return
        if hops < self._hops():
            at_end_of_pass(partial(self._end, task, hops + 1))
            return
        try:
            node = torch._C._current_autograd_node()
            if node is not None and (following := [each for each, _ in node.next_functions if each is not None]):
                self._go_on_after(following[0], ended)
                return
            for other, begun in tuple(self._under_way.items()):
                if other < task and begun.thread == ended.thread:  # it died
                    self._under_way.pop(other, None)
            self._on_end(ended)
        finally:  # not before: until its gradients are gathered, no other thread's check may take them for its own
            self._under_way.pop(task, None)

    def _go_on_after(self, node: Node, inner: Pass) -> None:
        def go_on(_: object) -> None:
            handle.remove()
            (self._under_way.get(task_id()) or self._begin()).take_in(inner)

        handle = node.register_prehook(go_on)
