"""What the memory of this device can do: nothing that reads every gradient is faster."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
from torch import Tensor
from triton import language as tl

from benchmarks.gpu.clock import Call, Contender, take_turns
from benchmarks.measurement import Spread

_CONFIGURATIONS = [(4096, 8, 4), (4096, 8, 8), (8192, 8, 4), (8192, 8, 8), (8192, 16, 4), (16384, 16, 2), (16384, 8, 4)]
"""Elements at a time, warps, and programs per multiprocessor."""


@triton.jit
def add_up(source, sums, numel, BLOCK: tl.constexpr):
    """Add up float32s, of which there are a multiple of BLOCK."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(tl.program_id(0) * BLOCK, numel, tl.num_programs(0) * BLOCK):
        total += tl.load(source + start + lane)
    tl.store(sums + tl.program_id(0), tl.sum(total))


def measure_ceiling(device: torch.device, numel: int, processors: int, seconds: float) -> dict[str, object]:
    """Copy and read float32s."""
    source, copy = torch.randn(numel, device=device), torch.empty(numel, device=device)
    contenders: dict[str, Contender] = {
        "copy": Call(partial(copy.copy_, source)),
        "read: torch.sum": Call(source.sum),
        "read: torch.amax": Call(source.amax),
    }
    expected = source.double().sum().item()
    scale = source.double().abs().sum().item()
    for block, warps, programs in _CONFIGURATIONS:
        read = _reader(source, block, warps, programs * processors)
        assert abs(read().double().sum().item() - expected) <= 1e-6 * scale
        contenders[f"read: Triton, {block} elements, {warps} warps, {programs} programs"] = Call(read)
    samples = take_turns(contenders, 15, seconds)
    rates = {
        name: [source.nbytes * (2 if name == "copy" else 1) / device_seconds for device_seconds in each.device]
        for name, each in samples.items()
    }
    medians = {name: Spread.of(each).median for name, each in rates.items()}
    fastest = max((name for name in medians if name != "copy"), key=medians.__getitem__)
    return {
        "kind": "ceiling",
        "title": f"Memory, {source.nbytes / 2**30:.3g} GiB",
        "copy_bytes_per_second": medians["copy"],
        "read_bytes_per_second": medians[fastest],
        "read_by": fastest,
        "rates": rates,
    }


def _reader(source: Tensor, block: int, warps: int, programs: int) -> Callable[[], Tensor]:
    sums = torch.empty(programs, device=source.device)

    def read() -> Tensor:
        add_up[(programs,)](source, sums, source.numel(), BLOCK=block, num_warps=warps)
        return sums

    return read
