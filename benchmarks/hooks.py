"""What it costs when other code waits for the gradients too, with hooks that may take them away."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.measurement import Section, Tick, alternate
from esper_telemetry import watch

NO_HOOKS = "watch()"
HOOKS = "watch(), with a trivial hook on each parameter"

_LAYERS, _WIDTH = 200, 100
_STEPS = 20


def measure_hooks(rounds: int, tick: Tick) -> Section:
    """Let a watched model of 400 tensors train with hooks of others and without."""
    timed = {NO_HOOKS: _training(hooked=False), HOOKS: _training(hooked=True)}
    title = "400 tensors of 100 x 100 and 100, seconds of a step by the monitor's own clock"
    return Section("hooks", title, NO_HOOKS, alternate(timed, rounds, tick, often=timed))


def _training(hooked: bool) -> Callable[[], float]:
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(_WIDTH, _WIDTH) for _ in range(_LAYERS))
    if hooked:
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda _: None)
    monitor, batch = watch(model), torch.randn(8, _WIDTH)

    def train() -> float:
        gc.collect()
        before = monitor.snapshot.monitor_seconds
        for _ in range(_STEPS):
            model.zero_grad()
            torch.stack([layer(batch).sum() for layer in model]).sum().backward()
        return (monitor.snapshot.monitor_seconds - before) / _STEPS

    train()
    return train
