"""Gradients of this rank that stay as they are for a while: together they cost less to measure than one by one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from esper_telemetry.monitor.passes import at_end_of_pass, task_id
from esper_telemetry.scan import PendingScan, Scan

MeasureEach = Callable[[Sequence[Tensor]], list[Scan | PendingScan]]

_MOST = 1 << 22
"""Elements that are kept waiting, and so alive where their owner has let them go: no more than 16 MiB of float32."""


def can_wait(gradient: Tensor) -> bool:
    """Tell whether a gradient that has just arrived gains from being measured together with others."""
    return type(gradient) is Tensor and gradient.is_cpu and gradient.layout is torch.strided and task_id() >= 0


class Held:
    """Hold gradients until they are measured: one by one, each would find the caches cold.

    All are measured when any pass ends: where one runs within another, ranks write there to the gradients of both.

    measure: measures gradients, each by itself.
    fail: takes note of an exception, which never reaches the training loop.
    """

    def __init__(self, measure: MeasureEach, fail: Callable[[str], None]) -> None:
        self._measure = measure
        self._fail = fail
        self._lock = threading.Lock()
        self._held: list[tuple[list[Scan | PendingScan], Tensor]] = []
        self._elements = 0
        self._task = -1

    def add(self, own: list[Scan | PendingScan], gradient: Tensor) -> None:
        """Take in a gradient of the pass that is under way, and where to put what will be found in it."""
        task = task_id()
        with self._lock:
            self._held.append((own, gradient))
            self._elements += gradient.numel()
            full = self._elements >= _MOST
            begun, self._task = task != self._task, task
        if begun:
            at_end_of_pass(self._measure_all)  # DDP writes to gradients after this: it queues that when all are there
        if full:
            self._measure_all()

    def _measure_all(self) -> None:
        with self._lock:
            held, self._held, self._elements = self._held, [], 0
        try:
            if held:
                for (own, _), scan in zip(held, self._measure([gradient for _, gradient in held]), strict=True):
                    own.append(scan)
        except Exception:
            self._fail("gradients could not be measured before they were reduced")
