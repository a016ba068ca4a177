import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from esper_telemetry import start_exporter
from esper_telemetry.exporters.routes.status import read_status, status_json
from esper_telemetry.snapshot.damage import Damage
from esper_telemetry.snapshot.ranks import BadRank, Ranks
from esper_telemetry.snapshot.recent import LayerCounts
from tests.snapshots import NOW, RUN, Source, bad, damaged, fresh, of_ranks
from tests.test_exporters_http import get

AT = 1.7e9  # the unix time of `bad`'s check, which was at NOW on the monotonic clock


def status(snapshot, seconds_later=1.0):
    return read_status(snapshot, AT + seconds_later, NOW + seconds_later)


def healthy_again(snapshot, seconds_later=1.0):
    return replace(
        snapshot,
        inf_grad_count=0,
        nan_grad_count=0,
        grad_norm=1.5,
        layers=(),
        found_damage=Damage(),
        timestamp=AT + seconds_later,
    )


def test_a_damaged_model_is_critical_whatever_its_gradients_are():
    for part in ("parameters", "buffers", "optimizer"):
        damage = Damage(**{part: (LayerCounts("policy.weight", 1, 2, 64),)})
        shown = status(replace(healthy_again(bad(), 200), found_damage=damage), 200)
        assert (shown["state"], shown["tier"]) == ("critical", "healthy")
        assert shown["model"]["damage"] == part
        assert shown["model"]["elements"][part] == 3
        [worst] = shown["model"]["worst"]
        assert worst == {"part": part, "layer": "policy.weight", "inf": 1, "nan": 2, "elements": 64}


def test_the_verdict_says_what_going_back_would_lose():
    shown = status(damaged())["model"]
    assert (shown["verdict"], shown["cause"]) == ("parameters damaged", "forward of policy")
    good = {"check": 38, "timestamp": AT - 41, "age_seconds": 42.0, "checks_since": 2, "step": 38}
    assert shown["last_good_check"] == good


def test_a_model_that_nobody_has_looked_at_is_not_said_to_be_intact():
    assert status(fresh())["model"] == {
        "damage": None,
        "verdict": None,
        "elements": {"parameters": None, "buffers": None, "optimizer": None},
        "worst": [],
        "cause": None,
        "last_good_check": None,
    }


def test_before_the_first_check_nothing_is_said_to_be_zero():
    shown = status(fresh())
    assert (shown["state"], shown["liveness"], shown["tier"]) == ("not_measuring", "not_measuring", None)
    assert (shown["checks"], shown["worst"], shown["last_check"], shown["trouble"]) == (0, None, None, None)
    assert (shown["dead_layers"], shown["ppo"], shown["amp"]) == (None, None, None)
    assert shown["cost"] == {"seconds": 0.0, "seconds_per_check": None, "share": None}
    assert shown["history"] == {"slot_seconds": 10.0, "inf": [None] * 90, "nan": [None] * 90}


@pytest.mark.parametrize(
    ("inf", "nan", "state"),
    [(2, 0, "warning"), (0, 5, "warning"), (5, 5, "warning"), (0, 7, "critical"), (6, 1, "critical")],
)
def test_the_state_is_the_tier_of_the_worse_kind(inf, nan, state):
    shown = status(bad(inf, nan))
    assert (shown["state"], shown["tier"], shown["liveness"]) == (state, state, "measuring")
    assert shown["worst"] == {"inf": inf, "nan": nan}
    assert (shown["history"]["inf"][-1], shown["history"]["nan"][-1]) == (inf, nan)


def test_a_bad_check_of_a_moment_stays_the_state_for_the_recent_window():
    snapshot = healthy_again(bad(0, 7))
    shown = status(snapshot)
    assert (shown["state"], shown["worst"]["nan"], shown["last_check"]["nan"]) == ("critical", 7, 0)
    assert shown["layers"] == [{"layer": "policy.weight", "inf": 0, "nan": 7, "elements": 64}]
    later = status(healthy_again(bad(0, 7), 130), 130)
    assert (later["state"], later["worst"]["nan"], later["layers"]) == ("healthy", 0, [])
    assert later["trouble"] == {"since": AT, "last_timestamp": AT, "origin_layer": "policy.weight", "checks": 1}


def test_a_run_that_checks_no_more_is_stalled():
    snapshot = healthy_again(bad(), 200)
    assert status(snapshot, 260)["state"] == "healthy"
    shown = status(snapshot, 261)
    assert (shown["state"], shown["liveness"], shown["tier"]) == ("stalled", "stalled", "healthy")
    assert shown["last_check"]["age_seconds"] == 61


def test_a_run_whose_last_check_was_critical_does_not_calm_down_by_stalling_or_ending():
    shown = status(bad(0, 7), 1000)
    assert (shown["state"], shown["liveness"]) == ("critical", "stalled")
    assert [layer["layer"] for layer in shown["layers"]] == ["policy.weight"]
    assert status(replace(bad(0, 7), ended=True), 1000)["state"] == "critical"


def test_a_run_that_ended_well_has_ended_and_never_stalls():
    assert status(replace(healthy_again(bad(), 200), ended=True), 1000)["state"] == "ended"
    assert status(replace(fresh(), ended=True))["state"] == "ended"


