"""Everything that looks at gradients on a GPU: ours, and what people use today."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contenders import FOREACH_NORM, ORIGINAL, RECORD, TORCH_CLIP, _original_collector
from benchmarks.gpu.clock import Call, Contender
from benchmarks.gradients import all_bad, count_by_isinf_and_isnan, one_layer_bad
from esper_telemetry import GradientMonitor
from esper_telemetry.scan import PendingScan, Scan

CHECK = "check, healthy"
ONE_BAD = "check, one bad element"
ALL_BAD = "check, every element bad"
UPDATE = "monitor.update(), healthy"
AMP = "torch._amp_foreach_non_finite_check_and_unscale_"

OURS = frozenset({CHECK, ONE_BAD, ALL_BAD, UPDATE})

Launch = Callable[[Sequence[Tensor | None]], Scan | PendingScan]

Gradients = list[list[Tensor]]
"""Copies of the gradients of a model, which take turns so that none is still in the cache."""


@dataclass(slots=True)
class Check:
    """Check as a monitor does: launch, and take the results of earlier checks that are there."""

    launch: Launch
    gradients: Gradients
    waits: bool = False
    _pending: deque[PendingScan] = field(default_factory=deque)
    _turn: Any = None

    def run(self) -> None:
        """Launch one check."""
        if self._turn is None:
            self._turn = cycle(self.gradients)
        while self._pending and self._pending[0].ready():
            self._pending.popleft().result()
        found = self.launch(next(self._turn))
        if not isinstance(found, Scan):
            self._pending.append(found)

    def finish(self) -> None:
        """Take every result."""
        while self._pending:
            self._pending.popleft().result()


@dataclass(slots=True)
class Update:
    """Check through the public method; a monitor does not keep its model alive, so it is kept here."""

    monitor: GradientMonitor
    model: nn.Module
    waits: bool = False

    def run(self) -> None:
        """Check once."""
        self.monitor.update()

    def finish(self) -> None:
        """Publish every result."""
        self.monitor.flush()


def contenders(launch: Launch, copies: Gradients, room: int) -> tuple[dict[str, Contender], dict[str, str]]:
    """Return name -> what is timed, and name -> why it is not.

    A check that does not find exactly what `isinf` and `isnan` find is an AssertionError here, before it is timed.

    room: bytes for copies of the gradients.
    """
    gradients = copies[0]
    timed: dict[str, Contender] = {CHECK: Check(launch, copies)}
    skipped = {}
    assert_exact(launch, gradients)
    one = one_layer_bad(gradients)
    assert_exact(launch, one)
    timed[ONE_BAD] = Check(launch, [one])
    size = sum(gradient.nbytes for gradient in gradients)
    if size * len(copies) < room:
        bad = [all_bad(gradients, math.nan, math.inf, math.nan, -math.inf) for _ in copies]
        assert_exact(launch, bad[0])
        timed[ALL_BAD] = Check(launch, bad)
    else:
        skipped[ALL_BAD] = "another copy of the gradients does not fit in memory"
    model = _model(gradients)
    timed[UPDATE] = Update(GradientMonitor(model), model)
    timed |= _others(copies)
    return timed, skipped


def assert_exact(launch: Launch, gradients: list[Tensor]) -> None:
    """Hold a check to what torch finds, layer by layer."""
    found = launch(gradients)
    found = found if isinstance(found, Scan) else found.result()
    expected = torch.stack([torch.stack([each.isinf().sum(), each.isnan().sum()]) for each in gradients]).tolist()
    wrong = [
        (index, found.bad.get(index, (0, 0)), tuple(counts))
        for index, counts in enumerate(expected)
        if found.bad.get(index, (0, 0)) != tuple(counts)
    ]
    assert not wrong, f"layer, found, expected: {wrong[:5]}"
    for index, counts in enumerate(expected[:20]):
        if not any(counts):
            norm = torch.linalg.vector_norm(gradients[index], dtype=torch.float64).item()
            assert math.isclose(found.norms[index] or 0.0, norm, rel_tol=1e-4), (index, found.norms[index], norm)


def _others(copies: Gradients) -> dict[str, Contender]:
    def by_turns(function: Callable[[list[Tensor]], object]) -> Callable[[], object]:
        turn = cycle(copies)
        return lambda: function(next(turn))

    device = copies[0][0].device
    found, scale = torch.zeros(1, device=device), torch.ones(1, device=device)
    models = {id(each): list(_model(each).parameters()) for each in copies}
    amp = Call(by_turns(lambda each: torch._amp_foreach_non_finite_check_and_unscale_(each, found, scale)))
    return {
        FOREACH_NORM: Call(by_turns(lambda gradients: torch._foreach_norm(gradients, 2))),
        **({} if copies[0][0].dtype is torch.bfloat16 else {AMP: amp}),  # torch refuses bfloat16 there
        # torch multiplies every gradient at each call; by 1 here, because no norm is above this limit.
        TORCH_CLIP: Call(by_turns(lambda each: torch.nn.utils.clip_grad_norm_(models[id(each)], 1e9))),
        RECORD: Call(by_turns(count_by_isinf_and_isnan), waits=True),
        ORIGINAL: Call(by_turns(_original_collector), waits=True),
    }


def _model(gradients: list[Tensor]) -> nn.Module:
    """Return a model with these gradients, whose parameters take no memory: all elements are the same one."""
    parameters = []
    for gradient in gradients:
        parameter = nn.Parameter(gradient.new_zeros(1).expand(gradient.shape))
        parameter.grad = gradient
        parameters.append(parameter)
    return nn.ParameterList(parameters)
