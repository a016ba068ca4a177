"""What to do about a critical check: nothing, drop the optimizer's step, or stop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Sequence

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from esper_telemetry import arguments
from esper_telemetry.health import CRITICAL_ABOVE, POLICIES, HealthTier
from esper_telemetry.monitor.steps import Steps, check_can_drop, check_can_vote
from esper_telemetry.ranks.vote import Found, Vote
from esper_telemetry.ranks.wrappers import several
from esper_telemetry.scan.layers import parameter_ids
from esper_telemetry.snapshot import Snapshot

logger = logging.getLogger("esper_telemetry")

Policy = str | Callable[[Snapshot], str | None]


class GradientsCritical(RuntimeError):
    """Training was stopped: more than 5 Inf or 5 NaN elements in a check, and `on_critical` halts."""

    def __init__(self, snapshot: Snapshot, run: Found | None = None) -> None:
        over_ranks = "" if run is None else f"; over all ranks Inf {run.inf}, NaN {run.nan}"
        super().__init__(
            f"critical gradients at check {snapshot.checks}: Inf {snapshot.inf_grad_count}, "
            f"NaN {snapshot.nan_grad_count} (critical is above {CRITICAL_ABOVE}), first in {snapshot.origin_layer}"
            f"{over_ranks}"
        )
        self.snapshot = snapshot


def check_policy(on_critical: object) -> None:
    """Raise ValueError when it is not a policy."""
    if not callable(on_critical) and not (isinstance(on_critical, str) and on_critical in POLICIES):
        raise ValueError(
            f"on_critical: expected one of {', '.join(POLICIES)} or a callable, got {arguments.shown(on_critical)}"
        )


class Reaction:
    """Act on critical checks as `on_critical` and `patience` of the monitor say.

    With several ranks, all act or none does: they vote once per check, before the step that follows it, or at once if
    that step is already under way, as with a closure.

    on_drop: called once per optimizer step that was dropped.
    roots: the models that are watched.

    Raise ValueError when a policy or patience is invalid, or cannot work with these optimizers.
    """

    def __init__(
        self,
        on_critical: Policy,
        patience: int,
        optimizers: Sequence[Optimizer],
        on_drop: Callable[[], None],
        roots: Iterable[object] = (),
    ) -> None:
        check_policy(on_critical)
        if on_critical == "skip":
            check_can_drop(optimizers)
        arguments.whole("patience", patience, at_least=1)
        self._on_critical = on_critical
        self._patience = patience
        self._critical_in_a_row = 0
        self._said_too_late = False
        self._optimizers = frozenset(map(id, optimizers))
        self._steps = Steps(optimizers if self.needs_the_answer else (), on_drop)
        self._vote: Vote | None = None
        self._checks = 0
        self._awaits_vote: tuple[Snapshot, Found] | None = None
        self._under_way: list[int] = []
        self._handle: RemovableHandle | None = None
        if self.needs_the_answer and several():
            check_can_vote(optimizers, roots)
            self._join()

    @property
    def needs_the_answer(self) -> bool:
        """Tell whether a check must be judged before the optimizer steps."""
        return self._on_critical != "continue"

    def to(self, news: Sequence[Snapshot], latest: Snapshot, steps_early: bool) -> None:
        """React to a check.

        news: the snapshots that came of it; none if it failed.
        steps_early: whether the optimizer already stepped during the backward pass.

        Raise GradientsCritical if that is the policy, what a callable policy raises, and VoteFailed if ranks do not
        agree.
        """
        if not self.needs_the_answer:
            return
        if self._vote is None and several():
            self._join()
        if self._vote is None:
            for snapshot in news:
                self._steps.allow()
                if self._is_due(snapshot.tier is HealthTier.CRITICAL):
                    self._act(self._policy(snapshot), snapshot, steps_early)
            return
        self._steps.allow()
        self._checks += 1
        self._awaits_vote = (latest, _found(news[-1]) if news else Found(0, 0, 0))
        if self._under_way:
            self._hold_vote(self._vote, self._awaits_vote)

    def before_step(self, optimizer: Optimizer, own: Callable[[], Collection[int]]) -> None:
        """Vote before the first step after a check; raise as `to()` does.

        own: returns the ids of the watched parameters.
        """
        if self._vote is None:
            return
        key = id(optimizer)
        if key in self._under_way:  # its last step has raised
            del self._under_way[self._under_way.index(key) :]
        if self._awaits_vote and not self._under_way and self._is_ours(optimizer, own):
            self._hold_vote(self._vote, self._awaits_vote)
        self._under_way.append(key)

    def close(self) -> None:
        """Leave every optimizer as it was before."""
        self._steps.remove()
        if self._handle is not None:
            self._handle.remove()

    def _join(self) -> None:
        self._vote = Vote()
        self._handle = register_optimizer_step_post_hook(self._after_step)

    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        key = id(optimizer)
        if key in self._under_way:
            del self._under_way[self._under_way.index(key) :]

    def _is_ours(self, optimizer: Optimizer, own: Callable[[], Collection[int]]) -> bool:
        if id(optimizer) in self._optimizers:
            return True
        return not parameter_ids(optimizer).isdisjoint(own())

    def _hold_vote(self, vote: Vote, awaits: tuple[Snapshot, Found]) -> None:
        (snapshot, found), self._awaits_vote = awaits, None
        run = vote.add_up(found, self._checks)
        if self._is_due(run.critical > 0 or HealthTier.of(max(run.inf, run.nan)) is HealthTier.CRITICAL):
            self._act(self._agree(vote, snapshot), snapshot, run=run)

    def _agree(self, vote: Vote, snapshot: Snapshot) -> str | None:
        """Return what all ranks do: the strongest of their answers."""
        if not callable(self._on_critical):
            return self._on_critical
        error: BaseException | None = None
        wish: str | None = "raise"
        try:
            wish = self._policy(snapshot)
        except BaseException as raised:
            error = raised
        agreed = _WISHES[vote.strongest(_WISHES.index(wish) if wish in _WISHES else 0)]
        if error is not None:
            raise error
        return "halt" if agreed == "raise" else agreed

    def _is_due(self, critical: bool) -> bool:
        self._critical_in_a_row = self._critical_in_a_row + 1 if critical else 0
        return self._critical_in_a_row >= self._patience

    def _policy(self, snapshot: Snapshot) -> str | None:
        return self._on_critical(snapshot) if callable(self._on_critical) else self._on_critical

    def _act(self, policy: str | None, snapshot: Snapshot, steps_early: bool = False, run: Found | None = None) -> None:
        if policy == "skip":
            self._drop_steps(steps_early)
        if policy == "halt":
            raise GradientsCritical(snapshot, run)

    def _drop_steps(self, steps_early: bool) -> None:
        if not steps_early:
            self._steps.drop()
        elif not self._said_too_late:
            self._said_too_late = True
            logger.error("esper: the optimizer steps during backward(), so no step can be skipped; use 'halt'")


def _found(snapshot: Snapshot) -> Found:
    """Return what one rank brings to the vote; if it does not know what it owns, only its tier counts."""
    critical = snapshot.tier is HealthTier.CRITICAL
    return Found(snapshot.owned_inf_count or 0, snapshot.owned_nan_count or 0, critical)


_WISHES = (None, "continue", "skip", "halt", "raise")
"""What a rank may want, strongest last; all ranks do the strongest wish."""
