"""Real servers on loopback with the shipped configurations, and real trainers before them."""

import json
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from contextlib import ExitStack, contextmanager

from deploy.stack import configs, servers
from deploy.stack.pager import Pager

# The shipped windows, in proportion, so that an all-clear takes seconds.
WINDOWS = {"30s": "1s", "10s": "1s", "1m": "6s", "1m10s": "7s", "2m": "8s", "3m": "12s", "5m": "15s"}

# The rest of them, for what has to stay silent past the longest.
LONG_WINDOWS = WINDOWS | {"10m": "30s", "15m": "45s", "1h": "60s", "1d": "60s"}


class Stack:
    """Prometheus, scraping and evaluating every second, Alertmanager, and a pager."""

    def __init__(self, folder, prometheus_count=1, windows=WINDOWS, prometheus_arguments=(), leader=None):
        self.folder = folder
        self._exit = ExitStack()
        self.pager = self._exit.enter_context(Pager())
        wait = "4s" if leader else "1s"  # the ranks of a run are scraped, and seen to be bad, one after another
        config = configs.alertmanager_config(folder / "am", self.pager.url, group_wait=wait, group_interval="1s")
        self.alertmanager = self._exit.enter_context(servers.alertmanager(config, folder / "am"))
        self._folders = [folder / f"prom-{number}" for number in range(prometheus_count)]
        self.prometheus = []
        for number, home in enumerate(self._folders):
            config = configs.prometheus_config(
                home,
                self.alertmanager.url,
                rule_file=configs.rules(home, windows),
                interval="1s",
                replica=str(number),
                leader=leader,
            )
            self.prometheus.append(self._exit.enter_context(servers.prometheus(config, home, *prometheus_arguments)))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._exit.close()

    def list_trainers(self, *urls):
        """Scrape these trainers and no others."""
        for home in self._folders:
            configs.list_targets(home / "targets" / "trainers.json", [url.removeprefix("http://") for url in urls])

    def list_nodes(self, *urls):
        """Scrape these node_exporters and no others."""
        for home in self._folders:
            configs.list_targets(home / "targets" / "nodes.json", [url.removeprefix("http://") for url in urls])

    def list_collectors(self, *urls):
        """Scrape these collectors of what was pushed and no others."""
        for home in self._folders:
            configs.list_targets(home / "targets" / "collectors.json", [url.removeprefix("http://") for url in urls])

    @contextmanager
    def node_exporter(self, textfiles):
        """Run a node_exporter over a folder of textfiles, and scrape it."""
        with servers.node_exporter(textfiles, self.folder / "node") as node:
            self.list_nodes(node.url)
            self.wait_until_scraped(node.url)
            yield node

    @contextmanager
    def trainer(self, *arguments):
        """Run a trainer as a process of its own; `.url` is its exporter's."""
        command = [sys.executable, "-m", "tests.end_to_end.trainer", *arguments]
        log = (self.folder / "trainer.log").open("a")
        run = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        run.url = run.stdout.readline().strip()
        try:
            yield run
        finally:
            if run.poll() is None:
                run.kill()
            run.wait()
            for pipe in (run.stdin, run.stdout, log):
                pipe.close()

    def wait_until_scraped(self, url):
        """Wait until every Prometheus has the target up."""
        instance = url.removeprefix("http://")
        for server in self.prometheus:
            until(f"{url} is scraped", lambda server=server: query(server, f'up{{instance="{instance}"}} == 1'))

    def wait_for_page(self, seconds=120):
        """Wait for a firing page and return its alerts."""
        until("a page arrives", lambda: self.pager.pages(), seconds)
        return self.pager.pages()[0]["alerts"]

    def wait_until_resolved(self, seconds=90):
        """Wait for the all-clear; fail unless there was exactly one page before it."""
        until("the page is resolved", lambda: self.pager.pages()[-1]["status"] == "resolved", seconds)
        pages = self.pager.pages()
        assert [page["status"] for page in pages] == ["firing", "resolved"], pages


def query(server, expression):
    """Return the result of an instant query."""
    url = f"{server.url}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    with urllib.request.urlopen(url, timeout=5) as response:
        return json.load(response)["data"]["result"]


def until(what, condition, seconds=40):
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.1)


def read_until(run, check):
    """Read a trainer's output up to a check."""
    for line in run.stdout:
        if line.strip() == str(check):
            return
    raise AssertionError(f"the trainer ended before check {check}")
