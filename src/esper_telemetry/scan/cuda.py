"""Measure gradients on CUDA devices without waiting for them: launch now, fetch the result when it is there."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress, groupby
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor
from triton import language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

from esper_telemetry.health import DEAD_ZERO_FRACTION, EXPLODING_LARGE_FRACTION
from esper_telemetry.scan.layouts import flats, local_numel, materialize
from esper_telemetry.scan.result import Scan
from esper_telemetry.scan.triton_kernel import CHUNK, RECORD, WARPS, add_up_layers, count_chunks

_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
_PLANS = 16
_CPU = torch.device("cpu")  # explicit, because a loop may have made another device the default
_LIMITS = torch.tensor([0, 0, DEAD_ZERO_FRACTION, EXPLODING_LARGE_FRACTION], dtype=torch.float64, device=_CPU)

_LAYOUT = attrgetter("layout")
_DTYPE = attrgetter("dtype")


class CudaScanner:
    """Launch scans on the current stream of each device that holds gradients.

    Buffers are kept from one scan to the next. Each belongs to one stream, and is used again only after the result
    that it carries was fetched: then neither a host that runs ahead nor a change of streams can overwrite it.
    Complex gradients are not for this kernel. A sparse one is coalesced first, which waits for the device.
    """

    def __init__(self) -> None:
        self._plans: dict[tuple[object, ...], _Plan] = {}

    def launch(self, gradients: Sequence[Tensor | None]) -> PendingCudaScan:
        """Start counting what the gradients hold now, in the order of the stream; what changes later is not seen."""
        present = [gradient for gradient in gradients if gradient is not None]
        places = [place for place, gradient in enumerate(gradients) if gradient is not None]
        indices = list(map(Tensor.get_device, present))
        launched = []
        for index in sorted(set(indices)):
            here = [other == index for other in indices]
            layers = _Layers.of(tuple(compress(places, here)), list(compress(present, here)))
            device = layers.parts[0].device
            with torch.cuda.device(device):
                plan = self._plan(device, layers)
                launched.append((plan, plan.launch(layers)))
        return PendingCudaScan(len(gradients), launched)

    def _plan(self, device: torch.device, layers: _Layers) -> _Plan:
        key = device, torch.cuda.current_stream(device).cuda_stream, *layers.layout
        plan = self._plans.pop(key, None)
        if plan is None:
            with _CPU:
                plan = _Plan(device, layers)
        self._plans[key] = plan  # the most recent last
        if len(self._plans) > _PLANS:
            del self._plans[next(iter(self._plans))]
        return plan


class PendingCudaScan:
    """Hold a scan that is still on its way."""

    def __init__(self, gradients: int, launched: list[tuple[_Plan, _Slot]]) -> None:
        self._gradients = gradients
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
        elements = dead = exploding = 0
        for plan, slot in self._launched:
            found = plan.take(slot)
            elements += plan.elements
            for place, norm in zip(plan.places, found.view(torch.float64)[:, -1].tolist(), strict=True):
                norms[place] = norm
            layers_with_inf, layers_with_nan, now_dead, now_exploding = plan.judge(found)
            if layers_with_inf or layers_with_nan:
                bad |= {
                    place: (inf, nan)
                    for place, (inf, nan) in zip(plan.places, found[:, :2].tolist(), strict=True)
                    if inf or nan
                }
            dead += now_dead
            exploding += now_exploding
        return Scan(norms, dict(sorted(bad.items())), elements, dead, exploding)


class _Layers(NamedTuple):
    """Say where gradients of one device lie in memory, in parts that are dense.

    layout: what a plan holds for: of each layer its place among the gradients, how many elements it has, and how many
        parts; of each part its elements and its dtype.
    """

    parts: list[Tensor]  # kept until the launch: some are copies
    layout: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[torch.dtype, ...]]

    @classmethod
    def of(cls, places: tuple[int, ...], gradients: list[Tensor]) -> _Layers:
        """Flatten gradients of one device; Python does little for each of many plain ones."""
        dtypes = tuple(map(_DTYPE, gradients))
        if (
            set(map(type, gradients)) == {Tensor}
            and set(map(_LAYOUT, gradients)) == {torch.strided}
            and all(map(Tensor.is_contiguous, gradients))
            and _DTYPES.keys() >= set(dtypes)
        ):
            numels = tuple(map(Tensor.numel, gradients))
            return cls(gradients, (places, numels, (1,) * len(numels), numels, dtypes))
        parts = list(map(_flat_parts, gradients))
        flat = [part for each in parts for part in each]
        numels, dtypes = tuple(map(Tensor.numel, flat)), tuple(map(_DTYPE, flat))
        return cls(flat, (places, tuple(map(local_numel, gradients)), tuple(map(len, parts)), numels, dtypes))


class _Plan:
    """Cut the gradients of one device into chunks; holds for as long as their layout stays the same."""

    def __init__(self, device: torch.device, layers: _Layers) -> None:
        places, layer_numels, lengths, numels, dtypes = layers.layout
        ends = torch.tensor(lengths).cumsum(0).tolist()
        cut = [
            (place, numel, dtypes[end - length], range(end - length, end))
            for place, numel, length, end in zip(places, layer_numels, lengths, ends, strict=True)
        ]
        cut.sort(key=lambda each: str(each[2]))
        self.places = [place for place, *_ in cut]
        self.elements = sum(layer_numels)
        sizes = torch.tensor([numel for _, numel, *_ in cut], dtype=torch.float64)
        none, divisors = torch.zeros_like(sizes), sizes.clamp(min=1)
        self._offsets = torch.stack([none, none, sizes, none], dim=1)
        self._divisors = torch.stack([none + 1, none + 1, -divisors, divisors], dim=1)
        self._groups: list[tuple[torch.dtype, int, int]] = []
        self._free: list[_Slot] = []
        chunks: list[Tensor] = []
        starts = [0]
        for dtype, members in groupby(cut, key=lambda each: each[2]):
            first = starts[-1]
            for *_, segments in members:
                parts = [_chunks(segment, numels[segment]) for segment in segments]
                starts.append(starts[-1] + sum(map(len, parts)))
                chunks += parts
            if starts[-1] > first:
                self._groups.append((dtype, first, starts[-1]))
        self._device = device
        self._numels = _upload(torch.tensor(numels), device)
        self._chunks = _upload(torch.cat(chunks), device)
        self._starts = _upload(torch.tensor(starts), device)

    def launch(self, layers: _Layers) -> _Slot:
        """Start counting on the current stream, and return the slot where the result will be."""
        slot = self._free.pop() if self._free else self._slot()
        slot.point_to(list(map(Tensor.data_ptr, layers.parts)))
        self._count(slot)
        slot.results_host.copy_(slot.results, non_blocking=True)
        slot.done.record()
        return slot

    def _count(self, slot: _Slot) -> None:
        for dtype, first, last in self._groups:
            count_chunks[(last - first,)](
                slot.addresses,
                self._numels,
                self._chunks,
                slot.records,
                first,
                DTYPE=_DTYPES[dtype],
                num_warps=WARPS,
            )
        add_up_layers[(len(self.places),)](slot.records, self._starts, slot.results, num_warps=WARPS)

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

    def judge(self, found: Tensor) -> list[int]:
        """Return how many layers have an Inf, have a NaN, are dead, and explode."""
        # Few operations, since each takes the host longer than the numbers do: (nonzero - n) / -n are the zeros of n.
        exceeds = (found[:, :-1] - self._offsets) / self._divisors > _LIMITS
        return exceeds.sum(dim=0).tolist()

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


@dataclass(slots=True)
class _Slot:
    """Hold the buffers of one scan, from its launch until its result was fetched."""

    addresses_host: Tensor
    addresses: Tensor
    records: Tensor
    results: Tensor
    results_host: Tensor
    done: torch.cuda.Event
    _pointers: list[int] | None = None

    def point_to(self, pointers: list[int]) -> None:
        """Upload where the gradients are, unless they are where they were the last time."""
        if pointers != self._pointers:
            self._pointers = pointers
            self.addresses_host.copy_(torch.frombuffer(array("q", pointers), dtype=torch.int64))
            self.addresses.copy_(self.addresses_host, non_blocking=True)


def _flat_parts(gradient: Tensor) -> list[Tensor]:
    """Return dense parts that together hold every stored element; the order of elements does not matter here."""
    parts = (part.contiguous() for part in flats(materialize(gradient)))  # a part may have a stride
    return [part if part.dtype in _DTYPES else part.float() for part in parts]


def _chunks(segment: int, numel: int) -> Tensor:
    """Return (segment, number) of each chunk."""
    numbers = torch.arange(-(-numel // CHUNK), dtype=torch.int32)
    return torch.stack([torch.full_like(numbers, segment), numbers], dim=1)


def _pinned(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=_CPU, pin_memory=True)


def _upload(table: Tensor, device: torch.device) -> Tensor:
    return _pinned(*table.shape, dtype=table.dtype).copy_(table).to(device, non_blocking=True)
