"""Read a snapshot as metric samples: the one place that says which field is which metric."""

from __future__ import annotations

import heapq
import math
import platform
import time
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from typing import NamedTuple, Protocol

from esper_telemetry import arguments, metrics
from esper_telemetry.metrics import Metric
from esper_telemetry.snapshot import Snapshot
from esper_telemetry.snapshot.damage import severity_of
from esper_telemetry.snapshot.ranks import WORST, Ranks, worst_of
from esper_telemetry.snapshot.recent import MAX_LAYERS

version = cache(metadata.version)  # it reads a file


def snapshot_of(name: str, given: object) -> Snapshot:
    """Read the snapshot of what was given as a monitor; raise ValueError when it has none."""
    snapshot = getattr(given, "snapshot", None)
    if not isinstance(snapshot, Snapshot):
        raise arguments.no_monitor(name, given)
    return snapshot


class Source(Protocol):
    """Anything that has a snapshot."""

    @property
    def snapshot(self) -> Snapshot:
        """Return what the last check found."""


class Sample(NamedTuple):
    """One value of one metric; a value that was not measured is NaN."""

    metric: Metric
    labels: tuple[str, ...]
    value: float


def read_samples(snapshot: Snapshot, now: float | None = None) -> Iterator[Sample]:
    """Yield every sample of a snapshot at `now`, in monotonic seconds."""
    now = time.monotonic() if now is None else now
    yield from _counts(snapshot, now)
    yield from _history(snapshot)
    yield from _verdict(snapshot)
    yield from _layer_norms(snapshot)
    yield from _heads(snapshot)
    yield from _ppo(snapshot)
    yield from _progress(snapshot)
    if snapshot.ranks is not None and snapshot.run.rank == 0:
        yield from _ranks(snapshot.ranks, now)
        yield from _run_verdict(snapshot.ranks, snapshot)
    yield from _run(snapshot)


def _counts(snapshot: Snapshot, now: float) -> Iterator[Sample]:
    recent = snapshot.recent.read(now)
    yield Sample(metrics.INF_GRAD_COUNT, (), snapshot.inf_grad_count)
    yield Sample(metrics.NAN_GRAD_COUNT, (), snapshot.nan_grad_count)
    yield Sample(metrics.INF_GRAD_RECENT_MAX, (), recent.inf_max)
    yield Sample(metrics.NAN_GRAD_RECENT_MAX, (), recent.nan_max)
    if snapshot.local is not None:
        local = snapshot.local.recent.read(now)
        yield Sample(metrics.LOCAL_INF_GRAD_RECENT_MAX, (), local.inf_max)
        yield Sample(metrics.LOCAL_NAN_GRAD_RECENT_MAX, (), local.nan_max)
    elif snapshot.run.world_size > 1:
        yield Sample(metrics.LOCAL_INF_GRAD_RECENT_MAX, (), math.nan)
        yield Sample(metrics.LOCAL_NAN_GRAD_RECENT_MAX, (), math.nan)
    yield Sample(metrics.UNMEASURED_LAYERS, (), recent.unmeasured_max)
    yield Sample(metrics.RECENT_WINDOW, (), snapshot.recent.seconds)
    for layer in recent.layers:
        yield Sample(metrics.LAYER_INF_GRAD_COUNT, (layer.layer_name,), layer.inf_count)
        yield Sample(metrics.LAYER_NAN_GRAD_COUNT, (layer.layer_name,), layer.nan_count)
    yield Sample(metrics.LAYERS_DROPPED, (), recent.layers_dropped)


