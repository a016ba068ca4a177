"""How a process ends, and what is delivered then: each case a process of its own."""

import signal
import subprocess
import sys

import pytest

SCRIPT = """
import os, signal, sys, time
from esper_telemetry.exporters.exit import at_exit, not_at_exit

def deliver():
    print("delivered", flush=True)

{before}
at_exit(deliver)
print("ready", flush=True)
{after}
"""


def run(after="", before="", kill=None):
    """Return (exit status, the lines after "ready")."""
    script = SCRIPT.format(before=before, after=after)
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:
        assert child.stdout.readline() == "ready\n"
        if kill is not None:
            child.send_signal(kill)
        said = child.stdout.read().split()
    return child.returncode, said


@pytest.mark.parametrize(
    ("after", "status"),
    [("", 0), ("sys.exit(3)", 3), ("raise RuntimeError", 1), ("raise KeyboardInterrupt", -signal.SIGINT)],
)
def test_every_ordinary_end_delivers(after, status):
    assert run(after) == (status, ["delivered"])


def test_sigterm_delivers_and_the_parent_sees_the_signal():
    assert run("time.sleep(60)", kill=signal.SIGTERM) == (-signal.SIGTERM, ["delivered"])


@pytest.mark.parametrize(("after", "kill"), [("", None), ("time.sleep(60)", signal.SIGTERM)])
def test_the_last_one_delivers_first_either_way(after, kill):
    """So a push does not wait until somebody has scraped."""
    assert run(after, "at_exit(lambda: print('first given', flush=True))", kill)[1] == ["delivered", "first", "given"]


def test_a_handler_of_the_users_own_is_left_alone():
    before = "signal.signal(signal.SIGTERM, lambda *_: (print('saving', flush=True), sys.exit(7)))"
    assert run("time.sleep(60)", before, kill=signal.SIGTERM) == (7, ["saving", "delivered"])


def test_a_run_that_ignores_sigterm_goes_on():
    before = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    assert run("print('on', flush=True)", before, kill=signal.SIGTERM) == (0, ["on", "delivered"])


def test_what_was_taken_back_is_not_delivered():
    assert run("not_at_exit(deliver)") == (0, [])
