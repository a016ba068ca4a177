"""What a stranger needs to take, change and keep the project is there, and says one thing."""

import hashlib
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from tests import lowest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKEFILE = (ROOT / "Makefile").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
WORKFLOWS = {path.name: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}
JOBS = {name: job for workflow in WORKFLOWS.values() for name, job in workflow["jobs"].items()}
SUPPORTED = ["3.11", "3.12", "3.13"]


def test_the_licence_is_the_official_text() -> None:
    words = " ".join((ROOT / "LICENSE").read_text().split())
    digest = hashlib.sha256(words.encode()).hexdigest()
    assert digest == "0ffddef9e48f8a09aed5caf2d44f7ba1c1be2d9b8e0a6f693b1635b2d5566645"
    assert (PROJECT["license"], PROJECT["license-files"]) == ("Apache-2.0", ["LICENSE"])


def test_every_address_of_the_project_is_the_placeholder_that_contributing_replaces() -> None:
    [placeholder, address] = re.findall(r"s\|(\S+?)\|", CONTRIBUTING)
    assert len(PROJECT["urls"]) == 5
    assert all(re.match(placeholder, url) for url in PROJECT["urls"].values())
    assert [bool(re.fullmatch(address, author["email"])) for author in PROJECT["authors"]] == [True]


def test_an_unreleased_version_has_an_unreleased_section() -> None:
    sections = re.findall(r"^## (.+)$", CHANGELOG, re.MULTILINE)
    released = [re.fullmatch(r"(\d+\.\d+\.\d+) - \d{4}-\d\d-\d\d", section) for section in sections[1:]]
    assert (sections[0], released[-1][1]) == ("Unreleased", "0.1.0")
    assert ".dev" in PROJECT["version"] or PROJECT["version"] == released[0][1]
    assert PROJECT["version"].partition(".dev")[0] >= released[0][1]


def test_workflows_run_commands_of_the_makefile() -> None:
    commands = [step["run"] for job in JOBS.values() for step in job["steps"] if "run" in step]
    assert {"make test", "make lint", "make test-lowest", "make dist"} <= set(commands)
    for command in commands:
        assert re.search(rf"^{command.split()[1]}:", MAKEFILE, re.MULTILINE), command


def test_workflows_cover_every_python_that_the_package_names() -> None:
    named = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", name)]
    assert named == SUPPORTED
    assert [JOBS[name]["strategy"]["matrix"]["python"] for name in ("newest", "lowest")] == [SUPPORTED, SUPPORTED]


def test_the_oldest_dependencies_are_those_of_pyproject() -> None:
    bounds = lowest.lowest()
    assert len(bounds) == len({line.partition("==")[0] for line in bounds})
    given = {re.split(r"[>=]", line)[0] for line in PROJECT["dependencies"]}
    assert given <= {line.partition("==")[0] for line in bounds}
    assert "h11==0.16" in bounds


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?:^    |`)make ([a-z-]+)", CONTRIBUTING, re.M))))
def test_every_command_that_contributing_names_exists(target: str) -> None:
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