def _history(snapshot: Snapshot) -> Iterator[Sample]:
    yield Sample(metrics.CHECKS, (), snapshot.checks)
    yield Sample(metrics.UNMONITORED_STEPS, (), snapshot.unmonitored_steps)
    if snapshot.scope is not None:
        labels = (snapshot.scope.scope, str(snapshot.scope.exact).lower(), snapshot.scope.when)
        yield Sample(metrics.GRAD_SCOPE, labels, 1)
    yield Sample(metrics.LAST_CHECK, (), _or_nan(snapshot.timestamp))
    for (kind, tier), checks in snapshot.nonfinite_checks.items():
        yield Sample(metrics.NONFINITE_CHECKS, (kind, tier), checks)
    for kind, history in (("inf", snapshot.inf), ("nan", snapshot.nan)):
        yield Sample(metrics.NONFINITE_GRADS, (kind,), history.elements)
        yield Sample(metrics.LAST_NONFINITE, (kind,), _or_nan(history.last_timestamp))
        if history.origin_layer is not None:
            yield Sample(metrics.ORIGIN_LAYER, (history.origin_layer, kind), 1)
    for reason, updates in snapshot.skipped_updates.items():
        yield Sample(metrics.SKIPPED_UPDATES, (reason,), updates)
    if snapshot.amp is not None:
        yield Sample(metrics.AMP_SCALE, (), snapshot.amp.scale)
        yield Sample(metrics.AMP_CONSECUTIVE_SKIPS, (), snapshot.amp.consecutive_skips)


_PARTS = {
    "parameters": metrics.NONFINITE_PARAMETERS,
    "buffers": metrics.NONFINITE_BUFFERS,
    "optimizer": metrics.NONFINITE_OPTIMIZER_STATE,
}


def _verdict(snapshot: Snapshot) -> Iterator[Sample]:
    found, good = snapshot.found_damage, snapshot.last_good_check
    for part, metric in _PARTS.items():
        yield Sample(metric, (), math.nan if found is None else found.elements(part))
        for layer in () if found is None else getattr(found, part)[:MAX_LAYERS]:
            yield Sample(metrics.DAMAGED_TENSOR, (part, layer.layer_name), layer.inf_count + layer.nan_count)
    if snapshot.cause is not None:
        yield Sample(metrics.CAUSE, (snapshot.cause,), 1)
    yield Sample(metrics.LAST_GOOD_CHECK, (), math.nan if good is None else good.timestamp)
    yield Sample(metrics.CHECKS_SINCE_GOOD, (), math.nan if good is None else snapshot.checks - good.check)


def _layer_norms(snapshot: Snapshot) -> Iterator[Sample]:
    yield Sample(metrics.GRAD_NORM, (), _or_nan(snapshot.grad_norm))
    yield Sample(metrics.GRAD_ELEMENTS, (), _or_nan(snapshot.elements))
    yield Sample(metrics.DEAD_LAYERS, (), _or_nan(snapshot.dead_layers))
    yield Sample(metrics.EXPLODING_LAYERS, (), _or_nan(snapshot.exploding_layers))
    measured = [
        (norm, name) for name, norm in zip(snapshot.layer_names, snapshot.layer_norms, strict=True) if norm is not None
    ]
    unknown = [layer for layer in measured if math.isnan(layer[0])][:MAX_LAYERS]
    known = (layer for layer in measured if not math.isnan(layer[0]))
    for norm, name in (*unknown, *heapq.nlargest(MAX_LAYERS - len(unknown), known)):
        yield Sample(metrics.LAYER_GRAD_NORM, (name,), norm)


def _heads(snapshot: Snapshot) -> Iterator[Sample]:
    for name, head in snapshot.heads.items():
        yield Sample(metrics.HEAD_GRAD_NORM, (name,), _or_nan(head.norm))
        yield Sample(metrics.HEAD_NONFINITE_LATCHED, (name, "inf"), head.inf_latched)
        yield Sample(metrics.HEAD_NONFINITE_LATCHED, (name, "nan"), head.nan_latched)


def _ppo(snapshot: Snapshot) -> Iterator[Sample]:
    ppo = snapshot.ppo
    if ppo is None:
        return
    yield Sample(metrics.PPO_INF_GRADS, (), ppo.inf_grad_count)
    yield Sample(metrics.PPO_NAN_GRADS, (), ppo.nan_grad_count)
    yield Sample(metrics.PPO_UPDATES, (), ppo.update)
    yield Sample(metrics.PPO_EPISODES, (), ppo.episodes)
    yield Sample(metrics.PPO_UPDATE_SECONDS, (), _or_nan(ppo.update_seconds))
    yield Sample(metrics.PPO_REWARD, (), _or_nan(ppo.episode_reward))
    yield Sample(metrics.PPO_POLICY_LOSS, (), _or_nan(ppo.policy_loss))
    yield Sample(metrics.PPO_VALUE_LOSS, (), _or_nan(ppo.value_loss))
    yield Sample(metrics.PPO_ENTROPY, (), _or_nan(ppo.entropy))
    yield Sample(metrics.PPO_APPROX_KL, (), _or_nan(ppo.approx_kl))
    yield Sample(metrics.PPO_CLIP_FRACTION, (), _or_nan(ppo.clip_fraction))
    yield Sample(metrics.PPO_EXPLAINED_VARIANCE, (), _or_nan(ppo.explained_variance))


