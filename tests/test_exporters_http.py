import gzip
import http.client
import logging
import os
import socket
import threading
import time
from contextlib import closing

import pytest

from deploy.stack.servers import free_port
from esper_telemetry import start_exporter
from esper_telemetry.exporters.address import parse_address
from tests.snapshots import Source, bad, fresh


@pytest.fixture
def source():
    return Source(fresh())


@pytest.fixture
def exporter(source):
    exporter = start_exporter(source, "127.0.0.1:0")
    yield exporter
    exporter.close(linger=0)


def get(exporter, path="/metrics", method="GET", headers=None):
    with closing(http.client.HTTPConnection(exporter.url.removeprefix("http://"), timeout=10)) as connection:
        connection.request(method, path, headers=headers or {})
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()


def test_the_page_is_prometheus_text(exporter):
    status, headers, body = get(exporter)
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4; charset=utf-8")
    assert b"\nesper_checks_total 0.0\n" in body


def test_the_page_is_openmetrics_when_asked_for(exporter):
    _, headers, body = get(exporter, headers={"Accept": "application/openmetrics-text;version=1.0.0"})
    assert headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0; charset=utf-8")
    assert body.endswith(b"# EOF\n")


def test_the_page_is_gzipped_when_asked_for(exporter):
    _, headers, body = get(exporter, headers={"Accept-Encoding": "gzip"})
    assert headers["Content-Encoding"] == "gzip"
    assert b"esper_checks_total" in gzip.decompress(body)


