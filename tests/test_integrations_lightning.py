import csv
import logging
import math
import socket
import time
from urllib.request import urlopen

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from esper_telemetry import HealthTier
from esper_telemetry.integrations.lightning import EsperCallback, _samples_in
from tests.documents import blocks
from tests.pages import close_pages, scrape

OPTIONS = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Model(LightningModule):
    """A small regression whose gradient has one bad element when the time comes."""

    def __init__(self, bad_at=0, value=math.inf, elements=1, optimizer=torch.optim.Adam):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.losses, self._arrivals, self._optimizer = [], 0, optimizer

        def spoil(gradient):
            self._arrivals += 1
            if self._arrivals == bad_at:
                gradient = gradient.clone()
                gradient.view(-1)[:elements] = value
            return gradient

        self.net[0].weight.register_hook(spoil)

    def training_step(self, batch, _):
        loss = self.net(batch).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return self._optimizer(self.parameters(), lr=0.01)


def loader():
    return DataLoader(torch.randn(40, 4, generator=torch.Generator().manual_seed(0)), batch_size=4)


def fit(model, callback=None, **options):
    trainer = Trainer(max_epochs=1, callbacks=callback, gradient_clip_val=0.01, **{**OPTIONS, **options})
    trainer.fit(model, loader())
    return trainer


def seen_by(callback):
    """Return the list that will hold every snapshot."""
    seen = []
    begin = callback.on_train_start

    def begin_and_listen(*args):
        begin(*args)
        callback.monitor.on_check(seen.append)

    callback.on_train_start = begin_and_listen
    return seen


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def closed_pages():
    yield
    close_pages()


def test_what_the_documentation_shows_runs():
    class Scraped(Model):
        def on_train_end(self):
            with urlopen(names["callback"].exporter.url + "/metrics") as page:
                self.page = page.read().decode()

    names = {"Trainer": Trainer, "model": Scraped(), "loader": loader(), "options": OPTIONS}
    exec(blocks()["Lightning"], names)
    snapshot = names["callback"].monitor.snapshot
    assert (snapshot.checks, snapshot.ended) == (20, True)
    assert snapshot.tier is HealthTier.HEALTHY
    assert "esper_checks_total 20.0" in names["model"].page


@pytest.mark.parametrize(("kind", "value"), [("inf", math.inf), ("nan", math.nan)])
def test_one_bad_element_is_named_before_the_clip(kind, value):
    callback = EsperCallback()
    seen = seen_by(callback)
    fit(Model(bad_at=7, value=value), callback)
    first = next(snapshot for snapshot in seen if snapshot.tier is not HealthTier.HEALTHY)
    assert (first.checks, first.inf_grad_count, first.nan_grad_count) == (7, kind == "inf", kind == "nan")
    assert [layer.layer_name for layer in first.layers] == ["net.0.weight"]


def test_accumulated_gradients_are_one_check_of_unclipped_norm():
    callback = EsperCallback()
    seen = seen_by(callback)
    fit(Model(), callback, accumulate_grad_batches=2)
    assert len(seen) == 5
    assert all(snapshot.grad_norm > 0.02 for snapshot in seen)


def test_losses_are_bit_equal_with_and_without_it():
    with_it, without = Model(), Model()
    fit(with_it, EsperCallback())
    fit(without)
    assert with_it.losses == without.losses


