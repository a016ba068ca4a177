import copy
import gc
import logging
import math
import pickle
import re
import weakref

import pytest
import torch
from torch import nn

from esper_telemetry import GradientMonitor, GradientsCritical, HealthTier, PPOUpdatePayload, watch


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def backward(model, x=1.0):
    model(torch.full((5, 3), x)).sum().backward()


def spoil(model, layer, count=1, value=math.nan):
    """Return a `before_check` that writes bad elements into a layer's gradient."""
    parameter = dict(model.named_parameters())[layer]

    def write(_):
        parameter.grad.view(-1)[:count] = value

    return write


def test_nothing_is_measured_before_the_first_check():
    snapshot = GradientMonitor(network()).snapshot
    assert (snapshot.checks, snapshot.inf_grad_count, snapshot.nan_grad_count) == (0, 0, 0)
    assert snapshot.grad_norm is snapshot.elements is snapshot.timestamp is snapshot.dead_layers is None
    assert snapshot.origin_layer is None


def test_update_measures_what_is_there():
    model = network()
    monitor = GradientMonitor(model)
    backward(model)
    model[2].weight.grad[0, :2] = math.inf
    snapshot = monitor.update()
    assert snapshot is monitor.snapshot
    assert (snapshot.checks, snapshot.inf_grad_count, snapshot.nan_grad_count) == (1, 2, 0)
    assert snapshot.elements == sum(parameter.numel() for parameter in model.parameters())
    assert [(each.layer_name, each.inf_count, each.numel) for each in snapshot.layers] == [("2.weight", 2, 8)]
    assert snapshot.tier is HealthTier.WARNING


def test_a_healthy_norm_is_torchs_total_norm():
    model = network()
    monitor = watch(model)
    backward(model)
    assert monitor.snapshot.grad_norm == pytest.approx(nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())


def test_the_last_check_is_shown_and_history_is_kept():
    model = network()
    monitor = watch(model)
    backward(model, math.inf)
    assert monitor.snapshot.nan_grad_count > 5
    bad = monitor.snapshot.nan
    model.zero_grad()
    backward(model)
    snapshot = monitor.snapshot
    assert (snapshot.checks, snapshot.nan_grad_count, snapshot.layers) == (2, 0, ())
    assert snapshot.nan == bad
    assert snapshot.nonfinite_checks["nan", "critical"] == 1
    assert snapshot.origin_layer == bad.origin_layer


def test_a_model_without_gradients_is_a_check_of_0_elements():
    snapshot = GradientMonitor(network()).update()
    assert (snapshot.checks, snapshot.elements, snapshot.grad_norm) == (1, 0, 0.0)


def test_the_worst_layer_comes_first():
    model = network()
    monitor = GradientMonitor(model)
    backward(model)
    model[0].bias.grad[0] = math.nan
    model[2].weight.grad[:] = math.nan
    assert [each.layer_name for each in monitor.update().layers] == ["2.weight", "0.bias"]


