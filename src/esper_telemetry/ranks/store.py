"""The key-value store of the job, by a connection of our own: what training does with its own never waits for us."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from typing import Any, NamedTuple

TIMEOUT = timedelta(seconds=5)


class Place(NamedTuple):
    """Say where the job's store listens."""

    host: str
    port: int


def job_store() -> Place | None:
    """Return where the store of the default process group listens; None before there is one, or if it is not a server.

    torch names no public way to it, so whatever goes wrong here means that there is none.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized():
        return None
    try:
        store = dist.distributed_c10d._get_default_store()
        while isinstance(store, dist.PrefixStore):
            store = store.underlying_store
        return Place(store.host, store.port) if isinstance(store, dist.TCPStore) else None
    except Exception:
        return None


def connect(place: Place, *scope: object) -> Any:
    """Open a connection to the job's store, in which only those of the same scope and attempt meet.

    Raise what torch raises where it is not reached in 5 seconds.
    """
    import torch.distributed as dist

    store = dist.TCPStore(  # type: ignore[attr-defined]
        place.host, place.port, None, False, TIMEOUT, wait_for_workers=False
    )
    return dist.PrefixStore("/".join(map(str, ("esper", _attempt(), *scope))), store)  # type: ignore[attr-defined]


def _attempt() -> str:
    """Return the number of this attempt, which keeps it apart from earlier ones in the same store.

    Return "0" for several agents of torchrun: each counts its own restarts, so the numbers may differ between ranks.
    """
    one_agent = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_agent else "0"
