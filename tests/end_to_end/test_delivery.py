"""One critical page with the right count and layer, then an all-clear, whenever the bad check falls."""

import signal

import pytest

from tests.end_to_end.stack import WINDOWS, Stack, query, read_until, until

# Prometheus takes up to 5 s to see that a trainer was put on the list, and longer on a busy machine.
FAULT = ("--inject", "inf:7@3:2.weight", "--window", "10")

# Prometheus takes up to 5 s to see that a trainer was taken off the list; until then it must not count as gone.
PATIENT = WINDOWS | {"1m": "12s", "1m10s": "13s", "2m": "14s", "3m": "16s", "5m": "19s"}


@pytest.fixture
def stack(tmp_path):
    with Stack(tmp_path, windows=PATIENT) as stack:
        yield stack


def assert_one_page(stack, count=7, kind="Inf", layer="2.weight"):
    (alert,) = stack.wait_for_page()
    assert alert["labels"]["alertname"] == f"Esper{kind}Gradients"
    assert alert["labels"]["severity"] == "critical"
    assert alert["annotations"]["summary"].startswith(f"{count} {kind} ")
    assert layer in alert["annotations"]["description"]
    stack.wait_until_resolved()


def test_before_the_first_scrape(stack):
    with stack.trainer(*FAULT, "--window", "20") as run:  # a busy Prometheus may take seconds to see a new target
        read_until(run, 4)
        stack.list_trainers(run.url)
        assert_one_page(stack)


def test_between_two_scrapes(stack):
    with stack.trainer(*FAULT, "--wait", "--pause", "0.001") as run:
        stack.list_trainers(run.url)
        stack.wait_until_scraped(run.url)
        run.stdin.write("\n")
        run.stdin.flush()
        read_until(run, 20)  # some 20 ms later it is long over
        assert_one_page(stack)


def test_in_the_last_millisecond_before_a_normal_exit(stack):
    with stack.trainer(*FAULT, "--wait", "--checks", "3", "--pause", "0") as run:
        stack.list_trainers(run.url)
        stack.wait_until_scraped(run.url)
        run.stdin.write("\n")
        run.stdin.flush()
        assert run.wait(30) == 0
        stack.list_trainers()
        assert_one_page(stack)


def test_at_halt(stack):
    with stack.trainer(*FAULT, "--wait", "--on-critical", "halt") as run:
        stack.list_trainers(run.url)
        stack.wait_until_scraped(run.url)
        run.stdin.write("\n")
        run.stdin.flush()
        assert run.wait(30) == 1
        stack.list_trainers()
        assert_one_page(stack)


def test_at_sigterm(stack):
    with stack.trainer(*FAULT) as run:
        read_until(run, 3)
        run.send_signal(signal.SIGTERM)
        stack.list_trainers(run.url)
        assert run.wait(30) == -signal.SIGTERM
        stack.list_trainers()
        assert_one_page(stack)


def test_at_sigkill_right_after_the_bad_check(stack, tmp_path):
    textfiles = tmp_path / "textfiles"
    textfiles.mkdir()
    with (
        stack.node_exporter(textfiles),
        stack.trainer(*FAULT, "--textfile-dir", str(textfiles), "--kill-at", "3") as run,
    ):
        assert run.wait(30) == -signal.SIGKILL
        assert_one_page(stack)


def test_on_a_restarted_trainer_on_the_same_port_with_the_same_counters(stack):
    with stack.trainer(*FAULT) as run:
        url = run.url
        stack.list_trainers(url)
        stack.wait_for_page()
        run.kill()
        run.wait()
    stack.list_trainers()
    stack.wait_until_resolved()
    stack.pager.notices.clear()
    with stack.trainer(*FAULT, "--address", url.removeprefix("http://")) as run:
        stack.list_trainers(run.url)
        assert_one_page(stack)


def test_while_prometheus_is_down_for_20_seconds(stack):
    (prometheus,) = stack.prometheus
    with stack.trainer(*FAULT, "--wait", "--window", "40") as run:
        stack.list_trainers(run.url)
        stack.wait_until_scraped(run.url)
        prometheus.stop()
        run.stdin.write("\n")
        run.stdin.flush()
        read_until(run, 900)  # at 20 ms a step
        prometheus.start()
        (alert,) = stack.wait_for_page()
        assert alert["annotations"]["summary"].startswith("7 Inf ")
        stack.wait_until_resolved()


def test_two_prometheus_servers_give_one_page(tmp_path):
    patient = Stack(tmp_path, prometheus_count=2, windows=PATIENT)
    with patient as stack, stack.trainer(*FAULT, "--window", "20") as run:  # both may take seconds to see the target
        stack.list_trainers(run.url)
        for server in stack.prometheus:
            until("both fire", lambda server=server: query(server, 'ALERTS{alertname="EsperInfGradients"}'))
        assert_one_page(stack)


@pytest.mark.parametrize(("count", "severity"), [(5, "warning"), (6, "critical")])
def test_five_warns_and_six_pages(stack, count, severity):
    with stack.trainer("--inject", f"nan:{count}@3:0.weight", "--window", "20") as run:  # a busy Prometheus is late
        stack.list_trainers(run.url)
        if severity == "critical":
            assert_one_page(stack, 6, "NaN", "0.weight")
            return
        chats = lambda: [notice for notice in stack.pager.notices if notice.path == "/slack"]  # noqa: E731
        until("the chat hears of it", chats)
        assert "5 NaN" in str(chats()[0].body)
        assert stack.pager.pages() == []
