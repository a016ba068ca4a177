"""The alerts load, fire when they must and at nothing else, and agree with the code and with their runbooks."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import pytest
import yaml

from deploy.stack.servers import ProgramNotFound, find
from esper_telemetry.health import CRITICAL_ABOVE, WARNING_ABOVE
from esper_telemetry.metrics import KINDS, METRICS

ALERTS = Path(__file__).parent.parent / "alerts"
FILES = sorted(ALERTS.glob("*.yml"))
TESTS = sorted((ALERTS / "tests").glob("*.yml"))
RUNBOOKS = sorted((ALERTS / "runbooks").glob("*.md"))
ADDRESSES: dict[str, str] = yaml.safe_load((ALERTS.parent / "deploy" / "addresses.yml").read_text())
RECORDED = "run_kind:esper_nonfinite_grad:recent_max"
SCRAPED_BESIDE = {"up", "node_textfile_mtime_seconds", "node_textfile_scrape_error", "node_time_seconds"}
IN_CODE = {metric.name for metric in METRICS}


def rules(file: Path | None = None) -> Iterator[dict[str, Any]]:
    for path in [file] if file else FILES:
        for group in yaml.safe_load(path.read_text())["groups"]:
            yield from group["rules"]


def alerts() -> list[dict[str, Any]]:
    return [rule for rule in rules() if "alert" in rule]


def recorded() -> set[str]:
    return {rule["record"] for rule in rules() if "record" in rule}


def metrics_in(text: str) -> set[str]:
    """Return the names of metrics in PromQL, or in a template that holds some."""
    words = re.findall(r"[a-zA-Z_:][\w:]*", re.sub(r'"[^"]*"', '""', text))
    return {word for word in words if re.match(r"(\w+:)?esper_|node_(?!exporter\b)|up$", word)}


def promtool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([find("promtool"), *map(str, arguments)], capture_output=True, text=True)


def promql_of(page: Path) -> list[str]:
    blocks = re.findall(r"```promql\n(.*?)```", page.read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def identity(path: Path) -> str:
    return path.name


@pytest.mark.parametrize("file", FILES, ids=identity)
def test_rules_load(file: Path) -> None:
    done = promtool("check", "rules", file)
    assert done.returncode == 0, done.stderr


def test_rules_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    broken = tmp_path / "rules.yml"
    broken.write_text((ALERTS / "rules.yml").read_text().replace("max_over_time(", "largest_ever("))
    assert "unknown function" in promtool("check", "rules", broken).stderr


@pytest.fixture(scope="module")
def vmalert() -> Path:
    try:
        return find("vmalert")
    except ProgramNotFound as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("file", FILES, ids=identity)
def test_vmalert_takes_the_rules_and_their_templates(vmalert: Path, file: Path) -> None:
    done = subprocess.run([vmalert, "-dryRun", f"-rule={file}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_vmalert_refuses_what_makes_no_sense(vmalert: Path, tmp_path: Path) -> None:
    broken = tmp_path / "rules.yml"
    broken.write_text((ALERTS / "rules.yml").read_text().replace("humanizeTimestamp", "humaniseTimestamp"))
    done = subprocess.run([vmalert, "-dryRun", f"-rule={broken}"], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "humaniseTimestamp" in done.stderr


@pytest.mark.parametrize("file", TESTS, ids=identity)
def test_rules_fire_when_they_must_and_at_nothing_else(file: Path) -> None:
    done = promtool("test", "rules", file)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("nonfinite.yml", '"inf"} > 5', '"inf"} > 6'),
        ("nonfinite.yml", '"nan"} > 0', '"nan"} >= 0'),
        ("damaged.yml", "run:esper_model:damage > 0", "run:esper_model:damage > 1"),
        ("damaged.yml", "esper_global_model_damage[3m]", "esper_global_model_damage[1s]"),
        ("damaged.yml", "unless on (job, instance) last_over_time(instance:esper_rank:counted[2m])", ""),
        ("damaged.yml", "last_over_time(instance:esper_rank:counted[2m])", "instance:esper_rank:counted"),
        ("damaged.yml", "0 * (last_over_time(esper_nonfinite_parameters[3m]) == 0)", "0 * esper_nonfinite_parameters"),
        ("layers.yml", "layers >= 3", "layers > 3"),
        ("layers.yml", "changes(esper_checks_total[15m]) > 1", "changes(esper_checks_total[15m]) >= 0"),
        ("trainer.yml", "for: 1m", "for: 0s"),
        ("trainer.yml", "sum_over_time(up[5m]) > 1", "sum_over_time(up[5m]) > 0"),
        ("trainer.yml", "or on (job, instance) (instance:esper_run:last_word and on (job, instance) up == 0)", ""),
        ("unmeasured.yml", "for: 10m", "for: 5m"),
        ("state.yml", "or 3 * group by (job, instance) (max_over_time(esper_unmeasured_layers[5m]) > 0)", ""),
        ("textfile.yml", "node_textfile_scrape_error > 0", "node_textfile_scrape_error >= 0"),
    ],
)
def test_a_rule_that_is_wrong_is_noticed(tmp_path: Path, file: str, right: str, wrong: str) -> None:
    text = (ALERTS / "rules.yml").read_text()
    assert right in text
    (tmp_path / "rules.yml").write_text(text.replace(right, wrong))
    (tmp_path / "tests").mkdir()
    copy = tmp_path / "tests" / file
    copy.write_text((ALERTS / "tests" / file).read_text())
    done = promtool("test", "rules", copy)
    assert (done.returncode, "FAILED" in done.stdout + done.stderr) == (1, True)


HOSTILE = [
    "sweep(seed=1",
    "lr=1e-3|bs=256",
    "a+b/exp/run1",
    "42",
    "\"double\" 'single' `back` back\\slash\\d",
    "{{ .Value }} {a=1} [*?^$.] $labels.run_id $1",
    "two\nlines\ttabbed <b>&amp; %s %q 100 % Träning № 7 🚀",
]
NAMES = ("b1946ac9", "value_net.2.weight", "gpu1")
"""The run, the layer and the host that the rule tests speak of."""


def as_promql(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)[1:-1]


def renamed(value: Any, escape: Callable[[str], str], name: str) -> Any:
    """Put a name in the place of those that the rule tests speak of, wherever they stand."""
    if isinstance(value, dict):
        other = {"series": as_promql, "dashboard_url": quote_plus}
        return {key: renamed(inside, other.get(key, escape), name) for key, inside in value.items()}
    if isinstance(value, list):
        return [renamed(inside, escape, name) for inside in value]
    if isinstance(value, str):
        for old in NAMES:
            value = value.replace(old, escape(name))
    return value


def renamed_tests(file: Path, name: str) -> dict[str, Any]:
    """Return the tests of a file that expect words, with another name in each."""
    document = yaml.load(file.read_text(), yaml.BaseLoader)  # `0x100` is no number here, but a hundred zeros
    for test in document["tests"]:
        test.pop("promql_expr_test", None)
        fired = {asked["alertname"]: asked for asked in test.get("alert_rule_test", ())[::-1] if "exp_alerts" in asked}
        test["alert_rule_test"] = list(fired.values())  # the first time that each fires
    document["rule_files"] = [str((file.parent / path).resolve()) for path in document["rule_files"]]
    document["tests"] = [test for test in document["tests"] if test["alert_rule_test"]]
    return renamed(document, str, name)


@pytest.mark.parametrize("name", HOSTILE)
def test_every_annotation_takes_any_name_of_a_run_a_layer_and_a_host(name: str, tmp_path: Path) -> None:
    files = []
    for file in TESTS:
        if file.name != "memory.yml":  # the same words, days later
            files.append(tmp_path / file.name)
            files[-1].write_text(yaml.safe_dump(renamed_tests(file, name)))
    done = promtool("test", "rules", *files)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_the_tiers_are_those_of_the_code(kind: str) -> None:
    name = {"inf": "EsperInfGradients", "nan": "EsperNaNGradients"}[kind]
    tiers = {rule["labels"]["severity"]: rule["expr"] for rule in alerts() if rule["alert"] == name}
    assert tiers == {
        "warning": f'{RECORDED}{{kind="{kind}"}} > {WARNING_ABOVE} <= {CRITICAL_ABOVE}',
        "critical": f'{RECORDED}{{kind="{kind}"}} > {CRITICAL_ABOVE}',
    }


def test_every_metric_in_a_rule_or_in_what_it_says_exists() -> None:
    used = set()
    for rule in rules():
        used |= metrics_in(" ".join([rule["expr"], *rule.get("annotations", {}).values()]))
    assert used - IN_CODE - SCRAPED_BESIDE - recorded() == set()
    assert RECORDED in used


def test_recording_rules_are_named_level_metric_operation() -> None:
    for name in recorded():
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*:esper_[a-z_]+:[a-z0-9_]+", name)


def test_no_page_on_inf_or_nan_waits() -> None:
    for rule in alerts():
        if rule["alert"] in ("EsperInfGradients", "EsperNaNGradients"):
            assert "for" not in rule


def test_every_alert_on_inf_or_nan_outlasts_a_pause_between_two_bad_checks() -> None:
    held = {rule["keep_firing_for"] for rule in alerts() if rule["alert"] in ("EsperInfGradients", "EsperNaNGradients")}
    assert held == {"1m"}


def test_no_label_holds_a_value() -> None:
    for rule in alerts():
        assert "$value" not in str(rule["labels"]), "each value would be a new alert, and a new page"


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: f"{rule['alert']}-{rule['labels']['severity']}")
def test_every_alert_says_what_a_sleepy_person_needs(rule: dict[str, Any]) -> None:
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url", "dashboard_url"}
    assert rule["labels"]["severity"] in ("warning", "critical", "none")
    assert ("run" in rule["labels"]) == (rule["alert"] != "EsperWatchdog"), "one run is one page"
    assert rule["annotations"]["runbook_url"] == f"{ADDRESSES['runbooks']}/{rule['alert']}.md"
    assert rule["annotations"]["dashboard_url"].partition("?")[0] == f"{ADDRESSES['grafana']}/d/esper"


@pytest.mark.parametrize("page", [*FILES, *RUNBOOKS], ids=identity)
def test_every_link_leads_to_one_of_the_three_addresses_that_are_set_at_installation(page: Path) -> None:
    text = page.read_text()
    assert set(re.findall(r"https?://[\w.-]+\b", text)) - {"http://INSTANCE"} <= set(ADDRESSES.values())
    assert "localhost" not in text


def test_every_alert_has_a_runbook_and_every_runbook_an_alert() -> None:
    assert {page.stem for page in RUNBOOKS} == {rule["alert"] for rule in alerts()}


def test_every_alert_has_a_test_of_its_words() -> None:
    tested = "".join(file.read_text() for file in TESTS)
    for rule in alerts():
        assert f"{ADDRESSES['runbooks']}/{rule['alert']}.md" in tested


@pytest.mark.parametrize("page", RUNBOOKS, ids=identity)
def test_a_runbook_has_its_parts(page: Path) -> None:
    text = page.read_text()
    assert text.startswith(f"# {page.stem}\n")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings == ["What it means", "Confirm", "Do, in this order", "Silence"]
    assert f"alertname={page.stem} run=RUN" in text or page.stem == "EsperWatchdog"


@pytest.mark.parametrize("page", RUNBOOKS, ids=identity)
def test_what_a_runbook_asks_prometheus_is_promql_over_metrics_that_exist(page: Path, tmp_path: Path) -> None:
    asked = promql_of(page)
    assert asked
    assert {name for line in asked for name in metrics_in(line)} - IN_CODE - SCRAPED_BESIDE - recorded() == set()
    parsed = tmp_path / "rules.yml"
    parsed.write_text(
        yaml.safe_dump(
            {
                "groups": [
                    {"name": "asked", "rules": [{"record": f"a:b:c{i}", "expr": line} for i, line in enumerate(asked)]}
                ]
            }
        )
    )
    done = promtool("check", "rules", parsed)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", RUNBOOKS, ids=identity)
def test_names_in_a_runbook_exist(page: Path) -> None:
    words = set(re.findall(r"`(esper_\w+)`", page.read_text())) | set(re.findall(r"\bEsper[A-Z]\w+", page.read_text()))
    assert words - IN_CODE - {rule["alert"] for rule in alerts()} == set()
