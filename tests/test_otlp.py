"""What is really sent over OTLP, when, and what becomes of a collector that is not there."""

import logging
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from opentelemetry import metrics as opentelemetry_metrics
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.sdk.resources import Resource
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families as parse

from esper_telemetry import start_otlp
from esper_telemetry.exporters.bell import Bell
from esper_telemetry.exporters.otlp import environment
from esper_telemetry.exporters.otlp.points import metrics_data
from esper_telemetry.exporters.prometheus import EsperCollector
from esper_telemetry.snapshot.recent import RecentWindow
from tests.otlp_receiver import Receiver, server_tls
from tests.snapshots import Source, bad, fresh

HOUR = str(3600 * 1000)
OURS = {"esper_otlp_export_failures_total"}  # a page that is scraped does not know


class Run(Source):
    """A monitor whose checks are made by hand."""

    def __init__(self, snapshot):
        super().__init__(snapshot)
        self.listeners = []

    def on_check(self, listener):
        self.listeners.append(listener)
        return lambda: self.listeners.remove(listener)

    def check(self, snapshot):
        self.snapshot = snapshot
        for listener in self.listeners:
            listener(snapshot)


@pytest.fixture(autouse=True)
def environ(monkeypatch):
    """Begin without a variable of the user's, and with pushes that something causes and no others."""
    for name in os.environ:
        if name.startswith("OTEL_") or name.endswith("_CA_BUNDLE") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", HOUR)
    yield monkeypatch
    logging.getLogger("esper_telemetry.otlp").setLevel(logging.NOTSET)


@pytest.fixture
def receiver():
    with Receiver() as receiver:
        yield receiver


@pytest.fixture
def run():
    return Run(fresh())


def pushed(receiver, snapshot):
    """Return the only push of an exporter that is closed at once."""
    start_otlp(Run(snapshot), receiver.url).close()
    return receiver.pushes[-1]


def series(page):
    """Return a page as {(name, labels): value}; NaN by its name, so that it equals itself."""
    return {
        (sample.name, *sorted(sample.labels.items())): "NaN" if math.isnan(sample.value) else sample.value
        for family in parse(page)
        for sample in family.samples
    }


def scraped(source):
    registry = CollectorRegistry()
    registry.register(EsperCollector(source))
    return series(generate_latest(registry).decode())


@pytest.mark.parametrize("snapshot", [fresh(), bad(), bad(inf=0, nan=7)], ids=["fresh", "inf", "nan"])
def test_what_arrives_has_the_names_labels_and_values_of_what_is_scraped(receiver, snapshot):
    snapshot = replace(snapshot, recent=RecentWindow(120.0).after(time.monotonic(), snapshot.layers, 1))
    page = series(pushed(receiver, snapshot).page())
    origin = {("job", "esper/esper-telemetry"), ("instance", "run-1:0")}
    assert all(origin <= set(key[1:]) for key in page)
    arrived = {tuple(part for part in key if part not in origin): value for key, value in page.items()}
    assert {key for key in arrived if key[0] in OURS} == {(name,) for name in OURS}
    assert {key: value for key, value in arrived.items() if key[0] not in OURS} == scraped(Source(snapshot))


def test_names_have_dots_and_counts_are_integers_of_elements(receiver):
    push = pushed(receiver, replace(bad(), inf_grad_count=2**53 + 1))
    (point,) = (point for point in push.points if point.name == "esper.inf_grad_count")
    assert (point.type, point.unit, point.labels, point.value) == ("gauge", "{element}", {}, 2**53 + 1)
    units = {point.name: point.unit for point in push.points}
    assert (units["esper.checks"], units["esper.monitor_seconds"], units["esper.run_ended"]) == ("{check}", "s", "")
    assert "1" not in units.values()


def test_points_say_when_and_counters_since_when(receiver):
    before = time.time_ns()
    push = pushed(receiver, bad())
    for point in push.points:
        assert before <= point.time <= time.time_ns()
        assert (before <= point.start < point.time) if point.type == "counter" else point.start == 0


