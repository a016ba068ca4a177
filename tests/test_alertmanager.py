"""The shipped Alertmanager configuration: who is told, in how many notices, and what is held back."""

from __future__ import annotations

import html
import json
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml

from deploy.stack import configs, servers
from deploy.stack.pager import Pager

CONFIG = configs.ALERTMANAGER
INF = {"alertname": "EsperInfGradients", "job": "esper", "instance": "gpu1:19301"}
CRITICAL = {**INF, "severity": "critical"}
WARNING = {**INF, "severity": "warning"}
DRILL = {"drill": "true"}
PAGERDUTY = "https://events.pagerduty.com/v2/enqueue"
TEXTFILE = {"job": "node", "instance": "gpu1:9100", "via": "textfile", "run_id": "b1946ac9"}


def amtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([servers.find("amtool"), *arguments], capture_output=True, text=True, check=False)


def test_the_shipped_file_is_valid() -> None:
    done = amtool("check-config", str(CONFIG))
    assert done.returncode == 0, done.stderr


def test_the_rendered_file_is_valid_and_differs_in_addresses_and_times_alone(tmp_path: Path) -> None:
    rendered = configs.alertmanager_config(tmp_path, "http://127.0.0.1:1", group_wait="1s", group_interval="2s")
    assert amtool("check-config", str(rendered)).returncode == 0
    pairs = list(zip(CONFIG.read_text().splitlines(), rendered.read_text().splitlines(), strict=True))
    changed = {old.split(":")[0].strip(" -#") for old, new in pairs if old != new and not old.startswith("#")}
    expected = {"pagerduty_url", "group_wait", "group_interval", "url", "credentials_file"}
    assert changed == expected | {"routing_key_file", "api_url_file"}


def test_the_templates_stand_beside_the_file_that_names_them(tmp_path: Path) -> None:
    assert yaml.safe_load(CONFIG.read_text())["templates"] == [configs.TEMPLATES.name]
    rendered = configs.alertmanager_config(tmp_path, "http://127.0.0.1:1")
    assert rendered.with_name(configs.TEMPLATES.name).read_text() == configs.TEMPLATES.read_text()
    assert "1 templates" in amtool("check-config", str(rendered)).stdout


def test_a_page_waits_until_every_rank_was_scraped_and_judged_again() -> None:
    times = yaml.safe_load(configs.PROMETHEUS.read_text())["global"]
    longest = max(int(times[each].removesuffix("s")) for each in ("scrape_interval", "evaluation_interval"))
    assert int(yaml.safe_load(CONFIG.read_text())["route"]["group_wait"].removesuffix("s")) > longest


@pytest.mark.parametrize("file", [CONFIG, configs.TEMPLATES], ids=lambda file: file.name)
def test_every_link_is_one_that_is_set_at_installation(file: Path) -> None:
    addresses = yaml.safe_load((CONFIG.parents[1] / "addresses.yml").read_text())
    links = {word for word in file.read_text().split() if word.startswith("https://")}
    assert {link.partition("/#")[0] for link in links} <= {addresses["alertmanager"], PAGERDUTY}
    assert "localhost" not in file.read_text()


def test_an_address_that_the_file_no_longer_holds_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to replace: 'pager'"):
        configs.replace_all("somebody else", {"pager": "127.0.0.1"})


@pytest.mark.parametrize(
    ("labels", "receiver"),
    [
        (CRITICAL, "pager"),
        ({**CRITICAL, "alertname": "EsperNaNGradients"}, "pager"),
        ({**CRITICAL, "alertname": "EsperTargetDown"}, "pager"),
        ({**CRITICAL, **TEXTFILE}, "pager"),
        ({**CRITICAL, **DRILL}, "pager"),
        (WARNING, "chat"),
        ({**WARNING, "alertname": "EsperChecksStalled"}, "chat"),
        ({"alertname": "EsperWatchdog", "severity": "none"}, "dead-mans-switch"),
        ({"alertname": "SomebodyElses"}, "chat"),
    ],
)
def test_routes(labels: dict[str, str], receiver: str) -> None:
    pairs = [f"{name}={value}" for name, value in labels.items()]
    assert amtool("config", "routes", "test", "--config.file", str(CONFIG), *pairs).stdout.split() == [receiver]


class Alertmanager:
    """Speak to a running Alertmanager."""

    def __init__(self, url: str) -> None:
        self.url = f"{url}/api/v2/alerts"

    def fire(self, *alerts: dict[str, str], ended: bool = False) -> None:
        now = time.time()
        body = [
            {
                "labels": labels,
                "annotations": annotations(labels),
                "startsAt": utc(now - 5),
                "endsAt": utc(now - 1 if ended else now + 600),
            }
            for labels in alerts
        ]
        request = urllib.request.Request(self.url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=5).close()

    def inhibited(self, run: str) -> list[dict[str, str]]:
        with urllib.request.urlopen(f"{self.url}?filter=run={run}", timeout=5) as answer:
            return [alert["labels"] for alert in json.load(answer) if alert["status"]["inhibitedBy"]]


