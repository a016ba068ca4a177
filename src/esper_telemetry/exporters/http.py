"""Serve a monitor's snapshot over HTTP."""

from __future__ import annotations

import gzip
import logging
import os
import socket
import threading
import time
import weakref
from collections.abc import Iterable
from functools import partial
from importlib.metadata import version
from ipaddress import ip_address

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from esper_telemetry.exporters.address import default_address, parse_address
from esper_telemetry.exporters.drill import Drill
from esper_telemetry.exporters.exit import at_exit, not_at_exit
from esper_telemetry.exporters.prometheus import EsperCollector
from esper_telemetry.exporters.samples import Sample, Source
from esper_telemetry.exporters.server import HttpServer, Request, Response
from esper_telemetry.snapshot import Snapshot

logger = logging.getLogger("esper_telemetry")

_GZIP_ABOVE = 1024


class Exporter:
    """Serve a monitor's snapshot over HTTP until `close()`, or until the process ends."""

    def __init__(self, source: Source, address: str, linger: float, allow_drill: bool) -> None:
        self._source = source
        self._allow_drill = allow_drill
        self._drill: Drill | None = None
        self._linger_seconds = linger
        self._registry = CollectorRegistry()
        self._registry.register(EsperCollector(source, drill=self._drill_samples))
        self._shown: Snapshot = source.snapshot
        self._scraped = threading.Event()
        self._pid = os.getpid()
        self._closed = False
        self._socket = _listen(address)
        self.url = _url(self._socket)
        self._server = HttpServer(self._socket, self._respond)
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
                return Response(200, _LANDING.encode(), "text/html; charset=utf-8")
            case "/-/healthy":
                return Response(200, b"healthy\n")
            case "/-/ready":
                return self._readiness()
        return Response(404, b"not found; the metrics are at /metrics\n")

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

    def _drill_samples(self) -> Iterable[Sample]:
        return () if self._drill is None else self._drill.samples()

    def _page(self, request: Request) -> Response:
        snapshot = self._source.snapshot  # the page is built after this, so it shows at least as much
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        page = encode(self._registry)
        headers: tuple[tuple[str, str], ...] = (("Vary", "Accept, Accept-Encoding"),)
        if "gzip" in request.headers.get("accept-encoding", "") and len(page) > _GZIP_ABOVE:
            page = gzip.compress(page, compresslevel=1)
            headers += (("Content-Encoding", "gzip"),)
        return Response(200, page, content_type, headers, sent=partial(self._sent, snapshot))

    def _sent(self, snapshot: Snapshot) -> None:
        self._shown = snapshot
        self._scraped.set()

    def _readiness(self) -> Response:
        if self._source.snapshot.checks:
            return Response(200, b"ready\n")
        return Response(503, b"not ready: nothing was measured yet\n")


def start_exporter(
    source: Source, address: str | None = None, *, linger: float = 20.0, allow_drill: bool = False
) -> Exporter:
    """Serve `source.snapshot` at `address` and return the exporter.

    source: a GradientMonitor, or anything with a `.snapshot`.
    address: HOST:PORT; port 0 picks a free one. Default: 127.0.0.1:19301, plus LOCAL_RANK under torchrun.
    linger: at exit, seconds to stay up at most until a bad check that was not scraped yet is.
    allow_drill: let `esper drill`, on this host, show a made-up critical value that is labelled as a drill.

    Raise ValueError when the address is none, OSError when it cannot be listened on.
    """
    return Exporter(source, default_address() if address is None else address, linger, allow_drill)


def _listen(address: str) -> socket.socket:
    host, port = parse_address(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = str(error.strerror).partition(" (while ")[0]
        raise OSError(error.errno, f"address: expected one to listen on, got {address!r}: {reason}") from None


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


_open: weakref.WeakSet[Exporter] = weakref.WeakSet()


def _let_go_in_child() -> None:
    """Close a forked child's copy of the listening sockets: it neither serves nor holds the port."""
    for exporter in _open:
        exporter._socket.close()
    _open.clear()


os.register_at_fork(after_in_child=_let_go_in_child)

_LANDING = f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>esper-telemetry</title>
<h1>esper-telemetry {version("esper-telemetry")}</h1>
<p>Numerical health of this run's gradients.</p>
<ul>
<li><a href="/metrics">Metrics</a></li>
<li><a href="/-/healthy">Healthy</a>: the exporter answers</li>
<li><a href="/-/ready">Ready</a>: at least one check was made</li>
</ul>
</html>
"""
