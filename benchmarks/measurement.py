"""How everything is measured: contenders take turns in one process, and each round is compared with itself."""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from statistics import median

from torch.profiler import ProfilerActivity, profile

Tick = Callable[[], object]

OFTEN = 3
"""Turns per round of contenders that differ by so little that one turn does not tell."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Sum up samples."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, samples: list[float]) -> Spread:
        """Return the spread of one sample or more."""
        return cls(min(samples), median(samples), max(samples))


@dataclass(frozen=True, slots=True)
class Footprint:
    """Hold how many bytes a call allocated: the largest single temporary, and the most that was held at once."""

    largest: int
    peak: int


@dataclass(slots=True)
class Section:
    """Hold what contenders took that were measured together.

    base: the contender that the others are compared with.
    samples: contender -> seconds of one call, a sample per turn.
    largest_layer: elements of the largest gradient; 0 where the work is a training run.
    skipped: contender -> why it could not be measured.
    """

    name: str
    title: str
    base: str
    samples: dict[str, list[float]]
    memory: dict[str, Footprint] = field(default_factory=dict)
    largest_layer: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def seconds(self, name: str) -> Spread:
        """Return what one call took."""
        return Spread.of(self.samples[name])

    def ratio(self, name: str, base: str | None = None) -> Spread:
        """Return how many times as long as the base, which has as many turns or more, it took at the same turn."""
        mine, theirs = self.samples[name], self.samples[base or self.base]
        pairs = zip(mine, theirs[:: len(theirs) // len(mine)], strict=True)
        return Spread.of([seconds / reference for seconds, reference in pairs])


def alternate(
    timed: Mapping[str, Callable[[], float]], rounds: int, tick: Tick, often: Collection[str] = ()
) -> dict[str, list[float]]:
    """Let each contender return its seconds once per round, in another order each round; those in `often` thrice."""
    samples: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(rounds * OFTEN if often else rounds):
        names = [name for name in timed if not often or name in often or number % OFTEN == 0]
        for name in random.Random(number).sample(names, len(names)):
            samples[name].append(timed[name]())
            tick()
    return samples


class Repeated:
    """Time a call so short that it has to be repeated; making one warms it up."""

    def __init__(self, run: Callable[[], object], sample_seconds: float = 0.05) -> None:
        self._run = run
        self._calls = 1
        self()
        self._calls = math.ceil(sample_seconds / self())

    def __call__(self) -> float:
        """Return the seconds of one call."""
        gc.collect()
        gc.disable()
        started = time.perf_counter()
        for _ in range(self._calls):
            self._run()
        seconds = time.perf_counter() - started
        gc.enable()
        return seconds / self._calls


def footprint(run: Callable[[], object]) -> Footprint:
    """Return what a call allocates through torch on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    # `recorded.events()` shows only what was allocated outside an operator.
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return Footprint(max(changes, default=0), max(accumulate(changes), default=0))
