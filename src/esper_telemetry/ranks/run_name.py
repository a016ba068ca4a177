"""One name for a run that nobody named: the first rank to say one in the job's store has named it for all."""

from __future__ import annotations

import logging
import sys
import uuid

logger = logging.getLogger("esper_telemetry")


def made_up(mine: str | None = None) -> str:
    """Return a name that all ranks of the run share, after an elastic restart too; of a process by itself its own.

    mine: is taken where no rank was faster; without it one is made up.
    """
    mine = mine or uuid.uuid4().hex[:12]
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized():
        return mine
    try:
        store = dist.distributed_c10d._get_default_store()  # torch names no public way to it
        while isinstance(store, dist.PrefixStore):  # such as one for each attempt
            store = store.underlying_store
        named: bytes = dist.PrefixStore("esper", store).compare_set("run_id", "", mine)
        return named.decode()
    except Exception as error:
        logger.warning("esper: each rank has its own run_id, because the job's store could not be reached: %r", error)
        return mine
