"""The page's text holds the verdict: whether the run can be saved, and what is lost by going back."""

import pytest

from tests.end_to_end.stack import Stack, read_until, until

FAULT = ("--inject", "nan:7@30:2.weight")


@pytest.fixture
def stack(tmp_path):
    with Stack(tmp_path) as stack:
        yield stack


def alerts(stack):
    """Return what the pages say, by the name of the alert; the newest text of each."""
    pages = [page for page in stack.pager.pages() if page["status"] == "firing"]
    return {alert["labels"]["alertname"]: alert["annotations"] for page in pages for alert in page["alerts"]}


def test_a_model_that_took_the_gradient_in_is_told_to_go_back(stack):
    with stack.trainer(*FAULT, "--step", "0.001") as run:
        stack.list_trainers(run.url)
        until("both alerts are paged", lambda: {"EsperNaNGradients", "EsperModelDamaged"} <= alerts(stack).keys(), 60)
        damaged = alerts(stack)["EsperModelDamaged"]
    assert damaged["summary"].startswith("Parameters damaged in 127.0.0.1:")
    text = " ".join(damaged["description"].split())
    assert "Parameters damaged: stop and go back to the last good checkpoint." in text
    assert "of its optimizer state" in text
    assert "The last good check was " in text
    assert damaged["runbook_url"].endswith("/EsperModelDamaged.md")
    groups = {page["groupKey"] for page in stack.pager.pages()}
    assert len(groups) == 1, "it is one notice with the gradient's"


def test_a_model_that_dropped_the_step_is_told_to_go_on(stack):
    with stack.trainer(*FAULT, "--step", "0.001", "--on-critical", "skip") as run:
        stack.list_trainers(run.url)
        read_until(run, 40)
        until("the page arrives", lambda: "EsperNaNGradients" in alerts(stack), 60)
        text = " ".join(alerts(stack)["EsperNaNGradients"]["description"].split())
        assert "The model is intact: the step was skipped, clipped away or absorbed. Training can continue." in text
        assert "EsperModelDamaged" not in alerts(stack)


def test_a_model_that_was_put_back_is_told_to_go_on(stack):
    with stack.trainer(*FAULT, "--step", "0.001", "--on-critical", "rewind") as run:
        stack.list_trainers(run.url)
        read_until(run, 40)
        until("the page arrives", lambda: "EsperNaNGradients" in alerts(stack), 60)
        assert "The model is intact" in alerts(stack)["EsperNaNGradients"]["description"]
        assert "EsperModelDamaged" not in alerts(stack)
