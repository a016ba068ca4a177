"""Pages that outlive a run: the next run of the process is shown on the same one."""

from __future__ import annotations

import errno
import logging
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from esper_telemetry.exporters.address import parse_address
from esper_telemetry.exporters.http import Exporter, open_exporter, start_exporter
from esper_telemetry.monitor import GradientMonitor
from esper_telemetry.snapshot import Snapshot

logger = logging.getLogger("esper_telemetry")


@dataclass
class Run:
    """A training run: its monitor, and the thread that trains.

    carries_on: whether it counts on where the run before it stopped.
    """

    monitor: GradientMonitor
    carries_on: bool
    thread: threading.Thread = field(default_factory=threading.current_thread)
    died: bool = False

    def __post_init__(self) -> None:
        self._checks_before = self.monitor.snapshot.checks

    @property
    def is_over(self) -> bool:
        """Tell whether it has ended, or died of an exception: then its thread is gone, or asks this itself."""
        return self.monitor.snapshot.ended or self.thread is threading.current_thread() or not self.thread.is_alive()

    @property
    def has_measured(self) -> bool:
        """Tell whether it has begun: one that measured nothing may just have been set up."""
        return self.monitor.snapshot.checks > self._checks_before

    def bury(self) -> None:
        """Take its monitor off the model where it has died."""
        if self.is_over and not self.monitor.snapshot.ended:
            self.died = True
            self.monitor.close()


class Page:
    """The source of an exporter, which shows one run after another until the process ends, and waits there at exit."""

    exporter: Exporter

    def __init__(self, run: Run) -> None:
        self.run = run

    @property
    def snapshot(self) -> Snapshot:
        """Return the snapshot of the run that is shown."""
        return self.run.monitor.snapshot

    def close(self) -> None:
        """End the run, as a normal end of the process would."""
        self.run.monitor.close()

    @property
    def is_open(self) -> bool:
        """Tell whether this process still serves it: nobody has closed the exporter, and this is not a forked child."""
        return open_exporter(urlsplit(self.exporter.url).netloc) is self.exporter

    def is_at(self, address: str) -> bool:
        """Tell whether it has the requested port."""
        return parse_address(address)[1] in (0, urlsplit(self.exporter.url).port)

    def show(self, run: Run) -> None:
        """Show a run in place of the one before."""
        before, self.run = self.run, run
        if before.monitor is run.monitor:
            return
        if before.died or not before.monitor.snapshot.ended:
            logger.warning("esper: %s now shows a new run; the previous one did not end", self.exporter.url)
        if not run.carries_on:
            self.exporter.follow(self)  # what was scraped of the run before says nothing of this one


_pages: defaultdict[str, list[Page]] = defaultdict(list)
"""By the requested address; the page may be at another one if the port was in use."""


def find_page(address: str, last: Exporter | None, strict: bool) -> Page | None:
    """Return a page left by earlier runs at this address, preferably the last one used.

    strict: ignore pages on another port.
    """
    _pages[address] = [page for page in _pages[address] if page.is_open]
    left = [page for page in _pages[address] if page.run.is_over and (page.is_at(address) or not strict)]
    return min(left, key=lambda page: page.exporter is not last, default=None)


def make_page(address: str, run: Run, strict: bool) -> Page | None:
    """Serve a run on a new page.

    If another thread's run is shown at this address, or another process has the port, the page is at the next free
    port, and one line in the log says so. Return None if nothing can be served; that is logged too.

    strict: raise OSError instead.
    """
    host, port = parse_address(address)
    busy = [page.exporter.url for page in _pages[address] if port and not page.run.is_over]
    if busy and strict:
        raise OSError(errno.EADDRINUSE, f"{busy[0]} shows another run of this process that is still training")
    page = Page(run)
    try:
        page.exporter = start_exporter(page, _beside(host, port) if busy else address, strict=strict)
    except OSError as error:
        if strict:
            raise
        logger.error("esper: training continues without an exporter: %s", error)
        return None
    if busy:
        still = "shows another run of this process that is still training"
        logger.error("esper: %s %s, so this run is at %s; scrape both", busy[0], still, page.exporter.url)
    _pages[address].append(page)
    return page


def _beside(host: str, port: int) -> str:
    """Return the next address at which this process does not serve."""
    while port and open_exporter(shown(host, port)) is not None:
        port = (port + 1) % 2**16  # after the last one comes 0, which picks a free one
    return shown(host, port)


def shown(host: str, port: int) -> str:
    """Return an address as it is written."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
