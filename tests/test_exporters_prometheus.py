import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from esper_telemetry.exporters import samples
from esper_telemetry.exporters.prometheus import EsperCollector
from esper_telemetry.metrics import METRICS
from tests.snapshots import NOW, Source, bad, damaged, fresh

PAGE = Path(__file__).parent / "data" / "page.txt"


@pytest.fixture
def fixed(monkeypatch):
    """Stand still: the versions and the clock of the page are given."""
    monkeypatch.setattr(samples, "version", {"esper-telemetry": "0.1.0", "torch": "2.13.0"}.__getitem__)
    monkeypatch.setattr(samples.platform, "python_version", lambda: "3.11.7")
    monkeypatch.setattr(samples.time, "monotonic", lambda: NOW)


def page(snapshot, encode=generate_latest):
    registry = CollectorRegistry()
    registry.register(EsperCollector(Source(snapshot)))
    return encode(registry).decode()


def values(snapshot):
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in parse(page(snapshot))
        for sample in family.samples
    }


@pytest.mark.usefixtures("fixed")
def test_the_whole_page_of_a_fixed_snapshot():
    assert page(damaged()) == PAGE.read_text()


@pytest.mark.usefixtures("fixed")
def test_openmetrics_says_the_same():
    shown = {
        (sample.name, *sample.labels.values()): sample.value
        for family in parse_openmetrics(page(damaged(), generate_openmetrics))
        for sample in family.samples
    }
    assert repr(shown) == repr(values(damaged()))


def test_counts_stand_at_0_and_what_was_not_measured_at_nan_from_the_start():
    shown = values(fresh())
    for name in ("esper_inf_grad_count", "esper_nan_grad_count", "esper_inf_grad_recent_max", "esper_checks_total"):
        assert shown[name,] == 0
    for kind in ("inf", "nan"):
        assert shown["esper_nonfinite_grads_total", kind] == 0
        assert math.isnan(shown["esper_last_nonfinite_timestamp_seconds", kind])
        for tier in ("warning", "critical"):
            assert shown["esper_nonfinite_checks_total", kind, tier] == 0
    for name in ("esper_grad_norm", "esper_grad_elements", "esper_dead_layers", "esper_last_check_timestamp_seconds"):
        assert math.isnan(shown[name,])


def test_a_recent_maximum_leaves_the_page_after_its_window(monkeypatch):
    for later, shown in ((119, 2), (121, 0)):
        monkeypatch.setattr(samples.time, "monotonic", lambda later=later: NOW + later)
        assert values(bad())["esper_inf_grad_recent_max",] == shown
        assert ("esper_layer_inf_grad_count", "policy.weight") in values(bad()) or shown == 0


def test_a_snapshot_that_cannot_be_read_gives_a_page_that_says_so(caplog):
    class Broken:
        @property
        def snapshot(self):
            raise RuntimeError("broken")

    registry = CollectorRegistry()
    registry.register(EsperCollector(Broken()))
    with caplog.at_level(logging.ERROR):
        generate_latest(registry)
        shown = generate_latest(registry).decode()
    assert "esper_exporter_collect_errors_total 2.0" in shown
    assert "esper_inf_grad_count" not in shown
    assert len(caplog.records) == 1


def test_registering_in_a_registry_of_ones_own_reads_nothing():
    class Untouchable:
        @property
        def snapshot(self):
            raise AssertionError

    CollectorRegistry(auto_describe=True).register(EsperCollector(Untouchable()))


def test_only_the_largest_layer_norms_have_a_series():
    names = tuple(f"layer{number}" for number in range(10_000))
    norms = [float(number) for number in range(10_000)]
    norms[5] = math.nan
    shown = values(replace(fresh(), layer_names=names, layer_norms=norms))
    layers = [key[1] for key in shown if key[0] == "esper_layer_grad_norm"]
    assert layers[:2] == ["layer5", "layer9999"]
    assert len(layers) == 50


@pytest.mark.usefixtures("fixed")
def test_every_metric_that_is_described_is_shown_and_no_other():
    described = {metric.name for metric in METRICS} - {
        "esper_exporter_scrape_duration_seconds",  # of the HTTP server
        "esper_otlp_export_failures_total",  # only pushed
        "esper_web_config_reload_failures_total",  # of the HTTP server
    }
    assert {
        family.name + ("_total" if family.type == "counter" else "") for family in parse(page(damaged()))
    } == described
