"""Rank 0 lists the pages of its run in the format of Prometheus's HTTP service discovery."""

import json
from dataclasses import replace

import pytest

from esper_telemetry.exporters.routes.targets import answer_targets
from esper_telemetry.exporters.web.exchange import Request
from esper_telemetry.snapshot.ranks import RankPlace
from tests.snapshots import bad, fresh, of_ranks


def ask(snapshot, query="", headers=None):
    return answer_targets(Request("GET", "/api/v1/targets", query, headers or {}, "127.0.0.1"), snapshot)


def listed(snapshot, query="", headers=None):
    return json.loads(ask(snapshot, query, headers).body)


def of_many(*places):
    return replace(fresh(), ranks=replace(of_ranks(), places=places))


def test_every_rank_is_a_target_with_its_run_its_rank_and_its_host():
    assert listed(bad()) == [
        {"targets": ["10.0.0.1:19301"], "labels": {"run": "run-1", "rank": "0", "host": "box", "scrape": "leader"}},
        {"targets": ["10.0.0.2:19301"], "labels": {"run": "run-1", "rank": "1", "host": "gpu-7", "scrape": "leader"}},
    ]
    assert ask(bad()).content_type == "application/json"


def test_leaders_are_one_of_each_host():
    places = [
        RankPlace(rank, rank % 8, f"gpu{rank // 8}", f"10.0.0.{rank // 8}:{19301 + rank % 8}") for rank in range(24)
    ]
    assert len(listed(of_many(*places))) == 24
    leaders = listed(of_many(*places), "scrape=leader")
    assert [target["labels"]["rank"] for target in leaders] == ["0", "8", "16"]


def test_a_rank_without_a_page_is_no_target_and_one_with_tls_says_so():
    targets = listed(of_many(RankPlace(0, 0, "a", "a:1", secure=True), RankPlace(1, 1, "a", None)))
    assert [target["labels"].get("__scheme__") for target in targets] == ["https"]


def test_a_run_of_one_lists_itself_where_it_was_reached():
    [target] = listed(fresh(), headers={"host": "gpu7:19301"})
    assert target == {
        "targets": ["gpu7:19301"],
        "labels": {"run": "run-1", "rank": "0", "host": "box", "scrape": "leader"},
    }


def test_another_rank_says_where_rank_0_is():
    one = replace(bad(), run=replace(bad().run, rank=1, world_size=2))
    answer = ask(one)
    assert (answer.status, answer.body) == (404, b"rank 0 lists the targets of its run, at http://10.0.0.1:19301\n")
    assert ask(replace(one, ranks=None)).status == 404


@pytest.mark.parametrize("query", ["scrape=leaders", "scrape=all"])
def test_a_question_that_means_nothing_is_refused(query):
    assert ask(bad(), query).status == 400


def test_of_a_larger_run_nothing_is_listed_before_anything_is_known():
    assert listed(replace(fresh(), run=replace(fresh().run, world_size=8)), headers={"host": "x:1"}) == []
