import logging
import math
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families as parse
from torch import nn

from esper_telemetry import start_textfile, watch
from esper_telemetry.exporters import textfile
from tests.snapshots import Source, fresh

HOSTILE = ["exp/run1", "../../etc/x", "a b", "a\\b", "lr=1e-3|bs=256", "sweep(seed=1", "x" * 256, "ü" * 256, "."]
TWINS = ["a/b", "a_b", "a\\b", "a_b~c14cddc033f64b9d", "a-1", "x" * 101, "x" * 102, "x" * 100]

only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


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


class Run(Source):
    """A monitor in which nothing happens."""

    def __init__(self, **named):
        super().__init__(replace(fresh(), run=replace(fresh().run, **named)))

    def on_check(self, listener):
        return lambda: None


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
    with pytest.raises(OSError, match=r"textfile-dir: expected a writable folder, got .*: No such file"):
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


@pytest.mark.parametrize("run_id", HOSTILE)
def test_a_run_of_any_name_has_a_file_in_the_folder(run_id, tmp_path):
    exporter = start_textfile(Run(run_id=run_id), tmp_path)
    assert os.listdir(tmp_path) == [exporter.path.name]
    samples = [sample for family in parse(exporter.path.read_text()) for sample in family.samples]
    assert {sample.labels["run_id"] for sample in samples} == {run_id}
    exporter.close()
    assert os.listdir(tmp_path) == []


def test_no_two_runs_ranks_or_attempts_share_a_file(tmp_path):
    runs = [Run(run_id=run_id, rank=rank, attempt=attempt) for run_id in TWINS for rank in (0, 1) for attempt in (0, 1)]
    with ExitStack() as stack:
        paths = {stack.enter_context(closing(start_textfile(run, tmp_path))).path for run in runs}
    assert len(paths) == len(runs)


def test_the_series_of_an_elastic_restart_stand_beside_those_of_the_attempt_before(tmp_path):
    with (
        closing(start_textfile(Run(attempt=0), tmp_path)) as first,
        closing(start_textfile(Run(attempt=2), tmp_path)) as last,
    ):
        pages = [next(iter(parse(exporter.path.read_text()))).samples[0].labels for exporter in (first, last)]
    assert pages == [{"run_id": "run-1", "rank": "0"}, {"run_id": "run-1", "rank": "0", "attempt": "2"}]


def test_everybody_may_read_the_file_whatever_the_umask(tmp_path):
    before = os.umask(0o077)
    try:
        with closing(start_textfile(Run(), tmp_path)) as exporter:
            assert stat.S_IMODE(exporter.path.stat().st_mode) == 0o644
    finally:
        os.umask(before)


def test_a_file_that_a_killed_run_left_is_removed_when_it_is_over_an_hour_old(monitor, tmp_path):
    old, new, foreign = (tmp_path / name for name in ("esper-a-0.prom", "esper-b-0.prom", "backup.prom"))
    for path, age in ((old, 3700), (new, 3500), (foreign, 3700)):
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    start_textfile(monitor, tmp_path).close()
    assert sorted(os.listdir(tmp_path)) == ["backup.prom", "esper-b-0.prom"]


def leave_old_files(folder, count=300):
    for number in range(count):
        path = folder / f"esper-old{number}-0.prom"
        path.touch()
        os.utime(path, (time.time() - 7200,) * 2)


A_RUN = """
import logging, os, sys, time
from dataclasses import replace
from esper_telemetry.exporters.textfile import start_textfile
from tests.snapshots import fresh

class Run:
    def __init__(self, rank=0):
        self.snapshot = replace(fresh(), run=replace(fresh().run, rank=rank))
    def on_check(self, listener):
        return lambda: None

logging.basicConfig(format="%(message)s")
"""

START = """
print("ready", flush=True)
at = float(sys.stdin.readline())
while time.time() < at:
    pass
exporter = start_textfile(Run(int(sys.argv[2])), sys.argv[1])
print("started", flush=True)
sys.stdin.readline()
exporter.close()
"""


