"""Find or fetch the real servers and a browser, and run servers on loopback ports.

`python -m deploy.stack.servers` fetches what is missing and prints where each is.
"""

from __future__ import annotations

import fcntl
import http.client
import os
import platform
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from deploy.stack.packages import ProgramNotFound, unpack

START_SECONDS = 30.0
STOP_SECONDS = 10.0
_HOST = "127.0.0.1"
_PORTS = range(20000, 32768)  # below the ephemeral ports, which any outgoing connection may take meanwhile


class ServerFailed(RuntimeError):
    """Say that a server did not start, with the end of its log."""


class _Program(NamedTuple):
    packages: tuple[str, ...]  # of Debian, the likeliest first
    names: tuple[str, ...]  # upstream's name and Debian's, as found on PATH
    home: str = "https://prometheus.io/download/"
    release: str | None = None  # of Debian, where the machine's own may have one that is too old
    optional: bool = False
    beside: tuple[str, ...] = ()  # packages that it runs with, from the machine's own release


PROGRAMS = {
    "prometheus": _Program(("prometheus",), ("prometheus",)),
    "promtool": _Program(("prometheus", "promtool"), ("promtool",)),  # a package of its own since Prometheus 3
    "alertmanager": _Program(("prometheus-alertmanager",), ("alertmanager", "prometheus-alertmanager")),
    "amtool": _Program(("prometheus-alertmanager",), ("amtool",)),
    "node_exporter": _Program(("prometheus-node-exporter",), ("node_exporter", "prometheus-node-exporter")),
    "vmalert": _Program(  # from 1.90 on, it knows keep_firing_for
        ("victoria-metrics",), ("vmalert",), "https://docs.victoriametrics.com/vmalert/", "trixie", optional=True
    ),
    "kubectl": _Program(("kubectl",), ("kubectl",), "https://kubernetes.io/docs/tasks/tools/", "trixie", optional=True),
    "chromium": _Program(
        ("chromium-headless-shell",),
        ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell"),
        "https://www.chromium.org/getting-involved/download-chromium/",
        beside=("chromium-common", "fontconfig-config", "fonts-dejavu-core"),
    ),
}


def find(name: str) -> Path:
    """Return the program's path: from PATH, or Debian's package unpacked in the cache. Raises `ProgramNotFound`."""
    program = PROGRAMS[name]
    for candidate in program.names:
        if found := shutil.which(candidate):
            return Path(found)
    return _unpacked(program) or _fetch(name, program)


def cache_folder() -> Path:
    """Return where fetched packages are kept: `$XDG_CACHE_HOME/esper-telemetry/servers/<machine>`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "esper-telemetry" / "servers" / platform.machine()


def _unpacked(program: _Program) -> Path | None:
    folders = (cache_folder() / package / "usr" / "bin" for package in program.packages)
    candidates = (folder / name for folder in folders for name in program.names)
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def _fetch(name: str, program: _Program) -> Path:
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise ProgramNotFound(f"{name}: not on PATH; install it from {program.home} and try again")
    with _lock(cache_folder()):
        for package in program.packages:
            if found := _unpacked(program):  # another process was faster, or an earlier package held it
                return found
            if not (cache_folder() / package / "usr" / "bin").exists():
                unpack(name, package, cache_folder() / package, program.release, program.beside)
    if found := _unpacked(program):
        return found
    raise ProgramNotFound(f"{name}: not in Debian's {' and '.join(program.packages)}; install it and put it on PATH")


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def free_port() -> int:
    """Return a loopback port that nobody listens on."""
    for port in random.sample(_PORTS, 100):
        with socket.socket() as probe:
            try:
                probe.bind((_HOST, port))
            except OSError:
                continue
            return port
    raise ServerFailed("no free port on 127.0.0.1")


class Server:
    """Run one program on a loopback port while the `with` block lasts; `start` and `stop` may also be called by hand.

    A stopped server starts again on the same port, with the same folder. Its log is `<folder>/<name>.log`.
    """

    def __init__(self, name: str, arguments: Sequence[str], folder: Path, *, port: int | None, ready: str) -> None:
        self.name = name
        self.port = free_port() if port is None else port
        self.url = f"http://{_HOST}:{self.port}"
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"{name}.log"
        self._command = [str(find(name)), f"--web.listen-address={_HOST}:{self.port}", *arguments]
        self._ready = ready
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Start, and wait until it is ready."""
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Stop."""
        self.stop()

    @property
    def pid(self) -> int | None:
        """Return the process, None while stopped."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start and wait until ready. Raises `ServerFailed` with the end of the log."""
        if self._process is not None:
            return
        self._check_port()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            self._wait_until_ready(self._process)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Terminate, and kill what does not end in time."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _check_port(self) -> None:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the servers do: fails only on a listener
            try:
                probe.bind((_HOST, self.port))
            except OSError as error:
                raise ServerFailed(f"{self.name} cannot listen on {_HOST}:{self.port}: {error.strerror}") from None

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self._is_ready():
            self._check_alive(process)
            if time.monotonic() > deadline:
                raise ServerFailed(f"{self.name} was not ready after {START_SECONDS:.0f} s:\n{self._log_end()}")
            time.sleep(0.05)

    def _check_alive(self, process: subprocess.Popen[bytes]) -> None:
        if process.poll() is not None:
            raise ServerFailed(f"{self.name} ended with {process.returncode}:\n{self._log_end()}")

    def _is_ready(self) -> bool:
        connection = http.client.HTTPConnection(_HOST, self.port, timeout=2)
        try:
            connection.request("GET", self._ready)
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _log_end(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-10:])


def prometheus(config: Path, folder: Path, *arguments: str, port: int | None = None) -> Server:
    """Run Prometheus with its data and log in `folder`; POST to /-/reload re-reads the configuration."""
    own = (
        f"--config.file={config}",
        f"--storage.tsdb.path={folder}/data",
        "--web.enable-lifecycle",
        # An alert that fires before Alertmanager was discovered is dropped, and by default comes again in a minute.
        "--rules.alert.resend-delay=5s",
    )
    return Server("prometheus", (*own, *arguments), folder, port=port, ready="/-/ready")


def alertmanager(config: Path, folder: Path, *arguments: str, port: int | None = None) -> Server:
    """Run one Alertmanager, without a cluster, with its data and log in `folder`."""
    own = (
        f"--config.file={config}",
        f"--storage.path={folder}/data",
        "--cluster.listen-address=",
    )
    return Server("alertmanager", (*own, *arguments), folder, port=port, ready="/-/ready")


def node_exporter(textfile_folder: Path, folder: Path, *arguments: str, port: int | None = None) -> Server:
    """Run node_exporter with its clock and its textfile collector alone, reading `*.prom` in `textfile_folder`."""
    own = (
        "--collector.disable-defaults",
        "--collector.time",
        "--collector.textfile",
        f"--collector.textfile.directory={textfile_folder}",
    )
    return Server("node_exporter", (*own, *arguments), folder, port=port, ready="/")


def main() -> int:
    """Fetch what is missing; print each program's path, or one line that says what to install."""
    for name, program in PROGRAMS.items():
        try:
            print(f"{name:<14} {find(name)}", flush=True)
        except ProgramNotFound as error:
            print(error, file=sys.stderr)
            if not program.optional:
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
