"""A run that ends well is heard to have ended by a Prometheus that lists it for good; one that is killed pages."""

import pytest

from tests.end_to_end.stack import Stack, query, until


@pytest.fixture
def stack(tmp_path):
    with Stack(tmp_path) as stack:
        yield stack


@pytest.mark.parametrize("closed", [True, False], ids=["monitor.close()", "the script just ends"])
def test_who_ends_well_stays_until_that_was_scraped_and_pages_nobody(stack, closed):
    (prometheus,) = stack.prometheus
    arguments = ["--wait", "--checks", "100"] + ([] if closed else ["--leave"])
    with stack.trainer(*arguments) as ended, stack.trainer() as killed:
        stack.list_trainers(ended.url, killed.url)
        for run in (ended, killed):
            stack.wait_until_scraped(run.url)
        ended.stdin.write("\n")
        ended.stdin.flush()
        for _ in ended.stdout:
            pass  # until it has left
        assert ended.wait(30) == 0
        instance = ended.url.removeprefix("http://")
        assert query(prometheus, f'last_over_time(esper_run_ended{{instance="{instance}"}}[1m]) == 1')
        killed.kill()
        alerts = stack.wait_for_page()
        assert {each["labels"]["alertname"] for each in alerts} == {"EsperTargetDown"}
        assert instance not in str(alerts)
        until("nothing of the other is on its way", lambda: not query(prometheus, f'ALERTS{{instance="{instance}"}}'))
