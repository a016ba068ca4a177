"""Prometheus HTTP service discovery: rank 0 lists the pages of all ranks, so that one address finds a whole run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TypeAlias
from urllib.parse import parse_qs

from esper_telemetry.exporters.web.exchange import Request, Response
from esper_telemetry.snapshot import Snapshot
from esper_telemetry.snapshot.ranks import RankPlace

Target: TypeAlias = dict[str, Any]


def answer_targets(request: Request, snapshot: Snapshot) -> Response:
    """List the targets of the run; `?scrape=leader` leaves one on each host, and rank 0."""
    if snapshot.run.rank != 0:
        leader = None if snapshot.ranks is None else snapshot.ranks.leader
        return Response(404, f"rank 0 lists the targets of its run{f', at {leader}' if leader else ''}\n".encode())
    asked = parse_qs(request.query).get("scrape", [""])[-1]
    if asked not in ("", "leader"):
        return Response(400, f"scrape: expected leader, got {asked!r}\n".encode())
    places = _alone(request, snapshot) if snapshot.ranks is None else snapshot.ranks.places
    targets = [target for target in read_targets(snapshot, places) if not asked or "scrape" in target["labels"]]
    return Response(200, json.dumps(targets).encode(), "application/json", (("Cache-Control", "no-store"),))


def read_targets(snapshot: Snapshot, places: tuple[RankPlace, ...]) -> Iterator[Target]:
    """Yield a target for every rank that has a page."""
    for place in places:
        if place.address is None:
            continue
        labels = {"run": snapshot.run.run_id, "rank": str(place.rank), "host": place.host}
        if place.local_rank == 0 or place.rank == 0:
            labels["scrape"] = "leader"
        if place.secure:
            labels["__scheme__"] = "https"
        yield {"targets": [place.address], "labels": labels}


def _alone(request: Request, snapshot: Snapshot) -> tuple[RankPlace, ...]:
    """Return the one place of a run of one, where it was reached; of a larger run nothing is known yet."""
    if snapshot.run.world_size > 1 or "host" not in request.headers:
        return ()
    return (RankPlace(0, snapshot.run.local_rank, snapshot.run.host, request.headers["host"]),)