def _progress(snapshot: Snapshot) -> Iterator[Sample]:
    progress = snapshot.progress
    if progress is None:
        return
    yield Sample(metrics.TRAIN_LOSS, (), _or_nan(progress.loss))
    yield Sample(metrics.TRAIN_LEARNING_RATE, (), _or_nan(progress.learning_rate))
    yield Sample(metrics.TRAIN_STEP, (), _or_nan(progress.step))
    if progress.samples is not None:
        yield Sample(metrics.TRAIN_SAMPLES, (), progress.samples)


def _ranks(ranks: Ranks, now: float) -> Iterator[Sample]:
    known = ranks.reporting is not None
    recent, bad = ranks.recent.read(now), ranks.bad_at(now)
    yield Sample(metrics.GLOBAL_INF_GRAD_RECENT_MAX, (), recent.inf_max if known else math.nan)
    yield Sample(metrics.GLOBAL_NAN_GRAD_RECENT_MAX, (), recent.nan_max if known else math.nan)
    yield Sample(metrics.BAD_RANKS, (), math.nan if bad is None else len(bad))
    yield Sample(metrics.RANKS_EXPECTED, (), ranks.expected)
    yield Sample(metrics.RANKS_REPORTING, (), _or_nan(ranks.reporting))
    yield Sample(metrics.RANKS_GONE, (), ranks.gone if known else math.nan)
    for place, rank in worst_of(bad or ()):
        who = (str(rank.rank), rank.host)
        yield Sample(metrics.RANK_NONFINITE_GRADS, (*who, "inf"), rank.inf_count)
        yield Sample(metrics.RANK_NONFINITE_GRADS, (*who, "nan"), rank.nan_count)
        yield Sample(metrics.RANK_ORIGIN_LAYER, (*who, rank.layer or ""), place)
        if rank.cause is not None:
            yield Sample(metrics.RANK_CAUSE, (*who, rank.cause), place)


def _run_verdict(ranks: Ranks, snapshot: Snapshot) -> Iterator[Sample]:
    damage, good = ranks.damage, ranks.last_good_check(snapshot.last_good_check)
    yield Sample(metrics.GLOBAL_MODEL_DAMAGE, (), math.nan if damage is None else severity_of(damage))
    yield Sample(metrics.DAMAGED_RANKS, (), math.nan if damage is None else len(ranks.damaged))
    for rank in ranks.damaged[:WORST]:
        labels = (str(rank.rank), rank.host, rank.part, rank.tensor)
        yield Sample(metrics.RANK_DAMAGED_ELEMENTS, labels, rank.elements)
    yield Sample(metrics.GLOBAL_LAST_GOOD_CHECK, (), math.nan if good is None else good.timestamp)
    since = math.nan if good is None else max(0, snapshot.checks - good.check)  # another rank may be a check ahead
    yield Sample(metrics.GLOBAL_CHECKS_SINCE_GOOD, (), since)


def _run(snapshot: Snapshot) -> Iterator[Sample]:
    run = snapshot.run
    yield Sample(metrics.MONITOR_ERRORS, (), snapshot.monitor_errors)
    yield Sample(metrics.MONITOR_SECONDS, (), snapshot.monitor_seconds)
    yield Sample(metrics.RUN_ENDED, (), snapshot.ended)
    yield Sample(metrics.RUN_INFO, (run.run_id, str(run.rank), str(run.world_size), run.host, str(run.pid)), 1)
    yield Sample(metrics.BUILD_INFO, (version("esper-telemetry"), version("torch"), platform.python_version()), 1)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
