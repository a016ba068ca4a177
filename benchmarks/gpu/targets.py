"""What the check has to reach on a GPU."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any, NamedTuple

from benchmarks.contenders import FOREACH_NORM
from benchmarks.gpu.contenders import CHECK
from benchmarks.gpu.step import CONTROL, NOTHING, OURS

BANDWIDTH = 0.8
STEP = 0.005

MET, MISSED, UNDECIDED = "met", "missed", "not decided"

Sections = Mapping[str, Mapping[str, Any]]


class Verdict(NamedTuple):
    """Hold what became of a target."""

    what: str
    target: str
    reached: str
    verdict: str


def verdicts(sections: Sections) -> list[Verdict]:
    """Hold each target against what was measured."""
    return [
        *(_bandwidth(sections, name) for name in ("xl-fp32", "xl-bf16", "7b-fp32", "7b-bf16")),
        _synchronisations(sections),
        _step(sections),
        _small(sections),
    ]


def _bandwidth(sections: Sections, name: str) -> Verdict:
    what, target = f"healthy check, {name}", f">= {BANDWIDTH:.0%} of the measured read bandwidth"
    section, ceiling = sections.get(name, {}), sections.get("ceiling", {})
    if section.get("kind") != "checks" or ceiling.get("kind") != "ceiling":
        return _not_measured(what, target)
    shares = [
        section["bytes"] / seconds / ceiling["read_bytes_per_second"]
        for seconds in section["contenders"][CHECK]["device"]
    ]
    share = median(shares)
    words = f"{share:.1%} ({min(shares):.1%} to {max(shares):.1%})"
    return Verdict(what, target, words, MET if share >= BANDWIDTH else MISSED)


def _synchronisations(sections: Sections) -> Verdict:
    what, target = "host synchronisations of a healthy step", "0"
    facts = sections.get("behaviour", {}).get("facts", {})
    if "synchronisations_with" not in facts:
        return _not_measured(what, target)
    added = facts["synchronisations_with"] - facts["synchronisations_without"]
    errors = facts["errors_where_they_are_errors"]
    words = f"{added} in {facts['steps']} steps, {errors} errors where each is one"
    return Verdict(what, target, words, MET if added == errors == 0 else MISSED)


def _step(sections: Sections) -> Verdict:
    what, target = "training step of a small GPT in bf16", f"<= {STEP:.1%} added"
    section = sections.get("step", {})
    if section.get("kind") != "step":
        return _not_measured(what, target)
    samples = section["samples"]
    added = ratios(samples[OURS], samples[NOTHING])
    control = ratios(samples[CONTROL], samples[NOTHING])
    words = f"{median(added) - 1:+.2%} (against itself: {median(control) - 1:+.2%}, noise {noise(control):.2%})"
    if noise(control) > STEP:
        return Verdict(what, target, words, UNDECIDED)
    return Verdict(what, target, words, MET if median(added) - 1 <= STEP else MISSED)


def _small(sections: Sections) -> Verdict:
    what, target = "healthy check, 1,000 small tensors", f"<= 1 x {FOREACH_NORM}, on host and device"
    section = sections.get("small-fp32", {})
    if section.get("kind") != "checks":
        return _not_measured(what, target)
    ours, theirs = section["contenders"][CHECK], section["contenders"][FOREACH_NORM]
    found = {clock: median(ratios(ours[clock], theirs[clock])) for clock in ("host", "device", "elapsed")}
    words = ", ".join(f"{clock} {ratio:.2f} x" for clock, ratio in found.items())
    return Verdict(what, target, words, MET if max(found.values()) <= 1 else MISSED)


def ratios(mine: list[float], theirs: list[float]) -> list[float]:
    """Return round by round how many times as long it took."""
    return [one / other for one, other in zip(mine, theirs, strict=True)]


def noise(control: list[float]) -> float:
    """Return how far a median of such ratios may be off by chance: what it is off here, and two standard errors."""
    middle = median(control)
    deviation = 1.4826 * median(abs(ratio - middle) for ratio in control)
    return abs(middle - 1) + 2 * 1.2533 * deviation / math.sqrt(len(control))


def _not_measured(what: str, target: str) -> Verdict:
    return Verdict(what, target, "not measured", UNDECIDED)
