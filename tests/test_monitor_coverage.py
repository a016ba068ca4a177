"""Every gradient that arrives is measured, or the check says that it was not."""

import copy
import math
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from esper_telemetry import GradientMonitor, HealthTier, watch


def network(hidden=()):
    """Return a network whose first and third modules, and as many between as `hidden` has widths, can be trained."""
    torch.manual_seed(0)
    between = [layer for width in hidden for layer in (nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 3))]
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), *between)


def numel(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def backward(model):
    model(torch.ones(2, 4)).sum().backward()


def spoil_next(parameter, count=3, value=math.nan):
    """Make the next gradient that reaches a parameter bad; return a list that has an item when this is done."""
    done = []

    def hook(gradient):
        handle.remove()
        done.append(1)
        gradient = gradient.clone()
        gradient.view(-1)[:count] = value
        return gradient

    parameter._backward_hooks = None  # swap_tensors leaves a dict that torch does not know any more
    handle = parameter.register_hook(hook)
    return done


BEGIN_AT_ONCE = """
import threading, torch
from esper_telemetry import watch

def train(model):
    ready.wait()
    for _ in range(3):
        model(torch.ones(2, 4)).sum().backward()

checks = 0
for _ in range(500):
    models = {name: torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3))) for name in "ab"}
    monitor = watch(models)
    ready = threading.Barrier(2)
    threads = [threading.Thread(target=train, args=(model,)) for model in models.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    checks += monitor.snapshot.checks
print(checks, "checks")
"""


class Idle(torch.optim.Optimizer):
    """Step, and change nothing."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self, closure=None):
        pass


def node_of(parameter):
    return parameter.expand_as(parameter).grad_fn.next_functions[0][0]


def move_to_main_grad(parameter, when=lambda: True):
    """Move each gradient elsewhere and set `.grad` None, from a hook of the node that accumulates it."""
    node = node_of(parameter)

    def move(*_):
        if when():
            parameter.main_grad = parameter.grad
            parameter.grad = None

    node.register_hook(move)
    return node  # has to be kept alive


class TestGradientsThatOthersTakeAway:
    def test_by_a_hook_of_the_node_are_counted_with_kind_and_layer(self):
        model = network()
        nodes = [move_to_main_grad(parameter) for parameter in model.parameters()]
        monitor = watch(model)
        for step in range(1, 5):
            if step == 3:
                spoil_next(model[0].weight)
            backward(model)
            snapshot = monitor.snapshot
            assert (snapshot.checks, snapshot.elements) == (step, numel(model))
            assert snapshot.nan_grad_count == (3 if step == 3 else 0)
            assert snapshot.unmeasured_layers == ()
        assert snapshot.origin_layer == "0.weight"
        assert nodes

    def test_by_a_hook_on_another_parameter_are_counted(self):
        model = network()

        def free_all(_):
            for parameter in model.parameters():
                parameter.grad = None

        model[0].bias.register_post_accumulate_grad_hook(free_all)
        monitor = watch(model)
        for step in range(3):
            spoil_next(model[2].weight, count=2, value=math.inf)
            backward(model)
            assert monitor.snapshot.inf_grad_count == 2, step
            assert monitor.snapshot.unmeasured_layers == ()

    def test_for_the_first_time_are_named_as_unmeasured_and_never_a_calm_zero(self):
        model = network()
        monitor = watch(model)
        backward(model)
        assert monitor.snapshot.tier is HealthTier.HEALTHY
        taking = False
        nodes = [move_to_main_grad(parameter, lambda: taking) for parameter in model.parameters()]
        model.zero_grad()
        taking = True
        backward(model)
        snapshot = monitor.snapshot
        assert snapshot.unmeasured_layers == ("2.bias", "2.weight", "0.bias", "0.weight")
        assert (snapshot.elements, snapshot.tier) == (0, HealthTier.WARNING)
        assert snapshot.recent.read(0.0).unmeasured_max == 4
        spoil_next(model[0].weight)
        backward(model)
        snapshot = monitor.snapshot
        assert (snapshot.unmeasured_layers, snapshot.nan_grad_count) == ((), 3)
        assert nodes

    def test_only_at_the_last_micro_batch_are_counted_where_the_hook_can_be_seen(self):
        model = network()
        batch = 0

        def free(parameter):
            if batch % 4 == 0:
                parameter.grad = None

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(free)
        monitor = watch(model)
        for batch in range(1, 9):
            if batch == 8:
                spoil_next(model[2].bias)
            backward(model)
            assert monitor.snapshot.nan_grad_count == (3 if batch == 8 else 0)
            assert monitor.snapshot.unmeasured_layers == ()
            assert monitor.snapshot.elements == numel(model)

    def test_and_zeroed_behind_torchs_back_are_counted(self):
        model = network()

        def move(*_):
            model[0].weight.main_grad = model[0].weight.grad.clone()
            model[0].weight.grad.data.zero_()

        node = node_of(model[0].weight)
        node.register_hook(move)
        monitor = watch(model)
        backward(model)
        spoil_next(model[0].weight)
        backward(model)
        assert monitor.snapshot.nan_grad_count == 3
        assert node

    @pytest.mark.parametrize("value", [math.inf, -math.inf])
    def test_and_clipped_on_arrival_keep_their_kind(self, value):
        model = network()
        model[0].weight.register_post_accumulate_grad_hook(lambda each: nn.utils.clip_grad_value_([each], 1.0))
        monitor = watch(model)
        for _ in range(2):
            model.zero_grad()
            spoil_next(model[0].weight, 1, value)
            backward(model)
            assert (monitor.snapshot.inf_grad_count, monitor.snapshot.nan_grad_count) == (1, 0)

    def test_by_a_hook_that_cannot_be_seen_and_mostly_changes_nothing_are_measured_each_time(self):
        model = network()
        node = node_of(model[0].weight)
        node.register_hook(lambda *_: nn.utils.clip_grad_value_([model[0].weight], 1e6))
        monitor = watch(model)
        for step in range(5):
            model.zero_grad()
            if step == 4:
                spoil_next(model[0].weight, 1, math.inf)
            backward(model)
            assert monitor.snapshot.unmeasured_layers == ()
            assert monitor.snapshot.inf_grad_count == (step == 4)
        assert node

    def test_that_a_hook_makes_bad_are_counted_too(self):
        model = network()

        def overflow(parameter):
            parameter.grad.mul_(1e38).mul_(1e38)

        model[2].bias.register_post_accumulate_grad_hook(overflow)
        monitor = watch(model)
        for _ in range(3):
            model.zero_grad()
            backward(model)
            assert monitor.snapshot.inf_grad_count == 3

    def test_with_harmless_hooks_are_read_once(self):
        model = network()
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda _: None)
        monitor = watch(model)
        backward(model)
        read = []
        scan = monitor._checks.scan
        monitor._checks.scan = lambda gradients: read.extend(g for g in gradients if g is not None) or scan(gradients)
        backward(model)
        assert len(read) == len(list(model.parameters()))
        assert monitor.snapshot.elements == numel(model)

    def test_and_never_came_into_a_monitor_used_by_hand_are_unmeasured(self):
        model = network()
        monitor = GradientMonitor(model)
        backward(model)
        monitor.update()
        model.zero_grad()
        backward(model)
        model.zero_grad()
        assert set(monitor.update().unmeasured_layers) == {"0.weight", "0.bias", "2.weight", "2.bias"}

    def test_by_a_loop_that_updates_now_and_then_are_no_trouble(self):
        model = network()
        monitor = GradientMonitor(model)
        for step in range(1, 9):
            model.zero_grad()
            (model[2] if step % 2 else model)(torch.ones(2, 5 if step % 2 else 4)).sum().backward()
            if step % 3 == 0:
                assert monitor.update().unmeasured_layers == ()


class Changes:
    """What the owner of a model may do to it between two steps."""

    @staticmethod
    def replace_a_head(model):
        model[2] = nn.Linear(5, 3)

    @staticmethod
    def add_a_module(model):
        model.append(nn.Linear(3, 3))

    @staticmethod
    def add_a_module_in_pieces(model):
        model.append(nn.Sequential())
        model[-1].append(nn.Linear(3, 3))

    @staticmethod
    def replace_everything(model):
        for index in (0, 2):
            model[index] = copy.deepcopy(model[index])

    @staticmethod
    def assign_a_state_dict(model):
        state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(state, assign=True)

    @staticmethod
    def write_into_the_dict(model):
        model[0]._parameters["weight"] = nn.Parameter(model[0].weight.detach().clone())

    @staticmethod
    def write_a_module_into_the_dict(model):
        model._modules["2"] = nn.Linear(5, 3)

    @staticmethod
    def parametrize_a_weight(model):
        parametrize.register_parametrization(model[0], "weight", nn.Identity())

    @staticmethod
    def swap_tensors(model):
        torch.utils.swap_tensors(model[2].weight, nn.Parameter(torch.randn(3, 5)))

    @staticmethod
    def freeze_a_layer(model):
        model[2].requires_grad_(False)

    @staticmethod
    def unfreeze_all(model):
        model.requires_grad_(True)

    @staticmethod
    def drop_a_bias(model):
        model[0].bias = None

    @staticmethod
    def nothing(model):
        pass


ALL = [change for name, change in vars(Changes).items() if not name.startswith("_")]
each_change = pytest.mark.parametrize("change", [each.__func__ for each in ALL], ids=lambda change: change.__name__)


def trainable(model):
    return {name: each for name, each in model.named_parameters() if each.requires_grad}


def is_counted_in_full(model, monitor, layer):
    """Spoil a layer, make a pass, and compare what is said with what is there."""
    model.zero_grad()
    spoil_next(trainable(model)[layer])
    backward(model)
    snapshot = monitor.snapshot
    assert snapshot.unmeasured_layers == ()
    assert snapshot.elements == numel(model)
    assert snapshot.nan_grad_count == 3
    assert [each.layer_name for each in snapshot.layers] == [layer]
    assert snapshot.monitor_errors == 0


class TestModelsThatChange:
    @each_change
    @pytest.mark.parametrize("first", [True, False], ids=["first layer", "last layer"])
    def test_the_very_next_backward_is_counted_in_full(self, change, first):
        model = network()
        monitor = watch(model)
        backward(model)
        change(model)
        layer = list(trainable(model))[0 if first else -1]
        is_counted_in_full(model, monitor, layer)
        is_counted_in_full(model, monitor, layer)
        assert monitor.snapshot.checks == 3

    def test_unfreezing_in_stages(self):
        model = network()
        model[0].requires_grad_(False)
        monitor = watch(model)
        is_counted_in_full(model, monitor, "2.weight")
        model[0].requires_grad_(True)
        model[2].requires_grad_(False)
        is_counted_in_full(model, monitor, "0.weight")

    @pytest.mark.parametrize("way", ["swap", "overwrite"])
    def test_a_conversion_that_changes_every_parameter_is_noticed_at_the_step_at_the_latest(self, way):
        set_way = getattr(torch.__future__, f"set_{way}_module_params_on_conversion")
        model = network()
        monitor = watch(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        backward(model)
        optimizer.step()
        set_way(True)
        try:
            model.double()
        finally:
            set_way(False)
        optimizer = torch.optim.SGD(model.parameters(), 0.1) if way == "overwrite" else optimizer
        for step in range(2):
            optimizer.zero_grad()
            spoil_next(model[0].weight)
            model(torch.ones(2, 4, dtype=torch.float64)).sum().backward()
            optimizer.step()
            assert (monitor.snapshot.checks, monitor.snapshot.nan_grad_count >= 3) == (2 + step, True)

    def test_the_last_trainable_parameter_replaced_behind_torchs_back_is_noticed_at_the_step(self):
        model = network()
        monitor = watch(model)
        Changes.freeze_a_layer(model)
        Changes.drop_a_bias(model)
        Changes.write_into_the_dict(model)
        for step in range(2):
            model.zero_grad()
            spoil_next(model[0].weight)
            backward(model)
            Idle(model.parameters()).step()
            assert (monitor.snapshot.checks, monitor.snapshot.nan_grad_count) == (1 + step, 3)

    def test_what_was_added_later_is_measured_as_it_arrives_too(self):
        model = network()
        monitor = watch(model)
        backward(model)
        model[2] = nn.Linear(5, 3)
        nodes = [move_to_main_grad(parameter) for parameter in model[2].parameters()]
        spoil_next(model[2].weight)
        backward(model)
        assert monitor.snapshot.nan_grad_count == 3
        assert nodes

    def test_what_was_taken_out_is_left_alone(self):
        model = network()
        old = model[2]
        monitor = watch(model)
        model[2] = nn.Linear(5, 3)
        backward(model)
        assert not old.weight._post_accumulate_grad_hooks
        old(torch.ones(1, 5)).sum().backward()
        assert monitor.snapshot.checks == 1

    @settings(max_examples=60)
    @given(data=st.data())
    def test_whatever_happens_a_bad_element_is_counted_or_its_layer_is_unmeasured(self, data):
        model = network(data.draw(st.lists(st.integers(1, 6), max_size=3)))
        monitor = watch(model)
        nodes = []
        for _ in range(data.draw(st.integers(1, 5))):
            change = data.draw(st.sampled_from([*(each.__func__ for each in ALL), take_away, hook_harmlessly]))
            try:
                nodes.append(change(model))
            except (IndexError, KeyError, AttributeError, RuntimeError):
                continue  # it was done before, or cannot be done to what has become of the model
            layers = trainable(model)
            if not layers:
                model.requires_grad_(True)
                layers = trainable(model)
            layer = data.draw(st.sampled_from(sorted(layers)))
            value = data.draw(st.sampled_from([math.inf, -math.inf, math.nan]))
            for parameter in model.parameters():
                parameter.grad = None
            spoilt = spoil_next(layers[layer], 1, value)
            checks = monitor.snapshot.checks
            backward(model)
            if monitor.snapshot.checks == checks:  # the last trainable parameter was replaced behind torch's back
                Idle(model.parameters()).step()
            snapshot = monitor.snapshot
            assert snapshot.checks == checks + 1
            assert snapshot.monitor_errors == 0
            if spoilt and layer not in snapshot.unmeasured_layers:
                assert [each.layer_name for each in snapshot.layers] == [layer]
                counts = (snapshot.inf_grad_count, snapshot.nan_grad_count)
                assert counts == ((0, 1) if math.isnan(value) else (1, 0))


def take_away(model):
    """Make a layer's gradients go away as they arrive."""
    return move_to_main_grad(next(iter(trainable(model).values())))


def hook_harmlessly(model):
    next(iter(trainable(model).values())).register_post_accumulate_grad_hook(lambda _: None)


class TestNotInTheWay:
    def test_parameters_can_be_swapped_while_watched_and_after(self):
        model = network()
        monitor = watch(model)
        backward(model)
        model.zero_grad()
        torch.utils.swap_tensors(model[0].weight, nn.Parameter(torch.zeros(5, 4)))
        monitor.close()
        torch.utils.swap_tensors(model[0].weight, nn.Parameter(torch.zeros(5, 4)))

    def test_two_threads_train_two_models_of_one_watch(self):
        models = {"a": network(), "b": network()}
        monitor = watch(models)
        expected = 60

        def train(name):
            optimizer = torch.optim.SGD(models[name].parameters(), 1e-3)
            for step in range(expected):
                optimizer.zero_grad()
                if step % 10 == 0:
                    spoil_next(models[name][0].weight, 2, math.inf)
                backward(models[name])

        threads = [threading.Thread(target=train, args=(name,)) for name in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        snapshot = monitor.snapshot
        assert (snapshot.checks, snapshot.monitor_errors) == (2 * expected, 0)
        assert (snapshot.inf.elements, snapshot.inf.warning_checks) == (2 * 2 * expected / 10, 2 * expected / 10)

    def test_two_threads_that_begin_at_once_do_not_crash(self):
        command = [sys.executable, "-c", BEGIN_AT_ONCE]
        assert subprocess.run(command, capture_output=True, text=True, check=False).stdout == "3000 checks\n"

    def test_a_monitor_closed_while_another_thread_trains_leaves_torchs_hooks_alone(self):
        model = network()
        monitor = watch(model)
        thread = threading.Thread(target=backward, args=(model,))
        thread.start()
        thread.join()
        hooks = model[0].weight._post_accumulate_grad_hooks
        monitor.close()
        assert model[0].weight._post_accumulate_grad_hooks is hooks
        assert not hooks

    def test_a_thread_that_follows_another_sees_everything(self):
        models = {"a": network(), "b": network()}
        monitor = watch(models)
        for name in models:
            thread = threading.Thread(target=backward, args=(models[name],))
            thread.start()
            thread.join()
        assert monitor.snapshot.elements == 2 * numel(models["a"])

    def test_a_refused_watch_leaves_nothing_behind(self):
        model = nn.Sequential(nn.Linear(4, 5), nn.LazyLinear(3))
        optimizer = torch.optim.SGD(model[0].parameters(), 0.1)
        with pytest.raises(ValueError, match=r"^model: expected parameters that have a shape, got '1\.weight'"):
            watch(model, optimizer=optimizer, on_critical="skip")
        assert model[0].weight._post_accumulate_grad_hooks is None
        assert not optimizer._optimizer_step_pre_hooks
        backward(model)

    def test_plain_tensors_are_forgotten_at_the_end(self):
        tensor = torch.ones(2, requires_grad=True)
        with watch({"alpha": tensor, "policy": network()}) as monitor:
            (tensor * math.inf).sum().backward()
        assert monitor.snapshot.inf_grad_count == 2
        assert monitor.snapshot.origin_layer == "alpha"
        assert tensor._post_accumulate_grad_hooks is None
        assert monitor._gathering.watched._roots.keys() == {"policy"}


class TestWhatIsWatched:
    def test_a_model_without_anything_to_train_is_said(self, caplog):
        watch(network().requires_grad_(False))
        assert [record.message for record in caplog.records] == [
            "esper: nothing is measured: none of the model's 4 parameters is trainable"
        ]

    def test_a_second_watch_is_said(self, caplog):
        model = network()
        first = watch(model)
        assert not caplog.records
        watch(model)
        assert [record.message for record in caplog.records] == [
            "esper: this model is already watched; each monitor measures separately until its close()"
        ]
        first.close()

    def test_wrappers_do_not_stand_in_names_and_can_be_used_all_the_same(self):
        class Wrapped(nn.Module):
            def __init__(self, inner):
                super().__init__()
                self._forward_module = inner

            def forward(self, x):
                return self._forward_module(x)

        model = Wrapped(nn.DataParallel(network()))
        monitor = watch(model, heads={"out": "_forward_module.module.2", "in": "0"})
        backward(model)
        assert monitor.snapshot.layer_names == ("0.weight", "0.bias", "2.weight", "2.bias")
        assert all(head.norm for head in monitor.snapshot.heads.values())

    def test_a_module_of_ones_own_that_is_called_module_keeps_its_name(self):
        class Own(nn.Module):
            def __init__(self):
                super().__init__()
                self.module = nn.Linear(4, 3)

        assert watch(Own())._gathering.watched.names == ("module.weight", "module.bias")

    def test_a_tied_layer_is_known_by_each_of_its_names(self):
        model = nn.ModuleDict({"embedding": nn.Linear(4, 4, bias=False), "output": nn.Linear(4, 4, bias=False)})
        model["output"].weight = model["embedding"].weight
        monitor = watch(model, heads={"lm": "output"})
        spoil_next(model["output"].weight)
        model["output"](model["embedding"](torch.ones(1, 4))).sum().backward()
        assert monitor.snapshot.heads["lm"].nan_latched
        assert monitor.snapshot.elements == 16

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            ({"alpha": torch.ones(2, requires_grad=True) * 2}, "model: expected a leaf tensor for 'alpha'"),
            ({"alpha": 3}, "model: expected a torch.nn.Module or a tensor for 'alpha', got int"),
            ({}, "model: expected a torch.nn.Module or a dict of them, got dict"),
            (3, "model: expected a torch.nn.Module or a dict of them, got int"),
        ],
    )
    def test_what_is_no_model_is_told_in_one_line(self, model, message):
        with pytest.raises(ValueError, match=message):
            watch(model)


class TestPause:
    def test_passes_that_are_not_training_are_no_checks(self):
        model = network()
        monitor = watch(model)
        with monitor.pause():
            backward(model)
        monitor.pause()
        backward(model)
        monitor.resume()
        assert monitor.snapshot.checks == 0
        model.zero_grad()
        backward(model)
        assert (monitor.snapshot.checks, monitor.snapshot.unmeasured_layers) == (1, ())

    def test_a_with_block_closes_unless_the_run_died_in_it(self):
        model = network()
        with watch(model) as monitor:
            backward(model)
        assert monitor.snapshot.ended
        with pytest.raises(ZeroDivisionError), watch(model) as monitor:
            raise ZeroDivisionError
        assert not monitor.snapshot.ended
        assert model[0].weight._post_accumulate_grad_hooks is None
