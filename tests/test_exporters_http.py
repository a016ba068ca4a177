import gzip
import http.client
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from unittest import mock

import pytest

from deploy.stack.servers import free_port
from esper_telemetry import start_exporter
from esper_telemetry.exporters import samples
from esper_telemetry.exporters.address import default_address, parse_address
from esper_telemetry.exporters.http import open_exporter
from esper_telemetry.exporters.scrapers import Scrapers
from esper_telemetry.exporters.web.exchange import Request
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
    assert b'href="metrics"' in body


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


class TestAPortInUse:
    @pytest.fixture
    def taken(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            yield listener.getsockname()[1]

    def test_is_said_in_one_line_and_the_next_free_one_is_taken(self, source, taken, caplog):
        exporter = start_exporter(source, taken)
        assert taken < int(exporter.url.rpartition(":")[2]) <= taken + 20
        assert get(exporter)[0] == 200
        assert [record.levelname for record in caplog.records] == ["ERROR"]
        assert f"cannot listen on 127.0.0.1:{taken}: Address already in use; serving at " in caplog.text
        exporter.close()

    def test_is_an_error_where_that_very_port_is_wanted(self, source, taken):
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{taken}: Address already in use"):
            start_exporter(source, taken, strict=True)

    def test_an_address_of_another_host_is_an_error_in_any_case(self, source):
        with pytest.raises(OSError, match=r"cannot listen on 192\.0\.2\.1:19301: Cannot assign requested address"):
            start_exporter(source, "192.0.2.1:19301")

    def test_by_an_exporter_of_this_process_is_taken_over(self, source, caplog):
        first = start_exporter(source, free_port())
        source.snapshot = bad()
        second = start_exporter(Source(bad(inf=3)), first.url.removeprefix("http://"))
        assert second.url == first.url
        assert b"\nesper_inf_grad_count 3.0\n" in get(second)[2]
        assert [record.message for record in caplog.records] == [
            f"esper: the exporter at {first.url} is replaced by a new one",
            f"esper: {first.url} now serves another run; the last bad check of the previous run was never scraped: "
            "Inf 2, NaN 0 in total, first in policy.weight",
        ]
        first.close()
        assert get(second)[0] == 200
        second.close(linger=0)


def test_an_exporter_follows_another_run(exporter, source):
    exporter.follow(Source(bad(inf=4)))
    assert b"\nesper_inf_grad_count 4.0\n" in get(exporter)[2]


def test_an_exporter_is_found_by_its_address(exporter):
    port = int(exporter.url.rpartition(":")[2])
    assert open_exporter(port) is open_exporter(f"127.0.0.1:{port}") is exporter
    assert open_exporter("127.0.0.1:0") is None


def test_without_a_host_it_listens_on_ipv4_and_ipv6(source):
    exporter = start_exporter(source, ":0")
    port = int(exporter.url.rpartition(":")[2])
    for host in ("127.0.0.1", "::1"):
        with closing(http.client.HTTPConnection(host, port, timeout=10)) as connection:
            connection.request("GET", "/-/healthy")
            assert connection.getresponse().status == 200
    exporter.close()


def test_ranks_of_one_host_have_ports_of_their_own():
    assert [default_address(local_rank) for local_rank in (0, 1, 7)] == [
        "127.0.0.1:19301",
        "127.0.0.1:19302",
        "127.0.0.1:19308",
    ]


def test_the_environment_says_where_to_listen_and_how_long_to_linger(source, monkeypatch):
    monkeypatch.setenv("ESPER_LISTEN_ADDRESS", "127.0.0.1:0")
    monkeypatch.setenv("ESPER_LINGER_SECONDS", "0.1")
    exporter = start_exporter(source)
    source.snapshot = bad()
    exporter.close()
    monkeypatch.setenv("ESPER_LINGER_SECONDS", "soon")
    with pytest.raises(ValueError, match="ESPER_LINGER_SECONDS: expected seconds of at least 0, got 'soon'"):
        start_exporter(source)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((object(),), "source: expected a monitor, as returned by watch(model), got object"),
        ((Source(fresh()), 3.5), "address: expected HOST:PORT or a port, got float"),
        ((Source(fresh()), True), "address: expected HOST:PORT or a port, got bool"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        start_exporter(*arguments)


@pytest.mark.parametrize(
    "accept",
    [
        'application/openmetrics-text; version="1.0.0"',
        "application/openmetrics-text; version=latest",
        "text/plain;version=0.0.4;escaping",
        "application/openmetrics-text;version=;q=x, */*;q=0.1",
        "\xff;;;=",
    ],
)
def test_what_a_client_accepts_may_be_anything(exporter, accept):
    status, headers, body = get(exporter, headers={"Accept": accept})
    assert status == 200
    assert b"esper_checks_total 0.0\n" in body
    assert headers["Content-Type"].startswith(("text/plain; version=", "application/openmetrics-text; version="))


@pytest.mark.parametrize("encoding", ["gzip;q=0", "gzip; q=0.0", "identity", "deflate, gzip;q=0.000", "xgzip"])
def test_a_page_is_not_gzipped_where_that_is_not_wanted(exporter, encoding):
    _, headers, body = get(exporter, headers={"Accept-Encoding": encoding})
    assert "Content-Encoding" not in headers
    assert b"esper_checks_total" in body


def test_a_page_can_be_asked_for_by_names(exporter):
    body = get(exporter, "/metrics?name[]=esper_checks_total&name%5B%5D=esper_run_ended")[2]
    assert re.findall(rb"^(\w+)", body, re.MULTILINE) == [b"esper_checks_total", b"esper_run_ended"]


def test_the_page_has_the_process_and_what_a_page_costs(exporter):
    get(exporter)
    body = get(exporter)[2]
    assert b"\nprocess_resident_memory_bytes " in body
    assert b"\nesper_exporter_scrape_duration_seconds " in body


@pytest.mark.parametrize(
    ("said", "patience"), [("3.5", 3.5), ("60", 10), ("0", 10), ("-1", 10), ("nan", 10), ("soon", 10), (None, 10)]
)
def test_nobody_is_answered_for_longer_than_they_wait(said, patience):
    headers = {} if said is None else {"x-prometheus-scrape-timeout-seconds": said}
    assert Request("GET", "/metrics", "", headers, "127.0.0.1").patience == patience


def test_a_page_that_came_too_late_was_not_delivered(exporter, source):
    """A scraper that stops reading, and says that it waits for 0.2 s."""
    layers = tuple(f"layer{number}." + "x" * 4000 for number in range(3000))
    source.snapshot = replace(bad(), layer_names=layers, layer_norms=(1.0,) * len(layers))
    large = ExitStack()
    large.enter_context(mock.patch.object(samples, "MAX_LAYERS", len(layers)))
    with large, socket.create_connection(parse_address(exporter.url.removeprefix("http://")), timeout=10) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nX-Prometheus-Scrape-Timeout-Seconds: 0.2\r\n\r\n")
        slow.recv(100)
        time.sleep(1)
        enough = time.monotonic() + 3  # what the kernel has taken comes in drops
        with suppress(ConnectionError):
            while time.monotonic() < enough and slow.recv(1 << 20):
                pass
    assert not exporter.linger(0)


def test_what_goes_wrong_while_answering_is_counted_and_answered(exporter, source):
    source.snapshot = None
    for path in ("/api/v1/status", "/-/ready"):
        assert get(exporter, path)[0] == 500
    source.snapshot = fresh()
    assert b"\nesper_exporter_collect_errors_total 2.0\n" in get(exporter)[2]


PROMETHEUS = {"User-Agent": "Prometheus/3", "X-Prometheus-Scrape-Timeout-Seconds": "10"}


class TestTheLastWord:
    """That a run has ended is heard by whoever has scraped it."""

    def end(self, source):
        source.snapshot = replace(source.snapshot, ended=True)

    def test_is_waited_for_until_each_scraper_has_it(self, exporter, source, caplog):
        get(exporter, headers=PROMETHEUS)
        self.end(source)
        scraper = threading.Timer(0.3, get, [exporter], {"headers": PROMETHEUS})
        scraper.start()
        began = time.monotonic()
        exporter.close()
        assert time.monotonic() - began < 60
        assert "once more by 127.0.0.1 Prometheus/3, 90 s at most; Ctrl-C exits at once" in caplog.text
        scraper.join()

    def test_is_not_waited_for_where_nobody_scraped(self, exporter, source, caplog):
        self.end(source)
        exporter.close()
        assert not caplog.records

    def test_is_not_waited_for_from_a_person_who_looked_once(self, exporter, source, caplog):
        get(exporter)
        self.end(source)
        exporter.close()
        assert not caplog.records

    def visit(self, scrapers, *visits, port=1, shown=None, patient=True):
        now = time.monotonic()
        for visit in visits:
            scrapers.note("10.0.0.1 Prometheus", port, patient, shown or fresh(), now + visit)

    def test_is_waited_for_one_and_a_half_of_the_longest_interval(self):
        scrapers = Scrapers()
        self.visit(scrapers, -25, -15, -10, 0)
        assert scrapers.waiting_for_the_end() == {"10.0.0.1 Prometheus": pytest.approx(15, abs=0.1)}
        self.visit(scrapers, 0, shown=replace(fresh(), ended=True))
        assert scrapers.waiting_for_the_end() == {}

    def test_is_waited_for_from_each_of_two_servers_at_one_address(self):
        scrapers = Scrapers()
        for port in (1, 2):
            self.visit(scrapers, -20, -10, 0, port=port)
        self.visit(scrapers, 0, port=1, shown=replace(fresh(), ended=True))
        assert scrapers.waiting_for_the_end()
        self.visit(scrapers, 0, port=2, shown=replace(fresh(), ended=True))
        assert scrapers.waiting_for_the_end() == {}

    def test_is_waited_for_where_each_scrape_has_a_new_connection(self):
        scrapers = Scrapers()
        for port in range(4):
            self.visit(scrapers, 10 * port - 30, port=port)
        assert scrapers.waiting_for_the_end() == {"10.0.0.1 Prometheus": pytest.approx(15, abs=0.1)}
        self.visit(scrapers, 0, port=5, shown=replace(fresh(), ended=True))
        assert scrapers.waiting_for_the_end() == {}

    @pytest.mark.parametrize("visits", [(-100, -95, -90), (-200,)])
    def test_is_not_waited_for_from_one_who_has_gone(self, visits):
        scrapers = Scrapers()
        self.visit(scrapers, *visits)
        assert scrapers.waiting_for_the_end() == {}

    def test_is_not_in_a_page_that_was_asked_for_by_names(self, exporter, source):
        source.snapshot = bad()
        get(exporter, "/metrics?name[]=esper_run_ended", headers=PROMETHEUS)
        assert not exporter.linger(0)

    def test_is_waited_for_no_longer_than_it_was_said(self, source):
        exporter = start_exporter(source, "127.0.0.1:0", linger=0.2)
        get(exporter, headers=PROMETHEUS)
        self.end(source)
        began = time.monotonic()
        exporter.close()
        assert time.monotonic() - began < 30

    @pytest.mark.parametrize(("code", "ended"), [("pass", True), ("raise SystemError", False)])
    def test_of_a_process_that_ends_is_that_the_run_ended_unless_it_died(self, code, ended):
        program = (
            "import torch\nfrom esper_telemetry import start_exporter, watch\n"
            "monitor = watch(torch.nn.Linear(1, 1))\nexporter = start_exporter(monitor, '127.0.0.1:0')\n"
            "close = exporter.close\nexporter.close = lambda: (close(), print(monitor.snapshot.ended))\n" + code
        )
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert run.stdout == f"{ended}\n"


@pytest.mark.parametrize("address", ["19301", "host", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:65536", "::1:80", "a:-1"])
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


def test_idle_clients_leave_the_training_the_files_that_it_opens():
    """300 clients that begin to ask, under `ulimit -n 256`, while a training thread opens and closes files."""
    program = """
import resource, socket, sys, tempfile, threading, time
import torch
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from esper_telemetry import start_exporter, watch
from esper_telemetry.exporters.address import default_address, parse_address
exporter = start_exporter(watch(torch.nn.Linear(1, 1)), "127.0.0.1:0")
print(exporter.url, flush=True)
done, opened = threading.Event(), 0
threading.Thread(target=lambda: (sys.stdin.read(), done.set()), daemon=True).start()
while not done.is_set():
    files = [tempfile.TemporaryFile() for _ in range(50)]
    opened += len(files)
    for file in files:
        file.close()
print(opened, flush=True)
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as trainer:
        address = parse_address(trainer.stdout.readline().strip().removeprefix("http://"))
        idle = [socket.create_connection(address) for _ in range(300)]
        for connection in idle:
            with suppress(ConnectionError):
                connection.sendall(b"G")  # who says nothing is not let in
        with closing(http.client.HTTPConnection(*address, timeout=10)) as connection:
            connection.request("GET", "/-/healthy")
            assert connection.getresponse().status == 200
        trainer.stdin.close()
        assert int(trainer.stdout.readline()) > 0
        assert trainer.wait(30) == 0
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
