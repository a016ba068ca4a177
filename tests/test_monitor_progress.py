"""What the loop tells of its progress."""

import math

import pytest
import torch
from torch import nn

from esper_telemetry import watch
from esper_telemetry.monitor import progress as module
from esper_telemetry.snapshot.train_progress import TrainProgress


class OnItsWay:
    """Stand in for scalars on a device."""

    def __init__(self, scalars):
        self.scalars = [scalar.item() for scalar in scalars]
        self.there = False
        made.append(self)

    def ready(self):
        return self.there

    def values(self):
        return self.scalars


made = []


@pytest.fixture
def monitor():
    return watch(nn.Linear(2, 1))


def test_what_was_never_told_is_not_known(monitor):
    assert monitor.snapshot.progress is None
    monitor.record(loss=0.5)
    assert monitor.snapshot.progress == TrainProgress(loss=0.5)


def test_the_newest_is_kept_and_samples_are_added_up(monitor):
    monitor.record(loss=0.5, lr=1e-3, step=1, samples=32)
    monitor.record(loss=torch.tensor(math.nan), step=2, samples=32)
    progress = monitor.snapshot.progress
    assert math.isnan(progress.loss)
    assert (progress.learning_rate, progress.step, progress.samples) == (1e-3, 2, 64)


@pytest.mark.parametrize("told", [{"loss": "high"}, {"loss": torch.ones(2)}, {"step": object()}, {"samples": math.nan}])
def test_what_is_no_number_is_counted_and_never_raised(monitor, told):
    monitor.record(loss=0.5)
    monitor.record(**told)
    assert monitor.snapshot.progress == TrainProgress(loss=0.5)
    assert monitor.snapshot.monitor_errors == 1


def test_a_loss_on_a_device_is_not_waited_for(monitor, monkeypatch):
    monkeypatch.setattr(module, "Scalars", OnItsWay)
    made.clear()
    for loss in (1.0, 2.0):
        monitor.record(loss=torch.tensor(loss), samples=8)
    assert monitor.snapshot.progress is None
    made[0].there = True
    assert monitor.snapshot.progress == TrainProgress(loss=1.0, samples=8)
    made[1].there = True
    assert monitor.snapshot.progress == TrainProgress(loss=2.0, samples=16)


class TestCarryingOn:
    def test_counters_and_what_is_remembered_do_not_restart(self):
        model = nn.Linear(2, 1)
        first = watch(model, heads={"all": "weight"})
        for x in (1.0, math.nan):
            model(torch.full((1, 2), x)).sum().backward()
        first.record(samples=5)
        first.close()
        model.zero_grad()
        second = watch(model, heads={"all": "weight"})
        second.carry_on(first.snapshot)
        model(torch.ones(1, 2)).sum().backward()
        snapshot = second.snapshot
        assert (snapshot.checks, snapshot.nan_grad_count, snapshot.ended) == (3, 0, False)
        assert snapshot.nan == first.snapshot.nan
        assert snapshot.recent.read(0.0).nan_max == first.snapshot.nan_grad_count
        assert snapshot.heads["all"].nan_latched
        assert snapshot.progress.samples == 5
        assert snapshot.monitor_seconds > first.snapshot.monitor_seconds

    def test_skips_of_a_new_scaler_are_added(self):
        model = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        snapshot = None
        for _ in range(2):
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            monitor = watch(model, scaler=scaler)
            if snapshot is not None:
                monitor.carry_on(snapshot)
            for x in (1.0, math.inf, 1.0):
                optimizer.zero_grad()
                scaler.scale(model(torch.full((1, 2), x)).sum()).backward()
                scaler.step(optimizer)
                scaler.update()
            monitor.close()
            snapshot = monitor.snapshot
        assert snapshot.skipped_updates["amp"] == 2
        assert snapshot.checks == 6
