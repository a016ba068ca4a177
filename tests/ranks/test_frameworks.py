"""Lightning, Transformers and Accelerate on two ranks: one line each, and the same truth."""

from __future__ import annotations

import math
import os

import torch

from tests.ranks.processes import run_ranks

BAD_AT, COUNT = 3, 7


def as_torchrun(rank):
    """Set what torchrun sets for each rank."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0"}


def summary(seen, monitor, exporter):
    """Return what the test compares."""
    run = monitor.snapshot.run
    worst = max(seen, key=lambda each: each.nan_grad_count)
    return {
        "rank": (run.rank, run.world_size, run.local_rank),
        "run_id": run.run_id,
        "nan": worst.nan_grad_count,
        "local": worst.local_nan_count,
        "owned": worst.owned_nan_count,
        "scope": worst.scope.scope,
        "bad": [number for number, each in enumerate(seen, 1) if each.nan_grad_count],
        "port": int(exporter.url.rstrip("/").split(":")[-1].split("/")[0]),
        "errors": monitor.snapshot.monitor_errors,
    }


def lightning(rank, port):
    from lightning.pytorch import Trainer

    from esper_telemetry.integrations.lightning import EsperCallback
    from tests.test_integrations_lightning import Model

    seen = []

    class Seeing(EsperCallback):
        def on_train_start(self, *arguments):
            super().on_train_start(*arguments)
            self.monitor.on_check(seen.append)

    callback = Seeing(address=f"127.0.0.1:{port}")
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_steps=5, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[callback],
    )  # fmt: skip
    model = Model(bad_at=BAD_AT if rank == 1 else 0, value=math.nan, elements=COUNT, optimizer=_Still)
    trainer.fit(model, torch.utils.data.DataLoader(torch.randn(64, 4), batch_size=4))
    return summary(seen, callback.monitor, callback.exporter)


class _Still(torch.optim.SGD):
    """Take no step, so that the weights stay finite."""

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            return None if closure is None else closure()


def transformers(rank, port):
    import tempfile

    from transformers import Trainer, TrainerCallback, TrainingArguments

    from esper_telemetry.integrations.transformers import EsperCallback
    from tests.test_integrations_transformers import Model, Rows

    seen = []
    callback = EsperCallback(address=f"127.0.0.1:{port}")

    class Seeing(TrainerCallback):
        def on_train_begin(self, *_, **__):
            callback.monitor.on_check(seen.append)

    options = {"use_cpu": True, "max_steps": 5, "per_device_train_batch_size": 4, "report_to": [], "disable_tqdm": True}
    arguments = TrainingArguments(tempfile.mkdtemp(), save_strategy="no", remove_unused_columns=False, **options)
    model = Model(bad_at=BAD_AT if rank == 1 else 0, value=math.nan, elements=COUNT)
    optimizers = (_Still(model.parameters(), lr=0.1), None)
    Trainer(model, arguments, train_dataset=Rows(), callbacks=[callback, Seeing()], optimizers=optimizers).train()
    return summary(seen, callback.monitor, callback.exporter)


def accelerate(rank, port):
    from accelerate import Accelerator

    from esper_telemetry.integrations.accelerate import EsperWatch
    from tests.test_integrations_transformers import Model

    accelerator = Accelerator(cpu=True)
    model = Model(bad_at=BAD_AT if rank == 1 else 0, value=math.nan, elements=COUNT)
    prepared, optimizer = accelerator.prepare(model, _Still(model.parameters(), lr=0.1))
    seen = []
    with EsperWatch(accelerator, prepared, optimizer, address=f"127.0.0.1:{port}") as watched:
        watched.monitor.on_check(seen.append)
        for _ in range(5):
            accelerator.backward(prepared(torch.randn(4, 4))["loss"])
            optimizer.step()
            optimizer.zero_grad()
        return summary(seen, watched.monitor, watched.exporter)


def every_framework(rank, port):
    as_torchrun(rank)
    return {way.__name__: way(rank, port) for way in (accelerate, transformers, lightning)}


def test_each_framework_names_the_rank_and_counts_what_its_optimizer_sees():
    ranks = run_ranks(every_framework, 2, 23451, join=False)
    assert len({found["run_id"] for each in ranks for found in each.values()}) == 1, "one name, made by the job's store"
    for name in ranks[0]:
        for rank, found in enumerate(each[name] for each in ranks):
            assert found["rank"] == (rank, 2, rank), name
            assert (found["nan"], found["bad"], found["errors"]) == (COUNT, [BAD_AT], 0), (name, found)
            assert found["local"] == (COUNT if rank == 1 else 0), (name, found)
            assert found["owned"] == (COUNT if rank == 0 else 0), (name, found)
            assert found["scope"] == "replica", (name, found)
        assert ranks[0][name]["port"] != ranks[1][name]["port"], name
