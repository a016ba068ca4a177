"""The loops that people have, as docs/loops.md shows them."""

import copy
import logging
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from esper_telemetry import GradientMonitor, GradientsCritical, HealthTier, watch
from tests.documents import blocks, without_our_lines
from tests.monitors import learned

PLAIN = {
    "Gradient accumulation": 12,
    "Mixed precision": 12,
    "torch.compile": 12,
    "Activation checkpointing": 12,
    "An optimizer in backward": 12,
    "Update as you go": 12,
    "LoRA and unfreezing": 12,
    "A model that changes": 12,
    "Passes that are not training": 12,
    "Gradients by hand": 12,
    "torch.func": 12,
    "Intervention": 12,
    "Closures": None,
    "Several optimizers": 24,
}
"""Loops of docs/loops.md, and how many checks they make of 12 batches."""

CHANGING = ("LoRA and unfreezing", "A model that changes")

AT = {"LoRA and unfreezing": 1, "Passes that are not training": 14}
"""How often a gradient reaches the body's first layer up to check 7, where it is not once in each."""

each_loop = pytest.mark.parametrize("loop", PLAIN)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        self.head = nn.Linear(6, 6)

    def forward(self, x):
        return self.head(self.body(x))


def spoil(parameter, value, at):
    """Write one bad element into the gradient that reaches a parameter for the `at`-th time."""
    arrivals = []

    def hook(gradient):
        arrivals.append(1)
        if len(arrivals) == at:
            gradient = gradient.clone()
            gradient.view(-1)[3] = value
        return gradient

    parameter.register_hook(hook)


class Run:
    """Run a loop of the documentation."""

    def __init__(self, code, monkeypatch, spoiled=None, value=math.inf, at=1):
        torch.manual_seed(0)
        models = {name: Network() for name in ("model", "generator", "discriminator")}
        self.seen, self.losses = [], []
        self.layers = {f"{name}.{layer}": each for name in models for layer, each in models[name].named_parameters()}
        if spoiled is not None:
            spoil(self.layers[spoiled], value, at)
        init = GradientMonitor.__init__

        def init_and_listen(monitor, *args, **options):
            init(monitor, *args, **options)
            monitor.on_check(self.seen.append)

        monkeypatch.setattr(GradientMonitor, "__init__", init_and_listen)
        batches = list(torch.randn(12, 5, 6))
        self.names = {"torch": torch, "batches": batches, "loss_of": self.loss_of, **models}
        exec(code, self.names)
        monkeypatch.undo()

    def loss_of(self, model, batch):
        loss = model(batch).square().mean()
        if not torch._C._functorch.is_functorch_wrapped_tensor(loss):
            self.losses.append(loss.item())
        return loss

    @property
    def bad(self):
        return [snapshot for snapshot in self.seen if snapshot.tier is not HealthTier.HEALTHY]


@each_loop
def test_a_healthy_loop_stays_healthy_and_is_bit_equal_without_our_lines(loop, monkeypatch):
    code = blocks()[loop]
    run, plain = Run(code, monkeypatch), Run(without_our_lines(code), monkeypatch)
    assert not run.bad
    assert not plain.seen
    assert run.losses == plain.losses
    for name, parameter in run.layers.items():
        assert torch.equal(parameter, plain.layers[name]), name
    assert not torch.equal(run.layers["model.head.bias"], Network().head.bias)  # it did train
    if PLAIN[loop] is not None:
        assert len(run.seen) == PLAIN[loop]
    elements = sum(parameter.numel() for parameter in Network().parameters())
    if loop not in CHANGING:
        assert {snapshot.elements for snapshot in run.seen} <= {elements, 2 * elements}
    assert not any(snapshot.unmeasured_layers for snapshot in run.seen)
    assert run.seen[-1].monitor_errors == 0


