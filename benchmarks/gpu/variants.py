"""Versions of the kernel, side by side: which one stays."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from itertools import product

import torch
from torch import Tensor

from benchmarks.gpu.before.cuda import CudaScanner as ScannerBefore
from benchmarks.gpu.clock import take_turns
from benchmarks.gpu.contenders import Check, Launch, assert_exact
from benchmarks.gpu.models import Model
from esper_telemetry.scan.cuda import CudaScanner, Tuning

BEFORE = "before"
NEW = "new"
OF_SMALL_MODELS = (BEFORE, NEW, "two kernels", "256 rows, 4 warps", "8 programs per multiprocessor")
"""Those that can differ where the host takes longer than the device."""


def variants(processors: int) -> dict[str, Callable[[], Launch]]:
    """Return name -> what makes the version; each keeps its own buffers."""
    tunings = {
        NEW: Tuning(),
        "two kernels": Tuning(fused=False),
        "squares alone": Tuning(tallies=False),  # no dead and exploding layers: what these two counts cost
        "4 programs per multiprocessor": Tuning(programs=4 * processors),
        "8 programs per multiprocessor": Tuning(programs=8 * processors),
        "64 registers": Tuning(registers=64),
        "48 registers": Tuning(registers=48),
        "40 registers": Tuning(registers=40),
        "32 registers": Tuning(registers=32),
        "chunks of 2^14": Tuning(chunk=1 << 14),
        "chunks of 2^16": Tuning(chunk=1 << 16),
        "chunks of 2^17": Tuning(chunk=1 << 17),
        "256 rows, 4 warps": Tuning(rows=256, warps=4),
        "256 rows, 8 warps": Tuning(rows=256),
        "512 rows, 4 warps": Tuning(rows=512, warps=4),
        "1024 rows, 8 warps": Tuning(rows=1024),
        "1024 rows, 16 warps": Tuning(rows=1024, warps=16),
        "512 rows, 16 warps": Tuning(rows=512, warps=16),
        "two kernels, chunks of 2^16": Tuning(fused=False, chunk=1 << 16),
        "two kernels, 1024 rows": Tuning(fused=False, rows=1024),
        "two kernels, 256 rows": Tuning(fused=False, rows=256),
        "two kernels, 40 registers": Tuning(fused=False, registers=40),
    }
    made: dict[str, Callable[[], Launch]] = {BEFORE: lambda: ScannerBefore().launch}
    return made | {name: lambda tuning=tuning: CudaScanner(tuning).launch for name, tuning in tunings.items()}


def measure_variants(
    model: Model, made: Mapping[str, Callable[[], Launch]], device: torch.device, seconds: float, largest: int
) -> dict[str, object]:
    """Time every version on the gradients of one model; one that is not exact is not timed."""
    gradients = [model.make(device)]
    timed, failed, first = {}, {}, {}
    for name, make in made.items():
        launch = make()
        try:
            started = time.perf_counter()
            launch(gradients[0]).result()
            first[name] = time.perf_counter() - started
            for odd in odd_gradients(device, [model.dtype], largest):
                assert_exact(launch, odd)
            assert_exact(launch, gradients[0])
        except Exception as error:  # a version that does not compile is a result, too
            failed[name] = f"{type(error).__name__}: {error}"[:500]
            continue
        timed[name] = Check(launch, gradients)
    samples = take_turns(timed, 9, seconds)
    return {
        "kind": "variants",
        "title": f"Versions of the kernel: {model.title}",
        "bytes": model.bytes,
        "contenders": {name: each.plain() for name, each in samples.items()},
        "first_check_seconds": first,
        "failed": failed,
    }


def odd_gradients(device: torch.device, dtypes: list[torch.dtype], largest: int) -> list[list[Tensor]]:
    """Return gradients of odd sizes that begin anywhere, with bad and with huge elements at random places."""
    generator = torch.Generator(device).manual_seed(time.time_ns() % 2**31)
    sets: list[list[Tensor]] = []
    for values in ((), (math.inf, -math.inf, math.nan), (1e38, -1e38)):
        gradients = []
        for dtype, numel, offset in product(dtypes, [each for each in _NUMELS if each <= largest], (0, 1, 3)):
            memory = torch.empty(numel + offset, dtype=dtype, device=device).normal_(generator=generator)
            gradient = memory[offset:]
            for value in values:
                if numel and (value not in (1e38, -1e38) or dtype != torch.float16):
                    places = torch.randint(numel, (1 + numel // 1000,), generator=generator, device=device)
                    gradient[places] = value
            gradients.append(gradient)
        sets.append(gradients)
    return sets


_NUMELS = [0, 1, 5, 8, 1000, 2047, 2049, 4096, 4099, 32767, 32768, 32769, 3 * 32768 + 5, 131072 + 4097, (1 << 20) + 3]


def measure_host_parts(device: torch.device) -> dict[str, object]:
    """Time the pieces of a launch on the host, on a device that has little else to do."""
    scanner = CudaScanner()
    gradients = [torch.randn(1000, device=device) for _ in range(12)]
    scanner.launch(gradients).result()
    source = torch.zeros(60, dtype=torch.int64, device=device)
    pinned = torch.zeros(60, dtype=torch.int64, pin_memory=True)
    event = torch.cuda.Event()
    many = [torch.randn(1000, device=device) for _ in range(1000)]
    pieces: dict[str, Callable[[], object]] = {
        "launch, 12 tensors": lambda: scanner.launch(gradients).result(),
        "copy to pinned memory": lambda: pinned.copy_(source, non_blocking=True),
        "copy from pinned memory": lambda: source.copy_(pinned, non_blocking=True),
        "record an event": event.record,
        "query an event": event.query,
        "choose a device": lambda: torch.cuda.device(device).__enter__(),
        "current stream": lambda: torch.cuda.current_stream(device),
        "1,000 x get_device": lambda: list(map(Tensor.get_device, many)),
        "1,000 x data_ptr": lambda: list(map(Tensor.data_ptr, many)),
        "1,000 x numel": lambda: list(map(Tensor.numel, many)),
        "1,000 x is_contiguous": lambda: list(map(Tensor.is_contiguous, many)),
    }
    (plan,) = scanner._plans.values()
    slot = plan._free[0]
    pieces["one Triton launch"] = lambda: plan._count(slot)
    return {
        "kind": "host",
        "title": "Pieces of a launch, host seconds",
        "seconds": {name: _host_seconds(piece) for name, piece in pieces.items()},
    }


def _host_seconds(piece: Callable[[], object]) -> float:
    best = math.inf
    for _ in range(10):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(50):
            piece()
        best = min(best, (time.perf_counter() - started) / 50)
    return best
