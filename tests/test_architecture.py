"""The house is built as docs/architecture.md says: imports go one way, and the drawing shows them."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "esper_telemetry"
PAGE = (ROOT / "docs" / "architecture.md").read_text()
FILES = sorted(PACKAGE.rglob("*.py"))
ALLOWED_LONG = {"triton_kernel.py"}


def module_of(file):
    parts = ("esper_telemetry", *file.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(part for part in parts if part != "__init__")


def imports_of(file):
    """Return the modules of the package that a file imports, those for type checkers among them."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "esper_telemetry":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else node.module)
    return found


MODULES = {module_of(file): file for file in FILES}
IMPORTS = {module: imports_of(file) - {module} for module, file in MODULES.items() if module != "esper_telemetry"}


def room_of(module):
    """Return the room in which a module is: a folder of the package, or a file that stands by itself."""
    parts = module.split(".")[1:]
    return "/".join(parts[:2] if parts[0] == "exporters" and len(parts) > 1 and _is_a_room(parts[1]) else parts[:1])


def _is_a_room(name):
    return name == "http" or (PACKAGE / "exporters" / name).is_dir()


ARROWS = {
    (room_of(module), room_of(imported))
    for module, found in IMPORTS.items()
    for imported in found
    if room_of(module) != room_of(imported)
}


def below(room, arrows):
    """Return every room that can be reached from one."""
    reached, new = set(), {room}
    while new:
        new = {to for start, to in arrows if start in new} - reached
        reached |= new
    return reached


def test_no_file_imports_in_a_circle():
    assert tuple(TopologicalSorter(IMPORTS).static_order())


def test_no_room_imports_in_a_circle():
    graph = {}
    for start, to in ARROWS:
        graph.setdefault(start, set()).add(to)
    assert tuple(TopologicalSorter(graph).static_order())


def test_the_drawing_shows_the_arrows_that_no_others_imply():
    implied = {(start, to) for start, to in ARROWS if any(to in below(via, ARROWS) for s, via in ARROWS if s == start)}
    drawn = set(re.findall(r"^ +(\S+) --> (\S+)$", PAGE, re.MULTILINE))
    names = dict(re.findall(r"^ +(\w+)\[\"(?:<b>)?([\w/]+)", PAGE, re.MULTILINE))
    assert {(names[start], names[to]) for start, to in drawn} == ARROWS - implied


@pytest.mark.parametrize(
    ("room", "allowed"),
    [
        ("arguments", set()),
        ("health", set()),
        ("metrics", set()),
        ("snapshot", {"health"}),
        ("scan", {"health"}),
        ("exporters/web", set()),
        ("verdict", {"arguments", "snapshot", "scan"}),
        ("monitor", {"arguments", "health", "snapshot", "scan", "ranks", "recorder", "verdict"}),
    ],
)
def test_a_room_imports_only_what_is_below_it(room, allowed):
    assert {to for start, to in ARROWS if start == room} <= allowed


def test_exporters_know_neither_the_monitor_nor_the_scan():
    for start, to in ARROWS:
        if start.startswith("exporters"):
            assert to.startswith("exporters") or to in {"arguments", "health", "metrics", "snapshot", "ranks"}, (
                start,
                to,
            )


@pytest.mark.parametrize(
    "module", ["esper_telemetry.snapshot", "esper_telemetry.exporters.prometheus", "esper_telemetry.cli"]
)
def test_these_import_no_torch(module):
    code = f"import sys, {module}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("module", ["esper_telemetry.monitor", "esper_telemetry.scan", "esper_telemetry.snapshot"])
def test_these_run_without_what_exporters_need(module):
    """Training images often have torch alone, and the package may not even be installed there."""
    missing = ["prometheus_client", "opentelemetry", "tornado", "yaml", "bcrypt"]
    code = f"import sys\nfor name in {missing}: sys.modules[name] = None\nimport {module}"
    if module.endswith("monitor"):
        code += (
            "\nimport importlib.metadata as m\nm.version = None\nimport torch\nfrom esper_telemetry import watch"
            "\nmodel = torch.nn.Linear(2, 1)\nmonitor = watch(model)\nmodel(torch.ones(1, 2)).sum().backward()"
            "\nassert monitor.snapshot.checks == 1 and monitor.snapshot.monitor_errors == 0"
        )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("file", [file for file in FILES if file.name not in ALLOWED_LONG], ids=module_of)
def test_functions_are_short(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 50, f"{node.name} has more than 50 lines"


def test_the_monitor_stays_a_thin_object():
    assert len((PACKAGE / "monitor" / "monitor.py").read_text().splitlines()) < 250


def test_every_file_that_the_page_names_is_there():
    named = set(re.findall(r"`((?:\w+/)+\w+\.py|\w+\.py)`", PAGE))
    assert len(named) > 15
    for name in named:
        assert any((base / name).exists() for base in (PACKAGE, ROOT, ROOT / "tests")), name
