import contextlib
import logging
import math
import re
import socket

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import DataLoader

from esper_telemetry import GradientsCritical, HealthTier, watch
from esper_telemetry.integrations.accelerate import EsperWatch
from tests.documents import blocks
from tests.pages import close_pages, scrape

CODE = blocks()["Accelerate"]


@pytest.fixture(autouse=True)
def closed_pages():
    yield
    close_pages()


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
    run = Run()
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


def test_step_and_learning_rate_are_those_of_the_optimizer():
    run = Run()
    progress = run.watched.monitor.snapshot.progress
    assert (progress.learning_rate, progress.step) == (0.01, 5)


class TestRunAfterRun:
    def watch(self, model=None, address="127.0.0.1:0", **options):
        return EsperWatch(Accelerator(cpu=True), model or nn.Linear(1, 1), address=address, **options)

    def test_the_next_goes_on_counting_on_the_same_page(self):
        first, second = Run(), Run()
        assert first.watched.exporter is second.watched.exporter
        page = scrape(first.watched.exporter)
        assert (page["esper_checks_total"], page["esper_run_ended"]) == (20, 1)

    def test_one_that_died_leaves_its_page_and_is_off_its_model(self, caplog):
        model = nn.Linear(1, 1)
        with contextlib.suppress(ZeroDivisionError), self.watch(model) as died:
            model(torch.ones(1, 1)).sum().backward()
            raise ZeroDivisionError
        assert not died.monitor.snapshot.ended
        with caplog.at_level(logging.WARNING):
            second = self.watch(model)
        model(torch.ones(1, 1)).sum().backward()
        assert (died.monitor.snapshot.checks, second.monitor.snapshot.checks) == (1, 2)
        assert caplog.messages == [f"esper: {second.exporter.url} now shows a new run; the previous one did not end"]

    def test_one_whose_cell_is_run_again_before_its_close_leaves_its_page_and_model_too(self, caplog):
        model = nn.Linear(1, 1)
        first = self.watch(model)
        model(torch.ones(1, 1)).sum().backward()
        with caplog.at_level(logging.WARNING):
            second = self.watch(model)
        model(torch.ones(1, 1)).sum().backward()
        assert scrape(second.exporter)["esper_checks_total"] == 2
        assert (first.monitor.snapshot.checks, first.exporter) == (1, second.exporter)
        assert "watched already" not in caplog.text

    def test_two_models_in_one_thread_are_both_watched_and_one_line_says_whose_the_page_is(self, caplog):
        models = [nn.Linear(1, 1), nn.Linear(1, 1)]
        with caplog.at_level(logging.WARNING), self.watch(models[0]) as first, self.watch(models[1]) as second:
            for model in models:
                model(torch.ones(1, 1)).sum().backward()
            assert (first.monitor.snapshot.checks, second.monitor.snapshot.checks) == (1, 1)
        assert len(caplog.messages) == 1
        assert "now shows a new run" in caplog.text

    def test_a_port_in_use_is_an_error_line_and_the_page_is_at_the_next_free_port(self, caplog):
        with socket.create_server(("127.0.0.1", 0)) as listener, caplog.at_level(logging.ERROR):
            address = f"127.0.0.1:{listener.getsockname()[1]}"
            watched = self.watch(address=address)
            assert scrape(watched.exporter)["esper_checks_total"] == 0
            assert address in caplog.text
            with pytest.raises(OSError, match=address):
                self.watch(address=address, strict=True)


def test_watch_sees_through_a_prepared_optimizer():
    model = nn.Linear(1, 6)
    prepared = Accelerator(cpu=True).prepare(torch.optim.SGD(model.parameters(), 0.1))
    monitor = watch(model, optimizer=prepared, on_critical="skip")
    model(torch.full((7, 1), math.nan)).sum().backward()
    prepared.step()
    assert monitor.snapshot.skipped_updates["intervention"] == 1
    assert model.weight.isfinite().all()


@pytest.mark.parametrize(("keep", "left"), [(False, {6: False, 7: False}), (True, {2: True, 3: True})])
def test_the_last_good_checkpoint_is_not_rotated_away(tmp_path, caplog, keep, left):
    from accelerate.utils import ProjectConfiguration
    from safetensors.torch import load_file

    AcceleratorState._reset_state(reset_partial_state=True)
    project = ProjectConfiguration(str(tmp_path), automatic_checkpoint_naming=True, total_limit=2)
    accelerator = Accelerator(cpu=True, project_config=project)
    torch.manual_seed(0)
    model, optimizer = accelerator.prepare(nn.Linear(4, 3), *[torch.optim.Adam([torch.zeros(1, requires_grad=True)])])
    optimizer.param_groups[0]["params"] = list(model.parameters())
    with EsperWatch(accelerator, model, optimizer, keep_last_good=keep) as watched:
        for step in range(8):
            batch = torch.full((2, 4), math.nan if step == 4 else 1.0)
            optimizer.zero_grad()
            accelerator.backward(model(batch).square().mean())
            optimizer.step()
            accelerator.save_state()
        assert watched.monitor.snapshot.damage == "parameters"
    folders = {int(path.name.rpartition("_")[2]): path for path in (tmp_path / "checkpoints").iterdir()}
    finite = {
        number: all(each.isfinite().all() for each in load_file(path / "model.safetensors").values())
        for number, path in folders.items()
    }
    assert finite == left
    assert "save_state" not in vars(accelerator)
    assert ("to keep the last good one: parameters damaged" in caplog.text) == keep
