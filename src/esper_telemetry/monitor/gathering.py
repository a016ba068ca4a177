"""Gather the gradients of a check: those that this thread's backward passes have made."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from esper_telemetry.monitor.coverage import look_on_arrival
from esper_telemetry.monitor.held import Held, MeasureEach, can_wait
from esper_telemetry.monitor.outputs import Outputs
from esper_telemetry.monitor.passes import Pass, Passes, SinceUpdate
from esper_telemetry.monitor.sharing import Sharing
from esper_telemetry.monitor.tags import Tag, retag
from esper_telemetry.monitor.unsharded import Unsharded
from esper_telemetry.monitor.watched import Watched
from esper_telemetry.scan.layers import Model


class Gathering:
    """Know what a model's parameters are, and what has arrived there.

    measure: measures gradients that may not stay, as they arrive, each by itself.
    fail: takes note of an exception, which never reaches the training loop.
    share: says how the watched parameters are spread over ranks.
    """

    def __init__(
        self,
        model: Model,
        measure: MeasureEach,
        fail: Callable[[str], None],
        share: Callable[[Watched], Sharing],
    ) -> None:
        self._measure = measure
        self._held = Held(measure, fail)
        self._fail = fail
        self._passes: Passes | None = None
        self._since_update = SinceUpdate(self._begin)
        self._now = self._since_update.now
        self._threads: set[int] = set()
        self._pauses = 0
        self.watched = Watched(model, self._arrive)
        self.sharing = share(self.watched)
        self._unsharded = Unsharded(self._arrive_whole)
        self._outputs = Outputs(self._reach)
        self._at_steps = False
        self._look_at_ranks()

    @property
    def follows_passes(self) -> bool:
        """Tell whether checks are made at the end of each backward pass."""
        return self._passes is not None

    def follow_passes(self, on_end: Callable[[Pass], object]) -> None:
        """Call `on_end` at the end of each backward pass, from now on."""

        def end(ended: Pass) -> None:
            if self._at_steps:  # which was found out as this pass began
                self._since_update.take_in(ended)
            else:
                on_end(ended)

        self._passes = Passes(self._begin, lambda: self.sharing.hops, end)
        self._now = self._passes.now

    def take(self) -> Pass:
        """Return what has arrived since the last call, where no passes are followed."""
        return self._since_update.take()

    def take_late(self) -> Pass:
        """Return what has arrived before a step that no check has preceded."""
        late = self.take() if self._at_steps else Pass()
        late.when = "step"
        return late

    @property
    def paused(self) -> bool:
        """Tell whether what arrives is of no interest."""
        return self._pauses > 0

    def pause(self) -> None:
        """Ignore what arrives until `resume()`."""
        self._pauses += 1
        self._now = dict

    def resume(self) -> None:
        """Take note again, once every `pause()` has ended."""
        self._pauses = max(0, self._pauses - 1)
        if not self._pauses:
            self._now = self._since_update.now if self._passes is None or self._at_steps else self._passes.now

    def gather(self, ended: Pass) -> tuple[Sequence[Tensor], list[Tensor | None]]:
        """Return the model's parameters, and the gradients that may be measured in this thread.

        What another thread's backward pass is writing to, or may be, is not touched: reading it would crash.
        """
        parameters = self.watched.parameters()
        self._look_at_ranks()
        if self._passes is None:
            gradients = [parameter.grad for parameter in parameters]
        else:
            me = threading.get_ident()
            self._threads.add(me)
            for tag in ended.arrived if not self._outputs.followed else self.watched.tags:
                tag.thread = me
            with self._passes.lock:
                gradients = self._of_thread(me, parameters, self._is_alone(ended))
        if len(ended.arrived) < len(self.watched.tags):
            _retag(zip(self.watched.tags, parameters, gradients, strict=False), ended)
        return parameters, gradients

    def parameter_ids(self) -> set[int]:
        """Return the ids of the parameters that the model has now."""
        return set(map(id, self.watched.parameters()))

    def close(self) -> None:
        """Leave every parameter as it was before."""
        self._unsharded.close()
        self._outputs.close()
        self.watched.close()

    def _begin(self) -> None:
        """Look at the model before the first gradient of a pass is taken in."""
        self.watched.refresh()
        self._look_at_ranks()

    def _look_at_ranks(self) -> None:
        try:
            wrappers = self.sharing.refresh()
            if wrappers is not None:
                self._unsharded.follow(wrappers.fsdp2, self.sharing.tags())
                self._outputs.follow(wrappers.fsdp1)
                if wrappers.stages:
                    self._check_at_steps()
        except Exception:
            self._fail("how the model is spread over ranks could not be determined")

    def _check_at_steps(self) -> None:
        """Make one check before each step: a pipeline makes many passes for it, and some of them go by all hooks."""
        self._at_steps = True
        if self._passes is not None and not self._pauses:
            self._now = self._since_update.now

    def _reach(self) -> None:
        try:
            self._now()
        except Exception:
            self._fail("the beginning of a backward pass was missed")

    def _arrive_whole(self, tag: Tag, parameter: Tensor) -> None:
        """Take in what this rank's own backward made, before it is reduced."""
        try:
            gradient = parameter.grad
            if tag.own is None or gradient is None or self._pauses:
                return
            in_bucket = tag.fleeting and gradient._is_view()
            if in_bucket or not can_wait(gradient):
                tag.own += self._measure([gradient])
            else:
                self._held.add(tag.own, gradient)
        except Exception:
            self._fail("a gradient could not be measured as it arrived")

    def _arrive(self, tag: Tag, parameter: Tensor) -> None:
        if tag.reduced:
            self._arrive_whole(tag, parameter)
        try:
            gradient = parameter.grad
            if gradient is None or (not tag.reduced and (tag.early or len(tag.hooks) > 1)):
                seen = look_on_arrival(tag, gradient, self._measure)
            else:  # mostly, so it is quick
                seen = id(gradient), gradient._version, None
            self._now()[tag] = seen
        except Exception:
            self._fail("a gradient could not be measured as it arrived")

    def _is_alone(self, ended: Pass) -> bool:
        if len(self._threads) > 1:
            self._threads.intersection_update(thread.ident for thread in threading.enumerate())
        return len(self._threads) == 1 and self._passes is not None and not self._passes.others_than(ended)

    def _of_thread(self, me: int, parameters: Sequence[Tensor], alone: bool) -> list[Tensor | None]:
        if alone:
            return [parameter.grad for parameter in parameters]
        others = self._threads - {me}
        return [
            None if tag.thread is None or tag.thread in others else parameter.grad
            for tag, parameter in zip(self.watched.tags, parameters, strict=True)
        ]


def _retag(layers: Iterable[tuple[Tag, Tensor, Tensor | None]], ended: Pass) -> None:
    """Tag again what has a gradient that was not seen to arrive, and is trained by this thread.

    Of another thread it may be arriving right now, and replacing a hook while torch runs it would crash.
    """
    me = threading.get_ident()
    for tag, parameter, gradient in layers:
        if gradient is not None and tag.thread == me and tag not in ended.arrived:
            retag(parameter)