class TestMixedPrecision:
    def fit(self, model, callback):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        fit(model, callback, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
        return scaler

    def test_norms_are_unscaled_and_an_overflow_is_a_skip(self):
        callback = EsperCallback()
        seen = seen_by(callback)
        scaler = self.fit(model := Model(bad_at=4), callback)
        assert [snapshot.tier for snapshot in seen] == [HealthTier.HEALTHY] * 10
        assert callback.monitor.snapshot.skipped_updates["amp"] == 1
        assert callback.monitor.snapshot.amp.scale == scaler.get_scale() == 512.0
        assert max(snapshot.grad_norm for snapshot in seen if math.isfinite(snapshot.grad_norm)) < 10
        assert model.net[0].weight.isfinite().all()


class TestOnCritical:
    @pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
    def test_skip_drops_the_step_and_training_goes_on(self, optimizer):
        callback = EsperCallback(on_critical="skip")
        fit(model := Model(bad_at=4, value=math.nan, elements=6, optimizer=optimizer), callback)
        snapshot = callback.monitor.snapshot
        assert (snapshot.checks, snapshot.nan.critical_checks) == (10, 1)
        assert snapshot.skipped_updates["intervention"] == 1
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        if optimizer is torch.optim.Adam:
            assert {int(each["step"]) for each in model.optimizers().state.values()} == {9}

    @pytest.mark.parametrize("policy", ["halt", lambda _: "halt"])
    def test_halt_stops_cleanly_and_drops_the_step(self, policy):
        callback = EsperCallback(on_critical=policy)
        trainer = fit(model := Model(bad_at=4, value=math.nan, elements=6), callback)
        assert trainer.should_stop
        assert trainer.state.finished
        assert (callback.monitor.snapshot.checks, callback.monitor.snapshot.ended) == (4, True)
        assert callback.monitor.snapshot.nan.critical_checks == 1
        assert all(parameter.isfinite().all() for parameter in model.parameters())

    def test_halt_returns_at_once_and_the_page_stays(self):
        callback, started = EsperCallback(address="127.0.0.1:0", on_critical="halt"), time.monotonic()
        fit(Model(bad_at=4, value=math.nan, elements=6), callback)
        assert time.monotonic() - started < 15  # it was 20 more
        page = scrape(callback.exporter)
        assert (page["esper_nan_grad_count"], page["esper_run_ended"]) == (6, 1)


class TestHowTrainingGoes:
    def test_loss_learning_rate_step_and_samples_are_reported(self):
        callback = EsperCallback()
        fit(model := Model(), callback)
        progress = callback.monitor.snapshot.progress
        assert progress.loss == pytest.approx(model.losses[-1])
        assert (progress.learning_rate, progress.step, progress.samples) == (0.01, 10, 40)

    def test_the_loss_is_not_that_which_accumulation_has_divided(self):
        callback = EsperCallback()
        fit(model := Model(), callback, accumulate_grad_batches=2)
        progress = callback.monitor.snapshot.progress
        assert progress.loss == pytest.approx(model.losses[-1])
        assert (progress.step, progress.samples) == (5, 40)

    @pytest.mark.parametrize(
        ("batch", "samples"),
        [
            ({"id": "a", "x": torch.ones(3, 2)}, 3),
            ([("a", "b"), (torch.ones(5), torch.ones(7))], 5),
            (torch.tensor(1.0), 1),
            (["a", "b"], None),
        ],
    )
    def test_samples_are_the_length_of_the_first_tensor(self, batch, samples):
        assert _samples_in(batch) == samples

    def test_a_loss_on_a_device_is_looked_at_only_when_the_trainer_logs(self):
        told = []

        class Loss(torch.Tensor):
            is_cpu = False

        class OnDevice(EsperCallback):
            def on_train_batch_end(self, trainer, pl_module, outputs, *args):
                self.monitor.record = lambda loss, step, **_: told.append((step, loss is not None))
                super().on_train_batch_end(trainer, pl_module, {"loss": outputs["loss"].as_subclass(Loss)}, *args)

        fit(Model(), OnDevice(), log_every_n_steps=5)
        assert [step for step, has_loss in told if has_loss] == [5, 10]


class TestLog:
    def rows(self, tmp_path, model, callback, **options):
        fit(model, callback, logger=CSVLogger(tmp_path, name="", version=""), **options)
        if not (tmp_path / "metrics.csv").exists():
            return []
        with (tmp_path / "metrics.csv").open() as file:
            return list(csv.DictReader(file))

    def test_the_loggers_get_the_worst_counts_since_the_last_time_and_the_norm(self, tmp_path):
        callback = EsperCallback(log=True, on_critical="skip")
        seen = seen_by(callback)
        rows = self.rows(tmp_path, Model(bad_at=2, value=math.nan, elements=6), callback, log_every_n_steps=4)
        counts = [(row["step"], row["esper/inf_grad_count"], row["esper/nan_grad_count"]) for row in rows]
        assert [(int(step), float(inf), float(nan)) for step, inf, nan in counts] == [(3, 0, 6), (7, 0, 0), (10, 0, 0)]
        norms = [float(row["esper/grad_norm"]) for row in rows]
        assert norms == pytest.approx([seen[3].grad_norm, seen[7].grad_norm, seen[9].grad_norm])

    def test_a_trainer_without_a_logger_is_one_line(self, caplog):
        fit(Model(), EsperCallback(log=True))
        assert "log=True needs a Trainer with a logger" in caplog.text

    def test_it_is_off_by_default(self, tmp_path):
        assert self.rows(tmp_path, Model(), EsperCallback(), log_every_n_steps=1) == []


class TestRunAfterRun:
    def test_a_second_fit_goes_on_counting_on_the_same_page(self):
        callback = EsperCallback(address="127.0.0.1:0")
        fit(Model(), callback)
        exporter = callback.exporter
        assert scrape(exporter)["esper_run_ended"] == 1
        fit(Model(), callback)
        assert callback.exporter is exporter
        page = scrape(exporter)
        assert (page["esper_checks_total"], page["esper_train_samples_total"]) == (20, 80)

    def test_the_next_callback_at_the_address_does_so_too(self):
        first, second = EsperCallback(address="127.0.0.1:0"), EsperCallback(address="127.0.0.1:0")
        fit(Model(), first)
        fit(Model(), second)
        assert second.exporter is first.exporter
        assert scrape(first.exporter)["esper_checks_total"] == 20

    def test_a_trial_that_died_is_no_good_end_and_leaves_its_page_and_its_model(self, caplog):
        class Dies(Model):
            dies = True

            def training_step(self, batch, index):
                return 1 / 0 if index == 3 and self.dies else super().training_step(batch, index)

        callback, model = EsperCallback(address="127.0.0.1:0"), Dies()
        with pytest.raises(ZeroDivisionError):
            fit(model, callback)
        died = callback.monitor
        assert (died.snapshot.checks, died.snapshot.ended) == (3, False)
        assert scrape(callback.exporter)["esper_run_ended"] == 0
        model.dies = False
        second = EsperCallback(address="127.0.0.1:0")
        with caplog.at_level(logging.WARNING):
            fit(model, second)
        assert second.exporter is callback.exporter
        assert (died.snapshot.checks, second.monitor.snapshot.checks) == (3, 13)
        assert "the previous one did not end" in caplog.text
        assert "watched already" not in caplog.text

    def test_skips_of_the_scaler_are_counted_on(self):
        callback = EsperCallback()
        for _ in range(2):
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            fit(Model(bad_at=4), callback, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
        assert callback.monitor.snapshot.skipped_updates["amp"] == 2

    def test_a_port_in_use_is_an_error_line_and_the_page_is_at_the_next_free_port(self, caplog):
        with socket.create_server(("127.0.0.1", 0)) as listener, caplog.at_level(logging.ERROR):
            address = f"127.0.0.1:{listener.getsockname()[1]}"
            fit(Model(), callback := EsperCallback(address=address))
            assert scrape(callback.exporter)["esper_checks_total"] == 10
            assert address in caplog.text
            with pytest.raises(OSError, match=address):
                fit(Model(), EsperCallback(address=address, strict=True))


def test_pytorch_lightning_takes_the_same_callback():
    pytorch_lightning = pytest.importorskip("pytorch_lightning")

    class Other(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Model(bad_at=7)

        def training_step(self, batch, index):
            return self.model.training_step(batch, index)

        def configure_optimizers(self):
            return self.model.configure_optimizers()

    callback = EsperCallback()
    seen = seen_by(callback)
    pytorch_lightning.Trainer(max_epochs=1, callbacks=[callback], **OPTIONS).fit(Other(), loader())
    assert [snapshot.inf_grad_count for snapshot in seen[:7]] == [0] * 6 + [1]
    assert callback.monitor.snapshot.ended


def checkpoints(folder):
    """Return which checkpoints are there, and whether all of their weights are finite."""
    loaded = {path.name: torch.load(path, weights_only=False) for path in folder.glob("*.ckpt")}
    return {
        name: all(tensor.isfinite().all() for tensor in each["state_dict"].values()) for name, each in loaded.items()
    }


@pytest.mark.parametrize(("keep", "left"), [(False, {"step=10.ckpt": False}), (True, {"step=4.ckpt": True})])
def test_the_last_good_checkpoint_is_not_rotated_away(tmp_path, caplog, keep, left):
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=1, monitor="step", mode="max")
    callback = EsperCallback(keep_last_good=keep)
    model = Model(bad_at=5, value=math.nan, elements=8)
    fit(model, [saving, callback], enable_checkpointing=True)
    assert callback.monitor.snapshot.damage == "parameters"
    assert checkpoints(tmp_path) == {"step=10.ckpt": False} | left
    assert (caplog.text.count("step=4.ckpt is not removed yet") == 1) == keep


def test_the_last_good_checkpoint_is_not_written_over(tmp_path, caplog):
    saving = ModelCheckpoint(tmp_path, "only", every_n_train_steps=1, enable_version_counter=False, save_top_k=1)
    fit(
        Model(bad_at=5, value=math.nan, elements=8),
        [saving, EsperCallback(keep_last_good=True)],
        enable_checkpointing=True,
    )
    assert checkpoints(tmp_path) == {"only.ckpt": True}
    assert "only.ckpt is not overwritten, because it is the last good checkpoint: parameters damaged" in caplog.text


def test_a_good_checkpoint_that_nobody_wants_any_more_is_removed_when_there_is_a_newer_one(tmp_path):
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=1, monitor="step", mode="max")
    fit(Model(), [saving, EsperCallback(keep_last_good=True)], enable_checkpointing=True)
    assert checkpoints(tmp_path) == {"step=10.ckpt": True}