def test_head_has_the_headers_alone(exporter):
    status, headers, body = get(exporter, method="HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["Content-Length"]) > 1000


def test_the_landing_page_has_version_and_links(exporter):
    status, headers, body = get(exporter, "/")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert b"esper-telemetry 0." in body
    assert b'href="/metrics"' in body


def test_a_query_is_not_part_of_the_path(exporter):
    assert get(exporter, "/metrics?name=x")[0] == 200


@pytest.mark.parametrize("path", ["/nowhere", "/metrics/", "/../etc/passwd", "//metrics", "/%6detrics"])
def test_every_other_path_is_not_found(exporter, path):
    assert get(exporter, path)[0] == 404


def test_other_methods_are_refused(exporter):
    status, headers, _ = get(exporter, method="POST", headers={"Content-Length": "0"})
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


def test_it_is_healthy_at_once_and_ready_after_the_first_check(exporter, source):
    assert get(exporter, "/-/healthy")[0] == 200
    assert get(exporter, "/-/ready")[0] == 503
    source.snapshot = bad()
    assert get(exporter, "/-/ready")[0] == 200


def test_a_connection_is_kept_for_the_next_request(exporter):
    with closing(http.client.HTTPConnection(exporter.url.removeprefix("http://"), timeout=10)) as connection:
        for _ in range(3):
            connection.request("GET", "/-/healthy")
            connection.getresponse().read()
            opened = connection.sock.getsockname()
        assert connection.sock.getsockname() == opened


class TestLinger:
    def test_nothing_bad_since_the_last_scrape_is_no_wait(self, exporter, source):
        source.snapshot = bad()
        get(exporter)
        assert exporter.linger(60)

    def test_a_bad_check_that_nobody_scrapes_is_waited_for_so_long_and_no_longer(self, exporter, source, caplog):
        source.snapshot = bad()
        with caplog.at_level(logging.WARNING):
            assert not exporter.linger(0.2)
        assert f"waiting for {exporter.url}/metrics to be scraped" in caplog.text

    def test_a_scrape_ends_it(self, exporter, source):
        source.snapshot = bad()
        scraper = threading.Timer(0.2, get, [exporter])
        scraper.start()
        assert exporter.linger(60)
        scraper.join()

    def test_other_pages_and_head_deliver_nothing(self, exporter, source):
        source.snapshot = bad()
        get(exporter, "/")
        get(exporter, method="HEAD")
        assert not exporter.linger(0)

    def test_the_same_count_at_a_later_check_is_a_new_bad_check(self, exporter, source):
        source.snapshot = bad(timestamp=1.0)
        get(exporter)
        source.snapshot = bad(timestamp=2.0)
        assert not exporter.linger(0)


class TestDrill:
    @pytest.fixture
    def exporter(self, source):
        exporter = start_exporter(source, "127.0.0.1:0", allow_drill=True)
        yield exporter
        exporter.close(linger=0)

    def drill(self, exporter, query="kind=inf&count=6&seconds=60", method="POST", header="X-Esper-Drill"):
        return get(exporter, f"/-/drill?{query}", method, {header: "1"})[0]

    def test_shows_a_labelled_value_beside_the_real_one_until_it_is_cleared(self, exporter):
        assert self.drill(exporter) == 200
        page = get(exporter)[2].decode()
        assert '\nesper_inf_grad_recent_max{drill="true"} 6.0\n' in page
        assert "\nesper_inf_grad_recent_max 0.0\n" in page
        assert '\nesper_last_nonfinite_timestamp_seconds{drill="true",kind="inf"} ' in page
        assert self.drill(exporter, method="DELETE") == 200
        assert b"drill" not in get(exporter)[2]

    def test_ends_by_itself(self, exporter, monkeypatch):
        assert self.drill(exporter) == 200
        later = time.monotonic() + 61
        monkeypatch.setattr("esper_telemetry.exporters.routes.drill.time.monotonic", lambda: later)
        assert b"drill" not in get(exporter)[2]

    @pytest.mark.parametrize(
        "query", ["", "kind=x&count=6&seconds=9", "kind=inf&count=0&seconds=9", "kind=nan&count=6&seconds=901"]
    )
    def test_refuses_what_is_no_drill(self, exporter, query):
        assert self.drill(exporter, query) == 400

    def test_refuses_a_web_page(self, exporter):
        assert self.drill(exporter, header="X-Other") == 403

    def test_other_methods_are_refused(self, exporter):
        assert self.drill(exporter, method="GET") == 405

    def test_is_off_unless_allowed(self, source):
        exporter = start_exporter(source, "127.0.0.1:0")
        assert self.drill(exporter) == 403
        exporter.close()


def test_close_frees_the_port_and_can_be_called_twice(source):
    exporter = start_exporter(source, f"127.0.0.1:{free_port()}")
    exporter.close()
    exporter.close()
    address = exporter.url.removeprefix("http://")
    again = start_exporter(source, address)
    assert again.url == exporter.url
    again.close()


def test_a_port_in_use_is_said_in_one_line(exporter, source):
    address = exporter.url.removeprefix("http://")
    with pytest.raises(OSError, match=f"address: expected one to listen on, got '{address}': Address already in use"):
        start_exporter(source, address)


@pytest.mark.parametrize(
    "address", ["", "19301", "host", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:65536", "::1:80", "a:-1"]
)
def test_what_is_no_address_is_refused(source, address):
    with pytest.raises(ValueError, match="address: expected HOST:PORT"):
        start_exporter(source, address)


@pytest.mark.parametrize(
    ("address", "parsed"),
    [
        ("127.0.0.1:0", ("127.0.0.1", 0)),
        ("[::1]:19301", ("::1", 19301)),
        (":9", ("", 9)),
        ("localhost:80", ("localhost", 80)),
    ],
)
def test_an_address_is_host_and_port(address, parsed):
    assert parse_address(address) == parsed


def test_a_forked_child_neither_serves_nor_holds_the_port(source):
    exporter = start_exporter(source, f"127.0.0.1:{free_port()}")
    address = exporter.url.removeprefix("http://")
    up, child_up = os.pipe()
    parent_done, done = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(done)
        os.write(child_up, b".")
        os.read(parent_done, 1)  # lives until the parent is done
        os._exit(0)
    os.read(up, 1)
    try:
        exporter.close()
        start_exporter(source, address).close()
    finally:
        os.close(done)
        assert os.waitpid(child, 0)[1] == 0
        for end in (up, child_up, parent_done):
            os.close(end)


def test_garbage_is_answered_with_400(exporter):
    assert raw(exporter, b"\x00\x01 garbage\r\n\r\n").startswith(b"HTTP/1.1 400 ")


def test_endless_headers_are_cut_off(exporter):
    answer = raw(exporter, b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 1_000_000 + b"\r\n\r\n")
    assert answer == b"" or answer.startswith(b"HTTP/1.1 431 ")  # the reset may overtake the answer
    assert get(exporter)[0] == 200


def test_clients_that_stop_half_way_hold_up_nobody(exporter):
    address = parse_address(exporter.url.removeprefix("http://"))
    stuck = [socket.create_connection(address) for _ in range(20)]
    try:
        for connection in stuck:
            connection.sendall(b"GET /metrics HTTP/1.1\r\nHost:")
        assert get(exporter)[0] == 200
    finally:
        for connection in stuck:
            connection.close()


def test_requests_that_come_together_are_answered_in_turn(exporter):
    request = b"GET /-/healthy HTTP/1.1\r\nHost: x\r\n\r\n"
    last = b"GET /nowhere HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    answer = raw(exporter, request + last)
    assert answer.index(b"HTTP/1.1 200 ") < answer.index(b"HTTP/1.1 404 ")


def test_idle_clients_take_no_thread_and_a_scrape_is_still_answered(exporter):
    before = threading.active_count()
    idle = [socket.create_connection(parse_address(exporter.url.removeprefix("http://"))) for _ in range(600)]
    try:
        assert get(exporter)[0] == 200
        assert threading.active_count() == before
    finally:
        for connection in idle:
            connection.close()


def raw(exporter, request):
    with socket.create_connection(parse_address(exporter.url.removeprefix("http://")), timeout=10) as connection:
        try:
            connection.sendall(request)
            answer = b""
            while part := connection.recv(65536):
                answer += part
        except ConnectionError:
            return b""
    return answer
