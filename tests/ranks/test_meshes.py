"""Sharded parameters: what ranks own adds up to the whole gradient, and the rank at fault is known."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from esper_telemetry import watch
from tests.ranks.models import batch, faulty_mlp, seen, true_counts
from tests.ranks.processes import run_ranks

LAYER = "2.weight"


def train(rank, model, faulty, bad_rank, given=None, bad_in=(1, 3), steps=4):
    """Train with 7 NaN on one rank in some steps; return what was seen and the truth of each step."""
    monitor = watch(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for step in range(steps):
        faulty.bad = 7 if rank == bad_rank and step in bad_in else 0
        optimizer.zero_grad()
        model(batch(rank) if given is None else given).sum().backward()
        found.append((seen(monitor), true_counts(model)))
        if not any(found[-1][1]):
            optimizer.step()
    monitor.close()
    return found


def sharded(rank, mesh=None, block=True, **options):
    model, faulty = faulty_mlp()
    if block:
        fully_shard(faulty, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options), faulty


def fsdp2(rank):
    return train(rank, *sharded(rank), bad_rank=1)


def fsdp2_one_group(rank):
    return train(rank, *sharded(rank, block=False), bad_rank=1)


def fsdp2_mixed_precision(rank):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return train(rank, *sharded(rank, mp_policy=policy), bad_rank=1)


def fsdp2_kept_whole(rank):
    return train(rank, *sharded(rank, reshard_after_forward=False), bad_rank=1)


def fsdp2_offloaded(rank):
    return train(rank, *sharded(rank, offload_policy=CPUOffloadPolicy(pin_memory=False)), bad_rank=1)


class Checkpointed(torch.nn.Module):
    def __init__(self, inner, reentrant):
        super().__init__()
        self.inner = inner
        self.reentrant = reentrant

    def forward(self, given):
        return checkpoint(self.inner, given.requires_grad_(), use_reentrant=self.reentrant)


def fsdp2_checkpointed(rank, reentrant):
    model, faulty = faulty_mlp()
    model[2] = Checkpointed(fully_shard(faulty), reentrant)
    return train(rank, fully_shard(model), faulty, bad_rank=1)


def fsdp2_without_sync(rank):
    """Make bad gradients in a pass that is not reduced."""
    model, faulty = sharded(rank)
    monitor = watch(model)
    found = []
    for step in range(4):
        model.zero_grad()
        faulty.bad = 7 if rank == 1 and step in (1, 3) else 0
        model.set_requires_gradient_sync(False)
        model(batch(rank)).sum().backward()
        model.set_requires_gradient_sync(True)
        faulty.bad = 0
        model(batch(rank)).sum().backward()
        found.append((seen(monitor), true_counts(model)))
    return found


FSDP2 = {
    "FSDP2": fsdp2,
    "one group": fsdp2_one_group,
    "mixed precision": fsdp2_mixed_precision,
    "not resharded": fsdp2_kept_whole,
    "offloaded": fsdp2_offloaded,
    "checkpointed": lambda rank: fsdp2_checkpointed(rank, reentrant=False),
    "reentrant": lambda rank: fsdp2_checkpointed(rank, reentrant=True),
    "without sync": fsdp2_without_sync,
}


def tensor_parallel(rank):
    mesh = init_device_mesh("cpu", (2,))
    model, faulty = faulty_mlp()
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel(), "4": ColwiseParallel(output_layouts=Replicate())}
    return train(rank, parallelize_module(model, mesh, plan), faulty, bad_rank=1, given=batch(0))


def on_two_ranks(rank):
    return {name: make(rank) for name, make in FSDP2.items()} | {"TP": tensor_parallel(rank)}


def hsdp(rank):
    return train(
        rank, *sharded(rank, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))), bad_rank=3
    )


def fsdp2_and_tensor_parallel(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model, faulty = faulty_mlp()
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel(), "4": ColwiseParallel(output_layouts=Replicate())}
    model = parallelize_module(model, mesh["tp"], plan)
    fully_shard(model[2], mesh=mesh["dp"])
    return train(rank, fully_shard(model, mesh=mesh["dp"]), faulty, bad_rank=3, given=batch(rank // 2))


def on_four_ranks(rank):
    return {"HSDP": hsdp(rank), "FSDP2 + TP": fsdp2_and_tensor_parallel(rank)}


def check(ranks, bad_rank, layer=LAYER):
    """Hold what every rank saw in each step against the whole gradient."""
    for step in range(len(ranks[0])):
        found = [rank[step][0] for rank in ranks]
        nan, inf = ranks[0][step][1]
        assert (nan, inf) == ((7, 0) if step in (1, 3) else (0, 0)), step
        assert sum(each["owned"] for each in found) == nan, (step, found)
        assert sum(each["owned_inf"] for each in found) == inf
        assert [each["local"] for each in found] == [nan if rank == bad_rank else 0 for rank in range(len(ranks))], (
            step,
            found,
        )
        assert all(each["scope"][1:] == (True, "backward") for each in found), found
        assert not any(each["errors"] or each["unmeasured"] for each in found), found
        assert {each["checks"] for each in found} == {step + 1}
        if step:
            assert found[bad_rank]["layer"].endswith(layer), found


class TestTwoRanks:
    def test_fsdp2_and_tensor_parallel(self):
        ranks = run_ranks(on_two_ranks)
        for name in ranks[0]:
            check([rank[name] for rank in ranks], bad_rank=1, layer="weight")


class TestFourRanks:
    def test_hybrid_sharding_and_two_dimensions(self):
        ranks = run_ranks(on_four_ranks, 4)
        for name in ranks[0]:
            check([rank[name] for rank in ranks], bad_rank=3)


def sequence_parallel(rank):
    """Make 7 NaN in the gradient of a norm, of which each rank has a summand."""
    mesh = init_device_mesh("cpu", (2,))
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 4))
    plan = {
        "0": ColwiseParallel(output_layouts=Shard(0)),
        "1": SequenceParallel(sequence_dim=0),
        "2": ColwiseParallel(input_layouts=Shard(0), output_layouts=Replicate()),
    }
    monitor = watch(parallelize_module(model, mesh, plan))
    healthy = model(batch(0)).sum()
    healthy.backward()
    first = seen(monitor)
    norm = model[1].weight.grad.to_local() if rank == 1 else None
    if norm is not None:
        norm[:7] = float("nan")
    monitor.update()
    return first, seen(monitor)


def plain_parameters(rank):
    """Train without a wrapper: who has the same parameters is not known, unless it is said."""
    found = []
    for replicas in (None, dist.group.WORLD, lambda name, parameter: dist.group.WORLD if "2" in name else None):
        model, faulty = faulty_mlp()
        faulty.bad = 7
        monitor = watch(model, replicas=replicas)
        model(batch(0)).sum().backward()
        found.append(seen(monitor))
        monitor.close()
    return found


def experts(rank):
    """Train experts that are a rank's own beside parameters that DDP keeps alike."""
    shared, expert = faulty_mlp()
    model = torch.nn.ModuleDict({"expert": expert, "shared": torch.nn.Linear(16, 16)})
    model.forward = lambda given: shared[4](model["expert"](model["shared"](shared[0](given))))
    model._ddp_params_and_buffers_to_ignore = {"expert.weight", "expert.bias"}
    wrapped = DistributedDataParallel(model)
    monitor = watch(wrapped)
    expert.bad = 7 if rank == 1 else 0
    wrapped(batch(rank)).sum().backward()
    return seen(monitor)


def without_wrappers(rank):
    return sequence_parallel(rank), plain_parameters(rank), experts(rank)


class TestWhatIsNotKnown:
    def test_partial_gradients_and_plain_parameters_say_that_they_do_not_add_up(self):
        ranks = run_ranks(without_wrappers)
        for rank, ((first, then), (silent, said, function), expert) in enumerate(ranks):
            assert not first["scope"][1], first
            assert (first["nan"], first["owned"]) == (0, 0)
            assert (then["nan"], then["owned"]) == ((7, None) if rank == 1 else (0, 0)), then
            assert (silent["nan"], silent["owned"], silent["scope"][:2]) == (7, None, ("local", False))
            assert (said["nan"], said["owned"]) == (7, 7 if rank == 0 else 0)
            assert said["scope"][:2] == ("replica", True)
            assert (function["owned"], function["scope"][:2]) == (7 if rank == 0 else 0, ("mixed", False))
            assert (expert["nan"], expert["owned"], expert["local"]) == ((7, 7, 7) if rank == 1 else (0, 0, 0)), expert
            assert expert["scope"][:2] == ("mixed", True)
