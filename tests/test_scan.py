import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_telemetry.health import total_norm
from esper_telemetry.scan import scan
from esper_telemetry.scan.cpu import CHUNK, scan_cpu
from esper_telemetry.scan.device import scan_device
from esper_telemetry.scan.layouts import local_numel
from tests.gradients import FLOAT8, expected_counts, gradients, lay_out

KERNELS = [scan_cpu, scan_device]
conformance = pytest.mark.parametrize("kernel", KERNELS)


def counts(found, index=0):
    return found.bad.get(index, (0, 0))


@conformance
@settings(max_examples=300)
@given(given_gradients=st.lists(st.one_of(st.none(), gradients()), max_size=5))
def test_counts_equal_isinf_and_isnan_for_every_dtype_and_layout(kernel, given_gradients):
    found = kernel(given_gradients)
    for index, gradient in enumerate(given_gradients):
        if gradient is None:
            assert found.norms[index] is None
            assert index not in found.bad
        else:
            assert counts(found, index) == expected_counts(gradient)
    assert found.elements == sum(gradient.numel() for gradient in given_gradients if gradient is not None)


@given(several=st.lists(gradients(), min_size=1, max_size=5))
def test_gradients_scanned_together_are_told_apart(several):
    apart = scan_cpu(several).apart([local_numel(each) for each in several])
    for found, alone in zip(apart, [scan_cpu([each]) for each in several], strict=True):
        assert (found.bad, found.elements) == (alone.bad, alone.elements)
        assert found.norms == pytest.approx(alone.norms, rel=1e-6, nan_ok=True)


@conformance
@given(gradient=gradients())
def test_a_norm_is_finite_exactly_when_every_element_is(kernel, gradient):
    (norm,) = kernel([gradient]).norms
    assert math.isfinite(norm) == (expected_counts(gradient) == (0, 0))


@conformance
@pytest.mark.parametrize("numel", [1, 300, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_norm_equals_torchs(kernel, dtype, numel):
    gradient = torch.randn(numel, generator=torch.Generator().manual_seed(0)).to(dtype)
    (norm,) = kernel([gradient]).norms
    assert norm == pytest.approx(gradient.double().norm().item(), rel=1e-4)


@conformance
def test_many_small_gradients_of_mixed_shapes_keep_their_places(kernel):
    shapes = [(5,), (2, 3), (), (64, 64), (70, 70)] * 40
    given_gradients = [torch.full(shape, float(place)) for place, shape in enumerate(shapes)]
    given_gradients[17][...] = math.nan
    given_gradients[118].view(-1)[1:4] = math.inf
    found = kernel(given_gradients)
    assert found.bad == {17: (0, 0 + given_gradients[17].numel()), 118: (3, 0)}
    for place, gradient in enumerate(given_gradients):
        if place not in found.bad:
            assert found.norms[place] == pytest.approx(gradient.norm().item(), rel=1e-6)


@conformance
def test_more_than_2_to_the_24_bad_elements_are_exact(kernel):
    numel = 2**24 + 3
    gradient = torch.full((numel,), math.nan)
    gradient[0] = gradient[-1] = -math.inf
    gradient[1] = 1.0
    assert counts(kernel([gradient])) == (2, numel - 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@settings(max_examples=20)
@given(bad_chunks=st.lists(st.sampled_from([1.0, 3e38, math.inf, -math.inf, math.nan]), min_size=33, max_size=33))
def test_every_pattern_of_bad_chunks_is_exact(dtype, bad_chunks):
    gradient = torch.ones(32 * CHUNK + 7, dtype=dtype)
    for number, value in enumerate(bad_chunks):
        gradient[number * CHUNK + 3 : number * CHUNK + 3 + number + 1 : 2] = value
    found = scan_cpu([gradient])
    assert counts(found) == expected_counts(gradient)
    assert math.isfinite(found.norms[0]) == (0 not in found.bad)


@conformance
@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_every_float8_that_can_hold_a_nan_is_counted(kernel, dtype):
    gradient = torch.tensor([math.nan, 1.0, math.nan]).to(dtype)
    assert counts(kernel([gradient])) == (0, 2)


@conformance
def test_a_complex_element_with_both_is_in_both_counts(kernel):
    gradient = torch.tensor([complex(math.inf, math.nan), complex(1, 2)])
    assert counts(kernel([gradient])) == (1, 1)


@conformance
def test_finite_duplicates_of_a_sparse_gradient_that_add_up_to_inf_are_one_inf(kernel):
    gradient = torch.sparse_coo_tensor([[1, 1]], [3e38, 3e38], (4,))
    found = kernel([gradient])
    assert counts(found) == (1, 0)
    assert found.elements == 4


@conformance
@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, 3e30), (torch.float64, 1e300), (torch.bfloat16, 1e38)])
def test_a_norm_that_overflows_over_finite_elements_is_no_bad_element(kernel, dtype, value):
    gradient = torch.full((CHUNK + 2,), value, dtype=dtype)
    found = kernel([gradient])
    assert found.bad == {}
    assert found.norms[0] == pytest.approx(gradient[0].item() * math.sqrt(CHUNK + 2), rel=1e-2)


@conformance
def test_no_gradient_at_all_is_a_scan_of_nothing(kernel):
    assert kernel([None, None]).elements == 0
    assert kernel([]).norms == []


@conformance
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_a_large_gradient_without_a_flat_view_is_exact(kernel, layout):
    dense = torch.randn(700, 500)
    dense[3, 4] = math.nan
    dense[0, 2] = -math.inf
    gradient = lay_out(dense, layout)
    assert counts(kernel([gradient])) == expected_counts(gradient)


def test_a_healthy_scan_makes_no_large_temporary():
    gradient = torch.randn(4096, 1024)
    with torch.profiler.profile(profile_memory=True) as profile:
        scan([gradient])
    assert max(event.cpu_memory_usage for event in profile.events()) < 2**20


def test_a_bad_scan_makes_no_temporary_above_a_byte_per_element_of_a_large_layer():
    gradient = torch.tensor([math.nan, math.inf]).repeat(2**21)
    with torch.profiler.profile(profile_memory=True) as profile:
        scan([gradient])
    assert max(event.cpu_memory_usage for event in profile.events()) <= gradient.numel()


def test_a_total_norm_is_nan_before_inf_before_finite():
    assert math.isnan(total_norm([math.inf, math.nan]))
    assert total_norm([math.inf, None, 1.0]) == math.inf
    assert total_norm([3.0, None, 4.0]) == 5.0
    assert total_norm([]) == 0.0
