import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from urllib.request import urlopen

import pytest
import torch
from torch import nn

from deploy.stack.servers import free_port
from esper_telemetry import watch
from esper_telemetry.integrations.run import Runs
from tests.pages import close_pages, scrape


@pytest.fixture(autouse=True)
def closed_pages():
    yield
    close_pages()


@pytest.fixture
def address():
    return f"127.0.0.1:{free_port()}"


@pytest.fixture
def elsewhere():
    """Run something in another thread, always the same one, which goes on living."""
    with ThreadPoolExecutor(1) as pool:
        yield lambda function, *args: pool.submit(function, *args).result(60)


def begin(runs, model=None, value=1.0):
    model = nn.Linear(1, 1) if model is None else model
    monitor = runs.begin(model, lambda: watch(model))
    model(torch.full((1, 1), value)).sum().backward()
    return monitor


SCRIPT = """
import torch
from stable_baselines3 import PPO

from esper_telemetry.integrations.sb3 import EsperCallback
from esper_telemetry.reference.faults import Fault, FaultInjector

torch.set_num_threads(1)
model = PPO("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=16, n_epochs=1, device="cpu")
injector = FaultInjector(model.policy, [Fault("nan", 7, 2)])
callback = EsperCallback(address="127.0.0.1:0", on_critical="skip", before_check=injector)
model.learn(32, callback=callback)
print(callback.exporter.url, flush=True)
"""


def test_the_wait_for_a_scrape_of_something_bad_belongs_to_the_end_of_the_process():
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        url = process.stdout.readline().strip()  # learn() has returned
        waiting = next(line for line in process.stderr if "waiting for" in line)
        assert f"{url}/metrics" in waiting
        with urlopen(f"{url}/metrics", timeout=10) as page:
            assert b"\nesper_nan_grad_recent_max 7.0\n" in page.read()
        assert process.wait(10) == 0


def test_each_of_two_that_train_at_a_time_comes_back_to_its_own_page(address, elsewhere):
    here, there = Runs(address, strict=False), Runs(address, strict=False)
    running = begin(here)
    elsewhere(begin, there).close()
    running.close()
    pages = here.exporter, there.exporter
    elsewhere(begin, there)
    begin(here)
    assert (here.exporter, there.exporter) == pages
    assert pages[0] is not pages[1]


def test_strict_refuses_an_address_where_another_thread_trains(address, elsewhere):
    elsewhere(begin, Runs(address, strict=False))
    model = nn.Linear(1, 1)
    with pytest.raises(OSError, match="shows another run of this process that is still training"):
        begin(Runs(address, strict=True), model)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_a_thread_that_died_leaves_its_page(address, elsewhere, caplog):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(begin, first := Runs(address, strict=False)).result(60)
    begin(second := Runs(address, strict=False))
    assert second.exporter is first.exporter
    assert scrape(second.exporter)["esper_checks_total"] == 2
    assert "the previous one did not end" in caplog.text


def test_a_page_that_its_user_has_closed_is_made_anew_and_counts_on(address):
    runs = Runs(address, strict=False)
    begin(runs).close()
    runs.exporter.close(linger=0)
    begin(runs)
    assert scrape(runs.exporter)["esper_checks_total"] == 2


def test_what_was_bad_in_a_run_is_waited_for_after_good_ones_too(address):
    runs = Runs(address, strict=False)
    begin(runs, value=math.nan).close()
    begin(runs).close()
    assert not runs.exporter.linger(0)
    scrape(runs.exporter)
    assert runs.exporter.linger(60)


def test_a_port_alone_is_one_on_loopback(address):
    runs, same = Runs(int(address.partition(":")[2]), strict=True), Runs(address, strict=True)
    begin(runs).close()
    begin(same)
    assert runs.exporter is same.exporter
    assert runs.exporter.url.endswith(address)


def test_a_monitor_that_the_user_made_is_shown_as_it_is_and_left_open(address):
    runs = Runs(address, strict=False)
    begin(runs).close()
    given = watch(nn.Linear(1, 1))
    runs.show(given)
    assert scrape(runs.exporter)["esper_checks_total"] == 0
    assert runs.exporter.linger(60)
    begin(runs)
    assert not given.snapshot.ended
