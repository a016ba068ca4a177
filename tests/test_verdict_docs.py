"""The blocks of docs/verdict.md run as they stand there."""

import math

import pytest
import torch
from torch import nn

from tests.documents import DOCS, blocks

BLOCKS = blocks("verdict.md")


class Run:
    """Run a block over 12 batches, of which one makes a bad gradient where a test wants it."""

    def __init__(self, code, bad_at=None):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
        batches = list(torch.rand(12, 5, 4))
        if bad_at is not None:
            batches[bad_at][0, 0] = math.nan
        self.names = {
            "model": self.model,
            "optimizer": torch.optim.Adam(self.model.parameters()),
            "batches": batches,
            "loss_of": lambda model, batch: model(batch).square().mean(),
            "torch": torch,
        }
        exec(code, self.names)
        self.monitor = self.names["monitor"]
        assert self.monitor.snapshot.monitor_errors == 0


@pytest.mark.parametrize("heading", BLOCKS)
def test_a_healthy_run_says_nothing(heading, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = Run(BLOCKS[heading])
    assert run.monitor.snapshot.damage == "intact"
    assert run.monitor.snapshot.checks == 12
    assert capsys.readouterr().out == ""


def test_a_damaged_run_says_what_is_damaged(capsys):
    run = Run(BLOCKS["Ask"], bad_at=6)
    assert run.monitor.snapshot.last_good_check.check == 6
    assert capsys.readouterr().out.startswith("parameters Damage(parameters=(LayerCounts(layer_name='0.weight'")


def test_a_damaged_model_is_not_saved(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Run(BLOCKS["Guard checkpoints"], bad_at=6)
    assert capsys.readouterr().out.count("not saved: parameters damaged: Inf 0, NaN 16 in 0.weight\n") == 2
    saved = torch.load("checkpoint.pt")
    assert all(tensor.isfinite().all() for tensor in saved.values())


def test_every_word_of_the_verdict_is_in_the_page():
    from esper_telemetry.snapshot.damage import WORDS

    text = (DOCS / "verdict.md").read_text()
    for word, said in WORDS.items():
        assert f'| `"{word}"` | {said} |' in text
