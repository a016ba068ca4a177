"""What is pushed fires the rules that were written for what is scraped.

By two roads: through a collector, for which a small one of ours stands in, and into Prometheus itself, where the one
that is found takes OTLP.
"""

import subprocess

import pytest

from deploy.stack import servers
from tests.end_to_end.stack import Stack, query, until
from tests.otlp_receiver import Receiver

FLAG = "--web.enable-otlp-receiver"


@pytest.fixture(params=["through a collector", "into Prometheus"])
def road(request, tmp_path, monkeypatch):
    """Return (stack, endpoint to push to)."""
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "1000")
    if request.param == "through a collector":
        with Stack(tmp_path) as stack, Receiver() as collector:
            stack.list_collectors(collector.url)
            yield stack, collector.url
        return
    known = subprocess.run([servers.find("prometheus"), "--help"], capture_output=True, text=True, check=False)
    if FLAG.removeprefix("--") not in known.stdout + known.stderr:
        pytest.skip(f"the Prometheus that was found has no {FLAG}: before version 3, or built without it")
    with Stack(tmp_path, prometheus_arguments=[FLAG]) as stack:
        yield stack, f"{stack.prometheus[0].url}/api/v1/otlp"


def test_a_bad_check_that_was_pushed_pages_once_under_the_names_of_the_scraped_ones(road):
    stack, endpoint = road
    (prometheus,) = stack.prometheus
    with stack.trainer("--inject", "inf:6@3:2.weight", "--wait", "--otlp-endpoint", endpoint) as run:
        until("the trainer is there", lambda: query(prometheus, 'esper_checks_total{job="esper/esper-telemetry"} == 0'))
        run.stdin.write("\n")
        run.stdin.flush()
        (alert,) = stack.wait_for_page()
        labels = alert["labels"]
        run_id, rank = labels["instance"].split(":")
        assert (labels["alertname"], labels["severity"]) == ("EsperInfGradients", "critical")
        assert (labels["job"], labels["run"], rank) == ("esper/esper-telemetry", run_id, "0")
        assert alert["annotations"]["summary"] == f"6 Inf in the gradient of {run_id}:0"
        assert f"(run {run_id}, rank 0 of 1)" in alert["annotations"]["description"]
        assert "It began in layer 2.weight." in alert["annotations"]["description"]
        stack.wait_until_resolved()
        assert query(prometheus, 'esper_nonfinite_checks_total{kind="inf",tier="critical"} == 1')
