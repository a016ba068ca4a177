"""The benchmark program runs; what it measures is no matter of tests."""

import json
import subprocess
import sys


def benchmark(*arguments):
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_a_quick_run_measures_every_contender_and_writes_its_results(tmp_path):
    run = benchmark("--quick", "--only", "ppo", "--output", str(tmp_path))
    assert run.returncode == 0, run.stderr
    measured = json.loads((tmp_path / "results.json").read_text())
    contenders = measured["sections"]["ppo"]["contenders"]
    assert {"check, healthy", "full ten statistics", "torch.nn.utils.clip_grad_norm_"} <= contenders.keys()
    assert all(seconds > 0 for contender in contenders.values() for seconds in contender["samples"])
    assert "| check, healthy |" in (tmp_path / "RESULTS.md").read_text()
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_bad_input_is_one_line_and_exit_code_2():
    run = benchmark("--only", "everything")
    assert run.returncode == 2
    assert len(run.stderr.splitlines()) == 1
    assert "--only: invalid choice: 'everything'" in run.stderr
