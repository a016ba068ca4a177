"""Every query of the dashboard finds data on a real Prometheus, or rightly none, and the banner tells states apart."""

import json
import re
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from deploy.stack import servers
from grafana import build
from grafana.panels import STATE_WORDS
from tests import dashboard
from tests.end_to_end.stack import Stack, query, read_until, until

pytestmark = pytest.mark.xdist_group("dashboard")  # one process, so that the runs are started once

BOARD = json.loads(build.DASHBOARD.read_text(encoding="utf-8"))
QUERIES = {(panel["title"], target["refId"]): target for panel, target in dashboard.targets(BOARD)}
ORIGIN = "First bad layer, last bad check"
NO_SCALER = {("AMP loss scale", "A"), ("AMP loss scale", "B")}
NOTHING_BAD = {
    ("Worst layers", "A"),
    ("Worst layers", "B"),
    ("Worst layers", "C"),
    ("Worst layers", "D"),
    ("Where it began", "A"),
    ("Bad elements, worst layers", "A"),
    ("Bad elements, worst layers", "B"),
    ("Firing alerts", "A"),
    ("Runs", "D"),  # the first bad layer
}
NO_PUSH = {("Exporter errors", "C")}
RANKS = {"Ranks shown", "Runs of several ranks", "Ranks at fault", "Damaged ranks", "Ranks over time"}
ONE_RANK = {key for key in QUERIES if key[0] in RANKS}
NO_DAMAGE = {("Damaged tensors", "A"), ("Is the model alive?", "D")}
UNTOLD = {key for key, target in QUERIES.items() if "esper_train_" in target["expr"]}
"""What only some loops tell."""
FAULT = ("--inject", "nan:7@40:action_net.weight", "--inject", "inf:2@40:action_net.weight", "--on-critical", "skip")
TRAINERS = {
    "HEALTHY": (),
    "WARNING": ("--inject", "inf:2@3:2.weight", "--window", "3600"),
    "NOT MEASURING": ("--pause", "1000"),
    "GONE": (),
    "DRILL": ("--allow-drill",),
}
JOBS = {"CRITICAL": ("--episodes", "100000", *FAULT), "ENDED": ("--episodes", "1", "--hold")}


class Observed:
    """A stack that scrapes one run in every state; `instances` tells which is which."""

    def __init__(self, stack, instances):
        self.stack = stack
        self.instances = instances
        (self.prometheus,) = stack.prometheus

    def ask(self, target, **values):
        """Run a query as Grafana would, with "now" a window of 5 s."""
        values = {name: "|".join(map(re.escape, value)) for name, value in values.items()}
        text = dashboard.interpolate(target["expr"], **values).replace("\\", "\\\\")
        text = text.replace("[20s]", "[5s]").replace("offset 5m", "offset 5s")
        if target.get("instant"):
            return query(self.prometheus, text)
        now = time.time()
        asked = urllib.parse.urlencode({"query": text, "start": now - 60, "end": now, "step": 1})
        with urllib.request.urlopen(f"{self.prometheus.url}/api/v1/query_range?{asked}", timeout=10) as response:
            return json.load(response)["data"]["result"]

    def state(self, *names, **values):
        """Return the state that the banner shows for these instances, None for no data."""
        chosen = [self.instances[name] for name in names]
        result = self.ask(QUERIES["State", "A"], instance=chosen, **values)
        return STATE_WORDS[result[0]["value"][1]][0] if result else None

    def headline(self, *names):
        """Return what each tile of the banner but the alerts shows for these instances."""
        chosen = [self.instances[name] for name in names]
        tiles = (
            "State",
            "NaN",
            "Inf",
            ORIGIN,
            "Since the last check",
            "Layers not measured",
        )
        return {tile: self.ask(QUERIES[tile, "A"], instance=chosen) for tile in tiles}

    def without_data(self, *names):
        """Return the queries that find nothing for these instances."""
        chosen = [self.instances[name] for name in names]
        asked = {key: target for key, target in QUERIES.items() if key not in UNTOLD}
        return {key for key, target in asked.items() if not self.ask(target, instance=chosen)}


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    with ExitStack() as exit_:
        stack = exit_.enter_context(Stack(tmp_path_factory.mktemp("dashboard")))
        urls = {name: exit_.enter_context(job(stack.folder / name, *arguments)) for name, arguments in JOBS.items()}
        left_behind = exit_.enter_context(textfile_of_a_killed_run(stack))
        runs = {name: exit_.enter_context(stack.trainer(*arguments)) for name, arguments in TRAINERS.items()}
        urls |= {name: run.url for name, run in runs.items()}
        stack.list_trainers(*urls.values())
        for url in urls.values():
            stack.wait_until_scraped(url)
        read_until(runs["GONE"], 3)
        runs["GONE"].send_signal(signal.SIGKILL)
        drill(urls["DRILL"])
        urls["LEFT BEHIND"] = left_behind
        yield Observed(stack, {name: url.removeprefix("http://") for name, url in urls.items()})


