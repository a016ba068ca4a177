"""Serve a monitor's snapshot over HTTP."""

from __future__ import annotations

import gzip
import logging
import os
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from esper_telemetry import metrics
from esper_telemetry.exporters.address import default_address, parse_address
from esper_telemetry.exporters.exit import at_exit, not_at_exit
from esper_telemetry.exporters.prometheus import EsperCollector
from esper_telemetry.exporters.routes.drill import Drill
from esper_telemetry.exporters.routes.page import PAGE, PAGE_HEADERS
from esper_telemetry.exporters.routes.status import status_json
from esper_telemetry.exporters.samples import Sample, Source
from esper_telemetry.exporters.web.server import HttpServer, Request, Response
from esper_telemetry.snapshot import Snapshot

if TYPE_CHECKING:
    from esper_telemetry.exporters.web.access import Access

logger = logging.getLogger("esper_telemetry")

_GZIP_ABOVE = 1024
_STALE_SECONDS = 1.0
_MAX_PAGES = 8


@dataclass(frozen=True, slots=True)
class _Page:
    built: float
    response: Response


class Exporter:
    """Serve a monitor's snapshot over HTTP until `close()`, or until the process ends."""

    def __init__(self, source: Source, address: str, linger: float, allow_drill: bool, access: Access | None) -> None:
        self._source = source
        self._access = access
        self._allow_drill = allow_drill
        self._drill: Drill | None = None
        self._linger_seconds = linger
        self._registry = CollectorRegistry()
        self._collector = EsperCollector(source, more=self._own_samples)
        self._registry.register(self._collector)
        self._pages: dict[tuple[str, bool], _Page] = {}
        self._shown: Snapshot = source.snapshot
        self._scraped = threading.Event()
        self._pid = os.getpid()
        self._closed = False
        self._socket = _listen(address)
        self.url = _url(self._socket, secure=access is not None and access.context is not None)
        if access is None or access.open_to_all:
            _warn_if_open(self._socket)
        self._server = HttpServer(self._socket, self._respond, access)
        _open.add(self)
        at_exit(self.close)

    def linger(self, seconds: float) -> bool:
        """Wait until the last bad check was scraped, at most `seconds`; return whether it was.

        Return at once when nothing bad happened since the last scrape.
        """
        deadline = time.monotonic() + seconds
        if not self._delivered() and seconds > 0:
            logger.warning("esper: waiting for %s/metrics to be scraped once more, %g s at most", self.url, seconds)
        while not self._delivered() and (left := deadline - time.monotonic()) > 0:
            self._scraped.wait(left)
            self._scraped.clear()
        return self._delivered()

    def close(self, linger: float | None = None) -> None:
        """Linger, then stop serving and free the port; a second call does nothing.

        linger: seconds, in place of those given to `start_exporter`.
        """
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        try:
            self.linger(self._linger_seconds if linger is None else linger)
        finally:
            not_at_exit(self.close)
            self._server.stop()

    def _delivered(self) -> bool:
        snapshot = self._source.snapshot
        return (snapshot.inf, snapshot.nan) == (self._shown.inf, self._shown.nan)

    def _respond(self, request: Request) -> Response:
        if request.path == "/-/drill":
            return self._answer_drill(request)
        if request.method not in ("GET", "HEAD"):
            return Response(405, b"only GET and HEAD are answered\n", headers=(("Allow", "GET, HEAD"),))
        match request.path:
            case "/metrics":
                return self._page(request)
            case "/":
                return Response(200, PAGE, "text/html; charset=utf-8", PAGE_HEADERS)
            case "/api/v1/status":
                return self._status()
            case "/-/healthy":
                return Response(200, b"healthy\n")
            case "/-/ready":
                return self._readiness()
        return Response(404, b"not found; the metrics are at /metrics\n")

    def _status(self) -> Response:
        try:
            status = status_json(self._source.snapshot)
        except Exception:
            self._collector.fail()
            return Response(500, b"no status could be built\n")
        return Response(200, status, "application/json", (("Cache-Control", "no-store"),))

    def _answer_drill(self, request: Request) -> Response:
        """Begin or end a drill; the header keeps web pages from starting one through a visitor's browser."""
        if not self._allow_drill:
            return Response(403, b"drills are off; the exporter has to be started with --allow-drill\n")
        if not ip_address(request.client).is_loopback or "x-esper-drill" not in request.headers:
            return Response(403, b"drills are started by `esper drill` on this host\n")
        if request.method == "DELETE":
            self._drill = None
            return Response(200, b"the drill is over\n")
        if request.method != "POST":
            return Response(405, b"only POST and DELETE are answered\n", headers=(("Allow", "POST, DELETE"),))
        try:
            self._drill = Drill.parse(request.query)
        except ValueError as error:
            return Response(400, f"{error}\n".encode())
        return Response(200, b"the drill has begun\n")

    def _own_samples(self) -> Iterator[Sample]:
        # There from the start and without a web config too: the first failure of a new series would be no increase.
        failures = 0 if self._access is None else self._access.reload_failures
        yield Sample(metrics.WEB_CONFIG_RELOAD_FAILURES, (), failures)
        if self._drill is not None:
            yield from self._drill.samples()

    def _page(self, request: Request) -> Response:
        zipped = "gzip" in request.headers.get("accept-encoding", "")
        key = (request.headers.get("accept", ""), zipped)
        page = self._pages.get(key) if self._server.strained else None
        if page is None or time.monotonic() - page.built > _STALE_SECONDS:
            page = self._build(*key)
            self._keep(key, page)
        return page.response

    def _build(self, accept: str, zipped: bool) -> _Page:
        snapshot = self._source.snapshot  # the page is built after this, so it shows at least as much
        encode, content_type = choose_encoder(accept)
        body = encode(self._registry)
        headers: tuple[tuple[str, str], ...] = (("Vary", "Accept, Accept-Encoding"),)
        if zipped and len(body) > _GZIP_ABOVE:
            body = gzip.compress(body, compresslevel=1)
            headers += (("Content-Encoding", "gzip"),)
        return _Page(time.monotonic(), Response(200, body, content_type, headers, sent=partial(self._sent, snapshot)))

    def _keep(self, key: tuple[str, bool], page: _Page) -> None:
        """Keep the page for a moment in which too many ask; what they accept comes in a few ways only."""
        if key not in self._pages and len(self._pages) >= _MAX_PAGES:
            self._pages.clear()
        self._pages[key] = page

    def _sent(self, snapshot: Snapshot) -> None:
        if snapshot.checks >= self._shown.checks:  # a page that was kept may be older than another client's
            self._shown = snapshot
        self._scraped.set()

    def _readiness(self) -> Response:
        if self._source.snapshot.checks:
            return Response(200, b"ready\n")
        return Response(503, b"not ready: nothing was measured yet\n")


