import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from esper_telemetry import aggregate_layer_gradient_health, collect_per_layer_gradients
from esper_telemetry.scan import describe, find_dead_and_exploding, scan
from tests.gradients import FLOAT8, gradients

floats = st.floats(width=32, allow_nan=True, allow_infinity=True)


@settings(max_examples=200)
@given(values=st.lists(floats, min_size=1, max_size=50))
@example(values=[2.0**127, 2.0**127])  # their sum is no float32
@example(values=[3.034874775330965e35] * 3)  # the square of what rounding leaves of their mean is none
def test_statistics_are_over_the_finite_elements(values):
    stats = describe("layer", torch.tensor(values))
    finite = torch.tensor([value for value in values if math.isfinite(value)], dtype=torch.float64)
    assert stats.inf_count == sum(map(math.isinf, values))
    assert stats.nan_count == sum(map(math.isnan, values))
    if len(finite) == 0:
        assert (stats.norm, stats.mean, stats.std, stats.min, stats.max) == (0.0,) * 5
        return
    size = finite.abs().max().item()
    assert stats.norm == pytest.approx(finite.norm().item(), rel=1e-4, abs=1e-6 * size)
    assert stats.mean == pytest.approx(finite.mean().item(), rel=1e-4, abs=1e-6 * size)
    assert (stats.min, stats.max) == (finite.min().item(), finite.max().item())
    if len(finite) > 1:
        assert stats.std == pytest.approx(finite.std().item(), rel=1e-4, abs=1e-5 * size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_long_gradient_far_from_zero_keeps_its_spread(dtype):
    gradient = (torch.randn(300_001, generator=torch.Generator().manual_seed(1)) * 0.25 + 8).to(dtype)
    stats = describe("layer", gradient)
    wide = gradient.double()
    assert stats.mean == pytest.approx(wide.mean().item(), rel=1e-6)
    assert stats.std == pytest.approx(wide.std().item(), rel=1e-5)
    assert stats.norm == pytest.approx(wide.norm().item(), rel=1e-6)


def test_fractions_are_of_all_elements():
    stats = describe("layer", torch.tensor([0.0, 1e-7, 1.0, 11.0, -12.0, math.inf, math.nan, 0.0]))
    assert (stats.zero_fraction, stats.small_fraction, stats.large_fraction) == (2 / 8, 3 / 8, 2 / 8)


def test_the_zeros_that_a_sparse_gradient_leaves_out_are_elements():
    stats = describe("layer", torch.sparse_coo_tensor([[1, 1, 3]], [2.0, 3.0, 6.0], (10,)))
    assert stats.param_count == 10
    assert stats.zero_fraction == 0.8
    assert stats.mean == pytest.approx(1.1)
    assert (stats.min, stats.max) == (0.0, 6.0)


@settings(max_examples=200)
@given(gradient=gradients(), factor=st.sampled_from([0.0, 1.0, 8.0, 100.0]))
def test_dead_and_exploding_layers_are_those_that_full_statistics_find(gradient, factor):
    if gradient.dtype not in FLOAT8:
        gradient = gradient * factor
    dead, exploding = find_dead_and_exploding(scan([None, gradient]), [None, gradient])
    health = aggregate_layer_gradient_health([describe("layer", gradient)])
    assert (len(dead), len(exploding)) == (health.dead_layers, health.exploding_layers)


@pytest.mark.parametrize("large", [10, 11])
def test_a_layer_explodes_as_soon_as_a_tenth_of_it_is_large(large):
    gradient = torch.zeros(100)
    gradient[:large] = 10.001
    _, exploding = find_dead_and_exploding(scan([gradient]), [gradient])
    assert exploding == ({0} if large > 10 else set())
    _, exploding = find_dead_and_exploding(scan([gradient / 8]), [gradient], scales=[8.0])
    assert not exploding


def test_only_the_layers_that_are_asked_for_are_looked_at():
    gradients = [torch.zeros(3), torch.zeros(3), torch.ones(3)]
    assert find_dead_and_exploding(scan(gradients), gradients, among={1, 2}) == ({1}, set())


def test_a_complex_gradient_is_described_by_magnitudes():
    stats = describe("layer", torch.tensor([3 + 4j, 0j, complex(math.inf, math.nan)]))
    assert (stats.norm, stats.mean, stats.max) == (5.0, 2.5, 5.0)
    assert (stats.inf_count, stats.nan_count) == (1, 1)


def test_an_empty_gradient_has_statistics_of_nothing():
    stats = describe("layer", torch.empty(0))
    assert (stats.param_count, stats.norm, stats.zero_fraction, stats.dead) == (0, 0.0, 0.0, False)


def test_one_bad_layer_of_a_model_reaches_the_sum():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model(torch.ones(1, 3)).sum().backward()
    model[0].weight.grad[0, :2] = math.inf
    model[1].bias.grad[0] = math.nan
    stats = collect_per_layer_gradients(model)
    assert [layer.layer_name for layer in stats] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    health = aggregate_layer_gradient_health(stats)
    assert (health.inf_grad_count, health.nan_grad_count) == (2, 1)


def test_tied_parameters_are_one_layer_and_a_layer_without_gradient_is_none():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    model(torch.ones(1, 3)).sum().backward()
    assert [layer.layer_name for layer in collect_per_layer_gradients(model)] == ["0.weight"]


def test_several_networks_prefix_their_layers():
    networks = {"actor": nn.Linear(2, 1, bias=False), "critic": nn.Linear(2, 1, bias=False)}
    for network in networks.values():
        network(torch.ones(1, 2)).sum().backward()
    names = [layer.layer_name for layer in collect_per_layer_gradients(networks)]
    assert names == ["actor.weight", "critic.weight"]


def test_what_is_no_model_is_refused():
    with pytest.raises(ValueError, match=r"expected a torch\.nn\.Module or a dict of them, got list"):
        collect_per_layer_gradients([nn.Linear(1, 1)])
