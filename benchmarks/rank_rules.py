"""How long real servers take to evaluate the shipped rules over the series of very many ranks, all of them bad."""

from __future__ import annotations

import json
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

from deploy.stack import servers
from deploy.stack.configs import RULES

INTERVAL = 10  # seconds between two scrapes and between two evaluations
ROUNDS = 2  # evaluations that are measured
PAGED = 'count(ALERTS{alertname=~"EsperNaNGradients|EsperModelDamaged",alertstate="firing"})'

_CONFIG = """
global: {{scrape_interval: {interval}s, evaluation_interval: {interval}s}}
rule_files: {rules}
scrape_configs:
  - job_name: ranks
    honor_labels: true
    metric_relabel_configs: []
    static_configs: [{{targets: ["{target}"]}}]
"""


class Evaluation(NamedTuple):
    """Hold the seconds that one round of all rules took, and how many alerts on NaN and on damage fired then."""

    seconds: float
    alerts: int


def page_of(ranks: int) -> bytes:
    """Return what Prometheus would hold of a run under DDP in which 7 NaN damaged every replica, as one page."""
    now = time.time()
    lines = []
    for rank in range(ranks):
        at = f'job="esper",instance="gpu{rank // 8}:{19301 + rank % 8}",run="llama"'
        info = f'run_id="b1946ac9",rank="{rank}",world_size="{ranks}",host="gpu{rank // 8}",pid="{rank}"'
        lines += [
            f"up{{{at}}} 1",
            f"esper_run_info{{{at},{info}}} 1",
            f"esper_run_ended{{{at}}} 0",
            f"esper_inf_grad_recent_max{{{at}}} 0",
            f"esper_nan_grad_recent_max{{{at}}} 7",
            f"esper_checks_total{{{at}}} {now:.0f}",
            f"esper_last_check_timestamp_seconds{{{at}}} {now:.3f}",
            f'esper_last_nonfinite_timestamp_seconds{{{at},kind="nan"}} {now:.3f}',
            f'esper_origin_layer_info{{{at},kind="nan",layer="blocks.0.up.weight"}} 1',
            f"esper_unmeasured_layers{{{at}}} 0",
            f"esper_nonfinite_parameters{{{at}}} 7",
        ]
    zero = 'job="esper",instance="gpu0:19301",run="llama"'
    lines += [
        f"esper_global_inf_grad_recent_max{{{zero}}} 0",
        f"esper_global_nan_grad_recent_max{{{zero}}} 7",
        f"esper_bad_ranks{{{zero}}} 1",
        f"esper_ranks_expected{{{zero}}} {ranks}",
        f"esper_ranks_reporting{{{zero}}} {ranks}",
        f"esper_ranks_gone{{{zero}}} 0",
        f'esper_rank_nonfinite_grads{{{zero},rank="1",host="gpu0",kind="nan"}} 7',
        f'esper_rank_origin_layer{{{zero},rank="1",host="gpu0",layer="blocks.0.up.weight"}} 1',
        f"esper_global_model_damage{{{zero}}} 3",
        f"esper_damaged_ranks{{{zero}}} {ranks}",
        f'esper_rank_damaged_elements{{{zero},rank="0",host="gpu0",part="parameters",tensor="blocks.0.up.weight"}} 7',
    ]
    return "\n".join((*lines, "")).encode()


def in_prometheus(ranks: int, folder: Path) -> Evaluation:
    """Let Prometheus scrape the run and evaluate the rules."""
    with _exporter(ranks) as target:
        config = folder / "prometheus.yml"
        config.write_text(_CONFIG.format(interval=INTERVAL, rules=json.dumps([str(RULES)]), target=target))
        with servers.prometheus(config, folder) as server:
            _wait(lambda: _value(server.url, PAGED) >= 1)
            # One group waits for the next: the rules of a round take as long as all groups together.
            spent = [_sum_of(server.url, "prometheus_rule_group_last_duration_seconds") for _ in _rounds()]
            return Evaluation(min(spent), int(_value(server.url, PAGED)))


def in_victoria_metrics(ranks: int, folder: Path) -> Evaluation:
    """Let VictoriaMetrics scrape the run, and vmalert evaluate the rules over it."""
    vmalert = servers.find("vmalert")
    store, rules = servers.free_port(), servers.free_port()
    with _exporter(ranks) as target:
        config = folder / "scrape.yml"
        config.write_text(_CONFIG.format(interval=INTERVAL, rules="[]", target=target).replace("rule_files: []\n", ""))
        url = f"http://127.0.0.1:{store}"
        of_store = (
            f"-promscrape.config={config}",
            "-promscrape.config.strictParse=false",
            f"-storageDataPath={folder}/vm",
        )
        of_rules = (f"-rule={RULES}", f"-datasource.url={url}", f"-remoteWrite.url={url}", f"-remoteRead.url={url}")
        with (
            _process(vmalert.with_name("victoria-metrics"), store, *of_store, "-promscrape.maxScrapeSize=256MB"),
            _process(vmalert, rules, *of_rules, f"-evaluationInterval={INTERVAL}s", "-notifier.blackhole"),
        ):
            _wait(lambda: _value(url, PAGED) >= 1)
            spent = [_vmalert_seconds(f"http://127.0.0.1:{rules}") for _ in _rounds()]
            return Evaluation(min(spent), int(_value(url, PAGED)))


def _rounds() -> Iterator[int]:
    for number in range(ROUNDS):
        time.sleep(INTERVAL)
        yield number


@contextmanager
def _exporter(ranks: int) -> Iterator[str]:
    """Serve the series of all ranks at one address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = page_of(ranks)
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            with suppress(OSError):
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def _process(program: Path, port: int, *arguments: str) -> Iterator[None]:
    command = [str(program), f"-httpListenAddr=127.0.0.1:{port}", *arguments]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        run.terminate()
        run.wait()


def _wait(condition: object, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with suppress(OSError, ValueError):
            if condition():  # type: ignore[operator]
                return
        if time.monotonic() > deadline:
            raise TimeoutError(f"no alert within {seconds:.0f} s")
        time.sleep(1)


def _value(url: str, expression: str) -> float:
    asked = urllib.parse.urlencode({"query": expression})
    with urllib.request.urlopen(f"{url}/api/v1/query?{asked}", timeout=60) as response:
        result = json.load(response)["data"]["result"]
    return float(result[0]["value"][1]) if result else 0.0


def _sum_of(url: str, metric: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as page:
        lines = page.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{metric}{{"))


def _vmalert_seconds(url: str) -> float:
    """Return the mean seconds of one round: what all groups have taken together, over the rounds so far."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as page:
        lines = page.read().decode().splitlines()

    def total(name: str) -> dict[str, float]:
        found = (line for line in lines if line.startswith(f"{name}{{"))
        return {line.rsplit(" ", 1)[0].removeprefix(name): float(line.rsplit(" ", 1)[1]) for line in found}

    sums, counts = total("vmalert_iteration_duration_seconds_sum"), total("vmalert_iteration_duration_seconds_count")
    return sum(sums[group] / counts[group] for group in sums if counts.get(group))
