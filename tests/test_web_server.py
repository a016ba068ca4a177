"""The server in the open: TLS, passwords, changes while it serves, and whatever is thrown at it."""

import gc
import logging
import os
import random
import socket
import ssl
import threading
import time
from contextlib import ExitStack, closing, suppress
from dataclasses import replace

import pytest
import trustme
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esper_telemetry import start_exporter
from esper_telemetry.exporters.address import parse_address
from esper_telemetry.exporters.web import pace, server
from esper_telemetry.snapshot.recent import LayerCounts
from tests.certificates import AUTHORITY, SECRET_HASH, basic, client_context, status, write_pair
from tests.snapshots import Source, bad, fresh

TLS = "tls_server_config:\n  cert_file: server.crt\n  key_file: server.key\n"
MUTUAL = TLS + "  client_ca_file: ca.crt\n  client_auth_type: RequireAndVerifyClientCert\n"
PASSWORD = f"basic_auth_users:\n  prometheus: {SECRET_HASH}\n"
GOOD = basic("prometheus", "secret")
EVERY_PATH = ("/metrics", "/", "/-/ready", "/-/drill", "/nowhere", "/api/v1/status")


@pytest.fixture
def serve(tmp_path):
    """Return a function that serves with the given web config."""
    write_pair(tmp_path)
    AUTHORITY.cert_pem.write_to_path(tmp_path / "ca.crt")
    with ExitStack() as exporters:

        def start(content=None, snapshot=None):
            if content is not None:
                (tmp_path / "web.yml").write_text(content)
            exporter = start_exporter(
                Source(snapshot or fresh()),
                "127.0.0.1:0",
                linger=0,
                web_config_file=None if content is None else tmp_path / "web.yml",
            )
            exporters.callback(exporter.close)
            return exporter

        yield start


def address_of(exporter):
    return parse_address(exporter.url.partition("://")[2])


def until(true):
    """Wait for a condition."""
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class TestPasswords:
    def test_every_path_but_the_health_check_needs_one(self, serve):
        exporter = serve(PASSWORD)
        assert exporter.url.startswith("http://")
        for path in EVERY_PATH:
            assert status(exporter.url + path) == 401
            assert status(exporter.url + path, basic("prometheus", "wrong")) == 401
        assert status(exporter.url + "/-/healthy") == 200
        assert status(exporter.url + "/metrics", GOOD) == 200

    @pytest.mark.parametrize("path", ["/-/healthy/", "/-/healthy/../../metrics", "//-/healthy", "/-/healthy%00"])
    def test_nothing_that_looks_like_the_health_check_is_open(self, serve, path):
        assert status(serve(PASSWORD).url + path) == 401


class TestTls:
    def test_a_scrape_over_tls(self, serve):
        exporter = serve(TLS)
        assert exporter.url.startswith("https://")
        assert status(exporter.url + "/metrics", context=client_context()) == 200

    def test_a_scrape_over_tls_ends_the_wait_at_exit(self, serve):
        exporter = serve(TLS, bad())
        exporter._routes.source.snapshot = bad(timestamp=2.0)
        assert not exporter.linger(0)
        status(exporter.url + "/metrics", context=client_context())
        assert exporter.linger(60)

    def test_below_the_least_version_nobody_is_let_in(self, serve):
        exporter = serve(TLS + "  min_version: TLS13\n")
        context = client_context()
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises(OSError, match=r"(?i)protocol"):
            status(exporter.url, context=context)

    def test_without_a_certificate_of_the_authority_nobody_is_let_in(self, serve):
        exporter = serve(MUTUAL)
        assert status(exporter.url, context=client_context(identity="prometheus.example")) == 200
        with pytest.raises(OSError, match=r"(?i)certificate required|reset|EOF|closed"):
            status(exporter.url, context=client_context())

    def test_of_several_names_only_the_allowed_are_let_in(self, serve):
        exporter = serve(MUTUAL + "  client_allowed_sans: [prometheus.example]\n")
        assert status(exporter.url, context=client_context(identity="prometheus.example")) == 200
        with pytest.raises(OSError, match=r"(?i)reset|EOF|closed"):
            status(exporter.url, context=client_context(identity="other.example"))

    def test_handshakes_that_never_end_count_as_connections_and_hold_up_nobody(self, serve, monkeypatch):
        monkeypatch.setattr(server, "MAX_CONNECTIONS", 20)
        exporter = serve(TLS)
        with ExitStack() as stuck:
            first, *_ = [stuck.enter_context(open_with(exporter, b"\x16\x03")) for _ in range(31)]
            assert status(exporter.url + "/metrics", context=client_context()) == 200
            until(lambda: is_dropped(first))

    def test_a_client_that_says_goodbye_right_after_the_handshake_leaves_nothing_in_the_log(self, serve, caplog):
        exporter = serve(TLS)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = client_context().wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
        with closing(socket.create_connection(address_of(exporter), timeout=30)) as connection:
            finish_with_goodbye(client, connection, incoming, outgoing)
        assert caplog.records == []

    @pytest.mark.parametrize(("said", "deadline"), [(b"\x16\x03", "REQUEST_SECONDS"), (b"", "IDLE_SECONDS")])
    def test_neither_half_a_handshake_nor_silence_lasts(self, serve, monkeypatch, said, deadline):
        monkeypatch.setattr(server, deadline, 0.2)
        monkeypatch.setattr(server, "SILENT_SECONDS", 1)
        with closing(socket.create_connection(address_of(serve(TLS)), timeout=30)) as stuck:
            stuck.sendall(said)
            assert stuck.recv(1) == b""


