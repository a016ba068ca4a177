"""The CUDA kernel: on a GPU where there is one, else in Triton's interpreter with stand-ins for streams and events."""
# ruff: noqa: E402 - what is skipped is not imported

import contextlib
import itertools
import math
import os
import subprocess
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

GPU = torch.cuda.is_available()
pytest.importorskip("triton", reason="no Triton: the CUDA kernel was not tested in any way")

from esper_telemetry import GradientMonitor, watch
from esper_telemetry.scan import cuda, describe
from esper_telemetry.scan.cpu import scan_cpu
from esper_telemetry.scan.cuda import CudaScanner
from esper_telemetry.scan.triton_kernel import CHUNK, RECORD, add_up_layers
from tests.gradients import REAL, expected_counts, gradients, lay_out

DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
TILE = 4096

on_gpu = pytest.mark.skipif(not GPU, reason="no CUDA device: what streams, events and allocations do did not run")


class Event:
    """Stand in for a CUDA event: what was launched on a CPU is done."""

    def record(self):
        pass

    def query(self):
        return True

    def synchronize(self):
        pass


@pytest.fixture(scope="module", autouse=True)
def stand_ins():
    if GPU:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_pinned", lambda *shape, dtype=torch.int64: torch.empty(shape, dtype=dtype, device="cpu"))
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "device", contextlib.nullcontext)
        patch.setattr(torch.cuda, "current_stream", lambda _: types.SimpleNamespace(cuda_stream=0))
        yield


def scan(*given_gradients):
    moved = [None if gradient is None else gradient.to(DEVICE) for gradient in given_gradients]
    return CudaScanner().launch(moved).result()


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
@settings(max_examples=150)
@given(
    given_gradients=st.lists(
        st.one_of(st.none(), gradients().filter(lambda gradient: not gradient.is_complex())), max_size=4
    )
)
def test_agrees_with_torch_for_every_dtype_and_layout(given_gradients):
    found = scan(*given_gradients)
    on_cpu = scan_cpu(given_gradients)
    for gradient, norm, cpu_norm in zip(given_gradients, found.norms, on_cpu.norms, strict=True):
        # On the CPU torch rounds a norm to the gradient's dtype.
        assert norm == (None if gradient is None else pytest.approx(cpu_norm, rel=1e-2, nan_ok=True))
    present = {index: gradient for index, gradient in enumerate(given_gradients) if gradient is not None}
    assert {index: found.bad.get(index, (0, 0)) for index in present} == {
        index: expected_counts(gradient) for index, gradient in present.items()
    }
    assert found.elements == on_cpu.elements
    stats = [describe("", gradient) for gradient in given_gradients if gradient is not None]
    assert found.dead_layers == sum(each.dead for each in stats)
    assert found.exploding_layers == sum(each.exploding for each in stats)


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("numel", [0, 1, TILE - 1, TILE, TILE + 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + TILE + 5])
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
def test_every_element_is_looked_at_once(dtype, numel, offset):
    memory = torch.full((numel + 2,), math.nan, dtype=dtype, device=DEVICE)  # what lies around is not ours
    gradient = memory[offset : offset + numel].fill_(1.0)
    assert CudaScanner().launch([gradient]).result().norms == pytest.approx([math.sqrt(numel)])
    for place in {0, numel // 2, numel - 1} if numel else ():
        gradient.fill_(1.0)[place] = -math.inf
        assert CudaScanner().launch([gradient]).result().bad == {0: (1, 0)}


def test_gradients_that_begin_anywhere_are_counted_exactly():
    generator = torch.Generator().manual_seed(0)
    for dtype, offset in itertools.product(REAL, range(9)):
        memory = torch.full((5 * CHUNK + 99,), math.nan, dtype=dtype)
        given_gradients = []
        for numel in (0, 1, 7, 15, 16, 17, 4000, CHUNK + 3, 3 * CHUNK - 1):
            memory[offset : offset + numel].normal_(generator=generator)
            given_gradients.append(memory[offset : offset + numel].to(DEVICE))
            memory = memory.clone()
        scanner = CudaScanner()
        assert scanner.launch(given_gradients).result().bad == {}
        for gradient in given_gradients[1:]:
            places = torch.randint(gradient.numel(), (2, 5), generator=generator)
            gradient[places[0]], gradient[places[1]] = math.inf, math.nan
        found = scanner.launch(given_gradients).result()
        assert found.bad == {place: expected_counts(each) for place, each in enumerate(given_gradients) if each.numel()}


def test_many_layers_of_mixed_dtypes_keep_their_places():
    dtypes = [torch.bfloat16, torch.float64, torch.float32, torch.float16]
    given_gradients = [torch.full((place % 7, 5), float(place), dtype=dtypes[place % 4]) for place in range(90)]
    given_gradients[16][1, :2] = math.inf
    given_gradients[85][...] = math.nan
    given_gradients[40] = None
    found = scan(*given_gradients)
    assert found.bad == {16: (2, 0), 85: (0, 5)}
    assert found.norms.pop(40) is None
    del given_gradients[40]
    assert found.norms == pytest.approx(scan_cpu(given_gradients).norms, rel=1e-2, nan_ok=True)


@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, 3e30), (torch.float64, 1e300), (torch.bfloat16, 1e38)])
def test_a_norm_that_overflows_over_finite_elements_is_no_bad_element(dtype, value):
    gradient = torch.full((CHUNK + 2,), value, dtype=dtype)
    found = scan(gradient)
    assert found.bad == {}
    assert found.norms[0] == pytest.approx(gradient[0].item() * math.sqrt(CHUNK + 2), rel=1e-6)
    assert found.exploding_layers == 1


