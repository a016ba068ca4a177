"""Find what torch has put around a model to train it on several ranks, also where the model does not know of it."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

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


def several() -> bool:
    """Tell whether this process is one of several ranks."""
    return joined() and sys.modules["torch.distributed"].get_world_size() > 1


def class_of(named: Named) -> type | None:
    """Return a class, None where its module was not imported."""
    found = getattr(sys.modules.get(named[0]), named[1], None)
    return found if isinstance(found, type) else None


def is_one(each: object, named: Named) -> bool:
    """Tell whether an object is of a class."""
    cls = class_of(named)
    return cls is not None and issubclass(type(each), cls)  # isinstance() would ask a proxy what it stands for


class Wrappers(NamedTuple):
    """Hold what is around the parameters of a model, or some of them."""

    ddp: Sequence[Any]
    fsdp1: Sequence[Any]
    fsdp2: Sequence[Any]
    stages: Sequence[Any]

    @classmethod
    def around(cls, parameters: Sequence[Tensor]) -> Wrappers:
        """Find them among all objects of this process, which takes some 50 ms for a million."""
        own = set(map(id, parameters))
        kinds: dict[type, list[Any]] = {each: [] for named in _KINDS if (each := class_of(named)) is not None}
        classes = tuple(kinds)
        for each in gc.get_objects():
            if issubclass(type(each), classes) and not own.isdisjoint(map(id, parameters_in(each))):
                next(found for kind, found in kinds.items() if issubclass(type(each), kind)).append(each)
        return cls(*(kinds.get(class_of(named), ()) for named in _KINDS))  # type: ignore[arg-type]


_KINDS = (DDP, FSDP1, FSDP2, STAGE)  # as the fields above


def parameters_in(wrapper: Any) -> list[Tensor]:
    """Return the parameters of what is wrapped; none where it is not complete."""
    module = getattr(wrapper, "submod", wrapper)
    return list(module.parameters()) if hasattr(module, "_modules") else []
