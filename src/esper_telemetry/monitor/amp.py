"""What a GradScaler does with overflows: it expects them, skips the step, halves its scale, and goes on."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.amp.grad_scaler import OptState
from torch.nn import Parameter
from torch.optim import Optimizer

from esper_telemetry.scan import Scan
from esper_telemetry.snapshot.amp_state import AmpState

MIN_SCALE = 1.0
"""Below 1 unscaling itself makes Infs, which the scaler does not look for any more."""

Parameters = Sequence[Callable[[], Parameter | None]]


class ScalerWatch:
    """Follow a GradScaler from check to check, and so tell whether an overflow is explained.

    An overflow is expected while the scale is at least 1 and it makes no streak of more than `max_skips` skipped
    steps; before the first step that was taken the scale alone decides, as a new scaler starts far too high on
    purpose.

    optimizers: those that the scaler steps. They tell which gradients are unscaled already, when several take turns.
    """

    @classmethod
    def of(
        cls, scaler: GradScaler | None, optimizers: Sequence[Optimizer] = (), max_skips: int = 8
    ) -> ScalerWatch | None:
        """Watch a scaler; one that is None or disabled scales nothing and explains nothing.

        Raise ValueError when it is no GradScaler.
        """
        if scaler is not None and not isinstance(scaler, GradScaler):
            raise ValueError(f"scaler: expected a torch.amp.GradScaler, got {type(scaler).__name__}")
        return cls(scaler, optimizers, max_skips) if scaler is not None and scaler.is_enabled() else None

    def __init__(self, scaler: GradScaler, optimizers: Sequence[Optimizer], max_skips: int) -> None:
        self.scaler = scaler
        self.state: AmpState | None = None
        self._optimizers = [weakref.ref(optimizer) for optimizer in optimizers]
        self._max_skips = max_skips

    def read(
        self, gradients: Sequence[Tensor | None], parameters: Parameters, arrived: Collection[int] = ()
    ) -> tuple[Sequence[Tensor | None], AmpReading]:
        """Return what to measure, and what the scaler says now; never wait for a device.

        Gradients are measured as they are and their norms divided, unless dividing could make an Inf.

        arrived: the layers that gradients have reached since the last reading.

        Raise RuntimeError while a CUDA graph is captured.
        """
        scale, tracker = self.scaler._scale, self.scaler._growth_tracker  # state_dict() has both, but waits
        if scale is None or tracker is None:  # nothing was scaled yet
            scale, tracker = torch.tensor(self.scaler.get_scale()), torch.tensor(0)
        if scale.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a scaler cannot be followed while a CUDA graph is captured")
        unscaled = self._unscaled(parameters, frozenset(arrived))
        known = scale.item() if scale.is_cpu else self.state.scale if self.state is not None else MIN_SCALE
        if known < MIN_SCALE:  # on a device this is the scale of the last result, which is the best that is known
            done = frozenset().union(*(each.layers for each in unscaled))
            gradients = [
                each if each is None or index in done else each * (1.0 / known if known else math.inf)
                for index, each in enumerate(gradients)
            ]
            unscaled = [_Unscaled(range(len(gradients)), (), False), *unscaled]
        scalars = _Scalars([scale, tracker, *(found for each in unscaled for found in each.found_inf)])
        return gradients, AmpReading(self, len(gradients), unscaled, scalars, self.scaler.get_backoff_factor())

    def look(self) -> AmpState:
        """Return the state as it is now; wait for it."""
        _, reading = self.read([], [])
        reading.judge(Scan([], {}, 0))
        return reading.state

    def advance(self, scale: float, growth_tracker: float, backoff_factor: float) -> None:
        """Take in what was read; in the order of reading."""
        before = self.state or AmpState(scale, skips=0, consecutive_skips=0, warm=False)
        self.state = before.after(scale, growth_tracker, backoff_factor)

    def explains_overflow(self) -> bool:
        """Tell whether an overflow at the state that was read last is one that the scaler handles."""
        state = self.state
        return state is not None and (
            state.scale >= MIN_SCALE and (state.consecutive_skips < self._max_skips or not state.warm)
        )

    def _unscaled(self, parameters: Parameters, arrived: frozenset[int]) -> list[_Unscaled]:
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
        for optimizer in filter(None, (reference() for reference in self._optimizers)):
            state = states.get(id(optimizer))  # asking for it with [] would make one
            if state is None or state["stage"] is OptState.READY:
                continue
            own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            layers = frozenset(index for index, reference in enumerate(parameters) if id(reference()) in own)
            waits = state["stage"] is OptState.UNSCALED
            layers = layers if waits else layers - arrived
            unscaled.append(_Unscaled(layers, list(state["found_inf_per_device"].values()) if waits else (), waits))
        return unscaled


class AmpReading:
    """Hold what a scaler said when a check was made."""

    def __init__(
        self,
        watch: ScalerWatch,
        layers: int,
        unscaled: Sequence[_Unscaled],
        scalars: _Scalars,
        backoff_factor: float,
    ) -> None:
        self._watch = watch
        self._layers = layers
        self._unscaled = unscaled
        self._scalars = scalars
        self._backoff_factor = backoff_factor

    @property
    def state(self) -> AmpState:
        """Return what the scaler had come to, once this was judged."""
        assert self._watch.state is not None
        return self._watch.state

    @property
    def scales(self) -> list[float]:
        """Return what each gradient is still multiplied by."""
        scale = self._scalars.values()[0]
        done = frozenset().union(*(each.layers for each in self._unscaled))
        return [1.0 if index in done else scale for index in range(self._layers)]

    def judge(self, found: Scan) -> Scan:
        """Return what the optimizer would see: unscaled norms, and no bad element that the scaler handles.

        Exploding layers counted before were counted among scaled elements, which says nothing.
        """
        scale, growth_tracker, *_ = self._scalars.values()
        self._watch.advance(scale, growth_tracker, self._backoff_factor)
        norms = [norm if norm is None else norm / scale for norm, scale in zip(found.norms, self.scales, strict=True)]
        bad = found.bad
        if bad and self._watch.explains_overflow():
            unseen = self._unseen()
            bad = {index: counts for index, counts in bad.items() if index in unseen}
        return replace(found, norms=norms, bad=bad, exploding_layers=None)

    def _unseen(self) -> Collection[int]:
        """Return the layers that the scaler found finite, and will step with whatever became of them since."""
        found_inf = iter(self._scalars.values()[2:])
        unseen: set[int] = set()
        for each in self._unscaled:
            found = sum(next(found_inf) for _ in each.found_inf)
            if each.waits and not found:
                unseen.update(each.layers)
        return unseen


class _Unscaled(NamedTuple):
    """Name layers that are unscaled already, with what unscaling found.

    waits: whether the optimizer's step is still to come.
    """

    layers: Collection[int]
    found_inf: Sequence[Tensor]
    waits: bool


class _Scalars:
    """Bring 0-d tensors to the host: from CUDA in the order of the stream, and nobody waits before `values()`."""

    def __init__(self, scalars: Sequence[Tensor]) -> None:
        self._arrived: torch.cuda.Event | None = None
        device = scalars[0].device
        if device.type != "cuda":
            self._values: list[float] | Tensor = [scalar.item() for scalar in scalars]
            return
        with torch.cuda.device(device):
            stacked = torch.stack([scalar.to(device, torch.float64, non_blocking=True) for scalar in scalars])
            self._values = stacked.to("cpu", non_blocking=True)
            self._arrived = torch.cuda.current_stream(device).record_event()

    def values(self) -> list[float]:
        """Return them; wait for those that are not there yet."""
        if isinstance(self._values, Tensor):
            assert self._arrived is not None
            self._arrived.synchronize()
            self._values = self._values.tolist()
        return self._values
