"""The monitor: measures gradients in the training thread and holds the one snapshot that everybody reads."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import LBFGS, Optimizer

from esper_telemetry.health import CRITICAL_ABOVE, HealthTier, total_norm
from esper_telemetry.monitor.amp import AmpReading, ScalerWatch
from esper_telemetry.monitor.hooks import BackwardHooks
from esper_telemetry.monitor.steps import Steps
from esper_telemetry.ranks.identity import run_info
from esper_telemetry.recorder import BatchId, FlightRecorder
from esper_telemetry.scan import (
    ClipScan,
    PendingScan,
    Scan,
    Scanner,
    with_dead_and_exploding,
    with_early,
)
from esper_telemetry.scan.layers import Model, named_layers, named_modules
from esper_telemetry.snapshot import Snapshot
from esper_telemetry.snapshot.amp_state import AmpState
from esper_telemetry.snapshot.arrival import by_arrival
from esper_telemetry.snapshot.heads import WatchedHeads
from esper_telemetry.snapshot.ppo_update import PPOUpdatePayload
from esper_telemetry.snapshot.recent import LayerCounts, worst_first

logger = logging.getLogger("esper_telemetry")

POLICIES = ("continue", "skip", "halt")

Measure = Callable[[Sequence[Tensor | None]], Scan | PendingScan]

Policy = str | Callable[[Snapshot], str | None]

Heads = Mapping[str, str | Sequence[str]]


class GradientsCritical(RuntimeError):
    """Stop training: a check found more than 5 Inf or more than 5 NaN elements, and `on_critical` is "halt"."""

    def __init__(self, snapshot: Snapshot) -> None:
        super().__init__(
            f"critical gradients at check {snapshot.checks}: Inf {snapshot.inf_grad_count}, "
            f"NaN {snapshot.nan_grad_count} (critical is above {CRITICAL_ABOVE}), first in {snapshot.origin_layer}"
        )
        self.snapshot = snapshot


class GradientMonitor:
    """Count the Inf and NaN elements in a model's gradients.

    Call `update()` between `backward()` and whatever clips, or let `watch()` do it. Measuring never raises: a fault
    of ours is logged once and counted in `snapshot.monitor_errors`.

    model: a Module, or a dict name -> Module whose names become prefixes of the layer names. It is not kept alive.
    optimizer: one or several, needed by `on_critical="skip"`.
    scaler: the GradScaler of the loop. Counts and norms are then of what the optimizer would see: overflows that the
        scaler handles are skipped updates and not bad checks, until they stop being explained: by the scale falling
        below 1, or by a streak of more than max_amp_skips. Where several optimizers share the scaler, give them too.
    max_amp_skips: steps in a row that the scaler may skip, once it has taken one.
    heads: head -> name of its module, or a list of names (`{"policy": "action_net", "value": "value_net"}`): each has
        a norm of its own in `snapshot.heads`, and remembers until the end of the run what was found in it.
    on_critical: what to do when a check finds more than 5 elements of one kind. "continue"; "skip": the optimizer
        steps until the next check change neither parameters nor optimizer state; "halt": raise GradientsCritical
        from the call that measured; or a callable that is given the snapshot and returns one of these or None. What
        the callable raises reaches the training loop.
    patience: do it only after that many critical checks in a row, and from then on until a check is not critical.
    statistics_every: checks between two refreshes of dead and exploding layers; a bad check that follows a good one
        refreshes them at once.
    recent_window_seconds: how long a bad check stays in the recent maxima; at least twice the scrape interval.
    before_check: called with the number of the check to come; for fault injection.
    record_dir: a folder; the first bad check of each episode of trouble is recorded in a file there, before the
        optimizer steps: the checks before it, and where the bad elements are. `esper report FILE` shows it. Set
        `batch_id` before the backward pass to have it recorded too.
    run_id: names the run, by anything that has a string; by default what the launcher calls it, or made up.

    Raise ValueError when an argument is not one of these, and OSError when the folder cannot be written.
    """

    def __init__(
        self,
        model: Model,
        *,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        scaler: GradScaler | None = None,
        max_amp_skips: int = 8,
        heads: Heads | None = None,
        on_critical: Policy = "continue",
        patience: int = 1,
        statistics_every: int = 100,
        recent_window_seconds: float = 120.0,
        before_check: Callable[[int], None] | None = None,
        record_dir: str | os.PathLike[str] | None = None,
        run_id: object = None,
    ) -> None:
        optimizers = _optimizers(optimizer)
        _check_options(on_critical, patience, optimizers, max_amp_skips, statistics_every, recent_window_seconds)
        self._modules = {prefix: weakref.ref(module) for prefix, module in named_modules(model).items()}
        watched_heads = WatchedHeads.of(heads, (name for name, _ in named_layers(model))) if heads else None
        self._on_critical = on_critical
        self._patience = patience
        self._statistics_every = statistics_every
        self._before_check = before_check
        self._on_backward_end: Callable[[], None] | None = None
        self._listeners: list[Callable[[Snapshot], None]] = []
        self._lock = threading.RLock()
        self._scan = Scanner()
        self._watch_scaler = partial(ScalerWatch.of, optimizers=optimizers, max_skips=max_amp_skips)
        self._amp = self._watch_scaler(scaler)
        self._launched: deque[tuple[PendingScan, _Check]] = deque()
        self._untold: list[Snapshot] = []
        self._seconds = 0.0
        self._steps_early = self._said_too_late = False
        self._critical_in_a_row = 0
        self._snapshot = Snapshot.before_first_check(run_info(run_id), float(recent_window_seconds), watched_heads)
        self.batch_id: BatchId = None
        self._recorder = None if record_dir is None else FlightRecorder(record_dir, optimizers, self._fail)
        if self._recorder is not None:
            self.on_check(self._recorder.see)
        self._list_layers()
        self._steps = Steps(optimizers, self._count_dropped_step)

    @property
    def snapshot(self) -> Snapshot:
        """Return what the last check found whose result is there; never wait."""
        if self._launched and self._lock.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._lock.release()
        return self._snapshot

    def update(self, *, scaler: GradScaler | None = None) -> Snapshot:
        """Measure every `.grad` now and return the new snapshot.

        scaler: the GradScaler of the loop, where it was not given before. `unscale_()` may come before or after.

        Gradients on CUDA devices are measured in the order of the stream, and nobody waits: a result is published by
        the first later `update()`, `snapshot` or `flush()` that finds it there, and listeners are told by `update()`
        and `flush()`. An `on_critical` other than "continue" needs the answer before the optimizer steps, and waits.

        Raise only GradientsCritical, when `on_critical` says "halt", and what a callable `on_critical` raises; and
        ValueError for a scaler that is none or not the one that is followed already.
        """
        if scaler is not None and (self._amp is None or scaler is not self._amp.scaler):
            self._follow(scaler)
        return self._update(self._scan)

    def clip_grad_norm_(
        self,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
    ) -> Tensor:
        """Measure and clip with one norm pass; return what `torch.nn.utils.clip_grad_norm_` returns.

        Call it in place of `update()` and torch's function, whose arguments it takes: the gradients come out bit-equal
        to torch's. A monitor that measures by itself has done so already, and then this only clips.
        """
        shared = ClipScan(self._scan)
        if self._on_backward_end is None:
            self._update(shared if norm_type == 2.0 else self._scan)
        total_norm = shared.total_norm
        parameters = [parameter for reference in self._parameters if (parameter := reference()) is not None]
        if total_norm is None or foreach is not None or (error_if_nonfinite and not total_norm.isfinite()):
            return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total_norm)
        return total_norm

    def check_after_backward(self) -> None:
        """Call `update()` by itself at the end of each backward pass, from now on."""
        self._on_backward_end = self._update_by_itself
        self._hooks.remove()
        self._list_layers()

    def on_check(self, listener: Callable[[Snapshot], None]) -> Callable[[], None]:
        """Call `listener` with each new snapshot in the training thread; return a function that ends that.

        What a listener raises is logged once and counted, never passed on.
        """
        self._listeners.append(listener)
        return partial(self._listeners.remove, listener)

    def record_ppo_update(self, payload: PPOUpdatePayload) -> None:
        """Put a PPO update into the snapshot."""
        with self._lock:
            self._snapshot = self._snapshot.but(ppo=payload)

    def flush(self, timeout: float = 10.0) -> None:
        """Wait for results that are still on a device, at most `timeout` seconds, and tell the listeners."""
        deadline = time.monotonic() + timeout
        while self._launched and time.monotonic() < deadline:
            with self._lock:
                self._settle()
            if self._launched:
                time.sleep(0.0005)
        with self._lock:
            news, self._untold = self._untold, []
        for snapshot in news:
            self._tell(snapshot)

    def close(self) -> None:
        """Remove every hook and mark the snapshot as the run's last; a second call does nothing."""
        self.flush()
        if self._recorder is not None:
            self._recorder.close()
        with self._lock:
            self._hooks.remove()
            self._steps.remove()
            if self._amp is not None and not self._snapshot.ended:
                self._see_last_step(self._amp)
            self._snapshot = self._snapshot.but(ended=True)

    def _see_last_step(self, amp: ScalerWatch) -> None:
        try:
            self._snapshot = self._snapshot.but(**_amp_news(self._snapshot, amp.look()))
        except Exception:
            self._fail("the scaler could not be read")

    def _follow(self, scaler: GradScaler) -> None:
        if self._amp is not None:
            raise ValueError("scaler: expected the GradScaler that this monitor follows already, got another")
        self._amp = self._watch_scaler(scaler)

    def _list_layers(self) -> None:
        modules = {prefix: module for prefix, ref in self._modules.items() if (module := ref()) is not None}
        named = list(named_layers(modules)) if modules else []
        self._names = tuple(name for name, _ in named)
        self._parameters = [weakref.ref(parameter) for _, parameter in named]
        parameters = [parameter for _, parameter in named]
        self._early: dict[int, _Early] = {}
        self._hooks = BackwardHooks(parameters, self._on_backward_end, self._measure_early)

    def _gradients(self) -> list[Tensor | None]:
        """Return each layer's gradient; a module that replaced a parameter is listed anew."""
        try:
            return [reference().grad for reference in self._parameters]  # type: ignore[union-attr]
        except AttributeError:  # what is gone is None
            self._hooks.remove()
            self._list_layers()
        parameters = [reference() for reference in self._parameters]
        return [None if parameter is None else parameter.grad for parameter in parameters]

    def _update(self, measure: Measure) -> Snapshot:
        started = time.perf_counter()
        with self._lock:
            self._try_to_check(started, measure)
            news, self._untold = self._untold, []
        for snapshot in news:
            self._tell(snapshot)
        self._seconds += time.perf_counter() - started
        for snapshot in news:
            self._react(snapshot)
        return self._snapshot

    def _try_to_check(self, started: float, measure: Measure) -> None:
        try:
            with torch.no_grad():
                self._check(started, measure)
        except Exception:
            self._fail("a check failed")

    def _check(self, started: float, measure: Measure) -> None:
        if self._before_check is not None:
            self._before_check(self._snapshot.checks + len(self._launched) + 1)
        gradients: Sequence[Tensor | None] = self._gradients()
        order, amp = self._hooks.take_order(), None
        if self._amp is not None:
            gradients, amp = self._amp.read(gradients, self._parameters, order)
        found = measure(gradients)
        check = _Check(self._names, gradients, order, time.time(), amp)
        early, self._steps_early = bool(self._early), False
        if early:
            found, check = self._with_early(found, check)
        if isinstance(found, Scan):
            if self._launched:
                self._settle(wait=True)
            found = check.judge(found)
            trouble_begins = found.bad and not self._snapshot.layers
            if not early and (trouble_begins or self._snapshot.checks % self._statistics_every == 0):
                found = with_dead_and_exploding(found, gradients, None if amp is None else amp.scales)
            self._publish(found, check, started)
        else:
            self._launched.append((found, check.without_gradients()))
            self._settle(wait=self._on_critical != "continue")
        if self._recorder is not None:
            number = self._snapshot.checks + len(self._launched)
            self._recorder.note(number, self.batch_id, check.order, check.names, gradients, self._snapshot)

    def _measure_early(self, index: int, parameter: Tensor) -> None:
        """Measure a gradient before other hooks see it: one that makes the optimizer step frees it too."""
        started = time.perf_counter()
        try:
            with torch.no_grad():
                self._early[index] = _Early(self._scan([parameter.grad]), parameter.shape)
        except Exception:
            self._fail("a check failed")
        self._seconds += time.perf_counter() - started

    def _with_early(self, found: Scan | PendingScan, check: _Check) -> tuple[Scan | PendingScan, _Check]:
        early, self._early = self._early, {}
        gradients = list(check.gradients)
        freed = [index for index in early if gradients[index] is None]
        self._steps_early = bool(freed)
        for index in freed:
            gradients[index] = early[index].shape
        found = with_early(found, {index: each.found for index, each in early.items()})
        return found, check._replace(gradients=gradients)

    def _settle(self, wait: bool = False) -> None:
        """Publish launched checks in their order, as far as their results are there."""
        while self._launched:
            try:
                if not wait and not self._launched[0][0].ready():
                    return
                pending, check = self._launched.popleft()
                started = time.perf_counter()
                self._publish(check.judge(pending.result()), check, started)
            except Exception:
                self._launched.clear()
                self._fail("results were lost on their device")

    def _publish(self, found: Scan, check: _Check, started: float) -> None:
        before = self._snapshot
        news: dict[str, Any] = {"layers": ()}
        if check.amp is not None:
            news |= _amp_news(before, check.amp.state)
        if found.bad:
            news |= _bad_layers(before, found, check)
        if found.dead_layers is not None:
            news |= {"dead_layers": found.dead_layers, "exploding_layers": found.exploding_layers}
        self._snapshot = before.but(
            checks=before.checks + 1,
            inf_grad_count=found.inf_count,
            nan_grad_count=found.nan_count,
            grad_norm=total_norm(found.norms),
            elements=found.elements,
            timestamp=check.timestamp,
            layer_names=check.names,
            layer_norms=found.norms,
            history=before.history.after(
                time.monotonic(), check.timestamp, found.inf_count, found.nan_count, news.get("origin_layer")
            ),
            monitor_seconds=self._seconds + time.perf_counter() - started,
            **news,
        )
        self._untold.append(self._snapshot)

    def _tell(self, snapshot: Snapshot) -> None:
        for listener in tuple(self._listeners):
            try:
                listener(snapshot)
            except Exception:
                self._fail(f"{listener} failed")

    def _react(self, snapshot: Snapshot) -> None:
        self._steps.allow()
        if snapshot.tier is not HealthTier.CRITICAL:
            self._critical_in_a_row = 0
            return
        self._critical_in_a_row += 1
        if self._critical_in_a_row < self._patience:
            return
        policy = self._on_critical(snapshot) if callable(self._on_critical) else self._on_critical
        if policy == "skip":
            self._drop_steps()
        if policy == "halt":
            raise GradientsCritical(snapshot)

    def _update_by_itself(self) -> None:
        self.update()

    def _drop_steps(self) -> None:
        if not self._steps_early:
            self._steps.drop()
        elif not self._said_too_late:
            self._said_too_late = True
            logger.error("esper: the optimizer steps during backward(), so no step can be skipped; use 'halt'")

    def _count_dropped_step(self) -> None:
        with self._lock:
            self._snapshot = self._snapshot.skipping("intervention")

    def _fail(self, what: str) -> None:
        if self._snapshot.monitor_errors == 0:
            logger.exception("esper: %s; training goes on, and this is counted and not logged again", what)
        with self._lock:
            self._snapshot = self._snapshot.but(monitor_errors=self._snapshot.monitor_errors + 1)


