"""Which part of the gradients this rank has, and which elements count here so that ranks together count each once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from esper_telemetry.ranks.wrappers import DTENSOR, Wrappers, is_one, parameters_in

Replicas = Any
"""A process group, or a function that returns one, or None, for a layer's name and its parameter."""


class Local(Enum):
    """Say where this rank's own gradient can be seen before it is reduced."""

    SAME = "same"
    """It is not reduced, or what reduces it comes after the check."""
    ARRIVING = "arriving"
    """It is what arrives on the parameter, and stays there until the gradients of the pass are all reduced."""
    FLEETING = "fleeting"
    """It is what arrives on the parameter, and may lie in a bucket already, which is reduced maybe at once."""
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


def list_shares(
    names: Sequence[str], parameters: Sequence[Tensor], wrappers: Wrappers, replicas: Replicas
) -> list[Share]:
    """Return what this rank has of each parameter's gradient."""
    around = _Around(wrappers, _as_function(replicas))
    shares = list(map(around.share, names, parameters))
    return [WHOLE._replace(local=share.local) for share in shares] if dist.get_world_size() == 1 else shares


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
    """Know what is around each parameter of a model."""

    def __init__(self, wrappers: Wrappers, replicas: Callable[[str, Tensor], Any]) -> None:
        self._replicas = replicas
        self._shares: dict[int, Share] = {}
        for stage in wrappers.stages:
            if stage.group_size == dist.get_world_size():  # no rank is left that could hold the same stage
                self._shares |= dict.fromkeys(map(id, parameters_in(stage)), Share("shard", True))
        for ddp in wrappers.ddp:
            self._take_in_ddp(ddp)
        for fsdp in sorted(wrappers.fsdp1, key=lambda each: -len(parameters_in(each))):  # inner ones later
            self._shares |= dict.fromkeys(map(id, parameters_in(fsdp)), _of_fsdp1(fsdp))
        whole = Share("shard", True, Local.UNSHARDED)
        self._shares |= {
            id(each): whole for fsdp in wrappers.fsdp2 for each in parameters_in(fsdp) if _is_dtensor(each)
        }

    def share(self, name: str, parameter: Any) -> Share:
        """Return what this rank has of one parameter's gradient."""
        known = self._shares.get(id(parameter))
        if _is_dtensor(parameter):
            known = known or Share("shard", True)
            return known.seen_in(parameter if parameter.grad is None else parameter.grad)
        if known is None and (given := self._replicas(name, parameter)) is not None:
            return Share("replica", dist.get_rank(given) == 0)
        return known or Share("local", None)

    def _take_in_ddp(self, ddp: Any) -> None:
        first = dist.get_rank(ddp.process_group) == 0
        in_place = ddp.gradient_as_bucket_view or ddp.mixed_precision is not None
        local = Local.FLEETING if in_place else Local.ARRIVING
        delayed = set(map(id, getattr(ddp, "_delay_all_reduce_params", ())))
        for name, parameter in ddp.module.named_parameters():
            if id(parameter) in delayed:
                self._shares[id(parameter)] = Share("replica", first, Local.FLEETING, first)
            elif name in ddp.parameters_to_ignore:
                self._shares.setdefault(id(parameter), Share("shard", True))
            else:
                scope = "shard" if _is_dtensor(parameter) else "replica"
                self._shares[id(parameter)] = Share(scope, first, local, first)


def _of_fsdp1(fsdp: Any) -> Share:
    strategy = fsdp.sharding_strategy.name
    if strategy == "NO_SHARD":
        return Share("replica", dist.get_rank(fsdp.process_group) == 0, Local.UNSEEN)
    hybrid = "HYBRID" in strategy
    return Share("shard", not hybrid or dist.get_rank(fsdp._inter_node_pg) == 0, Local.UNSEEN)


def _is_dtensor(parameter: Any) -> bool:
    return is_one(parameter, DTENSOR)


def check_replicas(replicas: Replicas) -> Replicas:
    """Return it; raise ValueError when it is neither a process group nor a function."""
    if replicas is None or callable(replicas) or (dist.is_available() and isinstance(replicas, dist.ProcessGroup)):
        return replicas
    raise ValueError(f"replicas: expected a process group or a function, got {type(replicas).__name__}")


def _as_function(replicas: Replicas) -> Callable[[str, Tensor], Any]:
    return replicas if callable(replicas) else lambda name, parameter: replicas
