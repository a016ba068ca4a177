"""DeepSpeed on two ranks: what a rank's own backward made is exact, and the engine's own skips are counted."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from esper_telemetry import watch
from tests.ranks.models import batch, faulty_mlp, seen
from tests.ranks.processes import run_ranks

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: make test-engines")


def train(rank, stage):
    """Train with 7 NaN made by rank 1 in step 2; return what was seen after each step."""
    import deepspeed

    model, faulty = faulty_mlp()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": stage > 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
    monitor = watch(engine)
    found = []
    for step in range(4):
        faulty.bad = 7 if rank == 1 and step == 2 else 0
        given = batch(rank).to(next(engine.parameters()).dtype)
        engine.backward(engine(given).float().sum())
        snapshot = seen(monitor)
        engine.step()
        found.append((snapshot, engine.skipped_steps))
        if stage == 0 and step == 2:
            break  # it has no check of its own, and the weights are NaN now
    with pytest.raises(ValueError, match="DeepSpeed"):
        watch(engine, on_critical="halt")
    monitor.close()
    return found, monitor.snapshot.skipped_updates, monitor.snapshot.monitor_errors


def stages(rank):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    import deepspeed

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # it would be compiled first
    deepspeed.init_distributed("gloo")
    return {stage: train(rank, stage) for stage in (1, 2, 3, 0)}


def test_each_stage_of_zero():
    ranks = run_ranks(stages, 2, join=False, DS_ACCELERATOR="cpu")
    for stage in range(4):
        for rank, (found, skipped, errors) in enumerate(each[stage] for each in ranks):
            for step, (snapshot, _) in enumerate(found):
                where = f"stage {stage}, rank {rank}, step {step}: {snapshot}"
                assert snapshot["local"] == (7 if rank == 1 and step == 2 else 0), where
                assert snapshot["checks"] == step + 1, where
            assert found[0][0]["scope"][1] is False, "nobody knows here what adds up"
            assert skipped.get("engine") == found[-1][1], (stage, skipped)
            assert errors == 0
            if stage:
                assert found[-1][1] == 1, "DeepSpeed has skipped the step"