@contextmanager
def job(log, *arguments):
    """Run the reference job while the block lasts, and yield the address of its exporter."""
    port = servers.free_port()
    esper = Path(sys.executable).with_name("esper")
    with log.open("wb") as out:
        command = [esper, "ppo", "--listen-address", f"127.0.0.1:{port}", "--linger", "0", *arguments]
        run = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        run.kill()
        run.wait()


@contextmanager
def textfile_of_a_killed_run(stack):
    """Serve the file that a killed run left, and yield the address of its node_exporter."""
    folder = stack.folder / "textfiles"
    folder.mkdir()
    with stack.trainer("--textfile-dir", str(folder), "--inject", "nan:7@3:0.weight", "--kill-at", "3") as run:
        assert run.wait(30) == -signal.SIGKILL
    with stack.node_exporter(folder) as node:
        yield node.url


def drill(url):
    """Make an exporter show a made-up critical value."""
    asked = urllib.request.Request(f"{url}/-/drill?kind=inf&count=6&seconds=300", method="POST")
    asked.add_header("X-Esper-Drill", "1")
    urllib.request.urlopen(asked, timeout=5).close()


@pytest.mark.parametrize("name", [*TRAINERS, *JOBS])
def test_the_banner_shows_the_state_of_each_run(observed, name):
    until(f"the run that is {name} is shown so", lambda: observed.state(name) == name)


def test_a_file_that_a_killed_run_left_behind_is_no_sign_of_life(observed):
    until("its last words are old news", lambda: observed.state("LEFT BEHIND") == "NOT MEASURING")


def test_the_banner_shows_the_worst_of_several(observed):
    until("the worst is critical", lambda: observed.state(*observed.instances) == "CRITICAL")
    until("gone is worse", lambda: observed.state("HEALTHY", "WARNING", "GONE") == "GONE")


def test_the_banner_of_nothing_has_no_state(observed):
    assert observed.ask(QUERIES["State", "A"], instance=["no such instance"]) == []
    assert observed.ask(QUERIES["NaN", "A"], instance=["no such instance"]) == []
    assert observed.state(*observed.instances, run_id=["no such run"]) is None


def test_every_query_finds_data_where_a_run_has_a_fault(observed):
    until(
        "the scaler's and those of many ranks have none",
        lambda: observed.without_data("CRITICAL") == NO_SCALER | NO_PUSH | ONE_RANK | NO_DAMAGE,
    )


def test_every_query_finds_data_for_all_instances_at_once(observed):
    expected = NO_SCALER | NO_PUSH | ONE_RANK
    until("all but the scaler's have data", lambda: observed.without_data(*observed.instances) - NO_DAMAGE == expected)


def test_a_healthy_run_has_no_bad_layers_and_no_alerts(observed):
    no_ppo = {key for key, target in QUERIES.items() if "esper_ppo" in target["expr"] or "esper_head" in target["expr"]}
    expected = NO_SCALER | NO_PUSH | ONE_RANK | NO_DAMAGE | NOTHING_BAD | no_ppo
    until("nothing else is missing", lambda: observed.without_data("HEALTHY") == expected)


def test_the_banner_counts_and_names_the_layer(observed):
    critical = {"instance": [observed.instances["CRITICAL"]]}
    until("the count is there", lambda: observed.ask(QUERIES["NaN", "A"], **critical))
    for title, count in (("NaN", "7"), ("NaN tier", "7"), ("Inf", "2"), ("Inf tier", "2")):
        assert observed.ask(QUERIES[title, "A"], **critical)[0]["value"][1] == count
    (origin,) = observed.ask(QUERIES[ORIGIN, "A"], **critical)
    assert origin["metric"]["layer"] == "action_net.weight"
    assert time.time() - 120 < float(origin["value"][1]) / 1000 < time.time()
    since = QUERIES["In trouble since", "A"]
    until("the alert has begun", lambda: float(observed.ask(since, **critical)[0]["value"][1]) > 0)


