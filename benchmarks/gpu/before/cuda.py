"""Measure gradients on CUDA devices without waiting for them: launch now, fetch the result when it is there."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from triton import language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

from benchmarks.gpu.before.triton_kernel import CHUNK, RECORD, add_up_layers, count_chunks
from esper_telemetry.health import DEAD_ZERO_FRACTION, EXPLODING_LARGE_FRACTION
from esper_telemetry.scan.layouts import flats, local_numel, materialize
from esper_telemetry.scan.result import Scan

_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
_TILE = 2048
_WARPS = 8
_WIDTH = 512
_PLANS = 16


class CudaScanner:
    """Launch scans on the current stream of each device that holds gradients.

    Buffers are kept from one scan to the next. Each belongs to one stream, and is used again only after the result
    that it carries was fetched: then neither a host that runs ahead nor a change of streams can overwrite it.
    Complex gradients are not for this kernel. A sparse one is coalesced first, which waits for the device.
    """

    def __init__(self) -> None:
        self._plans: dict[tuple[torch.device, int, tuple[_Layer, ...]], _Plan] = {}

    def launch(self, gradients: Sequence[Tensor | None]) -> PendingCudaScan:
        """Start counting what the gradients hold now, in the order of the stream; what changes later is not seen."""
        numels: dict[int, int] = {}
        layers: dict[torch.device, list[_Layer]] = {}
        pieces: dict[torch.device, list[Tensor]] = {}  # kept until the launch: some are copies
        for index, gradient in enumerate(gradients):
            if gradient is None:
                continue
            numels[index] = local_numel(gradient)
            parts = _flat_parts(gradient)
            device = gradient.device
            aligned = all(part.data_ptr() % 16 == 0 for part in parts)
            layer = _Layer(index, parts[0].dtype, aligned, tuple(part.numel() for part in parts))
            layers.setdefault(device, []).append(layer)
            pieces.setdefault(device, []).extend(parts)
        launched = []
        for device in layers:
            with torch.cuda.device(device):
                plan = self._plan(device, tuple(layers[device]))
                launched.append((plan, plan.launch(pieces[device])))
        return PendingCudaScan(len(gradients), numels, launched)

    def _plan(self, device: torch.device, layers: tuple[_Layer, ...]) -> _Plan:
        key = device, torch.cuda.current_stream(device).cuda_stream, layers
        plan = self._plans.pop(key, None) or _Plan(device, layers)
        self._plans[key] = plan  # the most recent last
        if len(self._plans) > _PLANS:
            del self._plans[next(iter(self._plans))]
        return plan


class PendingCudaScan:
    """Hold a scan that is still on its way."""

    def __init__(self, gradients: int, numels: dict[int, int], launched: list[tuple[_Plan, _Slot]]) -> None:
        self._gradients = gradients
        self._numels = numels
        self._launched = launched
        self._scan: Scan | None = None

    def ready(self) -> bool:
        """Tell whether `result()` would return at once; never wait."""
        return self._scan is not None or all(plan.has_filled(slot) for plan, slot in self._launched)

    def result(self) -> Scan:
        """Return what was found; wait for it when it is not there yet."""
        if self._scan is None:
            self._scan = self._collect()
        return self._scan

    def _collect(self) -> Scan:
        norms: list[float | None] = [None] * self._gradients
        bad: dict[int, tuple[int, int]] = {}
        dead = exploding = 0
        for plan, slot in self._launched:
            results = plan.take(slot)
            plan_norms = results.view(torch.float64)[:, -1].tolist()
            for index, (inf, nan, nonzero, large, _), norm in zip(
                plan.places, results.tolist(), plan_norms, strict=True
            ):
                numel = max(1, self._numels[index])
                norms[index] = norm
                if inf or nan:
                    bad[index] = inf, nan
                dead += (self._numels[index] - nonzero) / numel > DEAD_ZERO_FRACTION
                exploding += large / numel > EXPLODING_LARGE_FRACTION
        return Scan(norms, dict(sorted(bad.items())), sum(self._numels.values()), dead, exploding)


class _Layer(NamedTuple):
    """Say how a gradient lies in memory; where it lies may change with every step."""

    place: int
    dtype: torch.dtype
    aligned: bool
    numels: tuple[int, ...]


class _Plan:
    """Cut the gradients of one device into chunks; holds for as long as their layout stays the same."""

    def __init__(self, device: torch.device, layers: tuple[_Layer, ...]) -> None:
        segments = iter(range(sum(len(layer.numels) for layer in layers)))
        cut = [(layer, [_chunks(next(segments), numel) for numel in layer.numels]) for layer in layers]
        cut.sort(key=lambda each: (str(each[0].dtype), each[0].aligned))
        self.places = [layer.place for layer, _ in cut]
        self._groups: list[tuple[torch.dtype, bool, int, int]] = []
        self._free: list[_Slot] = []
        starts = [0]
        for (dtype, aligned), members in groupby(cut, key=lambda each: (each[0].dtype, each[0].aligned)):
            first = starts[-1]
            for _, parts in members:
                starts.append(starts[-1] + sum(map(len, parts)))
            if starts[-1] > first:
                self._groups.append((dtype, aligned, first, starts[-1] - first))
        self._device = device
        self._numels = _upload(torch.tensor([numel for layer in layers for numel in layer.numels]), device)
        self._chunks = _upload(torch.cat([part for _, parts in cut for part in parts]), device)
        self._starts = _upload(torch.tensor(starts), device)

    def launch(self, pieces: Sequence[Tensor]) -> _Slot:
        """Start counting on the current stream, and return the slot where the result will be."""
        slot = self._free.pop() if self._free else self._slot()
        slot.addresses_host.copy_(torch.tensor([piece.data_ptr() for piece in pieces]))
        slot.addresses.copy_(slot.addresses_host, non_blocking=True)
        for dtype, aligned, first, count in self._groups:
            count_chunks[(count,)](
                slot.addresses,
                self._numels,
                self._chunks,
                slot.records,
                first,
                DTYPE=_DTYPES[dtype],
                ALIGNED=aligned,
                CHUNK=CHUNK,
                TILE=_TILE,
                num_warps=_WARPS,
            )
        add_up_layers[(len(self.places),)](slot.records, self._starts, slot.results, WIDTH=_WIDTH, num_warps=_WARPS)
        slot.results_host.copy_(slot.results, non_blocking=True)
        slot.done.record()
        return slot

    def has_filled(self, slot: _Slot) -> bool:
        """Tell whether the result is in the slot."""
        with self._on_device():
            return bool(slot.done.query())  # type: ignore[no-untyped-call]

    def take(self, slot: _Slot) -> Tensor:
        """Wait for the result, return it, and keep the slot for another launch."""
        with self._on_device():
            slot.done.synchronize()
        results = slot.results_host.clone()
        self._free.append(slot)
        return results

    def _on_device(self) -> torch.cuda.device:
        # A thread that never chose a device would open a context on device 0, which may be another process's.
        return torch.cuda.device(self._device)

    def _slot(self) -> _Slot:
        def on_device(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int64, device=self._device)

        segments, chunks, layers = len(self._numels), len(self._chunks), len(self.places)
        return _Slot(
            addresses_host=_pinned(segments),
            addresses=on_device(segments),
            records=on_device(chunks, RECORD),
            results=on_device(layers, RECORD),
            results_host=_pinned(layers, RECORD),
            done=torch.cuda.Event(),  # type: ignore[no-untyped-call]
        )


class _Slot(NamedTuple):
    """Hold the buffers of one scan, from its launch until its result was fetched."""

    addresses_host: Tensor
    addresses: Tensor
    records: Tensor
    results: Tensor
    results_host: Tensor
    done: torch.cuda.Event


def _flat_parts(gradient: Tensor) -> list[Tensor]:
    """Return dense parts that together hold every stored element; the order of elements does not matter here."""
    plain = type(gradient) is Tensor and gradient.dtype in _DTYPES and gradient.layout is torch.strided
    if plain and gradient.is_contiguous():
        return [gradient]
    parts = (part.contiguous() for part in flats(materialize(gradient)))  # a part may have a stride
    return [part if part.dtype in _DTYPES else part.float() for part in parts]


def _chunks(segment: int, numel: int) -> Tensor:
    """Return (segment, number) of each chunk."""
    numbers = torch.arange(-(-numel // CHUNK))
    return torch.stack([torch.full_like(numbers, segment), numbers], dim=1)


def _pinned(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, pin_memory=True)


def _upload(table: Tensor, device: torch.device) -> Tensor:
    staged = _pinned(*table.shape).copy_(table)
    return staged.to(device, non_blocking=True)