def test_the_resource_is_the_run(receiver):
    resource = pushed(receiver, fresh()).resource
    assert resource["service.name"] == "esper-telemetry"
    assert resource["service.namespace"] == "esper"
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", resource["service.version"])
    assert resource["service.instance.id"] == "run-1:0"
    assert resource["host.name"] == "box"


def test_resource_attributes_of_the_environment_come_first(receiver, environ):
    environ.setenv("OTEL_SERVICE_NAME", "trainer")
    environ.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.namespace=ml,host.name=gpu7,team=a,service.name=not-this")
    resource = pushed(receiver, fresh()).resource
    assert (resource["service.name"], resource["service.namespace"]) == ("trainer", "ml")
    assert (resource["host.name"], resource["team"]) == ("gpu7", "a")
    assert resource["service.instance.id"] == "run-1:0"


@pytest.mark.parametrize(("world_size", "instance"), [(1, "pod-1"), (8, "pod-1:3")])
def test_an_instance_of_the_environment_is_shared_by_ranks_and_gets_theirs(receiver, environ, world_size, instance):
    environ.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.instance.id=pod-1")
    run = replace(fresh().run, rank=3, world_size=world_size)
    assert pushed(receiver, replace(fresh(), run=run)).resource["service.instance.id"] == instance


def test_nobody_elses_meter_provider_is_touched(receiver):
    before = opentelemetry_metrics.get_meter_provider()
    pushed(receiver, fresh())
    assert opentelemetry_metrics.get_meter_provider() is before


def test_a_bad_check_is_pushed_at_once_and_a_healthy_one_can_wait(receiver, run):
    with closing(start_otlp(run, receiver.url)):
        receiver.wait(lambda push: push.value("esper.checks") == 0)
        run.check(replace(fresh(), checks=1))
        time.sleep(0.2)  # some hundred times what a push takes
        run.check(bad())
        receiver.wait(lambda push: push.value("esper.inf_grad_count") == 2)
        assert [push.value("esper.checks") for push in receiver.pushes] == [0, 40]


def test_bad_checks_without_end_are_pushed_every_second_at_most_and_none_is_lost(receiver, run):
    with closing(start_otlp(run, receiver.url)):
        began, checks = time.monotonic(), 0
        while time.monotonic() < began + 1.5:
            checks += 1
            run.check(replace(bad(), checks=checks))
        receiver.wait(lambda push: push.value("esper.checks") == checks)
        assert len(receiver.pushes) <= 3 + (time.monotonic() - began)


def test_the_interval_is_honoured(receiver, run, environ):
    environ.setenv("OTEL_METRIC_EXPORT_INTERVAL", "20")
    with closing(start_otlp(run, receiver.url)):
        run.check(replace(fresh(), checks=1))
        receiver.wait(lambda push: push.value("esper.checks") == 1)
        run.check(replace(fresh(), checks=2))
        receiver.wait(lambda push: push.value("esper.checks") == 2)


def test_the_interval_is_from_the_start_of_a_push_to_the_next(receiver, run, environ):
    environ.setenv("OTEL_METRIC_EXPORT_INTERVAL", "400")
    receiver.seconds = 0.3
    with closing(start_otlp(run, receiver.url)):
        receiver.wait(lambda push: len(receiver.pushes) == 4)
    times = [push.points[0].time / 1e9 for push in receiver.pushes[:4]]
    assert times[3] - times[0] < 3 * 0.55


def test_a_series_that_is_gone_is_nan_once(receiver, run):
    run.check(bad())
    with closing(start_otlp(run, receiver.url)):
        receiver.wait(lambda push: push.value("esper.layer_grad_norm", layer="policy.bias") == 0.5)
        run.check(replace(bad(), layer_norms=(1.0, None, None)))
        receiver.wait(lambda push: math.isnan(push.value("esper.layer_grad_norm", layer="policy.bias")))
    last = receiver.pushes[-1]
    assert [point.labels for point in last.points if point.name == "esper.layer_grad_norm"] == [
        {"layer": "policy.weight"}
    ]


def test_the_last_state_is_pushed_at_close(receiver, run):
    exporter = start_otlp(run, receiver.url)
    run.check(replace(fresh(), checks=9, ended=True))
    exporter.close()
    exporter.close()
    last = receiver.pushes[-1]
    assert (last.value("esper.checks"), last.value("esper.run_ended")) == (9, 1)
    assert run.listeners == []
    run.check(bad())
    assert receiver.pushes[-1] is last


