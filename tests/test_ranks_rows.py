"""Ranks hear of each other through the store of their job, with real processes and a real store; nobody waits."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import ExitStack

import pytest

from deploy.stack.servers import free_port
from tests.end_to_end.stack import until


class Rank:
    """One process of a run."""

    def __init__(self, rank, world_size, port, *arguments, **variables):
        environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **variables}
        command = [sys.executable, "-m", "tests.rank_worker", *arguments]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def hear(self):
        return self.process.stdout.readline().strip()

    def tell(self, command):
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        return json.loads(self.hear())

    def ranks(self, *names):
        known = self.tell("ranks") or {}
        return tuple(known.get(name) for name in names)


@pytest.fixture
def run():
    with ExitStack() as exit:

        def start(world_size=2, *arguments, **variables):
            port = free_port()
            ranks = [Rank(rank, world_size, port, *arguments, **variables) for rank in range(world_size)]
            for rank in ranks:
                exit.enter_context(rank)
            for rank in ranks:
                rank.url = rank.hear()
            return ranks

        yield start


def open_json(url):
    with urllib.request.urlopen(url, timeout=5) as response:
        return json.load(response)


def value(rank, name):
    with urllib.request.urlopen(f"{rank.url}/metrics", timeout=5) as page:
        lines = page.read().decode().splitlines()
    return next((float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name} ")), None)


@pytest.mark.parametrize("arguments", [(), ("--late",)], ids=["group first", "watch first"])
def test_rank_0_counts_the_run(run, arguments):
    zero, one = run(2, *arguments)
    for rank, found in ((zero, 4), (one, 3)):
        rank.tell("check 0")
        rank.tell(f"check {found}")
    until("both are counted", lambda: zero.ranks("nan") == (7,))
    assert zero.ranks("expected", "reporting", "gone", "silent") == (2, 2, 0, [])
    assert value(zero, "esper_global_nan_grad_recent_max") == 7
    assert value(zero, "esper_global_inf_grad_recent_max") == 0
    assert value(one, "esper_global_nan_grad_recent_max") is None
    assert (zero.tell("errors"), one.tell("errors")) == (0, 0)


def test_rank_0_knows_that_another_part_of_the_model_is_damaged(run):
    zero, one = run()
    for rank in (zero, one):
        rank.tell("check 0")
    until("both are heard of", lambda: zero.ranks("reporting") == (2,))
    before = value(zero, "esper_global_last_good_check_timestamp_seconds")
    assert before == value(zero, "esper_last_good_check_timestamp_seconds")
    one.tell("damage 3")
    for rank, found in ((zero, 0), (one, 7), (zero, 0), (one, 7)):  # what a step did is seen before the next check
        rank.tell(f"check {found}")
    until("rank 0 knows", lambda: value(zero, "esper_damaged_ranks") == 1)
    assert value(zero, "esper_global_model_damage") == 3
    assert value(zero, "esper_nonfinite_parameters") in (0, None)
    assert value(zero, "esper_checks_since_last_good_check") == 0
    assert value(zero, "esper_global_checks_since_last_good_check") == 2
    assert value(zero, "esper_global_last_good_check_timestamp_seconds") <= before + 1
    status = open_json(f"{zero.url}/api/v1/status")
    (damaged,) = status["ranks"]["worst_damaged"]
    assert (damaged["rank"], damaged["part"], damaged["elements"], damaged["tensor"]) == (1, "parameters", 3, "bias")
    assert status["state"] == "critical"


def test_bad_checks_of_other_numbers_are_not_added(run):
    zero, one = run()
    zero.tell("check 4")
    one.tell("check 0")
    one.tell("check 3")
    until("rank 1 was heard", lambda: zero.ranks("reporting") == (2,))
    zero.tell("check 0")
    one.tell("check 5")  # the last word of rank 1 has arrived when this one has
    until("its third check stands", lambda: zero.ranks("nan") == (5,))


def test_every_bad_check_of_a_run_that_is_bad_at_every_check_is_counted_with_its_number(run):
    zero, one = run()
    for check in range(1, 31):
        for rank in (zero, one):
            rank.tell(f"check {check}")
    until("the last is counted", lambda: zero.ranks("nan") == (60,))


def test_rank_0_lists_where_every_rank_is(run):
    zero, one = run()
    until("both have told", lambda: len(open_json(f"{zero.url}/api/v1/targets")) == 2)
    targets = open_json(f"{zero.url}/api/v1/targets")
    assert [f"http://{target['targets'][0]}" for target in targets] == [zero.url, one.url]
    assert [target["labels"]["rank"] for target in targets] == ["0", "1"]
    assert len({target["labels"]["run"] for target in targets}) == 1
    assert [target["labels"].get("scrape") for target in targets] == ["leader", None]
    until("rank 1 knows where rank 0 is", lambda: one.ranks("leader") == (zero.url,))
    with pytest.raises(urllib.error.HTTPError, match="404") as refused:
        open_json(f"{one.url}/api/v1/targets")
    assert zero.url in refused.value.read().decode()


def test_a_rank_that_is_killed_is_gone_and_one_that_has_ended_is_not(run):
    zero, one, two = run(3, SILENT_SECONDS="7")
    until("all are heard of", lambda: zero.ranks("reporting") == (3,))
    one.tell("close")
    one.process.stdin.close()
    assert one.process.wait(20) == 0
    two.process.kill()
    until("rank 2 is gone", lambda: zero.ranks("reporting", "gone", "silent") == (2, 1, [2]))
    assert value(zero, "esper_ranks_gone") == 1


def test_rank_0_stays_until_the_last_bad_check_of_another_rank_was_scraped(run):
    zero, one = run(2, "--linger")
    until("both are heard of", lambda: zero.ranks("reporting") == (2,))
    one.tell("check 3")
    for rank in (one, zero):
        rank.process.stdin.close()  # both end, and rank 0 may not have heard of it yet
    until("rank 0 shows it", lambda: value(zero, "esper_global_nan_grad_recent_max") == 3)
    assert value(zero, "esper_nan_grad_recent_max") == 0, "it has nothing to show of its own"
    assert zero.process.wait(40) == 0


def test_training_goes_on_where_rank_0_and_the_store_are_gone(run):
    zero, one = run()
    one.tell("check 0")
    zero.process.kill()
    zero.process.wait()
    began = time.monotonic()
    while time.monotonic() - began < 7:  # longer than a beat
        assert one.tell("check 3") < 1.0
    assert one.tell("errors") == 0
    one.process.stdin.close()
    assert one.process.wait(20) == 0


def test_a_run_of_one_has_no_thread_and_no_ranks(run):
    (alone,) = run(1)
    alone.tell("check 3")
    assert alone.tell("ranks") is None
    assert value(alone, "esper_ranks_expected") is None
    (target,) = open_json(f"{alone.url}/api/v1/targets")
    assert f"http://{target['targets'][0]}" == alone.url
