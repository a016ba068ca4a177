"""Serve a monitor's snapshot over HTTP."""

from __future__ import annotations

import errno
import logging
import math
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from esper_telemetry import arguments, metrics
from esper_telemetry.exporters.address import default_address, listen, listen_nearby, parse_address, url_of
from esper_telemetry.exporters.exit import at_exit, not_at_exit
from esper_telemetry.exporters.routes.routes import Routes
from esper_telemetry.exporters.samples import Sample, Source, snapshot_of
from esper_telemetry.exporters.scrapers import LONGEST_WAIT, Scrapers
from esper_telemetry.exporters.web.exchange import Request, Response
from esper_telemetry.exporters.web.server import HttpServer
from esper_telemetry.snapshot import Snapshot

if TYPE_CHECKING:
    import socket

    from esper_telemetry.exporters.web.access import Access

logger = logging.getLogger("esper_telemetry")

LINGER_SECONDS = 20.0
"""How long a bad check that was never scraped keeps the exporter up at exit."""

HEAR_SECONDS = 2.0
"""How long rank 0 waits at exit for the last rows of the other ranks."""


class Exporter:
    """Serve a monitor's snapshot over HTTP until `close()`, or until the process ends."""

    def __init__(
        self, source: Source, listener: socket.socket, linger: float | None, allow_drill: bool, access: Access | None
    ) -> None:
        self._access = access
        self._linger_seconds = linger
        self._scrapers = Scrapers()
        self._routes = Routes(source, allow_drill, self._note_scrape, self._own_samples)
        self._shown: Snapshot = source.snapshot
        self._pid = os.getpid()
        self._closed = False
        self.bound = listener.getsockname()[:2]
        self.url = url_of(listener, secure=access is not None and access.context is not None)
        if access is None or access.open_to_all:
            _warn_if_open(listener)
        self._server = HttpServer(listener, self._respond, access)
        _open.add(self)
        at_exit(self._end)
        self._announce(source)

    def follow(self, source: Source) -> None:
        """Serve another source from now on; if the last bad check of the previous one was never scraped, log it."""
        snapshot_of("source", source)
        snapshot = self._routes.snapshot
        if not self._own_is_delivered():
            logger.warning(
                "esper: %s now serves another run; the last bad check of the previous run was never scraped: "
                "Inf %d, NaN %d in total, first in %s",
                *(self.url, snapshot.inf.elements, snapshot.nan.elements, snapshot.origin_layer),
            )
        self._routes.source = source
        self._shown = source.snapshot
        self._announce(source)

    def linger(self, seconds: float | None = None) -> bool:
        """Wait for a last scrape; return whether the last bad check was scraped.

        Each scraper seen so far gets one and a half of its scrape intervals, 90 s at most, to see that the run has
        ended. A bad check that was never scraped is kept up for 20 s.
        With several ranks, rank 0 first waits for the last rows of the others, for 2 s at most, and keeps their bad
        checks up like its own.

        seconds: the longest wait.
        """
        limit = math.inf if seconds is None else arguments.seconds("seconds", seconds)
        began = time.monotonic()
        self._hear_ranks(min(limit, HEAR_SECONDS))
        said = False
        while (left := began + (most := min(self._worth_waiting(), limit)) - time.monotonic()) > 0:
            if not said:
                said = True
                self._say_what_for(most)
            self._scrapers.visited.wait(min(left, 1.0))
            self._scrapers.visited.clear()
        return self._is_delivered()

    def close(self, linger: float | None = None) -> None:
        """Linger, then stop serving and free the port; a second call does nothing. Ctrl-C ends the wait.

        linger: the longest wait in seconds, instead of the one given to `start_exporter`.
        """
        most = self._linger_seconds if linger is None else arguments.seconds("linger", linger)
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        try:
            self.linger(most)
        except KeyboardInterrupt:
            logger.warning("esper: interrupted; %s stops serving now", self.url)
        finally:
            not_at_exit(self._end)
            self._server.stop()

    def _end(self) -> None:
        """Close at exit; end an open source normally, unless an exception ends the process."""
        end_source = getattr(self._routes.source, "close", None)
        if end_source is not None and not self._closed and os.getpid() == self._pid and _ends_well():
            end_source()
        self.close()

    def _announce(self, source: Source) -> None:
        """Give the page's URL to the source, if it tells the other ranks."""
        announce = getattr(source, "announce", None)
        if announce is not None:
            announce(self.url)

    def _hear_ranks(self, seconds: float) -> None:
        hear_ranks = getattr(self._routes.source, "hear_ranks", None)
        if hear_ranks is not None:
            hear_ranks(seconds)

    def _worth_waiting(self) -> float:
        """Return how many seconds, from the start of the wait, are worth waiting; 0 when everything was scraped."""
        waits = self._scrapers.waiting_for_the_end() if self._routes.snapshot.ended else {}
        bad = 0.0 if self._is_delivered() else LINGER_SECONDS
        return max(bad, *waits.values()) if waits else bad

    def _say_what_for(self, seconds: float) -> None:
        who = ", ".join(self._scrapers.waiting_for_the_end()) if self._routes.snapshot.ended else ""
        logger.warning(
            "esper: waiting for %s/metrics to be scraped once more%s, %.3g s at most; Ctrl-C exits at once",
            *(self.url, f" by {who}" if who else "", min(seconds, LONGEST_WAIT)),
        )

    def _is_delivered(self) -> bool:
        """Return whether the last bad check was scraped: this rank's, and on rank 0 also the run's."""
        found = _bad_checks_of_run(self._routes.snapshot)
        return self._own_is_delivered() and (not found or found == _bad_checks_of_run(self._shown))

    def _own_is_delivered(self) -> bool:
        snapshot = self._routes.snapshot
        return (snapshot.inf, snapshot.nan) == (self._shown.inf, self._shown.nan)

    def _respond(self, request: Request) -> Response:
        return self._routes.respond(request, self._server.strained)

    def _note_scrape(self, request: Request, snapshot: Snapshot) -> None:
        if snapshot.checks >= self._shown.checks:  # a page that was kept may be older than another client's
            self._shown = snapshot
        patient = "x-prometheus-scrape-timeout-seconds" in request.headers
        name = " ".join(filter(None, (request.client, request.headers.get("user-agent"))))
        self._scrapers.note(name, request.port, patient, snapshot)

    def _own_samples(self) -> Iterator[Sample]:
        # Present from the start, even without a web config: the first failure of a new series would not be an increase.
        failures = 0 if self._access is None else self._access.reload_failures
        yield Sample(metrics.WEB_CONFIG_RELOAD_FAILURES, (), failures)


