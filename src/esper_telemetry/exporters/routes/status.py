"""Turn a snapshot into JSON: what the exporter's page shows. docs/status-api.md describes every field."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from importlib.metadata import version
from typing import Any, TypeAlias

from esper_telemetry.health import HealthTier
from esper_telemetry.snapshot import Snapshot
from esper_telemetry.snapshot.damage import INTACT, PARTS, WORDS, GoodCheck
from esper_telemetry.snapshot.history import SLOT_SECONDS
from esper_telemetry.snapshot.ranks import WORST, worst_of
from esper_telemetry.snapshot.recent import MAX_LAYERS, LayerCounts

Json: TypeAlias = dict[str, Any]


def status_json(snapshot: Snapshot) -> bytes:
    """Return the status as it is now."""
    return json.dumps(read_status(snapshot, time.time(), time.monotonic()), allow_nan=False).encode()


def read_status(snapshot: Snapshot, now: float, monotonic: float) -> Json:
    """Return the status at a unix and a monotonic time; what was not measured is None."""
    recent = snapshot.recent.read(monotonic)
    worst = None
    if snapshot.checks:
        worst = {
            "inf": max(recent.inf_max, snapshot.inf_grad_count),
            "nan": max(recent.nan_max, snapshot.nan_grad_count),
        }
    ranks = _ranks(snapshot, now, monotonic)
    if worst is not None and ranks is not None:  # of rank 0, whose own share may be smaller
        worst = {kind: max(count, ranks[kind] or 0) for kind, count in worst.items()}
    tier = None if worst is None else HealthTier.of(max(worst.values()))
    liveness = _liveness(snapshot, now)
    unmeasured = max(recent.unmeasured_max, len(snapshot.unmeasured_layers))
    return {
        "version": version("esper-telemetry"),
        "now": now,
        "state": _state(tier, liveness, unmeasured, _is_damaged(snapshot)),
        "tier": _name(tier),
        "liveness": liveness,
        "worst": worst,
        "recent_window_seconds": snapshot.recent.seconds,
        "run": asdict(snapshot.run),
        "ranks": ranks,
        "checks": snapshot.checks,
        "last_check": _last_check(snapshot, now),
        "stalled_after_seconds": snapshot.history.stalled_seconds,
        "trouble": _trouble(snapshot),
        "model": _model(snapshot, now),
        "inf": asdict(snapshot.inf),
        "nan": asdict(snapshot.nan),
        "layers": [_layer(layer) for layer in recent.layers or snapshot.layers[:MAX_LAYERS]],
        "layers_dropped": recent.layers_dropped if recent.layers else max(0, len(snapshot.layers) - MAX_LAYERS),
        "unmeasured_layers": list(snapshot.unmeasured_layers[:MAX_LAYERS]),
        "unmeasured_max": unmeasured,
        "heads": _heads(snapshot),
        "dead_layers": snapshot.dead_layers,
        "exploding_layers": snapshot.exploding_layers,
        "skipped_updates": dict(snapshot.skipped_updates),
        "amp": _amp(snapshot),
        "ppo": None if snapshot.ppo is None else {name: _number(value) for name, value in asdict(snapshot.ppo).items()},
        "progress": _progress(snapshot),
        "cost": _cost(snapshot),
        "monitor_errors": snapshot.monitor_errors,
        "history": _history(snapshot, monotonic),
    }


def _state(tier: HealthTier | None, liveness: str, unmeasured: int, damaged: bool) -> str | None:
    """Return what a banner should say: what is bad first, then what is not known; 0 only where all was measured."""
    if damaged:
        return _name(HealthTier.CRITICAL)
    if tier not in (None, HealthTier.HEALTHY):
        return _name(tier)
    if liveness != "measuring":
        return liveness
    return "not_measuring" if unmeasured else _name(tier)


def _is_damaged(snapshot: Snapshot) -> bool:
    """Tell whether the model holds Inf or NaN here or, as far as rank 0 knows, on any rank."""
    return any(each not in (None, INTACT) for each in (snapshot.damage, snapshot.ranks and snapshot.ranks.damage))


def _progress(snapshot: Snapshot) -> Json | None:
    if snapshot.progress is None:
        return None
    return {name: _number(value) for name, value in asdict(snapshot.progress).items()}


def _liveness(snapshot: Snapshot, now: float) -> str:
    if snapshot.ended:
        return "ended"
    if snapshot.timestamp is None:
        return "not_measuring"
    return "stalled" if now - snapshot.timestamp > snapshot.history.stalled_seconds else "measuring"


def _name(tier: HealthTier | None) -> str | None:
    return None if tier is None else tier.value


def _last_check(snapshot: Snapshot, now: float) -> Json | None:
    if snapshot.timestamp is None:
        return None
    return {
        "timestamp": snapshot.timestamp,
        "age_seconds": max(0.0, now - snapshot.timestamp),
        "inf": snapshot.inf_grad_count,
        "nan": snapshot.nan_grad_count,
        "norm": _number(snapshot.grad_norm),
        "elements": snapshot.elements,
    }


def _trouble(snapshot: Snapshot) -> Json | None:
    trouble = snapshot.history.trouble
    if trouble is None:
        return None
    last = max(each for each in (snapshot.inf.last_timestamp, snapshot.nan.last_timestamp) if each is not None)
    return {
        "since": trouble.since,
        "last_timestamp": last,
        "origin_layer": trouble.origin_layer,
        "checks": trouble.checks,
    }


def _model(snapshot: Snapshot, now: float) -> Json:
    """Return the verdict: what was damaged at the last scan, where it began, and how much going back would lose."""
    found = snapshot.found_damage
    return {
        "damage": snapshot.damage,
        "verdict": None if snapshot.damage is None else WORDS[snapshot.damage],
        "elements": {part: None if found is None else found.elements(part) for part in PARTS},
        "worst": [
            {"part": part, **_layer(layer)}
            for part in PARTS
            for layer in (() if found is None else getattr(found, part)[:MAX_LAYERS])
        ],
        "cause": snapshot.cause,
        "last_good_check": _good(snapshot.last_good_check, snapshot.checks, now),
    }


def _good(good: GoodCheck | None, checks: int, now: float) -> Json | None:
    if good is None:
        return None
    return {
        "check": good.check,
        "timestamp": good.timestamp,
        "age_seconds": max(0.0, now - good.timestamp),
        "checks_since": max(0, checks - good.check),  # another rank may be a check ahead
        "step": good.step,
    }


def _layer(layer: LayerCounts) -> Json:
    return {"layer": layer.layer_name, "inf": layer.inf_count, "nan": layer.nan_count, "elements": layer.numel}


def _ranks(snapshot: Snapshot, now: float, monotonic: float) -> Json | None:
    """Return what rank 0 knows of the run; other ranks know its size, and where rank 0 is."""
    ranks = snapshot.ranks
    if ranks is None:
        return None
    known, recent, bad = ranks.reporting is not None, ranks.recent.read(monotonic), ranks.bad_at(monotonic)
    return {
        "expected": ranks.expected,
        "reporting": ranks.reporting,
        "gone": ranks.gone if known else None,
        "silent": list(ranks.silent),
        "inf": recent.inf_max if known else None,
        "nan": recent.nan_max if known else None,
        "exact": ranks.exact if known else None,
        "bad": None if bad is None else len(bad),
        "worst": [
            {
                "place": place,
                "rank": rank.rank,
                "host": rank.host,
                "inf": rank.inf_count,
                "nan": rank.nan_count,
                "layer": rank.layer,
                "timestamp": rank.timestamp,
                "cause": rank.cause,
            }
            for place, rank in worst_of(bad or ())
        ],
        "damage": ranks.damage,
        "damaged": None if ranks.damage is None else len(ranks.damaged),
        "worst_damaged": [asdict(rank) for rank in ranks.damaged[:WORST]],
        "last_good_check": _good(ranks.last_good_check(snapshot.last_good_check), snapshot.checks, now),
        "leader": ranks.leader,
    }


def _heads(snapshot: Snapshot) -> list[Json]:
    return [
        {"head": name, "norm": _number(head.norm), "inf_latched": head.inf_latched, "nan_latched": head.nan_latched}
        for name, head in snapshot.heads.items()
    ]


def _amp(snapshot: Snapshot) -> Json | None:
    if snapshot.amp is None:
        return None
    return {"scale": _number(snapshot.amp.scale), "consecutive_skips": snapshot.amp.consecutive_skips}


def _cost(snapshot: Snapshot) -> Json:
    """Return what measuring costs; the share is of the wall time from the first check to the last."""
    began, last = snapshot.history.began, snapshot.timestamp
    wall = 0.0 if began is None or last is None else last - began
    return {
        "seconds": snapshot.monitor_seconds,
        "seconds_per_check": snapshot.monitor_seconds / snapshot.checks if snapshot.checks else None,
        "share": snapshot.monitor_seconds / wall if wall > 0 else None,
    }


def _history(snapshot: Snapshot, monotonic: float) -> Json:
    slots = snapshot.history.read(monotonic)
    return {
        "slot_seconds": SLOT_SECONDS,
        "inf": [None if slot is None else slot.inf_max for slot in slots],
        "nan": [None if slot is None else slot.nan_max for slot in slots],
    }


def _number(value: float | None) -> float | str | None:
    """Return what JSON can carry; it has no Inf and NaN, so these become Prometheus' words for them.

    The losses of a training loop may be NumPy numbers, which are not floats to JSON.
    """
    if value is None or isinstance(value, int):
        return value
    if math.isfinite(value):
        return float(value)
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