class TestReload:
    def failures(self, exporter):
        return exporter._access.reload_failures

    def test_a_new_certificate_is_shown_to_the_next_client(self, serve, tmp_path):
        exporter = serve(TLS)
        other = trustme.CA()
        with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
            status(exporter.url, context=client_context(other))
        write_pair(tmp_path, authority=other)

        def is_shown():
            try:
                return status(exporter.url, context=client_context(other)) == 200
            except OSError:
                return False

        until(is_shown)
        assert self.failures(exporter) == 0

    def test_a_new_password_counts_and_the_old_one_does_not(self, serve, tmp_path):
        exporter = serve(PASSWORD)
        assert status(exporter.url, GOOD) == 200
        (tmp_path / "web.yml").write_text(PASSWORD.replace("prometheus", "other"))
        until(lambda: status(exporter.url, basic("other", "secret")) == 200)
        assert status(exporter.url, GOOD) == 401

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ("nonsense: 1", "web.yml: nonsense: no such key"),
            (TLS, "web.yml: tls_server_config: cannot be switched on or off while serving"),
        ],
    )
    def test_of_a_broken_one_the_old_stays_and_it_is_logged_and_counted(self, serve, tmp_path, caplog, content, said):
        exporter = serve(PASSWORD)
        with caplog.at_level(logging.ERROR):
            (tmp_path / "web.yml").write_text(content)
            until(lambda: self.failures(exporter) == 1)
        assert [said in record.getMessage() for record in caplog.records] == [True]
        assert (status(exporter.url, GOOD), status(exporter.url)) == (200, 401)
        assert b"\nesper_web_config_reload_failures_total 1.0\n" in scrape(exporter, GOOD)

    def test_it_is_tried_again_when_a_file_that_was_missing_is_there(self, serve, tmp_path):
        exporter = serve(TLS)
        (tmp_path / "web.yml").write_text(TLS.replace("server.", "new."))
        until(lambda: self.failures(exporter) == 1)
        other = trustme.CA()
        write_pair(tmp_path, "new", other)
        until(lambda: exporter._access._rules.config.tls.cert_file.name == "new.crt")
        assert status(exporter.url, context=client_context(other)) == 200


def test_extra_headers_stand_on_every_answer(serve):
    exporter = serve("http_server_config:\n  headers:\n    X-Frame-Options: deny\n" + PASSWORD)
    for path in ("/-/healthy", "/metrics"):
        assert b"\r\nX-Frame-Options: deny\r\n" in raw(exporter, f"GET {path} HTTP/1.0\r\n\r\n".encode())


@pytest.mark.parametrize(
    ("content", "address", "warned"), [(None, ":0", 1), (PASSWORD, ":0", 0), (None, "127.0.0.1:0", 0)]
)
def test_whoever_opens_it_to_everyone_is_warned_once(tmp_path, caplog, content, address, warned):
    config = None
    if content is not None:
        config = tmp_path / "web.yml"
        config.write_text(content)
    with caplog.at_level(logging.WARNING):
        start_exporter(Source(fresh()), address, web_config_file=config).close()
    assert sum("anyone who can reach" in record.getMessage() for record in caplog.records) == warned


def test_a_broken_web_config_is_said_before_anything_listens(tmp_path):
    with pytest.raises(ValueError, match=r"\Aweb_config_file: .*gone.yml: No such file or directory\Z"):
        start_exporter(Source(fresh()), "127.0.0.1:0", web_config_file=tmp_path / "gone.yml")


