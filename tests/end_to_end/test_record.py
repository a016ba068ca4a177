"""TELE-301: a count that was right in the layer, lost in the sum, and hard-coded to 0 on its way to the screen.

Each test goes from a bad element in a real gradient to the page over HTTP.
"""

import math
import urllib.request

import torch
from prometheus_client.parser import text_string_to_metric_families as parse
from torch import nn

from esper_telemetry import (
    aggregate_layer_gradient_health,
    collect_per_layer_gradients,
    start_exporter,
    watch,
)
from esper_telemetry.reference.faults import Fault
from esper_telemetry.reference.ppo import Options, PPOJob


class Silent:
    def progress(self, episodes, snapshot):
        pass

    def close(self):
        pass


def scrape(exporter):
    with urllib.request.urlopen(f"{exporter.url}/metrics", timeout=10) as page:
        families = parse(page.read().decode())
    return {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}


def test_counts_of_several_layers_arrive_as_their_sum():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))

    def spoil(_):
        model[0].weight.grad[0, :2] = math.inf
        model[1].weight.grad[0, :3] = -math.inf
        model[1].bias.grad[:2] = math.nan
        model[2].bias.grad[0] = math.nan

    monitor = watch(model, before_check=spoil)
    exporter = start_exporter(monitor, "127.0.0.1:0")
    model(torch.ones(1, 4)).sum().backward()
    page = scrape(exporter)
    exporter.close()
    layers = {name: int(page["esper_layer_inf_grad_count", name]) for name in ("0.weight", "1.weight")}
    assert layers == {"0.weight": 2, "1.weight": 3}
    assert (page["esper_inf_grad_count",], page["esper_nan_grad_count",]) == (5, 3)
    health = aggregate_layer_gradient_health(collect_per_layer_gradients(model))
    assert (health.inf_grad_count, health.nan_grad_count) == (5, 3)


def test_the_count_of_a_ppo_update_arrives_and_is_no_constant():
    for kind, other in (("inf", "nan"), ("nan", "inf")):
        fault = Fault(kind, 7, 41, "action_net.weight")
        job = PPOJob(Options(episodes=4, listen_address="127.0.0.1:0", inject=[fault], on_critical="halt"))
        before = scrape(job.exporter)
        assert before[f"esper_{kind}_grad_count",] == 0
        job.train(Silent())
        page = scrape(job.exporter)
        job.exporter.close()
        assert (page[f"esper_{kind}_grad_count",], page[f"esper_{other}_grad_count",]) == (7, 0)
        assert (page[f"esper_ppo_{kind}_grads",], page[f"esper_ppo_{other}_grads",]) == (7, 0)
        assert page["esper_ppo_updates_total",] == 2
        assert page["esper_origin_layer_info", kind, "action_net.weight"] == 1
