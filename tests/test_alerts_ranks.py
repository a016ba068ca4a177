"""One run is one alert, whatever its number of ranks."""

import subprocess
from pathlib import Path

import pytest
import yaml

from deploy.stack.servers import find

RULES = Path(__file__).parents[1] / "alerts" / "rules.yml"
CALM, BAD = "0x36", "0x12 {}x24"


def series(ranks, seen, counted, damaged):
    """Return what is scraped of a run under DDP, in which every rank sees the same, and `damaged` ranks took it in."""
    for rank in range(ranks):
        target = f'job="esper", instance="gpu{rank // 8}:{19301 + rank % 8}", run="llama"'
        info = f'run_id="b1946ac9", rank="{rank}", world_size="{ranks}", host="gpu{rank // 8}"'
        yield f"esper_run_info{{{target}, {info}}}", "1x36"
        yield f"esper_run_ended{{{target}}}", CALM
        yield f"up{{{target}}}", "1x36"
        yield f"esper_nan_grad_recent_max{{{target}}}", BAD.format(seen)
        yield f"esper_nonfinite_parameters{{{target}}}", BAD.format(seen) if rank >= ranks - damaged else CALM
        if rank == 0 and counted is not None:
            yield f"esper_global_model_damage{{{target}}}", BAD.format(3) if damaged else CALM
            yield f"esper_damaged_ranks{{{target}}}", BAD.format(damaged)
            yield f"esper_global_nan_grad_recent_max{{{target}}}", BAD.format(counted)
            yield f"esper_global_inf_grad_recent_max{{{target}}}", CALM
            yield f"esper_ranks_expected{{{target}}}", f"{ranks}x36"
            yield f"esper_ranks_reporting{{{target}}}", f"{ranks}x36"
            yield f"esper_ranks_gone{{{target}}}", CALM


def check(folder, ranks, seen, counted, firing, damaged=0):
    given = [{"series": name, "values": values} for name, values in series(ranks, seen, counted, damaged)]
    expected = [
        {
            "labels": f'{{alertname="EsperNaNGradients", run="llama", severity="{severity}"}}',
            "value": count,
        }
        for severity, count in firing.items()
    ]
    if damaged:
        expected.append({"labels": '{alertname="EsperModelDamaged", run="llama", severity="critical"}', "value": 1})
    asked = "count by (alertname, run, severity) (ALERTS{alertstate='firing', alertname!='EsperWatchdog'})"
    document = {
        "rule_files": [str(RULES)],
        "evaluation_interval": "5s",
        "tests": [
            {
                "interval": "5s",
                "input_series": given,
                "promql_expr_test": [{"expr": asked, "eval_time": "2m", "exp_samples": expected}],
            }
        ],
    }
    file = folder / "ranks.yml"
    file.write_text(yaml.safe_dump(document))
    return subprocess.run([find("promtool"), "test", "rules", file], capture_output=True, text=True)


@pytest.mark.parametrize("ranks", [1, 2, 64, 1000])
@pytest.mark.parametrize(("found", "severity"), [(0, None), (5, "warning"), (6, "critical")])
def test_a_bad_check_is_one_alert(tmp_path, ranks, found, severity):
    counted = None if ranks == 1 else found
    done = check(tmp_path, ranks, found, counted, {severity: 1} if severity else {})
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("ranks", [2, 64, 1000])
def test_the_count_of_the_run_decides_and_not_that_of_a_shard(tmp_path, ranks):
    done = check(tmp_path, ranks, 1, 6, {"critical": 1})
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("ranks", "damaged"), [(2, 1), (64, 1), (64, 64), (1000, 1000)])
def test_damage_is_one_alert_on_how_many_ranks_it_may_be(tmp_path, ranks, damaged):
    done = check(tmp_path, ranks, 6, 6, {"critical": 1}, damaged)
    assert done.returncode == 0, done.stdout + done.stderr


def test_where_nobody_counts_every_rank_speaks_for_itself(tmp_path):
    done = check(tmp_path, 64, 6, None, {"critical": 64})
    assert done.returncode == 0, done.stdout + done.stderr


def test_more_alerts_than_one_are_noticed(tmp_path):
    assert check(tmp_path, 64, 6, 6, {"critical": 64}).returncode != 0
