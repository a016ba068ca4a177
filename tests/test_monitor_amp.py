import copy
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.amp import GradScaler

from esper_telemetry import GradientMonitor, GradientsCritical, HealthTier, watch

OPTIMIZERS = {
    "for-loop": partial(torch.optim.Adam, lr=1e-3, foreach=False),
    "foreach": partial(torch.optim.Adam, lr=1e-3, foreach=True),
    "fused": partial(torch.optim.Adam, lr=1e-3, fused=True),
}
each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)


class Loop:
    """A training loop with a GradScaler, whose gradients overflow on demand."""

    def __init__(self, optimizer=OPTIMIZERS["foreach"], clip=False, watch_options=None, **options):
        torch.manual_seed(0)
        self.model = nn.Linear(4, 3)
        self.optimizer = optimizer(self.model.parameters())
        self.scaler = GradScaler("cpu", **options)
        self.monitor = watch(
            self.model,
            optimizer=self.optimizer,
            scaler=self.scaler,
            before_check=self._spoil,
            **(watch_options or {}),
        )
        self.overflow = 0
        self.spoil = None
        self._clip = clip

    def _spoil(self, _):
        self.model.weight.grad.view(-1)[: self.overflow] = math.inf
        if self.spoil is not None:
            self.spoil()

    def step(self, overflow=0):
        self.overflow = overflow
        self.optimizer.zero_grad()
        self.scaler.scale(self.model(torch.ones(2, 4)).sum()).backward()
        if self._clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return self.monitor.snapshot


def by_hand(scale=1024.0):
    """Return a model with scaled gradients, its optimizer, its scaler and its true norm."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    model(torch.ones(2, 4)).sum().backward()
    norm = nn.utils.get_total_norm([each.grad for each in model.parameters()]).item()
    model.zero_grad()
    scaler = GradScaler("cpu", init_scale=scale)
    scaler.scale(model(torch.ones(2, 4)).sum()).backward()
    return model, torch.optim.SGD(model.parameters(), 1e-3), scaler, norm


def test_norms_are_what_the_optimizer_would_see():
    loop = Loop(init_scale=1024.0)
    snapshot = loop.step()
    loop.model.zero_grad()
    loop.model(torch.ones(2, 4)).sum().backward()
    expected = nn.utils.get_total_norm([each.grad for each in loop.model.parameters()]).item()
    assert snapshot.grad_norm == pytest.approx(expected)


def test_layers_do_not_explode_because_they_are_scaled():
    assert Loop(init_scale=2.0**16).step().exploding_layers == 0


@each_optimizer
@pytest.mark.parametrize("clip", [False, True])
def test_an_overflow_that_the_scaler_handles_is_a_skip_and_no_tier(optimizer, clip):
    loop = Loop(optimizer, clip, init_scale=2.0**16)
    loop.step()
    snapshot = loop.step(overflow=7)
    assert snapshot.tier is HealthTier.HEALTHY
    assert snapshot.inf.critical_checks == 0
    snapshot = loop.step()
    assert snapshot.skipped_updates["amp"] == 1
    assert (snapshot.amp.scale, snapshot.amp.consecutive_skips) == (2.0**15, 1)
    assert loop.step().amp.consecutive_skips == 0


@each_optimizer
@pytest.mark.parametrize(("options", "limit"), [({}, 8), ({"max_amp_skips": 3}, 3), ({"max_amp_skips": 0}, 0)])
def test_a_streak_of_more_than_the_limit_counts_in_full(optimizer, options, limit):
    loop = Loop(optimizer, watch_options=options, init_scale=2.0**16)
    loop.step()
    tiers = [loop.step(overflow=7).tier for _ in range(12)]
    assert tiers == [HealthTier.HEALTHY] * limit + [HealthTier.CRITICAL] * (12 - limit)
    assert loop.monitor.snapshot.inf_grad_count == 7
    loop.step()
    assert loop.step(overflow=7).tier is (HealthTier.HEALTHY if limit else HealthTier.CRITICAL)


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


def test_a_streak_is_one_of_steps_and_not_of_accumulated_checks():
    loop = Loop(init_scale=2.0**16)
    loop.step()
    worst = []
    for _ in range(9):
        loop.overflow = 7
        loop.optimizer.zero_grad()
        for _ in range(4):
            loop.scaler.scale(loop.model(torch.ones(2, 4)).sum()).backward()
            worst.append(loop.monitor.snapshot.inf_grad_count)
        loop.scaler.step(loop.optimizer)
        loop.scaler.update()
    assert worst == [0] * 32 + [7] * 4


def train_in_fp16(steps, diverge_at=None):
    """Train a small network in fp16 for real; the scaler begins too high and probes every 200 steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    scaler = GradScaler("cpu", init_scale=65536.0, growth_interval=200)
    monitor, seen = watch(model, scaler=scaler), []
    monitor.on_check(seen.append)
    x, y = torch.randn(64, 32, 8), torch.randn(64, 32, 1)
    for step in range(steps):
        if step == diverge_at:
            with torch.no_grad():
                model[2].weight[0, 0] = math.nan
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = nn.functional.mse_loss(model(x[step % 64]).float(), y[step % 64])
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    monitor.close()
    return seen, monitor.snapshot


