"""Optimizers whose steps can be dropped, and those whose steps cannot."""

import copy
import math

import pytest
import torch
from torch import nn

from esper_telemetry import watch


class SAM(torch.optim.Optimizer):
    """Take two steps of its own names, around which torch calls no hooks."""

    def __init__(self, parameters, base):
        super().__init__(parameters, {})
        self.base_optimizer = base(self.param_groups, lr=0.1)

    @torch.no_grad()
    def first_step(self):
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["old"] = parameter.clone()
            parameter.add_(parameter.grad * 0.01)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for parameter in self.param_groups[0]["params"]:
            parameter.copy_(self.state[parameter]["old"])
        self.base_optimizer.step()
        self.zero_grad()

    def step(self):
        raise NotImplementedError


class Counting(torch.optim.SGD):
    """Count in Python at each step, with gradients or without, as schedule-free optimizers do."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.1, momentum=0.9)
        self.steps = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.steps += 1
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            group["lr"] *= 0.9
        return super().step(closure)


class Lookahead(torch.optim.Optimizer):
    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self):
        self.inner.step()


def network():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def backward(model, x=1.0):
    model(torch.full((2, 4), x)).sum().backward()


def test_an_optimizer_with_steps_of_other_names_is_refused_with_what_to_pass_instead():
    model = network()
    with pytest.raises(ValueError, match=r"cannot drop SAM\.first_step\(\); expected optimizer=\.\.\.base_optimizer"):
        watch(model, optimizer=SAM(model.parameters(), torch.optim.SGD), on_critical="skip")
    assert model.weight._post_accumulate_grad_hooks is None


def test_what_is_to_be_passed_instead_leaves_everything_as_it_was():
    model = network()
    sam = SAM(model.parameters(), torch.optim.SGD)
    monitor = watch(model, optimizer=sam.base_optimizer, on_critical="skip")
    backward(model)
    sam.first_step()
    backward(model)
    sam.second_step()
    before = copy.deepcopy(model.state_dict())
    backward(model)
    sam.first_step()
    backward(model, math.nan)
    sam.second_step()
    assert str(before) == str(model.state_dict())
    assert monitor.snapshot.skipped_updates["intervention"] == 1


@pytest.mark.parametrize("closure", [True, False])
def test_what_an_optimizer_counts_in_python_is_set_back(closure):
    model = network()
    optimizer = Counting(model.parameters())
    watch(model, optimizer=optimizer, on_critical="skip")
    states = []
    for x in (math.nan, 1.0, math.nan, 1.0):

        def evaluate(x=x):
            optimizer.zero_grad()
            backward(model, x)
            return 0.0

        if closure:
            optimizer.step(evaluate)
        else:
            evaluate()
            optimizer.step()
        states.append(str((model.state_dict(), optimizer.state_dict(), optimizer.steps)))
    assert states[1] == states[2]
    assert len(set(states)) == 3
    assert optimizer.steps == 2


def test_an_optimizer_around_another_is_told_what_is_not_covered(caplog):
    model = network()
    watch(model, optimizer=Lookahead(torch.optim.SGD(model.parameters())), on_critical="skip")
    assert [record.message for record in caplog.records] == [
        "esper: on_critical='skip' drops the gradients of Lookahead; "
        "what it does to parameters outside its inner continues"
    ]