def start_exporter(
    source: Source,
    address: str | None = None,
    *,
    linger: float = 20.0,
    allow_drill: bool = False,
    web_config_file: str | os.PathLike[str] | None = None,
) -> Exporter:
    """Serve `source.snapshot` at `address` and return the exporter.

    source: a GradientMonitor, or anything with a `.snapshot`.
    address: HOST:PORT; port 0 picks a free one. Default: 127.0.0.1:19301, plus LOCAL_RANK under torchrun.
    linger: at exit, seconds to stay up at most until a bad check that was not scraped yet is.
    allow_drill: let `esper drill`, on this host, show a made-up critical value that is labelled as a drill.
    web_config_file: TLS and passwords in the format of Prometheus's exporters; followed when it changes.

    Raise ValueError when the address is none or the web config no good, OSError when the address cannot be listened
    on, ImportError when there is a web config and the extra `server` is not installed.
    """
    access = None if web_config_file is None else _access(web_config_file)
    return Exporter(source, default_address() if address is None else address, linger, allow_drill, access)


def _access(web_config_file: str | os.PathLike[str]) -> Access:
    from esper_telemetry.exporters.web.access import Access  # needs the extra

    try:
        return Access(web_config_file)
    except ValueError as error:
        raise ValueError(f"web_config_file: {error}") from None


def _listen(address: str) -> socket.socket:
    host, port = parse_address(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = str(error.strerror).partition(" (while ")[0]
        raise OSError(error.errno, f"address: expected one to listen on, got {address!r}: {reason}") from None


def _url(listener: socket.socket, secure: bool) -> str:
    host, port = listener.getsockname()[:2]
    scheme = "https" if secure else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _warn_if_open(listener: socket.socket) -> None:
    if not ip_address(listener.getsockname()[0]).is_loopback:
        logger.warning(
            "esper: %s can be read by everyone who reaches it; a web config file adds TLS and passwords",
            _url(listener, secure=False),
        )


_open: weakref.WeakSet[Exporter] = weakref.WeakSet()


def _let_go_in_child() -> None:
    """Close a forked child's copy of the listening sockets: it neither serves nor holds the port."""
    for exporter in _open:
        exporter._server.let_go()
    _open.clear()


os.register_at_fork(after_in_child=_let_go_in_child)
