"""Time on a device: by its own events while the host is far ahead, and by the host's clock."""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Protocol

import torch

_CYCLES_PER_SECOND = 2e9  # of any GPU at most about that; sleeping longer than needed does no harm
_LONGEST_SLEEP = 0.2
_MOST_CALLS = 20  # of some dozen kernels each: a device takes about a thousand before the host has to wait


class Contender(Protocol):
    """Do the work that is timed."""

    waits: bool  # for the device, within a call

    def run(self) -> object:
        """Do it once."""

    def finish(self) -> None:
        """Take what is left of earlier calls, outside the time that is taken."""


@dataclass(frozen=True, slots=True)
class Call:
    """Time a function as it is."""

    function: Callable[[], object]
    waits: bool = False

    def run(self) -> object:
        """Call it."""
        return self.function()

    def finish(self) -> None:
        """Leave nothing."""


@dataclass(slots=True)
class Samples:
    """Hold seconds of one call, a sample per round.

    device: between two events, with nothing for the device to wait for where the call does not wait itself.
    host: until the call returns.
    elapsed: calls one after the other until the device is done with the last.
    """

    device: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    elapsed: list[float] = field(default_factory=list)

    def plain(self) -> dict[str, list[float]]:
        """Return what JSON can hold."""
        return asdict(self)


def take_turns(
    contenders: Mapping[str, Contender], rounds: int, seconds: float, sample_seconds: float = 0.02
) -> dict[str, Samples]:
    """Time each contender once per round, in another order each round, until the seconds are used up."""
    deadline = time.monotonic() + seconds
    calls = {name: _calls(contender, sample_seconds) for name, contender in contenders.items()}
    samples = {name: Samples() for name in contenders}
    for name, contender in contenders.items():
        if not contender.waits:
            _sample(contender, *calls[name], Samples())  # makes the buffers of calls whose results are not there yet
    for number in range(rounds):
        if number > 2 and time.monotonic() > deadline:
            break
        for name in random.Random(number).sample(list(contenders), len(contenders)):
            _sample(contenders[name], *calls[name], samples[name])
    return samples


def _calls(contender: Contender, sample_seconds: float) -> tuple[int, float]:
    """Warm up; return how many calls make a sample, and the host's seconds for one of them."""
    for _ in range(3):
        contender.run()
    contender.finish()
    torch.cuda.synchronize()
    started = time.perf_counter()
    contender.run()
    host = time.perf_counter() - started
    torch.cuda.synchronize()
    contender.finish()
    elapsed = time.perf_counter() - started
    return max(1, min(_MOST_CALLS, math.ceil(sample_seconds / elapsed), math.ceil(_LONGEST_SLEEP / 2 / host))), host


def _sample(contender: Contender, calls: int, host: float, samples: Samples) -> None:
    with without_garbage_collection():
        torch.cuda.synchronize()
        if not contender.waits:
            torch.cuda._sleep(int(min(_LONGEST_SLEEP, 1e-4 + 1.5 * calls * host) * _CYCLES_PER_SECOND))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            contender.run()
        end.record()
        torch.cuda.synchronize()
        samples.device.append(start.elapsed_time(end) / 1e3 / calls)
        contender.finish()

        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            contender.run()
        samples.host.append((time.perf_counter() - started) / calls)
        torch.cuda.synchronize()
        samples.elapsed.append((time.perf_counter() - started) / calls)
        contender.finish()


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Collect garbage before and not meanwhile."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
