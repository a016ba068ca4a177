import logging
import math
import re

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import DataLoader

from esper_telemetry import GradientsCritical, HealthTier, watch
from esper_telemetry.integrations.accelerate import EsperWatch
from tests.documents import blocks

SERVED = blocks()["Accelerate"]
CODE = SERVED.replace(', address="127.0.0.1:0"', "")  # an exporter would wait for a scrape after a bad check


class Run:
    """Run the loop of the documentation."""

    def __init__(self, code=CODE, bad_at=0, value=math.nan, elements=1, scaler=None, **options):
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.losses, self.seen, arrivals = [], [], []

        def spoil(gradient):
            arrivals.append(1)
            if len(arrivals) == bad_at:
                gradient = gradient.clone()
                gradient.view(-1)[:elements] = value
            return gradient

        self.model[0].weight.register_hook(spoil)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        accelerator.scaler = scaler  # as with mixed_precision="fp16", which Accelerate allows on accelerators only
        rows = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
        self.names = {
            "accelerator": accelerator,
            "model": self.model,
            "optimizer": torch.optim.Adam(self.model.parameters(), 0.01),
            "loader": DataLoader(rows, batch_size=4),
            "loss_of": self.loss_of,
        }
        self.names["EsperWatch"] = self.watch
        self.options = options
        exec(code.replace("from esper_telemetry.integrations.accelerate import EsperWatch\n", ""), self.names)

    def watch(self, *args, **options):
        self.watched = EsperWatch(*args, **options, **self.options)
        self.watched.monitor.on_check(self.seen.append)
        return self.watched

    def loss_of(self, model, batch):
        loss = model(batch).square().mean()
        self.losses.append(loss.item())
        return loss


def test_a_healthy_loop_stays_healthy():
    run = Run(SERVED)
    assert [snapshot.tier for snapshot in run.seen] == [HealthTier.HEALTHY] * 10
    assert run.watched.monitor.snapshot.ended
    assert run.watched.exporter.url.startswith("http://127.0.0.1:")


def test_losses_are_bit_equal_with_and_without_it():
    plain = CODE.replace("with EsperWatch", "if True:  # was EsperWatch")
    plain = re.sub(r"was .*", "", plain)
    run = Run(plain)
    assert not run.seen
    assert run.losses == Run().losses


@pytest.mark.parametrize(("kind", "value"), [("inf", math.inf), ("nan", math.nan)])
def test_one_bad_element_is_named_before_the_clip(kind, value):
    first = next(s for s in Run(bad_at=7, value=value).seen if s.tier is not HealthTier.HEALTHY)
    assert (first.checks, first.inf_grad_count, first.nan_grad_count) == (7, kind == "inf", kind == "nan")
    assert [layer.layer_name for layer in first.layers] == ["0.weight"]


def test_with_a_scaler_norms_are_unscaled_and_an_overflow_is_a_skip():
    run = Run(bad_at=4, scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    assert [snapshot.tier for snapshot in run.seen] == [HealthTier.HEALTHY] * 10
    assert run.seen[0].grad_norm == pytest.approx(Run().seen[0].grad_norm, rel=1e-4)
    assert run.watched.monitor.snapshot.skipped_updates["amp"] == 1
    assert run.model[0].weight.isfinite().all()


def test_skip_drops_the_step_and_training_goes_on():
    run = Run(bad_at=4, elements=6, on_critical="skip")
    assert run.watched.monitor.snapshot.skipped_updates["intervention"] == 1
    assert len(run.seen) == 10
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())


def test_halt_raises_and_is_no_good_end():
    with pytest.raises(GradientsCritical, match=r"check 4: .*NaN 6.*0\.weight"):
        Run(bad_at=4, elements=6, on_critical="halt")


def test_a_port_in_use_is_logged_and_training_goes_on(caplog):
    model = nn.Linear(1, 1)
    first = EsperWatch(Accelerator(cpu=True), model, address="127.0.0.1:0")
    with caplog.at_level(logging.WARNING):
        second = EsperWatch(Accelerator(cpu=True), model, address=first.exporter.url.removeprefix("http://"))
    first.close()
    assert second.exporter is None
    assert "training goes on without an exporter" in caplog.text


def test_watch_sees_through_a_prepared_optimizer():
    model = nn.Linear(1, 6)
    prepared = Accelerator(cpu=True).prepare(torch.optim.SGD(model.parameters(), 0.1))
    monitor = watch(model, optimizer=prepared, on_critical="skip")
    model(torch.full((7, 1), math.nan)).sum().backward()
    prepared.step()
    assert monitor.snapshot.skipped_updates["intervention"] == 1
    assert model.weight.isfinite().all()
