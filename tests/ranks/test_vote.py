"""What is done about critical gradients is done by all ranks or by none, and where they cannot agree they all stop."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from esper_telemetry import GradientsCritical, VoteFailed, watch
from esper_telemetry.monitor.steps import check_can_vote
from esper_telemetry.ranks import vote
from tests.ranks.models import batch, faulty_mlp
from tests.ranks.processes import run_ranks

BOUND = 4.0


def ddp(inner, faulty):
    return DistributedDataParallel(inner)


def fsdp2(inner, faulty):
    fully_shard(faulty)
    return fully_shard(inner)


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def train(rank, wrap, on_critical, count=7, make=torch.optim.Adam, patience=1, closure=False, steps=5):
    """Train with bad elements on rank 1 in step 2; return what became of it."""
    inner, faulty = faulty_mlp()
    model = wrap(inner, faulty)
    optimizer = make(inner.parameters(), lr=0.01)
    monitor = watch(model, optimizer=optimizer, on_critical=on_critical, patience=patience)
    halted = None
    for step in range(steps):
        faulty.bad = count if rank == 1 and step == 2 else 0

        def evaluate():
            optimizer.zero_grad()
            loss = model(batch(rank)).sum()
            loss.backward()
            return loss

        try:
            if closure:
                optimizer.step(evaluate)
            else:
                evaluate()
                optimizer.step()
        except GradientsCritical as critical:
            halted = step, str(critical)
            break
    clean = all(bool(local(each).isfinite().all()) for each in inner.parameters())
    counted = {int(each["step"]) for each in optimizer.state.values() if "step" in each}
    skipped = monitor.snapshot.skipped_updates["intervention"]
    weights = sum(
        float((each.full_tensor() if hasattr(each, "full_tensor") else each).sum()) for each in inner.parameters()
    )
    monitor.close()
    return {"halted": halted, "clean": clean, "counted": counted, "skipped": skipped, "weights": weights}


def sharded_optimizer(parameters, lr):
    return ZeroRedundancyOptimizer(parameters, torch.optim.Adam, lr=lr)


class Choice:
    """A callable policy that only one rank means."""

    def __init__(self, rank, wish):
        self.asked = 0
        self.wish = wish if rank == 1 else None

    def __call__(self, snapshot):
        self.asked += 1
        if isinstance(self.wish, Exception):
            raise self.wish
        return self.wish


def every_policy(rank):
    skip, halt, broken = Choice(rank, "skip"), Choice(rank, "halt"), Choice(rank, KeyError("mine"))
    found = {
        "DDP skip": train(rank, ddp, "skip"),
        "DDP halt": train(rank, ddp, "halt"),
        "DDP callable skip": train(rank, ddp, skip),
        "DDP callable halt": train(rank, ddp, halt),
        "DDP closure": train(rank, ddp, "skip", closure=True),
        "DDP sharded optimizer": train(rank, ddp, "skip", make=sharded_optimizer),
        "DDP warning": train(rank, ddp, "skip", count=3, steps=2),
        "FSDP2 skip": train(rank, fsdp2, "skip", count=150),
        "FSDP2 halt": train(rank, fsdp2, "halt", count=150),
        "asked": (skip.asked, halt.asked),
    }
    try:
        found["broken"] = train(rank, ddp, broken)["halted"][0]
    except KeyError:
        found["broken"] = "KeyError"
    return found


def split(rank):
    """Put bad elements on the border of two shards, so that no rank by itself has more than 5."""
    inner, faulty = faulty_mlp()
    model = fsdp2(inner, faulty)
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.01)
    monitor = watch(model, optimizer=optimizer, on_critical="skip")
    faulty.bad = 0
    model(batch(rank)).sum().backward()
    optimizer.step()
    model.zero_grad()
    if rank == 1:
        faulty.bad, faulty.before = 7, 124  # 16 x 16 in two shards of 128
    model(batch(rank)).sum().backward()
    counts = monitor.snapshot.nan_grad_count
    optimizer.step()
    return counts, monitor.snapshot.skipped_updates["intervention"]


class TestAllOrNone:
    def test_every_policy_under_ddp_and_fsdp2(self):
        one, two = run_ranks(every_policy)
        for name in ("DDP skip", "DDP callable skip", "DDP closure", "DDP sharded optimizer", "FSDP2 skip"):
            for found in (one[name], two[name]):
                assert found["halted"] is None, name
                assert found["clean"], name
                assert found["skipped"] == 1, name
                assert found["counted"] <= {4}, (name, found)
            assert one[name]["weights"] == two[name]["weights"], name
        for name in ("DDP halt", "DDP callable halt", "FSDP2 halt"):
            for found in (one[name], two[name]):
                assert found["halted"][0] == 2, name
                assert "over all ranks" in found["halted"][1]
                assert found["clean"], name
            assert one[name]["weights"] == two[name]["weights"], name
        assert one["DDP warning"]["skipped"] == two["DDP warning"]["skipped"] == 0
        assert one["asked"] == two["asked"] == (1, 1)
        assert (one["broken"], two["broken"]) == (2, "KeyError")

    def test_seven_that_are_split_four_and_three_are_critical(self):
        ranks = run_ranks(split)
        assert sorted(counts for counts, _ in ranks) == [3, 4]
        assert [skipped for _, skipped in ranks] == [1, 1]


def faulty_rank(rank, fault):
    """Train until rank 1 does something else than the others; say how it ended, and after how long."""
    vote.SECONDS = BOUND
    inner, _ = faulty_mlp()
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.01)
    monitor = watch(inner, optimizer=optimizer, on_critical="skip")

    def step():
        optimizer.zero_grad()
        inner(batch(rank)).sum().backward()
        optimizer.step()

    before = None
    started = time.monotonic()
    try:
        for number in range(4):
            started, before = time.monotonic(), [each.detach().clone() for each in inner.parameters()]
            if rank == 1 and number == 2:
                if fault == "dies":
                    os._exit(1)
                if fault == "stalls":
                    time.sleep(2 * BOUND)
                if fault == "misses one":
                    optimizer.zero_grad()
                    inner(batch(rank)).sum().backward()
                    continue
                if fault == "makes one more":
                    step()
            step()
    except VoteFailed as error:
        same = all(torch.equal(each, held) for each, held in zip(inner.parameters(), before, strict=True))
        return str(error), number, time.monotonic() - started, same
    finally:
        monitor.close()
    return None


def alone_in_its_policy(rank):
    vote.SECONDS = BOUND
    inner, _ = faulty_mlp()
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.01)
    if rank == 1:
        time.sleep(2 * BOUND)
        return None
    with pytest.raises(VoteFailed, match="every rank"):
        watch(inner, optimizer=optimizer, on_critical="skip")
    return "raised"


def groups_under_continue(rank):
    inner, _ = faulty_mlp()
    model = DistributedDataParallel(inner)
    made = []
    dist.new_group = lambda *_, **__: made.append(1)
    monitor = watch(model)
    model(batch(rank)).sum().backward()
    return made, monitor.snapshot.checks


def refused(rank):
    inner, _ = faulty_mlp()
    said = []
    for make in (lambda each: torch.optim.LBFGS(each),):
        with pytest.raises(ValueError, match="cannot vote") as error:
            watch(inner, optimizer=make(inner.parameters()), on_critical="halt")
        said.append(str(error.value))
    return said


class TestFaults:
    @pytest.mark.parametrize(
        ("fault", "left"), [("dies", [0]), ("stalls", [0, 1]), ("misses one", [0, 1]), ("makes one more", [1])]
    )
    def test_every_rank_that_is_left_stops_before_the_step(self, fault, left):
        """Who makes a step more than the others waits for them when they have gone, and never takes it."""
        ranks = run_ranks(faulty_rank, 2, fault, may_die=(1,))
        for rank in left:
            ended = ranks[rank]
            assert ended is not None, f"rank {rank} went on"
            said, _, seconds, same = ended
            assert same, "the step was not taken"
            assert "rank" in said
            assert seconds < 10 * BOUND

    def test_a_rank_whose_policy_no_other_shares_is_refused_at_set_up(self):
        assert run_ranks(alone_in_its_policy)[0] == "raised"

    def test_no_group_is_made_under_continue(self):
        assert run_ranks(groups_under_continue) == [([], 1)] * 2

    def test_what_cannot_be_voted_on_is_refused_at_set_up(self):
        assert all(all("LBFGS" in each for each in said) for said in run_ranks(refused))


def test_a_model_that_deepspeed_steps_is_refused_before_anything_is_made():
    engine = type("DeepSpeedEngine", (nn.Module,), {"__module__": "deepspeed.runtime.engine"})()
    with pytest.raises(ValueError, match="DeepSpeed"):
        check_can_vote([], [engine])
