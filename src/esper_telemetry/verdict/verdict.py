"""Follow the checks of a monitor, and find out after a bad one what it has done to the model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from threading import RLock
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from esper_telemetry import arguments
from esper_telemetry.snapshot import Snapshot
from esper_telemetry.snapshot.damage import INTACT, WORDS, Damage, GoodCheck
from esper_telemetry.verdict.look import Looks
from esper_telemetry.verdict.optimizers import Optimizers
from esper_telemetry.verdict.passage import Passage
from esper_telemetry.verdict.rewind import Rewind
from esper_telemetry.verdict.safety import Safety
from esper_telemetry.verdict.state import Watched, list_state
from esper_telemetry.verdict.trap import Trap

logger = logging.getLogger("esper_telemetry")

QUIET_CHECKS = 32
"""Good checks in a row that end an episode of trouble; the flight recorder has the same."""


class Latest(Protocol):
    """The newest snapshot, and who may change it."""

    snapshot: Snapshot
    lock: RLock

    def change(self, **changes: Any) -> None:
        """Replace it by one with these fields changed."""

    def fail(self, what: str) -> None:
        """Count the exception at hand."""


class Model(Watched, Protocol):
    """The model as it is now, with its modules."""

    def modules(self, enter: Callable[[nn.Module], bool]) -> Iterable[tuple[str, nn.Module]]:
        """Return each module with its name."""


class Verdict:
    """Look at parameters, buffers and optimizer state: when watching begins, after a bad check, and now and then.

    After a bad check there is one look per check until one found all intact and the check was good: at the start of
    the next forward, or at the next check, when the optimizer has stepped.

    every: checks between two looks while all is well.
    trap: whether to look in the forward for where trouble began.
    on_news: called when a look was made in trouble.

    Raise ValueError when the number is invalid.
    """

    def __init__(
        self,
        latest: Latest,
        model: Model,
        given: Sequence[Optimizer],
        *,
        every: int,
        trap: bool,
        on_news: Callable[[Snapshot], None] | None = None,
    ) -> None:
        self._latest = latest
        self._model = model
        self._every = arguments.whole("damage_every", every, at_least=1)
        self._on_news = on_news
        self.optimizers = Optimizers(given, model.parameters)
        self._looks = Looks(self._take)
        self._trap = Trap(model, self.before_forward, arguments.flag("trap", trap), latest.fail)
        self._rewind: Rewind | None = None
        self._came_late = False
        self._since_look = 0
        self._quiet = QUIET_CHECKS
        self._is_due = False
        self._stepped = False
        self._in_trouble = False
        self._was_damaged = False
        self.look()

    @property
    def pending(self) -> bool:
        """Tell whether a look is still on its way from a device."""
        return self._looks.pending

    def rewind_with(self, every: int, most: int) -> None:
        """Keep the last good state from now on, and put it back when the model is damaged.

        Raise ValueError where that cannot be done.
        """
        self._rewind = Rewind(self._model, self.optimizers, every, most)
        self.look(wait=True)
        if self._latest.snapshot.damage == INTACT:
            self._rewind.set_up()

    def decide(self, snapshot: Snapshot) -> str | None:
        """Say what to do at a critical check: drop the step of gradients that a damaged model has made, or halt."""
        late, self._came_late = self._came_late, False
        if late:
            return "skip"
        spent = self._rewind is not None and not self._rewind.left
        return "halt" if spent and snapshot.damage != INTACT else None

    def look(self, wait: bool = False, before_step: bool = False) -> None:
        """Look now; what goes wrong is counted, not raised.

        before_step: whether this is the state with which the first bad gradients of an episode were made.
        """
        with self._latest.lock:
            self._is_due = False
            self._since_look = 0
            try:
                with torch.no_grad():
                    self._looks.launch(list_state(self._model, self.optimizers()), before_step)
                    self._looks.settle(wait)
            except Exception:
                self._looks.forget()
                self._latest.fail("the model could not be scanned")

    def settle(self) -> None:
        """Take in the looks that have arrived."""
        if self._looks.pending:
            self._looks.settle()

    def stepped(self, optimizer: Optimizer) -> None:
        """Take note that an optimizer is about to step: what was seen before says nothing about after."""
        if not self.optimizers.steps(optimizer):
            return
        if self._in_trouble:
            self._is_due = self._stepped = True
        if self._rewind is not None:
            self._rewind.stepped()

    def before_forward(self) -> None:
        """Look where a look is due, before anything is computed with what may be damaged."""
        if self._is_due:
            self._look_and_mend()

    def before_check(self) -> Passage | None:
        """Look where a look is due; return what the trap has seen of the pass that ends with this check."""
        self._since_look += 1
        if self._is_due or self._since_look >= self._every:
            self._came_late = self._look_and_mend()
        return self._trap.end_pass() if self._trap.is_armed else None

    def after_check(self, snapshot: Snapshot, seen: Passage | None, before_step: bool) -> Snapshot:
        """Return the snapshot of a check with the verdict on it.

        before_step: whether the optimizer has not stepped with these gradients yet.
        """
        bad = bool(snapshot.layers)
        if bad:
            self._see_trouble(snapshot, seen, before_step)
        elif self._in_trouble and snapshot.damage != INTACT:
            self._is_due = True
        elif not self._is_due and not self._looks.pending:
            self._in_trouble = False
        if self._rewind is not None:
            self._keep(self._rewind, bad)
        self._quiet = 0 if bad else self._quiet + 1
        latest = self._latest.snapshot
        news: dict[str, Any] = {"found_damage": latest.found_damage, "cause": latest.cause}
        if not bad and not self._in_trouble and snapshot.timestamp is not None:
            step = None if snapshot.progress is None else snapshot.progress.step
            news["last_good_check"] = GoodCheck(snapshot.checks, snapshot.timestamp, step)
        return snapshot.but(**news)

    def set_trap(self) -> None:
        """Put the hooks on the modules while there is trouble, and take them off after it; in the training thread."""
        if self._in_trouble or self._trap.is_armed:
            try:
                self._set_trap()
            except Exception:
                self._latest.fail("the trap could not be set")

    def safe_to_save(self) -> Safety:
        """Tell whether a checkpoint is worth keeping now; look, and wait, where the optimizer has stepped since."""
        with self._latest.lock:
            if self._looks.pending or (self._is_due and self._stepped):
                self.look(wait=True)
            return Safety.of(self._latest.snapshot, self._is_due)

    def close(self) -> None:
        """Look a last time where that is due, and take all hooks off."""
        if self._is_due:
            self.look(wait=True)
        self._trap.disarm()

    def _look_and_mend(self) -> bool:
        """Look, and put the last good state back where the model is damaged; tell whether that was done."""
        self.look(wait=self._rewind is not None)
        damage = self._latest.snapshot.damage
        if self._rewind is None or damage in (None, INTACT):
            return False
        try:
            done = self._rewind.put_back()
        except Exception:
            self._latest.fail("the last good state could not be restored")
            return False
        if done:
            with self._latest.lock:
                self._latest.snapshot = self._latest.snapshot.skipping("rewind")
            left = self._rewind.left
            logger.warning("esper: %s: restored the last good state; rewinds left: %d", WORDS[damage], left)
            self.look(wait=True)
        return done

    def _keep(self, rewind: Rewind, bad: bool) -> None:
        """Copy the state where that is due and it is good."""
        try:
            if bad:
                if self._latest.snapshot.damage in (INTACT, "buffers"):
                    rewind.keep_before_step()
            elif not self._in_trouble and rewind.is_due():
                self.look(wait=True)
                if self._latest.snapshot.damage == INTACT:
                    rewind.keep()
        except Exception:
            self._latest.fail("the state could not be copied")

    def _set_trap(self) -> None:
        if not self._in_trouble or self._trap.is_spent:
            self._trap.disarm()
        else:
            self._trap.arm()

    def _see_trouble(self, snapshot: Snapshot, seen: Passage | None, before_step: bool) -> None:
        begins = self._quiet >= QUIET_CHECKS
        self._in_trouble, self._stepped = True, False
        if begins:
            self._trap.renew()
            self._was_damaged = False
            self._latest.change(cause=None)
            if before_step:
                self.look(before_step=True)
        self._is_due = True
        if seen is not None and self._latest.snapshot.cause is None:
            self._latest.change(cause=self._judge(seen, snapshot.origin_layer))

    def _judge(self, seen: Passage, origin: str | None) -> str | None:
        """Return where the trouble began; parameters that it damaged itself do not count."""
        found = self._latest.snapshot.found_damage or Damage()
        try:
            cause = seen.judge([each.layer_name for each in (*found.parameters, *found.buffers)], origin)
        except Exception:
            self._latest.fail("what the trap saw could not be judged")
            return None
        return None if cause and cause.startswith("parameter ") and not self._was_damaged else cause

    def _take(self, found: Damage, before_step: bool) -> None:
        """Publish what a look found; say it in the log when it has become worse."""
        before = self._latest.snapshot.found_damage or Damage()
        changes: dict[str, Any] = {"found_damage": found}
        worst = found.worst
        if worst is not None:
            damaged = (*found.parameters, *found.buffers)
            if before_step:  # the forward may have written to buffers
                damaged = found.parameters
            if damaged and (before_step or not self._in_trouble):
                self._was_damaged = True
                changes["cause"] = f"parameter {damaged[0].layer_name}"
            self._in_trouble, self._quiet = True, 0
            if found.word != before.word:
                counts = worst.inf_count, worst.nan_count, worst.layer_name
                logger.warning("esper: %s: Inf %d, NaN %d in %s", WORDS[found.word], *counts)
        self._latest.change(**changes)
        if self._in_trouble and not before_step and self._on_news is not None:
            self._on_news(self._latest.snapshot)