@pytest.mark.parametrize(("kind", "value"), [("inf", -math.inf), ("nan", math.nan)])
@pytest.mark.parametrize("loop", [each for each in PLAIN if each not in ("torch.func", "Mixed precision")])
def test_one_bad_element_is_named_with_its_kind_layer_and_check(loop, kind, value, monkeypatch):
    network = "generator" if loop == "Several optimizers" else "model"
    run = Run(blocks()[loop], monkeypatch, f"{network}.body.0.weight", value, at=AT.get(loop, 7))
    first = run.bad[0]
    # The generator's gradients arrive in every second pass.
    assert first.checks == (14 if loop == "Several optimizers" else 7)
    assert (first.inf_grad_count, first.nan_grad_count) == ((1, 0) if kind == "inf" else (0, 1))
    prefix = "generator." if loop == "Several optimizers" else ""
    assert [layer.layer_name for layer in first.layers] == [f"{prefix}body.0.weight"]
    assert first.origin_layer == f"{prefix}body.0.weight"
    assert getattr(first, kind).warning_checks == 1
    assert first.monitor_errors == 0


def test_a_bad_element_that_torch_func_computed_is_named(monkeypatch):
    code = blocks()["torch.func"].replace(
        "parameter.grad = gradients[name]", "parameter.grad = spoilt(name, gradients)"
    )
    calls = []

    def spoilt(name, gradients):
        calls.append(name)
        if name == "body.0.weight" and calls.count(name) == 7:
            gradients[name][0, 3] = math.nan
        return gradients[name]

    monkeypatch.setattr("builtins.spoilt", spoilt, raising=False)
    first = Run(code, monkeypatch).bad[0]
    assert (first.checks, first.nan_grad_count, first.origin_layer) == (7, 1, "body.0.weight")


def test_one_bad_element_in_mixed_precision_is_a_skip_of_the_scaler(monkeypatch):
    run = Run(blocks()["Mixed precision"], monkeypatch, "model.body.0.weight", math.nan, at=7)
    assert not run.bad
    assert [snapshot.skipped_updates["amp"] for snapshot in run.seen] == [0] * 7 + [1] * 5
    assert run.layers["model.body.0.weight"].isfinite().all()


def test_a_bad_micro_batch_stays_until_zero_grad(monkeypatch):
    code = blocks()["Gradient accumulation"].replace("optimizer.step()\n", "pass\n")
    run = Run(code, monkeypatch, "model.body.0.weight", math.nan, at=6)
    assert [snapshot.checks for snapshot in run.bad] == [6, 7, 8]
    assert run.bad[-1].nan.elements == 3


def test_lbfgs_is_checked_at_each_call_of_its_closure(monkeypatch):
    run = Run(blocks()["Closures"], monkeypatch)
    assert len(run.seen) == len(run.losses) > 12


@pytest.mark.parametrize("watched", ["model", "compiled"])
def test_a_compiled_model_has_the_same_layer_names(watched, monkeypatch):
    code = blocks()["torch.compile"].replace("monitor = watch(model)\n", "")
    code = code.replace("optimizer =", f"monitor = watch({watched})\noptimizer =")
    run = Run(code, monkeypatch, "model.head.bias", math.nan, at=3)
    assert (run.bad[0].checks, run.bad[0].origin_layer) == (3, "head.bias")


