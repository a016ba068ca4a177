import errno
import json
import logging
import math
import re
import subprocess
import sys
import threading
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from torch import nn

from esper_telemetry import GradientMonitor, watch
from esper_telemetry.recorder import recorder
from esper_telemetry.recorder.recording import Recording, read_recording
from esper_telemetry.scan import first_bad_elements
from tests.gradients import FLOAT8, gradients
from tests.monitors import learned
from tests.test_monitor_on_devices import Device


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


class Run:
    """A run whose checks are bad where a test wants them."""

    def __init__(self, folder, **options):
        self.folder = Path(folder)
        self.model = network()
        self.faults = []
        self.monitor = watch(self.model, record_dir=folder, before_check=self._spoil, **options)

    def _spoil(self, _):
        for layer, place, value in self.faults:
            self.model.get_parameter(layer).grad[place] = value

    def check(self, *faults, times=1):
        """Make checks, with these (layer, place, value) in each."""
        for _ in range(times):
            self.faults = faults
            self.model.zero_grad()
            self.model(torch.ones(5, 3)).sum().backward()

    @property
    def files(self):
        return sorted(self.folder.glob("*.json"))

    @property
    def recordings(self):
        return [read_recording(path) for path in self.files]


BAD = ("2.weight", (1, 2), math.inf)


def test_the_first_bad_check_is_recorded_before_backward_returns(tmp_path):
    run = Run(tmp_path)
    run.check(times=3)
    assert run.files == []
    run.check(BAD, ("2.weight", (0, 3), math.nan), ("0.bias", 1, -math.inf))
    (recording,) = run.recordings
    assert (recording.check, recording.inf_count, recording.nan_count) == (4, 2, 1)
    assert recording.origin_layer == "2.weight"
    found = {
        layer.layer_name: [(each.index, each.flat, each.value) for each in layer.first_bad]
        for layer in recording.layers
    }
    assert found == {"2.weight": [((0, 3), 3, "nan"), ((1, 2), 6, "inf")], "0.bias": [((1,), 1, "-inf")]}
    worst = recording.layers[0]
    assert (worst.inf_count, worst.nan_count, worst.numel, worst.shape, worst.dtype) == (1, 1, 8, (2, 4), "float32")


def test_the_history_has_the_last_256_checks_and_ends_with_the_bad_one(tmp_path):
    run = Run(tmp_path)
    norms = []
    run.monitor.on_check(lambda snapshot: norms.append(snapshot.layer_norms[2]))
    run.check(times=299)
    run.check(BAD)
    (recording,) = run.recordings
    assert [each.check for each in recording.history] == list(range(45, 301))
    assert {each.inf_count for each in recording.history[:-1]} == {0}
    assert (recording.history[-1].inf_count, recording.history[-1].grad_norm) == (1, math.inf)
    assert recording.layer_norms["2.weight"] == tuple(norms[-256:])
    assert set(recording.layer_norms) == {"2.weight", "2.bias", "0.bias"}


def test_the_clean_neighbours_of_the_origin_follow_the_order_of_arrival(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(5)))
    monitor = GradientMonitor(model, record_dir=tmp_path)
    model(torch.ones(1, 3)).sum().backward()
    for layer in (1, 2):
        model[layer].weight.grad[0, 0] = math.nan
    monitor.update()
    recording = read_recording(next(tmp_path.iterdir()))
    found = recording.origin_layer, recording.clean_before, recording.clean_after
    assert found == ("2.weight", "3.weight", "0.weight")


def test_where_everything_is_bad_there_is_no_clean_neighbour(tmp_path):
    run = Run(tmp_path)
    run.model(torch.full((5, 3), math.nan)).square().sum().backward()
    (recording,) = run.recordings
    assert recording.origin_layer.startswith("2.")
    assert (recording.clean_before, recording.clean_after) == (None, None)


