"""DistributedDataParallel: what the optimizer sees is the same on all ranks, and the rank at fault is known."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from esper_telemetry import GradientMonitor, watch
from tests.ranks.models import batch, faulty_mlp, seen, true_counts
from tests.ranks.processes import join_group, run_ranks

BAD_RANK = 1
LAYER = "2.weight"


def train(rank, make, bad_in=(1, 3), steps=4, value=float("nan"), count=7):
    """Train, with bad elements on one rank in some steps; return what was seen and the truth of each step."""
    inner, faulty = faulty_mlp()
    model, monitor = make(inner)
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.0)
    found = []
    for step in range(steps):
        faulty.bad, faulty.value = (count if rank == BAD_RANK and step in bad_in else 0), value
        optimizer.zero_grad(set_to_none=step < 2)
        model(batch(rank)).sum().backward()
        found.append((seen(monitor), true_counts(inner)))
        if not any(found[-1][1]):
            optimizer.step()
    return found


def wrapped(**options):
    def make(inner):
        model = DistributedDataParallel(inner, **options)
        return model, watch(model)

    return make


def hooked(register):
    def make(inner):
        model = DistributedDataParallel(inner)
        register(model)
        return model, watch(model)

    return make


def _bf16(state, bucket):
    return default_hooks.bf16_compress_hook(None, bucket)


def _at_once(state, bucket):
    dist.all_reduce(bucket.buffer())
    reduced = torch.futures.Future()
    reduced.set_result(bucket.buffer().div_(dist.get_world_size()))
    return reduced


def in_place_at_once(inner):
    model = DistributedDataParallel(inner, gradient_as_bucket_view=True, bucket_cap_mb=0.0001)
    model.register_comm_hook(None, _at_once)
    return model, watch(model)


def inner_before(inner):
    monitor = watch(inner)
    return DistributedDataParallel(inner), monitor


def inner_after(inner):
    model = DistributedDataParallel(inner)
    return model, watch(inner)


class Checkpointed(nn.Module):
    """Make the last gradients in a pass within the pass, and let DDP finish there."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, given):
        return self.inner[2:](checkpoint(self.inner[:2], given.requires_grad_(), use_reentrant=True))


def checkpointed(inner):
    return DistributedDataParallel(Checkpointed(inner)), watch(inner)


def delayed(inner):
    """Let DDP reduce the middle layer by itself, when the gradient of the first layer's bias arrives."""
    options = {
        "delay_all_reduce_named_params": [(name, each) for name, each in inner.named_parameters() if name[0] == "2"],
        "param_to_hook_all_reduce": inner[0].bias,
    }
    return DistributedDataParallel(inner, **options), watch(inner)


VARIANTS = {
    "plain": wrapped(),
    "bucket view": wrapped(gradient_as_bucket_view=True),
    "bucket view, reduced at once": in_place_at_once,
    "static graph": wrapped(static_graph=True),
    "static graph, bucket view": wrapped(static_graph=True, gradient_as_bucket_view=True),
    "unused parameters": wrapped(find_unused_parameters=True),
    "fp16": hooked(lambda model: model.register_comm_hook(None, default_hooks.fp16_compress_hook)),
    "bf16": hooked(lambda model: model.register_comm_hook(None, _bf16)),
    "small buckets": wrapped(bucket_cap_mb=0.0001),
    "reentrant checkpoint": checkpointed,
    "delayed": delayed,
    "the inner model, watched before": inner_before,
    "the inner model, watched after": inner_after,
}


def every_variant(rank):
    return {name: train(rank, make) for name, make in VARIANTS.items()}


class TestDistributedDataParallel:
    def test_all_ranks_see_what_their_optimizers_will_and_one_is_at_fault(self):
        good, bad = run_ranks(every_variant)
        for name in VARIANTS:
            for step in range(4):
                expected = 7 if step in (1, 3) else 0
                for rank, (found, real) in enumerate((good[name][step], bad[name][step])):
                    where = f"{name}, step {step}, rank {rank}: {found}"
                    assert real == (expected, 0), where
                    assert (found["nan"], found["checks"]) == (expected, step + 1), where
                    assert found["owned"] == (expected if rank == 0 else 0), where
                    assert found["local"] == (expected if rank == BAD_RANK else 0), where
                    assert found["layer"] == (LAYER if rank == BAD_RANK and step else None), where
                    assert found["scope"] == ("replica", True, "backward"), where
                    assert not found["unmeasured"], where
                    assert not found["errors"], where

    def test_what_a_comm_hook_makes_is_seen_and_no_rank_is_at_fault(self):
        for rank, (fp16, power) in enumerate(run_ranks(hooks_that_make_trouble)):
            assert all(found["inf"] == real[1] > 5 and found["local_inf"] == 0 for found, real in fp16), rank
            found, real = power
            assert found["nan"] == real[0] > 7, "PowerSGD makes more of them"
            assert found["local"] == (7 if rank == BAD_RANK else 0)


