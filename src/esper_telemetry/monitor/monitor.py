"""The monitor: measures gradients in the training thread and holds the one snapshot that everybody reads."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial, wraps
from types import TracebackType
from typing import ParamSpec

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from esper_telemetry.monitor.amp import ScalerWatch
from esper_telemetry.monitor.check_maker import Aids, CheckMaker
from esper_telemetry.monitor.coverage import Measure
from esper_telemetry.monitor.dead_layers import DeadLayers
from esper_telemetry.monitor.gathering import Gathering
from esper_telemetry.monitor.latest import Latest
from esper_telemetry.monitor.optimizer_steps import UncheckedSteps, follow_steps
from esper_telemetry.monitor.passes import Pass
from esper_telemetry.monitor.progress import Progress
from esper_telemetry.monitor.reaction import Policy, Reaction
from esper_telemetry.monitor.steps import list_optimizers
from esper_telemetry.ranks.identity import run_info
from esper_telemetry.recorder import BatchId, FlightRecorder
from esper_telemetry.scan import ClipScan
from esper_telemetry.scan.layers import Model, list_layers
from esper_telemetry.snapshot import Snapshot
from esper_telemetry.snapshot.heads import WatchedHeads
from esper_telemetry.snapshot.ppo_update import PPOUpdatePayload

_Options = ParamSpec("_Options")

Heads = Mapping[str, str | Sequence[str]]
Listener = Callable[[Snapshot], None]


class GradientMonitor:
    """Count the Inf and NaN elements in a model's gradients.

    Call `update()` between `backward()` and whatever clips, or let `watch()` do it. Measuring never raises: a fault
    of ours is logged once and counted in `snapshot.monitor_errors`. As a context manager it closes itself.

    model: a Module, or a dict name -> Module or leaf tensor, whose names become prefixes of the layer names. Modules
        are not kept alive.
    optimizer: one or several, needed by `on_critical="skip"`.
    scaler: the GradScaler of the loop. Counts and norms are then of what the optimizer would see: overflows that the
        scaler handles are skipped updates and not bad checks, until they stop being explained: by the scale falling
        below 1, by a streak of more than max_amp_skips, or by a skip that does not come. Give it the optimizers that
        the scaler steps, all of them: what they do not step counts in full.
    max_amp_skips: steps in a row that the scaler may skip, once it has taken one.
    heads: head -> name of its module, or a list of names (`{"policy": "action_net", "value": "value_net"}`): each has
        a norm of its own in `snapshot.heads`, and remembers until the end of the run what was found in it.
    on_critical: what to do when a check finds more than 5 elements of one kind. "continue"; "skip": the optimizer
        steps until the next check change neither parameters nor optimizer state; "halt": raise GradientsCritical
        from the call that measured; or a callable that is given the snapshot and returns one of these or None. What
        the callable raises reaches the training loop.
    patience: do it only after that many critical checks in a row, and from then on until a check is not critical.
    statistics_every: checks between two looks for dead and exploding layers; what is found is looked at again in the
        checks that follow.
    recent_window_seconds: how long a bad check stays in the recent maxima; at least twice the scrape interval.
    before_check: called with the number of the check to come; for fault injection.
    record_dir: a folder; the first bad check of each episode of trouble is recorded in a file there, before the
        optimizer steps: the checks before it, and where the bad elements are. `esper report FILE` shows it. Set
        `batch_id` before the backward pass to have it recorded too.
    run_id: names the run, as its string; without it ESPER_RUN_ID or the launcher's, else it is made up.

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
        if not 0 < recent_window_seconds < math.inf:
            raise ValueError(f"recent_window_seconds: expected seconds above 0, got {recent_window_seconds}")
        if max_amp_skips < 0:
            raise ValueError(f"max_amp_skips: expected at least 0, got {max_amp_skips}")
        optimizers = list_optimizers(optimizer)
        self._watch_scaler = partial(ScalerWatch.of, optimizers=optimizers, max_skips=max_amp_skips)
        amp, dead_layers, run = self._watch_scaler(scaler), DeadLayers(statistics_every), run_info(run_id)
        watched_heads = _watched_heads(heads, model)
        self._latest = Latest(Snapshot.before_first_check(run, float(recent_window_seconds), watched_heads))
        recorder = None if record_dir is None else FlightRecorder(record_dir, optimizers, self._latest.fail)
        self._reaction = Reaction(on_critical, patience, optimizers, self._count_dropped_step)
        aids = Aids(dead_layers, recorder, before_check, wait=self._reaction.needs_the_answer)
        self._checks = CheckMaker(self._latest, aids)
        self._checks.amp = amp
        try:
            self._gathering = Gathering(model, self._checks.measure_early, self._latest.fail)
        except ValueError:
            self._reaction.close()
            raise
        self._recorder = recorder
        self._progress = Progress()
        self._watching = True
        self._listeners: list[Listener] = [] if recorder is None else [recorder.see]
        self._unchecked = UncheckedSteps()
        self._stop_following_steps = follow_steps(self._before_step)

    @property
    def snapshot(self) -> Snapshot:
        """Return what the last check found whose result is there; never wait."""
        latest = self._latest
        if (self._checks.pending or self._progress.pending) and latest.lock.acquire(blocking=False):
            try:
                self._checks.settle()
                if self._progress.pending:
                    latest.change(progress=self._progress.arrived(latest.snapshot.progress))
            finally:
                latest.lock.release()
        return latest.snapshot

    @property
    def batch_id(self) -> BatchId:
        """Name the batch that makes the gradients to come, for the flight recorder."""
        return self._checks.batch_id

    @batch_id.setter
    def batch_id(self, batch_id: BatchId) -> None:
        self._checks.batch_id = batch_id

    def update(self, *, scaler: GradScaler | None = None) -> Snapshot:
        """Measure every `.grad` now and return the new snapshot.

        scaler: the GradScaler of the loop, where it was not given before. `unscale_()` may come before or after.

        Gradients on CUDA devices are measured in the order of the stream, and nobody waits: a result is published by
        the first later `update()`, `snapshot` or `flush()` that finds it there, and listeners are told by `update()`
        and `flush()`. An `on_critical` other than "continue" needs the answer before the optimizer steps, and waits.

        Raise only GradientsCritical, when `on_critical` says "halt", and what a callable `on_critical` raises; and
        ValueError for a scaler that is none or not the one that is followed already.
        """
        if scaler is not None and (self._checks.amp is None or scaler is not self._checks.amp.scaler):
            if self._checks.amp is not None:
                raise ValueError("scaler: expected the GradScaler that this monitor follows already, got another")
            self._checks.amp = self._watch_scaler(scaler)
        return self._check(self._gathering.take(), self._checks.scan)

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
        shared = ClipScan(self._checks.scan)
        if not self._gathering.follows_passes:
            self._check(self._gathering.take(), shared if norm_type == 2.0 else self._checks.scan)
        total_norm, parameters = shared.total_norm, self._gathering.watched.parameters()
        if total_norm is None or foreach is not None or (error_if_nonfinite and not total_norm.isfinite()):
            return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total_norm)
        return total_norm

    def check_after_backward(self) -> None:
        """Call `update()` by itself at the end of each backward pass, from now on."""
        self._gathering.follow_passes(lambda ended: self._check(ended, self._checks.scan))

    @contextmanager
    def _resuming(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.resume()

    def pause(self) -> AbstractContextManager[None]:
        """Make no checks until `resume()`, or the end of the `with` block: for passes that are not training."""
        self._gathering.paused += 1
        return self._resuming()

    def resume(self) -> None:
        """Make checks again, once for each `pause()`."""
        self._gathering.paused = max(0, self._gathering.paused - 1)

    def on_check(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` with each new snapshot in the training thread; return a function that ends that.

        What a listener raises is logged once and counted, never passed on.
        """
        self._listeners.append(listener)
        return partial(self._listeners.remove, listener)

    def record(
        self,
        *,
        loss: float | Tensor | None = None,
        lr: float | Tensor | None = None,
        step: int | None = None,
        samples: int | None = None,
    ) -> None:
        """Tell how training goes, to see it beside the gradients; never wait for a device, never raise.

        samples: processed since the last call.
        """
        try:
            with self._latest.lock:
                told = self._progress.tell(self._latest.snapshot.progress, loss=loss, lr=lr, step=step, samples=samples)
                self._latest.change(progress=told)
        except Exception:
            self._latest.fail("what record() was given could not be taken")

    def record_ppo_update(self, payload: PPOUpdatePayload) -> None:
        """Put a PPO update into the snapshot."""
        self._latest.change(ppo=payload)

    def carry_on(self, before: Snapshot) -> None:
        """Go on with the counters of a monitor that has ended in this process; call it before the first check."""
        with self._latest.lock:
            self._latest.snapshot = self._latest.snapshot.carrying_on(before)
            self._checks.seconds = before.monitor_seconds

    def flush(self, timeout: float = 10.0) -> None:
        """Wait for results that are still on a device, at most `timeout` seconds, and tell the listeners."""
        deadline = time.monotonic() + timeout
        while self._checks.pending and time.monotonic() < deadline:
            with self._latest.lock:
                self._checks.settle()
            if self._checks.pending:
                time.sleep(0.0005)
        with self._latest.lock:
            news = self._checks.take_news()
        self._tell(news)

    def close(self) -> None:
        """Remove every hook and mark the snapshot as the run's last; a second call does nothing."""
        self._let_go()
        self._latest.change(ended=True)

    def __enter__(self) -> GradientMonitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._let_go()  # the run did not end well, and must not look as if it had

    def _let_go(self) -> None:
        self.flush()
        if not self._watching:
            return
        self._watching = False
        self._stop_following_steps()
        self._reaction.close()
        with self._latest.lock:
            try:
                self._checks.see_last_step(self._gathering)
            except Exception:
                self._latest.fail("the scaler could not be read")
            self._gathering.close()
            news = self._checks.take_news()
        self._tell(news)
        if self._recorder is not None:
            self._recorder.close()

    def _check(self, ended: Pass, measure: Measure) -> Snapshot:
        started = time.perf_counter()
        news = self._checks.make(self._gathering, ended, measure, started)
        self._tell(news)
        self._checks.seconds += time.perf_counter() - started
        for snapshot in news:
            self._reaction.to(snapshot, self._checks.steps_early)
        return self._latest.snapshot

    def _tell(self, news: Sequence[Snapshot]) -> None:
        for snapshot in news:
            for listener in tuple(self._listeners):
                try:
                    listener(snapshot)
                except Exception:
                    self._latest.fail(f"{listener} failed")

    def _before_step(self, optimizer: Optimizer) -> None:
        """Check before a step whose gradients arrived where nobody looked: late, but not never."""
        if self._gathering.paused:
            return
        try:
            self._checks.see_step(optimizer, self._gathering)
            unchecked = self._gathering.follows_passes and self._unchecked.is_so(
                optimizer, self._checks.made, self._gathering.watched
            )
        except Exception:
            self._latest.fail("an optimizer's step could not be followed")
            return
        if unchecked:
            self._check(Pass(), self._checks.scan)

    def _count_dropped_step(self) -> None:
        with self._latest.lock:
            self._latest.snapshot = self._latest.snapshot.skipping("intervention")


def _watching_by_itself(make: Callable[_Options, GradientMonitor]) -> Callable[_Options, GradientMonitor]:
    @wraps(make, assigned=())
    def watch(*args: _Options.args, **options: _Options.kwargs) -> GradientMonitor:
        """Return a GradientMonitor that measures by itself at the end of each backward pass, before anything clips."""
        monitor = make(*args, **options)
        monitor.check_after_backward()
        return monitor

    return watch


watch = _watching_by_itself(GradientMonitor)  # takes what GradientMonitor takes


def _watched_heads(heads: Heads | None, model: Model) -> WatchedHeads | None:
    if not heads:
        return None
    layers = list_layers(model)
    aliases = {alias: layer.name for layer in layers for alias in layer.aliases}
    return WatchedHeads.of(heads, [layer.name for layer in layers], aliases)
