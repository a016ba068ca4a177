"""Dead and exploding layers: as fresh as they are troublesome."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from esper_telemetry import GradientMonitor, watch
from esper_telemetry.monitor.dead_layers import DeadLayers
from esper_telemetry.scan import scan


class Adapter(nn.Module):
    """Adapt a frozen layer in low rank; B is zero at first, and so is the gradient of A."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.A = nn.Parameter(torch.randn(2, 6))
        self.B = nn.Parameter(torch.zeros(6, 2))

    def forward(self, x):
        return self.frozen(x) + x @ self.A.T @ self.B.T


def test_a_zero_initialised_adapter_is_dead_in_the_first_check_only():
    model = Adapter()
    monitor = watch(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    dead = []
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
        dead.append(monitor.snapshot.dead_layers)
    assert dead == [1, 0, 0]


@pytest.mark.parametrize("kind", ["dead", "exploding"])
def test_trouble_is_gone_from_the_next_check_on(kind):
    bad, good = ([0.0] * 20, [1.0] * 20) if kind == "dead" else ([1e3] * 20, [1.0] * 20)
    model = nn.Linear(20, 1, bias=False)
    monitor = GradientMonitor(model)
    found = []
    for values in (bad, bad, bad, good, good):
        model.weight.grad = torch.tensor([values])
        found.append(getattr(monitor.update(), f"{kind}_layers"))
    assert found == [1, 1, 1, 0, 0]


def test_trouble_that_lasts_is_looked_at_less_and_less_and_other_layers_not_at_all(monkeypatch):
    looked = []
    count_nonzero = torch.count_nonzero
    monkeypatch.setattr(torch, "count_nonzero", lambda gradient: looked.append(gradient) or count_nonzero(gradient))
    gradients = [torch.zeros(5), torch.ones(5)]
    layers, at = DeadLayers(every=1000), []
    for check in range(400):
        looked.clear()
        layers.add_to(scan(gradients), gradients, None)
        if looked and check:
            assert [id(each) for each in looked] == [id(gradients[0])]
            at.append(check)
    assert at[:9] == list(range(1, 10))
    assert all(later - check <= max(1, check // 8) for check, later in pairwise(at))
    assert len(at) < 60