def start_exporter(
    source: Source,
    address: str | int | None = None,
    *,
    linger: float | None = None,
    allow_drill: bool = False,
    web_config_file: str | os.PathLike[str] | None = None,
    strict: bool = False,
) -> Exporter:
    """Serve `source.snapshot` at `address` and return the exporter.

    An exporter of this process at the same address is replaced. If another process has the port, the next free one is
    used, and an error is logged.

    source: a GradientMonitor, or anything with a `.snapshot`.
    address: HOST:PORT, :PORT for all addresses, or a port on loopback; port 0 picks a free one. Default:
        ESPER_LISTEN_ADDRESS, or 127.0.0.1:19301 plus the local rank.
    linger: the longest wait for a last scrape at exit, in seconds; see `Exporter.linger`. Default:
        ESPER_LINGER_SECONDS, or as `Exporter.linger` decides.
    allow_drill: let `esper drill` on this host show a made-up critical value that is labelled as a drill.
    web_config_file: TLS and passwords in the format of Prometheus's exporters; reloaded when it changes.
    strict: raise OSError if the port is in use.

    Raise ValueError when the source, the address or the web config is invalid, OSError when it is impossible to listen
    on the address, and ImportError when there is a web config but the extra `server` is not installed.
    """
    snapshot_of("source", source)
    arguments.flag("allow_drill", allow_drill)
    arguments.flag("strict", strict)
    linger = _linger_of_environment() if linger is None else arguments.seconds("linger", linger)
    host, port = parse_address(default_address(source.snapshot.run.local_rank) if address is None else address)
    access = None if web_config_file is None else _access(arguments.path("web_config_file", web_config_file))
    before = _open_at(host, port)
    if before is not None:
        logger.warning("esper: the exporter at %s is replaced by a new one", before.url)
        before.follow(source)  # says what nobody has scraped
        before.close(linger=0)
    return Exporter(source, _listen(host, port, strict), linger, allow_drill, access)


def open_exporter(address: str | int) -> Exporter | None:
    """Return the exporter of this process that serves at an address, or None."""
    return _open_at(*parse_address(address))


def _open_at(host: str, port: int) -> Exporter | None:
    mine = (each for each in _open if not each._closed and each._pid == os.getpid())
    return next((each for each in mine if port and each.bound == (host or "::", port)), None)


def _listen(host: str, port: int, strict: bool) -> socket.socket:
    try:
        return listen(host, port)
    except OSError as error:
        if strict or error.errno != errno.EADDRINUSE:
            raise
        listener = listen_nearby(host, port)
        url = url_of(listener, secure=False).partition("://")[2]
        logger.error("esper: %s; serving at %s: scrape that address, or free the port and restart", error, url)
        return listener


def _linger_of_environment() -> float | None:
    text = os.environ.get("ESPER_LINGER_SECONDS", "")
    try:
        return arguments.seconds("ESPER_LINGER_SECONDS", float(text)) if text else None
    except ValueError:
        raise ValueError(f"ESPER_LINGER_SECONDS: expected seconds of at least 0, got {arguments.shown(text)}") from None


def _bad_checks_of_run(snapshot: Snapshot) -> tuple[object, ...]:
    """Return the bad checks of the whole run that the page of rank 0 still shows; empty on other ranks."""
    if snapshot.ranks is None:
        return ()
    recent = snapshot.ranks.recent
    now = recent.read(time.monotonic())
    return recent.buckets if now.inf_max or now.nan_max else ()


def _ends_well() -> bool:
    """Tell whether the process ends without an unhandled exception."""
    return getattr(sys, "last_value", None) is None and threading.current_thread() is threading.main_thread()


def _access(web_config_file: Path) -> Access:
    from esper_telemetry.exporters.web.access import Access  # needs the extra

    try:
        return Access(web_config_file)
    except ValueError as error:
        raise ValueError(f"web_config_file: {error}") from None


def _warn_if_open(listener: socket.socket) -> None:
    if not ip_address(listener.getsockname()[0]).is_loopback:
        logger.warning(
            "esper: anyone who can reach %s can read it; a web config file adds TLS and passwords",
            url_of(listener, secure=False),
        )


_open: weakref.WeakSet[Exporter] = weakref.WeakSet()


def _let_go_in_child() -> None:
    """Close a forked child's copies of the listening sockets: it neither serves nor holds the port."""
    for exporter in _open:
        exporter._server.let_go()
    _open.clear()


os.register_at_fork(after_in_child=_let_go_in_child)
