"""`esper drill` against a real trainer, Prometheus and Alertmanager."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.stack import servers
from tests.end_to_end.stack import Stack, query


@pytest.fixture
def stack(tmp_path):
    with Stack(tmp_path) as stack:
        yield stack


def drill(stack, exporter, prometheus=None):
    """Run `esper drill` as an operator would, where all that leaves the host goes through a proxy."""
    command = [Path(sys.executable).with_name("esper"), "drill", "--timeout", "60"]
    command += ["--exporter", exporter, "--alertmanager", stack.alertmanager.url]
    command += ["--prometheus", prometheus or stack.prometheus[0].url]
    environment = os.environ | {"http_proxy": "http://127.0.0.1:9"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)


def test_a_drill_is_seen_at_every_station_and_pages_as_a_drill_only(stack):
    with stack.trainer("--allow-drill") as run:
        stack.list_trainers(run.url)
        stack.wait_until_scraped(run.url)
        done = drill(stack, run.url)
        assert done.returncode == 0, done.stderr
        stations = ["Prometheus scraped it", "the rule fired", "Alertmanager received it"]
        times = [float(re.search(rf"^{station} +after ([\d.]+) s$", done.stdout, re.M)[1]) for station in stations]
        assert times == sorted(times)
        assert times[-1] < 30

        (alert,) = stack.wait_for_page()
        assert alert["labels"]["alertname"] == "EsperInfGradients"
        assert alert["labels"]["severity"] == "critical"
        stack.wait_until_resolved()
        pages = stack.pager.pages()
        assert pages == stack.pager.pages(drill="true")
        summaries = [alert["annotations"]["summary"] for page in pages for alert in page["alerts"]]
        assert all(summary.startswith("DRILL") for summary in summaries)
        assert not [notice for notice in stack.pager.notices if notice.path == "/slack"]


def test_an_exporter_that_allows_no_drill(stack):
    with stack.trainer() as run:
        done = drill(stack, run.url)
        assert_one_line(done, "--allow-drill")


def test_a_prometheus_that_cannot_be_reached(stack):
    with stack.trainer("--allow-drill") as run:
        nobody = f"http://127.0.0.1:{servers.free_port()}"
        assert_one_line(drill(stack, run.url, prometheus=nobody), "--prometheus", nobody)
        stack.list_trainers(run.url)
        stack.wait_until_scraped(run.url)
        assert query(stack.prometheus[0], "esper_inf_grad_recent_max")
        assert query(stack.prometheus[0], 'esper_inf_grad_recent_max{drill="true"}') == []


def assert_one_line(done, *texts):
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("esper drill: ")
    assert all(text in line for text in texts)
