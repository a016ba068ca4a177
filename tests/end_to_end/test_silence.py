"""Nothing to hear: what only looks like trouble reaches neither the pager nor the chat."""

import re
import signal
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.end_to_end.stack import LONG_WINDOWS, Stack, query, read_until, until

LONGEST = 60  # seconds, of LONG_WINDOWS
FORS = 10  # the longest `for` after a window was left


@pytest.fixture
def stack(tmp_path):
    with Stack(tmp_path, windows=LONG_WINDOWS) as stack:
        yield stack


def notices(stack):
    """Return what was heard but the Watchdog's heartbeat."""
    return [f"{notice.path} {notice.body}" for notice in stack.pager.notices if notice.path != "/alive"]


def wait_past_every_window(stack):
    last = iterations(stack) + LONGEST + FORS
    until("every window has passed", lambda: iterations(stack) >= last, 2 * LONGEST)
    until("the heartbeat arrives", lambda: any(notice.path == "/alive" for notice in stack.pager.notices))


def iterations(stack):
    """Return how often the group of rules that was evaluated least was, by the server's own metrics."""
    with urllib.request.urlopen(f"{stack.prometheus[0].url}/metrics", timeout=5) as response:
        page = response.read().decode()
    counts = re.findall(r'^prometheus_rule_group_iterations_total\{rule_group=".*;esper-.*"\} (\S+)$', page, re.M)
    return min(map(float, counts))


def shown(stack, run, metric):
    """Return the last scraped value of a trainer's metric."""
    (prometheus,) = stack.prometheus
    instance = run.url.removeprefix("http://")
    ((_, value),) = (
        series["value"] for series in query(prometheus, f'last_over_time({metric}{{instance="{instance}"}}[60s])')
    )
    return float(value)


def children(run):
    return [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]


def listens(pid, port):
    """Tell whether a process holds a socket that listens on a port."""
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    inodes = {row[9] for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port}
    held = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            held.append(str(descriptor.readlink()))
        except FileNotFoundError:
            continue
    return any(f"socket:[{inode}]" in held for inode in inodes)


def workers_seen(run):
    """Return how many forked workers were caught alive, and fail on one that holds on to the exporter's port."""
    port = int(run.url.rpartition(":")[2])
    assert listens(run.pid, port)
    seen = set()
    for _ in range(10):
        forked = children(run)
        time.sleep(0.3)  # right after the fork they hold everything
        for child in forked:
            try:
                assert not listens(child, port)
            except (FileNotFoundError, ProcessLookupError):
                continue
            seen.add(child)
    return len(seen)


def test_only_the_heartbeat_is_heard_past_every_window(stack):
    (prometheus,) = stack.prometheus
    with ExitStack() as exits:
        start = lambda *arguments: exits.enter_context(stack.trainer(*arguments))  # noqa: E731
        healthy = start()
        huge = start("--huge", "4")
        forked = start("--workers", "2", "--pause", "0.2")
        slow = start()
        runs = healthy, huge, forked, slow
        stack.list_trainers(*(run.url for run in runs))
        for run in runs:
            stack.wait_until_scraped(run.url)

        slow.send_signal(signal.SIGSTOP)
        instance = slow.url.removeprefix("http://")
        until("a scrape times out", lambda: query(prometheus, f'up{{instance="{instance}"}} == 0'))
        slow.send_signal(signal.SIGCONT)
        stack.wait_until_scraped(slow.url)

        assert workers_seen(forked) >= 2
        wait_past_every_window(stack)
        assert notices(stack) == []

        # Silence meant something: all of them were looked at, and the same rules speak when one dies.
        for run in runs:
            assert shown(stack, run, "esper_inf_grad_recent_max") == shown(stack, run, "esper_nan_grad_recent_max") == 0
            assert shown(stack, run, "esper_checks_total") > 100
        assert shown(stack, healthy, "esper_exploding_layers") == 0
        healthy.kill()
        (alert,) = stack.wait_for_page()
        assert alert["labels"]["alertname"] == "EsperTargetDown"
        assert alert["labels"]["instance"] == healthy.url.removeprefix("http://")


def test_a_run_that_ended_well_and_was_taken_off_the_list(stack):
    with stack.trainer("--checks", "300") as run:
        stack.list_trainers(run.url)
        stack.wait_until_scraped(run.url)
        read_until(run, 300)
        assert run.wait(30) == 0
        stack.list_trainers()
        wait_past_every_window(stack)
        assert notices(stack) == []
