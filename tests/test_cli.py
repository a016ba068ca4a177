"""The `esper` command as its user runs it: a process of its own."""

import os
import re
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from esper_telemetry import start_exporter
from tests.snapshots import Source, fresh

ROOT = Path(__file__).parent.parent
ESPER = Path(sys.executable).with_name("esper")


def esper(*arguments, **environment):
    return subprocess.run(
        [ESPER, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=os.environ | environment,
    )


@pytest.mark.parametrize("option", ["-V", "--version"])
def test_it_tells_its_version(option):
    said = esper(option)
    assert re.fullmatch(r"esper-telemetry \d+\.\d+\.\d+(\.dev\d+)?\n", said.stdout)
    assert (said.returncode, said.stderr) == (0, "")


WHAT_IS_LOADED = """
import sys
from esper_telemetry.cli import main

try:
    main(sys.argv[1:])
except SystemExit:
    pass
print("LOADED", *({"torch", "prometheus_client", "opentelemetry"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "command",
    ["--version", "--help", "ppo --help", "ppo --epi 3", "drill --count 0", "report gone", "--print-completion bash"],
)
def test_what_does_not_train_loads_no_torch(command):
    run = subprocess.run(
        [sys.executable, "-c", WHAT_IS_LOADED, *command.split()], capture_output=True, text=True, check=False
    )
    assert "LOADED" in run.stdout
    assert run.stdout.rpartition("LOADED")[2].split() == []


def test_help_and_version_take_less_than_a_third_of_a_second():
    assert fastest(ESPER, "--version") < fastest(sys.executable, "-c", "pass") + 0.3
    assert fastest(ESPER, "--help") < fastest(sys.executable, "-c", "pass") + 0.3


def fastest(*command):
    """Return the least processor time of some tries: how long a command takes when nothing else runs."""
    times = []
    for _ in range(5):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        times.append(used.ru_utime + used.ru_stime)
    return min(times)


def test_half_an_option_is_none():
    run = esper("ppo", "--episode", "3")
    assert (run.returncode, run.stderr) == (2, "esper: unrecognized arguments: --episode 3\n")


COMPLETE = """
eval "$("$0" --print-completion bash)"
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_shtab_esper 2>/dev/null
echo "${COMPREPLY[*]}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not there")
@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("dr", "drill"),
        ("ppo --episo", "--episodes"),
        ("ppo --on-critical ", "continue skip halt rewind"),
        ("ppo --textfile-dir /us", "/usr"),
        ("report pyproj", "pyproject.toml"),
    ],
)
def test_a_shell_completes_it(typed, completed):
    run = subprocess.run(
        ["bash", "-c", COMPLETE, ESPER, "esper", *typed.split(" ")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == completed


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_get_a_script_too(shell):
    run = esper("--print-completion", shell)
    assert (run.returncode, run.stderr) == (0, "")
    assert "--on-critical" in run.stdout


def test_a_healthy_run_ends_at_once_with_a_summary():
    run = esper("ppo", "--episodes", "3", "--listen-address", "127.0.0.1:0")
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert re.search(r"metrics at http://127\.0\.0\.1:\d+/metrics", run.stdout)
    assert re.search(r"^update 1  episodes \d/3  reward ", run.stdout, re.MULTILINE)
    assert re.search(r"^bad checks       0$", run.stdout, re.MULTILINE)
    assert re.search(r"^measuring        0\.\d+ s, \d+\.\d% of the ", run.stdout, re.MULTILINE)


def test_the_listen_address_may_be_spelled_as_prometheus_exporters_do():
    run = esper("ppo", "--episodes", "1", "--web.listen-address", "127.0.0.1:0", "--linger", "0")
    assert run.returncode == 0, run.stderr
    assert re.search(r"metrics at http://127\.0\.0\.1:\d+/metrics", run.stdout)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("RANK", "abc", "RANK: expected a whole number of at least 0, got 'abc'"),
        ("ESPER_RUN_ID", "a\nb", r"ESPER_RUN_ID: expected no control characters, got 'a\nb'"),
    ],
)
def test_an_identity_that_is_no_good_is_one_line(variable, value, message):
    run = esper("ppo", "--listen-address", "127.0.0.1:0", **{variable: value})
    assert (run.returncode, run.stderr) == (2, f"esper ppo: {message}\n")


def test_halt_ends_with_3_and_says_why_after_it_waited_for_a_scrape():
    run = esper(
        *("ppo", "--listen-address", "127.0.0.1:0", "--linger", "0.1"),
        *("--inject", "inf:6@41:action_net.weight", "--on-critical", "halt"),
    )
    assert run.returncode == 3
    said = run.stderr.splitlines()
    assert said[0] == (
        "esper ppo: halted: critical gradients at check 41: Inf 6, NaN 0 (critical is above 5), "
        "first in action_net.weight"
    )
    waits = r"esper: waiting for .*/metrics to be scraped once more, 0\.1 s at most; Ctrl-C exits at once"
    assert re.fullmatch(waits, said[1])


def test_a_run_that_dies_of_a_bad_gradient_says_so_and_fails():
    run = esper("ppo", "--listen-address", "127.0.0.1:0", "--linger", "0", "--inject", "nan:1@41:action_net.weight")
    assert run.returncode == 1
    assert re.search(r"^esper ppo: training died after bad check 41: ValueError: ", run.stderr, re.MULTILINE)
    assert re.search(r"^first bad layer  action_net\.weight, at check 41$", run.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--episodes", "0"], "--episodes: expected at least 1, got 0"),
        (["--episodes", "ten"], "--episodes: expected a whole number, got 'ten'"),
        (["--seed", "x"], "--seed: expected a whole number, got 'x'"),
        (["--linger", "long"], "--linger: expected seconds, got 'long'"),
        (["--env", "Nowhere-v0"], "--env: expected a Gymnasium environment such as CartPole-v1, got 'Nowhere-v0': "),
        (["--env", "Pendulum-v1", "--inject", "inf:1@1:x"], "--inject: expected one of the layers "),
        (["--inject", "inf@3"], "--inject: expected KIND:COUNT@CHECK[:LAYER] such as inf:6@40 "),
        (["--inject", "inf:1@999999"], "--inject: expected a check from 1 to 6280, the last one in reach, got 999999"),
        (["--listen-address", "here"], "--listen-address: expected HOST:PORT such as 127.0.0.1:19301, got 'here'"),
        (["--listen-address", "192.0.2.1:1"], "--listen-address: cannot listen on 192.0.2.1:1: "),
        (["--otlp-endpoint", "here"], "--otlp-endpoint: expected a URL such as http://localhost:4318, got 'here'"),
        (["--web.config.file", "gone.yml"], "--web.config.file: gone.yml: No such file or directory"),
        (["--web.config.file", "pyproject.toml"], "--web.config.file: pyproject.toml: "),
        (["--on-critical", "panic"], "--on-critical: invalid choice: 'panic' "),
    ],
)
def test_bad_input_is_one_line_that_names_the_option_and_exit_code_2(arguments, message):
    run = esper("ppo", *arguments)
    assert run.returncode == 2
    assert run.stderr.startswith(f"esper ppo: {message}")
    assert len(run.stderr.splitlines()) == 1
    assert run.stdout == ""


def test_a_port_in_use_is_one_line_and_exit_code_2():
    with closing(start_exporter(Source(fresh()), "127.0.0.1:0")) as exporter:
        address = exporter.url.removeprefix("http://")
        run = esper("ppo", "--listen-address", address)
    assert run.returncode == 2
    assert run.stderr == (f"esper ppo: --listen-address: cannot listen on {address}: Address already in use\n")