@pytest.mark.parametrize("variable", ["OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_METRICS_HEADERS"])
def test_headers_are_sent(receiver, environ, variable):
    environ.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-team=not-this")
    environ.setenv(variable, " authorization = Bearer%20abc== , X-Team=ml,")
    push = pushed(receiver, fresh())
    assert (push.headers["authorization"], push.headers["x-team"]) == ("Bearer abc==", "ml")
    assert (push.path, push.headers["content-type"]) == ("/v1/metrics", "application/x-protobuf")


@pytest.mark.parametrize("text", ["secret", "a b=secret", "=secret", "a=secret%0Ab: c", "a=secret,secret"])
def test_a_header_that_is_none_is_said_and_not_shown(run, environ, text):
    environ.setenv("OTEL_EXPORTER_OTLP_HEADERS", text)
    with pytest.raises(ValueError, match="OTEL_EXPORTER_OTLP_HEADERS: expected key=value,key=value, got") as error:
        start_otlp(run)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("all_signals", "of_metrics", "encoding"),
    [
        ("gzip", "", "gzip"),
        ("GZIP", "", "gzip"),
        ("deflate", "", "deflate"),
        ("none", "gzip", "gzip"),
        ("gzip", "none", None),
        ("", "", None),
    ],
)
def test_compression_is_as_the_environment_says(receiver, environ, all_signals, of_metrics, encoding):
    environ.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", all_signals)
    environ.setenv("OTEL_EXPORTER_OTLP_METRICS_COMPRESSION", of_metrics)
    push = pushed(receiver, bad())
    assert push.headers.get("content-encoding") == encoding
    assert push.value("esper.inf_grad_count") == 2


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("OTEL_SDK_DISABLED", "True", "OTEL_SDK_DISABLED is true"),
        ("OTEL_METRICS_EXPORTER", "none", "OTEL_METRICS_EXPORTER is none"),
        ("OTEL_METRICS_EXPORTER", "console, prometheus", "OTEL_METRICS_EXPORTER is console,prometheus"),
    ],
)
def test_where_the_environment_is_against_it_nothing_is_pushed(receiver, run, environ, caplog, name, value, reason):
    environ.setenv(name, value)
    exporter = start_otlp(run, receiver.url)
    run.check(bad())
    exporter.close()
    assert (receiver.pushes, run.listeners, exporter.failures) == ([], [], 0)
    assert caplog.messages == [f"esper: nothing is pushed to {receiver.url}/v1/metrics: {reason}"]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("OTEL_SDK_DISABLED", "yes", "expected true or false; 'yes' is ignored"),
        ("OTEL_METRICS_EXPORTER", "zipkin", "expected otlp or prometheus or console or none; 'zipkin' is ignored"),
        ("OTEL_METRICS_EXPORTER", "otlp,console", "esper pushes over OTLP and prints nothing to the console"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "zstd", "expected gzip or deflate or none; 'zstd' is ignored"),
        (
            "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE",
            "mixed",
            "expected cumulative or delta or lowmemory; 'mixed' is ignored",
        ),
        (
            "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION",
            "some",
            "expected explicit_bucket_histogram or base2_exponential_bucket_histogram; 'some' is ignored",
        ),
        ("OTEL_METRICS_EXEMPLAR_FILTER", "all", "expected always_on or always_off or trace_based; 'all' is ignored"),
        ("OTEL_METRICS_EXEMPLAR_FILTER", "always_on", "esper pushes no exemplars"),
        ("OTEL_LOG_LEVEL", "loud", "expected debug or info or warn or error or none; 'loud' is ignored"),
        ("OTEL_RESOURCE_ATTRIBUTES", "team", "Invalid key value resource attribute pair team: "),
        ("OTEL_CONFIG_FILE", "otel.yaml", " is not supported; the other variables still apply"),
        ("OTEL_EXPERIMENTAL_CONFIG_FILE", "otel.yaml", " is not supported; the other variables still apply"),
    ],
)
def test_what_cannot_be_obeyed_is_one_line_and_it_pushes(receiver, environ, caplog, name, value, said):
    environ.setenv(name, value)
    assert pushed(receiver, fresh())
    (message,) = caplog.messages
    assert message.startswith(f"esper: {name}")
    assert said in message


