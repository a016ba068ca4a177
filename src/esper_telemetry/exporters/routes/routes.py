"""What is answered at which path."""

from __future__ import annotations

import gzip
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import ip_address
from urllib.parse import parse_qs

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder

from esper_telemetry import metrics
from esper_telemetry.exporters.prometheus import EsperCollector
from esper_telemetry.exporters.routes.drill import Drill
from esper_telemetry.exporters.routes.page import PAGE, PAGE_HEADERS
from esper_telemetry.exporters.routes.status import status_json
from esper_telemetry.exporters.routes.targets import answer_targets
from esper_telemetry.exporters.samples import Sample, Source
from esper_telemetry.exporters.web.exchange import Request, Response
from esper_telemetry.snapshot import Snapshot

Scraped = Callable[[Request, Snapshot], None]

_GZIP_ABOVE = 1024
_STALE_SECONDS = 1.0
_MAX_PAGES = 8


@dataclass(frozen=True, slots=True)
class _Kept:
    built: float
    snapshot: Snapshot
    response: Response


class Routes:
    """Answer requests from a source's newest snapshot.

    scraped: called with the snapshot that a client was shown, once it has received a whole page of metrics.
    own_samples: what the exporter says of itself.
    """

    def __init__(
        self, source: Source, allow_drill: bool, scraped: Scraped, own_samples: Callable[[], Iterable[Sample]]
    ) -> None:
        self.source = source
        self._allow_drill = allow_drill
        self._drill: Drill | None = None
        self._scraped = scraped
        self._own_samples = own_samples
        self._page_seconds: float | None = None
        self._collector = EsperCollector(self, more=self._more_samples)
        self._registry = CollectorRegistry()
        self._registry.register(self._collector)
        ProcessCollector(registry=self._registry)
        self._pages: dict[tuple[str, ...], _Kept] = {}

    @property
    def snapshot(self) -> Snapshot:
        """Return the source's newest snapshot."""
        return self.source.snapshot

    def respond(self, request: Request, strained: bool) -> Response:
        """Answer a request; an error is counted and answered with 500.

        strained: whether the load is so high that a page from a moment ago will do.
        """
        try:
            return self._respond(request, strained)
        except Exception:
            self._collector.fail()
            return Response(500, b"the response could not be built\n")

    def _respond(self, request: Request, strained: bool) -> Response:
        if request.path == "/-/drill":
            return self._answer_drill(request)
        if request.method not in ("GET", "HEAD"):
            return Response(405, b"only GET and HEAD are allowed\n", headers=(("Allow", "GET, HEAD"),))
        match request.path:
            case "/metrics":
                return self._metrics(request, strained)
            case "/":
                return Response(200, PAGE, "text/html; charset=utf-8", PAGE_HEADERS)
            case "/api/v1/status":
                status = status_json(self.snapshot)
                return Response(200, status, "application/json", (("Cache-Control", "no-store"),))
            case "/api/v1/targets":
                return answer_targets(request, self.snapshot)
            case "/-/healthy":
                return Response(200, b"healthy\n")
            case "/-/ready":
                return self._readiness()
        return Response(404, b"not found; the metrics are at /metrics\n")

    def _readiness(self) -> Response:
        if self.snapshot.checks:
            return Response(200, b"ready\n")
        return Response(503, b"not ready: nothing has been measured yet\n")

    def _answer_drill(self, request: Request) -> Response:
        """Begin or end a drill; the header keeps web pages from starting one through a visitor's browser."""
        if not self._allow_drill:
            return Response(403, b"drills are off; start the exporter with --allow-drill\n")
        if not ip_address(request.client).is_loopback or "x-esper-drill" not in request.headers:
            return Response(403, b"drills can only be started by `esper drill` on this host\n")
        if request.method == "DELETE":
            self._drill = None
            return Response(200, b"the drill is over\n")
        if request.method != "POST":
            return Response(405, b"only POST and DELETE are allowed\n", headers=(("Allow", "POST, DELETE"),))
        try:
            self._drill = Drill.parse(request.query)
        except ValueError as error:
            return Response(400, f"{error}\n".encode())
        return Response(200, b"the drill has begun\n")

    def _more_samples(self) -> Iterator[Sample]:
        yield from self._own_samples()
        if self._page_seconds is not None:
            yield Sample(metrics.SCRAPE_DURATION, (), self._page_seconds)
        if self._drill is not None:
            yield from self._drill.samples()

    def _metrics(self, request: Request, strained: bool) -> Response:
        zipped = _takes_gzip(request.headers.get("accept-encoding", ""))
        names = parse_qs(request.query).get("name[]", [])
        key = (request.headers.get("accept", ""), str(zipped), *names)
        kept = self._pages.get(key) if strained else None
        if kept is None or time.monotonic() - kept.built > _STALE_SECONDS:
            kept = self._build(key[0], zipped, names)
            self._keep(key, kept)
        if names:  # it may not show what is bad
            return kept.response
        return replace(kept.response, sent=partial(self._scraped, request, kept.snapshot))

    def _build(self, accept: str, zipped: bool, names: list[str]) -> _Kept:
        began = time.monotonic()
        snapshot = self.snapshot  # the page is built after this, so it shows at least as much
        encode, content_type = _encoder(accept)
        body = encode(self._registry.restricted_registry(names) if names else self._registry)  # type: ignore[arg-type]
        headers: tuple[tuple[str, str], ...] = (("Vary", "Accept, Accept-Encoding"),)
        if zipped and len(body) > _GZIP_ABOVE:
            body = gzip.compress(body, compresslevel=1)
            headers += (("Content-Encoding", "gzip"),)
        self._page_seconds = time.monotonic() - began
        return _Kept(time.monotonic(), snapshot, Response(200, body, content_type, headers))

    def _keep(self, key: tuple[str, ...], page: _Kept) -> None:
        """Keep the page for a moment in which too many ask; what they accept comes in a few ways only."""
        if key not in self._pages and len(self._pages) >= _MAX_PAGES:
            self._pages.clear()
        self._pages[key] = page


def _encoder(accept: str) -> tuple[Callable[[CollectorRegistry], bytes], str]:
    """Return how to write a page; what cannot be understood gets the default."""
    try:
        return choose_encoder(accept)
    except Exception:  # it raises on a quoted version, among others
        return choose_encoder("")


def _takes_gzip(accept_encoding: str) -> bool:
    for each in accept_encoding.lower().split(","):
        coding, *parameters = (part.strip() for part in each.split(";"))
        if coding == "gzip":
            quality = next((each[2:] for each in parameters if each.startswith("q=")), "1")
            return quality.strip("0.") != ""
    return False
