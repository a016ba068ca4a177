"""Which part of the gradients this rank has, and which elements count here so that ranks together count each once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from esper_telemetry.ranks.wrappers import DDP, DTENSOR, STAGE, find_alive, is_one

Replicas = Any
"""A process group, or a function that returns one, or None, for a layer's name and its parameter."""


class Local(Enum):
    """Say where this rank's own gradient can be seen before it is reduced."""

    SAME = "same"
    """It is not reduced, or what reduces it comes after the check."""
    ARRIVING = "arriving"
    """It is what arrives on the parameter, and is reduced before the pass ends."""
    UNSHARDED = "unsharded"
    """It arrives on the whole parameter, of which the listed one is a shard."""
    UNSEEN = "unseen"


class Share(NamedTuple):
    """Say what a rank has of one gradient.

    scope: as in GradScope.
    owned: whether its elements count here; None where that is not known.
    first: whether this rank is the first of the replicas that a wrapper keeps.
    """

    scope: str
    owned: bool | None
    local: Local = Local.SAME
    first: bool = True

    def seen_in(self, gradient: Any) -> Share:
        """Return the same of a DTensor whose placements tell whose its elements are."""
        owned = _owns(gradient)
        return self._replace(owned=None if owned is None else owned and self.first)


WHOLE = Share("whole", True)


def list_shares(names: Sequence[str], parameters: Sequence[Tensor], replicas: Replicas) -> list[Share]:
    """Return what this rank has of each parameter's gradient."""
    around = _Around(parameters, _as_function(replicas))
    return list(map(around.share, names, parameters))


def _owns(gradient: Any) -> bool | None:
    """Tell whether the elements of a DTensor count at this rank; None where they are parts of a sum yet to be taken.

    Of each dimension of the mesh shards count everywhere, and replicas at its first coordinate.
    """
    coordinate = gradient.device_mesh.get_coordinate()
    if any(placement.is_partial() for placement in gradient.placements):
        return None
    return coordinate is not None and all(
        not placement.is_replicate() or coordinate[dimension] == 0
        for dimension, placement in enumerate(gradient.placements)
    )


class _Around:
    """Know what is around the parameters of a model."""

    def __init__(self, parameters: Sequence[Tensor], replicas: Callable[[str, Tensor], Any]) -> None:
        own = set(map(id, parameters))
        wrappers = find_alive(DDP, STAGE)
        self._replicas = replicas
        self._alone = dist.get_world_size() == 1
        self._groups: dict[int, Any] = {}
        self._apart: set[int] = set()
        for each in wrappers:
            if is_one(each, DDP):
                self._take_in_ddp(each, own)
        for each in wrappers:
            if is_one(each, STAGE):
                self._take_in_stage(each, own)

    def share(self, name: str, parameter: Any) -> Share:
        """Return what this rank has of one parameter's gradient."""
        group = self._groups.get(id(parameter))
        first = group is None or dist.get_rank(group) == 0
        local = Local.SAME if group is None else Local.ARRIVING
        if is_one(parameter, DTENSOR):
            return Share("shard", None, local, first).seen_in(parameter if parameter.grad is None else parameter.grad)
        if group is not None:
            return Share("replica", first, local)
        if (given := self._replicas(name, parameter)) is not None:
            return Share("replica", dist.get_rank(given) == 0)
        if id(parameter) in self._apart:
            return Share("shard", True)
        return WHOLE if self._alone else Share("local", None)

    def _take_in_ddp(self, ddp: Any, own: set[int]) -> None:
        for name, parameter in ddp.module.named_parameters():
            if id(parameter) not in own:
                continue
            if name in ddp.parameters_to_ignore:
                self._apart.add(id(parameter))
            else:
                self._groups[id(parameter)] = ddp.process_group

    def _take_in_stage(self, stage: Any, own: set[int]) -> None:
        if stage.group_size == dist.get_world_size():  # no rank is left that could hold the same stage
            self._apart.update(own.intersection(map(id, stage.submod.parameters())))


def check_replicas(replicas: Replicas) -> Replicas:
    """Return it; raise ValueError when it is neither a process group nor a function."""
    if replicas is None or callable(replicas) or (dist.is_available() and isinstance(replicas, dist.ProcessGroup)):
        return replicas
    raise ValueError(f"replicas: expected a process group or a function, got {type(replicas).__name__}")


def _as_function(replicas: Replicas) -> Callable[[str, Tensor], Any]:
    return replicas if callable(replicas) else lambda name, parameter: replicas
