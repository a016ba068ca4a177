"""Make checks: measure what was gathered, judge it, and publish it when its result is there."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from esper_telemetry import arguments
from esper_telemetry.monitor.amp import ScalerWatch
from esper_telemetry.monitor.check import Check, amp_news
from esper_telemetry.monitor.coverage import Coverage, Measure
from esper_telemetry.monitor.dead_layers import DeadLayers
from esper_telemetry.monitor.engine import EngineSkips
from esper_telemetry.monitor.gathering import Gathering
from esper_telemetry.monitor.latest import Latest
from esper_telemetry.monitor.optimizer_steps import UncheckedSteps
from esper_telemetry.monitor.passes import Pass
from esper_telemetry.recorder import BatchId, FlightRecorder
from esper_telemetry.scan import PendingScan, Scan, Scanner
from esper_telemetry.snapshot import Snapshot
from esper_telemetry.verdict.verdict import Verdict


@dataclass(frozen=True, slots=True)
class Aids:
    """Hold what takes part in a check besides the scan.

    before_check: called with the number of the check to come; it may write to the gradients.
    wait: whether the result is needed before the optimizer steps.
    """

    dead_layers: DeadLayers
    recorder: FlightRecorder | None
    before_check: Callable[[int], None] | None
    wait: bool

    def __post_init__(self) -> None:
        if self.before_check is not None:
            arguments.function("before_check", self.before_check)


class CheckMaker:
    """Make checks one after the other; results that are on a device are published later, in the same order.

    made: how many, those without a result yet included.
    steps_early: whether gradients were taken away during the last pass, as by an optimizer that steps there.
    seconds: spent in the training thread so far.
    batch_id: of the batch that made the gradients.
    verdict: to be set before the first check.
    """

    verdict: Verdict

    def __init__(self, latest: Latest, aids: Aids, amp: ScalerWatch | None, engine: EngineSkips) -> None:
        self._latest = latest
        self._engine = engine
        self._aids = aids
        self._launched: deque[tuple[PendingScan, Check]] = deque()
        self._untold: list[Snapshot] = []
        self._names: Sequence[str] = ()
        self._unchecked = UncheckedSteps()
        self.scan: Measure = Scanner()
        self.amp = amp
        self.steps_early = False
        self._unstepped: Check | None = None
        self.made = 0
        self.seconds = 0.0
        self.batch_id: BatchId = None

    @property
    def pending(self) -> bool:
        """Tell whether results are still on a device."""
        return bool(self._launched) or self.verdict.pending

    def carry_on(self, before: Snapshot) -> None:
        """Go on with the counters of a monitor that has ended."""
        with self._latest.lock:
            self._latest.snapshot = self._latest.snapshot.carrying_on(before)
            self.seconds = before.monitor_seconds

    def measure_early(self, gradients: Sequence[Tensor]) -> list[Scan | PendingScan]:
        """Measure gradients before their pass ends, each by itself; several must be on the CPU."""
        started = time.perf_counter()
        with self._latest.lock:
            found = self.scan([gradient.detach() for gradient in gradients])
        apart: list[Scan | PendingScan] = [found]
        if isinstance(found, Scan) and len(gradients) > 1:
            apart = list(found.apart([gradient.numel() for gradient in gradients]))
        self.seconds += time.perf_counter() - started
        return apart

    def make(self, gathering: Gathering, ended: Pass, measure: Measure, started: float) -> list[Snapshot]:
        """Make a check, and return the snapshots that are news; what goes wrong is counted, not raised."""
        with self._latest.lock:
            try:
                with torch.no_grad():
                    self._make(gathering, ended, measure, started)
            except Exception:
                self._latest.fail("a check failed")
                if ended.when == "step":
                    self._latest.count_unmonitored_step()
            self._unstepped = None
            self.verdict.set_trap()
            return self.take_news()

    def settle(self, wait: bool = False) -> None:
        """Publish launched checks in their order, as far as their results are there."""
        while self._launched:
            try:
                if not wait and not self._launched[0][0].ready():
                    return
                pending, check = self._launched.popleft()
                started = time.perf_counter()
                self._publish(check, check.judge(pending.result()), started)
            except Exception:
                self._launched.clear()
                self._latest.fail("results were lost on their device")
        self.verdict.settle()

    def take_news(self) -> list[Snapshot]:
        """Return the snapshots that listeners were not told of yet."""
        news, self._untold = self._untold, []
        return news

    def flush(self, timeout: float) -> list[Snapshot]:
        """Wait for results that are still on a device, at most `timeout` seconds, and return what is news."""
        deadline = time.monotonic() + timeout
        while self.pending and time.monotonic() < deadline:
            with self._latest.lock:
                self.settle()
            if self.pending:
                time.sleep(0.0005)
        with self._latest.lock:
            return self.take_news()

    def is_unchecked(self, optimizer: Optimizer, gathering: Gathering) -> bool:
        """Take note that an optimizer is about to step; tell whether it would with gradients that no check has seen."""
        if gathering.paused:
            return False
        try:
            if self.amp is not None and self.amp.awaits_skip:
                self.amp.stepped(optimizer, gathering.watched.names, gathering.watched.parameters())
            unchecked = self._unchecked.is_so(optimizer, self.made, gathering.watched, gathering.follows_passes)
            if unchecked and not gathering.follows_passes:
                self._latest.count_unmonitored_step()
            return unchecked and gathering.follows_passes
        except Exception:
            self._latest.fail("an optimizer's step could not be followed")
            return False

    def see_last_step(self, gathering: Gathering) -> list[Snapshot]:
        """Take in what the scaler did after the last check, and return what is news."""
        with self._latest.lock:
            try:
                self._engine.count()
                if self.amp is not None:
                    self._see_last_step(self.amp, gathering)
            except Exception:
                self._latest.fail("the scaler could not be read")
            return self.take_news()

    def _see_last_step(self, amp: ScalerWatch, gathering: Gathering) -> None:
        """Count an overflow that the scaler did not skip after all."""
        state, unexplained = amp.look()
        before = self._latest.snapshot
        self._latest.change(**amp_news(before, state))
        if unexplained:
            names, parameters = gathering.watched.names, gathering.watched.parameters()
            bad = {names.index(name): counts for name, counts in unexplained.items() if name in names}
            found = Scan(list(before.layer_norms), bad, before.elements or 0)
            shared = gathering.sharing.of(parameters, "step")
            self._publish(Check(names, parameters, (), (), time.time(), None, shared, None), found, time.perf_counter())

    def _make(self, gathering: Gathering, ended: Pass, measure: Measure, started: float) -> None:
        aids, number = self._aids, self._latest.snapshot.checks + len(self._launched) + 1
        self._engine.count()
        seen = self.verdict.before_check()
        parameters, gradients = gathering.gather(ended)
        coverage = Coverage(gradients, ended, by_hand=ended.when != "backward")
        if aids.before_check is not None:
            aids.before_check(number)
            _, gradients = gathering.gather(ended)
        if aids.before_check is not None or self.amp is not None or measure is not self.scan:
            coverage.all_now(gradients)
        names, order = gathering.watched.names, ended.order
        late: Sequence[Tensor | None] = coverage.late
        amp = None
        if self.amp is not None:
            late, amp = self.amp.read(late, parameters, names, order, _fresh(ended, gradients))
        found = coverage.merge(measure(late))
        layers = [each if gradient is None else gradient for each, gradient in zip(parameters, gradients, strict=True)]
        shared = gathering.sharing.of(gradients, ended.when)
        check = Check(names, layers, order, coverage.unmeasured, time.time(), amp, shared, seen)
        self._unstepped = check
        self.made += 1
        self.steps_early = coverage.freed
        if isinstance(found, Scan):
            self.settle(wait=True)
            self._publish(check, self._with_dead_layers(check.judge(found), check, gradients), started)
        else:
            self._launched.append((found, check.without_gradients()))
            self.settle(wait=aids.wait)
        if aids.recorder is not None:
            aids.recorder.note(number, self.batch_id, order, names, gradients, self._latest.snapshot)

    def _with_dead_layers(self, found: Scan, check: Check, gradients: Sequence[Tensor | None]) -> Scan:
        if self.steps_early:
            return found  # some are gone
        if check.names is not self._names:
            self._names = check.names
            self._aids.dead_layers.forget()
        return self._aids.dead_layers.add_to(found, gradients, None if check.amp is None else check.amp.scales)

    def _publish(self, check: Check, found: Scan, started: float) -> None:
        seconds = self.seconds + time.perf_counter() - started
        self.verdict.settle()
        published = check.publish(self._latest.snapshot, found, seconds)
        self._latest.snapshot = self.verdict.after_check(published, check.seen, check is self._unstepped)
        self._untold.append(self._latest.snapshot)


def _fresh(ended: Pass, gradients: Sequence[Tensor | None]) -> list[int]:
    """Return the layers whose gradient is a new tensor: what was added to an older one is another version of it."""
    arrived = ((tag.index, seen) for tag, seen in ended.arrived.items() if seen is not None)
    return [index for index, seen in arrived if index is not None and seen[1] == 0 and type(gradients[index]) is Tensor]
