"""The verdict: what bad gradients have done to the model, found out exactly and only when there is a reason to look."""

import copy
import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.amp import GradScaler

from esper_telemetry import GradientMonitor, watch

BIG = torch.finfo(torch.float32).max


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


class Loop:
    """A training loop whose gradient can be spoiled at one element."""

    def __init__(self, model=None, optimizer=torch.optim.Adam, clip=None, scaler=None, give_optimizer=True, **options):
        self.model = model or network()
        self.optimizer = optimizer(self.model.parameters())
        self.clip = clip
        self.scaler = scaler
        if give_optimizer:
            options["optimizer"] = self.optimizer
        self.monitor = watch(self.model, before_check=self._write, **options)
        self._spoil = 0.0

    def _write(self, _):
        if self._spoil:
            next(self.model.parameters()).grad.view(-1)[0] = self._spoil

    def step(self, spoil=0.0, x=None):
        self._spoil = spoil
        self.optimizer.zero_grad()
        loss = self.model(torch.ones(5, 3) if x is None else x).sum()
        if self.scaler is None:
            loss.backward()
        else:
            self.scaler.scale(loss).backward()
        if self.clip is not None:
            self.clip(self.model.parameters())
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return self.monitor.snapshot


def clip_by_value(parameters):
    nn.utils.clip_grad_value_(parameters, BIG)


def to_zero(parameters):
    for parameter in parameters:
        parameter.grad.nan_to_num_(0.0, 0.0, 0.0)


@pytest.fixture
def count_looks(monkeypatch):
    """Count the looks at the state of a model."""
    from esper_telemetry.verdict.look import Looks

    looks = []
    launch = Looks.launch
    monkeypatch.setattr(Looks, "launch", lambda self, *a: (looks.append(self), launch(self, *a))[1])
    return looks


def names(counts):
    return [each.layer_name for each in counts]


def test_one_look_when_watching_begins_and_none_while_all_is_well(count_looks):
    loop = Loop()
    assert loop.monitor.snapshot.damage == "intact"
    for _ in range(20):
        loop.step()
    assert len(count_looks) == 1


def test_a_look_now_and_then_at_a_slow_cadence(count_looks):
    loop = Loop(damage_every=5)
    for _ in range(15):
        loop.step()
    assert len(count_looks) == 1 + 3


def test_it_is_not_known_before_the_first_look():
    from tests.snapshots import fresh

    assert fresh().damage is None
    assert fresh().cause is None
    assert fresh().last_good_check is None


def test_a_resumed_checkpoint_that_is_damaged_is_said_at_once(caplog):
    model = network()
    with torch.no_grad():
        model[2].weight[0, 1] = math.nan
    with caplog.at_level(logging.WARNING):
        snapshot = watch(model).snapshot
    assert snapshot.checks == 0
    assert snapshot.damage == "parameters"
    [found] = snapshot.found_damage.parameters
    assert (found.layer_name, found.inf_count, found.nan_count, found.numel) == ("2.weight", 0, 1, 8)
    assert snapshot.cause == "parameter 2.weight"
    assert "parameters damaged: Inf 0, NaN 1 in 2.weight" in caplog.text


def test_a_resumed_optimizer_that_is_damaged_is_said_at_once():
    loop = Loop()
    loop.step()
    state = copy.deepcopy(loop.optimizer.state_dict())
    state["state"][1]["exp_avg_sq"][2] = math.inf
    loop.monitor.close()
    loop.optimizer.load_state_dict(state)
    snapshot = watch(loop.model, optimizer=loop.optimizer).snapshot
    assert snapshot.damage == "optimizer"
    assert names(snapshot.found_damage.optimizer) == ["exp_avg_sq of 0.bias"]


def test_a_bad_gradient_that_the_step_takes_in_damages_the_parameters():
    loop = Loop(optimizer=torch.optim.SGD)
    assert loop.step(spoil=math.nan).damage == "intact"  # the state with which the gradient was made
    snapshot = loop.step()
    assert snapshot.damage == "parameters"
    [found] = snapshot.found_damage.parameters
    assert (found.layer_name, found.nan_count) == ("0.weight", 1)


def test_the_look_is_made_when_the_next_forward_begins():
    loop = Loop(optimizer=torch.optim.SGD)
    loop.step(spoil=math.nan)
    with torch.no_grad():
        loop.model(torch.ones(1, 3))
    assert loop.monitor.snapshot.checks == 1
    assert loop.monitor.snapshot.damage == "parameters"


@pytest.mark.parametrize("kind", [math.inf, math.nan])
def test_a_step_that_amp_skips_leaves_the_model_intact(kind):
    loop = Loop(scaler=GradScaler("cpu", init_scale=2.0))
    loop.step()
    for spoil in (kind, 0.0, 0.0):
        snapshot = loop.step(spoil)
    assert loop.scaler.get_scale() == 1.0, "it was skipped"
    assert snapshot.nan.warning_checks + snapshot.inf.warning_checks == 1
    assert snapshot.damage == "intact"
    assert loop.monitor.safe_to_save()
    assert snapshot.last_good_check.check == 4