class TestWatch:
    def test_looks_before_the_clip_turns_inf_into_nan(self):
        model = network()
        monitor = watch(model, before_check=spoil(model, "0.weight", 2, math.inf))
        backward(model)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        assert (monitor.snapshot.inf_grad_count, monitor.snapshot.nan_grad_count) == (2, 0)
        assert model[0].weight.grad.isnan().any()

    @pytest.mark.parametrize("set_to_none", [True, False])
    def test_each_backward_is_a_check_of_the_accumulated_gradient(self, set_to_none):
        model = network()
        monitor = watch(model)
        backward(model)
        once = monitor.snapshot.grad_norm
        backward(model)
        assert monitor.snapshot.grad_norm == pytest.approx(2 * once)
        model.zero_grad(set_to_none=set_to_none)
        backward(model)
        assert monitor.snapshot.grad_norm == pytest.approx(once)
        assert monitor.snapshot.checks == 3

    def test_a_retained_graph_is_checked_each_time(self):
        model = network()
        monitor = watch(model)
        loss = model(torch.ones(5, 3)).sum()
        loss.backward(retain_graph=True)
        loss.backward()
        assert monitor.snapshot.checks == 2

    def test_autograd_grad_touches_no_gradient_and_is_no_check(self):
        model = network()
        monitor = watch(model)
        torch.autograd.grad(model(torch.ones(5, 3)).sum(), list(model.parameters()))
        assert monitor.snapshot.checks == 0

    def test_a_backward_that_dies_half_way_does_not_end_watching(self):
        class Dies(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, grad):
                raise ZeroDivisionError

        model = network()
        monitor = watch(model)
        with pytest.raises(ZeroDivisionError):
            model[2](Dies.apply(model[0](torch.ones(1, 3)))).sum().backward()
        model.zero_grad()
        backward(model)
        assert monitor.snapshot.checks == 1

    def test_two_models_in_one_process_and_one_backward(self):
        one, two = network(), network()
        watch_one, watch_two = watch(one), watch(two)
        (one(torch.ones(1, 3)) + two(torch.full((1, 3), math.nan))).sum().backward()
        assert watch_one.snapshot.nan_grad_count == 0
        assert watch_two.snapshot.nan_grad_count > 0

    def test_two_monitors_on_one_model_do_not_disturb_each_other(self):
        model = network()
        one, two = watch(model), watch(model)
        backward(model)
        one.close()
        backward(model)
        assert (one.snapshot.checks, two.snapshot.checks) == (1, 2)

    def test_a_dict_of_networks_prefixes_layers_and_sums_counts(self):
        actor, critic = network(), network()
        monitor = watch({"actor": actor, "critic": critic})
        backward(actor, math.nan)
        actor_only = monitor.snapshot.nan_grad_count
        backward(critic, math.nan)
        assert monitor.snapshot.nan_grad_count == 2 * actor_only
        assert {each.layer_name.partition(".")[0] for each in monitor.snapshot.layers} == {"actor", "critic"}

    def test_a_parameter_that_was_replaced_is_found_again(self):
        model = network()
        monitor = watch(model)
        model[2] = nn.Linear(4, 2)
        gc.collect()
        backward(model)
        assert monitor.snapshot.elements == sum(parameter.numel() for parameter in model.parameters())
        backward(model)
        model[2].bias.grad[0] = math.nan
        assert monitor.update().origin_layer == "2.bias"


class TestOrigin:
    def test_is_the_bad_layer_that_gradients_reached_first(self):
        model = network()
        monitor = watch(model)
        backward(model, math.nan)
        assert monitor.snapshot.layers[0].layer_name == "0.weight"
        # The loss is NaN, so every layer is bad; the output's are nearest.
        assert monitor.snapshot.origin_layer.startswith("2.")

    def test_follows_the_real_order_and_not_the_registered_one(self):
        class Reversed(nn.Module):
            def __init__(self):
                super().__init__()
                self.output = nn.Linear(3, 1, bias=False)
                self.input = nn.Linear(3, 3, bias=False)

            def forward(self, x):
                return self.output(self.input(x))

        model = Reversed()
        monitor = GradientMonitor(model)
        model(torch.full((1, 3), math.nan)).sum().backward()
        assert monitor.update().origin_layer == "output.weight"

    def test_is_kept_per_kind(self):
        model = network()
        monitor = GradientMonitor(model)
        backward(model)
        model[0].weight.grad[0, 0] = math.inf
        model[2].bias.grad[0] = math.nan
        snapshot = monitor.update()
        assert (snapshot.inf.origin_layer, snapshot.nan.origin_layer) == ("0.weight", "2.bias")
        assert snapshot.origin_layer == "2.bias"

    def test_without_a_backward_pass_is_the_last_registered(self):
        model = network()
        monitor = GradientMonitor(model)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, math.nan)
        assert monitor.update().origin_layer == "2.bias"


