import logging
import math

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from esper_telemetry import HealthTier, start_exporter
from esper_telemetry.integrations.transformers import EsperCallback
from tests.documents import blocks


class Rows(Dataset):
    def __init__(self):
        self.rows = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"x": self.rows[index]}


class Model(nn.Module):
    """A small regression whose gradient has bad elements when the time comes."""

    def __init__(self, bad_at=0, value=math.inf, elements=1):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.losses, arrivals = [], []

        def spoil(gradient):
            arrivals.append(1)
            if len(arrivals) == bad_at:
                gradient = gradient.clone()
                gradient.view(-1)[:elements] = value
            return gradient

        self.net[0].weight.register_hook(spoil)

    def forward(self, x):
        loss = self.net(x).square().mean()
        self.losses.append(loss.item())
        return {"loss": loss}


@pytest.fixture
def arguments(tmp_path):
    def build(**options):
        return TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            num_train_epochs=1,
            max_grad_norm=0.01,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            **options,
        )

    return build


def train(model, callbacks, arguments, scaler=None):
    trainer = Trainer(model, arguments, train_dataset=Rows(), callbacks=callbacks)
    trainer.accelerator.scaler = scaler  # as with fp16=True, which Accelerate allows on accelerators only
    trainer.train()
    return trainer


class Listening(EsperCallback):
    """Keep every snapshot."""

    def on_train_begin(self, *args, **options):
        super().on_train_begin(*args, **options)
        self.seen = []
        self.monitor.on_check(self.seen.append)


def test_what_the_documentation_shows_runs(arguments):
    names = {"Trainer": Trainer, "model": Model(), "arguments": arguments(), "dataset": Rows()}
    exec(blocks()["Hugging Face Trainer"], names)
    snapshot = names["callback"].monitor.snapshot
    assert names["callback"].exporter.url.startswith("http://127.0.0.1:")
    assert (snapshot.checks, snapshot.ended) == (10, True)
    assert snapshot.tier is HealthTier.HEALTHY


@pytest.mark.parametrize(("kind", "value"), [("inf", math.inf), ("nan", math.nan)])
def test_one_bad_element_is_named_before_the_clip(kind, value, arguments):
    callback = Listening()
    train(Model(bad_at=7, value=value), [callback], arguments())
    first = next(snapshot for snapshot in callback.seen if snapshot.tier is not HealthTier.HEALTHY)
    assert (first.checks, first.inf_grad_count, first.nan_grad_count) == (7, kind == "inf", kind == "nan")
    assert [layer.layer_name for layer in first.layers] == ["net.0.weight"]
    assert all(snapshot.grad_norm > 0.02 for snapshot in callback.seen[:6])


def test_losses_are_bit_equal_with_and_without_it(arguments):
    with_it, without = Model(), Model()
    train(with_it, [EsperCallback()], arguments())
    train(without, [], arguments())
    assert with_it.losses == without.losses


def test_with_a_scaler_norms_are_unscaled_and_an_overflow_is_a_skip(arguments):
    callback, plain = Listening(), Listening()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    train(model := Model(bad_at=4), [callback], arguments(), scaler)
    train(Model(), [plain], arguments())
    assert [snapshot.tier for snapshot in callback.seen] == [HealthTier.HEALTHY] * 10
    assert callback.seen[0].grad_norm == pytest.approx(plain.seen[0].grad_norm, rel=1e-4)
    assert callback.monitor.snapshot.skipped_updates["amp"] == 1
    assert scaler.get_scale() == 512.0
    assert model.net[0].weight.isfinite().all()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
class TestOnCritical:
    def options(self, scaled):
        # A scaler that may not skip: what it finds is critical at once.
        return ({"max_amp_skips": 0}, torch.amp.GradScaler("cpu", init_scale=1024.0)) if scaled else ({}, None)

    def test_skip_drops_the_step_and_training_goes_on(self, scaled, accumulation, arguments):
        options, scaler = self.options(scaled)
        callback, model = EsperCallback(on_critical="skip", **options), Model(bad_at=4, value=math.nan, elements=6)
        trainer = train(model, [callback], arguments(gradient_accumulation_steps=accumulation), scaler)
        snapshot = callback.monitor.snapshot
        assert (snapshot.checks, snapshot.nan.critical_checks) == (10, 1)
        assert snapshot.skipped_updates == {"amp": int(scaled), "intervention": int(not scaled)}
        assert trainer.state.global_step == 10 // accumulation
        assert all(parameter.isfinite().all() for parameter in model.parameters())

    def test_halt_stops_cleanly_and_drops_the_step(self, scaled, accumulation, arguments):
        options, scaler = self.options(scaled)
        callback, model = EsperCallback(on_critical="halt", **options), Model(bad_at=4, value=math.nan, elements=6)
        trainer = train(model, [callback], arguments(gradient_accumulation_steps=accumulation), scaler)
        assert trainer.control.should_training_stop
        assert (callback.monitor.snapshot.checks, callback.monitor.snapshot.ended) == (4, True)
        assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_port_in_use_is_logged_and_training_goes_on(arguments, caplog):
    train(Model(), [first := EsperCallback()], arguments())
    taken = start_exporter(first.monitor, "127.0.0.1:0")
    second = EsperCallback(address=taken.url.removeprefix("http://"))
    with caplog.at_level(logging.WARNING):
        train(Model(), [second], arguments())
    taken.close()
    assert second.monitor.snapshot.checks == 10
    assert second.exporter is None
    assert "training goes on without an exporter" in caplog.text