class TestCheckpointing:
    @pytest.mark.parametrize("reentrant", [True, False])
    @pytest.mark.parametrize("whole", [True, False])
    def test_one_backward_is_one_check_of_everything(self, reentrant, whole):
        torch.manual_seed(0)
        model = Network()
        monitor = watch(model)
        parts = [model.body[0], model.body[1:], *([model.head] if whole else [])]
        for step in range(1, 4):
            model.zero_grad()
            x = torch.ones(2, 6, requires_grad=True)
            for part in parts:
                x = checkpoint(part, x, use_reentrant=reentrant)
            (x if whole else model.head(x)).sum().backward()
            norm = nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()]).item()
            assert monitor.snapshot.checks == step
            assert monitor.snapshot.grad_norm == pytest.approx(norm)
            assert monitor.snapshot.elements == sum(parameter.numel() for parameter in model.parameters())

    def test_passes_within_passes_within_passes_are_one_check(self):
        model = Network()
        monitor = watch(model)

        def inner(x):
            return checkpoint(model.head, checkpoint(model.body, x, use_reentrant=True), use_reentrant=True)

        for step in range(1, 4):
            x = torch.ones(2, 6, requires_grad=True)
            checkpoint(inner, checkpoint(inner, x.sin(), use_reentrant=True), use_reentrant=True).sum().backward()
            assert monitor.snapshot.checks == step

    def test_a_pass_that_dies_within_a_pass_does_not_end_watching(self):
        model = Network()
        monitor = watch(model)
        dying = model.body[0].weight.register_hook(lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            checkpoint(model, torch.ones(2, 6, requires_grad=True), use_reentrant=True).sum().backward()
        dying.remove()
        assert monitor.snapshot.checks == 0
        checkpoint(model, torch.ones(2, 6, requires_grad=True), use_reentrant=True).sum().backward()
        assert monitor.snapshot.checks == 1


class TestOptimizerInBackward:
    def loop(self, before=False, free=True, **options):
        """Return a model whose gradients are stepped with as they come, and its monitor."""
        torch.manual_seed(0)
        model = Network()
        monitor = watch(model, **options) if before else None
        optimizers = {parameter: torch.optim.SGD([parameter], 0.01) for parameter in model.parameters()}

        def step(parameter):
            optimizers[parameter].step()
            if free:
                parameter.grad = None

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(step)
        return model, monitor or watch(model, **options)

    @pytest.mark.parametrize("before", [True, False])
    @pytest.mark.parametrize("free", [True, False])
    def test_nothing_is_lost_whichever_hook_came_first(self, before, free):
        model, monitor = self.loop(before, free)
        clean = nn.utils.get_total_norm(torch.autograd.grad(model(torch.ones(2, 6)).sum(), [*model.parameters()]))
        spoil(model.body[2].bias, math.nan, at=2)
        for step in range(1, 3):
            model.zero_grad()
            model(torch.ones(2, 6)).sum().backward()
            snapshot = monitor.snapshot
            assert (snapshot.checks, snapshot.monitor_errors) == (step, 0)
            assert snapshot.elements == sum(parameter.numel() for parameter in model.parameters())
            if step == 1:
                assert snapshot.grad_norm == pytest.approx(clean.item())
        assert [(each.layer_name, each.nan_count, each.numel) for each in snapshot.layers] == [("body.2.bias", 1, 6)]
        assert snapshot.origin_layer == "body.2.bias"

    def test_another_monitor_is_no_reason_to_measure_twice(self):
        model = Network()
        monitors = [learned(watch(model)), learned(watch(model))]
        scanned = []
        for monitor in monitors:
            scan = monitor._checks.scan
            monitor._checks.scan = lambda gradients, scan=scan: scanned.append(len(gradients)) or scan(gradients)
        model(torch.ones(2, 6)).sum().backward()
        assert scanned == [6, 6]

    def test_a_step_that_was_made_is_not_skipped_later(self, caplog):
        model, monitor = self.loop(
            on_critical=lambda _: "skip", optimizer=torch.optim.SGD([nn.Parameter(torch.ones(1))])
        )
        with caplog.at_level(logging.ERROR):
            for _ in range(2):
                model(torch.full((2, 6), math.nan)).sum().backward()
        assert monitor.snapshot.skipped_updates["intervention"] == 0
        assert [record.message for record in caplog.records] == [
            "esper: the optimizer steps during backward(), so no step can be skipped; use 'halt'"
        ]

    def test_halt_comes_when_the_pass_is_over(self):
        model, monitor = self.loop(on_critical="halt")
        with pytest.raises(GradientsCritical, match="check 1:"):
            model(torch.full((2, 6), math.nan)).sum().backward()
        assert monitor.snapshot.checks == 1

    def test_by_hand_update_counts_what_arrived(self):
        model, monitor = self.loop()
        monitor.close()
        monitor = GradientMonitor(model)
        model(torch.full((2, 6), math.nan)).square().sum().backward()
        assert monitor.update().nan_grad_count == sum(parameter.numel() for parameter in model.parameters())

    def test_a_clip_by_hand_is_torchs(self):
        ours, torchs = Network(), Network()
        torchs.load_state_dict(ours.state_dict())
        for model in (ours, torchs):
            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(lambda _: None)
        monitor = GradientMonitor(ours)
        for model in (ours, torchs):
            model(torch.ones(2, 6)).sum().backward()
        norm = monitor.clip_grad_norm_(0.1)
        assert torch.equal(norm, nn.utils.clip_grad_norm_(torchs.parameters(), 0.1))
        assert torch.equal(ours.head.weight.grad, torchs.head.weight.grad)
        assert monitor.snapshot.grad_norm == pytest.approx(norm.item())

    def test_a_recorder_is_content_without_what_was_freed(self, tmp_path):
        model, monitor = self.loop(record_dir=tmp_path)
        model(torch.full((2, 6), math.nan)).sum().backward()
        monitor.close()
        assert monitor.snapshot.monitor_errors == 0
        assert len(list(tmp_path.iterdir())) == 1


class TestSkip:
    def train(self, make, *, closure, bad_at=3, **options):
        torch.manual_seed(0)
        model = Network()
        optimizer = make(model.parameters())
        monitor = watch(model, optimizer=optimizer, on_critical="skip", **options)
        states = []
        for step in range(5):

            def backward(step=step):
                optimizer.zero_grad()
                loss = model(torch.full((2, 6), math.nan if step == bad_at else float(step))).square().sum()
                loss.backward()
                return loss

            if closure:
                optimizer.step(backward)
            else:
                backward()
                optimizer.step()
            states.append(str(copy.deepcopy((model.state_dict(), optimizer.state_dict()))))
        return states, monitor.snapshot

    @pytest.mark.parametrize("closure", [True, False])
    @pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
    def test_leaves_everything_bit_equal_with_and_without_a_closure(self, make, closure):
        states, snapshot = self.train(make, closure=closure)
        assert states[3] == states[2]
        assert len(set(states)) == 4
        assert snapshot.skipped_updates["intervention"] == 1

    def test_schedules_go_on(self, recwarn, monkeypatch):
        code = blocks()["Intervention"].replace("StepLR(optimizer, 100)", "StepLR(optimizer, 1, 0.5)")
        code = code.replace("loss_of(model, batch)", "loss_of(model, batch * (math.nan if len(losses) == 0 else 1))")
        code = "import math\nlosses = []\n" + code.replace("scheduler.step()", "scheduler.step(); losses.append(1)")
        run = Run(code, monkeypatch)
        assert run.names["scheduler"].last_epoch == 12
        assert run.seen[-1].skipped_updates["intervention"] == 1
        assert all(parameter.isfinite().all() for parameter in run.layers.values())
        assert not [each for each in recwarn if "lr_scheduler" in str(each.message)]

    def test_only_the_optimizers_that_were_given_are_held(self):
        one, two = Network(), Network()
        optimizers = [torch.optim.Adam(each.parameters()) for each in (one, two)]
        monitor = watch({"one": one, "two": two}, optimizer=optimizers[0], on_critical="skip")
        (one(torch.ones(1, 6)) + two(torch.full((1, 6), math.nan))).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        assert all(parameter.isfinite().all() for parameter in one.parameters())
        assert two.head.weight.isnan().all()
        assert monitor.snapshot.skipped_updates["intervention"] == 1

    def test_lbfgs_is_refused(self):
        model = Network()
        with pytest.raises(ValueError, match="on_critical: 'skip' cannot drop a step of LBFGS"):
            watch(model, optimizer=torch.optim.LBFGS(model.parameters()), on_critical="skip")
