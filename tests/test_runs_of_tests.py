"""A run of tests ends, and names the test at fault, whatever that test does to its process."""

import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent / "pyproject.toml"

# Between its neighbours of one group, and with others still to come: where pytest-xdist once waited for ever.
TESTS = """
import ctypes, os, signal, threading, time
import pytest

@pytest.mark.parametrize("number", range(20))
def test_before(number):
    time.sleep(0.01)

@pytest.mark.xdist_group("group")
def test_neighbour():
    pass

@pytest.mark.xdist_group("group")
def test_at_fault():
    {fault}

@pytest.mark.xdist_group("group")
def test_other_neighbour():
    pass

@pytest.mark.parametrize("number", range(20))
def test_after(number):
    time.sleep(0.01)
"""


GROUP = """
import os
import pytest

@pytest.mark.xdist_group("group")
@pytest.mark.parametrize("number", range(20))
def test_in_one_process(number):
    open(f"process {os.getpid()}", "w").close()
"""


def run(folder, fault, *options):
    """Run the tests with the project's settings on two workers; return the exit code and what was printed."""
    folder.joinpath("test_fault.py").write_text(TESTS.format(fault=fault))
    command = [sys.executable, "-m", "pytest", "-c", PROJECT, "--rootdir", folder, "-p", "no:cacheprovider"]
    workers = ["--numprocesses", "2", "--dist", "loadgroup"]
    done = subprocess.run(
        [*command, *workers, *options, folder], capture_output=True, text=True, timeout=300, cwd=folder, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    "fault",
    ["os._exit(0)", "os.kill(os.getpid(), signal.SIGKILL)", "ctypes.string_at(0)"],
    ids=["exit", "kill", "segv"],
)
def test_a_worker_that_crashes_ends_the_run(tmp_path, fault):
    code, output = run(tmp_path, fault)
    assert code == 1
    assert "crashed while running 'test_fault.py::test_at_fault@group'" in output


def test_a_test_that_hangs_fails_with_the_stacks_of_its_threads(tmp_path):
    code, output = run(
        tmp_path, "threading.Thread(target=time.sleep, args=(4,)).start(); time.sleep(600)", "--timeout=2"
    )
    assert code == 1
    assert "FAILED test_fault.py::test_at_fault@group" in output
    assert "1 failed, 42 passed" in output, "the others run all the same"
    assert "Stack of Thread-" in output


def test_a_test_that_hangs_where_no_signal_arrives_ends_the_run(tmp_path):
    deaf = "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM}); time.sleep(600)"
    code, output = run(tmp_path, deaf, "-o", "faulthandler_timeout=3")
    assert code == 1
    assert "crashed while running 'test_fault.py::test_at_fault@group'" in output
    assert "Timeout (0:00:03)!" in output


def test_a_group_runs_in_one_process(tmp_path):
    tmp_path.joinpath("test_group.py").write_text(GROUP)
    code, _ = run(tmp_path, "pass")
    assert code == 0
    assert len(list(tmp_path.glob("process *"))) == 1