OF_THE_EXPORTER = [
    *("ENDPOINT", "PROTOCOL", "HEADERS", "COMPRESSION", "TIMEOUT", "INSECURE"),
    *("CERTIFICATE", "CLIENT_CERTIFICATE", "CLIENT_KEY"),
]
ALL = [
    *("OTEL_SDK_DISABLED", "OTEL_METRICS_EXPORTER", "OTEL_RESOURCE_ATTRIBUTES", "OTEL_SERVICE_NAME", "OTEL_LOG_LEVEL"),
    *("OTEL_METRIC_EXPORT_INTERVAL", "OTEL_METRIC_EXPORT_TIMEOUT", "OTEL_METRICS_EXEMPLAR_FILTER", "OTEL_CONFIG_FILE"),
    "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE",
    "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION",
    *(f"OTEL_EXPORTER_OTLP_{name}" for name in OF_THE_EXPORTER),
    *(f"OTEL_EXPORTER_OTLP_METRICS_{name}" for name in OF_THE_EXPORTER),
]


def test_an_empty_variable_is_unset(receiver, environ, caplog):
    for name in ALL:
        environ.setenv(name, "")
    assert pushed(receiver, fresh()).resource["service.name"] == "esper-telemetry"
    assert caplog.messages == []


def test_what_is_about_other_things_is_said_to_nobody(receiver, environ, caplog):
    for name, value in {
        "OTEL_METRICS_EXEMPLAR_FILTER": "trace_based",
        "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION": "base2_exponential_bucket_histogram",
        "OTEL_EXPORTER_OTLP_INSECURE": "false",
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc",
        "OTEL_ATTRIBUTE_COUNT_LIMIT": "1",
        "OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT": "1",
    }.items():
        environ.setenv(name, value)
    push = pushed(receiver, bad())
    assert push.value("esper.layer_grad_norm", layer="policy.bias") == 0.5  # limits are of spans and logs
    assert push.resource["service.name"] == "esper-telemetry"
    assert caplog.messages == []


