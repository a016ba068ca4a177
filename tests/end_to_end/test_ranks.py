"""A run of several ranks is one page that names the rank at fault, its host and layer; one address finds them all."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from deploy.stack.servers import free_port
from tests.end_to_end.stack import Stack, query, until

EXAMPLE = Path(__file__).parents[2] / "examples" / "ddp_gpt.py"
FAULT = "nan:7@400:rank=1"  # late, so that Prometheus knows both ranks: one that it has not seen yet cannot count


@contextmanager
def torchrun(folder, *arguments, launcher=("--nproc-per-node", "2"), name="run"):
    """Run the example under torchrun; all its processes end with the block."""
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, str(EXAMPLE), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (folder / f"{name}.log").open("w") as log:
        run = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        yield run
    finally:
        # Each rank has a session of its own, and outlives a launcher that is killed.
        ranks = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split() if run.poll() is None else []
        for each in (run.pid, *map(int, ranks)):
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        run.wait()


@pytest.fixture
def leader():
    return f"127.0.0.1:{free_port()}"


def alone(port):
    return ("--nproc-per-node", "2", "--master-port", str(port), "--master-addr", "127.0.0.1")


def assert_one_page(stack, ranks=2):
    alerts = stack.wait_for_page(300)
    (alert,) = [alert for alert in alerts if alert["labels"]["alertname"] == "EsperNaNGradients"]
    assert alert["labels"]["severity"] == "critical"
    assert alert["annotations"]["summary"].startswith("7 NaN ")
    description = alert["annotations"]["description"]
    assert f"counted over all {ranks} ranks" in description
    assert f"rank 1 on {socket.gethostname()}, 7 NaN, in layer" in description
    assert "blocks.1.up.weight" in description
    assert {alert["labels"]["rank"] for alert in alerts} == {"0"}, "it speaks for all of them"
    assert len([page for page in stack.pager.pages() if page["status"] == "firing"]) == 1


def test_under_ddp_a_bad_rank_is_one_page_that_names_it_and_no_replica_takes_the_step(tmp_path, leader):
    with Stack(tmp_path, leader=leader) as stack:
        more = ("--inject", FAULT, "--on-critical", "skip", "--steps", "100000", "--pause", "0.02")
        with torchrun(tmp_path, "--listen-address", leader, *more, launcher=alone(free_port())):
            assert_one_page(stack)
            (prometheus,) = stack.prometheus
            up = query(prometheus, 'up{job="esper"} == 1')
            assert sorted(target["metric"]["rank"] for target in up) == ["0", "1"]
            assert len({target["metric"]["run"] for target in up}) == 1
            skipped = 'esper_skipped_updates_total{reason="intervention"}'
            until("both have skipped it", lambda: len(query(prometheus, f"{skipped} == 1")) == 2)


def test_under_fsdp2_seven_that_are_split_into_four_and_three_are_critical(tmp_path, leader):
    with Stack(tmp_path, leader=leader) as stack:
        more = ("--strategy", "fsdp2", "--inject", FAULT, "--steps", "400", "--pause", "0.02")
        with torchrun(tmp_path, "--listen-address", leader, *more, launcher=alone(free_port())) as run:
            assert_one_page(stack)
            (damage,) = [each for each in stack.pager.pages()[0]["alerts"] if "Damaged" in each["labels"]["alertname"]]
            assert "Parameters damaged" in damage["annotations"]["summary"]
            assert "of 2 ranks" in damage["annotations"]["summary"]
            (prometheus,) = stack.prometheus
            shards = query(prometheus, "max_over_time(esper_nan_grad_recent_max[30s])")
            assert sorted(float(shard["value"][1]) for shard in shards) == [3, 4]
            assert run.wait(120) == 0


def host(number, address):
    return ("--node-rank", str(number), "--local-addr", address)


def test_two_hosts_are_one_run(tmp_path, leader):
    port = free_port()
    other = f"127.0.0.2:{leader.rpartition(':')[2]}"
    launcher = ("--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port))
    more = ("--inject", FAULT, "--on-critical", "skip", "--steps", "100000", "--pause", "0.02")
    with (
        Stack(tmp_path, leader=leader) as stack,
        torchrun(tmp_path, "--listen-address", leader, *more, launcher=(*launcher, *host(0, "127.0.0.1")), name="one"),
        torchrun(tmp_path, "--listen-address", other, *more, launcher=(*launcher, *host(1, "127.0.0.2")), name="two"),
    ):
        assert_one_page(stack)
        (prometheus,) = stack.prometheus
        up = {target["metric"]["instance"]: target["metric"] for target in query(prometheus, 'up{job="esper"} == 1')}
        assert set(up) == {leader, other}
        assert {target["scrape"] for target in up.values()} == {"leader"}
        (run_id,) = {target["run"] for target in up.values()}
        assert {(info["metric"]["rank"], info["metric"]["run_id"]) for info in query(prometheus, "esper_run_info")} == {
            ("0", run_id),
            ("1", run_id),
        }
        (reporting,) = query(prometheus, "esper_ranks_reporting")
        assert (reporting["metric"]["instance"], reporting["value"][1]) == (leader, "2")
        with urllib.request.urlopen(f"http://{leader}/api/v1/targets", timeout=5) as listed:
            assert [target["targets"] for target in json.load(listed)] == [[leader], [other]]