def test_values_that_json_cannot_say_are_words():
    snapshot = replace(
        bad(), ppo=replace(bad().ppo, policy_loss=math.nan, value_loss=-math.inf, entropy=np.float32(0.5))
    )
    text = status_json(snapshot).decode()
    shown = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert shown["last_check"]["norm"] == "+Inf"
    assert (shown["ppo"]["policy_loss"], shown["ppo"]["value_loss"]) == ("NaN", "-Inf")
    assert shown["ppo"]["entropy"] == 0.5
    assert shown["heads"][0] == {"head": "policy", "norm": "+Inf", "inf_latched": True, "nan_latched": False}
    assert shown["ppo"]["explained_variance"] is None


def test_fifty_of_two_hundred_bad_layers_are_listed_and_the_rest_counted():
    layers = tuple(LayerCounts(f"layer{number}", 1, 0, 10) for number in range(200))
    snapshot = replace(bad(), layers=layers, recent=fresh().recent.after(NOW, layers, (1 << 200) - 1))
    for later in (1, 1000):
        shown = status(snapshot, later)
        assert (len(shown["layers"]), shown["layers_dropped"]) == (50, 150)


def test_the_cost_is_a_share_of_the_time_between_first_and_last_check():
    cost = status(healthy_again(bad(), 10))["cost"]
    assert cost == {"seconds": 0.25, "seconds_per_check": 0.25 / 40, "share": 0.025}


def test_it_is_served_fresh_and_the_page_does_not_deliver_a_bad_check():
    source = Source(fresh())
    exporter = start_exporter(source, "127.0.0.1:0")
    source.snapshot = bad()
    code, headers, body = get(exporter, "/api/v1/status")
    assert (code, headers["Content-Type"], headers["Cache-Control"]) == (200, "application/json", "no-store")
    assert json.loads(body)["run"] == asdict(RUN)
    assert not exporter.linger(0)
    exporter.close(linger=0)


def test_a_status_that_cannot_be_built_is_an_error_that_is_counted_and_logged_once(caplog):
    exporter = start_exporter(Source(replace(bad(), run=None)), "127.0.0.1:0")
    for _ in range(2):
        assert get(exporter, "/api/v1/status")[0] == 500
    assert b"\nesper_exporter_collect_errors_total 3.0\n" in get(exporter)[2]  # the page of metrics failed too
    assert caplog.text.count("no page could be built") == 1
    exporter.close(linger=0)


def fields(value, path=""):
    """Yield the path of every field."""
    for name, inner in value.items() if isinstance(value, dict) else ():
        yield f"{path}{name}"
        item = inner[0] if isinstance(inner, list) and inner else inner
        yield from fields(item, f"{path}{name}{'[]' if isinstance(inner, list) else ''}.")


def test_every_field_is_documented_and_every_documented_field_exists():
    text = Path("docs/status-api.md").read_text()
    documented = set(re.findall(r"^\| `([a-z_\[\].]+)` \|", text, re.MULTILINE))
    assert documented == set(fields(status(damaged())))


def test_a_check_that_could_not_measure_layers_is_no_healthy_one():
    before = bad(inf=0)
    layers = ("a.weight", "b.weight")
    shown = status(replace(before, unmeasured_layers=layers, recent=before.recent.after(NOW, (), 0, 2)))
    assert (shown["state"], shown["tier"], shown["liveness"]) == ("not_measuring", "healthy", "measuring")
    assert (shown["unmeasured_layers"], shown["unmeasured_max"]) == (["a.weight", "b.weight"], 2)


def test_what_is_bad_is_said_before_what_is_not_known():
    assert status(replace(bad(inf=2), unmeasured_layers=("a.weight",)))["state"] == "warning"


def test_rank_0_shows_the_run_and_its_worst_check_is_that_of_the_run():
    of_run = replace(of_ranks(0, 7), bad=(BadRank(1, "gpu-7", 0, 7, "head.weight", 40, AT, NOW),))
    shown = status(replace(bad(0, 4), ranks=of_run))
    assert (shown["state"], shown["worst"]) == ("critical", {"inf": 0, "nan": 7})
    assert (shown["ranks"]["reporting"], shown["ranks"]["bad"], shown["ranks"]["nan"]) == (2, 1, 7)
    (worst,) = shown["ranks"]["worst"]
    assert (worst["place"], worst["rank"], worst["host"], worst["layer"]) == (1, 1, "gpu-7", "head.weight")


def test_another_rank_knows_where_rank_0_is_and_not_what_the_run_found():
    elsewhere = replace(Ranks.unknown(2, 120.0), leader="http://10.0.0.1:19301")
    shown = status(replace(bad(0, 4), ranks=elsewhere))
    assert (shown["state"], shown["worst"]) == ("warning", {"inf": 0, "nan": 4})
    assert (shown["ranks"]["leader"], shown["ranks"]["expected"]) == ("http://10.0.0.1:19301", 2)
    assert {shown["ranks"][name] for name in ("reporting", "gone", "inf", "nan", "exact", "bad")} == {None}


def test_a_run_of_one_has_no_ranks_to_show():
    assert status(fresh())["ranks"] is None
