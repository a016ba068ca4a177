"""Gradients under a GradScaler: scaled, and sometimes overflowing by design; then the scaler skips the step."""

from __future__ import annotations

import math
import weakref
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from esper_telemetry import arguments
from esper_telemetry.scan import Scan
from esper_telemetry.scan.layers import parameter_ids
from esper_telemetry.scan.scalars import Scalars
from esper_telemetry.snapshot.amp_state import AmpState

MIN_SCALE = 1.0
"""Below 1, unscaling itself makes Infs, after the scaler has looked for them."""

Counts = dict[str, tuple[int, int]]
"""Inf and NaN elements by layer name."""


class ScalerWatch:
    """Follow a GradScaler from check to check, to tell whether an overflow is explained.

    An overflow is expected while the scale is at least 1 and no more than `max_skips` steps were skipped in a row;
    before the first step that is taken, the scale alone decides, because a new scaler starts far too high by design. It
    is explained only if the skip follows: if the optimizer steps with it, or it disappears from the gradients without a
    skip, it counts after all.

    optimizers: those that the scaler steps; it explains no other gradients. They also tell which gradients are already
        unscaled, when several take turns. Without them, it is assumed to step everything.
    """

    @classmethod
    def of(
        cls, scaler: GradScaler | None, optimizers: Sequence[Optimizer] = (), max_skips: int = 8
    ) -> ScalerWatch | None:
        """Watch a scaler; None or a disabled one scales nothing and explains nothing.

        Raise ValueError when it is not a GradScaler, or the limit is invalid.
        """
        if scaler is not None and not isinstance(scaler, GradScaler):
            raise ValueError(f"scaler: expected a torch.amp.GradScaler, got {type(scaler).__name__}")
        arguments.whole("max_amp_skips", max_skips, at_least=0)
        return cls(scaler, optimizers, max_skips) if scaler is not None and scaler.is_enabled() else None

    def __init__(self, scaler: GradScaler, optimizers: Sequence[Optimizer], max_skips: int) -> None:
        self.scaler = scaler
        self.state: AmpState | None = None
        self._optimizers = [weakref.ref(optimizer) for optimizer in optimizers]
        self._max_skips = max_skips
        self._awaiting_skip: Counts = {}
        self._stepped_with: set[str] = set()

    def read(
        self,
        gradients: Sequence[Tensor | None],
        parameters: Sequence[Tensor],
        names: Sequence[str],
        arrived: Collection[int] = (),
        fresh: Collection[int] = (),
    ) -> tuple[Sequence[Tensor | None], AmpReading]:
        """Return what to measure, and what the scaler says now; never wait for a device.

        Gradients are measured as they are and their norms divided, unless dividing could make an Inf.

        parameters, names: of all layers.
        arrived: the layers that gradients have reached since the last reading.
        fresh: those of them whose gradient is a new one, and has not been added to what was there.

        Raise RuntimeError during CUDA graph capture.
        """
        scale, tracker = self.scaler._scale, self.scaler._growth_tracker  # state_dict() has both, but waits
        if scale is None or tracker is None:  # nothing was scaled yet
            scale, tracker = torch.tensor(self.scaler.get_scale()), torch.tensor(0)
        if scale.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a scaler cannot be followed during CUDA graph capture")
        foreign = self._foreign(parameters)
        unscaled = self._unscaled(parameters, frozenset(arrived))
        known = scale.item() if scale.is_cpu else self.state.scale if self.state is not None else MIN_SCALE
        if known < MIN_SCALE:  # on a device this is the scale of the last result, which is the best that is known
            done = foreign.union(*(each.layers for each in unscaled))
            gradients = [
                each if each is None or index in done else each * (1.0 / known if known else math.inf)
                for index, each in enumerate(gradients)
            ]
            unscaled = [_Unscaled(range(len(gradients)), (), False), *unscaled]
        scalars = Scalars([scale, tracker, *(found for each in unscaled for found in each.found_inf)])
        return gradients, AmpReading(
            self, names, foreign, frozenset(fresh), unscaled, scalars, self.scaler.get_backoff_factor()
        )

    def look(self) -> tuple[AmpState, Counts]:
        """Return the state as it is now, and what no skip has explained by now; wait for it."""
        names = tuple(self._awaiting_skip)
        _, reading = self.read([], [], names)
        unexplained = reading.judge(Scan([None] * len(names), {}, 0))
        return reading.state, {names[index]: counts for index, counts in unexplained.bad.items()}

    def advance(self, scale: float, growth_tracker: float, backoff_factor: float) -> None:
        """Take in what was read; in the order of reading."""
        before = self.state or AmpState(scale, skips=0, consecutive_skips=0, warm=False)
        self.state = before.after(scale, growth_tracker, backoff_factor)
        if self.state.skips > before.skips:
            self._awaiting_skip.clear()
            self._stepped_with.clear()

    @property
    def awaits_skip(self) -> bool:
        """Tell whether an overflow was found whose skip has yet to come."""
        return bool(self._awaiting_skip)

    def stepped(self, optimizer: Optimizer, names: Sequence[str], parameters: Sequence[Tensor]) -> None:
        """Take note that an optimizer steps; the scaler does not call one whose gradients have overflowed.

        It does call a fused one, which is given `found_inf` for that time and skips by itself.
        """
        if getattr(optimizer, "found_inf", None) is None:
            own = parameter_ids(optimizer)
            self._stepped_with |= {name for name, each in zip(names, parameters, strict=True) if id(each) in own}

    def explains_overflow(self) -> bool:
        """Tell whether an overflow at the state that was read last is one that the scaler handles."""
        state = self.state
        return state is not None and (
            state.scale >= MIN_SCALE and (state.consecutive_skips < self._max_skips or not state.warm)
        )

    def settle(self, overflowed: Counts, still_there: Collection[str], skip_is_due: bool) -> Counts:
        """Return the overflows that were thought explained, and whose skip did not come.

        overflowed: those of this check that are thought explained.
        still_there: the layers that are bad at this check: what was found there before may have stayed.
        skip_is_due: whether the scaler has found an overflow and has yet to skip for it.
        """
        waiting = self._awaiting_skip
        unexplained = {
            name: counts
            for name, counts in waiting.items()
            if name in self._stepped_with or (name not in still_there and not skip_is_due)
        }
        kept = {name: counts for name, counts in waiting.items() if name not in unexplained}
        self._awaiting_skip = kept | overflowed
        self._stepped_with.clear()
        return unexplained

    def _foreign(self, parameters: Sequence[Tensor]) -> frozenset[int]:
        """Return the layers that none of the scaler's optimizers steps.

        Optimizers that hold none of the layers step copies of them, and then nothing can be said.
        """
        if not self._optimizers:
            return frozenset()
        own: set[int] = set().union(*map(parameter_ids, self._live_optimizers()))
        foreign = frozenset(index for index, parameter in enumerate(parameters) if id(parameter) not in own)
        return foreign if len(foreign) < len(parameters) else frozenset()

    def _live_optimizers(self) -> list[Optimizer]:
        return [optimizer for reference in self._optimizers if (optimizer := reference()) is not None]

    def _unscaled(self, parameters: Sequence[Tensor], arrived: frozenset[int]) -> list[_Unscaled]:
        """Return which layers are unscaled already: those of optimizers that have come so far since `update()`.

        What a generator's pass leaves in a discriminator that was stepped already is scaled again. Without optimizers
        one that was unscaled and not yet stepped speaks for all. The scaler has no public word for this; a test holds
        what is read here against what it does.
        """
        states = self.scaler._per_optimizer_states
        if not states:
            return []
        if not self._optimizers:
            waiting = [state for state in states.values() if state["stage"] is OptState.UNSCALED]
            found = [each for state in waiting for each in state["found_inf_per_device"].values()]
            return [_Unscaled(range(len(parameters)), found, True)] if waiting else []
        unscaled = []
        for optimizer in self._live_optimizers():
            state = states.get(id(optimizer))  # asking for it with [] would make one
            if state is None or state["stage"] is OptState.READY:
                continue
            own = parameter_ids(optimizer)
            layers = frozenset(index for index, parameter in enumerate(parameters) if id(parameter) in own)
            waits = state["stage"] is OptState.UNSCALED
            layers = layers if waits else layers - arrived
            unscaled.append(_Unscaled(layers, list(state["found_inf_per_device"].values()) if waits else (), waits))
        return unscaled