def overflowing(rank):
    """Let fp16 compression make Infs of gradients that are finite on both ranks."""
    inner, _ = faulty_mlp()
    model, monitor = VARIANTS["fp16"](inner)
    found = []
    for _ in range(2):
        inner.zero_grad()
        (model(batch(rank)).sum() * 1e6).backward()
        found.append((seen(monitor), true_counts(inner)))
    return found


def through_power_sgd(rank):
    inner, faulty = faulty_mlp()
    model = DistributedDataParallel(inner)
    state = powerSGD_hook.PowerSGDState(None, start_powerSGD_iter=2, min_compression_rate=0.1)
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    monitor = watch(model)
    for step in range(4):
        faulty.bad = 7 if rank == BAD_RANK and step == 3 else 0
        inner.zero_grad()
        model(batch(rank)).sum().backward()
    return seen(monitor), true_counts(inner)


def hooks_that_make_trouble(rank):
    return overflowing(rank), through_power_sgd(rank)


def accumulating(rank):
    """Make a bad gradient in a pass that is not reduced, and look when it was."""
    inner, faulty = faulty_mlp()
    model = DistributedDataParallel(inner)
    monitor = watch(model)
    found = []
    for step in range(3):
        inner.zero_grad()
        faulty.bad = 7 if rank == BAD_RANK and step == 1 else 0
        with model.no_sync():
            model(batch(rank)).sum().backward()
        faulty.bad = 0
        model(batch(rank)).sum().backward()
        found.append((seen(monitor), true_counts(inner)))
    return found


def by_hand(rank):
    inner, faulty = faulty_mlp()
    model = DistributedDataParallel(inner)
    monitor = GradientMonitor(model)
    found = []
    for step in range(3):
        inner.zero_grad()
        faulty.bad = 7 if rank == BAD_RANK and step == 1 else 0
        model(batch(rank)).sum().backward()
        monitor.update()
        found.append((seen(monitor), true_counts(inner)))
    return found


def without_attribution(rank):
    def make(inner):
        model = DistributedDataParallel(inner)
        return model, watch(model, attribution=False)

    return train(rank, make, bad_in=(1,), steps=3)


def with_sharded_optimizer(rank):
    inner, faulty = faulty_mlp()
    model = DistributedDataParallel(inner)
    optimizer = ZeroRedundancyOptimizer(inner.parameters(), torch.optim.Adam, lr=0.1)
    monitor = watch(model, optimizer=optimizer)
    found = []
    for step in range(3):
        faulty.bad = 7 if rank == BAD_RANK and step == 2 else 0
        optimizer.zero_grad()
        model(batch(rank)).sum().backward()
        found.append((seen(monitor), true_counts(inner)))
        optimizer.step()
    return found


def other_ways(rank):
    return [way(rank) for way in (accumulating, by_hand, without_attribution, with_sharded_optimizer)]


def joining_late(rank, size):
    """Watch first, and join the group then."""
    inner, faulty = faulty_mlp()
    monitor = watch(inner)
    before = monitor.snapshot.run
    join_group(rank, size)
    model = DistributedDataParallel(inner)
    faulty.bad = 7 if rank == BAD_RANK else 0
    model(batch(rank)).sum().backward()
    return before, monitor.snapshot.run, seen(monitor)


class TestOtherWays:
    def test_accumulation_update_by_hand_and_a_sharded_optimizer(self):
        ranks = run_ranks(other_ways)
        for rank, (accumulated, updated, unattributed, sharded) in enumerate(ranks):
            for way, bad_step in ((accumulated, 1), (updated, 1), (sharded, 2)):
                for step, (found, real) in enumerate(way):
                    expected = 7 if step == bad_step else 0
                    assert found["nan"] == real[0] == expected, (rank, step, found)
                    assert found["local"] == (expected if rank == BAD_RANK else 0), (rank, step, found)
                    assert found["scope"][:2] == ("replica", True)
            assert [found["nan"] for found, _ in unattributed] == [0, 7, 0]
            assert [found["local"] for found, _ in unattributed] == [None] * 3
            assert updated[0][0]["scope"][2] == "update"

    def test_a_group_that_is_joined_after_watch(self):
        ranks = run_ranks(joining_late, 2, 2, join=False)
        for rank, (before, after, found) in enumerate(ranks):
            assert (before.rank, before.world_size) == (0, 1)
            assert (after.rank, after.world_size) == (rank, 2)
            assert (found["nan"], found["local"]) == (7, 7 if rank == BAD_RANK else 0)
        assert ranks[0][1].run_id == ranks[1][1].run_id
