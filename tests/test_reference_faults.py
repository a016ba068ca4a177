import pytest
import torch
from torch import nn

from esper_telemetry import watch
from esper_telemetry.reference.faults import Fault, FaultInjector


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def backward(model):
    model(torch.ones(1, 3)).sum().backward()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("inf:6@40", Fault("inf", 6, 40)),
        ("nan:1@7:value_net.bias", Fault("nan", 1, 7, "value_net.bias")),
    ],
)
def test_a_fault_is_read(text, fault):
    assert Fault.parse(text) == fault


@pytest.mark.parametrize(
    "text", ["", "inf", "inf:1", "Inf:1@2", "inf:0@1", "inf:1@0", "inf:-1@3", "zero:1@2", "inf:1@2:"]
)
def test_what_is_no_fault_is_refused(text):
    with pytest.raises(ValueError, match="expected KIND:COUNT@CHECK"):
        Fault.parse(text)


def test_elements_are_written_before_the_check_looks():
    model = network()
    injector = FaultInjector(model, [Fault("inf", 2, 2), Fault("nan", 3, 2), Fault("nan", 1, 2, "1.bias")])
    monitor = watch(model, before_check=injector)
    backward(model)
    assert monitor.snapshot.layers == ()
    backward(model)
    counts = {each.layer_name: (each.inf_count, each.nan_count) for each in monitor.snapshot.layers}
    assert counts == {"0.weight": (2, 3), "1.bias": (0, 1)}
    assert injector.missed == []


def test_a_gradient_that_is_not_contiguous_is_written_in_place():
    model = network()
    model[0].weight.grad = torch.ones(3, 4).t()
    FaultInjector(model, [Fault("nan", 5, 1)])(1)
    assert int(model[0].weight.grad.isnan().sum()) == 5


def test_a_layer_without_gradient_is_missed():
    injector = FaultInjector(network(), [Fault("inf", 1, 1)])
    injector(1)
    assert injector.missed == [Fault("inf", 1, 1)]


def test_a_layer_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"expected one of the layers 0\.weight, .*, got 'nowhere'"):
        FaultInjector(network(), [Fault("inf", 1, 1, "nowhere")])


def test_more_elements_than_the_layer_has_are_refused():
    with pytest.raises(ValueError, match=r"expected at most the 2 elements of 1\.bias, got 3"):
        FaultInjector(network(), [Fault("inf", 3, 1, "1.bias")])