def annotations(labels: dict[str, str]) -> dict[str, str]:
    return {
        "summary": f"summary of {labels['alertname']} {labels.get('instance')}",
        "description": f"what to do with {labels.get('run', '')}",
        "runbook_url": f"https://runbooks.example.com/{labels['alertname']}.md",
        "dashboard_url": "https://grafana.example.com/d/esper",
    }


def utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def eventually(condition: Callable[[], bool], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(scope="module")
def pager() -> Iterator[Pager]:
    with Pager() as pager:
        yield pager


@pytest.fixture(scope="module")
def alertmanager(pager: Pager, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alertmanager]:
    folder = tmp_path_factory.mktemp("alertmanager")
    config = configs.alertmanager_config(folder, pager.url, group_wait="300ms", group_interval="1s", token="t0ken")
    with servers.alertmanager(config, folder) as server:
        yield Alertmanager(server.url)


def pagerduty_severities(pager: Pager) -> list[str]:
    return [body["payload"]["severity"] for path, body, _ in pager.notices if path == "/pagerduty"]


def test_a_critical_alert_is_one_page_everywhere_and_later_an_all_clear(
    alertmanager: Alertmanager, pager: Pager
) -> None:
    alert = {**CRITICAL, "run": "one"}
    alertmanager.fire(alert)
    assert eventually(lambda: len(pager.pages(run="one")) == 1)
    assert not eventually(lambda: len(pager.pages(run="one")) > 1, seconds=2.5)
    assert {notice.authorization for notice in pager.notices if notice.path == "/page"} == {"Bearer t0ken"}
    alertmanager.fire(alert, ended=True)
    assert eventually(lambda: [page["status"] for page in pager.pages(run="one")] == ["firing", "resolved"])
    pagers = [body for path, body, _ in pager.notices if path == "/pagerduty"]
    assert [body["event_action"] for body in pagers] == ["trigger", "resolve"]
    assert pagers[0]["payload"]["summary"] == "summary of EsperInfGradients gpu1:19301"
    assert pagers[0]["payload"]["severity"] == "critical"


def test_one_run_is_one_page_and_two_runs_are_two(alertmanager: Alertmanager, pager: Pager) -> None:
    ranks = [{**CRITICAL, "instance": f"gpu{rank}:19301", "run": "many"} for rank in range(8)]
    alertmanager.fire(
        *ranks, {**CRITICAL, "alertname": "EsperNaNGradients", "run": "many"}, {**CRITICAL, "run": "other"}
    )
    for run, count in (("many", 9), ("other", 1)):
        assert eventually(partial(holds, pager, run, count)), "also where a busy machine sends the first ones alone"
        assert len({page["groupKey"] for page in pager.pages(run=run)}) == 1


def holds(pager: Pager, run: str, count: int) -> bool:
    """Tell whether a page holds so many alerts of a run."""
    return count in [len(page["alerts"]) for page in pager.pages(run=run)]


def told(pager: Pager, path: str, run: str) -> list[dict[str, Any]]:
    """Return what PagerDuty or Slack was told of a run."""
    return [body for told, body, _ in list(pager.notices) if told == path and run in html.unescape(str(body))]


def test_of_many_ranks_the_page_names_three_and_says_how_many_more_there_are(
    alertmanager: Alertmanager, pager: Pager
) -> None:
    ranks = [{**CRITICAL, "instance": f"gpu{rank:03}:19301", "run": "several"} for rank in range(128)]
    alertmanager.fire(*ranks)
    three = [f"summary of EsperInfGradients gpu00{rank}:19301" for rank in range(3)]
    page = paged(pager, f"{'; '.join(three)} and 125 more")
    assert page["payload"]["custom_details"]["firing"].endswith("EsperInfGradients.md and 125 more")
    assert {link["text"]: link["href"] for link in page["links"]} == {
        "Runbook": "https://runbooks.example.com/EsperInfGradients.md",
        "Dashboard": "https://grafana.example.com/d/esper",
    }
    alertmanager.fire(*ranks[:126], ended=True)
    still, other, over = (f"summary of EsperInfGradients gpu{rank}:19301" for rank in ("126", "127", "000"))
    page = paged(pager, f"{still}; {other}; resolved: {over} and 125 more")
    assert page["event_action"] == "trigger"
    assert page["payload"]["custom_details"]["resolved"].endswith(" and 123 more")


def paged(pager: Pager, summary: str) -> dict[str, Any]:
    """Wait for a page with this summary; a large group may take more than one notice to be whole."""

    def pages() -> list[dict[str, Any]]:
        return [page for page in told(pager, "/pagerduty", "several") if page["payload"]["summary"] == summary]

    assert eventually(lambda: bool(pages()))
    return pages()[0]


def chatted(pager: Pager, run: str, ends: str) -> dict[str, Any]:
    """Wait for a message whose title ends so."""

    def messages() -> list[dict[str, Any]]:
        every = [message for body in told(pager, "/slack", run) for message in body["attachments"]]
        return [message for message in every if message["title"].endswith(ends)]

    assert eventually(lambda: bool(messages()))
    return messages()[0]


def test_in_chat_what_fires_comes_first_too_and_any_name_is_plain_text(
    alertmanager: Alertmanager, pager: Pager
) -> None:
    run = 'several <b>&"lr=1e-3|bs=256"'
    ranks = [{**WARNING, "instance": f"gpu{rank}:19301", "run": run} for rank in range(5)]
    alertmanager.fire(*ranks)
    message = chatted(pager, run, ends=" and 2 more")
    assert message["title"].startswith("[firing] summary of EsperInfGradients gpu0:19301; ")
    first, *_, more = message["text"].strip().splitlines()
    assert first == (
        'what to do with several &lt;b&gt;&amp;"lr=1e-3|bs=256" <https://runbooks.example.com/EsperInfGradients.md|runbook>'
        " <https://grafana.example.com/d/esper|dashboard>"
    )
    assert more == "and 2 more"
    address, _, asked = message["title_link"].partition("/#/alerts?filter=")
    assert (address, unquote(asked)) == (
        "https://alertmanager.example.com",
        '{run="several <b>&\\"lr=1e-3|bs=256\\""}',
    )
    alertmanager.fire(*ranks[:4], ended=True)
    still, *over = (f"summary of EsperInfGradients gpu{rank}:19301" for rank in (4, 0, 1))
    message = chatted(pager, run, ends=f"{still}; resolved: {over[0]}; resolved: {over[1]} and 2 more")
    assert message["text"].endswith("\nresolved: 4\n")


def test_a_drill_is_a_page_of_its_own_and_says_so(alertmanager: Alertmanager, pager: Pager) -> None:
    alertmanager.fire({**CRITICAL, "run": "drilled"}, {**CRITICAL, **DRILL, "run": "drilled"})
    assert eventually(lambda: len(pager.pages(run="drilled")) == 2)
    drills = [page["commonLabels"].get("drill") for page in pager.pages(run="drilled")]
    assert sorted(drills, key=str) == [None, "true"]
    assert eventually(lambda: "info" in pagerduty_severities(pager))


def test_a_webhook_that_answers_500_is_tried_again(alertmanager: Alertmanager, pager: Pager) -> None:
    pager.answers = [500, 500]
    alertmanager.fire({**CRITICAL, "run": "stubborn"})
    assert eventually(lambda: len(pager.pages(run="stubborn")) == 1, seconds=20)
    assert pager.answers == []


def test_a_warning_goes_to_chat_and_pages_nobody(alertmanager: Alertmanager, pager: Pager) -> None:
    alertmanager.fire({**WARNING, "alertname": "EsperDeadLayers", "run": "chatty"})
    assert eventually(
        lambda: any("EsperDeadLayers" in str(body) for path, body, _ in pager.notices if path == "/slack")
    )
    assert pager.pages(run="chatty") == []


def test_the_watchdog_reaches_the_dead_mans_switch(alertmanager: Alertmanager, pager: Pager) -> None:
    alertmanager.fire({"alertname": "EsperWatchdog", "severity": "none"})
    assert eventually(lambda: any(path == "/alive" for path, *_ in pager.notices))


HELD_BACK = {
    "a warning by critical of the same alert and instance": (CRITICAL, WARNING),
    "the textfile's critical by the port's": (CRITICAL, {**CRITICAL, **TEXTFILE}),
    "the textfile's warning by the port's": (WARNING, {**WARNING, **TEXTFILE}),
    "a drill's warning by its critical": ({**CRITICAL, **DRILL}, {**WARNING, **DRILL}),
}
TOLD = {
    "a warning of another instance": (CRITICAL, {**WARNING, "instance": "gpu2:19301"}),
    "a warning of another alert": (CRITICAL, {**WARNING, "alertname": "EsperNaNGradients"}),
    "a warning beside a drill": ({**CRITICAL, **DRILL}, WARNING),
    "a drill beside a page": (CRITICAL, {**CRITICAL, **DRILL}),
    "what has no instance": (
        {"alertname": "EsperTargetDown", "severity": "critical"},
        {"alertname": "EsperTargetDown", "severity": "warning"},
    ),
    "the textfile's critical beside the port's warning": (WARNING, {**CRITICAL, **TEXTFILE}),
    "somebody else's warning": ({**CRITICAL, "alertname": "Disk"}, {**WARNING, "alertname": "Disk"}),
}


@pytest.mark.parametrize("case", HELD_BACK)
def test_held_back(alertmanager: Alertmanager, case: str) -> None:
    run = case.replace(" ", "-").replace("'", "")
    alertmanager.fire(*({**labels, "run": run} for labels in HELD_BACK[case]))
    assert eventually(lambda: alertmanager.inhibited(run) == [{**HELD_BACK[case][1], "run": run}])


@pytest.mark.parametrize("case", TOLD)
def test_told(alertmanager: Alertmanager, case: str) -> None:
    run = case.replace(" ", "-").replace("'", "")
    alertmanager.fire(*({**labels, "run": run} for labels in TOLD[case]))
    assert not eventually(lambda: bool(alertmanager.inhibited(run)), seconds=0.5)