def test_learning_rate_scale_and_batch_are_those_of_each_check(tmp_path):
    model = network()
    optimizer = torch.optim.SGD([{"params": model[0].parameters(), "lr": 0.5}, {"params": model[2].parameters()}], 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    spoiled = iter([False] * 3 + [True] * 40)
    monitor = watch(
        model,
        optimizer=optimizer,
        scaler=scaler,
        record_dir=tmp_path,
        before_check=lambda _: next(spoiled) and model[0].weight.grad.fill_(math.nan),
    )
    for step in range(16):
        monitor.batch_id = f"shard-{step}"
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(5, 3)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.param_groups[1]["lr"] /= 2
    recording = read_recording(next(tmp_path.iterdir()))
    # What the scaler explains is no trouble: the scale had to fall below 1, or 8 skips to come in a row.
    assert recording.check > 4
    assert recording.batch_id == f"shard-{recording.check - 1}"
    assert [each.batch_id for each in recording.history][:2] == ["shard-0", "shard-1"]
    assert [each.learning_rates for each in recording.history][:3] == [(0.5, 0.1), (0.5, 0.05), (0.5, 0.025)]
    assert [each.scale for each in recording.history][:3] == [4.0, 8.0, 16.0]


def test_it_names_the_run_and_where_it_ran(tmp_path):
    run = Run(tmp_path, run_id="team/run 1")
    run.check(BAD)
    (recording,) = run.recordings
    known = run.monitor.snapshot.run
    assert (recording.run_id, recording.rank, recording.host) == ("team/run 1", known.rank, known.host)
    assert recording.devices == ("cpu",)
    assert recording.versions["torch"] == torch.__version__
    assert run.files[0].parent == tmp_path


def test_an_episode_ends_after_32_good_checks_in_a_row(tmp_path):
    run = Run(tmp_path)
    run.check(BAD, times=3)
    run.check(times=31)
    run.check(BAD)
    assert [each.check for each in run.recordings] == [1]
    run.check(times=32)
    run.check(BAD)
    assert sorted(each.check for each in run.recordings) == [1, 68]


def test_a_healthy_run_leaves_nothing(tmp_path):
    run = Run(tmp_path)
    run.check(times=10)
    run.monitor.close()
    assert list(tmp_path.iterdir()) == []


def test_a_run_and_a_folder_hold_a_bounded_number(tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "QUIET_CHECKS", 1)
    monkeypatch.setattr(recorder, "RECORDINGS_PER_RUN", 3)
    monkeypatch.setattr(recorder, "RECORDINGS_PER_FOLDER", 4)
    (tmp_path / "esper-killed.json.tmp").touch()
    (tmp_path / "notes.json").touch()
    runs = [Run(tmp_path), Run(tmp_path)]
    for run in runs:
        for _ in range(5):
            run.check(BAD)
            run.check()
    names = {path.name for path in tmp_path.iterdir()}
    assert len(names) == 5
    assert "notes.json" in names
    assert "esper-killed.json.tmp" not in names
    last = runs[1].monitor.snapshot.run.run_id
    assert {re.search(r"check\d+", name)[0] for name in names if last in name} == {"check1", "check3", "check5"}


def test_norms_of_very_many_layers_are_kept_for_fewer_checks(tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "_NORMS", 4 * 10)
    run = Run(tmp_path)
    run.check(times=19)
    run.check(BAD)
    (recording,) = run.recordings
    assert len(recording.history) == 20
    norms = recording.layer_norms["2.weight"]
    assert (norms[:10], None in norms[10:]) == ((None,) * 10, False)


def test_the_origin_is_described_although_50_layers_are_worse(tmp_path):
    model = nn.ParameterList([nn.Parameter(torch.ones(2)) for _ in range(60)])
    monitor = GradientMonitor(model, record_dir=tmp_path)
    for parameter in model:
        parameter.grad = torch.full((2,), math.nan)
    model[59].grad[0] = 1.0
    monitor.update()
    recording = read_recording(next(tmp_path.iterdir()))
    assert recording.origin_layer == "59"
    assert len(recording.layers) == 50
    assert recording.layers[-1].layer_name == "59"
    assert recording.layers_left_out == 10


def test_at_most_16_elements_of_a_layer_are_named(tmp_path):
    model = nn.Linear(50, 50)
    monitor = GradientMonitor(model, record_dir=tmp_path)
    model.weight.grad = torch.full((50, 50), math.nan)
    monitor.update()
    recording = read_recording(next(tmp_path.iterdir()))
    assert [each.flat for each in recording.layers[0].first_bad] == list(range(16))


def test_every_json_reader_can_read_it(tmp_path):
    def refuse(text):
        raise AssertionError(text)

    run = Run(tmp_path)
    run.check()
    run.check(("0.weight", (0, 0), math.nan), BAD)
    page = json.loads(run.files[0].read_text(), parse_constant=refuse)
    assert page["history"][-1]["grad_norm"] == "NaN"
    assert page["layer_norms"]["2.weight"][-1] == "Infinity"
    assert read_recording(run.files[0]).layer_norms["2.weight"][-1] == math.inf


def test_it_is_there_when_the_process_dies_in_the_next_line(tmp_path):
    script = f"""
import os, math, torch
from esper_telemetry import watch
model = torch.nn.Linear(3, 2)
monitor = watch(model, record_dir={str(tmp_path)!r}, before_check=lambda _: model.weight.grad.fill_(math.nan))
model(torch.ones(1, 3)).sum().backward()
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=120, check=False).returncode == -9
    (path,) = tmp_path.iterdir()
    assert read_recording(path).nan_count == 6


class TestTheVerdict:
    def test_it_is_written_into_the_file_when_it_is_known(self, tmp_path):
        run = Run(tmp_path)
        run.check(BAD)
        [recording] = run.recordings
        assert (recording.damage, recording.cause) == (None, None), "the step is still to come"
        for parameter in run.model.parameters():
            parameter.data -= 0.1 * parameter.grad
        run.model(torch.ones(5, 3))
        [recording] = run.recordings
        assert recording.damage == "parameters"
        assert recording.inf_count == 1

    def test_a_model_that_took_no_harm_is_intact(self, tmp_path):
        run = Run(tmp_path)
        run.check(BAD)
        run.check()
        [recording] = run.recordings
        assert recording.damage == "intact"

    def test_where_it_began_is_written_too(self, tmp_path):
        run = Run(tmp_path)
        run.check(BAD)
        run.check(BAD)
        [recording] = run.recordings
        assert recording.cause == "backward of 2"

    def test_what_comes_after_the_episode_is_of_another(self, tmp_path):
        run = Run(tmp_path)
        run.check(BAD)
        run.check(times=32)
        run.model[0].weight.data[0, 0] = math.nan
        run.check()
        first, second = run.recordings
        assert first.damage == "intact"
        assert (second.damage, second.cause) == ("parameters", "parameter 0.weight")

    def test_files_from_before_there_was_a_verdict_can_be_read(self, tmp_path):
        run = Run(tmp_path)
        run.check(BAD)
        page = json.loads(run.files[0].read_text())
        del page["damage"], page["cause"]
        run.files[0].write_text(json.dumps(page))
        assert run.recordings[0].damage is None


class TestResultsThatArriveLater:
    """As on CUDA devices: by then the gradients are gone."""

    def test_are_recorded_without_elements_but_with_what_was_noted(self, tmp_path):
        run = Run(tmp_path)
        learned(run.monitor)._checks.scan = device = Device()
        for batch in (1, 2):
            run.monitor.batch_id = batch
            run.check(BAD)
        assert run.files == []
        device.finish(1)
        run.monitor.flush(timeout=0.01)
        (recording,) = run.recordings
        assert (recording.check, recording.batch_id, recording.origin_layer) == (1, 1, "2.weight")
        assert recording.clean_before == "2.bias"
        assert recording.layers[0].first_bad is recording.layers[0].shape is None

    def test_are_waited_for_where_on_critical_needs_them_and_then_have_elements(self, tmp_path):
        run = Run(tmp_path, on_critical=lambda _: "continue")
        learned(run.monitor)._checks.scan = Device()
        run.check(BAD)
        (recording,) = run.recordings
        assert recording.layers[0].first_bad[0].index == (1, 2)


class TestNeverInTheWay:
    def test_a_folder_that_is_gone_is_logged_once_and_counted(self, tmp_path, monkeypatch, caplog):
        monkeypatch.setattr(recorder, "QUIET_CHECKS", 1)
        run = Run(tmp_path / "recordings")
        run.folder.rmdir()
        with caplog.at_level(logging.ERROR):
            for _ in range(3):
                run.check(BAD)
                run.check()
        assert run.monitor.snapshot.checks == 6
        assert run.monitor.snapshot.monitor_errors == 3
        assert [record.getMessage() for record in caplog.records if "was not written" in record.getMessage()] != []
        assert len(caplog.records) == 1

    def test_a_full_disk_leaves_no_draft(self, tmp_path, monkeypatch):
        def full(_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("esper_telemetry.recorder.recording.os.fsync", full)
        run = Run(tmp_path)
        run.check(BAD)
        assert run.monitor.snapshot.monitor_errors == 1
        assert list(tmp_path.iterdir()) == []

    def test_a_disk_that_hangs_holds_training_up_for_a_moment_only(self, tmp_path, monkeypatch):
        monkeypatch.setattr(recorder, "QUIET_CHECKS", 1)
        monkeypatch.setattr(recorder, "_WAIT_SECONDS", 0.05)
        released, write = threading.Event(), Recording.write
        monkeypatch.setattr(Recording, "write", lambda *given: (released.wait(30), write(*given)))
        run = Run(tmp_path)
        run.check(BAD)
        run.check()
        run.check(BAD)  # a second one does not wait behind the first
        assert (run.files, run.monitor.snapshot.checks, run.monitor.snapshot.monitor_errors) == ([], 3, 1)
        monkeypatch.setattr(recorder, "_WAIT_SECONDS", 30.0)
        released.set()
        run.monitor.close()
        assert [each.check for each in run.recordings] == [1]

    def test_training_is_bit_equal_with_and_without_it(self, tmp_path):
        weights = []
        for options in ({}, {"record_dir": tmp_path}):
            model = network()
            optimizer = torch.optim.Adam(model.parameters())
            watch(model, optimizer=optimizer, **options)
            for step in range(5):
                optimizer.zero_grad()
                model(torch.full((4, 3), math.nan if step == 4 else step / 10)).square().sum().backward()
                optimizer.step()
            weights.append([parameter.tolist() for parameter in model.parameters()])
        assert repr(weights[0]) == repr(weights[1])
        assert len(list(tmp_path.iterdir())) == 1


def test_the_loop_in_the_docs_runs_and_records_its_batch(tmp_path, monkeypatch):
    guide = (Path(__file__).parents[1] / "docs" / "flight-recorder.md").read_text()
    monkeypatch.chdir(tmp_path)
    model = network()
    known = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
        "batches": [1.0, 1.0, math.nan],
        "loss_of": lambda model, batch: model(torch.full((1, 3), batch)).square().sum(),
    }
    exec(re.search(r"```python\n(.*?)```", guide, re.DOTALL)[1], known)
    (recording,) = map(read_recording, Path("recordings").iterdir())
    assert (recording.check, recording.batch_id) == (3, 2)


def test_the_docs_name_every_field():
    guide = (Path(__file__).parents[1] / "docs" / "flight-recorder.md").read_text()
    assert [field.name for field in fields(Recording) if f"`{field.name}`" not in guide] == []


class TestSetUp:
    def test_a_folder_that_cannot_be_written_is_one_line_and_leaves_the_model_alone(self, tmp_path):
        (tmp_path / "file").touch()
        folder = tmp_path / "file" / "recordings"
        model = network()
        message = f"record_dir: expected a writable folder, got {str(folder)!r}: Not a directory"
        with pytest.raises(OSError, match=re.escape(message)) as error:
            watch(model, record_dir=folder)
        assert "\n" not in str(error.value)
        assert all(parameter._post_accumulate_grad_hooks is None for parameter in model.parameters())

    def test_a_missing_folder_is_made(self, tmp_path):
        Run(tmp_path / "a" / "b").check(BAD)
        assert len(list((tmp_path / "a" / "b").iterdir())) == 1


class TestReading:
    def test_a_recording_is_read_as_it_was_written(self, tmp_path):
        run = Run(tmp_path)
        run.check()
        run.check(BAD)
        (recording,) = run.recordings
        recording.write(tmp_path / "again.json")
        assert repr(read_recording(tmp_path / "again.json")) == repr(recording)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda page: page.pop("format"), "it is another kind of file"),
            (lambda page: page.update(version=2), "it has version 2, and only 1 can be read"),
            (lambda page: page.pop("history"), "it has no 'history'"),
            (lambda page: page["history"][0].pop("scale"), "it has no 'scale'"),
            (lambda page: page.update(layers=3), "'int' object is not iterable"),
            (lambda page: page.update(history=2 * page["history"]), "its layer_norms and its history differ in length"),
            (lambda page: page.update(history=[]), "its history is empty"),
            (lambda page: page.update(timestamp=1e300), "its time is out of range"),
            (lambda page: page.update(check=10**400), "it has an impossible number: 1000"),
            (lambda page: page.update(elements=math.inf), "it has an impossible number: inf"),
            (lambda page: page["layers"][0].update(shape=["x"]), "'<=' not supported between "),
            (lambda page: page["history"][0].update(grad_norm="many"), "it has no 'many'"),
        ],
    )
    def test_what_is_no_recording_is_told_in_one_line(self, tmp_path, change, reason):
        run = Run(tmp_path)
        run.check(BAD)
        page = json.loads(run.files[0].read_text())
        change(page)
        path = tmp_path / "changed.json"
        path.write_text(json.dumps(page))
        with pytest.raises(ValueError, match="^" + re.escape(f"expected a recording, got {str(path)!r}: {reason}")):
            read_recording(path)

    @pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"[1]", b"{", b"[" * 100_000])
    def test_other_files_are_none(self, tmp_path, content):
        path = tmp_path / "file"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"^expected a recording, got .*") as error:
            read_recording(path)
        assert "\n" not in str(error.value)


@settings(max_examples=150)
@given(gradients())
def test_the_first_bad_elements_are_torchs_in_the_gradients_own_shape(gradient):
    dense = gradient.coalesce().to_dense() if gradient.is_sparse else gradient
    if gradient.dtype in FLOAT8:
        dense = dense.to(torch.float32)
    if gradient.dtype is torch.complex32:
        dense = dense.to(torch.complex64)
    bad = torch.isinf(dense) | torch.isnan(dense)
    found = first_bad_elements(gradient, 16)
    assert [list(each.index) for each in found] == bad.nonzero()[:16].tolist()
    assert [each.flat for each in found] == bad.flatten().nonzero().view(-1)[:16].tolist()
    assert repr([each.value for each in found]) == repr([dense[each.index].item() for each in found])


@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc])
def test_compressed_layouts_are_searched_in_the_order_of_their_shape_too(layout):
    dense = torch.zeros(4, 6)
    dense[3, 0], dense[0, 5], dense[2, 2] = math.nan, math.inf, -math.inf
    blocks = (2, 3) if layout in (torch.sparse_bsr, torch.sparse_bsc) else None
    found = first_bad_elements(dense.to_sparse(layout=layout, blocksize=blocks), 16)
    assert [(each.index, each.flat) for each in found] == [((0, 5), 5), ((2, 2), 14), ((3, 0), 18)]


@pytest.mark.parametrize("turn", [lambda tensor: tensor, lambda tensor: tensor.t(), lambda tensor: tensor[:, ::2]])
def test_a_large_gradient_is_searched_in_parts_that_join_up(turn):
    gradient = turn(torch.ones(700, 800))
    places = [(0, 1), (gradient.shape[0] // 2, 3), (gradient.shape[0] - 1, gradient.shape[1] - 1)]
    for place in places:
        gradient[place] = math.nan
    assert [each.index for each in first_bad_elements(gradient, 16)] == places