class AmpReading:
    """Hold what a scaler said when a check was made."""

    def __init__(
        self,
        watch: ScalerWatch,
        names: Sequence[str],
        foreign: frozenset[int],
        fresh: frozenset[int],
        unscaled: Sequence[_Unscaled],
        scalars: Scalars,
        backoff_factor: float,
    ) -> None:
        self._watch = watch
        self._names = names
        self._foreign = foreign
        self._fresh = fresh
        self._unscaled = unscaled
        self._scalars = scalars
        self._backoff_factor = backoff_factor
        self.handled: Collection[int] = ()
        """The layers whose overflow the scaler takes care of, once this was judged."""

    @property
    def state(self) -> AmpState:
        """Return what the scaler had come to, once this was judged."""
        assert self._watch.state is not None
        return self._watch.state

    @property
    def scales(self) -> list[float]:
        """Return what each gradient is still multiplied by."""
        scale = self._scalars.values()[0]
        done = self._foreign.union(*(each.layers for each in self._unscaled))
        return [1.0 if index in done else scale for index in range(len(self._names))]

    def judge(self, found: Scan) -> Scan:
        """Return what the optimizer would see: unscaled norms, and no bad element that the scaler handles.

        What was bad at an earlier check, is gone, and was not skipped is added. Exploding layers counted before were
        counted among scaled elements, which says nothing.
        """
        scale, growth_tracker, *_ = self._scalars.values()
        self._watch.advance(scale, growth_tracker, self._backoff_factor)
        norms = [norm if norm is None else norm / scale for norm, scale in zip(found.norms, self.scales, strict=True)]
        return replace(found, norms=norms, bad=self._counted(found), exploding_layers=None)

    def _counted(self, found: Scan) -> dict[int, tuple[int, int]]:
        names = self._names
        unseen, due = self._waiting()
        handled = {}
        if found.bad and self._watch.explains_overflow():
            handled = {i: counts for i, counts in found.bad.items() if i not in unseen and i not in self._foreign}
        self.handled = handled.keys()
        late = self._watch.settle(
            {names[index]: counts for index, counts in handled.items()},
            {names[index] for index in found.bad if index not in self._fresh},
            due,
        )
        bad = {index: counts for index, counts in found.bad.items() if index not in handled}
        return bad | {index: late[name] for index, name in enumerate(names) if name in late} if late else bad

    def _waiting(self) -> tuple[Collection[int], bool]:
        """Return the layers that the scaler found finite and will step with, and whether it will skip for others."""
        found_inf = iter(self._scalars.values()[2:])
        unseen: set[int] = set()
        due = False
        for each in self._unscaled:
            found = sum(next(found_inf) for _ in each.found_inf)
            if each.waits and not found:
                unseen.update(each.layers)
            due |= each.waits and found > 0
        return unseen, due


class _Unscaled(NamedTuple):
    """Name layers that are unscaled already, with what unscaling found.

    waits: whether the optimizer's step is still to come.
    """

    layers: Collection[int]
    found_inf: Sequence[Tensor]
    waits: bool