def test_differences_where_the_environment_prefers_them(receiver, run, environ):
    environ.setenv("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "Delta")
    environ.setenv("OTEL_METRIC_EXPORT_INTERVAL", "20")
    run.check(bad())
    with closing(start_otlp(run, receiver.url)):
        receiver.wait(lambda push: push.value("esper.checks") == 40)
        receiver.answers = [400, 400]
        run.check(replace(bad(), checks=43))
        receiver.wait(lambda push: push.value("esper.checks") == 3)
        run.snapshot, readable = None, run.snapshot
        receiver.wait(lambda push: push.value("esper.exporter_collect_errors") == 1)
        run.snapshot = readable
        now = time.time_ns()
        receiver.wait(lambda push: push.time > now and push.value("esper.checks") == 0)
    said = [push.value("esper.checks") for push in receiver.pushes if push.shows("esper.checks")]
    assert [count for count in said if count] == [40, 3]
    for before, push in pairwise(receiver.pushes):
        counts = [point for point in push.points if point.type == "counter"]
        assert {(point.start, point.delta) for point in counts} == {(before.time, True)}
        assert not any(point.delta for point in push.points if point.type == "gauge")
    assert receiver.pushes[-1].value("esper.inf_grad_count") == 2


@pytest.mark.parametrize("preference", ["cumulative", "lowmemory", ""])
def test_sums_where_it_prefers_them(receiver, environ, preference):
    environ.setenv("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", preference)
    start_otlp(Run(bad()), receiver.url).close()
    assert [push.value("esper.checks") for push in receiver.pushes] == [40] * len(receiver.pushes)
    assert not any(point.delta for push in receiver.pushes for point in push.points)


@pytest.mark.parametrize(
    ("variables", "endpoint", "url"),
    [
        ({}, None, "http://localhost:4318/v1/metrics"),
        ({}, "http://collector:4318", "http://collector:4318/v1/metrics"),
        ({}, "http://collector:4318/", "http://collector:4318/v1/metrics"),
        ({}, "http://collector:4318/v1/metrics", "http://collector:4318/v1/metrics"),
        ({}, "https://prometheus/api/v1/otlp", "https://prometheus/api/v1/otlp/v1/metrics"),
        ({}, "https://[::1]:4318?token=a", "https://[::1]:4318/v1/metrics?token=a"),
        ({"ENDPOINT": "http://collector:4318"}, None, "http://collector:4318/v1/metrics"),
        ({"METRICS_ENDPOINT": "http://collector/push"}, None, "http://collector/push"),
        ({"METRICS_ENDPOINT": "http://a/m", "ENDPOINT": "http://b"}, None, "http://a/m"),
        ({"METRICS_ENDPOINT": "http://a/m", "ENDPOINT": "http://b"}, "http://c", "http://c/v1/metrics"),
    ],
)
def test_the_endpoint_is_a_base_or_the_whole_url(environ, variables, endpoint, url):
    for name, value in variables.items():
        environ.setenv(f"OTEL_EXPORTER_OTLP_{name}", value)
    assert environment.metrics_url(endpoint) == url


NO_URLS = [
    "",
    "collector:4318",
    "collector",
    "grpc://collector:4317",
    "http://",
    "http://:80",
    "http://a:port",
    "http://a b",
]


@pytest.mark.parametrize("endpoint", NO_URLS)
def test_an_endpoint_that_is_no_url_is_said_at_set_up(run, endpoint):
    with pytest.raises(ValueError, match=r"\Aendpoint: expected a URL such as http://localhost:4318, got '"):
        start_otlp(run, endpoint)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector", "expected a URL such as http://localhost:4318, got 'collector'"),
        ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "x", "expected a URL such as http://localhost:4318, got 'x'"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "expected http/protobuf, got 'grpc'"),
        ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "http/json", "expected http/protobuf, got 'http/json'"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "often", "expected milliseconds above 0, got 'often'"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "0", "expected milliseconds above 0, got '0'"),
        ("OTEL_METRIC_EXPORT_TIMEOUT", "-1", "expected milliseconds of at least 0, got '-1'"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "10s", "expected milliseconds of at least 0, got '10s'"),
        ("OTEL_EXPORTER_OTLP_METRICS_TIMEOUT", "nan", "expected milliseconds of at least 0, got 'nan'"),
        (
            "OTEL_EXPORTER_OTLP_CERTIFICATE",
            "/no",
            "expected a readable file, got '/no': No such file or directory",
        ),
        ("OTEL_EXPORTER_OTLP_METRICS_CLIENT_KEY", "/", "expected a readable file, got '/': Is a directory"),
    ],
)
def test_a_variable_that_is_no_good_is_said_at_set_up(run, environ, name, value, message):
    environ.setenv(name, value)
    with pytest.raises(ValueError, match=rf"\A{name}: {message}\Z"):
        start_otlp(run)
    assert run.listeners == []


def test_a_key_without_its_certificate_is_said_at_set_up(run, environ, certificate):
    environ.setenv("OTEL_EXPORTER_OTLP_CLIENT_KEY", certificate[1])
    beside = r"OTEL_EXPORTER_OTLP_CLIENT_KEY: expected OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE too"
    with pytest.raises(ValueError, match=beside):
        start_otlp(run)


