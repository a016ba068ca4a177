"""Numbers and times of a recording, as a person reads them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from esper_telemetry.recorder.recording import BadLayer, PastCheck, Recording
from esper_telemetry.snapshot.damage import WORDS


def number(value: float | None) -> str:
    """Return a number in few digits; what was not measured is a dash."""
    if value is None:
        return "-"
    return "NaN" if math.isnan(value) else ("-Inf" if value < 0 else "Inf") if math.isinf(value) else f"{value:.4g}"


def moment(timestamp: float) -> str:
    """Return a unix time as date and time, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(timestamp))


def elements(layer: BadLayer) -> list[str]:
    """Return where a layer's first bad elements are, each as [index] value."""
    return [f"[{', '.join(map(str, each.index))}] {each.value}" for each in layer.first_bad or ()]


def rates(check: PastCheck) -> str:
    """Return the learning rates of a check, equal ones once."""
    return ", ".join(dict.fromkeys(map(number, check.learning_rates))) or "-"


def facts(recording: Recording) -> dict[str, str]:
    """Return what names a recording: the run, the machine, the time, the batch."""
    batch = {} if recording.batch_id is None else {"batch": str(recording.batch_id)}
    return {
        "check": f"{recording.check}, at {moment(recording.timestamp)}",
        **batch,
        **_verdict(recording),
        "run": f"{recording.run_id}, rank {recording.rank} of {recording.world_size}",
        "where": f"{recording.host}, process {recording.pid}, {', '.join(recording.devices) or 'no device'}",
        "covered": f"{recording.elements:,} elements in {recording.watched_layers} layers",
        "versions": ", ".join(f"{name} {version}" for name, version in recording.versions.items()),
    }


def _verdict(recording: Recording) -> dict[str, str]:
    told = {}
    if recording.damage is not None:
        told["model"] = WORDS.get(recording.damage, recording.damage)
    if recording.cause is not None:
        told["began in"] = recording.cause
    return told


def trails(recording: Recording) -> dict[str, Sequence[float | None]]:
    """Return what can be drawn over the history, by name."""
    history = recording.history
    shown: dict[str, Sequence[float | None]] = {
        "Inf elements": [each.inf_count for each in history],
        "NaN elements": [each.nan_count for each in history],
        "norm of the whole gradient": [each.grad_norm for each in history],
    }
    shown |= {f"norm of {_role(recording, name)}": norms for name, norms in recording.layer_norms.items()}
    groups = max((len(each.learning_rates) for each in history), default=0)
    for group in range(groups):
        name = "learning rate" if groups == 1 else f"learning rate of group {group}"
        shown[name] = [each.learning_rates[group] if group < len(each.learning_rates) else None for each in history]
    shown["scale of the GradScaler"] = [each.scale for each in history]
    return {name: values for name, values in shown.items() if any(values)}


def _role(recording: Recording, layer_name: str) -> str:
    roles = {
        recording.clean_after: ", clean, the next after it",
        recording.clean_before: ", clean, the last before it",
        recording.origin_layer: ", where it began",
    }
    return layer_name + roles.get(layer_name, "")
