"""A rank's row in the job's store: who it is, that it lives, its last bad checks, and the state of its model."""

from __future__ import annotations

import json
from dataclasses import astuple
from typing import NamedTuple

from esper_telemetry.snapshot import Snapshot
from esper_telemetry.snapshot.ranks import RankPlace

BEAT_SECONDS = 5.0
"""How often a rank says that it lives."""

KEPT = 8
"""Bad checks in a row. A reader that comes later than so many of them finds a run that is bad at every check."""


class BadCheck(NamedTuple):
    """Hold the counts of one bad check on one rank.

    inf, nan: what its optimizer will see. own_inf, own_nan: of these, the elements that no other rank counts.
    local_inf, local_nan, layer: what its own backward made, and where that began. None: not known.
    """

    check: int
    inf: int
    nan: int
    own_inf: int | None
    own_nan: int | None
    local_inf: int | None
    local_nan: int | None
    layer: str | None
    timestamp: float

    @classmethod
    def of(cls, snapshot: Snapshot) -> BadCheck | None:
        """Read the last check; None when it was good, before the reduction and after it."""
        local = None if snapshot.local_inf_count is None else snapshot.local
        exact = snapshot.scope is None or snapshot.scope.exact
        check = cls(
            snapshot.checks,
            snapshot.inf_grad_count,
            snapshot.nan_grad_count,
            snapshot.owned_inf_count if exact else None,
            snapshot.owned_nan_count if exact else None,
            None if local is None else local.inf_count,
            None if local is None else local.nan_count,
            snapshot.origin_layer if local is None else local.origin_layer,
            snapshot.timestamp or 0.0,
        )
        return check if check.inf or check.nan or check.local_inf or check.local_nan else None


class ModelState(NamedTuple):
    """Hold what trouble has left of a rank's part of the model; a run that is well never changes it.

    damage: the worst part that is damaged, "intact", or None before the first scan.
    elements, tensor: the bad elements of that part, and its worst tensor.
    cause: where the last trouble began.
    good: whether the last check was good. Else, last_good: number and unix time of the last that was, if any.
    """

    damage: str | None = None
    elements: int = 0
    tensor: str = ""
    cause: str | None = None
    good: bool = True
    last_good: tuple[int, float] | None = None

    @classmethod
    def of(cls, snapshot: Snapshot) -> ModelState:
        """Read the newest verdict."""
        found, last = snapshot.found_damage, snapshot.last_good_check
        state = cls(snapshot.damage, cause=snapshot.cause)
        if found is not None and found.worst is not None:
            state = state._replace(elements=found.elements(found.word), tensor=found.worst.layer_name)
        if snapshot.checks == (0 if last is None else last.check):
            return state
        return state._replace(good=False, last_good=None if last is None else (last.check, last.timestamp))


class Row(NamedTuple):
    """Hold all that a rank tells.

    process: tells processes of the rank apart, whose checks are counted anew.
    beat: grows while its thread lives. ended: whether its monitor was closed.
    attributes: whether it measures what its own backward makes.
    """

    place: RankPlace
    process: int
    beat: int
    ended: bool
    attributes: bool
    bad: tuple[BadCheck, ...]
    state: ModelState

    def encode(self) -> bytes:
        """Return the row as JSON."""
        return json.dumps((astuple(self.place), *self[1:]), separators=(",", ":")).encode()

    @classmethod
    def decode(cls, text: bytes) -> Row:
        """Read a row. Raise ValueError or TypeError when it is not one."""
        place, process, beat, ended, attributes, bad, state = json.loads(text)
        checks = tuple(BadCheck(*check) for check in bad)
        return cls(RankPlace(*place), process, beat, ended, attributes, checks, ModelState(*state))
