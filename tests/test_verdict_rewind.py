"""Rewind: a run whose model was damaged goes on as if it had never seen the batch that did it."""

import copy
import logging
import math
import re

import pytest
import torch
from torch import nn

from esper_telemetry import GradientMonitor, GradientsCritical, watch

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW, amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "Adam, fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "RMSprop, centered": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5),
}


def network(norm=False):
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(8)] if norm else []
    return nn.Sequential(nn.Linear(3, 8), *middle, nn.Tanh(), nn.Linear(8, 4))


class Run:
    """Train over 20 batches, of which some are poisoned, or left out."""

    def __init__(self, poisoned=(), left_out=(), optimizer=OPTIMIZERS["Adam"], norm=False, model=None, **options):
        self.model = model or network(norm)
        self.optimizer = optimizer(self.model.parameters())
        self.forward = self.model
        self.monitor = watch(self.model, optimizer=self.optimizer, on_critical="rewind", **options)
        batches = torch.rand(20, 5, 3, generator=torch.Generator().manual_seed(1))
        for number, batch in enumerate(batches):
            if number not in left_out:
                self.step(batch * (math.nan if number in poisoned else 1.0))

    def step(self, batch):
        self.optimizer.zero_grad()
        self.forward(batch).square().sum().backward()
        self.optimizer.step()
        return self.monitor.snapshot

    def state(self):
        """Return every bit of the model and of the optimizer."""
        kept = [*self.model.state_dict().items()]
        for index, parameter in enumerate(self.model.parameters()):
            kept += [(f"{index}.{key}", value) for key, value in self.optimizer.state[parameter].items()]
        return {name: torch.as_tensor(value).numpy().tobytes() for name, value in kept}

    @property
    def rewinds(self):
        assert self.monitor.snapshot.monitor_errors == 0
        return self.monitor.snapshot.skipped_updates["rewind"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("every", [1, 7, 100])
def test_it_is_bit_equal_to_a_run_that_never_saw_the_batch(optimizer, every):
    run = Run({9}, optimizer=optimizer, rewind_every=every)
    never = Run(left_out={9}, optimizer=optimizer, rewind_every=every)
    assert (run.rewinds, never.rewinds) == (1, 0)
    assert run.state() == never.state()
    assert run.monitor.snapshot.damage == "intact"


def test_the_first_batch_of_all_may_be_the_bad_one():
    assert Run({0}).state() == Run(left_out={0}).state()


def test_running_statistics_are_put_back_too():
    run, never = Run({9}, norm=True, rewind_every=1), Run(left_out={9}, norm=True, rewind_every=1)
    assert run.rewinds == 1
    assert run.state() == never.state()


def test_between_two_copies_running_statistics_are_those_of_the_last_good_copy():
    run, never = Run({9}, norm=True, rewind_every=5), Run(left_out={9}, norm=True)
    unequal = {name for name, value in run.state().items() if value != never.state()[name]}
    assert unequal == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert all(each.isfinite().all() for each in run.model.state_dict().values())


def test_several_bad_batches_are_each_undone():
    assert Run({4, 9, 15}).state() == Run(left_out={4, 9, 15}).state()


def test_it_trains_what_no_copy_had_yet():
    """The optimizer has no state when the first copy is made."""
    run = Run({1}, rewind_every=100)
    assert run.state() == Run(left_out={1}).state()


def test_a_bad_gradient_that_does_no_harm_is_no_reason_to_go_back():
    model = network()
    hooked = []

    def to_zero(optimizer, *_):
        hooked.append([each.grad.nan_to_num_(0.0) for group in optimizer.param_groups for each in group["params"]])

    def make(parameters):
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        optimizer.register_step_pre_hook(to_zero)
        return optimizer

    run = Run({9}, model=model, optimizer=make)
    assert run.monitor.snapshot.nan.critical_checks == 1
    assert run.rewinds == 0


def test_a_warning_that_damages_is_undone_too():
    model = network()

    def spoil(check):
        if check == 10:
            model[0].weight.grad[0, 0] = math.nan

    run = Run(model=model, before_check=spoil)
    assert run.monitor.snapshot.nan.warning_checks == 1
    assert run.rewinds == 1
    assert run.state() == Run(left_out={9}).state()


def test_where_no_hook_can_be_the_damage_is_seen_at_the_next_check_and_its_step_is_dropped():
    torch._dynamo.reset()
    model = network()
    model.compile(backend="eager")
    run = Run({9}, model=model)
    assert run.rewinds == 1
    assert run.monitor.snapshot.skipped_updates["intervention"] == 1
    assert run.monitor.snapshot.damage == "intact"
    torch._dynamo.reset()
    never = network()
    never.compile(backend="eager")
    assert run.state() == Run(left_out={9, 10}, model=never).state()


def test_damage_that_no_gradient_has_made_is_undone_at_the_slow_cadence():
    run = Run(rewind_every=5, damage_every=5)
    with torch.no_grad():
        run.optimizer.state[run.model[0].weight]["exp_avg_sq"][0, 0] = math.inf
    for _ in range(5):
        run.step(torch.ones(5, 3))
    assert run.rewinds == 1
    assert run.monitor.snapshot.damage == "intact"


def test_after_so_many_times_the_run_is_halted():
    with pytest.raises(GradientsCritical, match="critical gradients at check 14"):
        Run({4, 9, 12}, max_rewinds=2)


def test_the_schedule_goes_on():
    run = Run({9})
    run.optimizer.param_groups[0]["lr"] = 0.5
    run.step(torch.full((5, 3), math.nan))
    run.model(torch.ones(1, 3))
    assert run.rewinds == 2
    assert run.optimizer.param_groups[0]["lr"] == 0.5


def test_what_an_optimizer_counts_in_its_groups_is_put_back():
    class Counting(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                group["k"] = group.get("k", 0) + 1
                for parameter in group["params"]:
                    parameter -= 0.1 / group["k"] * parameter.grad

    def make(parameters):
        return Counting(parameters, {})

    run, never = Run({9}, optimizer=make), Run(left_out={9}, optimizer=make)
    assert run.rewinds == 1
    assert run.state() == never.state()
    assert run.optimizer.param_groups[0]["k"] == never.optimizer.param_groups[0]["k"] == 19


def test_copies_that_an_optimizer_steps_are_put_back():
    model = network()
    masters = [each.detach().clone().double().requires_grad_() for each in model.parameters()]
    optimizer = torch.optim.SGD(masters, lr=0.1, momentum=0.9)
    monitor = watch(model, optimizer=optimizer, on_critical="rewind")
    before = copy.deepcopy(masters)
    for value in (math.nan, 1.0):
        model.zero_grad()
        model(torch.ones(5, 3) * value).sum().backward()
        if value != 1.0:
            for master, parameter in zip(masters, model.parameters(), strict=True):
                master.grad = parameter.grad.double()
            optimizer.step()
    assert monitor.snapshot.skipped_updates["rewind"] == 1
    assert all(torch.equal(master, kept) for master, kept in zip(masters, before, strict=True))


def test_gradients_that_accumulate_wait_for_their_step():
    def train(poisoned):
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        monitor = watch(model, optimizer=optimizer, on_critical="rewind")
        for number, batch in enumerate(torch.rand(16, 5, 3, generator=torch.Generator().manual_seed(1))):
            if number // 4 == 2 and not poisoned:
                continue
            model(batch * (math.nan if number == 9 else 1.0)).sum().backward()
            if number % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()
        assert monitor.snapshot.skipped_updates["rewind"] == poisoned
        return [each.detach().numpy().tobytes() for each in model.parameters()]

    assert train(True) == train(False)


def test_set_up_says_what_it_takes(caplog):
    with caplog.at_level(logging.WARNING):
        Run(rewind_every=50)
    [line] = [each.getMessage() for each in caplog.records]
    assert "keeps a copy in host memory: 0.0 MiB now" in line
    assert "for Adam, twice the 68 parameters" in line
    assert "every 50 checks" in line


def test_it_keeps_no_model_alive():
    import gc
    import weakref

    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    monitor = GradientMonitor(model, optimizer=optimizer, on_critical="rewind")
    model(torch.ones(5, 3)).sum().backward()
    monitor.update()
    optimizer.step()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    monitor.close()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rewind_every": 0}, "rewind_every: expected at least 1, got 0"),
        ({"max_rewinds": 0}, "max_rewinds: expected at least 1, got 0"),
        ({"optimizer": None}, "on_critical: 'rewind' expects optimizer=, whose steps it drops, and none was given"),
    ],
)
def test_what_cannot_work_is_refused_at_set_up(options, reason):
    model = network()
    given = {"optimizer": torch.optim.Adam(model.parameters())} | options
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}$"):
        watch(model, on_critical="rewind", **given)


def test_an_optimizer_whose_steps_cannot_be_undone_is_refused():
    model = network()
    with pytest.raises(ValueError, match="on_critical: 'rewind' cannot drop a step of LBFGS"):
        watch(model, optimizer=torch.optim.LBFGS(model.parameters()), on_critical="rewind")


def test_one_of_several_ranks_does_not_go_back_by_itself(monkeypatch):
    from esper_telemetry.monitor import rewinding

    monkeypatch.setattr(rewinding, "several", lambda: True)
    model = network()
    with pytest.raises(ValueError, match="'rewind' expects a single rank: each would go back on its own"):
        watch(model, optimizer=torch.optim.Adam(model.parameters()), on_critical="rewind")