def test_the_same_bytes_again_are_answered_by_what_is_true_now(serve):
    exporter = serve()
    assert b"\nesper_checks_total 0.0\n" in scrape(exporter)
    exporter._routes.source.snapshot = bad()
    assert b"\nesper_checks_total 40.0\n" in scrape(exporter)


def test_under_strain_a_page_is_a_second_old_at_most(serve, monkeypatch):
    monkeypatch.setattr(server.HttpServer, "strained", True)
    exporter = serve()
    assert b"\nesper_checks_total 0.0\n" in scrape(exporter)
    exporter._routes.source.snapshot = bad()
    assert b"\nesper_checks_total 0.0\n" in scrape(exporter)
    assert not exporter.linger(0)  # what was not shown is not delivered
    until(lambda: b"\nesper_checks_total 40.0\n" in scrape(exporter))
    assert exporter.linger(60)


def test_a_flood_takes_no_more_than_the_servers_share_of_a_core(serve):
    exporter = serve()
    thread = next(thread for thread in threading.enumerate() if thread.name == "esper-exporter")
    clock = time.pthread_getcpuclockid(thread.ident)
    over = threading.Event()

    def flood():
        with closing(socket.create_connection(address_of(exporter), timeout=30)) as connection:
            while not over.is_set():
                connection.sendall(b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n")
                connection.recv(65536)

    floods = [threading.Thread(target=flood) for _ in range(8)]
    for each in floods:
        each.start()
    until(lambda: exporter._server._pace.others._resting)
    used, started = time.clock_gettime(clock), time.monotonic()
    time.sleep(1)
    share = (time.clock_gettime(clock) - used) / (time.monotonic() - started)
    assert scrape(exporter)  # a newcomer does not wait for them
    over.set()
    for each in floods:
        each.join()
    assert share < 0.04


def test_of_clients_that_come_all_at_once_no_more_are_held_than_the_bound(serve, monkeypatch):
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 20)
    exporter = serve()
    with ExitStack() as clients:
        connected = [clients.enter_context(open_with(exporter, b"G")) for _ in range(100)]
        until(lambda: sum(map(is_dropped, connected)) >= 80)
        assert sum(map(is_dropped, connected)) == 80


def test_a_flood_of_newcomers_does_not_cost_a_scraper_its_connection(serve, monkeypatch):
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 20)
    exporter = serve()
    request = b"GET /-/healthy HTTP/1.1\r\nHost: x\r\n\r\n"
    with ExitStack() as clients:
        scraper = clients.enter_context(closing(socket.create_connection(address_of(exporter), timeout=10)))
        scraper.sendall(request)
        assert scraper.recv(65536).startswith(b"HTTP/1.1 200 ")
        connected = [clients.enter_context(open_with(exporter, b"G")) for _ in range(100)]
        until(lambda: sum(map(is_dropped, connected)) >= 81)
        scraper.sendall(request)
        assert scraper.recv(65536).startswith(b"HTTP/1.1 200 ")


@pytest.mark.skipif(not hasattr(socket, "TCP_DEFER_ACCEPT"), reason="the kernel cannot")
def test_who_says_nothing_stays_in_the_kernel(serve):
    exporter = serve()
    with ExitStack() as clients:
        silent = [clients.enter_context(closing(socket.create_connection(address_of(exporter)))) for _ in range(100)]
        assert status(exporter.url) == 200
        assert len(exporter._server._clients) <= 1
        assert not any(map(is_dropped, silent))


def open_with(exporter, said):
    client = socket.create_connection(address_of(exporter), timeout=30)
    client.sendall(said)
    return closing(client)


def is_dropped(client):
    client.setblocking(False)
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def test_ten_thousand_bad_layers_are_a_bounded_page(serve):
    layers = tuple(LayerCounts(f"layers.{number}.weight", number, 1, 10**6) for number in range(10_000, 0, -1))
    names = tuple(layer.layer_name for layer in layers)
    before = fresh()
    recent = before.recent
    for check in range(30):
        recent = recent.after(time.monotonic() - 100 + 3 * check, layers, (1 << 10_000) - 1)
    exporter = serve(
        snapshot=replace(
            before, checks=30, layers=layers, layer_names=names, layer_norms=[float("nan")] * 10_000, recent=recent
        )
    )
    page = scrape(exporter)
    assert page.count(b"\nesper_layer_inf_grad_count{") == page.count(b"\nesper_layer_grad_norm{") == 50
    assert b"\nesper_layers_dropped 9950.0\n" in page
    assert len(page) < 30_000


