"""What is broken beside the trainer is said clearly, once, and loses nothing else."""

import json
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from tests.end_to_end.stack import Stack, read_until, until

FAULT = ("--inject", "inf:7@3:2.weight", "--wait")


@pytest.fixture
def stack(tmp_path):
    with Stack(tmp_path) as stack:
        yield stack


def begin(run):
    run.stdin.write("\n")
    run.stdin.flush()


def alertmanagers(prometheus):
    with urllib.request.urlopen(f"{prometheus.url}/api/v1/alertmanagers", timeout=5) as response:
        return json.load(response)["data"]["activeAlertmanagers"]


def warnings(stack):
    """Return what the trainer logged about its textfile."""
    return [line for line in (stack.folder / "trainer.log").read_text().splitlines() if "cannot be written" in line]


def assert_one_page(stack):
    (alert,) = stack.wait_for_page()
    assert alert["annotations"]["summary"].startswith("7 Inf ")
    stack.wait_until_resolved()


def test_rules_edited_into_nonsense_are_refused_and_the_old_ones_still_page(stack, tmp_path):
    (prometheus,) = stack.prometheus
    with stack.trainer(*FAULT) as run:
        stack.list_trainers(run.url)
        stack.wait_until_scraped(run.url)
        rules = tmp_path / "prom-0" / "rules.yml"
        rules.write_text(rules.read_text().replace("max_over_time(", "max_over_tine("))
        request = urllib.request.Request(f"{prometheus.url}/-/reload", method="POST")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=10)
        assert refused.value.code == 500
        refused.value.close()
        assert "max_over_tine" in prometheus.log.read_text()
        with urllib.request.urlopen(f"{prometheus.url}/metrics", timeout=10) as page:
            assert b"\nprometheus_config_last_reload_successful 0\n" in page.read()
        # A reload forgets Alertmanager for some seconds; what fires meanwhile is sent again only after a minute.
        until("Alertmanager is found again", lambda: alertmanagers(prometheus))
        begin(run)
        assert_one_page(stack)


def test_a_webhook_that_answers_500_gets_the_page_by_retry_and_accepts_it_once(stack):
    stack.pager.answers = [500, 500, 500]
    with stack.trainer(*FAULT) as run:
        stack.list_trainers(run.url)
        stack.wait_until_scraped(run.url)
        begin(run)
        assert_one_page(stack)
        assert stack.pager.answers == []


@pytest.fixture
def tiny(tmp_path):
    """Mount a file system of 64 KiB."""
    folder = tmp_path / "textfiles"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a small file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(folder):
    try:
        with (folder / "full").open("wb", buffering=0) as file:
            while file.write(b"0" * 4096):
                pass
    except OSError:
        pass


def make_read_only(folder):
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)


@pytest.mark.parametrize("spoil", [fill, make_read_only], ids=["full", "read-only"])
def test_a_textfile_folder_that_is_spoiled_meanwhile(stack, tiny, spoil):
    with stack.trainer(*FAULT, "--textfile-dir", str(tiny)) as run:
        assert_only_the_file_is_lost(stack, run, tiny, spoil)


def test_a_textfile_folder_that_is_removed_meanwhile(stack, tmp_path):
    folder = tmp_path / "textfiles"
    folder.mkdir()

    def replace_by_a_file(folder):
        folder.rename(tmp_path / "moved")
        folder.write_text("")

    with stack.trainer(*FAULT, "--textfile-dir", str(folder)) as run:
        assert_only_the_file_is_lost(stack, run, folder, replace_by_a_file)


def assert_only_the_file_is_lost(stack, run, folder, spoil):
    stack.list_trainers(run.url)
    stack.wait_until_scraped(run.url)
    assert list(folder.glob("*.prom"))
    spoil(folder)
    begin(run)
    assert_one_page(stack)
    read_until(run, 400)  # it trains on, past the next writes
    assert run.poll() is None
    (line,) = warnings(stack)
    assert str(folder) in line
    assert "Traceback" not in (stack.folder / "trainer.log").read_text()


def test_a_textfile_folder_that_is_none_is_said_before_training(tmp_path):
    command = [sys.executable, "-m", "tests.end_to_end.trainer", "--checks", "3", "--textfile-dir", tmp_path / "none"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 1
    assert "textfile-dir: expected a writable folder" in run.stderr.splitlines()[-1]
    assert run.stdout == ""
