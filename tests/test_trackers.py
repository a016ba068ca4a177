"""The blocks of docs/trackers.md, with the real trackers: what they wrote is read back."""

import json
import math

import lightning.pytorch
import pytest
import torch
import transformers
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from tests import test_integrations_lightning, test_integrations_transformers
from tests.documents import blocks

CODE = blocks("trackers.md")
NAMES = ("esper/inf_grad_count", "esper/nan_grad_count", "esper/grad_norm")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def train(code):
    """Run a block, then 200 checks of which the 7th is bad; return the block's names."""
    torch.manual_seed(0)
    model = nn.Linear(2, 3)
    names = {"model": model}
    exec(code, names)
    for check in range(1, 201):
        model.zero_grad()
        model(torch.full((1, 2), math.nan if check == 7 else 1.0)).sum().backward()
    names["monitor"].close()
    assert names["monitor"].snapshot.monitor_errors == 0
    return names


def test_tensorboard_has_the_bad_check_and_every_hundredth(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(CODE["TensorBoard"])["writer"].close()
    read = accumulator.EventAccumulator(str(tmp_path / "runs" / "esper"))
    read.Reload()
    assert set(read.Tags()["scalars"]) == set(NAMES)
    assert [(each.step, each.value) for each in read.Scalars(NAMES[1])] == [(7, 6), (100, 0), (200, 0)]
    assert [math.isnan(each.value) for each in read.Scalars(NAMES[2])] == [True, False, False]


def test_mlflow_has_the_bad_check_and_every_hundredth(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    run = train(CODE["MLflow"])["run"]
    mlflow.end_run()
    client = mlflow.MlflowClient()
    histories = {name: client.get_metric_history(run.info.run_id, name) for name in NAMES}
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    assert [(each.step, each.value) for each in histories[NAMES[1]]] == [(7, 6), (100, 0), (200, 0)]
    assert [math.isnan(each.value) for each in histories[NAMES[2]]] == [True, False, False]
    assert (tmp_path / "mlruns").is_dir()


def test_weights_and_biases_has_the_bad_check_and_every_hundredth(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path))
    train(CODE["Weights & Biases"])["run"].finish()
    wandb.teardown()  # which writes the file
    [file] = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    rows = list(rows_of(file))
    assert [(row["esper/check"], row[NAMES[1]]) for row in rows] == [(7, 6), (100, 0), (200, 0)]
    assert all(name in row for row in rows for name in NAMES)


def test_the_trackers_of_transformers_get_what_the_callback_logs(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    arguments = transformers.TrainingArguments(
        str(tmp_path / "out"), max_steps=10, logging_steps=5, use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    rows, model = test_integrations_transformers.Rows(), test_integrations_transformers.Model(bad_at=2, elements=6)
    names = {"Trainer": transformers.Trainer, "arguments": arguments, "dataset": rows, "model": model}
    exec(CODE["Hugging Face Trainer"], names)
    [events] = tmp_path.rglob("events.out.tfevents.*")
    read = accumulator.EventAccumulator(str(events))
    read.Reload()
    tags = [tag for tag in read.Tags()["scalars"] if tag.endswith("esper/inf_grad_count")]
    assert next((each.step, each.value) for tag in tags for each in read.Scalars(tag)) == (5, 6)


def test_the_loggers_of_lightning_get_what_the_callback_logs(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    options = test_integrations_lightning.OPTIONS | {"logger": logger, "log_every_n_steps": 1}
    model, loader = test_integrations_lightning.Model(), test_integrations_lightning.loader()
    names = {"Trainer": lightning.pytorch.Trainer, "options": options, "model": model, "loader": loader}
    exec(CODE["Lightning"], names)
    assert set(NAMES) <= set((tmp_path / "metrics.csv").read_text().splitlines()[0].split(","))


def rows_of(file):
    """Yield the history of an offline run of Weights & Biases: records of protobuf in LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = file.read_bytes()
    at, whole = 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # the whole of a record, or the last part of it
            record = Record.FromString(whole)
            whole = b""
            if record.HasField("history"):
                yield {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
