"""A run's alerts at a real receiver: the project's pager, and a real Alertmanager before it."""

import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from deploy.stack import configs, servers
from deploy.stack.pager import Pager
from esper_telemetry import watch
from esper_telemetry.notify import webhook
from esper_telemetry.notify.alerts import fingerprint
from tests.documents import DOCS

NAN = {"alertname": "EsperNaNGradients"}


@pytest.fixture
def pager():
    with Pager() as pager:
        yield pager


@contextmanager
def run(url, **options):
    """Yield a function that makes a check with so many NaN, and what posts it."""
    model = nn.Linear(3, 10)
    monitor = watch(model, **{"run_id": "run-1", "recent_window_seconds": 0.5} | options)

    def check(nans=0):
        model.zero_grad()
        rows = torch.ones(10)
        rows[:nans] = math.nan
        (model.bias * rows).sum().backward()
        return monitor.snapshot

    posts = webhook(monitor, url)
    try:
        yield check, monitor, posts
    finally:
        posts.close()
        monitor.close()


def eventually(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


def statuses(pager, **labels):
    return [
        (alert["labels"]["severity"], alert["status"])
        for body in pager.pages()
        for alert in body["alerts"]
        if labels.items() <= alert["labels"].items()
    ]


def test_a_bad_check_is_posted_at_once_and_so_is_the_all_clear(pager):
    with run(f"{pager.url}/page") as (check, monitor, _):
        check()
        check(nans=6)
        eventually(lambda: statuses(pager) == [("critical", "firing")])
        check()
        eventually(lambda: statuses(pager) == [("critical", "firing"), ("critical", "resolved")])
    first, last = pager.pages()
    assert (first["version"], first["status"], last["status"]) == ("4", "firing", "resolved")
    assert first["alerts"][0]["fingerprint"] == last["alerts"][0]["fingerprint"]
    assert first["commonLabels"]["run_id"] == "run-1"
    assert first["commonAnnotations"]["summary"] == "6 NaN in the gradient of run-1:0"
    assert monitor.snapshot.monitor_errors == 0


def test_a_warning_that_gets_worse_is_over_and_a_page(pager):
    with run(f"{pager.url}/page", recent_window_seconds=120) as (check, *_):
        check(nans=1)
        eventually(lambda: statuses(pager) == [("warning", "firing")])
        check(nans=6)
        eventually(lambda: ("warning", "resolved") in statuses(pager))
    assert statuses(pager)[1:3] == [("critical", "firing"), ("warning", "resolved")]


def test_a_receiver_that_refuses_is_asked_again(pager, caplog):
    pager.answers += [503, 302]
    with run(f"{pager.url}/page", recent_window_seconds=120) as (check, _, posts):
        check(nans=6)
        eventually(lambda: statuses(pager) == [("critical", "firing")])
        assert posts.failures == 2
    assert [each.message for each in caplog.records if "failed" in each.message] == [
        f"esper: a post to {pager.url}/page failed: it answered 503: Service Unavailable"
        " (later failures are not logged)"
    ]


def test_what_came_and_went_while_nobody_listened_is_posted(pager):
    pager.answers += [503]
    with run(f"{pager.url}/page", recent_window_seconds=0.1) as (check, _, posts):
        check(nans=6)
        eventually(lambda: posts.failures)
        check()
        eventually(lambda: statuses(pager) == [("critical", "firing"), ("critical", "resolved")])


def test_a_receiver_that_never_answers_delays_neither_training_nor_the_end_for_long(caplog):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        model = nn.Linear(2, 8)
        monitor = watch(model)
        posts = webhook(monitor, f"http://127.0.0.1:{mute.getsockname()[1]}", deadline=0.5)
        for _ in range(50):
            model(torch.full((1, 2), math.nan)).sum().backward()
        assert monitor.snapshot.checks == 50
        posts.close()
        posts.close()
        monitor.close()
    assert "the last state did not reach http://127.0.0.1:" in caplog.text


def test_it_ends_with_its_monitor(pager):
    with run(f"{pager.url}/page", recent_window_seconds=120) as (check, monitor, posts):
        check(nans=6)
        eventually(lambda: statuses(pager))
        check()
        monitor.close()
        eventually(lambda: not posts._thread.is_alive())
    assert statuses(pager) == [("critical", "firing"), ("critical", "resolved")]


def test_a_password_is_sent_and_not_shown(pager):
    url = pager.url.replace("://", "://me:s%20t@") + "/page"
    with run(url) as (check, _, posts):
        check(nans=6)
        eventually(lambda: statuses(pager))
        assert posts.url == f"{pager.url}/page"
    assert pager.notices[0].authorization == "Basic bWU6cyB0"


SCRIPT = """
import math, os, sys, time, torch
from esper_telemetry import watch
from esper_telemetry.notify import webhook
model = torch.nn.Linear(2, 8)
monitor = watch(model, run_id="run-1")
webhook(monitor, sys.argv[1])
model(torch.full((1, 2), math.nan)).sum().backward()
print("checked", flush=True)
"""


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("", 0),
        ("raise RuntimeError", 1),
        ("time.sleep(60)", -signal.SIGTERM),
        ("os.fork() or os._exit(0)", 0),
    ],
)
def test_the_last_word_is_posted_however_the_process_ends(pager, end, status):
    command = [sys.executable, "-c", SCRIPT + end, f"{pager.url}/page"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        child.stdout.readline()
        if status == -signal.SIGTERM:
            child.send_signal(signal.SIGTERM)
    assert child.returncode == status
    assert statuses(pager) == [("critical", "firing")]


def test_a_forked_child_posts_nothing(pager):
    with run(f"{pager.url}/page") as (check, _, posts):
        if os.fork() == 0:
            check(nans=6)
            posts.close()
            os._exit(0)
        os.wait()
        assert statuses(pager) == []


@pytest.mark.parametrize(
    "url",
    ["", "hook", "127.0.0.1:80", "ftp://host/x", "http://", "http://host:x", "http://ho st", "http://h/\n", 7, None],
)
def test_what_is_no_url_is_one_line(url):
    with pytest.raises(
        ValueError, match=r"^webhook: expected a URL such as http://127.0.0.1:5001/alerts, got"
    ) as error:
        webhook(watch(nn.Linear(1, 1)), url)
    assert "\n" not in str(error.value)


def test_what_is_no_monitor_is_one_line():
    with pytest.raises(ValueError, match=r"^monitor: expected a monitor, as returned by watch\(model\), got Linear$"):
        webhook(nn.Linear(1, 1), "http://127.0.0.1:9/")


def test_a_real_alertmanager_takes_it_and_pages(pager, tmp_path):
    config = configs.alertmanager_config(tmp_path, pager.url, group_wait="0s", group_interval="1s")
    with servers.alertmanager(config, tmp_path) as alertmanager:
        url = f"{alertmanager.url}/api/v2/alerts"
        with run(url, recent_window_seconds=1) as (check, *_):
            check(nans=6)
            eventually(lambda: statuses(pager, **NAN) == [("critical", "firing")])
            check()
            eventually(lambda: ("critical", "resolved") in statuses(pager, **NAN))
    [alert] = pager.pages(**NAN)[0]["alerts"]
    assert alert["fingerprint"] == fingerprint(alert["labels"])
    assert pager.pages(**NAN)[0]["groupLabels"]["run"] == "run-1"


def test_what_the_documentation_shows_runs(pager, monkeypatch):
    monkeypatch.setenv("ALERT_WEBHOOK_URL", f"{pager.url}/page")
    names = {"model": nn.Linear(2, 8)}
    exec(re.search(r"```python\n(.*?)```", (DOCS / "webhook.md").read_text(), re.DOTALL)[1], names)
    names["model"](torch.full((1, 2), math.nan)).sum().backward()
    names["monitor"].close()
    eventually(lambda: statuses(pager) == [("critical", "firing")])