class TestLeavesTheModelAlone:
    def test_close_leaves_it_exactly_as_it_was(self):
        model = network()
        before = [dict(vars(module)) for module in model.modules()]
        monitor = watch(model, optimizer=(optimizer := torch.optim.SGD(model.parameters(), 0.1)), on_critical="skip")
        backward(model)
        monitor.close()
        monitor.close()
        assert [dict(vars(module)) for module in model.modules()] == before
        assert all(parameter._post_accumulate_grad_hooks is None for parameter in model.parameters())
        assert not optimizer._optimizer_step_pre_hooks
        backward(model)
        assert monitor.snapshot.checks == 1
        assert monitor.snapshot.ended

    def test_a_dead_model_is_not_kept_alive(self):
        model = network()
        monitor = watch(model)
        backward(model)
        dead = [weakref.ref(each) for each in (model, *model.parameters())]
        del model
        gc.collect()
        assert [reference() for reference in dead] == [None] * len(dead)
        assert monitor.update().elements == 0

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_a_copy_is_whole_and_not_watched(self, duplicate):
        model = network()
        monitor = watch(model)
        backward(model)
        twin = duplicate(model)
        backward(twin)
        assert monitor.snapshot.checks == 1
        assert torch.equal(twin[0].weight, model[0].weight)

    def test_training_is_bit_equal_with_and_without_it(self):
        losses = []
        for watched in (False, True):
            model = network()
            optimizer = torch.optim.Adam(model.parameters())
            if watched:
                watch(model)
            for step in range(20):
                optimizer.zero_grad()
                loss = model(torch.full((4, 3), step / 10)).square().sum()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                losses.append(loss.item())
        assert losses[:20] == losses[20:]


class TestOnCritical:
    def test_skip_leaves_parameters_and_optimizer_state_bit_equal(self):
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), weight_decay=0.1)
        monitor = watch(model, optimizer=optimizer, on_critical="skip")
        for x in (1.0, math.nan, 1.0):
            before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            optimizer.zero_grad()
            backward(model, x)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            after = (model.state_dict(), optimizer.state_dict())
            assert _equal(before, after) == math.isnan(x)
        assert monitor.snapshot.skipped_updates == {"amp": 0, "intervention": 1, "rewind": 0}

    def test_a_warning_is_not_skipped(self):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        monitor = watch(model, optimizer=optimizer, on_critical="skip", before_check=spoil(model, "0.weight", 5))
        backward(model)
        optimizer.step()
        assert monitor.snapshot.skipped_updates["intervention"] == 0
        assert int(model[0].weight.isnan().sum()) == 5

    def test_halt_raises_out_of_backward_after_the_snapshot_is_out(self):
        model = network()
        seen = []
        monitor = watch(model, on_critical="halt", before_check=spoil(model, "2.weight", 6, math.inf))
        monitor.on_check(seen.append)
        with pytest.raises(GradientsCritical, match=r"check 1: Inf 6, NaN 0 .* first in 2\.weight"):
            backward(model)
        assert seen == [monitor.snapshot]

    def test_a_callable_decides(self):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        seen = []
        monitor = GradientMonitor(
            model, optimizer=optimizer, on_critical=lambda snapshot: seen.append(snapshot.checks) or "skip"
        )
        backward(model, math.nan)
        monitor.update()
        optimizer.step()
        assert seen == [1]
        assert not model[0].weight.isnan().any()


class TestClip:
    @pytest.mark.parametrize("bad", [None, math.inf, math.nan])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    def test_clips_bit_equal_to_torch_and_is_the_check(self, dtype, bad):
        ours, torchs = network().to(dtype), network().to(dtype)
        monitor = GradientMonitor(ours)
        for model in (ours, torchs):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 0.3)
            if bad is not None:
                model[2].weight.grad[0, 1] = bad
        norm = monitor.clip_grad_norm_(0.5)
        expected = nn.utils.clip_grad_norm_(torchs.parameters(), 0.5)
        assert torch.equal(norm.nan_to_num(nan=-1), expected.nan_to_num(nan=-1))
        for our, their in zip(ours.parameters(), torchs.parameters(), strict=True):
            assert torch.equal(our.grad.view(torch.uint8), their.grad.view(torch.uint8))
        snapshot = monitor.snapshot
        assert snapshot.checks == 1
        assert (snapshot.inf_grad_count, snapshot.nan_grad_count) == (bad == math.inf, bad is math.nan)

    def test_refuses_a_non_finite_norm_as_torch_does_after_it_was_counted(self):
        model = network()
        monitor = GradientMonitor(model)
        backward(model, math.nan)
        with pytest.raises(RuntimeError, match="is non-finite, so it cannot be clipped"):
            monitor.clip_grad_norm_(1.0, error_if_nonfinite=True)
        assert monitor.snapshot.nan_grad_count > 5

    @pytest.mark.parametrize("options", [{"norm_type": 1.0}, {"norm_type": math.inf}, {"foreach": False}])
    def test_takes_torchs_other_arguments(self, options):
        ours, torchs = network(), network()
        monitor = GradientMonitor(ours)
        for model in (ours, torchs):
            backward(model)
        expected = nn.utils.clip_grad_norm_(torchs.parameters(), 0.5, **options)
        assert torch.equal(monitor.clip_grad_norm_(0.5, **options), expected)
        assert torch.equal(ours[0].weight.grad, torchs[0].weight.grad)
        assert monitor.snapshot.checks == 1

    def test_gradients_of_several_dtypes_are_clipped_and_counted_too(self):
        ours, torchs = network(), network()
        monitor = GradientMonitor(ours)
        for model in (ours, torchs):
            model[0].double()
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
        expected = nn.utils.clip_grad_norm_(torchs.parameters(), 0.5)
        assert torch.equal(monitor.clip_grad_norm_(0.5), expected)
        assert monitor.snapshot.checks == 1

    def test_a_monitor_that_measures_by_itself_does_not_measure_twice(self):
        model = network()
        monitor = watch(model)
        backward(model)
        monitor.clip_grad_norm_(0.5)
        assert monitor.snapshot.checks == 1
        assert torch.cat([parameter.grad.view(-1) for parameter in model.parameters()]).norm().item() <= 0.5001

    def test_without_gradients_returns_what_torch_returns(self):
        assert GradientMonitor(network()).clip_grad_norm_(1.0) == nn.utils.clip_grad_norm_([], 1.0)


