import math
from unittest import mock

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from esper_telemetry.monitor import held
from esper_telemetry.monitor.held import Held, can_wait
from esper_telemetry.monitor.passes import at_end_of_pass
from esper_telemetry.scan import scan


def scan_each(gradients):
    return [scan([gradient]) for gradient in gradients]


def refuse(what):
    raise AssertionError(what)


def hold(parameters, holder):
    """Hold each gradient that arrives; write over all of them as DDP does, when the last has arrived."""
    found = [[] for _ in parameters]

    def write_over():
        for parameter in parameters:
            parameter.grad.zero_()

    def arrive(parameter, own):
        assert can_wait(parameter.grad)
        holder.add(own, parameter.grad)
        if all(each.grad is not None for each in parameters):
            at_end_of_pass(write_over)

    for parameter, own in zip(parameters, found, strict=True):
        parameter.register_post_accumulate_grad_hook(lambda parameter, own=own: arrive(parameter, own))
    return found


@given(
    layers=st.lists(st.tuples(st.integers(1, 50), st.sampled_from([1.0, math.inf, math.nan])), min_size=1, max_size=8),
    most=st.integers(1, 100),
)
def test_each_gradient_is_measured_once_and_as_it_arrived(layers, most):
    parameters = [nn.Parameter(torch.ones(size)) for size, _ in layers]
    found = hold(parameters, Held(scan_each, refuse))
    with mock.patch.object(held, "_MOST", most):
        sum((parameter * value).sum() for parameter, (_, value) in zip(parameters, layers, strict=True)).backward()
    for own, (size, value) in zip(found, layers, strict=True):
        assert [each.bad for each in own] == [scan([torch.full((size,), value)]).bad]
    assert not any(parameter.grad.any() for parameter in parameters)


def test_gradients_of_the_outer_pass_are_measured_before_those_of_the_inner_are_written_over():
    outer, inner = nn.Parameter(torch.ones(3)), nn.Parameter(torch.full((3,), math.nan))
    found = hold([outer, inner], Held(scan_each, refuse))
    given = torch.ones(3, requires_grad=True)
    (checkpoint(lambda each: each * inner, given, use_reentrant=True) * outer).sum().backward()
    assert [[each.bad for each in own] for own in found] == [[{0: (0, 3)}], [{}]]


def test_a_gradient_outside_a_pass_cannot_wait():
    assert not can_wait(torch.ones(3))


def test_what_goes_wrong_is_told_and_does_not_reach_training():
    told = []

    def fail(gradients):
        raise RuntimeError

    parameter = nn.Parameter(torch.ones(3))
    hold([parameter], Held(fail, told.append))
    parameter.sum().backward()
    assert told == ["gradients could not be measured before they were reduced"]
