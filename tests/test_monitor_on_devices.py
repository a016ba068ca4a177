"""What the monitor does with results that arrive later, as on CUDA devices."""

import logging
import math

import pytest
import torch
from torch import nn

from esper_telemetry import GradientMonitor, GradientsCritical, watch
from esper_telemetry.scan import scan
from tests.monitors import learned


class Pending:
    """Stand in for a scan on a device: its result is there when `ready` says so, or when it is waited for."""

    def __init__(self, gradients):
        self.found = scan(gradients)
        self.is_ready = False
        self.waited = False

    def ready(self):
        return self.is_ready

    def result(self):
        self.waited |= not self.is_ready
        return self.found


class Device:
    """Stand in for a scanner of gradients on a device."""

    def __init__(self):
        self.launched = []

    def __call__(self, gradients):
        self.launched.append(Pending(gradients))
        return self.launched[-1]

    def finish(self, *checks):
        for check in checks:
            self.launched[check - 1].is_ready = True


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def monitored(**options):
    model = network()
    monitor = learned(watch(model, **options))
    monitor._checks.scan = device = Device()
    return model, monitor, device


def backward(model, x=1.0):
    model(torch.full((5, 3), x)).sum().backward()


def test_update_does_not_wait_and_a_read_publishes_what_is_there():
    model, monitor, device = monitored()
    backward(model)
    assert monitor.snapshot.checks == 0
    device.finish(1)
    assert monitor.snapshot.checks == 1
    assert not device.launched[0].waited


def test_results_are_published_in_the_order_of_their_checks():
    model, monitor, device = monitored()
    seen = []
    monitor.on_check(lambda snapshot: seen.append((snapshot.checks, snapshot.nan_grad_count > 0)))
    backward(model)
    backward(model, math.nan)
    backward(model)
    device.finish(2, 3)
    assert monitor.snapshot.checks == 0
    device.finish(1)
    assert monitor.snapshot.checks == 3
    assert seen == []  # a reader is not the training thread
    monitor.flush()
    assert seen == [(1, False), (2, True), (3, True)]


def test_the_next_update_publishes_and_tells():
    model, monitor, device = monitored()
    seen = []
    monitor.on_check(seen.append)
    backward(model)
    device.finish(1)
    backward(model)
    assert [snapshot.checks for snapshot in seen] == [1]


def test_the_origin_is_that_of_the_check_and_not_of_the_ones_since():
    model, monitor, device = monitored()
    backward(model, math.nan)
    model.zero_grad()
    model[0].weight.grad = torch.full((4, 3), math.nan)
    monitor.update()
    device.finish(1)
    assert monitor.snapshot.origin_layer == "2.weight"
    assert [(each.layer_name, each.numel) for each in monitor.snapshot.layers] == [
        ("0.weight", 12),
        ("2.weight", 8),
        ("0.bias", 4),
    ]


def test_faults_on_purpose_meet_the_check_that_they_were_meant_for():
    checks = []
    model, _, _ = monitored(before_check=checks.append)
    for _ in range(3):
        backward(model)
    assert checks == [1, 2, 3]


def test_flush_waits_no_longer_than_it_is_told_to():
    model, monitor, device = monitored()
    backward(model)
    monitor.flush(timeout=0.01)
    assert monitor.snapshot.checks == 0
    device.finish(1)
    monitor.close()
    assert monitor.snapshot.checks == 1


def test_an_intervention_waits_for_the_answer():
    model, _, device = monitored(on_critical="halt")
    with pytest.raises(GradientsCritical):
        backward(model, math.nan)
    assert device.launched[0].waited


def test_a_result_at_once_comes_after_those_that_were_launched():
    model, monitor, _ = monitored()
    backward(model, math.nan)
    monitor._checks.scan = scan
    model.zero_grad()
    backward(model)
    assert (monitor.snapshot.checks, monitor.snapshot.nan_grad_count) == (2, 0)
    assert monitor.snapshot.nan.critical_checks == 1


def test_a_clip_does_not_wait():
    model = network()
    monitor = GradientMonitor(model)
    monitor._checks.scan = device = Device()
    model[0].double()  # of several dtypes, as of gradients on a device, torch takes the norm itself
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    monitor.clip_grad_norm_(0.5)
    assert len(device.launched) == 1
    assert not device.launched[0].waited


def test_a_device_that_failed_is_counted_and_training_goes_on(caplog):
    class Lost(Device):
        def __call__(self, gradients):
            raise RuntimeError("device-side assert")

    model, monitor, device = monitored()
    backward(model)
    device.launched[0].ready = lambda: 1 / 0
    with caplog.at_level(logging.ERROR):
        assert monitor.snapshot.checks == 0
        monitor._checks.scan = Lost()
        backward(model)
        monitor.close()
    assert monitor.snapshot.monitor_errors == 2
    assert len(caplog.records) == 1


def test_gradients_that_are_freed_as_they_come_do_not_wait_either():
    model, monitor, device = monitored()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    backward(model)
    backward(model, math.nan)
    device.finish(*range(1, len(device.launched)))
    assert (monitor.snapshot.checks, monitor.snapshot.elements) == (1, 26)
    device.finish(len(device.launched))
    assert monitor.snapshot.checks == 2
    assert {layer.layer_name for layer in monitor.snapshot.layers} == {"0.weight", "0.bias", "2.weight"}
    assert not any(each.waited for each in device.launched)
