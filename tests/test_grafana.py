"""The dashboard is what the code builds, imports cleanly, and says nothing that the exporter or the rules do not."""

from __future__ import annotations

import json
import re
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml

from deploy.stack.servers import find
from esper_telemetry.health import CRITICAL_ABOVE, WARNING_ABOVE
from esper_telemetry.metrics import METRICS
from grafana import build
from grafana.panels import ADDRESSES, ALARM, AMBER, CRITICAL, STATE_WORDS, WARNING
from grafana.queries import STATE, STATES, of_headline
from tests.dashboard import interpolate, panels, targets

ROOT = Path(__file__).parent.parent
BOARD: dict[str, Any] = json.loads(build.DASHBOARD.read_text(encoding="utf-8"))
PANELS = panels(BOARD)
TARGETS = list(targets(BOARD))
EXPRESSIONS = [target["expr"] for _, target in TARGETS] + [a["expr"] for a in BOARD["annotations"]["list"]]
RULES = yaml.safe_load((ROOT / "alerts" / "rules.yml").read_text())["groups"]
RECORDED = {rule["record"] for group in RULES for rule in group["rules"] if "record" in rule}
COUNTERS = {metric.name for metric in METRICS if metric.type == "counter"}
MADE_BY_PROMETHEUS = {"up", "ALERTS", "ALERTS_FOR_STATE"}
VARIABLES = {variable["name"]: variable for variable in BOARD["templating"]["list"]}


def selectors(expression: str) -> list[tuple[str, str]]:
    """Return each metric that is selected, with its matchers."""
    return re.findall(r"([a-zA-Z_:][\w:]*)\{([^}]*)\}", expression)


def title(panel: dict[str, Any]) -> str:
    return panel["title"]


def test_the_committed_dashboard_is_what_the_code_builds() -> None:
    assert build.DASHBOARD.read_text(encoding="utf-8") == build.render(), "run python -m grafana.build"


def test_it_is_of_the_kind_that_grafana_10_to_13_import() -> None:
    assert BOARD["schemaVersion"] == 39
    assert BOARD["uid"] == "esper", "the alerts link to it"
    assert not BOARD["editable"], "a change made in Grafana would be lost"
    assert "__inputs" not in BOARD
    assert BOARD.keys().isdisjoint({"spec", "elements", "apiVersion"}), "schema v2, which Grafana 10 and 11 cannot read"


def test_panels_have_numbers_of_their_own_and_do_not_overlap() -> None:
    every = [*BOARD["panels"], *(inside for row in BOARD["panels"] for inside in row.get("panels", ()))]
    ids = [panel["id"] for panel in every]
    assert len(set(ids)) == len(ids)
    boxes = [(panel["title"], panel["gridPos"]) for panel in BOARD["panels"]]
    assert all(box["x"] + box["w"] <= 24 for _, box in boxes)
    for (one, a), (other, b) in combinations(boxes, 2):
        apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert apart or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"], f"{one} lies on {other}"


