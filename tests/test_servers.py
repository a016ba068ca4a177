"""Servers are found or fetched once, run on loopback, and never outlive their block."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from deploy.stack import servers
from deploy.stack.servers import PROGRAMS, ProgramNotFound, Server, ServerFailed, find

ROOT = Path(__file__).parent.parent

# Stands in for apt-get: knows no package until its private lists were updated, and writes down what it was asked.
APT_GET = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$*" in
    *update*) exit 0;;
    *Dir::State::Lists=*download*) sleep 0.2; touch package.deb;;
    *) echo "E: Unable to locate package" >&2; exit 100;;
esac
"""
DPKG = """#!/bin/sh
mkdir -p "$3/usr/bin"
others="prometheus-node-exporter vmalert kubectl chromium-headless-shell"
for name in prometheus ${PROMTOOL-promtool} prometheus-alertmanager amtool $others; do
    printf '#!/bin/sh\\n' > "$3/usr/bin/$name"; chmod +x "$3/usr/bin/$name"
done
mkdir -p "$3/usr/lib/machine"; touch "$3/usr/lib/machine/libx.so.1"
"""


def executable(path: Path, text: str = "#!/bin/sh\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a machine without servers and without package lists; return its folder of programs."""
    programs = tmp_path / "bin"
    for name in ("sh", "mkdir", "touch", "chmod", "sleep"):
        programs.mkdir(exist_ok=True)
        (programs / name).symlink_to(next(p for p in (Path("/bin", name), Path("/usr/bin", name)) if p.exists()))
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return programs


@pytest.fixture
def debian(bare: Path) -> Path:
    """Add apt-get and dpkg to it; return the file of what apt-get was asked."""
    executable(bare / "apt-get", APT_GET)
    executable(bare / "dpkg", DPKG)
    return bare.parent / "calls"


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_is_there_and_runs(name: str) -> None:
    try:
        program = find(name)
    except ProgramNotFound as error:
        if not PROGRAMS[name].optional:
            raise
        pytest.skip(str(error))
    version = ("version", "--client") if name == "kubectl" else ("--version",)
    subprocess.run([program, *version], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("name", "on_path"), [(name, on_path) for name, program in PROGRAMS.items() for on_path in program.names]
)
def test_a_program_on_path_is_used(bare: Path, name: str, on_path: str) -> None:
    ours = executable(bare / on_path)
    assert find(name) == ours


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_missing_program_is_one_line_that_says_what_to_install(bare: Path, name: str) -> None:
    with pytest.raises(ProgramNotFound, match=rf"\A{name}: not on PATH; install it from https://\S+ and try again\Z"):
        find(name)


def test_a_failed_download_is_one_line_with_the_reason(debian: Path, bare: Path) -> None:
    executable(bare / "apt-get", "#!/bin/sh\necho 'E: no route to host' >&2\nexit 100\n")
    with pytest.raises(
        ProgramNotFound, match=r"\Aprometheus: not on PATH, and apt-get failed \(E: no route to host\).*\Z"
    ):
        find("prometheus")


def test_empty_package_lists_are_filled_privately(debian: Path) -> None:
    assert find("promtool").is_relative_to(servers.cache_folder())
    assert ["update" in call for call in debian.read_text().splitlines()] == [False, True, False]


def test_a_program_of_a_later_release_is_fetched_from_there_at_once(debian: Path) -> None:
    assert find("vmalert").is_relative_to(servers.cache_folder() / "victoria-metrics")
    update, download = debian.read_text().splitlines()
    assert ("update" in update, "download victoria-metrics" in download) == (True, True)
    assert "Dir::Etc::SourceParts=/dev/null" in update


def test_a_browser_is_fetched_with_what_it_needs_and_finds_it_beside_it(debian: Path) -> None:
    chromium = find("chromium")
    [install] = [call for call in debian.read_text().splitlines() if "install" in call and "Lists" in call]
    assert {"--download-only", "chromium-headless-shell", "chromium-common"} <= set(install.split())
    root = chromium.parents[2]
    library = root / "usr" / "lib" / "machine" / "libx.so.1"
    assert str(library.parent.relative_to(root)) in chromium.read_text()
    program = executable(root / "usr/lib/chromium/chromium-headless-shell", '#!/bin/sh\necho "$LD_LIBRARY_PATH" "$@"\n')
    said = subprocess.run([chromium, "--version"], check=True, capture_output=True, text=True).stdout
    assert Path(said.split()[0]).resolve() == library.parent
    assert (said.split()[1:], program.name) == (["--version"], chromium.name)


def test_what_is_optional_and_cannot_be_had_is_one_line_and_no_failure(
    debian: Path, bare: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    executable(bare / "apt-get", APT_GET.replace("*update*) exit 0", "*SourceParts*) exit 100"))
    for name in ("prometheus", "promtool", "alertmanager", "amtool", "node_exporter", "chromium"):
        executable(bare / name)
    assert servers.main() == 0
    out, error = capsys.readouterr()
    assert out.count("\n") == 6
    failed = "{0}: not on PATH, and apt-get failed (no output); install {0}\n"
    assert error == failed.format("vmalert") + failed.format("kubectl")


def test_a_program_that_moved_to_a_package_of_its_own_is_fetched_from_there(
    debian: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMTOOL", "")
    find("prometheus")
    monkeypatch.delenv("PROMTOOL")
    assert find("promtool").parents[2].name == "promtool"


def test_a_program_in_none_of_its_packages_is_said(debian: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMTOOL", "")
    with pytest.raises(ProgramNotFound, match=r"\Apromtool: not in Debian's prometheus and promtool; install .*\Z"):
        find("promtool")


def test_the_second_call_fetches_nothing_and_leaves_nothing_behind(debian: Path) -> None:
    first = find("prometheus")
    calls = debian.read_text()
    assert (find("prometheus"), find("promtool").parent) == (first, first.parent)
    assert debian.read_text() == calls
    assert sorted(path.name for path in servers.cache_folder().iterdir()) == [".lock", "prometheus"]


def test_a_half_unpacked_package_is_fetched_again(debian: Path) -> None:
    (servers.cache_folder() / "prometheus" / "usr").mkdir(parents=True)
    assert os.access(find("prometheus"), os.X_OK)


def test_two_processes_at_once_fetch_once(debian: Path) -> None:
    both = [
        subprocess.Popen([sys.executable, "-m", "deploy.stack.servers"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert outputs[0] == outputs[1]
    assert debian.read_text().count("update") == 6, "one download for each of the six packages"


def test_the_command_prints_one_line_for_what_is_missing(bare: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "deploy.stack.servers"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("prometheus: not on PATH")
    assert done.stderr.count("\n") == 1


def status(url: str) -> int:
    with urllib.request.urlopen(url, timeout=5) as response:
        return int(response.status)


def test_servers_start_answer_and_stop(tmp_path: Path) -> None:
    config = tmp_path / "prometheus.yml"
    config.write_text("scrape_configs: []\n")
    routes = tmp_path / "alertmanager.yml"
    routes.write_text("route: {receiver: nobody}\nreceivers: [{name: nobody}]\n")
    (tmp_path / "run.prom").write_text("esper_run_ended 0\n")
    with (
        servers.prometheus(config, tmp_path / "prometheus") as prometheus,
        servers.alertmanager(routes, tmp_path / "alertmanager") as alertmanager,
        servers.node_exporter(tmp_path, tmp_path / "node") as node,
    ):
        assert status(f"{prometheus.url}/-/healthy") == status(f"{alertmanager.url}/-/healthy") == 200
        page = urllib.request.urlopen(f"{node.url}/metrics").read().decode()
        assert "\nesper_run_ended 0\n" in page
        assert 'node_textfile_mtime_seconds{file="' in page
        pids = [prometheus.pid, alertmanager.pid, node.pid]
    for pid in pids:
        assert pid is not None
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_stopped_server_comes_back_on_the_same_port(tmp_path: Path) -> None:
    with servers.node_exporter(tmp_path, tmp_path / "node") as node:
        url, first = node.url, node.pid
        node.stop()
        assert node.pid is None
        with pytest.raises(OSError, match="refused"):
            status(url)
        node.start()
        assert (node.url, status(url)) == (url, 200)
        assert node.pid != first


def test_a_server_that_dies_shows_its_last_words(tmp_path: Path) -> None:
    config = tmp_path / "prometheus.yml"
    config.write_text("scrape_configs: nonsense\n")
    server = servers.prometheus(config, tmp_path / "prometheus")
    with pytest.raises(ServerFailed, match=r"(?s)prometheus ended with 2:.*nonsense"):
        server.start()
    assert server.pid is None


def test_a_port_that_is_taken_is_said_and_not_mistaken_for_our_server(tmp_path: Path) -> None:
    with (
        servers.node_exporter(tmp_path, tmp_path / "first") as first,
        pytest.raises(ServerFailed, match=r"node_exporter cannot listen on \S+: Address already in use"),
    ):
        servers.node_exporter(tmp_path, tmp_path / "second", port=first.port).start()


def test_a_server_that_never_gets_ready_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "START_SECONDS", 0.3)
    monkeypatch.setattr(servers, "STOP_SECONDS", 0.3)
    mute = executable(tmp_path / "mute", "#!/bin/sh\ntrap '' TERM\necho $$ >&2\nwhile :; do sleep 0.05; done\n")
    monkeypatch.setattr(servers, "find", lambda name: mute)
    server = Server("prometheus", (), tmp_path / "server", port=None, ready="/")
    with pytest.raises(ServerFailed, match="prometheus was not ready after 0 s"):
        server.start()
    with pytest.raises(ProcessLookupError):
        os.kill(int(server.log.read_text()), 0)


def test_a_free_port_is_free_and_not_ephemeral() -> None:
    port = servers.free_port()
    assert 20000 <= port < 32768
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))