def test_a_skip_of_a_watched_scaler_is_no_reason_to_look(count_looks):
    scaler = GradScaler("cpu", init_scale=2.0**20)
    loop = Loop(scaler=scaler)
    loop.monitor.close()
    monitor = watch(loop.model, optimizer=loop.optimizer, scaler=scaler, before_check=loop._write)
    loop.monitor = monitor
    before = len(count_looks)
    for spoil in (0.0, math.inf, 0.0):
        snapshot = loop.step(spoil)
    assert snapshot.skipped_updates["amp"] == 1
    assert snapshot.damage == "intact"
    assert len(count_looks) == before
    assert monitor.safe_to_save()


@pytest.mark.parametrize("clip", [to_zero, lambda parameters: nn.utils.clip_grad_value_(parameters, 1.0)])
def test_a_bad_gradient_that_is_clipped_away_leaves_the_model_intact(clip):
    loop = Loop(clip=clip)
    loop.step(spoil=math.inf)
    snapshot = loop.step()
    assert snapshot.inf.warning_checks == 1
    assert snapshot.damage == "intact"
    assert loop.monitor.safe_to_save()


def test_a_step_that_is_skipped_on_request_leaves_the_model_intact():
    loop = Loop(on_critical=lambda _: "skip")
    loop.monitor.close()
    loop.monitor = watch(loop.model, optimizer=loop.optimizer, on_critical="skip")
    loop.step(x=torch.full((5, 3), math.nan))
    snapshot = loop.step()
    assert snapshot.skipped_updates["intervention"] == 1
    assert snapshot.damage == "intact"


def test_adam_takes_in_what_a_clip_by_value_let_through_and_dies_later():
    loop = Loop(clip=clip_by_value)
    loop.step(spoil=math.inf)
    snapshot = loop.step(spoil=-math.inf)
    assert snapshot.damage == "optimizer", "at the check after the step"
    assert names(snapshot.found_damage.optimizer) == ["exp_avg_sq of 0.weight"]
    assert not snapshot.found_damage.parameters
    snapshot = loop.step()
    assert snapshot.damage == "parameters", "the moving average has overflowed"
    assert names(snapshot.found_damage.parameters) == ["0.weight"]


def test_damage_that_lasts_is_looked_at_in_each_check_until_it_is_gone():
    loop = Loop(clip=clip_by_value)
    loop.step(spoil=math.inf)
    for _ in range(3):
        assert loop.step().damage == "optimizer"
    with torch.no_grad():
        for state in loop.optimizer.state.values():
            state["exp_avg_sq"].nan_to_num_(posinf=0.0)
    loop.step()
    assert loop.step().damage == "intact"
    assert loop.step().last_good_check.check == 7


def test_momentum_is_optimizer_state():
    loop = Loop(optimizer=lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9, nesterov=False), clip=clip_by_value)
    for spoil in (math.inf, math.inf, 0.0):
        snapshot = loop.step(spoil)
    assert snapshot.found_damage.word in ("optimizer", "parameters")
    assert names(snapshot.found_damage.optimizer) == ["momentum_buffer of 0.weight"]


def test_copies_that_an_optimizer_steps_are_its_state():
    model = network()
    masters = [each.detach().clone().double().requires_grad_() for each in model.parameters()]
    optimizer = torch.optim.SGD(masters, lr=0.1)
    monitor = watch(model, optimizer=optimizer)
    masters[2].data[0, 0] = math.nan
    with torch.no_grad():
        monitor._verdict.look()
    assert names(monitor.snapshot.found_damage.optimizer) == ["parameter 2 of SGD"]


def test_an_optimizer_that_was_seen_to_step_need_not_be_given():
    loop = Loop(give_optimizer=False, clip=clip_by_value)
    loop.step(spoil=math.inf)
    assert loop.step().damage == "optimizer"


def test_the_optimizer_of_another_model_is_not_looked_at():
    loop = Loop(give_optimizer=False)
    other = nn.Linear(2, 2)
    stranger = torch.optim.Adam(other.parameters())
    other(torch.ones(1, 2)).sum().backward()
    stranger.step()
    stranger.state[other.weight]["exp_avg"][:] = math.nan
    loop.step(spoil=math.inf)
    assert not any("Adam" in name for name in names(loop.step().found_damage.optimizer))


def test_running_statistics_that_one_batch_poisoned_while_parameters_stay_finite():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    loop = Loop(model, on_critical="skip")
    loop.step()
    batch = torch.ones(5, 3)
    batch[0, 0] = math.nan
    loop.step(x=batch)
    snapshot = loop.step()
    assert snapshot.damage == "buffers"
    assert sorted(names(snapshot.found_damage.buffers)) == ["1.running_mean", "1.running_var"]
    assert not snapshot.found_damage.parameters
    assert not snapshot.found_damage.optimizer
    assert not loop.monitor.safe_to_save()