def test_the_protocol_that_is_spoken_may_be_named(receiver, environ):
    environ.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    environ.setenv("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "http/protobuf")
    assert pushed(receiver, fresh())


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """Make a certificate for 127.0.0.1, that signed itself; return the paths of it and of its key."""
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    subprocess.run([*command, *names, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    return str(certificate), str(key)


def test_certificates_are_honoured_both_ways(certificate, environ):
    path, key = certificate
    environ.setenv("OTEL_EXPORTER_OTLP_CERTIFICATE", path)
    environ.setenv("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", path)
    environ.setenv("OTEL_EXPORTER_OTLP_CLIENT_KEY", key)
    environ.setenv("REQUESTS_CA_BUNDLE", "/of/others")
    with Receiver(tls=server_tls(path, key, client_ca=path)) as receiver:
        assert pushed(receiver, fresh())


@pytest.mark.parametrize("insecure", ["true", "false"])
def test_a_certificate_that_nobody_vouches_for_is_refused_insecure_or_not(certificate, environ, caplog, insecure):
    environ.setenv("OTEL_EXPORTER_OTLP_INSECURE", insecure)  # it is about gRPC; here the URL says
    environ.setenv("OTEL_EXPORTER_OTLP_CERTIFICATE", "")
    with Receiver(tls=server_tls(*certificate)) as receiver:
        start_otlp(Run(fresh()), receiver.url, deadline=2.0).close()
        assert receiver.pushes == []
    assert "CERTIFICATE_VERIFY_FAILED" in caplog.text


def test_a_collector_in_trouble_is_logged_once_and_counted_and_told_when_it_is_back(receiver, run, environ, caplog):
    environ.setenv("OTEL_METRIC_EXPORT_INTERVAL", "20")
    receiver.answers = [400, 404, 400]
    with closing(
        start_otlp(run, f"http://user:secret@{receiver.url.removeprefix('http://')}/?token=secret")
    ) as exporter:
        receiver.wait(lambda push: push.value("esper.otlp_export_failures") == 3)
        assert (exporter.failures, exporter.url) == (3, f"{receiver.url}/v1/metrics")
    (record,) = caplog.records
    assert record.getMessage().startswith(f"esper: a push to {receiver.url}/v1/metrics failed: ")
    assert "code: 400" in record.getMessage()
    assert "secret" not in record.getMessage()


def test_a_redirection_is_no_delivery(receiver, run, environ, caplog):
    environ.setenv("OTEL_METRIC_EXPORT_INTERVAL", "20")
    receiver.answers = [301]
    with closing(start_otlp(run, receiver.url)):
        receiver.wait(lambda push: push.value("esper.otlp_export_failures") == 1)
    assert "it answered 301, moved to nowhere" in caplog.text


def test_what_the_sdk_logs_for_somebody_else_is_left_alone(receiver, run, environ, caplog):
    environ.setenv("OTEL_METRIC_EXPORT_INTERVAL", "1")
    with closing(start_otlp(run, receiver.url)):
        receiver.wait(lambda push: len(receiver.pushes) > 2)
        nothing = metrics_data(Resource.create({}), [], 0, 0, None)
        with Receiver() as other:
            other.answers = [400]
            OTLPMetricExporter(f"{other.url}/v1/metrics").export(nothing)
    assert "Failed to export metrics" in caplog.text


@pytest.mark.parametrize(
    ("level", "records"),
    [("error", 0), ("NONE", 0), ("warn", 1), ("info", 1), ("", 1), ("debug", 4)],
)
def test_it_logs_as_loudly_as_the_environment_says(receiver, run, environ, caplog, level, records):
    environ.setenv("OTEL_LOG_LEVEL", level)
    environ.setenv("OTEL_METRIC_EXPORT_INTERVAL", "20")
    receiver.answers = [400, 404, 400]
    with closing(start_otlp(run, receiver.url)):
        receiver.wait(lambda push: push.value("esper.otlp_export_failures") == 3)
    assert len([message for message in caplog.messages if message.startswith("esper: ")]) == records


def proxied(environ, receiver, endpoint, variable):
    """Push to an endpoint, with a receiver as the proxy that the environment names."""
    environ.setenv(variable, f"http://me:secret@127.0.0.1:{receiver.port}")
    start_otlp(Run(fresh()), endpoint, deadline=2.0).close()


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_loopback_is_pushed_to_directly_whatever_the_environment_says(receiver, environ, caplog, variable):
    with Receiver() as proxy:
        proxied(environ, proxy, receiver.url, variable)
        assert proxy.pushes == []
    assert receiver.pushes
    assert caplog.messages == []


def test_another_host_is_pushed_to_through_the_proxy(receiver, environ):
    proxied(environ, receiver, "http://collector.test:4318", "http_proxy")
    assert receiver.pushes[-1].path == "http://collector.test:4318/v1/metrics"


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_refuses_is_named_without_its_password(receiver, environ, caplog, scheme):
    receiver.answers = [403] * 9
    proxied(environ, receiver, f"{scheme}://collector.test:4318", f"{scheme}_proxy")
    assert receiver.pushes == []
    assert f"through the proxy http://127.0.0.1:{receiver.port}" in caplog.text
    assert "secret" not in caplog.text


def test_a_snapshot_that_cannot_be_read_is_logged_once_and_counted(receiver, environ, caplog):
    environ.setenv("OTEL_METRIC_EXPORT_INTERVAL", "20")
    run = Run(fresh())
    with closing(start_otlp(run, receiver.url)):
        run.snapshot = None
        receiver.wait(lambda push: push.value("esper.exporter_collect_errors") == 3)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


@pytest.fixture
def hanging():
    """Return the URL of a server that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize(
    ("variables", "seconds"),
    [
        ({}, 10),
        ({"OTEL_EXPORTER_OTLP_TIMEOUT": "5000"}, 5),
        ({"OTEL_EXPORTER_OTLP_TIMEOUT": "5000", "OTEL_EXPORTER_OTLP_METRICS_TIMEOUT": "700"}, 0.7),
        ({"OTEL_METRIC_EXPORT_TIMEOUT": "2000"}, 2),
        ({"OTEL_METRIC_EXPORT_TIMEOUT": "2000", "OTEL_EXPORTER_OTLP_TIMEOUT": "1000"}, 1),
        ({"OTEL_EXPORTER_OTLP_TIMEOUT": "0"}, 30),
    ],
)
def test_a_push_has_as_many_milliseconds_as_the_environment_says(environ, variables, seconds):
    for name, value in variables.items():
        environ.setenv(name, value)
    assert environment.read_settings(None).timeout == seconds


def test_0_milliseconds_are_no_limit(environ):
    environ.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0")
    environ.setenv("OTEL_METRIC_EXPORT_TIMEOUT", "0")
    assert environment.read_settings(None).timeout > 20 * 24 * 3600


@pytest.mark.parametrize(
    "variable", ["OTEL_EXPORTER_OTLP_TIMEOUT", "OTEL_EXPORTER_OTLP_METRICS_TIMEOUT", "OTEL_METRIC_EXPORT_TIMEOUT"]
)
def test_a_push_without_an_answer_is_given_up_then(hanging, run, environ, variable):
    environ.setenv(variable, "150")
    began = time.monotonic()
    with closing(start_otlp(run, hanging, deadline=0.1)) as exporter:
        while exporter.failures == 0:
            assert time.monotonic() < began + 60
            time.sleep(0.01)
    assert time.monotonic() - began > 0.15


def test_seconds_in_place_of_milliseconds_are_one_line(receiver, environ, caplog):
    environ.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "10")
    start_otlp(Run(fresh()), receiver.url).close()
    said = "esper: OTEL_EXPORTER_OTLP_TIMEOUT is in milliseconds; a push times out after 0.01 s"
    assert caplog.messages[0] == said


def test_a_collector_that_hangs_holds_up_neither_training_nor_the_end(hanging, run, environ, caplog):
    environ.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "60000")
    began = time.monotonic()
    exporter = start_otlp(run, hanging, deadline=0.3)
    for _ in range(100):
        run.check(bad())
    assert time.monotonic() - began < 30, "neither the start nor a check waits for an answer"
    began = time.monotonic()
    exporter.close()
    assert 0.2 < time.monotonic() - began < 30
    assert f"esper: the last state did not reach {hanging}/v1/metrics: no answer in 0.3 s" in caplog.text


def test_a_dead_collector_does_not_hold_up_the_end(run, caplog):
    with socket.socket() as taken:  # nobody else can listen on its port, and it does not either
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        exporter = start_otlp(run, url, deadline=1.0)
        run.check(bad())
        began = time.monotonic()
        exporter.close()
        assert time.monotonic() - began < 30
    assert f"esper: the last state did not reach {url}/v1/metrics: " in caplog.text
    assert "Connection refused" in caplog.text


def test_rings_are_one_ring_even_in_the_middle_of_one():
    bell = Bell()
    assert not bell.wait(0)
    previous = signal.signal(signal.SIGALRM, lambda *_: bell.ring())
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        for _ in range(20_000):
            bell.ring()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert (bell.wait(0), bell.wait(0)) == (True, False)


SCRIPT = """
import os, signal, sys, time, torch
from esper_telemetry import start_otlp, watch

model = torch.nn.Linear(3, 2)
monitor = watch(model)

def backward(x):
    model.zero_grad()
    model(torch.full((1, 3), x)).sum().backward()

exporter = start_otlp(monitor, sys.argv[1])
backward(1.0)
print("ready", flush=True)
{after}
"""


@contextmanager
def process(url, after):
    """Run a trainer that has made its first check."""
    command = [sys.executable, "-c", SCRIPT.format(after=after), url]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **pipes, text=True) as child:
        assert child.stdout.readline() == "ready\n"
        yield child


@pytest.mark.parametrize(("after", "status"), [("", 0), ("raise RuntimeError", 1)], ids=["exit", "exception"])
def test_every_ordinary_end_pushes_the_last_state(receiver, after, status):
    with process(receiver.url, f"backward(float('nan')); {after}") as child:
        assert child.wait() == status
    assert receiver.pushes[-1].value("esper.nan_grad_count") == 6


FOR_EVER = "input(); backward(float('nan'))\nwhile True: backward(1.0)"


def test_sigterm_pushes_the_last_state_and_the_parent_sees_the_signal(receiver):
    with process(receiver.url, FOR_EVER) as child:
        receiver.wait(lambda push: True)
        child.stdin.write("\n")
        child.stdin.flush()
        receiver.wait(lambda push: push.value("esper.nan_grad_recent_max") == 6)
        before = len(receiver.pushes)
        child.terminate()
        assert child.wait() == -signal.SIGTERM
    assert len(receiver.pushes) == before + 1, "a healthy check is not pushed before the interval ends"


def test_sigterm_ends_within_the_deadline_when_the_collector_hangs(hanging, environ):
    environ.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "60000")
    with process(hanging, FOR_EVER) as child:
        child.stdin.write("\n")
        child.stdin.flush()
        child.terminate()
        began = time.monotonic()
        assert child.wait() == -signal.SIGTERM
    assert time.monotonic() - began < 30, "the deadline is 5 s"


def test_a_forked_child_pushes_nothing(receiver, environ):
    environ.setenv("OTEL_METRIC_EXPORT_INTERVAL", "20")
    after = """
input()
if os.fork():
    os._exit(0)
time.sleep(0.3)
backward(float("nan"))
time.sleep(0.3)
print("child ends", flush=True)
"""
    with process(receiver.url, after) as parent:
        receiver.wait(lambda push: push.value("esper.checks") == 1)
        parent.stdin.write("\n")
        parent.stdin.close()
        parent.wait()
        ended = time.time_ns()
        assert parent.stdout.read() == "child ends\n"  # and then its end of the pipe is closed
    assert all(point.time < ended for push in receiver.pushes for point in push.points)


def test_esper_ppo_pushes_until_the_run_ended(receiver):
    esper = Path(sys.executable).with_name("esper")
    arguments = ["--episodes", "2", "--listen-address", "127.0.0.1:0", "--otlp-endpoint", receiver.url]
    subprocess.run([esper, "ppo", *arguments], check=True, capture_output=True)
    first, last = receiver.pushes[0], receiver.pushes[-1]
    assert (first.value("esper.checks"), first.value("esper.run_ended")) == (0, 0)
    assert (last.value("esper.ppo_episodes") >= 2, last.value("esper.run_ended")) == (True, 1)


def test_without_the_extra_the_reason_says_what_to_install(run, monkeypatch):
    monkeypatch.delitem(sys.modules, "esper_telemetry.exporters.otlp.sender", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.metric_exporter", None)
    with pytest.raises(ImportError, match=r"pip install 'esper-telemetry\[otlp\]'"):
        start_otlp(run)


def test_opentelemetry_is_imported_by_those_who_push_and_no_others():
    script = "import sys, esper_telemetry; sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
