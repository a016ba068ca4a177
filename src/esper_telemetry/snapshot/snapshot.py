"""What every reader sees: frozen, plain data, replaced as a whole by the next check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from esper_telemetry.health import HealthTier
from esper_telemetry.snapshot.history import History
from esper_telemetry.snapshot.recent import LayerCounts, RecentWindow

if TYPE_CHECKING:
    from esper_telemetry.snapshot.amp_state import AmpState
    from esper_telemetry.snapshot.damage import Damage, GoodCheck
    from esper_telemetry.snapshot.heads import Head, WatchedHeads
    from esper_telemetry.snapshot.ppo_update import PPOUpdatePayload
    from esper_telemetry.snapshot.rank_share import GradScope, LocalCheck
    from esper_telemetry.snapshot.ranks import Ranks
    from esper_telemetry.snapshot.train_progress import TrainProgress


@dataclass(frozen=True, slots=True)
class KindHistory:
    """Hold what is known so far of one kind, Inf or NaN."""

    warning_checks: int
    critical_checks: int
    elements: int
    last_timestamp: float | None
    origin_layer: str | None

    def after(self, count: int, timestamp: float, origin_layer: str | None) -> KindHistory:
        """Return the history after a check that found `count` elements of this kind."""
        tier = HealthTier.of(count)
        if tier is HealthTier.HEALTHY:
            return self
        return KindHistory(
            self.warning_checks + (tier is HealthTier.WARNING),
            self.critical_checks + (tier is HealthTier.CRITICAL),
            self.elements + count,
            timestamp,
            origin_layer,
        )


@dataclass(frozen=True, slots=True)
class RunInfo:
    """Name the run and one of its processes.

    local_rank: among the processes of its host.
    attempt: how many times the launcher has restarted the run.
    """

    run_id: str
    rank: int
    world_size: int
    local_rank: int
    attempt: int
    host: str
    pid: int


@dataclass(frozen=True)
class Snapshot:
    """Hold everything that is known after the last check.

    Before the first check, `checks` and the counts are 0, and everything that was not measured is None.

    inf_grad_count, nan_grad_count: elements of that kind at the last check, over everything watched; with several
        ranks, what this rank's optimizer will see.
    owned_inf_count, owned_nan_count: the part of them that this rank owns, so that the sum over ranks counts each
        element once; None if that is not known.
    local: what this rank's own backward pass made; None if it was not measured, as in a run of one rank.
    scope: what these numbers cover; None before the first check.
    grad_norm: L2 norm before clipping; Inf or NaN if an element is.
    elements: how many elements the last check covered.
    layers: the layers that were bad at the last check, worst first.
    unmeasured_layers: layers whose gradient arrived at the last check, but was gone before it could be measured.
    origin_layer: in the last bad check, the bad layer that gradients reached first, the one nearest the loss.
    timestamp: unix time of the last check.
    layer_names, layer_norms: all layers, and the norm of each at the last check (None: it had no gradient).
    watched_heads: which layers are in which head; `heads` reads them.
    dead_layers, exploding_layers: as of the last full statistics, which are taken less often than checks.
    history: the last minutes in slots, and how trouble began.
    unmonitored_steps: optimizer steps taken with gradients that no check had seen.
    amp: the GradScaler's state at the last check; None if none is watched.
    found_damage: what the last scan of parameters, buffers and optimizer state found; None before the first. `damage`
        is its verdict in one word.
    cause: where the trouble of the last episode began, as far as it was seen: "input", "parameter NAME", "forward of
        MODULE", "loss" or "backward of MODULE".
    last_good_check: the last check that found nothing in a model that was not known to be damaged.
    monitor_seconds: time spent measuring so far.
    progress: what the loop has reported of its training; None if it has reported nothing.
    ranks: what is known of the other processes of the run; None in a run of one rank, and before they are known.
    """

    run: RunInfo
    checks: int
    inf_grad_count: int
    nan_grad_count: int
    owned_inf_count: int | None
    owned_nan_count: int | None
    local: LocalCheck | None
    scope: GradScope | None
    grad_norm: float | None
    elements: int | None
    layers: tuple[LayerCounts, ...]
    unmeasured_layers: tuple[str, ...]
    origin_layer: str | None
    timestamp: float | None
    layer_names: Sequence[str]
    layer_norms: Sequence[float | None]
    watched_heads: WatchedHeads | None
    dead_layers: int | None
    exploding_layers: int | None
    inf: KindHistory
    nan: KindHistory
    recent: RecentWindow
    history: History
    skipped_updates: dict[str, int]
    unmonitored_steps: int
    amp: AmpState | None
    found_damage: Damage | None
    cause: str | None
    last_good_check: GoodCheck | None
    monitor_seconds: float
    monitor_errors: int
    ppo: PPOUpdatePayload | None
    progress: TrainProgress | None
    ranks: Ranks | None
    ended: bool

    @classmethod
    def before_first_check(
        cls, run: RunInfo, recent_window_seconds: float, watched_heads: WatchedHeads | None = None
    ) -> Snapshot:
        """Build what is known before anything was measured."""
        nothing = KindHistory(0, 0, 0, None, None)
        return cls(
            run=run,
            checks=0,
            inf_grad_count=0,
            nan_grad_count=0,
            owned_inf_count=0,
            owned_nan_count=0,
            local=None,
            scope=None,
            grad_norm=None,
            elements=None,
            layers=(),
            unmeasured_layers=(),
            origin_layer=None,
            timestamp=None,
            layer_names=(),
            layer_norms=(),
            watched_heads=watched_heads,
            dead_layers=None,
            exploding_layers=None,
            inf=nothing,
            nan=nothing,
            recent=RecentWindow(recent_window_seconds),
            history=History(recent_window_seconds),
            skipped_updates={"amp": 0, "intervention": 0, "rewind": 0},
            unmonitored_steps=0,
            amp=None,
            found_damage=None,
            cause=None,
            last_good_check=None,
            monitor_seconds=0.0,
            monitor_errors=0,
            ppo=None,
            progress=None,
            ranks=None,
            ended=False,
        )

    @property
    def tier(self) -> HealthTier:
        """Return the worse tier of the two kinds at the last check; not healthy if a layer could not be measured."""
        tier = HealthTier.of(max(self.inf_grad_count, self.nan_grad_count))
        return HealthTier.WARNING if self.unmeasured_layers and tier is HealthTier.HEALTHY else tier

    @property
    def local_inf_count(self) -> int | None:
        """Return the Inf elements that this rank's own backward pass made; None where that was not measured."""
        return None if self.local is None else self.local.inf_count

    @property
    def local_nan_count(self) -> int | None:
        """Return the NaN elements that this rank's own backward pass made; None where that was not measured."""
        return None if self.local is None else self.local.nan_count

    @property
    def local_origin_layer(self) -> str | None:
        """Return where the last trouble began that this rank's own backward pass made."""
        return None if self.local is None else self.local.origin_layer

    @property
    def damage(self) -> str | None:
        """Return "intact", or the worst part that holds Inf or NaN: "optimizer", "buffers" or "parameters".

        None before the first scan.
        """
        return None if self.found_damage is None else self.found_damage.word

    @property
    def heads(self) -> Mapping[str, Head]:
        """Return the heads by name, each with its norm at the last check and what has ever been found in it."""
        if self.watched_heads is None:
            return {}
        return self.watched_heads.read(self.layer_names, self.layer_norms)

    @property
    def nonfinite_checks(self) -> Mapping[tuple[str, str], int]:
        """Return the number of bad checks by (kind, tier)."""
        return {
            (kind, tier): getattr(history, f"{tier}_checks")
            for kind, history in (("inf", self.inf), ("nan", self.nan))
            for tier in ("warning", "critical")
        }

    def but(self, **changes: Any) -> Snapshot:
        """Return a copy with these fields changed; `dataclasses.replace` takes six times as long, at every check."""
        changed = object.__new__(Snapshot)
        changed.__dict__.update(self.__dict__, **changes)
        return changed

    def skipping(self, reason: str) -> Snapshot:
        """Return this snapshot with one more skipped update."""
        return self.but(skipped_updates={**self.skipped_updates, reason: self.skipped_updates[reason] + 1})

    def carrying_on(self, before: Snapshot) -> Snapshot:
        """Return this snapshot of a new run with the counters and the memory of another."""
        heads = self.watched_heads
        if heads is not None and before.watched_heads is not None:
            heads = replace(heads, inf=before.watched_heads.inf, nan=before.watched_heads.nan)
        return self.but(
            checks=before.checks,
            timestamp=before.timestamp,
            origin_layer=before.origin_layer,
            inf=before.inf,
            nan=before.nan,
            recent=replace(before.recent, seconds=self.recent.seconds),
            history=replace(before.history, quiet_seconds=self.history.quiet_seconds),
            watched_heads=heads,
            skipped_updates=before.skipped_updates,
            unmonitored_steps=before.unmonitored_steps,
            local=before.local and before.local.within(self.recent.seconds),
            last_good_check=before.last_good_check,
            monitor_seconds=before.monitor_seconds,
            monitor_errors=before.monitor_errors,
            ppo=before.ppo,
            progress=before.progress,
        )