def test_finite_elements_above_10_are_large_and_inf_is_not():
    gradient = torch.tensor([10.0, -10.0, 10.001, -11.0] + [math.inf] * 2 + [0.0] * 34)
    assert describe("", gradient).large_fraction == 2 / 40
    assert scan(gradient).exploding_layers == 0
    gradient[-3:] = 3e38
    assert scan(gradient).exploding_layers == 1


def test_finite_duplicates_of_a_sparse_gradient_that_add_up_to_inf_are_one_inf():
    found = scan(torch.sparse_coo_tensor([[1, 1]], [3e38, 3e38], (40,)))
    assert found.bad == {0: (1, 0)}
    assert (found.elements, found.dead_layers) == (40, 1)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_a_large_gradient_without_a_flat_view_is_exact(layout):
    dense = torch.randn(700, 500, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    dense[0, 4] = math.nan
    dense[0, 2] = -math.inf
    gradient = lay_out(dense, layout)
    assert CudaScanner().launch([gradient]).result().bad == {0: expected_counts(gradient)}


def test_counts_past_2_to_the_31_are_added_up_exactly():
    chunks = 1100
    records = torch.full((chunks, RECORD), 2**31 + 1, device=DEVICE)
    records.view(torch.float64)[:, -1] = 1e200
    layers = torch.empty((2, RECORD), dtype=torch.int64, device=DEVICE)
    add_up_layers[(2,)](records, torch.tensor([0, 1, chunks], device=DEVICE), layers)
    assert layers[:, :-1].tolist() == [[2**31 + 1] * 4, [(chunks - 1) * (2**31 + 1)] * 4]
    norms = layers.view(torch.float64)[:, -1].tolist()
    assert norms == pytest.approx([1e200, 1e200 * math.sqrt(chunks - 1)], rel=1e-12)


def test_a_launch_before_the_last_result_was_fetched_has_buffers_of_its_own():
    scanner, gradient = CudaScanner(), torch.ones(10, device=DEVICE)
    first = scanner.launch([gradient])
    gradient[0] = math.inf
    second = scanner.launch([gradient])
    assert first.result().bad == {}
    assert first.result() is first.result()
    assert second.result().bad == {0: (1, 0)}
    (plan,) = scanner._plans.values()
    assert len(plan._free) == 2
    scanner.launch([gradient]).result()
    assert len(plan._free) == 2


def test_the_default_device_of_a_loop_does_not_matter():
    given_gradients = [torch.ones(10, device=DEVICE), torch.full((3,), math.nan, device=DEVICE)]
    with torch.device("meta"):
        assert CudaScanner().launch(given_gradients).result().bad == {1: (0, 3)}


def test_the_layouts_that_are_remembered_are_bounded():
    scanner = CudaScanner()
    for numel in range(100):
        assert scanner.launch([torch.ones(numel, device=DEVICE)]).result().elements == numel
    assert len(scanner._plans) == cuda._PLANS


@pytest.mark.parametrize("capability", [75, 80, 90])
def test_the_kernel_compiles_for_gpus_and_reads_16_bytes_at_a_time(capability, tmp_path):
    program = f"""
from triton import compile, language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from esper_telemetry.scan.triton_kernel import WARPS, add_up_layers, count_chunks
target, options, int64 = GPUTarget("cuda", {capability}, 32), dict(num_warps=WARPS), "*i64"
table = dict(addresses=int64, numels=int64, chunks="*i32", records=int64, first="i32", DTYPE="constexpr")
for dtype in (tl.float32, tl.bfloat16, tl.float16, tl.float64):
    ptx = compile(ASTSource(count_chunks, table, dict(DTYPE=dtype)), target=target, options=options).asm["ptx"]
    assert "ld.global.v4.b32" in ptx or "ld.global.v2.b64" in ptx
table = dict.fromkeys(["records", "starts", "layers"], int64)
compile(ASTSource(add_up_layers, table, dict()), target=target, options=options)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


@pytest.mark.gpu
@on_gpu
class TestOnAGpu:
    @pytest.fixture
    def no_synchronisation(self):
        def forbid(mode):
            torch.cuda.set_sync_debug_mode(mode)

        yield forbid
        torch.cuda.set_sync_debug_mode("default")

    def network(self):
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(64, 64) for _ in range(20))).to(DEVICE)

    def backward(self, model):
        model.zero_grad()
        model(torch.ones(8, 64, device=DEVICE)).sum().backward()

    def test_a_healthy_step_never_synchronises(self, no_synchronisation):
        model = self.network()
        monitor = watch(model, statistics_every=2)
        self.backward(model)
        monitor.flush()
        x = torch.ones(8, 64, device=DEVICE)
        no_synchronisation("error")
        for _ in range(20):
            model.zero_grad()
            model(x).sum().backward()
            monitor.clip_grad_norm_(1.0)
        no_synchronisation("default")
        monitor.flush()
        assert (monitor.snapshot.checks, monitor.snapshot.monitor_errors) == (21, 0)
        assert monitor.snapshot.dead_layers == 0

    def test_a_step_allocates_nothing_once_it_is_warm(self):
        gradients = [torch.randn(numel, device=DEVICE) for numel in (3, 4096, CHUNK + 1)]
        scanner = CudaScanner()
        for _ in range(3):
            scanner.launch(gradients).result()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        for _ in range(50):
            scanner.launch(gradients).result()
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before

    def test_looks_at_the_gradient_in_the_order_of_the_current_stream(self):
        scanner, gradient = CudaScanner(), torch.zeros(1 << 20, device=DEVICE)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000_000)
            gradient[7:8].fill_(math.inf)
            pending = scanner.launch([gradient])
            gradient.zero_()
        assert not pending.ready()
        assert torch.cuda.current_stream().query()
        assert pending.result().bad == {0: (1, 0)}

    def test_results_come_out_in_order_and_flush_waits_for_the_last(self):
        model = self.network()
        monitor, seen = GradientMonitor(model), []
        monitor.on_check(lambda snapshot: seen.append((snapshot.checks, snapshot.inf_grad_count)))
        self.backward(model)
        monitor.update()
        monitor.flush()
        torch.cuda._sleep(1_000_000_000)
        for count in range(1, 6):
            self.backward(model)
            model[3].weight.grad.view(-1)[:count].fill_(math.inf)
            monitor.update()
        assert monitor.snapshot.checks == 1
        monitor.flush()
        assert seen == [(1, 0), (2, 1), (3, 2), (4, 3), (5, 4), (6, 5)]
        assert monitor.snapshot.origin_layer == "3.weight"

    def test_an_intervention_has_the_answer_before_the_optimizer_steps(self):
        model = self.network()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        monitor = watch(model, optimizer=optimizer, on_critical="skip", before_check=lambda _: spoil())

        def spoil():
            model[3].weight.grad[0] = math.nan

        self.backward(model)
        optimizer.step()
        assert monitor.snapshot.skipped_updates["intervention"] == 1
        assert not any(parameter.isnan().any() for parameter in model.parameters())

    def test_counts_past_2_to_the_24_are_exact(self):
        numel = 2**24 + 3
        gradient = torch.full((numel,), math.nan, device=DEVICE)
        gradient[0] = gradient[-1] = -math.inf
        assert CudaScanner().launch([gradient]).result().bad == {0: (2, numel - 2)}

    def test_a_captured_graph_survives_a_check(self):
        model = self.network()
        monitor = GradientMonitor(model)
        self.backward(model)
        monitor.update()
        monitor.flush()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model[0].weight.grad.mul_(2)
            monitor.update()
        graph.replay()
        torch.cuda.synchronize()
        assert (monitor.snapshot.checks, monitor.snapshot.monitor_errors) == (1, 1)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device: gradients on two did not run")
    def test_gradients_on_two_devices_are_one_check(self):
        gradients = [torch.ones(4, device="cuda:0"), torch.full((5,), math.nan, device="cuda:1")]
        found = CudaScanner().launch(gradients).result()
        assert (found.bad, found.elements) == ({1: (0, 5)}, 9)
