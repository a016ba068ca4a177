import math

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

from esper_telemetry import HealthTier, watch


class Loop:
    """A training loop with a GradScaler, whose gradients overflow on demand."""

    def __init__(self, **options):
        torch.manual_seed(0)
        self.model = nn.Linear(4, 3)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-3)
        self.scaler = GradScaler("cpu", **options)
        self.monitor = watch(self.model, scaler=self.scaler, before_check=self._spoil)
        self.overflow = 0

    def _spoil(self, _):
        self.model.weight.grad.view(-1)[: self.overflow] = math.inf

    def step(self, overflow=0):
        self.overflow = overflow
        self.optimizer.zero_grad()
        self.scaler.scale(self.model(torch.ones(2, 4)).sum()).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return self.monitor.snapshot


def test_norms_are_what_the_optimizer_would_see():
    loop = Loop(init_scale=1024.0)
    snapshot = loop.step()
    loop.model.zero_grad()
    loop.model(torch.ones(2, 4)).sum().backward()
    expected = nn.utils.get_total_norm([each.grad for each in loop.model.parameters()]).item()
    assert snapshot.grad_norm == pytest.approx(expected)


def test_layers_do_not_explode_because_they_are_scaled():
    assert Loop(init_scale=2.0**16).step().exploding_layers == 0


def test_an_overflow_that_the_scaler_handles_is_a_skip_and_no_tier():
    loop = Loop(init_scale=2.0**16)
    loop.step()
    snapshot = loop.step(overflow=7)
    assert snapshot.tier is HealthTier.HEALTHY
    assert snapshot.inf.critical_checks == 0
    snapshot = loop.step()
    assert snapshot.skipped_updates["amp"] == 1
    assert (snapshot.amp.scale, snapshot.amp.consecutive_skips) == (2.0**15, 1)
    assert loop.step().amp.consecutive_skips == 0


def test_a_streak_of_more_than_8_counts_in_full():
    loop = Loop(init_scale=2.0**16)
    loop.step()
    tiers = [loop.step(overflow=7).tier for _ in range(12)]
    assert tiers == [HealthTier.HEALTHY] * 9 + [HealthTier.CRITICAL] * 3
    assert loop.monitor.snapshot.inf_grad_count == 7


def test_a_new_scaler_may_halve_as_long_as_it_is_above_1():
    loop = Loop(init_scale=2.0**16)
    snapshots = [loop.step(overflow=7) for _ in range(18)]
    assert [each.tier for each in snapshots] == [HealthTier.HEALTHY] * 17 + [HealthTier.CRITICAL]
    assert snapshots[-1].amp.scale == 0.5


def test_accumulation_is_one_skip_a_step():
    loop = Loop(init_scale=2.0**16)
    loop.step()
    loop.overflow = 7
    for _ in range(3):
        loop.scaler.scale(loop.model(torch.ones(2, 4)).sum()).backward()
    loop.scaler.step(loop.optimizer)
    loop.scaler.update()
    assert loop.step().skipped_updates["amp"] == 1


def test_a_healthy_run_with_growth_probes_has_no_warning():
    loop = Loop(init_scale=2.0**16, growth_interval=20)
    for _ in range(500):
        snapshot = loop.step(overflow=9 if loop.scaler.get_scale() > 2.0**17 else 0)
    assert snapshot.nonfinite_checks == dict.fromkeys(snapshot.nonfinite_checks, 0)
    assert snapshot.skipped_updates["amp"] >= 20


def test_a_disabled_scaler_explains_nothing():
    loop = Loop(enabled=False)
    snapshot = loop.step(overflow=7)
    assert snapshot.inf_grad_count == 7
    assert snapshot.amp is None


def test_what_is_no_scaler_is_refused():
    with pytest.raises(ValueError, match=r"scaler: expected a torch\.amp\.GradScaler, got float"):
        watch(nn.Linear(1, 1), scaler=1.0)