@pytest.mark.parametrize("panel", PANELS, ids=title)
def test_every_panel_has_a_title_a_unit_and_says_what_is_normal(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert re.search(r"[Nn]ormal|should", panel["description"])
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["fieldConfig"]["defaults"]["noValue"], "what has no data must say so"
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_titles_are_unique_within_the_dashboard() -> None:
    titles = [panel["title"] for panel in PANELS]
    assert sorted(set(titles)) == sorted(titles)


@pytest.mark.parametrize("panel", PANELS, ids=title)
def test_every_query_of_a_panel_has_a_letter_and_the_chosen_data_source(panel: dict[str, Any]) -> None:
    letters = [target["refId"] for target in panel["targets"]]
    assert letters == sorted(set(letters)) != []
    assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_selector_obeys_job_and_instance(expression: str) -> None:
    found = selectors(expression)
    assert found
    for metric, matchers in found:
        assert matchers.startswith('job=~"$job", instance=~"$instance"'), metric


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_metric_exists(expression: str) -> None:
    known = {metric.name for metric in METRICS} | RECORDED | MADE_BY_PROMETHEUS
    assert {metric for metric, _ in selectors(expression)} <= known
    words = re.findall(r"\b(?:\w+:)?esper_[\w:]*", re.sub(r'"[^"]*"', "", expression))
    assert len(words) == sum("esper_" in name for name, _ in selectors(expression))


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_counters_are_read_as_growth_over_the_interval_of_a_point(expression: str) -> None:
    grown = re.findall(r"(?:rate|increase)\((\w+)\{[^}]*\}\[([^]]*)\]\)", expression)
    assert all(window == "$__rate_interval" for _, window in grown)
    assert {metric for metric, _ in selectors(expression)} & COUNTERS == {metric for metric, _ in grown}


@pytest.mark.parametrize("name", ["esper_inf_grad_count", "esper_nan_grad_count"])
def test_no_panel_shows_what_stands_at_a_scrape_alone(name: str) -> None:
    assert not any(name == metric for expression in EXPRESSIONS for metric, _ in selectors(expression))


def test_every_metric_of_the_exporter_is_shown_but_for_these() -> None:
    shown = {metric for expression in EXPRESSIONS for metric, _ in selectors(expression)}
    shown |= set(re.findall(r"\besper_\w+", state_rule()["expr"]))
    hidden = {metric.name for metric in METRICS} - shown
    assert hidden == {
        "esper_inf_grad_count",  # the recent maxima hold every check, these the last
        "esper_nan_grad_count",
        "esper_nonfinite_grads_total",
        "esper_ppo_update_seconds",
        "esper_recent_window_seconds",
        "esper_exporter_scrape_duration_seconds",  # for who looks into a slow scrape
        "esper_local_inf_grad_recent_max",
        "esper_local_nan_grad_recent_max",
        "esper_unmonitored_steps_total",  # has its alert
        "esper_grad_scope_info",
        "esper_global_model_damage",  # these are for alerts
        "esper_global_last_good_check_timestamp_seconds",
        "esper_global_checks_since_last_good_check",
    }, "show a new metric in a panel of grafana/, or name it here"


def test_promtool_takes_every_query(tmp_path: Path) -> None:
    rules = [{"record": f"query:{number}", "expr": interpolate(text)} for number, text in enumerate(EXPRESSIONS)]
    file = tmp_path / "queries.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    done = subprocess.run([find("promtool"), "check", "rules", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_variables_choose_data_source_job_instance_and_run() -> None:
    assert list(VARIABLES) == ["datasource", "job", "instance", "run_id", "alertmanager"]
    assert not any("id" in variable for variable in VARIABLES.values()), "Grafana 10 takes equal ids for one variable"
    assert (VARIABLES["datasource"]["type"], VARIABLES["datasource"]["query"]) == ("datasource", "prometheus")
    for name in ("job", "instance", "run_id"):
        variable = VARIABLES[name]
        assert (variable["multi"], variable["includeAll"], variable["allValue"]) == (True, True, ".+")
        assert variable["refresh"] == 2, "with the time range"
        assert variable["datasource"]["uid"] == "${datasource}"
        assert selectors(variable["query"]) or variable["query"] == "label_values(esper_run_info, job)"


def test_the_tiers_are_those_of_the_code() -> None:
    assert (WARNING, CRITICAL) == (WARNING_ABOVE + 1, CRITICAL_ABOVE + 1)
    tiers = re.findall(r"recent_max\{drill!?=\"\"\} > (\d+)\)", state_rule()["expr"])
    assert tiers == [str(above) for above in (*[CRITICAL_ABOVE] * 2, *[WARNING_ABOVE] * 3)], "of a rank and of its run"


def test_both_kinds_are_amber_from_the_first_tier_and_red_from_the_second() -> None:
    for kind in ("NaN", "Inf"):
        count, tier = named(kind), named(f"{kind} tier")
        assert steps(count) == [(None, "#8e9096"), (0, "text"), (WARNING, "orange"), (CRITICAL, "red")]
        assert steps(tier) == [(None, "transparent"), (WARNING, AMBER), (CRITICAL, ALARM)]
        assert {p["fieldConfig"]["defaults"]["noValue"] for p in (count, tier)} == {"not measured"}
        assert (count["options"]["colorMode"], tier["options"]["colorMode"]) == ("value", "background_solid")
    assert columns(named("Runs"))["NaN"] == columns(named("Runs"))["Inf"]


def columns(table: dict[str, Any]) -> dict[str, Any]:
    return {rule["matcher"]["options"]: rule["properties"] for rule in table["fieldConfig"]["overrides"]}


def named(title: str) -> dict[str, Any]:
    return next(panel for panel in PANELS if panel["title"] == title)


def state_rule() -> dict[str, Any]:
    return next(rule for group in RULES for rule in group["rules"] if rule.get("record") == STATE)


def test_the_states_are_those_of_the_rule() -> None:
    text = (ROOT / "alerts" / "rules.yml").read_text()
    said = re.findall(r"(\d) ([A-Z ]+)[,.]", re.search(r"# (6 CRITICAL.*)", text)[1])  # type: ignore[index]
    assert {name: int(code) for code, name in said} == {name: code for code, name in enumerate(STATES)}
    assert set(re.findall(r"(\d) \* group by", state_rule()["expr"])) == {str(code) for code in range(len(STATES))}


def test_every_tile_of_the_headline_speaks_of_the_same_run() -> None:
    one = of_headline("").strip()
    tiles = [panel for panel in PANELS if panel["gridPos"]["y"] < 9 and panel["title"] != "Alerts firing"]
    assert len(tiles) == 9
    for tile in tiles:
        (target,) = tile["targets"]
        assert one in target["expr"], tile["title"]


def steps(panel: dict[str, Any]) -> list[tuple[float | None, str]]:
    return [(step["value"], step["color"]) for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"]]


def test_only_healthy_is_green_and_critical_has_a_colour_of_its_own() -> None:
    green = [name for name, colour in STATES.items() if greenest(colour)]
    assert green == ["HEALTHY"]
    assert [name for name, colour in STATES.items() if "red" in colour] == ["GONE", "CRITICAL"], "the two that page"
    assert len(set(STATES.values())) == len(STATES)
    assert max(STATE_WORDS.items(), key=lambda word: int(word[0]))[1][0] == "CRITICAL", "max() is the worst"
    state = named("State")
    assert steps(state) == [(None, "#8e9096")], "grey without a state"
    assert state["fieldConfig"]["defaults"]["noValue"] == "NO DATA"


def greenest(colour: str) -> bool:
    if not colour.startswith("#"):
        return "green" in colour
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return green > max(red, blue)


def test_the_links_lead_somewhere() -> None:
    urls = {link["title"]: link["url"] for link in BOARD["links"]}
    assert urls == {"Alertmanager": "${alertmanager}", "Runbooks": ADDRESSES["runbooks"]}
    assert VARIABLES["alertmanager"]["query"] == ADDRESSES["alertmanager"]
    links = re.findall(r'"url": "([^"]+)"', json.dumps([panel["fieldConfig"] for panel in PANELS]))
    assert "http://${__value.text}/" in links, "the exporter's page"
    [runbook] = [url for url in links if url.startswith(ADDRESSES["runbooks"])]
    for group in RULES:
        for rule in group["rules"]:
            page = runbook.removeprefix(ADDRESSES["runbooks"] + "/")
            page = page.replace("${__value.text}", rule.get("alert", "EsperWatchdog"))
            assert (ROOT / "alerts" / "runbooks" / page).is_file(), page


def test_the_list_of_alerts_leads_to_alertmanager_by_label() -> None:
    overrides = columns(named("Firing alerts"))
    for column, label in (("Group", "run"), ("Instance", "instance")):
        [links] = [given["value"] for given in overrides[column] if given["id"] == "links"]
        address, _, asked = links[0]["url"].partition("?filter=")
        assert (address, unquote(asked)) == (
            "${alertmanager}/#/alerts",
            f'{{{label}="${{__value.text:percentencode}}"}}',
        )


def test_every_address_is_set_at_installation() -> None:
    text = build.DASHBOARD.read_text()
    assert "localhost" not in text
    assert set(re.findall(r"https://[\w.-]+", text)) <= set(ADDRESSES.values())


def test_runs_have_their_names_in_every_graph_that_tells_instances_apart() -> None:
    for _, target in TARGETS:
        if "{{instance}}" in target.get("legendFormat", ""):
            assert "{{run_id}}" in target["legendFormat"], target["expr"]


def test_alerts_are_marked_on_the_graphs() -> None:
    [alerts] = BOARD["annotations"]["list"]
    assert alerts["enable"]
    assert 'alertname=~"Esper.*"' in alerts["expr"]
    assert 'alertstate="firing"' in alerts["expr"]
    assert (alerts["titleFormat"], alerts["tagKeys"]) == ("{{alertname}}", "severity")


def test_the_ppo_row_is_collapsed_and_the_banner_is_above_all_rows() -> None:
    rows = {panel["title"]: panel["collapsed"] for panel in BOARD["panels"] if panel["type"] == "row"}
    assert rows == {
        "Health": False,
        "Model": False,
        "Ranks": False,
        "Training": False,
        "Layers": False,
        "Heads": False,
        "PPO": True,
        "Run and monitor": False,
    }
    assert BOARD["panels"][0]["title"] == "State"
    assert BOARD["panels"][0]["gridPos"] == {"x": 0, "y": 0, "w": 6, "h": 9}


def test_provisioning_names_one_default_prometheus_with_the_scrape_interval() -> None:
    [prometheus, alertmanager] = provisioned("datasources/prometheus.yml")["datasources"]
    assert (prometheus["type"], prometheus["isDefault"], alertmanager["type"]) == ("prometheus", True, "alertmanager")
    config = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    assert prometheus["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]


def test_compose_mounts_the_dashboard_where_the_provider_looks_for_it() -> None:
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    mounts = dict(mount.split(":")[1::-1] for mount in compose["services"]["grafana"]["volumes"])
    [provider] = provisioned("dashboards/esper.yml")["providers"]
    assert mounts[provider["options"]["path"]] == "../grafana/dashboards"
    assert mounts["/etc/grafana/provisioning"] == "../grafana/provisioning"
    urls = {source["url"] for source in provisioned("datasources/prometheus.yml")["datasources"]}
    assert {re.sub(r"http://(\w+):.*", r"\1", url) for url in urls} <= compose["services"].keys()


def test_kubernetes_gets_it_as_a_config_map_that_the_sidecar_finds() -> None:
    manifest = yaml.safe_load((ROOT / "grafana" / "kustomization.yaml").read_text())
    [made] = manifest["configMapGenerator"]
    assert [ROOT / "grafana" / file for file in made["files"]] == [build.DASHBOARD]
    assert made["options"]["labels"] == {"grafana_dashboard": "1"}
    assert build.DASHBOARD.stat().st_size < 200_000, "kubectl apply keeps a copy, of 262,144 bytes at most"


def provisioned(file: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "grafana" / "provisioning" / file).read_text())
