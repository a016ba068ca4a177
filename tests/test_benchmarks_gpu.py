"""The GPU benchmark runs where there is no GPU, too; what it measures is no matter of tests."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="no Triton: the GPU benchmark did not rehearse")


def benchmark(*arguments):
    environment = os.environ | {"PYTHONPATH": "src", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu")
    sections = ["ceiling", "ppo-fp32", "behaviour"]
    run = benchmark("--rehearse", "--out", str(out), "--only", *sections)
    assert run.returncode == 0, run.stderr
    return out


def test_a_rehearsal_runs_every_contender_and_writes_its_results(rehearsed):
    results = json.loads((rehearsed / "gpu.json").read_text())
    assert "rehearsal" in results["machine"]["GPU"]
    measured = results["sections"]["ppo-fp32"]
    assert {"check, healthy", "torch._foreach_norm", "the original's ten statistics"} <= measured["contenders"].keys()
    assert all(seconds > 0 for samples in measured["contenders"].values() for seconds in samples["device"])
    assert results["sections"]["behaviour"]["facts"]["errors_where_they_are_errors"] == 0
    assert "| check, healthy |" in (rehearsed / "GPU.md").read_text()


def test_what_was_measured_can_be_drawn_elsewhere(rehearsed):
    (rehearsed / "GPU.md").unlink()
    assert benchmark("--draw", str(rehearsed / "gpu.json")).returncode == 0
    assert "## Targets" in (rehearsed / "GPU.md").read_text()
    assert (rehearsed / "gpu.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so_in_one_line(tmp_path):
    run = benchmark("--out", str(tmp_path))
    assert run.returncode == 2
    assert len(run.stderr.splitlines()) == 1
    assert "no CUDA device" in run.stderr


def test_a_section_that_fails_is_told_and_the_others_are_not_lost(tmp_path, monkeypatch):
    from benchmarks.gpu import run

    def fail():
        raise RuntimeError("out of memory")

    made = {"one": fail, "other": lambda: {"kind": "behaviour", "title": "other", "facts": {"a": 1.0}}}
    monkeypatch.setattr(run, "sections", lambda _: made)
    run.run(tmp_path, None, 60, True)
    sections = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert sections["one"]["error"] == "RuntimeError: out of memory"
    assert sections["other"]["facts"] == {"a": 1.0}
    assert "out of memory" in (tmp_path / "GPU.md").read_text()


@pytest.mark.parametrize(
    ("watched", "again", "verdict"),
    [(1.004, 1.0001, "met"), (1.006, 1.0001, "missed"), (1.004, 1.006, "not decided"), (1.02, 0.99, "not decided")],
)
def test_a_step_is_judged_only_where_it_differs_from_itself_by_less_than_the_target(watched, again, verdict):
    from benchmarks.gpu import step, targets

    samples = {step.NOTHING: [1.0] * 9, step.CONTROL: [again] * 9, step.OURS: [watched] * 9}
    found = targets.verdicts({"step": {"kind": "step", "samples": samples}})
    assert [each.verdict for each in found if "GPT" in each.what] == [verdict]
