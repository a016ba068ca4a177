"""Find what torch has put around a model to train it on several ranks, also where the model does not know of it."""

from __future__ import annotations

import gc
import sys
from typing import Any

DDP = ("torch.nn.parallel.distributed", "DistributedDataParallel")
FSDP1 = ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel")
FSDP2 = ("torch.distributed.fsdp", "FSDPModule")
STAGE = ("torch.distributed.pipelining.stage", "_PipelineStageBase")
DTENSOR = ("torch.distributed.tensor", "DTensor")

Named = tuple[str, str]
"""A module and a class in it, which is imported only where somebody else has done so: nobody uses it elsewhere."""


def joined() -> bool:
    """Tell whether this process has joined a process group of torch.distributed."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()


def class_of(named: Named) -> type | None:
    """Return a class, None where its module was not imported."""
    found = getattr(sys.modules.get(named[0]), named[1], None)
    return found if isinstance(found, type) else None


def is_one(each: object, named: Named) -> bool:
    """Tell whether an object is of a class."""
    cls = class_of(named)
    return cls is not None and issubclass(type(each), cls)  # isinstance() would ask a proxy what it stands for


def find_alive(*named: Named) -> list[Any]:
    """Return every object of these classes in this process; it takes some 50 ms for a million objects."""
    classes = tuple(cls for each in named if (cls := class_of(each)) is not None)
    return [each for each in gc.get_objects() if issubclass(type(each), classes)] if classes else []
