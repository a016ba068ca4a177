"""Whatever is given to a public entrance: it is taken, or one line says what was given and what was expected."""

import inspect
import math
import re
from contextlib import closing

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

import esper_telemetry
from esper_telemetry import (
    GradientMonitor,
    aggregate_layer_gradient_health,
    arguments,
    collect_per_layer_gradients,
    start_exporter,
    start_otlp,
    start_textfile,
    watch,
)
from esper_telemetry.exporters.http import open_exporter
from esper_telemetry.exporters.prometheus import EsperCollector
from esper_telemetry.integrations import accelerate, lightning, sb3, transformers
from esper_telemetry.notify import webhook


class Strange:
    """Something of nobody's."""

    def __repr__(self):
        return "two\nlines"


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.floats(),
    st.text(st.characters(codec="utf-8", exclude_characters="/"), max_size=200),
    st.binary(max_size=3),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    st.sampled_from([Strange(), Strange, nn.Linear(1, 1), torch.ones(2), torch.ones(()), np.ones(2), math.inf, len]),
)


@pytest.fixture(scope="module")
def monitor():
    with watch(nn.Linear(2, 1)) as watching:
        yield watching


@pytest.fixture(scope="module")
def exporter(monitor):
    serving = start_exporter(monitor, "127.0.0.1:0")
    yield serving
    serving.close(linger=0)


def make(entrance, monitor, folder):
    """Return the entrance as a function of one wrong argument, and the rest of what it needs."""
    calls = {
        "watch": lambda **given: watch(**({"model": nn.Linear(2, 1)} | given)),
        "GradientMonitor": lambda **given: GradientMonitor(**({"model": nn.Linear(2, 1)} | given)),
        "start_exporter": lambda **given: start_exporter(**({"source": monitor, "address": 0, "linger": 0} | given)),
        "start_textfile": lambda **given: start_textfile(**({"monitor": monitor, "directory": folder} | given)),
        "start_otlp": lambda **given: start_otlp(
            **({"monitor": monitor, "endpoint": "http://127.0.0.1:1", "deadline": 0.0} | given)
        ),
        "webhook": lambda **given: webhook(
            **({"monitor": monitor, "url": "http://127.0.0.1:1/", "deadline": 0.0} | given)
        ),
        "EsperCollector": lambda **given: EsperCollector(**({"source": monitor} | given)),
        "open_exporter": lambda **given: open_exporter(**given),
        "collect_per_layer_gradients": collect_per_layer_gradients,
        "aggregate_layer_gradient_health": aggregate_layer_gradient_health,
        "lightning": lightning.EsperCallback,
        "transformers": transformers.EsperCallback,
        "sb3": sb3.EsperCallback,
        "accelerate": lambda **given: accelerate.EsperWatch(
            **({"accelerator": Accelerator(cpu=True), "model": nn.Linear(2, 1)} | given)
        ),
        "on_check": monitor.on_check,
        "flush": monitor.flush,
    }
    return calls[entrance]


def names(function):
    return [name for name, parameter in inspect.signature(function).parameters.items() if parameter.kind != 4]


ENTRANCES = {
    "watch": names(watch),
    "GradientMonitor": names(GradientMonitor),
    "start_exporter": names(start_exporter),
    "start_textfile": names(start_textfile),
    "start_otlp": names(start_otlp),
    "webhook": names(webhook),
    "EsperCollector": ["source"],
    "open_exporter": ["address"],
    "collect_per_layer_gradients": ["model"],
    "aggregate_layer_gradient_health": ["stats"],
    "lightning": names(lightning.EsperCallback),
    "transformers": names(transformers.EsperCallback),
    "sb3": names(sb3.EsperCallback),
    "accelerate": names(accelerate.EsperWatch),
    "on_check": ["listener"],
    "flush": ["timeout"],
}


PLACES = {("webhook", "url"): "webhook", ("start_textfile", "directory"): "(textfile-dir|directory)"}


def test_every_public_function_is_tried():
    made_by_others = {"Exporter", "OtlpExporter", "TextfileExporter", "GradientsCritical", "VoteFailed"}
    plain_data = {"GradientHealth", "HealthTier", "LayerGradientStats", "PPOUpdatePayload", "Snapshot"}
    assert set(esper_telemetry.__all__) - made_by_others - plain_data <= set(ENTRANCES)


