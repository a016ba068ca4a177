"""Pipelines and FSDP1: one check for each step, whatever the hooks of parameters do not see."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from esper_telemetry import watch
from tests.ranks.models import FaultyLinear, batch, faulty_mlp, seen
from tests.ranks.processes import run_ranks

SCHEDULES = {
    "GPipe": (ScheduleGPipe, [0], [1]),
    "1F1B": (Schedule1F1B, [0], [1]),
    "interleaved": (ScheduleInterleaved1F1B, [0, 2], [1, 3]),
    "interleaved, zero bubble": (ScheduleInterleavedZeroBubble, [0, 2], [1, 3]),
    "ZBV": (ScheduleZBVZeroBubble, [0, 3], [1, 2]),
}


def pipeline(rank, name):
    """Train a pipeline of two ranks; the first stage of rank 1 makes 7 NaN in step 1."""
    make, *placed = SCHEDULES[name]
    own, count = placed[rank], sum(map(len, placed))
    torch.manual_seed(0)
    blocks = [nn.Sequential(FaultyLinear(8, 8), nn.ReLU()) for _ in range(count)]
    stages = [PipelineStage(blocks[index], index, count, torch.device("cpu")) for index in own]
    monitor = watch({f"stage{index}": blocks[index] for index in own})
    parameters = [each for index in own for each in blocks[index].parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    schedule = make(stages if len(own) > 1 else stages[0], 4, loss_fn=nn.functional.mse_loss)
    given, wanted, found = torch.randn(8, 8), torch.randn(8, 8), []
    for step in range(3):
        blocks[own[0]][0].bad = 7 if rank == 1 and step == 1 else 0
        optimizer.zero_grad()
        inputs = (given,) if 0 in own else ()
        targets = {"target": wanted} if count - 1 in own else {}
        schedule.step(*inputs, **targets)
        real = sum(int(each.grad.isnan().sum()) for each in parameters)
        held = [each.detach().clone() for each in parameters]
        optimizer.step()
        found.append((seen(monitor), real))
        with torch.no_grad():
            for each, before in zip(parameters, held, strict=True):
                each.copy_(before)
    monitor.close()
    return found


def every_schedule(rank):
    return {name: pipeline(rank, name) for name in SCHEDULES}


FSDP1 = {
    "full shard": {"sharding_strategy": ShardingStrategy.FULL_SHARD, "use_orig_params": True},
    "full shard, flat": {"sharding_strategy": ShardingStrategy.FULL_SHARD, "use_orig_params": False},
    "shard of gradients": {"sharding_strategy": ShardingStrategy.SHARD_GRAD_OP, "use_orig_params": True},
    "no shard": {"sharding_strategy": ShardingStrategy.NO_SHARD, "use_orig_params": True},
}


def fsdp1(rank, **options):
    """Train under FSDP1, with 7 NaN made by rank 1 in two steps."""
    model, faulty = faulty_mlp()
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)
    monitor = watch(wrapped)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.01)
    found = []
    for step in range(4):
        faulty.bad = 7 if rank == 1 and step in (1, 3) else 0
        optimizer.zero_grad()
        wrapped(batch(rank)).sum().backward()
        gradients = [each.grad for each in wrapped.parameters() if each.grad is not None]
        found.append((seen(monitor), sum(int(each.isnan().sum()) for each in gradients)))
        if step not in (1, 3):
            optimizer.step()
    found.append((seen(monitor), None))
    monitor.close()
    return found


def every_fsdp1(rank):
    return {name: fsdp1(rank, **options) for name, options in FSDP1.items()}


def hybrid_fsdp1(rank):
    """Train on two copies of two shards."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
    strategies = ShardingStrategy.HYBRID_SHARD, ShardingStrategy._HYBRID_SHARD_ZERO2
    return {each.name: fsdp1(rank, sharding_strategy=each, device_mesh=mesh) for each in strategies}


class TestPipelines:
    def test_one_check_a_step_before_the_optimizer(self):
        ranks = run_ranks(every_schedule)
        for name in SCHEDULES:
            for rank, found in enumerate(each[name] for each in ranks):
                for step, (snapshot, real) in enumerate(found):
                    where = f"{name}, rank {rank}, step {step}: {snapshot}"
                    assert snapshot["checks"] == step + 1, where
                    assert snapshot["nan"] == snapshot["owned"] == real, where
                    assert snapshot["scope"] == ("shard", True, "step"), where
                    assert not snapshot["errors"], where
                assert found[1][1] >= (7 if rank == 1 else 0), "the fault was made"
                assert found[1][0]["local"] == found[1][1]


class TestFsdp1:
    def test_one_check_a_pass_of_what_the_optimizer_sees(self):
        ranks = run_ranks(every_fsdp1)
        for name in FSDP1:
            for step in range(4):
                snapshots = [each[name][step][0] for each in ranks]
                for rank, (snapshot, real) in enumerate(each[name][step] for each in ranks):
                    where = f"{name}, rank {rank}, step {step}: {snapshot}"
                    assert (snapshot["checks"], snapshot["nan"]) == (step + 1, real), where
                    assert snapshot["local"] is None, where
                    assert snapshot["scope"] == ("replica" if name == "no shard" else "shard", True, "backward"), where
                    assert not snapshot["errors"], where
                    assert not snapshot["unmeasured"], where
                owned = sum(each["owned"] for each in snapshots)
                assert owned == (7 if step in (1, 3) else 0), (name, step)
            assert ranks[0][name][4][0]["checks"] == 4, "no late checks"

    def test_two_copies_of_two_shards_count_each_element_once(self):
        ranks = run_ranks(hybrid_fsdp1, 4)
        for name in ranks[0]:
            for step in range(4):
                snapshots, real = zip(*(each[name][step] for each in ranks), strict=True)
                where = f"{name}, step {step}: {snapshots}"
                bad = 7 if step in (1, 3) else 0
                assert [each["nan"] for each in snapshots] == list(real), where
                assert sum(real) == 2 * bad, "both copies have them"
                assert sum(each["owned"] for each in snapshots) == bad, where
                assert all(each["checks"] == step + 1 for each in snapshots), where
                assert all(each["scope"] == ("shard", True, "backward") for each in snapshots), where
                assert not any(each["errors"] or each["unmeasured"] for each in snapshots), where
