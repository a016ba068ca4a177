import logging
import math
from threading import Thread
from urllib.request import urlopen

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from esper_telemetry import HealthTier, start_exporter
from esper_telemetry.integrations.lightning import EsperCallback
from tests.documents import blocks

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
    trainer = Trainer(max_epochs=1, callbacks=callback, gradient_clip_val=0.01, **options, **OPTIONS)
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

    def test_halt_ends_when_the_last_state_was_scraped(self):
        callback = EsperCallback(address="127.0.0.1:0", on_critical="halt")

        class Slow(Model):
            def on_train_end(self):  # the scrape comes after training has stopped
                Thread(target=scrape, args=[callback.exporter.url]).start()

        def scrape(url):
            with urlopen(url + "/metrics") as page:
                pages.append(page.read().decode())

        pages = []
        fit(Slow(bad_at=4, value=math.nan, elements=6), callback)
        assert "esper_nan_grad_count 6.0" in pages[0]


def test_a_port_in_use_is_logged_and_training_goes_on(caplog):
    callback, model = EsperCallback(address="127.0.0.1:0"), Model()
    fit(model, callback)
    taken = start_exporter(callback.monitor, "127.0.0.1:0")
    second = EsperCallback(address=taken.url.removeprefix("http://"))
    with caplog.at_level(logging.WARNING):
        fit(Model(), second)
    taken.close()
    assert second.monitor.snapshot.checks == 10
    assert second.exporter is None
    assert "training goes on without an exporter" in caplog.text


def test_an_exception_is_no_good_end_but_fitting_again_watches_once():
    class Dies(Model):
        def training_step(self, batch, index):
            return super().training_step(batch, index) if index < 3 else 1 / 0

    callback = EsperCallback()
    with pytest.raises(ZeroDivisionError):
        fit(Dies(), callback)
    died = callback.monitor
    assert (died.snapshot.checks, died.snapshot.ended) == (3, False)
    fit(Model(), callback)
    assert (died.snapshot.checks, callback.monitor.snapshot.checks) == (3, 10)
    assert died.snapshot.ended


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