class _Early(NamedTuple):
    """Hold what was found in one gradient as it arrived."""

    found: Scan | PendingScan
    shape: torch.Size


class _Check(NamedTuple):
    """Hold what was known when a check was made; its result may come later."""

    names: Sequence[str]
    gradients: Sequence[Tensor | torch.Size | None]
    order: Sequence[int]
    timestamp: float
    amp: AmpReading | None

    def judge(self, found: Scan) -> Scan:
        """Return what the optimizer would see."""
        return found if self.amp is None else self.amp.judge(found)

    def without_gradients(self) -> _Check:
        """Keep the shapes alone, so that the gradients can be freed meanwhile."""
        shapes = [each.shape if isinstance(each, Tensor) else each for each in self.gradients]
        return self._replace(gradients=shapes)


def _amp_news(before: Snapshot, state: AmpState) -> dict[str, Any]:
    return {"amp": state, "skipped_updates": before.skipped_updates | {"amp": state.skips}}


def _bad_layers(before: Snapshot, found: Scan, check: _Check) -> dict[str, Any]:
    names = check.names
    layers = worst_first(
        LayerCounts(names[index], inf, nan, gradient.numel())
        for index, (inf, nan) in found.bad.items()
        if (gradient := check.gradients[index]) is not None
    )
    arrived = by_arrival(found.bad, check.order)
    inf_origin = next((names[index] for index in arrived if found.bad[index][0]), None)
    nan_origin = next((names[index] for index in arrived if found.bad[index][1]), None)
    return {
        "layers": layers,
        "origin_layer": names[arrived[0]],
        "watched_heads": before.watched_heads and before.watched_heads.after(layers),
        "inf": before.inf.after(found.inf_count, check.timestamp, inf_origin),
        "nan": before.nan.after(found.nan_count, check.timestamp, nan_origin),
        "recent": before.recent.after(time.monotonic(), layers, sum(1 << index for index in found.bad)),
    }


