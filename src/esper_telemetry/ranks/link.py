"""The connection of a rank to the job's store, and its row there."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from urllib.parse import urlsplit

from esper_telemetry.ranks.board import Board
from esper_telemetry.ranks.reader import Reader
from esper_telemetry.ranks.row import BEAT_SECONDS, BadCheck, ModelState, Row
from esper_telemetry.ranks.store import Place, connect, job_store
from esper_telemetry.snapshot import Snapshot
from esper_telemetry.snapshot.ranks import RankPlace, Ranks


class Link:
    """Write this rank's row, and on rank 0 read all of them; elsewhere look for rank 0's page.

    number: of the monitor in its process; those of the same number belong together.
    publish: is given what is known of the ranks; returns whether it was taken.
    """

    def __init__(self, number: int, snapshot: Snapshot, publish: Callable[[Ranks], bool]) -> None:
        place = job_store()
        if place is None:
            raise ConnectionError("there is no process group")
        dist = sys.modules["torch.distributed"]
        self._store_place = place
        self._store = connect(place, number)
        self._publish = publish
        self._place = RankPlace(dist.get_rank(), snapshot.run.local_rank, snapshot.run.host, None)
        self._row = self._store.add("joined", 1)  # rows are numbered as they come: nobody waits for a missing one
        self._beat = 0
        self._beat_at = 0.0
        self._told: object = None
        self._leader: str | None = None
        self._unknown = Ranks.unknown(dist.get_world_size(), snapshot.recent.seconds)
        board = Board(dist.get_world_size(), snapshot.recent.seconds)
        self.reader = Reader(self._store, board, publish) if dist.get_rank() == 0 else None

    def turn(self, snapshot: Snapshot, bad: tuple[BadCheck, ...], url: str | None, ended: bool) -> None:
        """Write and read what is due."""
        attributes = snapshot.checks == 0 or snapshot.local_inf_count is not None
        state = ModelState.of(snapshot)
        told = (bad, url, ended, attributes, state)
        due = time.monotonic() >= self._beat_at + BEAT_SECONDS
        if due or told != self._told:
            place = _at(url, self._place, self._store_place)
            self._write(Row(place, os.getpid(), self._beat + 1, ended, attributes, bad, state))
            if told != self._told:
                self._store.add("news", 1)
            self._told = told
        if self.reader is not None:
            self.reader.turn(self._leader)
        elif due:
            self._look_for_leader()

    def _write(self, row: Row) -> None:
        self._beat, self._beat_at = row.beat, time.monotonic()
        self._store.set(f"row/{self._row}", row.encode())
        if self.reader is not None and row.place.url is not None:
            self._leader = row.place.url
            self._store.set("leader", self._leader)

    def _look_for_leader(self) -> None:
        leader = self._store.get("leader").decode() if self._store.check(["leader"]) else None
        if leader != self._leader and self._publish(replace(self._unknown, leader=leader)):
            self._leader = leader


def _at(url: str | None, place: RankPlace, store: Place) -> RankPlace:
    """Return the place with the address at which other hosts reach its page."""
    if url is None:
        return place
    parts = urlsplit(url)
    host = parts.hostname or ""
    if ipaddress.ip_address(host).is_unspecified:
        host = _own_address(store) or place.host
    shown = f"[{host}]" if ":" in host else host
    return replace(place, address=f"{shown}:{parts.port}", secure=parts.scheme == "https")


def _own_address(store: Place) -> str | None:
    """Return this host's address on the way to the store's host; None where both are one."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(store.host, store.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # sends nothing
            mine = ipaddress.ip_address(probe.getsockname()[0])
    except OSError:
        return None
    mapped = getattr(mine, "ipv4_mapped", None) or mine
    return None if mapped.is_loopback else str(mapped)
