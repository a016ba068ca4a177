"""Whether a checkpoint is worth keeping, as all processes of a run see it."""

from __future__ import annotations

import logging

import torch.distributed as dist

from esper_telemetry.monitor import GradientMonitor
from esper_telemetry.ranks.wrappers import several

logger = logging.getLogger("esper_telemetry")


def may_save(monitor: GradientMonitor | None) -> bool:
    """Tell whether to save now, the same in every process; all of them must ask, because all of them save.

    If not, one line in the log says why.
    """
    safe = None if monitor is None else monitor.safe_to_save()
    why = None if safe is None or safe else safe.why
    if several():
        reasons: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, why)
        why = next((each for each in reasons if each is not None), None)
    if why is not None:
        logger.warning("esper: no checkpoint is saved, to keep the last good one: %s", why)
    return why is None