def test_the_infinities_of_a_mask_are_meant():
    model = network()
    model.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(4))
    model[2].register_parameter("gain", nn.Parameter(torch.full((3,), -math.inf), requires_grad=False))
    loop = Loop(model, optimizer=torch.optim.SGD)
    assert loop.monitor.snapshot.damage == "intact"
    model.mask[0, 0] = math.nan
    loop.step(spoil=math.inf)
    assert names(loop.step().found_damage.buffers) == ["mask"]


def test_a_mask_that_comes_later_is_meant_too():
    loop = Loop(clip=to_zero)
    loop.model.register_buffer("mask", torch.full((2, 2), -math.inf))
    loop.step(spoil=math.inf)
    assert loop.step().damage == "intact"


def test_infinities_in_running_statistics_are_never_meant():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model[1].running_var[1] = math.inf
    assert watch(model).snapshot.damage == "buffers"


@settings(max_examples=40)
@given(st.data())
def test_each_element_is_counted_where_it_is(data):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    model(torch.rand(5, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    by_id = {id(each): name for name, each in model.named_parameters()}
    tensors = {name: ("parameters", each.detach()) for name, each in model.named_parameters()}
    tensors |= {f"1.{name}": ("buffers", getattr(model[1], name)) for name in ("running_mean", "running_var")}
    for parameter, state in optimizer.state.items():
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            tensors[f"{key} of {by_id[id(parameter)]}"] = "optimizer", state[key]
    expected = {"parameters": {}, "buffers": {}, "optimizer": {}}
    for name in data.draw(st.lists(st.sampled_from(sorted(tensors)), unique=True)):
        part, tensor = tensors[name]
        values = data.draw(st.lists(st.sampled_from([0.0, math.inf, -math.inf, math.nan]), max_size=tensor.numel()))
        for place, value in enumerate(values):
            tensor.view(-1)[place] = value
        if not torch.isfinite(tensor).all():
            expected[part][name] = int(tensor.isinf().sum()), int(tensor.isnan().sum())
    found = watch(model, optimizer=optimizer).snapshot.found_damage
    for part, counts in expected.items():
        assert {each.layer_name: (each.inf_count, each.nan_count) for each in getattr(found, part)} == counts
    worst = next((part for part in ("parameters", "buffers", "optimizer") if expected[part]), "intact")
    assert found.word == worst


def test_nothing_is_safe_to_save_from_a_bad_check_until_the_model_was_seen_intact():
    loop = Loop(clip=to_zero)
    loop.step()
    assert loop.monitor.safe_to_save()
    seen = []
    loop.monitor.on_check(lambda snapshot: seen.append(loop.monitor.safe_to_save()))
    loop.step(spoil=math.nan)
    assert not seen[-1], "the optimizer has not stepped yet"
    assert seen[-1].why == "a check was bad, and the model has not been seen intact since"
    assert loop.monitor.safe_to_save(), "it has stepped, so that a look decides"
    assert loop.monitor.snapshot.nan.warning_checks == 1


def test_a_damaged_model_is_not_safe_to_save_and_says_why():
    loop = Loop(optimizer=torch.optim.SGD)
    loop.step(spoil=math.nan)
    safe = loop.monitor.safe_to_save()
    assert not safe
    assert safe.why == "parameters damaged: Inf 0, NaN 1 in 0.weight"
    assert repr(safe) == f"False ({safe.why})"


def test_the_last_good_check_stays_where_trouble_began():
    loop = Loop(optimizer=torch.optim.SGD)
    for step in range(3):
        loop.monitor.record(step=step)
        loop.step()
    before = loop.monitor.snapshot.last_good_check
    assert (before.check, before.step) == (3, 2)
    assert before.timestamp == loop.monitor.snapshot.timestamp
    for spoil in (math.nan, 0.0, 0.0):
        assert loop.step(spoil).last_good_check == before


def test_closing_looks_a_last_time():
    loop = Loop(optimizer=torch.optim.SGD)
    loop.step(spoil=math.nan)
    loop.monitor.close()
    assert loop.monitor.snapshot.damage == "parameters"


def test_a_monitor_by_hand_has_a_verdict_too():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = GradientMonitor(model)
    for value in (math.nan, 0.0):
        optimizer.zero_grad()
        model(torch.ones(5, 3)).sum().backward()
        model[0].weight.grad[0, 0] += value
        monitor.update()
        optimizer.step()
    assert monitor.snapshot.damage == "parameters"


def test_a_state_that_cannot_be_looked_at_is_an_error_of_ours_and_training_goes_on(monkeypatch, caplog):
    from esper_telemetry.verdict import verdict

    def fail(*_):
        raise RuntimeError("cannot")

    monkeypatch.setattr(verdict, "list_state", fail)
    loop = Loop(clip=to_zero)
    loop.step(spoil=math.nan)
    snapshot = loop.step()
    assert snapshot.damage is None
    assert snapshot.checks == 2
    assert snapshot.monitor_errors > 0
    assert caplog.text.count("could not be scanned") == 1


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_a_cadence_that_is_none_is_refused(every):
    with pytest.raises(ValueError, match=f"damage_every: expected at least 1, got {every}"):
        watch(network(), damage_every=every)
