"""Rank 0 reads the rows of all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from esper_telemetry.ranks.board import Board
from esper_telemetry.ranks.row import BEAT_SECONDS, Row
from esper_telemetry.snapshot.ranks import Ranks

_REST = 20.0  # times what reading took, so that it takes 5 % of a core at most
_AT_ONCE = 500


class Reader:
    """Read all rows when one has news, and at every beat; rest between two readings.

    publish: is given what is known of the ranks; returns whether it was taken, else it comes again.
    """

    def __init__(self, store: Any, board: Board, publish: Callable[[Ranks], bool]) -> None:
        self._store = store
        self._board = board
        self._publish = publish
        self._texts: list[bytes] = []
        self._late: set[int] = set()
        self._ended: dict[int, bool] = {}
        self._news = -1
        self._due = 0.0
        self._rest_until = 0.0
        self._published: Ranks | None = None
        self._unpublished: Ranks | None = None

    @property
    def is_done(self) -> bool:
        """Return whether every rank that joined has reported its end, and all of that was published."""
        all_ended = bool(self._ended) and all(self._ended.values()) and not self._late
        return all_ended and self._unpublished is None

    def turn(self, leader: str | None) -> None:
        """Read what is due, and publish what is new."""
        began = time.monotonic()
        if began < self._rest_until:
            return
        news = self._store.add("news", 0)
        if news != self._news or began >= self._due:
            self._read()
            self._news, self._due = news, began + BEAT_SECONDS
            ranks = replace(self._board.read(time.monotonic()), leader=leader)
            self._unpublished = None if ranks == self._published else ranks
            self._rest_until = time.monotonic() + _REST * (time.monotonic() - began)
        if self._unpublished is not None and self._publish(self._unpublished):
            self._published, self._unpublished = self._unpublished, None

    def _read(self) -> None:
        """Take in every row that has changed; one that was promised and is not there yet is looked for again."""
        joined = self._store.add("joined", 0)
        self._late |= set(range(len(self._texts), joined))
        self._texts += [b""] * (joined - len(self._texts))
        if self._late and self._store.check([_key(row) for row in self._late]):  # nearly always
            self._late = set()
        self._late = {row for row in self._late if not self._store.check([_key(row)])}
        there = [row for row in range(joined) if row not in self._late]
        for start in range(0, len(there), _AT_ONCE):
            rows = there[start : start + _AT_ONCE]
            for row, text in zip(rows, self._store.multi_get([_key(row) for row in rows]), strict=True):
                if text != self._texts[row]:
                    self._texts[row] = text
                    self._take(text)
            time.sleep(0)  # training goes first

    def _take(self, text: bytes) -> None:
        row = Row.decode(text)
        self._ended[row.place.rank] = row.ended
        self._board.take(row, time.monotonic())


def _key(row: int) -> str:
    return f"row/{row + 1}"
