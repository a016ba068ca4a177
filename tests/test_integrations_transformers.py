import logging
import math
import socket
import time

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from esper_telemetry import HealthTier
from esper_telemetry.integrations.transformers import EsperCallback
from tests.documents import blocks
from tests.pages import close_pages, scrape


@pytest.fixture(autouse=True)
def closed_pages():
    yield
    close_pages()


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
        self.losses, self.dies_at, arrivals = [], 0, []

        def spoil(gradient):
            arrivals.append(1)
            if len(arrivals) == bad_at:
                gradient = gradient.clone()
                gradient.view(-1)[:elements] = value
            return gradient

        self.net[0].weight.register_hook(spoil)

    def forward(self, x):
        if self.dies_at == len(self.losses) + 1:
            raise ZeroDivisionError
        loss = self.net(x).square().mean()
        self.losses.append(loss.item())
        return {"loss": loss}


@pytest.fixture
def arguments(tmp_path):
    def build(**options):
        defaults = {
            "output_dir": str(tmp_path),
            "per_device_train_batch_size": 4,
            "num_train_epochs": 1,
            "max_grad_norm": 0.01,
            "report_to": [],
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        return TrainingArguments(**defaults | options)

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
        assert snapshot.skipped_updates == {"amp": int(scaled), "intervention": int(not scaled), "rewind": 0}
        assert trainer.state.global_step == 10 // accumulation
        assert all(parameter.isfinite().all() for parameter in model.parameters())

    def test_halt_stops_cleanly_and_drops_the_step(self, scaled, accumulation, arguments):
        options, scaler = self.options(scaled)
        callback, model = EsperCallback(on_critical="halt", **options), Model(bad_at=4, value=math.nan, elements=6)
        trainer = train(model, [callback], arguments(gradient_accumulation_steps=accumulation), scaler)
        assert trainer.control.should_training_stop
        assert (callback.monitor.snapshot.checks, callback.monitor.snapshot.ended) == (4, True)
        assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_loss_learning_rate_step_and_samples_are_reported(arguments):
    callback = EsperCallback()
    trainer = train(Model(), [callback], arguments(logging_steps=2, gradient_accumulation_steps=2))
    logged = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    progress = callback.monitor.snapshot.progress
    assert (progress.loss, progress.learning_rate) == (logged["loss"], logged["learning_rate"])
    assert (progress.step, progress.samples) == (5, 40)


class TestLog:
    def test_the_log_history_has_the_worst_counts_since_the_last_entry_and_the_norm(self, arguments):
        callback = EsperCallback(log=True, on_critical="skip")
        seen = []
        begin = callback.on_train_begin

        def begin_and_listen(*args, **options):
            begin(*args, **options)
            callback.monitor.on_check(seen.append)

        callback.on_train_begin = begin_and_listen
        model = Model(bad_at=2, value=math.nan, elements=6)
        trainer = train(model, [callback], arguments(logging_steps=4))
        entries = [entry for entry in trainer.state.log_history if "esper/nan_grad_count" in entry]
        counts = [(entry["step"], entry["esper/inf_grad_count"], entry["esper/nan_grad_count"]) for entry in entries]
        assert counts == [(4, 0, 6), (8, 0, 0), (10, 0, 0)]
        assert [entry["esper/grad_norm"] for entry in entries] == [seen[index].grad_norm for index in (3, 7, 9)]

    def test_callbacks_that_come_after_are_given_it_too(self, arguments):
        class Last(TrainerCallback):
            def on_log(self, args, state, control, logs=None, **_):
                given.append(dict(logs))

        given = []
        train(Model(), [EsperCallback(log=True), Last()], arguments(logging_steps=5))
        assert ["esper/grad_norm" in logs for logs in given] == [True, True, False]  # the last is of the whole run

    def test_it_is_off_by_default(self, arguments):
        trainer = train(Model(), [EsperCallback()], arguments(logging_steps=1))
        assert not any(name.startswith("esper/") for entry in trainer.state.log_history for name in entry)


class TestRunAfterRun:
    def test_a_second_train_goes_on_counting_on_the_same_page(self, arguments):
        callback = EsperCallback(address="127.0.0.1:0")
        trainer = train(Model(), [callback], arguments())
        exporter = callback.exporter
        assert scrape(exporter)["esper_run_ended"] == 1
        trainer.train()
        assert callback.exporter is exporter
        page = scrape(exporter)
        assert (page["esper_checks_total"], page["esper_train_samples_total"]) == (20, 80)

    def test_the_next_callback_at_the_address_does_so_too(self, arguments):
        first, second = EsperCallback(address="127.0.0.1:0"), EsperCallback(address="127.0.0.1:0")
        train(Model(), [first], arguments())
        train(Model(), [second], arguments())
        assert second.exporter is first.exporter
        assert scrape(first.exporter)["esper_checks_total"] == 20

    def test_a_bad_train_returns_at_once(self, arguments):
        callback, started = EsperCallback(address="127.0.0.1:0", on_critical="halt"), time.monotonic()
        train(Model(bad_at=4, value=math.nan, elements=6), [callback], arguments())
        assert time.monotonic() - started < 15  # it was 20 more
        assert scrape(callback.exporter)["esper_nan_grad_count"] == 6

    def test_a_trial_that_died_leaves_its_page_and_its_model_to_the_next(self, arguments, caplog):
        first, second = EsperCallback(address="127.0.0.1:0"), EsperCallback(address="127.0.0.1:0")
        model = Model()
        model.dies_at = 4
        with pytest.raises(ZeroDivisionError):
            train(model, [first], arguments())
        assert scrape(first.exporter)["esper_run_ended"] == 0
        model.dies_at = 0
        with caplog.at_level(logging.WARNING):
            train(model, [second], arguments())
        assert second.exporter is first.exporter
        assert (first.monitor.snapshot.checks, second.monitor.snapshot.checks) == (3, 13)
        assert "the previous one did not end" in caplog.text
        assert "watched already" not in caplog.text

    def test_a_port_in_use_is_an_error_line_and_the_page_is_at_the_next_free_port(self, arguments, caplog):
        with socket.create_server(("127.0.0.1", 0)) as listener, caplog.at_level(logging.ERROR):
            address = f"127.0.0.1:{listener.getsockname()[1]}"
            train(Model(), [callback := EsperCallback(address=address)], arguments())
            assert scrape(callback.exporter)["esper_checks_total"] == 10
            assert address in caplog.text
            with pytest.raises(OSError, match=address):
                train(Model(), [EsperCallback(address=address, strict=True)], arguments())


def finite(path):
    from safetensors.torch import load_file

    return all(tensor.isfinite().all() for tensor in load_file(path / "model.safetensors").values())


@pytest.mark.parametrize(("keep", "left"), [(False, {9: False, 10: False}), (True, {3: True, 4: True})])
def test_the_last_good_checkpoint_is_not_rotated_away(arguments, tmp_path, caplog, keep, left):
    callback = EsperCallback(keep_last_good=keep)
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "max_grad_norm": 0.0}
    trainer = Trainer(Model(bad_at=5, value=math.nan, elements=8), arguments(**options), train_dataset=Rows())
    trainer.add_callback(callback)
    trainer.train()
    assert callback.monitor.snapshot.damage == "parameters"
    folders = {int(path.name.partition("-")[2]): path for path in tmp_path.glob("checkpoint-*")}
    assert {step: finite(path) for step, path in folders.items()} == left
    assert ("no checkpoint is saved, to keep the last good one: parameters damaged" in caplog.text) == keep


def test_all_checkpoints_of_a_healthy_run_are_saved(arguments, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    Trainer(Model(), arguments(**options), train_dataset=Rows(), callbacks=[EsperCallback(keep_last_good=True)]).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-9"]
