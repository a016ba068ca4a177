import logging
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families as parse
from torch import nn

from esper_telemetry import start_textfile, watch
from esper_telemetry.exporters import textfile


@pytest.fixture
def model():
    return nn.Linear(3, 2)


@pytest.fixture
def monitor(model):
    monitor = watch(model)
    yield monitor
    monitor.close()


def backward(model, x=1.0):
    model.zero_grad()
    model(torch.full((1, 3), x)).sum().backward()


def read(path):
    return {(sample.name,): sample.value for family in parse(path.read_text()) for sample in family.samples}


def test_it_writes_at_once_at_set_up(monitor, tmp_path):
    exporter = start_textfile(monitor, tmp_path)
    assert read(exporter.path)["esper_checks_total",] == 0
    exporter.close()


def test_a_bad_check_is_in_the_file_when_backward_returns(model, monitor, tmp_path):
    exporter = start_textfile(monitor, tmp_path)
    backward(model)
    assert read(exporter.path)["esper_checks_total",] == 0  # a healthy one can wait
    backward(model, math.nan)
    assert read(exporter.path)["esper_nan_grad_recent_max",] == 6
    assert os.listdir(tmp_path) == [exporter.path.name]
    exporter.close()


TERMINATED_WHILE_WRITING = """
import os, signal, sys, time
from esper_telemetry import start_textfile
from tests.snapshots import bad, fresh

just_now = bad().but(recent=fresh().recent.after(time.monotonic(), bad().layers, 1))

class Monitor:
    reads = 0
    def on_check(self, listener):
        return lambda: None
    @property
    def snapshot(self):
        self.reads += 1
        if self.reads == 4:  # three were at set-up; this one is in the middle of the write below
            os.kill(os.getpid(), signal.SIGTERM)
        return just_now if self.reads > 3 else fresh()

exporter = start_textfile(Monitor(), sys.argv[1])
exporter._write()
"""


def test_sigterm_in_the_middle_of_a_write_still_delivers(tmp_path):
    run = subprocess.run([sys.executable, "-c", TERMINATED_WHILE_WRITING, str(tmp_path)], timeout=60, check=False)
    assert run.returncode == -signal.SIGTERM
    (path,) = tmp_path.iterdir()
    assert read(path)["esper_inf_grad_count",] == 2


def test_it_is_kept_fresh_while_nothing_is_bad(model, monitor, tmp_path, monkeypatch):
    monkeypatch.setattr(textfile, "INTERVAL_SECONDS", 0.01)
    exporter = start_textfile(monitor, tmp_path)
    backward(model)
    while read(exporter.path)["esper_checks_total",] == 0:
        pass
    exporter.close()


def test_a_healthy_end_takes_the_file_away(model, monitor, tmp_path):
    exporter = start_textfile(monitor, tmp_path)
    backward(model)
    exporter.close()
    exporter.close()
    assert os.listdir(tmp_path) == []


def test_a_bad_end_leaves_it_with_the_last_state(model, monitor, tmp_path):
    exporter = start_textfile(monitor, tmp_path)
    backward(model, math.nan)
    backward(model)
    monitor.close()
    exporter.close()
    page = read(exporter.path)
    assert (page["esper_checks_total",], page["esper_run_ended",], page["esper_nan_grad_recent_max",]) == (2, 1, 6)


def test_a_folder_that_cannot_be_written_is_said_at_set_up(monitor, tmp_path):
    with pytest.raises(OSError, match=r"textfile-dir: expected a folder that can be written, got .*: No such file"):
        start_textfile(monitor, tmp_path / "nowhere")


def test_a_disk_that_fills_up_meanwhile_is_logged_once_and_training_goes_on(model, monitor, tmp_path, caplog):
    folder = tmp_path / "folder"
    folder.mkdir()
    exporter = start_textfile(monitor, folder)
    exporter.path.unlink()
    folder.rmdir()
    with caplog.at_level(logging.WARNING):
        backward(model, math.nan)
        backward(model, math.inf)
    assert monitor.snapshot.checks == 2
    assert len(caplog.records) == 1
    exporter.close()


def test_every_series_says_whose_it_is(monitor, tmp_path):
    exporter = start_textfile(monitor, tmp_path)
    run = monitor.snapshot.run
    for family in parse(exporter.path.read_text()):
        for sample in family.samples:
            assert (sample.labels["run_id"], sample.labels["rank"]) == (run.run_id, "0")
    exporter.close()


def test_runs_in_one_folder_have_files_of_their_own(monitor, model, tmp_path):
    one, two = start_textfile(monitor, tmp_path), start_textfile(watch(model), tmp_path)
    assert one.path != two.path
    one.close()
    two.close()


def test_a_file_that_a_killed_run_left_is_removed_when_it_is_over_an_hour_old(monitor, tmp_path):
    old, new, foreign = (tmp_path / name for name in ("esper-a-0.prom", "esper-b-0.prom", "backup.prom"))
    for path, age in ((old, 3700), (new, 3500), (foreign, 3700)):
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    start_textfile(monitor, tmp_path).close()
    assert sorted(os.listdir(tmp_path)) == ["backup.prom", "esper-b-0.prom"]
