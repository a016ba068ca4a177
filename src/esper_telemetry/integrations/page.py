"""Pages that outlive a run: the next run of the process is shown on the same one."""

from __future__ import annotations

import errno
import logging
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from esper_telemetry.exporters import http
from esper_telemetry.exporters.address import parse_address
from esper_telemetry.exporters.http import Exporter
from esper_telemetry.monitor import GradientMonitor

logger = logging.getLogger("esper_telemetry")


@dataclass
class Run:
    """A training run: its monitor, the checks that it had from the run before, and the thread that trains."""

    monitor: GradientMonitor
    checks_before: int
    thread: threading.Thread = field(default_factory=threading.current_thread)
    died: bool = False

    @property
    def is_over(self) -> bool:
        """Tell whether it has ended, or died of an exception: then its thread is gone, or asks this itself."""
        return self.monitor.snapshot.ended or self.thread is threading.current_thread() or not self.thread.is_alive()

    @property
    def has_measured(self) -> bool:
        """Tell whether it has begun: one that measured nothing may just have been set up."""
        return self.monitor.snapshot.checks > self.checks_before

    def bury(self) -> None:
        """Take its monitor off the model where it has died."""
        if self.is_over and not self.monitor.snapshot.ended:
            self.died = True
            self.monitor.close()


class Page:
    """What an exporter shows: one run after another. It stays until the process ends, and so does the wait at exit."""

    def __init__(self, exporter: Exporter, run: Run) -> None:
        self.exporter = exporter
        self.run = run

    @property
    def is_open(self) -> bool:
        """Tell whether this process still serves it: nobody has closed the exporter, and this is no forked child."""
        return open_exporter(urlsplit(self.exporter.url).netloc) is self.exporter

    def is_at(self, address: str) -> bool:
        """Tell whether it has the port that was asked for."""
        return parse_address(address)[1] in (0, urlsplit(self.exporter.url).port)

    def show(self, run: Run) -> None:
        """Show a run in place of the one before."""
        before, self.run = self.run, run
        if before.monitor is run.monitor:
            return
        if before.died or not before.monitor.snapshot.ended:
            logger.warning("esper: %s shows the run that begins now; the one before it did not end", self.exporter.url)
        follow(self.exporter, run.monitor)


_pages: defaultdict[str, list[Page]] = defaultdict(list)
"""By the address that was asked for, which somebody else may have had."""


def find_page(address: str, last: Exporter | None, strict: bool) -> Page | None:
    """Return a page that runs at this address have left, and rather the one that was had last.

    strict: return none that is at another port.
    """
    _pages[address] = [page for page in _pages[address] if page.is_open]
    left = [page for page in _pages[address] if page.run.is_over and (page.is_at(address) or not strict)]
    return min(left, key=lambda page: page.exporter is not last, default=None)


def make_page(address: str, run: Run, strict: bool) -> Page | None:
    """Serve a run at an address at which no page is left.

    Where another thread's run is shown there, or the port is somebody else's, one line says so and the page is at the
    next free port. Return None where nothing can be served, which is logged too.

    strict: raise OSError instead.
    """
    host, port = parse_address(address)
    busy = [page.exporter.url for page in _pages[address] if port and not page.run.is_over]
    if busy and strict:
        raise OSError(errno.EADDRINUSE, f"address: {busy[0]} shows another run of this process, which still trains")
    try:
        exporter = start_exporter(run.monitor, _beside(host, port) if busy else address, strict=strict)
    except OSError as error:
        if strict:
            raise
        logger.error("esper: training goes on without an exporter: %s", error)
        return None
    if busy:
        still = "shows another run of this process, which still trains"
        logger.error("esper: %s %s, so this one is at %s; scrape both", busy[0], still, exporter.url)
    page = Page(exporter, run)
    _pages[address].append(page)
    return page


def _beside(host: str, port: int) -> str:
    """Return the next address at which this process does not serve."""
    host = f"[{host}]" if ":" in host else host
    while port and open_exporter(f"{host}:{port}") is not None:
        port = (port + 1) % 2**16  # after the last one comes 0, which picks a free one
    return f"{host}:{port}"


# Until the exporter itself has these three.


def open_exporter(address: str) -> Exporter | None:
    """Return the exporter of this process at an address."""
    found = (each for each in http._open if not each._closed and urlsplit(each.url).netloc == address)
    return next(found, None)


def follow(exporter: Exporter, source: GradientMonitor) -> None:
    """Show another monitor from now on."""
    exporter._source = exporter._collector._source = source


def start_exporter(source: GradientMonitor, address: str, *, strict: bool) -> Exporter:
    """Serve at an address, or at the next free port."""
    host, port = parse_address(address)
    if (before := open_exporter(address)) is not None:
        before.close(linger=0)
    for beside in range(port, min(port + 100, 2**16)):
        try:
            return http.start_exporter(source, f"{host}:{beside}")
        except OSError as error:
            if strict or error.errno != errno.EADDRINUSE:
                raise
            if beside == port:
                logger.error("esper: %s; serving at the next free port", error)
    return http.start_exporter(source, f"{host}:0")