def watch(
    model: Model,
    *,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    scaler: GradScaler | None = None,
    max_amp_skips: int = 8,
    heads: Heads | None = None,
    on_critical: Policy = "continue",
    patience: int = 1,
    statistics_every: int = 100,
    recent_window_seconds: float = 120.0,
    before_check: Callable[[int], None] | None = None,
    record_dir: str | os.PathLike[str] | None = None,
    run_id: object = None,
) -> GradientMonitor:
    """Return a GradientMonitor that measures by itself at the end of each backward pass, before anything clips."""
    monitor = GradientMonitor(
        model,
        optimizer=optimizer,
        scaler=scaler,
        max_amp_skips=max_amp_skips,
        heads=heads,
        on_critical=on_critical,
        patience=patience,
        statistics_every=statistics_every,
        recent_window_seconds=recent_window_seconds,
        before_check=before_check,
        record_dir=record_dir,
        run_id=run_id,
    )
    monitor.check_after_backward()
    return monitor


def _optimizers(optimizer: Optimizer | Iterable[Optimizer] | None) -> list[Optimizer]:
    """List the optimizers, and see through wrappers such as those of Accelerate and Lightning."""
    given = [] if optimizer is None else list(optimizer) if isinstance(optimizer, Iterable) else [optimizer]
    given = [getattr(each, "optimizer", each) for each in given]
    for each in given:
        if not isinstance(each, Optimizer):
            raise ValueError(f"optimizer: expected a torch.optim.Optimizer, got {type(each).__name__}")
    return given


def _check_options(
    on_critical: Policy,
    patience: int,
    optimizers: list[Optimizer],
    max_amp_skips: int,
    statistics_every: int,
    recent_window_seconds: float,
) -> None:
    if not callable(on_critical) and on_critical not in POLICIES:
        raise ValueError(f"on_critical: expected one of {', '.join(POLICIES)} or a callable, got {on_critical!r}")
    if on_critical == "skip" and not optimizers:
        raise ValueError("on_critical: 'skip' expects optimizer=, whose steps it drops, and none was given")
    if on_critical == "skip" and any(isinstance(each, LBFGS) for each in optimizers):
        raise ValueError("on_critical: 'skip' cannot drop a step of LBFGS, which takes several gradients; use 'halt'")
    if patience < 1:
        raise ValueError(f"patience: expected at least 1, got {patience}")
    if max_amp_skips < 0:
        raise ValueError(f"max_amp_skips: expected at least 0, got {max_amp_skips}")
    if statistics_every < 1:
        raise ValueError(f"statistics_every: expected at least 1, got {statistics_every}")
    if not 0 < recent_window_seconds < math.inf:
        raise ValueError(f"recent_window_seconds: expected seconds above 0, got {recent_window_seconds}")