@pytest.mark.parametrize(
    ("entrance", "name"), [(entrance, name) for entrance, taken in ENTRANCES.items() for name in taken]
)
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@example(anything=Strange())
@example(anything="\n")
@given(anything=ANYTHING)
def test_anything_is_taken_or_refused_in_one_line(entrance, name, anything, monitor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a text is the name of a folder
    call = make(entrance, monitor, tmp_path)
    try:
        taken = call(**{name: anything})
    except (ValueError, OSError, ImportError) as error:
        said = str(error)
        place = PLACES.get((entrance, name), name)
        assert re.match(rf"(\[Errno \d+\] )?({place}: |cannot listen on )", said), said
        assert "\n" not in said
        assert len(said) < 500
    else:
        close = getattr(taken, "close", None)
        if close is not None:
            close(**({"linger": 0} if entrance == "start_exporter" else {}))


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (
            lambda monitor: start_exporter(nn.Linear(2, 1)),
            "source: expected a monitor, as returned by watch(model), got Linear",
        ),
        (
            lambda monitor: start_textfile(nn.Linear(2, 1), "."),
            "monitor: expected a monitor, as returned by watch(model), got Linear",
        ),
        (lambda monitor: start_exporter(monitor, 1.5), "address: expected HOST:PORT or a port, got float"),
        (lambda monitor: start_exporter(monitor, 0, strict="no"), "strict: expected True or False, got 'no'"),
        (lambda monitor: start_textfile(monitor, 3), "directory: expected a path, got 3"),
        (lambda monitor: start_otlp(monitor, 4318), "endpoint: expected a URL such as http://localhost:4318, got 4318"),
        (
            lambda monitor: start_otlp(monitor, deadline="5"),
            "deadline: expected seconds of at least 0, got '5'",
        ),
        (lambda monitor: watch(nn.Linear(2, 1), trap=1), "trap: expected True or False, got 1"),
        (lambda monitor: watch(nn.Linear(2, 1), record_dir=[]), "record_dir: expected a path, got list"),
        (
            lambda monitor: watch(nn.Linear(2, 1), recent_window_seconds="2m"),
            "recent_window_seconds: expected seconds above 0, got '2m'",
        ),
        (lambda monitor: watch(nn.Linear(2, 1), max_amp_skips="8"), "max_amp_skips: expected at least 0, got '8'"),
        (lambda monitor: watch(nn.Linear(2, 1), before_check=3), "before_check: expected a function, got 3"),
        (lambda monitor: monitor.on_check(3), "listener: expected a function, got 3"),
        (
            lambda monitor: collect_per_layer_gradients(3),
            "model: expected a torch.nn.Module or a dict of them, got int",
        ),
        (
            lambda monitor: aggregate_layer_gradient_health({"a": 1}),
            "stats: expected LayerGradientStats of layers, got str",
        ),
        (
            lambda monitor: lightning.EsperCallback(on_critical="stop"),
            "on_critical: expected one of continue, skip, halt, rewind or a callable, got 'stop'",
        ),
        (lambda monitor: sb3.EsperCallback(nn.Linear(2, 1)), "monitor: expected a GradientMonitor, got Linear"),
    ],
)
def test_the_line_says_what_was_given_and_what_was_expected(call, line, monitor):
    with pytest.raises(ValueError, match=rf"^{re.escape(line)}$"):
        call(monitor)


def test_a_number_is_a_port_on_loopback(monitor, exporter):
    port = int(exporter.url.rpartition(":")[2])
    with closing(start_exporter(monitor, 0, linger=0)) as other:
        assert other.url.startswith("http://127.0.0.1:")
    assert open_exporter(port) is exporter


@pytest.mark.parametrize("wrong", ["1", -1, math.nan, Strange(), True])
def test_an_exporter_waits_for_no_such_time_and_goes_on(exporter, wrong):
    for wait in (exporter.linger, exporter.close):
        with pytest.raises(ValueError, match=r"^(seconds|linger): expected seconds of at least 0, got .*$"):
            wait(wrong)
    assert open_exporter(int(exporter.url.rpartition(":")[2])) is exporter


def test_numbers_of_other_libraries_are_numbers():
    assert arguments.seconds("x", np.float32(2)) == arguments.whole("x", np.int64(2), 1) == 2


@given(ANYTHING)
def test_what_is_shown_is_short_and_one_line(anything):
    said = arguments.shown(anything)
    assert 0 < len(said) <= 80
    assert said.isprintable()