def shown(tiles):
    """Return the values of tiles, those that grow by the second left out, and where it began."""
    values = {tile: [found["value"][1] for found in series] for tile, series in tiles.items() if "ast" not in tile}
    layers = {found["metric"].get("layer") for found in tiles[ORIGIN]}
    return values | {"layers": layers, "runs": {found["metric"].get("run_id") for found in tiles["State"]}}


@pytest.mark.parametrize(
    "beside", [("HEALTHY",), ("WARNING", "GONE"), ("HEALTHY", "WARNING", "NOT MEASURING", "GONE", "ENDED", "DRILL")]
)
def test_every_tile_of_the_headline_speaks_of_the_worst_run_whatever_runs_beside_it(observed, beside):
    alone = observed.headline("CRITICAL")
    assert shown(alone)["NaN"] == ["7"]
    assert shown(alone)["layers"] == {"action_net.weight"}
    until("the headline is that of the worst", lambda: shown(observed.headline("CRITICAL", *beside)) == shown(alone))


def test_a_run_that_is_gone_says_for_how_long_and_lends_no_count_from_another(observed):
    until("it is gone", lambda: observed.state("WARNING", "GONE") == "GONE")
    tiles = observed.headline("WARNING", "GONE")
    assert (tiles["NaN"], tiles["Inf"], tiles[ORIGIN]) == ([], [], [])
    (gone,) = tiles["Since the last check"]
    (other,) = observed.headline("WARNING")["Since the last check"]
    assert float(gone["value"][1]) > float(other["value"][1]) + 1


def test_the_alerts_are_listed_with_the_name_of_their_run(observed):
    critical = {"instance": [observed.instances["CRITICAL"]]}
    expected = {("EsperNaNGradients", "critical"), ("EsperInfGradients", "warning")}

    def alerts():
        found = [each["metric"] for each in observed.ask(QUERIES["Firing alerts", "A"], **critical)]
        return {(labels["alertname"], labels["severity"]) for labels in found if labels["run_id"]}

    until("both are", lambda: alerts() >= expected)
    (critical_run,) = {each["metric"]["run_id"] for each in observed.ask(QUERIES["State", "A"], **critical)}
    chosen = [each["metric"] for each in observed.ask(QUERIES["Firing alerts", "A"], run_id=[critical_run])]
    assert {labels["instance"] for labels in chosen} == set(critical["instance"]), "those of the chosen run alone"
    for letter in "AB":
        (count,) = observed.ask(QUERIES["Alerts firing", letter], **critical)
        assert int(count["value"][1]) >= 1


def test_a_healthy_run_counts_0_and_names_none(observed):
    healthy = {"instance": [observed.instances["HEALTHY"]]}
    until("the count is there", lambda: observed.ask(QUERIES["NaN", "A"], **healthy))
    calm = ("NaN", "Inf", "Alerts firing", "In trouble since", ORIGIN, "Layers not measured")
    for title in calm:
        assert [found["value"][1] for found in observed.ask(QUERIES[title, "A"], **healthy)] == ["0"]
    (origin,) = observed.ask(QUERIES[ORIGIN, "A"], **healthy)
    assert origin["metric"] == {"layer": "none"}


@pytest.mark.parametrize("name", ["NOT MEASURING", "GONE", "LEFT BEHIND"])
@pytest.mark.parametrize("title", ["NaN", "NaN tier", "Inf", "Inf tier"])
def test_a_run_that_does_not_measure_has_no_calm_0(observed, name, title):
    until("the count is away", lambda: not observed.ask(QUERIES[title, "A"], instance=[observed.instances[name]]))


def test_the_worst_instance_is_on_top_and_every_instance_has_its_run(observed):
    states = observed.ask(QUERIES["Runs", "A"])
    runs = {found["metric"]["instance"]: found["metric"]["run_id"] for found in states}
    assert runs.keys() == set(observed.instances.values())
    assert len(set(runs.values())) == len(runs)
    chosen = {"run_id": [runs[observed.instances["WARNING"]]]}
    assert observed.state(*observed.instances, **chosen) == "WARNING"
    (only,) = observed.ask(QUERIES["Runs", "A"], **chosen)
    assert only["metric"]["instance"] == observed.instances["WARNING"]


def test_a_spike_shorter_than_a_point_is_drawn(observed):
    """Zoom out until one point of the graph stands for a minute: the critical check is still there."""
    target = QUERIES["Inf and NaN in one check", "B"]
    text = dashboard.interpolate(target["expr"], instance=".+", __rate_interval="65s")
    until("the spike is in the one point", lambda: query(observed.prometheus, text)[0]["value"][1] == "7")
