"""Every block of code in README and docs runs as it stands there."""

import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import urllib.request

import pytest
import torch
from torch import nn

from deploy.stack import servers
from esper_telemetry import watch
from esper_telemetry.cli.main import _parser, main
from esper_telemetry.exporters import exit as exits
from tests import test_loops
from tests.certificates import AUTHORITY
from tests.documents import ROOT, blocks, fences, python_of

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
SHELL = [
    (block.page, line)
    for page in PAGES
    for block in fences(page)
    if block.language == "sh"
    for line in block.code.splitlines()
]
IN_OTHER_FILES = {
    "docs/loops.md": "tests/test_loops.py",
    "docs/ranks.md": "tests/test_ranks_docs.py",
    "docs/trackers.md": "tests/test_trackers.py",
    "docs/webhook.md": "tests/test_notify_webhook.py",
}
HERE = [page for page in PAGES if page != "README.md" and page not in IN_OTHER_FILES and python_of(page)]
SHOWN = {
    "text",
    "mermaid",
    "json",
    "{toctree}",
    "{eval-rst}",
    "{generated} metrics",
    "{generated} alerts",
    "{generated} commands",
}
ESPER = "from esper_telemetry.cli import main; raise SystemExit(main())"
EXIT_CODES = {
    "esper ppo --inject nan:7@40": 1,
    "esper ppo --inject nan:7@40:action_net.weight": 1,
    "esper ppo --inject inf:2@40": 1,
    "esper ppo --inject inf:6@40 --on-critical halt": 3,
}
"""What ends otherwise than with 0."""


@pytest.fixture
def delivered_at_once():
    """Close whatever a block leaves open until the process ends."""
    before = list(exits._deliveries)
    yield
    for deliver in reversed([each for each in exits._deliveries if each not in before]):
        deliver()


@pytest.fixture
def folder(tmp_path, monkeypatch, delivered_at_once):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ESPER_LINGER_SECONDS", "0")
    monkeypatch.setenv("ESPER_LISTEN_ADDRESS", "127.0.0.1:0")
    monkeypatch.setenv("TEXTFILE_DIR", str(tmp_path))
    (tmp_path / "web-config.yml").write_text("basic_auth_users: {}\n")
    return tmp_path


def world():
    """Return what the pages call yours."""
    torch.manual_seed(0)
    model = test_loops.Network()
    batches = list(torch.randn(6, 5, 6))
    batches[3][0, 0] = math.nan
    return {
        "torch": torch,
        "model": model,
        "batches": batches,
        "loss_of": lambda model, batch: model(batch).square().mean(),
        "optimizer": torch.optim.Adam(model.parameters()),
        "monitor": watch(nn.Linear(2, 2)),
        "watch": watch,
    }


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) < 900


def test_the_readmes_script_shows_what_the_readme_says(folder, monkeypatch, capsys):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    names = {}
    [code] = python_of("README.md")
    exec(code, names)
    with urllib.request.urlopen(names["exporter"].url + "/metrics") as answer:
        page = answer.read().decode().splitlines()
    shown = [block.code for block in fences("README.md") if block.language == "text"]
    assert [line for block in shown for line in block.splitlines() if line not in page] == []
    assert "321 NaN elements; it began in layer 2.bias" in capsys.readouterr().out
    names["exporter"].close()


@pytest.mark.parametrize("page", HERE)
def test_the_blocks_of_a_page_run_one_after_the_other(page, folder):
    names = world()
    for code in python_of(page):
        exec(code, names)


def test_a_page_that_is_run_elsewhere_is_run_whole():
    for page in IN_OTHER_FILES:
        headings = [block.heading for block in fences(page) if block.language == "python"]
        assert len(headings) == len(set(headings)), f"{page}: two blocks in one section, of which one is run"
        source = (ROOT / IN_OTHER_FILES[page]).read_text()
        assert f'"{page.removeprefix("docs/")}"' in source or page == "docs/loops.md"
    frameworks = {"Lightning", "Hugging Face Trainer", "Accelerate", "stable-baselines3", "TorchRL"}
    assert set(blocks()) == {*test_loops.PLAIN, *frameworks}


def test_every_block_has_a_language_that_is_run_or_only_shown():
    found = {block.language for page in PAGES for block in fences(page)}
    assert found <= SHOWN | {"python", "sh", "yaml"}
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
        assert not re.search(r"\n\n {4}\S", text), f"{page}: an indented block, which no test would run"


@pytest.mark.parametrize(("page", "line"), sorted(set(SHELL)), ids=lambda each: each)
def test_a_shell_command_is_one_that_exists(page, line, folder):
    program, *arguments = shlex.split(line)
    if program == "esper":
        _parser().parse_args(arguments)
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        wanted = re.fullmatch(r"esper-telemetry(?:\[(.*)\])?", arguments[-1])
        assert set(filter(None, (wanted[1] or "").split(","))) <= set(extras)
    elif program == "make":
        subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, check=True, capture_output=True)
    elif program == "export":
        assert re.fullmatch(r"[A-Z_]+=\S+", *arguments)
    elif program == "prometheus":
        options = subprocess.run([servers.find("prometheus"), "--help"], capture_output=True, text=True, check=False)
        assert "--config.file" in options.stdout + options.stderr
        assert (ROOT / arguments[-1].partition("=")[2]).is_file()
    elif program == ".venv/bin/python":
        assert (ROOT / arguments[-1].replace(".", "/")).with_suffix(".py").is_file()
    else:
        assert (program, page) in {("jq", "docs/flight-recorder.md")}, "a command that no test knows"


RUN = sorted({line for page, line in SHELL if page in ("README.md", "docs/tutorial.md") and line.startswith("esper ")})


@pytest.mark.parametrize("line", [line for line in RUN if "--hold" not in line])
def test_a_command_of_readme_and_tutorial_runs(line, folder, capsys):
    assert main(shlex.split(line)[1:]) == EXIT_CODES.get(line, 0), capsys.readouterr()


@pytest.mark.parametrize("line", [line for line in RUN if "--hold" in line])
def test_a_command_that_holds_ends_with_ctrl_c(line, folder):
    # What runs in the background of a shell, as the tests may, is deaf to Ctrl-C.
    hear = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{hear}; {ESPER}", *shlex.split(line)[1:]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        said = ""
        for text in child.stdout:
            said += text
            if "Ctrl-C" in text:
                child.send_signal(signal.SIGINT)
    assert child.returncode == 0, said


def test_the_commands_of_the_flight_recorders_page_run(folder):
    exec(*python_of("docs/flight-recorder.md"), world())
    [recording] = (folder / "recordings").iterdir()
    lines = [line for page, line in SHELL if page == "docs/flight-recorder.md"]
    named = re.search(r"recordings/\S+", lines[0])[0]
    shutil.copy(recording, "FILE")
    shutil.copy(recording, named)
    (folder / "esper").write_text(f'#!/bin/sh\nexec {sys.executable} -c "{ESPER}" "$@"\n')
    (folder / "esper").chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    for line in lines:
        if line.startswith("jq") and shutil.which("jq") is None:
            continue
        done = subprocess.run(line, shell=True, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout != "" or "--html" in line) == (0, True), done.stderr
    assert (folder / "report.html").exists()


def test_prometheus_takes_what_the_documents_show_it(folder):
    for page in PAGES:
        for block in fences(page):
            if block.language == "yaml":
                AUTHORITY.cert_pem.write_to_path(folder / "ca.crt")
                (folder / "password").write_text("secret")
                (folder / "prometheus.yml").write_text(block.code)
                subprocess.run([servers.find("promtool"), "check", "config", "prometheus.yml"], check=True)
