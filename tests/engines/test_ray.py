"""Ray Train on two workers: the same two lines, the same truth, and one run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from esper_telemetry import start_exporter, watch
from tests.documents import ROOT, blocks
from tests.ranks.models import batch, faulty_mlp, seen

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing is reported to anybody
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # and all of it stays on loopback, on Linux too
pytest.importorskip("ray", reason="Ray is not installed: make test-engines")

BAD_RANK, BAD_STEP, COUNT = 1, 2, 1
SECONDS = 60


def train(config):
    """Train with a bad element made by one rank in one step; leave what was seen after each step in the folder."""
    import ray.train
    from ray.train.torch import prepare_model

    rank, folder = ray.train.get_context().get_world_rank(), Path(config["folder"])
    inner, faulty = faulty_mlp()
    model = prepare_model(inner)
    monitor = watch(model)
    exporter = start_exporter(monitor, linger=0)
    found = []
    for step in range(4):
        faulty.bad = COUNT if rank == BAD_RANK and step == BAD_STEP else 0
        inner.zero_grad()
        model(batch(rank)).sum().backward()
        found.append(seen(monitor))
    run = monitor.snapshot.run
    if rank == 0:
        wait_for(lambda: monitor.snapshot.ranks is not None and monitor.snapshot.ranks.bad)
        wait_for(lambda: all(place.address for place in monitor.snapshot.ranks.places))
    ranks = monitor.snapshot.ranks
    known = {
        "seen": found,
        "run": (run.run_id, run.rank, run.world_size, run.local_rank),
        "port": int(exporter.url.rpartition(":")[2]),
        "reporting": ranks and ranks.reporting,
        "bad": [(bad.rank, bad.nan_count, bad.layer, bad.check) for bad in ranks.bad] if ranks else [],
        "places": [place.address for place in ranks.places] if ranks else [],
    }
    (folder / f"{rank}.json").write_text(json.dumps(known))
    wait_for(lambda: len(list(folder.glob("?.json"))) == 2)  # rank 0 keeps the store
    exporter.close()


def wait_for(condition):
    """Wait until it holds; fail when that takes too long."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def cluster():
    """Run a cluster on this host, and return its address."""
    import ray

    context = ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "src")))}},
    )
    address = context.address_info["address"]
    assert address.startswith("127.0.0.1:")
    yield address
    ray.shutdown()


def fit(config, kept):
    """Train with two workers; Ray keeps its files in a folder."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        train,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path=str(kept)),
    )
    trainer.fit()


def test_two_workers_are_one_run_that_names_the_rank_and_its_layer(cluster, tmp_path):
    fit({"folder": str(tmp_path)}, tmp_path / "kept")
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for rank, known in enumerate(ranks):
        assert known["run"][1:] == [rank, 2, rank]
        for step, found in enumerate(known["seen"]):
            where = f"rank {rank}, step {step}: {found}"
            bad = COUNT if step == BAD_STEP else 0
            assert (found["nan"], found["checks"], found["errors"]) == (bad, step + 1, 0), where
            assert found["local"] == (bad if rank == BAD_RANK else 0), where
            assert found["owned"] == (bad if rank == 0 else 0), where
            assert found["scope"] == ["replica", True, "backward"], where
    assert len({known["run"][0] for known in ranks}) == 1, "one run"
    assert ranks[0]["bad"] == [[BAD_RANK, COUNT, "2.weight", BAD_STEP + 1]]
    assert ranks[0]["reporting"] == 2
    assert ranks[0]["places"] == [f"127.0.0.1:{known['port']}" for known in ranks]
    assert len({known["port"] for known in ranks}) == 2


def test_the_block_of_the_documentation(cluster):
    run = subprocess.run(
        [sys.executable, "-c", blocks("ranks.md")["Ray Train"]],
        env=os.environ | {"RAY_ADDRESS": cluster, "ESPER_LINGER_SECONDS": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
