import logging
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families as parse
from torch import nn

from esper_telemetry import start_textfile, watch
from esper_telemetry.exporters import textfile
from tests.snapshots import RUN


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
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in parse(path.read_text())
        for sample in family.samples
    }


def test_it_writes_at_once_at_set_up(monitor, tmp_path):
    exporter = start_textfile(monitor, tmp_path)
    assert read(tmp_path / "esper.prom")["esper_checks_total",] == 0
    exporter.close()


def test_a_bad_check_is_in_the_file_when_backward_returns(model, monitor, tmp_path):
    exporter = start_textfile(monitor, tmp_path)
    backward(model)
    assert read(exporter.path)["esper_checks_total",] == 0  # a healthy one can wait
    backward(model, math.nan)
    assert read(exporter.path)["esper_nan_grad_recent_max",] == 6
    assert os.listdir(tmp_path) == ["esper.prom"]
    exporter.close()


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


def test_a_second_live_run_in_the_folder_is_refused(monitor, tmp_path):
    other = start_textfile(monitor, tmp_path)
    child = subprocess.run(
        [sys.executable, "-c", _SECOND, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert child.stdout.strip() == f"textfile-dir: expected a folder that no other run writes to, got '{tmp_path}'"
    other.close()


def test_a_dead_runs_file_is_taken_over(monitor, tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    labels = ",".join(f'{name}="{value}"' for name, value in vars_of(replace(RUN, pid=dead.pid)).items())
    (tmp_path / "esper.prom").write_text(f"esper_run_info{{{labels}}} 1.0\n")
    start_textfile(monitor, tmp_path).close()


def vars_of(run):
    return {"host": run.host, "pid": run.pid, "rank": run.rank, "run_id": run.run_id, "world_size": run.world_size}


_SECOND = """
import sys
from esper_telemetry import start_textfile, watch
from torch import nn
model = nn.Linear(1, 1)
try:
    start_textfile(watch(model), sys.argv[1])
except OSError as error:
    print(error.strerror)
"""
