"""What is known of a trainer that does not answer outlasts its series, every window, and a restart of Prometheus."""

import time

import pytest

from tests.end_to_end.stack import LONG_WINDOWS, Stack, query, until
from tests.end_to_end.test_dashboard import job
from tests.end_to_end.test_silence import notices, wait_past_every_window

LOOKBACK = "--query.lookback-delta=15s"  # 5 minutes, in proportion
DOWN_SECONDS = 30
WINDOWS = LONG_WINDOWS | {"1d": "600s", "2m": "20s"}  # longer than in proportion, as servers take seconds to start


@pytest.fixture
def stack(tmp_path):
    with Stack(tmp_path, windows=WINDOWS, prometheus_arguments=[LOOKBACK]) as stack:
        yield stack


def firing(stack):
    """Return which instances have a page."""
    (prometheus,) = stack.prometheus
    return {
        series["metric"]["instance"]: series["metric"]["alertname"]
        for series in query(prometheus, 'ALERTS{alertstate="firing",severity="critical"}')
    }


@pytest.fixture
def listed(stack):
    """List a trainer that was killed and one that ended and went; yield their addresses."""
    (prometheus,) = stack.prometheus
    with stack.trainer() as killed, job(stack.folder / "ended.log", "--episodes", "1", "--hold") as ended:
        stack.list_trainers(killed.url, ended)
        for url in (killed.url, ended):
            stack.wait_until_scraped(url)
        until("its last word is scraped", lambda: query(prometheus, "esper_run_ended == 1"))
    until("neither answers", lambda: len(query(prometheus, 'up{job="esper"} == 0')) == 2)
    return killed.url.removeprefix("http://"), ended.removeprefix("http://")


def test_one_that_was_killed_fires_and_one_that_ended_is_silent_for_as_long_as_they_are_listed(stack, listed):
    (prometheus,) = stack.prometheus
    killed, ended = listed
    down = {killed: "EsperTargetDown"}
    until("the killed one pages", lambda: firing(stack) == down)
    wait_past_every_window(stack)
    assert firing(stack) == down

    prometheus.stop()
    time.sleep(DOWN_SECONDS)  # nothing else tells that an outage was long
    prometheus.start()
    until("the killed one pages again", lambda: firing(stack) == down)
    wait_past_every_window(stack)
    assert firing(stack) == down
    assert not [told for told in notices(stack) if ended in told], "by nothing, not even in chat"

    stack.list_trainers(ended)
    until("off the list is off the phone", lambda: not firing(stack))
    stack.list_trainers(killed, ended)
    again = f'ALERTS{{alertname="EsperTargetDown",severity="warning",instance="{killed}"}}'
    until("whoever lists it again is told that nobody answers", lambda: query(prometheus, again))
    assert firing(stack) == {}