@pytest.fixture
def one_thread():
    """Threads that wait for each other take minutes over small tensors while other tests run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_5000_healthy_steps_in_fp16_have_no_warning():
    seen, last = train_in_fp16(5000)
    assert len(seen) == last.checks == 5000
    assert last.nonfinite_checks == dict.fromkeys(last.nonfinite_checks, 0)
    assert last.skipped_updates["amp"] >= 5  # or nothing was put to the test
    assert any(not math.isfinite(snapshot.grad_norm) for snapshot in seen)


def test_a_run_that_diverges_is_critical_within_the_limit():
    seen, last = train_in_fp16(40, diverge_at=20)
    critical = [snapshot.checks for snapshot in seen if snapshot.tier is HealthTier.CRITICAL]
    assert critical == list(range(21 + 8, 41))
    assert last.amp.consecutive_skips == 20
    assert last.nan.origin_layer.startswith("2.")


def test_the_last_skip_is_counted_too():
    loop = Loop(init_scale=2.0**16)
    loop.step()
    loop.step(overflow=7)
    loop.monitor.close()
    assert loop.monitor.snapshot.skipped_updates["amp"] == loop.monitor.snapshot.amp.consecutive_skips == 1


def test_a_scale_that_was_loaded_from_a_checkpoint_is_no_skip():
    loop = Loop(init_scale=2.0**16)
    loop.scaler.load_state_dict(GradScaler("cpu", init_scale=4.0).state_dict())
    loop.step()
    assert loop.step().skipped_updates["amp"] == 0


def test_elements_that_unscaling_makes_inf_are_counted():
    loop = Loop(init_scale=2.0**-4)
    loop.step()
    loop.spoil = lambda: loop.model.weight.grad.view(-1)[:3].fill_(1e38)
    snapshot = loop.step()
    assert (snapshot.inf_grad_count, snapshot.layers[0].layer_name) == (3, "weight")
    assert snapshot.skipped_updates["amp"] == 0  # the scaler saw nothing
    assert int((~loop.model.weight.isfinite()).sum()) == 3


class TestByHand:
    @pytest.mark.parametrize("with_optimizer", [True, False])
    def test_update_is_right_before_and_after_unscale(self, with_optimizer):
        model, optimizer, scaler, norm = by_hand()
        monitor = GradientMonitor(model, optimizer=optimizer if with_optimizer else None, scaler=scaler)
        assert monitor.update().grad_norm == pytest.approx(norm)
        scaler.unscale_(optimizer)
        assert monitor.update().grad_norm == pytest.approx(norm)

    def test_the_scaler_may_come_with_the_first_update(self):
        model, optimizer, scaler, _ = by_hand()
        model.weight.grad[0, 0] = math.inf
        monitor = GradientMonitor(model)
        assert monitor.update(scaler=scaler).inf_grad_count == 0
        scaler.step(optimizer)
        scaler.update()
        snapshot = monitor.update(scaler=scaler)
        assert snapshot.amp.scale == 512.0
        with pytest.raises(ValueError, match="scaler: expected the GradScaler that this monitor already follows"):
            monitor.update(scaler=GradScaler("cpu"))

    def test_what_is_no_scaler_is_refused(self):
        with pytest.raises(ValueError, match=r"scaler: expected a torch\.amp\.GradScaler, got str"):
            GradientMonitor(nn.Linear(1, 1)).update(scaler="fp16")

    @pytest.mark.parametrize("with_optimizer", [True, False])
    def test_an_overflow_found_by_unscale_is_the_scalers(self, with_optimizer):
        model, optimizer, scaler, _ = by_hand()
        model.weight.grad.fill_(math.inf)
        monitor = GradientMonitor(model, optimizer=optimizer if with_optimizer else None, scaler=scaler)
        scaler.unscale_(optimizer)
        assert monitor.update().inf_grad_count == 0

    @pytest.mark.parametrize("with_optimizer", [True, False])
    def test_what_turned_bad_after_unscale_is_stepped_with_and_counts(self, with_optimizer):
        model, optimizer, scaler, _ = by_hand()
        monitor = GradientMonitor(model, optimizer=optimizer if with_optimizer else None, scaler=scaler)
        scaler.unscale_(optimizer)
        model.weight.grad[0] = math.nan
        assert monitor.update().nan_grad_count == 4
        scaler.step(optimizer)
        assert int(model.weight.isnan().sum()) == 4


class TestTwoOptimizersWithOneScaler:
    def losses(self, **options):
        torch.manual_seed(0)
        self.models = {"one": nn.Linear(4, 3), "two": nn.Linear(4, 3)}
        self.optimizers = [torch.optim.SGD(each.parameters(), 1e-3, **options) for each in self.models.values()]
        self.scaler = GradScaler("cpu", init_scale=1024.0)
        self.monitor = watch(self.models, optimizer=self.optimizers, scaler=self.scaler)
        return [self.scaler.scale(each(torch.ones(2, 4)).sum()) for each in self.models.values()]

    def true_norms(self):
        grads = [
            torch.autograd.grad(each(torch.ones(2, 4)).sum(), [*each.parameters()]) for each in self.models.values()
        ]
        return [each.norm().item() for grad in grads for each in grad]

    @pytest.mark.parametrize("fused", [False, True])
    def test_each_gradient_is_divided_by_what_it_is_still_multiplied_by(self, fused):
        one, two = self.losses(fused=fused)
        norms = self.true_norms()
        one.backward()
        self.scaler.step(self.optimizers[0])
        for parameter in self.models["one"].parameters():
            parameter.grad = parameter.grad.clone()
        two.backward()
        assert self.monitor.snapshot.layer_norms == pytest.approx(norms)
        self.scaler.unscale_(self.optimizers[1])
        assert self.monitor.update().layer_norms == pytest.approx(norms)

    def test_what_a_later_pass_leaves_in_a_stepped_one_is_scaled_again(self):
        one, _ = self.losses()
        one.backward()
        self.scaler.step(self.optimizers[0])
        inner, outer = self.models["two"], self.models["one"]
        self.scaler.scale(outer(torch.tanh(inner(torch.ones(2, 4)) @ torch.ones(3, 4))).sum()).backward()
        scaled = [parameter.grad.norm().item() for model in (outer, inner) for parameter in model.parameters()]
        assert self.monitor.snapshot.layer_norms == pytest.approx([each / 1024 for each in scaled])

    def test_one_overflow_is_one_skip_and_explained(self):
        one, two = self.losses()
        one.backward()
        two.backward()
        with torch.no_grad():
            self.models["two"].weight.grad.fill_(math.inf)
        assert self.monitor.update().inf_grad_count == 0
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        self.monitor.close()
        assert self.monitor.snapshot.skipped_updates["amp"] == 1


class TestOnCritical:
    def state(self, loop):
        return copy.deepcopy((loop.model.state_dict(), loop.optimizer.state_dict()))

    @each_optimizer
    def test_skip_leaves_all_as_it_was_and_the_scaler_in_its_right_state(self, optimizer):
        loop = Loop(optimizer, watch_options={"on_critical": "skip", "max_amp_skips": 0}, init_scale=2.0**16)
        plain = Loop(optimizer, init_scale=2.0**16)
        for overflow in (0, 7, 0, 7, 7, 0):
            loop.step(overflow)
            plain.step(overflow)
            assert loop.scaler.state_dict() == plain.scaler.state_dict()
            assert loop.monitor.snapshot.skipped_updates["intervention"] == 0
            assert str(self.state(loop)) == str(self.state(plain))  # the scaler skipped these by itself

    @each_optimizer
    def test_skip_drops_what_the_scaler_does_not_see(self, optimizer):
        loop = Loop(optimizer, watch_options={"on_critical": "skip"}, init_scale=2.0**-4)
        loop.step()
        before = self.state(loop)
        loop.spoil = lambda: loop.model.weight.grad.fill_(1e38)
        assert loop.step().skipped_updates["intervention"] == 1
        assert str(self.state(loop)) == str(before)

    def test_halt_waits_for_a_streak_that_is_not_explained(self):
        loop = Loop(watch_options={"on_critical": "halt"}, init_scale=2.0**16)
        loop.step()
        for _ in range(8):
            loop.step(overflow=7)
        with pytest.raises(GradientsCritical, match="Inf 7"):
            loop.step(overflow=7)
        assert copy.deepcopy(loop.scaler).get_scale() == loop.scaler.get_scale() == 2.0**8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: following a scaler on one did not run")
def test_following_reads_no_more_from_a_device_than_the_scaler_does():
    model = nn.Linear(4, 3, device="cuda")
    scaler = GradScaler("cuda", init_scale=1024.0)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)  # never reads from the device itself
    monitor = watch(model, scaler=scaler)
    for step in range(20):
        torch.cuda.set_sync_debug_mode("error" if step >= 5 else "default")
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 4, device="cuda")).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    torch.cuda.set_sync_debug_mode("default")
    monitor.close()
    assert (monitor.snapshot.checks, monitor.snapshot.monitor_errors) == (20, 0)
    assert monitor.snapshot.amp.scale == 1024.0


@pytest.mark.parametrize("reads", ["get_scale", "state_dict"])
def test_what_is_read_is_what_the_scaler_says_but_without_asking_it(reads, monkeypatch):
    loop = Loop(init_scale=2.0**16, growth_interval=3)
    loop.step()
    asked = getattr(GradScaler, reads)
    for overflow in (0, 0, 7, 0, 7, 7, 0, 0, 0, 0):
        scale = loop.scaler.state_dict()["scale"]
        monkeypatch.setattr(GradScaler, reads, None)
        snapshot = loop.step(overflow)
        monkeypatch.setattr(GradScaler, reads, asked)
        assert (snapshot.amp.scale, snapshot.monitor_errors) == (scale, 0)


def test_a_disabled_scaler_explains_nothing():
    loop = Loop(enabled=False)
    snapshot = loop.step(overflow=7)
    assert snapshot.inf_grad_count == 7
    assert snapshot.amp is None


def test_what_is_no_scaler_is_refused():
    with pytest.raises(ValueError, match=r"scaler: expected a torch\.amp\.GradScaler, got float"):
        watch(nn.Linear(1, 1), scaler=1.0)


def test_a_limit_of_skips_is_at_least_0():
    with pytest.raises(ValueError, match="max_amp_skips: expected at least 0, got -1"):
        watch(nn.Linear(1, 1), max_amp_skips=-1)


class TestWhatTheScalerDoesNotStep:
    """A generator in mixed precision, a discriminator in plain float32."""

    def networks(self, **options):
        torch.manual_seed(0)
        self.models = {"G": nn.Linear(4, 3), "D": nn.Linear(4, 3)}
        self.of_g, self.of_d = (torch.optim.SGD(each.parameters(), 1e-3) for each in self.models.values())
        self.scaler = GradScaler("cpu", init_scale=1024.0)
        chosen = {name: getattr(self, value) for name, value in options.items()}
        self.monitor = watch(self.models, scaler=self.scaler, **chosen)

    def step_d(self, bad=0):
        self.of_d.zero_grad()
        self.models["D"](torch.ones(2, 4)).sum().backward()
        counted = self.monitor.snapshot.nan_grad_count
        if bad:
            self.models["D"].weight.grad.view(-1)[:bad] = math.nan
            counted = self.monitor.update().nan_grad_count
        self.of_d.step()
        return counted

    def step_g(self):
        self.of_g.zero_grad()
        self.scaler.scale(self.models["G"](torch.ones(2, 4)).sum()).backward()
        self.scaler.step(self.of_g)
        self.scaler.update()

    def test_counts_in_full_and_is_not_divided_where_the_optimizers_are_known(self):
        self.networks(optimizer="of_g")
        self.step_g()
        assert self.step_d(bad=9) == 9
        self.models["G"].zero_grad()
        self.models["D"].load_state_dict(nn.Linear(4, 3).state_dict())
        self.step_d()
        norm = nn.utils.get_total_norm([each.grad for each in self.models["D"].parameters()]).item()
        assert self.monitor.snapshot.grad_norm == pytest.approx(norm)

    def test_counts_at_the_next_check_where_they_are_not_known(self):
        self.networks()
        self.step_g()
        assert self.step_d(bad=9) == 0
        self.step_g()
        assert self.monitor.snapshot.nan_grad_count == 9
        assert self.monitor.snapshot.origin_layer == "D.weight"
        assert self.monitor.snapshot.nan.critical_checks == 1

    def test_an_optimizer_that_holds_copies_says_nothing(self):
        self.networks(optimizer="of_g")
        copies = torch.optim.SGD(nn.Linear(4, 3).parameters(), 0.1)
        monitor = GradientMonitor(self.models["G"], scaler=self.scaler, optimizer=copies)
        self.step_g()
        self.models["G"].weight.grad.fill_(math.inf)
        assert monitor.update().inf_grad_count == 0


class TestASkipThatDoesNotCome:
    def overflow(self, **options):
        loop = Loop(init_scale=2.0**16, **options)
        loop.step()
        loop.overflow = 7
        loop.optimizer.zero_grad()
        loop.scaler.scale(loop.model(torch.ones(2, 4)).sum()).backward()
        assert loop.monitor.snapshot.inf_grad_count == 0
        loop.overflow = 0
        return loop

    def test_leaves_an_overflow_that_counts_at_the_next_check(self):
        loop = self.overflow()
        snapshot = loop.step()  # zero_grad() came instead of step()
        assert (snapshot.inf_grad_count, snapshot.inf.critical_checks) == (7, 1)
        assert [(each.layer_name, each.inf_count, each.numel) for each in snapshot.layers] == [("weight", 7, 12)]
        assert loop.step().inf_grad_count == 0

    def test_leaves_an_overflow_that_counts_when_the_run_ends(self):
        loop = self.overflow()
        loop.optimizer.zero_grad()
        loop.monitor.close()
        assert loop.monitor.snapshot.inf.critical_checks == 1
        assert loop.monitor.snapshot.recent.read(0.0).inf_max == 7

    def test_leaves_an_overflow_that_was_stepped_with(self):
        loop = self.overflow()
        loop.optimizer.step()  # without the scaler
        loop.overflow = 7
        loop.scaler.scale(loop.model(torch.ones(2, 4)).sum()).backward()
        assert loop.monitor.snapshot.inf_grad_count == 7

    def test_may_come_after_any_number_of_micro_batches(self):
        loop = self.overflow()
        for _ in range(20):
            loop.scaler.scale(loop.model(torch.ones(2, 4)).sum()).backward()
            assert loop.monitor.snapshot.inf_grad_count == 0
        loop.scaler.step(loop.optimizer)
        loop.scaler.update()
        snapshot = loop.step()
        assert (snapshot.inf_grad_count, snapshot.skipped_updates["amp"]) == (0, 1)
        loop.monitor.close()
        assert loop.monitor.snapshot.inf.critical_checks == 0

    def test_is_known_to_come_once_unscale_has_found_the_overflow(self):
        loop = self.overflow()
        loop.scaler.unscale_(loop.optimizer)
        nn.utils.clip_grad_value_(loop.model.parameters(), 1.0)
        assert loop.monitor.update().inf_grad_count == 0
        loop.scaler.step(loop.optimizer)
        loop.scaler.update()
        assert loop.step().inf_grad_count == 0


def test_by_hand_the_first_update_after_unscale_is_of_unscaled_gradients():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    scaler = GradScaler("cpu", init_scale=1024.0)
    monitor = GradientMonitor(model, optimizer=optimizer, scaler=scaler)
    for _ in range(2):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 4)).sum()).backward()
        scaler.unscale_(optimizer)  # in place, and without a new version of the gradient
        norm = nn.utils.get_total_norm([each.grad for each in model.parameters()]).item()
        assert monitor.update().grad_norm == pytest.approx(norm)
        scaler.step(optimizer)
        scaler.update()


@settings(max_examples=60)
@given(
    steps=st.lists(st.tuples(st.sampled_from("GD"), st.integers(0, 9)), min_size=1, max_size=12),
    known=st.booleans(),
    drops=st.booleans(),
)
def test_what_no_skip_explains_is_counted_and_what_one_does_is_not(steps, known, drops):
    """G is stepped by a scaler and D is not; `drops` leaves out D's step, as a loop does that finds its loss bad."""
    torch.manual_seed(0)
    models = {"G": nn.Linear(4, 3), "D": nn.Linear(4, 3)}
    optimizers = {name: torch.optim.SGD(each.parameters(), 1e-3) for name, each in models.items()}
    scaler = GradScaler("cpu", init_scale=2.0**40)
    bad = [0]
    monitor = watch(
        models,
        scaler=scaler,
        optimizer=optimizers["G"] if known else None,
        before_check=lambda _: models[name].weight.grad.view(-1)[: bad[0]].fill_(math.nan),
    )
    for name, bad[0] in steps:
        model, optimizer = models[name], optimizers[name]
        clean = copy.deepcopy(model.state_dict())
        loss = model(torch.ones(2, 4)).sum()
        (scaler.scale(loss) if name == "G" else loss).backward()
        if name == "G":
            scaler.step(optimizer)
            scaler.update()
        elif not drops:
            optimizer.step()
        optimizer.zero_grad()
        model.load_state_dict(clean)
    monitor.close()
    assert monitor.snapshot.nan.elements == sum(count for name, count in steps if name == "D")
    assert monitor.snapshot.monitor_errors == 0
