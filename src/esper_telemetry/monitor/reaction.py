"""What is done about a critical check: nothing, drop the optimizer's step, or stop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from torch.optim import Optimizer

from esper_telemetry.health import CRITICAL_ABOVE, POLICIES, HealthTier
from esper_telemetry.monitor.steps import Steps, check_can_drop
from esper_telemetry.snapshot import Snapshot

logger = logging.getLogger("esper_telemetry")

Policy = str | Callable[[Snapshot], str | None]


class GradientsCritical(RuntimeError):
    """Stop training: a check found more than 5 Inf or more than 5 NaN elements, and `on_critical` is "halt"."""

    def __init__(self, snapshot: Snapshot) -> None:
        super().__init__(
            f"critical gradients at check {snapshot.checks}: Inf {snapshot.inf_grad_count}, "
            f"NaN {snapshot.nan_grad_count} (critical is above {CRITICAL_ABOVE}), first in {snapshot.origin_layer}"
        )
        self.snapshot = snapshot


class Reaction:
    """Act on critical checks as `on_critical` and `patience` of the monitor say.

    on_drop: called once per optimizer step that was dropped.

    Raise ValueError when they say nothing that can be done.
    """

    def __init__(
        self, on_critical: Policy, patience: int, optimizers: Sequence[Optimizer], on_drop: Callable[[], None]
    ) -> None:
        if not callable(on_critical) and on_critical not in POLICIES:
            raise ValueError(f"on_critical: expected one of {', '.join(POLICIES)} or a callable, got {on_critical!r}")
        if on_critical == "skip":
            check_can_drop(optimizers)
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise ValueError(f"patience: expected at least 1, got {patience}")
        self._on_critical = on_critical
        self._patience = patience
        self._critical_in_a_row = 0
        self._said_too_late = False
        self._steps = Steps(optimizers if self.needs_the_answer else (), on_drop)

    @property
    def needs_the_answer(self) -> bool:
        """Tell whether a check has to be judged before the optimizer steps."""
        return self._on_critical != "continue"

    def to(self, snapshot: Snapshot, steps_early: bool) -> None:
        """React to a check.

        steps_early: whether the optimizer has stepped during the backward pass already.

        Raise GradientsCritical, when that is the policy, and what a callable policy raises.
        """
        self._steps.allow()
        if snapshot.tier is not HealthTier.CRITICAL:
            self._critical_in_a_row = 0
            return
        self._critical_in_a_row += 1
        if self._critical_in_a_row < self._patience:
            return
        policy = self._on_critical(snapshot) if callable(self._on_critical) else self._on_critical
        if policy == "skip":
            self._drop_steps(steps_early)
        if policy == "halt":
            raise GradientsCritical(snapshot)

    def close(self) -> None:
        """Leave every optimizer as it was before."""
        self._steps.remove()

    def _drop_steps(self, steps_early: bool) -> None:
        if not steps_early:
            self._steps.drop()
        elif not self._said_too_late:
            self._said_too_late = True
            logger.error("esper: the optimizer steps during backward(), so no step can be skipped; use 'halt'")