METHODS = st.sampled_from([b"GET", b"HEAD", b"POST", b"DELETE", b"PUT", b"", b"get", b"\xff"])
TARGETS = st.sampled_from([b"/metrics", b"/", b"/-/drill", b"*", b"http://x/", b"/" + b"../" * 9, b"/%00", b"", b"x"])
FIELDS = st.sampled_from(
    [
        *(b"Host: x", b"Host: x\r\nHost: y", b"Connection: close", b"Content-Length: 3", b"Content-Length: -1"),
        *(
            b"Transfer-Encoding: chunked",
            b"Authorization: Basic %",
            b"Accept: \xff",
            b": x",
            b"X" * 20_000,
            b"Expect: 100-continue",
        ),
        *(b"Accept-Encoding: gzip", b"Accept: application/openmetrics-text;version=9", b" folded", b"Upgrade: h2c"),
    ]
)
REQUESTS = st.builds(
    lambda method, target, version, fields, body: (
        b" ".join((method, target, version)) + b"\r\n" + b"".join(field + b"\r\n" for field in fields) + b"\r\n" + body
    ),
    METHODS,
    TARGETS,
    st.sampled_from([b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"", b"\0"]),
    st.lists(FIELDS, max_size=4),
    st.binary(max_size=20),
)


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(requests=st.lists(REQUESTS | st.binary(max_size=200), min_size=1, max_size=3), pieces=st.integers(1, 4))
def test_no_request_crashes_the_server(tireless, requests, pieces):
    sent = b"".join(requests)
    step = len(sent) // pieces + 1
    answer = raw(tireless, *(sent[start : start + step] for start in range(0, len(sent), step)))
    assert answer == b"" or answer.startswith(b"HTTP/1.1 ")


@pytest.mark.parametrize(("content", "said"), [(None, b"\0\r\n\r\n"), (TLS, b"GET / HTTP/1.1\r\n\r\n")])
def test_who_speaks_neither_tls_nor_http_is_told_so_and_held(serve, monkeypatch, content, said):
    monkeypatch.setattr(server, "HOLD_SECONDS", 3.0)
    with open_with(serve(content), said) as client:
        began = time.monotonic()
        assert content or client.recv(65536).startswith(b"HTTP/1.1 400 ")
        client.setblocking(True)
        assert not [part for part in iter(lambda: client.recv(65536), b"") if part.startswith(b"HTTP")]
        assert time.monotonic() - began > 2


@pytest.fixture
def tireless():
    """Serve without ever resting, and leave nothing open and nothing in the log."""
    complaints = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: complaints.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("DOOR_SHARE", "NEWCOMERS_SHARE", "OTHERS_SHARE"):
            patch.setattr(pace, kind, 100.0)
        patch.setattr(server, "HOLD_SECONDS", 0.0)
        exporter = start_exporter(Source(bad()), "127.0.0.1:0", linger=0)
        before = open_files()
        yield exporter
        until(lambda: open_files() <= before)
        exporter.close()
    logging.getLogger().removeHandler(handler)
    assert complaints == []


def test_neither_clients_nor_reloads_leave_files_open(serve, tmp_path):
    exporter = serve(TLS + PASSWORD)
    before = open_files()
    chance = random.Random(1)
    for number in range(60):
        with closing(socket.create_connection(address_of(exporter))) as client:
            client.sendall(chance.randbytes(number))
    for number in range(3):
        (tmp_path / "web.yml").write_text(f"broken {number}")
        until(lambda number=number: exporter._access.reload_failures == number + 1)
    until(lambda: open_files() <= before)
    assert status(exporter.url, GOOD, client_context()) == 200


def finish_with_goodbye(client, connection, incoming, outgoing):
    """Shake hands, and say goodbye in the same packet that ends the handshake."""
    while True:
        try:
            client.do_handshake()
            break
        except ssl.SSLWantReadError:
            connection.sendall(outgoing.read())
            incoming.write(connection.recv(65536))
    with suppress(ssl.SSLWantReadError):
        client.unwrap()
    connection.sendall(outgoing.read())
    with suppress(ConnectionError):
        while connection.recv(65536):
            pass


def open_files():
    gc.collect()
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def scrape(exporter, headers=None):
    fields = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
    return raw(exporter, f"GET /metrics HTTP/1.1\r\nHost: x\r\n{fields}\r\n".encode())


def raw(exporter, *pieces):
    """Send, say that no more is to come, and return all that is answered."""
    with socket.create_connection(address_of(exporter), timeout=30) as connection:
        answer = b""
        try:
            for piece in pieces:
                connection.sendall(piece)
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65536):
                answer += part
        except OSError:  # the server has had enough
            pass
    return answer
