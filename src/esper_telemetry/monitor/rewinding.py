"""The verdict of a monitor, and `on_critical="rewind"`: refused if it cannot work, else decided by the verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch.optim import Optimizer

from esper_telemetry.monitor.latest import Latest
from esper_telemetry.monitor.reaction import Policy
from esper_telemetry.monitor.steps import check_can_drop
from esper_telemetry.monitor.watched import Watched
from esper_telemetry.ranks.wrappers import several
from esper_telemetry.recorder import FlightRecorder
from esper_telemetry.snapshot import Snapshot
from esper_telemetry.verdict.verdict import Verdict


def with_rewind(
    on_critical: Policy, optimizers: Sequence[Optimizer], decide: Callable[[Snapshot], str | None]
) -> Policy:
    """Return the policy of a reaction: "rewind" is decided check by check.

    Raise ValueError when the state could not be put back.
    """
    if not (isinstance(on_critical, str) and on_critical == "rewind"):
        return on_critical
    if several():
        raise ValueError("on_critical: 'rewind' expects a single rank: each would go back on its own; use 'skip'")
    check_can_drop(optimizers, "rewind")
    return decide


def begin_verdict(
    latest: Latest,
    model: Watched,
    optimizers: Sequence[Optimizer],
    recorder: FlightRecorder | None,
    *,
    every: int,
    trap: bool,
    rewind: tuple[int, int] | None,
) -> Verdict:
    """Look for the first time, and make the first copy where `rewind` says how often and how many times."""
    amend = None if recorder is None else recorder.amend
    verdict = Verdict(latest, model, optimizers, every=every, trap=trap, on_news=amend)
    if rewind is not None:
        verdict.rewind_with(*rewind)
    return verdict
