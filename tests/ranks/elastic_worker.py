"""A rank that torchrun starts again: in its first life rank 1 dies of a bad check, in its second it makes another.

FOLDER is where ranks leave what they know; ranks wait for each other's files there, and for nothing else.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from esper_telemetry import watch

FIRST, SECOND = 7, 2
BAD_CHECK = 2


def join():
    """Join the run; where the launcher keeps one store for all attempts, under a prefix for each."""
    rank, size, attempt = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"))
    given = {}
    if os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True":
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        given = {"store": dist.PrefixStore(f"attempt_{attempt}", store), "rank": rank, "world_size": size}
    dist.init_process_group("gloo", **given)
    return rank, [dist.new_group([each]) for each in range(size)][rank]


def wait_for(condition):
    """Wait until the launcher or the test gives up."""
    while not condition():
        time.sleep(0.05)


def live(folder):
    """Live one life."""
    rank, alone = join()
    life = len(list(folder.glob(f"{rank}-*.json")))
    model = nn.Linear(8, 8)
    bad = (FIRST, SECOND)[life] if rank == 1 else 0

    def before_check(number):
        model.weight.grad.view(-1)[: bad if number == BAD_CHECK else 0] = float("nan")

    monitor = watch(model, before_check=before_check, replicas=lambda name, parameter: alone)
    run = monitor.snapshot.run
    (folder / f"{rank}-{life}.json").write_text(json.dumps({"run_id": run.run_id, "attempt": run.attempt}))
    for _ in range(BAD_CHECK):
        model(torch.ones(1, 8)).sum().backward()
        model.zero_grad()
    counted = folder / f"counted-{life}.json"
    if rank == 0:
        wait_for(lambda: monitor.snapshot.ranks is not None and monitor.snapshot.ranks.bad)
        ranks = monitor.snapshot.ranks
        known = {"reporting": ranks.reporting, "nan": ranks.recent.read(time.monotonic()).nan_max}
        known["bad"] = [(each.rank, each.nan_count, each.check) for each in ranks.bad]
        partial = folder / "partial"
        partial.write_text(json.dumps(known))
        partial.rename(counted)
    wait_for(counted.exists)
    if life == 0:
        wait_for(lambda: rank == 1)  # the others are ended by their launcher
        os._exit(1)


if __name__ == "__main__":
    live(Path(sys.argv[1]))
