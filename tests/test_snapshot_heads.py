import math
import re

import pytest
import torch
from torch import nn

from esper_telemetry import GradientMonitor, GradientsCritical, watch
from esper_telemetry.snapshot.heads import Head


class Agent(nn.Module):
    """A trunk with two heads, one of them with a name that begins like another."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(3, 4)
        self.action_net = nn.Linear(4, 2)
        self.value_net = nn.Linear(4, 1)
        self.value_net2 = nn.Linear(4, 1)
        self.frozen = nn.Linear(4, 1).requires_grad_(False)

    def forward(self, x):
        hidden = self.trunk(x)
        return self.action_net(hidden).sum() + self.value_net(hidden).sum() + self.value_net2(hidden).sum()


HEADS = {"policy": "action_net", "value": "value_net"}


def step(model, monitor, **bad):
    """Measure one more gradient, with one bad element in each of the named modules' weights."""
    model.zero_grad()
    model(torch.ones(5, 3)).backward()
    for module, value in bad.items():
        getattr(model, module).weight.grad[0, 0] = value
    return monitor.update().heads


def test_each_head_has_the_norm_of_its_own_layers():
    model = Agent()
    heads = step(model, GradientMonitor(model, heads=HEADS))
    for head, module in (("policy", model.action_net), ("value", model.value_net)):
        gradient = torch.cat([parameter.grad.flatten() for parameter in module.parameters()])
        assert heads[head].norm == pytest.approx(gradient.norm().item())
    assert list(heads) == ["policy", "value"]


def test_a_head_without_a_gradient_has_no_norm():
    model = Agent()
    monitor = GradientMonitor(model, heads={"frozen": "frozen", **HEADS})
    assert monitor.snapshot.heads["policy"] == Head(None, False, False)
    assert step(model, monitor)["frozen"].norm is None


@pytest.mark.parametrize(("value", "latched"), [(math.inf, (True, False)), (math.nan, (False, True))])
def test_what_was_found_in_a_head_stays_until_the_run_ends(value, latched):
    model = Agent()
    monitor = GradientMonitor(model, heads=HEADS)
    assert not step(model, monitor)["policy"].inf_latched
    assert not math.isfinite(step(model, monitor, action_net=value)["policy"].norm)
    after = step(model, monitor)
    monitor.close()
    assert math.isfinite(after["policy"].norm)
    for head in (after["policy"], monitor.snapshot.heads["policy"]):
        assert (head.inf_latched, head.nan_latched) == latched
    assert after["value"] == Head(after["value"].norm, False, False)


def test_both_kinds_add_up_over_checks_and_only_where_they_were():
    model = Agent()
    monitor = GradientMonitor(model, heads=HEADS)
    step(model, monitor, action_net=math.inf)
    step(model, monitor, action_net=math.nan, value_net2=math.nan, trunk=math.inf)
    heads = step(model, monitor)
    assert (heads["policy"].inf_latched, heads["policy"].nan_latched) == (True, True)
    assert (heads["value"].inf_latched, heads["value"].nan_latched) == (False, False)


def test_a_head_can_be_several_modules_or_a_single_layer():
    model = Agent()
    heads = {"values": ["value_net", "value_net2"], "bias": "action_net.bias"}
    found = step(model, GradientMonitor(model, heads=heads), value_net2=math.inf)
    assert found["values"].inf_latched
    assert found["bias"].norm == pytest.approx(model.action_net.bias.grad.norm().item())


def test_a_head_can_be_one_network_of_several():
    networks = {"actor": Agent(), "critic": Agent()}
    monitor = watch(networks, heads={"policy": "actor", "value": "critic.value_net"})
    networks["actor"](torch.full((1, 3), math.nan)).backward()
    heads = monitor.snapshot.heads
    assert (heads["policy"].nan_latched, heads["value"].nan_latched) == (True, False)


def test_no_heads_are_none():
    model = Agent()
    assert step(model, GradientMonitor(model)) == {}


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (
            {"policy": "actoin_net"},
            "heads: expected one of trunk, action_net, value_net, value_net2, frozen for 'policy'",
        ),
        ({"value": ["value_net", "value"]}, "heads: expected one of trunk, action_net, "),
        ({"value": []}, "heads: expected one of "),
        ({"value": 3}, "heads: expected names of modules, got int"),
        (["action_net"], "heads: expected a dict of head -> module name, got list"),
    ],
)
def test_a_head_that_matches_no_layer_is_told_at_set_up_and_leaves_the_model_alone(heads, message):
    model = Agent()
    with pytest.raises(ValueError, match="^" + re.escape(message)) as error:
        watch(model, heads=heads)
    assert "\n" not in str(error.value)
    assert all(parameter._post_accumulate_grad_hooks is None for parameter in model.parameters())


class TestPatience:
    def checks(self, patience, bad, on_critical):
        """Train for 7 checks, critical ones at `bad`, and yield the monitor after each step."""
        model = Agent()
        optimizer = torch.optim.SGD(model.trunk.parameters())
        spoiled = iter(check in bad for check in range(1, 8))
        monitor = watch(
            model,
            optimizer=optimizer,
            on_critical=on_critical,
            patience=patience,
            before_check=lambda _: next(spoiled) and model.action_net.weight.grad.fill_(math.nan),
        )
        for _ in range(7):
            model.zero_grad()
            model(torch.ones(5, 3)).backward()
            optimizer.step()
            yield monitor

    @pytest.mark.parametrize(
        ("patience", "bad", "halted_at"), [(1, {2}, 2), (3, {2, 3, 4}, 4), (3, {1, 2, 4, 5, 6}, 6)]
    )
    def test_halt_waits_for_that_many_critical_checks_in_a_row(self, patience, bad, halted_at):
        with pytest.raises(GradientsCritical) as raised:
            list(self.checks(patience, bad, "halt"))
        assert raised.value.snapshot.checks == halted_at

    def test_critical_checks_with_others_between_them_halt_nothing(self):
        assert len(list(self.checks(3, {1, 2, 4, 5, 7}, "halt"))) == 7

    def test_skip_takes_every_step_from_then_on_until_a_check_is_not_critical(self):
        steps = self.checks(2, {2, 3, 4, 6}, "skip")
        assert [each.snapshot.skipped_updates["intervention"] for each in steps] == [0, 0, 1, 2, 2, 2, 2]

    def test_a_callable_is_asked_only_then(self):
        asked = []
        list(self.checks(2, {2, 3, 4, 6}, lambda snapshot: asked.append(snapshot.checks)))
        assert asked == [3, 4]

    def test_less_than_one_is_told_at_set_up(self):
        with pytest.raises(ValueError, match=r"^patience: expected at least 1, got 0$"):
            watch(Agent(), patience=0)