def test_eight_ranks_that_start_together_beside_hundreds_of_old_files_all_start(tmp_path):
    leave_old_files(tmp_path)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [
        subprocess.Popen([sys.executable, "-c", A_RUN + START, str(tmp_path), str(rank)], **pipes, bufsize=1)
        for rank in range(8)
    ]
    for rank in ranks:
        assert rank.stdout.readline() == "ready\n"
    together = time.time() + 0.2
    for rank in ranks:
        rank.stdin.write(f"{together}\n")
    said = [rank.stdout.readline() for rank in ranks]
    names = os.listdir(tmp_path)
    errors = [rank.communicate("end\n")[1] for rank in ranks]
    assert said == ["started\n"] * 8, errors
    assert sorted(names) == [f"esper-run-1-{rank}.prom" for rank in range(8)]
    assert errors == [""] * 8


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: None, "No such file or directory"),
        (lambda folder: folder.write_text(""), "Not a directory"),
        (lambda folder: folder.symlink_to(folder), "Too many levels of symbolic links"),
    ],
)
def test_each_fault_of_a_folder_has_its_own_words(make, reason, tmp_path):
    make(tmp_path / "folder")
    with pytest.raises(OSError, match=rf"textfile-dir: expected a writable folder, got '.*': {reason}$"):
        start_textfile(Run(), tmp_path / "folder")


def test_a_folder_in_place_of_the_file_is_said_and_training_starts(tmp_path, caplog):
    (tmp_path / "esper-run-1-0.prom" / "x").mkdir(parents=True)
    start_textfile(Run(), tmp_path).close()
    (record,) = caplog.records
    assert record.getMessage().endswith(
        "esper-run-1-0.prom cannot be written: Is a directory (later failures are not logged)"
    )
    assert os.listdir(tmp_path) == ["esper-run-1-0.prom"]


def test_drafts_of_killed_runs_are_removed_with_their_files(tmp_path):
    names = ["esper-a-0.prom.0123abcd.tmp", "esper-a-0.2.prom", "esper-notes.prom", "esper-a-0.tmp"]
    for name in names:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - 7200,) * 2)
    (tmp_path / "esper-folder-0.prom").mkdir()
    os.utime(tmp_path / "esper-folder-0.prom", (time.time() - 7200,) * 2)
    start_textfile(Run(), tmp_path).close()
    assert sorted(os.listdir(tmp_path)) == ["esper-a-0.tmp", "esper-folder-0.prom", "esper-notes.prom"]


@pytest.fixture
def shared():
    """Make a folder that other users reach, as /tmp is: everybody may write, and remove only what is theirs."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


AS_NOBODY = """
os.umask(0o077)
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
start_textfile(Run(), sys.argv[1]).close()
{then}
"""


def as_nobody(folder, then="pass"):
    """Write a textfile as another user, whose umask hides everything, and do something `then`."""
    command = [sys.executable, "-c", A_RUN + AS_NOBODY.format(then=then), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@only_root
def test_node_exporters_user_reads_what_another_user_wrote(shared):
    then = "start_textfile(Run(), sys.argv[1]); os._exit(0)"
    assert as_nobody(shared, then).stderr == ""
    (path,) = shared.iterdir()
    assert path.owner() == "nobody"
    reads = "import os, sys; os.setgroups([]); os.setgid(12345); os.setuid(12345); open(sys.argv[1]).read()"
    assert subprocess.run([sys.executable, "-c", reads, path], check=False).returncode == 0


@only_root
def test_old_files_of_another_user_end_no_start(shared):
    leave_old_files(shared, 3)
    done = as_nobody(shared)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(os.listdir(shared)) == 3


@only_root
def test_a_file_of_another_user_in_place_of_ours_is_said_and_training_starts(shared):
    (shared / "esper-run-1-0.prom").touch()
    done = as_nobody(shared)
    assert done.returncode == 0
    path = shared / "esper-run-1-0.prom"
    assert done.stderr == (
        f"esper: {path} cannot be written: another user owns the file (later failures are not logged)\n"
    )
    assert os.listdir(shared) == [path.name]


@only_root
@pytest.mark.parametrize("mode", [0o755, 0o711, 0o700], ids=oct)
def test_a_folder_that_another_user_keeps_for_himself_is_said_at_set_up(shared, mode):
    leave_old_files(shared, 3)
    shared.chmod(mode)
    done = as_nobody(shared)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(
        f"textfile-dir: expected a writable folder, got '{shared}': Permission denied"
    )


@only_root
def test_a_folder_that_can_be_written_and_not_listed_will_do(shared):
    shared.chmod(0o733)
    assert as_nobody(shared).stderr == ""
