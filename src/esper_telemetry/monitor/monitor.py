"""The monitor: measures gradients in the training thread and holds the one snapshot that everybody reads."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from functools import partial

from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from esper_telemetry import arguments
from esper_telemetry.monitor.amp import ScalerWatch
from esper_telemetry.monitor.check_maker import Aids, CheckMaker
from esper_telemetry.monitor.coverage import Measure
from esper_telemetry.monitor.dead_layers import DeadLayers
from esper_telemetry.monitor.engine import EngineSkips
from esper_telemetry.monitor.gathering import Gathering
from esper_telemetry.monitor.heads import Heads, heads_of
from esper_telemetry.monitor.latest import Latest
from esper_telemetry.monitor.listeners import Listener, Listeners
from esper_telemetry.monitor.optimizer_steps import follow_steps
from esper_telemetry.monitor.passes import Pass
from esper_telemetry.monitor.progress import Progress
from esper_telemetry.monitor.reaction import Policy, Reaction
from esper_telemetry.monitor.rewinding import begin_verdict, with_rewind
from esper_telemetry.monitor.sharing import Sharing
from esper_telemetry.monitor.steps import list_optimizers
from esper_telemetry.monitor.told import Told
from esper_telemetry.monitor.until_closed import UntilClosed
from esper_telemetry.ranks.identity import run_info
from esper_telemetry.ranks.rows import RankRows
from esper_telemetry.ranks.shares import Replicas, check_replicas
from esper_telemetry.recorder import FlightRecorder
from esper_telemetry.scan import ClipScan
from esper_telemetry.scan.layers import Model, named_roots
from esper_telemetry.snapshot import Snapshot
from esper_telemetry.verdict.safety import Safety


class GradientMonitor(Told, UntilClosed):
    """Count the Inf and NaN elements in a model's gradients.

    Call `update()` between `backward()` and whatever clips, or let `watch()` do it. Measuring never raises: an
    internal error is logged once and counted in `snapshot.monitor_errors`. As a context manager it closes itself.

    model: a Module, or a dict name -> Module or leaf tensor, whose names become prefixes of the layer names. Modules
        are not kept alive.
    optimizer: one or several; `on_critical="skip"` and `"rewind"` need it.
    scaler: the GradScaler of the loop. Counts and norms are then what the optimizer would see: overflows that the
        scaler handles are skipped updates, not bad checks, as long as they can be explained. They no longer can when
        the scale falls below 1, after a streak of more than max_amp_skips, or when the expected skip does not come.
        Pass all the optimizers that the scaler steps: what they do not step counts in full.
    max_amp_skips: how many steps in a row the scaler may skip, once it has taken one.
    heads: head -> name of its module, or a list of names (`{"policy": "action_net", "value": "value_net"}`). Each head
        has its own norm in `snapshot.heads`, and remembers until the end of the run what was found in it.
    on_critical: what to do when a check finds more than 5 elements of one kind. "continue": nothing. "skip": the
        optimizer steps until the next check change neither parameters nor optimizer state. "halt": raise
        GradientsCritical from the call that measured. "rewind": keep the last good state of parameters, buffers and
        optimizers in host memory, and restore it when they are damaged; docs/verdict.md lists what is restored. A
        callable: it gets the snapshot and returns "continue", "skip", "halt" or None; what it raises reaches the
        training loop. Several ranks vote before the step on the run's exact counts, and all act alike: a collective,
        in a process group that is created here. A callable is asked on every rank, and all ranks do the strongest
        answer. Where ranks do not meet in time, VoteFailed is raised and no step is taken; see docs/ranks.md.
    patience: act only after this many critical checks in a row, and then until a check is not critical.
    rewind_every, max_rewinds: good checks between two copies, and how many times a run goes back before it halts.
    statistics_every: checks between two looks for dead and exploding layers; what is found is looked at again in the
        checks that follow.
    trap: whether to hook the modules for up to 16 passes after a bad check, to find where the trouble begins.
    damage_every: checks between two scans of parameters, buffers and optimizer state while all is well; after a bad
        check there is one per check. `snapshot.damage` has the result.
    recent_window_seconds: how long a bad check stays in the recent maxima; at least twice the scrape interval.
    before_check: called with the number of the coming check; for fault injection.
    record_dir: a folder. The first bad check of each episode of trouble is recorded in a file there, before the
        optimizer steps: the checks before it, and where the bad elements are. `esper report FILE` shows it. Set
        `batch_id` before the backward pass to have it recorded too.
    run_id: the name of the run, converted to a string. Default: ESPER_RUN_ID, or the launcher's, else a made-up one.
    attribution: with several ranks, whether to measure also what this rank's own backward pass makes, before the
        reduction.
    replicas: if several ranks hold the same plain parameters and no wrapper of torch says so, their process group, or
        a function from a layer's name and parameter to a group or None. Only the group's first rank counts them.

    Raise ValueError when an argument is invalid, and OSError when the folder cannot be written to.
    """

    _watching = True

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
        rewind_every: int = 100,
        max_rewinds: int = 3,
        statistics_every: int = 100,
        trap: bool = True,
        damage_every: int = 1000,
        recent_window_seconds: float = 120.0,
        before_check: Callable[[int], None] | None = None,
        record_dir: str | os.PathLike[str] | None = None,
        run_id: object = None,
        attribution: bool = True,
        replicas: Replicas = None,
    ) -> None:
        recent_window = arguments.seconds_above_0("recent_window_seconds", recent_window_seconds)
        optimizers, roots = list_optimizers(optimizer), named_roots(model).values()
        self._watch_scaler = partial(ScalerWatch.of, optimizers=optimizers, max_skips=max_amp_skips)
        amp, dead_layers, run = self._watch_scaler(scaler), DeadLayers(statistics_every), run_info(run_id)
        watched_heads = None if heads is None else heads_of(model, heads)
        self._latest = Latest(Snapshot.before_first_check(run, recent_window, watched_heads))
        join = partial(self._latest.join, run_id)
        share = partial(Sharing, attribution=attribution, replicas=check_replicas(replicas), on_join=join)
        recorder = None if record_dir is None else FlightRecorder(record_dir, optimizers, self._latest.fail)
        policy = with_rewind(on_critical, optimizers, lambda snapshot: self._verdict.decide(snapshot))
        self._reaction = Reaction(policy, patience, optimizers, self._latest.count_dropped_step, roots)
        aids = Aids(dead_layers, recorder, before_check, wait=self._reaction.needs_the_answer)
        self._checks = CheckMaker(self._latest, aids, amp, EngineSkips(roots, self._latest))
        try:
            self._gathering = Gathering(model, self._checks.measure_early, self._latest.fail, share)
            rewind = (rewind_every, max_rewinds) if on_critical == "rewind" else None
            judged = self._latest, self._gathering.watched, optimizers
            self._verdict = begin_verdict(*judged, recorder, every=damage_every, trap=trap, rewind=rewind)
        except ValueError:
            self._reaction.close()
            raise
        self._checks.verdict = self._verdict
        self._recorder = recorder
        self._progress = Progress(self._latest)
        self._rows = RankRows(self._latest.read, self._latest.take_ranks, self._latest.fail)
        self.announce, self.hear_ranks = self._rows.announce, self._rows.hear  # called by exporters
        self._listeners = Listeners(self._latest.fail, self._rows.see, *([] if recorder is None else [recorder.see]))
        self._stop_following_steps = follow_steps(self._before_step)

    @property
    def snapshot(self) -> Snapshot:
        """Return the result of the last check whose result has arrived; never wait."""
        if self._checks.pending or self._progress.pending:
            self._latest.try_to(self._checks.settle, self._progress.take_in)
        return self._latest.snapshot

    def update(self, *, scaler: GradScaler | None = None) -> Snapshot:
        """Measure every `.grad` now and return the new snapshot.

        scaler: the GradScaler of the loop, if it was not given before. `unscale_()` may come before or after.

        Gradients on CUDA devices are measured in stream order, without waiting: the first later `update()`,
        `snapshot` or `flush()` that finds the result publishes it, and `update()` and `flush()` tell the listeners.
        An `on_critical` other than "continue" needs the result before the optimizer steps, and waits for it.

        Raise only GradientsCritical and VoteFailed, as `on_critical` asks, what a callable `on_critical` raises, and
        ValueError for a scaler that is not a GradScaler or not the one that is already followed.
        """
        if scaler is not None and (self._checks.amp is None or scaler is not self._checks.amp.scaler):
            if self._checks.amp is not None:
                raise ValueError("scaler: expected the GradScaler that this monitor already follows, got another")
            self._checks.amp = self._watch_scaler(scaler)
        return self._check(self._gathering.take(), self._checks.scan)

    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
    ) -> Tensor:
        """Measure and clip with one norm pass; return what `torch.nn.utils.clip_grad_norm_` returns.

        Call it in place of `update()` and torch's function; it takes the same arguments, and the clipped gradients are
        bit-equal to torch's. A monitor from `watch()` has already measured, so there this only clips.
        """
        shared = ClipScan(self._checks.scan)
        if not self._gathering.follows_passes:
            self._check(self._gathering.take(), shared if norm_type == 2.0 else self._checks.scan)
        return shared.clip(self._gathering.watched.parameters(), max_norm, norm_type, error_if_nonfinite, foreach)

    def check_after_backward(self) -> None:
        """Measure automatically at the end of each backward pass, from now on."""
        self._gathering.follow_passes(lambda ended: self._check(ended, self._checks.scan))

    def safe_to_save(self) -> Safety:
        """Tell whether a checkpoint is worth keeping now, true or false, with the reason in `.why`.

        False from a bad check until parameters, buffers and optimizer state were seen intact. Waits for results that
        are still on a device, as saving does.
        """
        self.flush()
        return self._verdict.safe_to_save()

    def pause(self) -> AbstractContextManager[object]:
        """Make no checks until `resume()` or the end of the `with` block, for passes that are not training."""
        self._gathering.pause()
        until = ExitStack()
        until.callback(self.resume)
        return until

    def resume(self) -> None:
        """Make checks again, once every `pause()` has its `resume()`."""
        self._gathering.resume()

    def on_check(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` with each new snapshot, in the training thread; return a function that stops this.

        An exception in a listener is logged once and counted, never passed on.
        """
        return self._listeners.add(listener)

    def flush(self, timeout: float = 10.0) -> None:
        """Wait at most `timeout` seconds for results that are still on a device, and tell the listeners."""
        self._listeners.tell(self._checks.flush(arguments.seconds("timeout", timeout)))

    def close(self) -> None:
        """Remove every hook and mark the snapshot as the run's last. A second call does nothing."""
        self._let_go()
        self._latest.change(ended=True)

    def _let_go(self) -> None:
        self.flush()
        if not self._watching:
            return
        self._watching = False
        self._stop_following_steps()
        self._reaction.close()
        news = self._checks.see_last_step(self._gathering)
        self._verdict.close()
        self._gathering.close()
        self._listeners.tell(news)
        if self._recorder is not None:
            self._recorder.close()

    def _check(self, ended: Pass, measure: Measure) -> Snapshot:
        started = time.perf_counter()
        news = self._checks.make(self._gathering, ended, measure, started)
        self._listeners.tell(news)
        self._checks.seconds += time.perf_counter() - started
        self._reaction.to(news, self._latest.snapshot, self._checks.steps_early)
        return self._latest.snapshot

    def _before_step(self, optimizer: Optimizer) -> None:
        """Check before a step whose gradients were not seen as they arrived: late, but better than never."""
        self._verdict.stepped(optimizer)
        if self._checks.is_unchecked(optimizer, self._gathering):
            self._check(self._gathering.take_late(), self._checks.scan)
        self._reaction.before_step(optimizer, self._gathering.parameter_ids)
