"""What `esper drill` asks, whom, and by which way; what it says when that fails."""

import json
import os
import subprocess
import sys
import threading
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from deploy.stack.servers import free_port
from esper_telemetry import start_exporter
from esper_telemetry.exporters.urls import is_loopback, without_secrets
from tests.certificates import AUTHORITY, SECRET_HASH, basic, write_pair
from tests.otlp_receiver import server_tls
from tests.snapshots import Source, fresh

ESPER = Path(sys.executable).with_name("esper")
PASSWORD = basic("prometheus", "secret")["Authorization"]


def drill(*arguments, **environment):
    command = [ESPER, "drill", "--timeout", "30", *arguments]
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()} | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)


@contextmanager
def server(answer, tls=None):
    """Answer GET and CONNECT; `answer` is given the path and the headers, and returns a status and a body."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, body = answer(self.path, self.headers)
            self.send_response(status)
            if status == 401:
                self.send_header("WWW-Authenticate", 'Basic realm="test"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_CONNECT = do_GET

        def log_message(self, *_):
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if tls is not None:
        listener.socket = tls.wrap_socket(listener.socket, server_side=True)
    thread = threading.Thread(target=listener.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http{'s' * (tls is not None)}://127.0.0.1:{listener.server_port}"
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()


def api(path, headers):
    """Answer as a Prometheus and an Alertmanager in which the alert is."""
    if "/api/v1/query" in path:
        return 200, json.dumps({"data": {"result": [{}]}}).encode()
    return 200, b"[{}]"


def with_password(path, headers):
    return api(path, headers) if headers["Authorization"] == PASSWORD else (401, b"who are you?\n")


@pytest.fixture
def tls(tmp_path):
    """Return TLS for a server, and the folder in which ca.crt vouches for it."""
    write_pair(tmp_path)
    AUTHORITY.cert_pem.write_to_path(tmp_path / "ca.crt")
    return server_tls(tmp_path / "server.crt", tmp_path / "server.key")


@pytest.fixture
def exporter(tls, tmp_path):
    """Serve with TLS and a password, as a web config says."""
    config = tmp_path / "web.yml"
    config.write_text(
        "tls_server_config:\n  cert_file: server.crt\n  key_file: server.key\n"
        f"basic_auth_users:\n  prometheus: {SECRET_HASH}\n"
    )
    with closing(
        start_exporter(Source(fresh()), "127.0.0.1:0", allow_drill=True, web_config_file=config, linger=0)
    ) as exporter:
        yield exporter


@pytest.fixture
def login(tmp_path):
    (tmp_path / "password").write_text("secret\n")
    return ["--ca-file", tmp_path / "ca.crt", "--user", "prometheus", "--password-file", tmp_path / "password"]


def test_it_speaks_tls_and_passwords_with_all_three(exporter, tls, login):
    with server(with_password, tls) as others:
        done = drill("--exporter", exporter.url, "--prometheus", others, "--alertmanager", others, *login)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "the drill is cleared; its page resolves by itself"


def test_a_password_is_told_to_nobody_who_does_not_ask(exporter, login):
    told = []

    def listen(path, headers):
        told.append(headers["Authorization"])
        return api(path, headers)

    with server(listen) as others:
        assert (
            drill("--exporter", exporter.url, "--prometheus", others, "--alertmanager", others, *login).returncode == 0
        )
    assert set(told) == {None}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "; set --ca-file to trust its CA"),
        (
            ["--ca-file", "ca.crt"],
            "; set --user and --password-file",
        ),
        (["--ca-file", "gone"], "--ca-file: expected a file of certificates, got 'gone': No such file or directory"),
        (["--ca-file", "password"], "--ca-file: expected a file of certificates, got 'password': no certificate in it"),
        (["--user", "prometheus"], "--user: expected --password-file too"),
        (["--password-file", "password"], "--password-file: expected --user too"),
        (
            ["--user", "me", "--password-file", "gone"],
            "--password-file: expected a readable file, got 'gone': No such file or directory",
        ),
    ],
)
def test_a_login_that_is_no_good_is_one_line(exporter, login, tmp_path, arguments, reason, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with server(api) as others:
        done = drill("--exporter", exporter.url, "--prometheus", others, "--alertmanager", others, *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("esper drill: ")
    assert line.endswith(reason)


def refuse(path, headers):
    return 403, b"not from here\n"


def test_loopback_is_asked_directly_whatever_the_environment_says(exporter, login):
    with server(api) as others, server(refuse) as proxy:
        done = drill(
            *("--exporter", exporter.url, "--prometheus", others, "--alertmanager", others, *login),
            http_proxy=proxy,
            https_proxy=proxy,
            HTTP_PROXY=proxy,
        )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_answers_for_another_host_is_named_without_its_password(scheme):
    with server(refuse) as proxy:
        at = proxy.removeprefix("http://")
        done = drill("--prometheus", f"{scheme}://prometheus.test", **{f"{scheme}_proxy": f"http://me:secret@{at}"})
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "403" in line
    assert f"through the proxy {at}" in line
    assert "secret" not in line


def test_no_proxy_is_honoured():
    done = drill("--prometheus", "http://prometheus.invalid", http_proxy="http://127.0.0.1:1", no_proxy=".invalid")
    assert "proxy" not in done.stderr
    assert done.returncode == 2


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda path, headers: (200, b"<html>"), "expected a Prometheus response from "),
        (lambda path, headers: (200, b"[]"), "expected a Prometheus response from "),
        (lambda path, headers: (200, b'{"data": null}'), "expected a Prometheus response from "),
    ],
)
def test_a_server_that_is_no_prometheus_is_one_line(exporter, login, answer, reason):
    with server(answer) as others:
        done = drill("--exporter", exporter.url, "--prometheus", others, "--alertmanager", others, *login)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"esper drill: --prometheus: {reason}")


def test_nobody_at_an_address_is_one_line():
    nobody = f"http://127.0.0.1:{free_port()}"
    done = drill("--prometheus", nobody)
    assert done.returncode == 2
    assert done.stderr == (
        f"esper drill: --prometheus: expected the URL of a server that answers, got '{nobody}/-/healthy': "
        "Connection refused\n"
    )


@pytest.mark.parametrize(
    ("url", "loopback"),
    [
        ("http://127.0.0.1:1", True),
        ("https://127.3.2.1", True),
        ("http://[::1]:9090/x", True),
        ("http://localhost:9090", True),
        ("http://LOCALHOST", True),
        ("http://prometheus.localhost", True),
        ("http://0.0.0.0:19301", True),
        ("http://10.0.0.1", False),
        ("http://localhost.example.org", False),
        ("http://127.0.0.1.example.org", False),
        ("http://127.0.0.1@example.org", False),
        ("prometheus", False),
    ],
)
def test_what_is_of_this_host(url, loopback):
    assert is_loopback(url) is loopback


def test_a_url_is_shown_without_its_secrets():
    assert without_secrets("https://me:secret@[::1]:4318/v1?token=secret") == "https://[::1]:4318/v1"