class TestNeverRaises:
    def test_a_fault_of_ours_is_counted_and_logged_once(self, caplog):
        model = network()

        def fails(_):
            raise OSError("disk on fire")

        monitor = watch(model, before_check=fails)
        with caplog.at_level(logging.ERROR):
            backward(model)
            backward(model)
        assert (monitor.snapshot.checks, monitor.snapshot.monitor_errors) == (0, 2)
        assert len(caplog.records) == 1

    def test_a_listener_that_fails_hurts_neither_training_nor_the_others(self):
        model = network()
        monitor, seen = watch(model), []

        def fails(_):
            raise RuntimeError

        monitor.on_check(fails)
        stop = monitor.on_check(seen.append)
        backward(model)
        stop()
        backward(model)
        assert [snapshot.checks for snapshot in seen] == [1]
        assert monitor.snapshot.monitor_errors == 2


def test_full_statistics_come_at_the_first_check_then_at_their_cadence_and_at_once_when_bad():
    model = network()
    monitor = GradientMonitor(model, statistics_every=3)
    dead = []
    for check in range(1, 7):
        for parameter in model.parameters():  # one more layer dies with each check
            parameter.grad = torch.ones_like(parameter)
        for parameter in list(model.parameters())[:check]:
            parameter.grad.zero_()
        if check in (2, 3):
            model[2].bias.grad[0] = math.nan
        dead.append(monitor.update().dead_layers)
    # Looked at: 1, the first; 2, where trouble begins; 4, due. Not 3, which is still the same trouble.
    assert dead == [1, 2, 2, 4, 4, 4]


def test_a_ppo_update_is_part_of_the_snapshot():
    monitor = GradientMonitor(network())
    payload = PPOUpdatePayload(2, 1, 1, 3, 0.5, None, None, None, None, None, None, None)
    monitor.record_ppo_update(payload)
    assert monitor.snapshot.ppo is payload


def test_a_payload_without_counts_cannot_be_built():
    with pytest.raises(TypeError, match="inf_grad_count"):
        PPOUpdatePayload(update=1, episodes=1, update_seconds=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_critical": "panic"}, "on_critical: expected one of continue, skip, halt, rewind or a callable"),
        ({"on_critical": "skip"}, "on_critical: 'skip' expects optimizer="),
        ({"optimizer": [1]}, "optimizer: expected a torch.optim.Optimizer, got int"),
        ({"statistics_every": 0}, "statistics_every: expected at least 1, got 0"),
        ({"recent_window_seconds": math.nan}, "recent_window_seconds: expected seconds above 0, got nan"),
    ],
)
def test_bad_input_is_said_at_set_up(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        watch(network(), **options)


def _equal(one, two):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(_equal(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(_equal, one, two))
    return one == two
