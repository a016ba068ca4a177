"""Skips of an engine are counted; the engine here has DeepSpeed's module, name and counter, and nothing else of it."""

import torch
from torch import nn

from esper_telemetry import watch


class DeepSpeedEngine(nn.Module):
    __module__ = "deepspeed.runtime.engine"

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(2, 1)
        self.skipped_steps = 3

    def forward(self, given):
        return self.module(given)


def test_steps_that_the_engine_skips_are_skipped_updates():
    engine = DeepSpeedEngine()
    monitor = watch(engine)
    assert monitor.snapshot.skipped_updates["engine"] == 0, "those before are not this monitor's"
    for expected in (0, 1, 1):
        engine(torch.ones(1, 2)).sum().backward()
        assert monitor.snapshot.skipped_updates["engine"] == expected
        engine.skipped_steps += expected == 0
    engine.skipped_steps += 1
    monitor.close()
    assert monitor.snapshot.skipped_updates["engine"] == 2, "the last one is counted at the end"


def test_other_models_have_no_such_reason():
    assert "engine" not in watch(nn.Linear(1, 1)).snapshot.skipped_updates
