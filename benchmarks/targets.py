"""What the check has to reach."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks import contenders, hooks, steps
from benchmarks.contenders import CHECK, EVERY_LAYER_BAD, ORIGINAL, READ, RECORD, STATISTICS
from benchmarks.measurement import Section

MEBIBYTE = 1 << 20


@dataclass(frozen=True, slots=True)
class Target:
    """Describe one target; `reach` returns what was reached in words and whether that meets it, None if undecided."""

    section: str
    what: str
    target: str
    reach: Callable[[Section], tuple[str, bool | None]]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Hold what became of a target; met is None where it was not measured, or not well enough."""

    what: str
    target: str
    reached: str
    met: bool | None


def verdicts(sections: Mapping[str, Section]) -> list[Verdict]:
    """Hold each target against what was measured."""
    return [_verdict(target, sections.get(target.section)) for target in TARGETS]


def _verdict(target: Target, section: Section | None) -> Verdict:
    reached, met = ("not measured", None) if section is None else target.reach(section)
    return Verdict(target.what, target.target, reached, met)


def _slower(section: str, what: str, names: list[str], base: str, limit: float) -> Target:
    """Allow the worst of `names` at most `limit` times the time of `base`."""

    def reach(measured: Section) -> tuple[str, bool]:
        ratio = max(measured.ratio(name, base).median for name in names)
        return f"{ratio:.3g} x", ratio <= limit

    return Target(section, what, f"<= {limit:g} x {_SHORT.get(base, base)}", reach)


def _faster(section: str, what: str, name: str, base: str, limit: float) -> Target:
    """Ask `name` to be at least `limit` times as fast as `base`."""

    def reach(measured: Section) -> tuple[str, bool]:
        ratio = measured.ratio(base, name).median
        return f"{ratio:.1f} x", ratio >= limit

    return Target(section, what, f">= {limit:g} x faster than {_SHORT.get(base, base)}", reach)


def _overhead(section: str, what: str, limit: float) -> Target:
    """Allow `watch()` to add at most the share `limit` to a run; no run that differs more from itself decides it."""

    def reach(measured: Section) -> tuple[str, bool | None]:
        added = measured.ratio(steps.OURS).median - 1
        control = measured.ratio(steps.CONTROL).median - 1
        words = f"{added:+.1%} (no monitoring against itself: {control:+.1%})"
        return words, added <= limit if abs(control) < limit else None

    return Target(section, what, f"<= {limit:.1%} added", reach)


def _healthy_memory(section: str, what: str) -> Target:
    def reach(measured: Section) -> tuple[str, bool]:
        largest = measured.memory[CHECK].largest
        return size(largest), largest <= MEBIBYTE

    return Target(section, what, "<= 1 MiB", reach)


def _bad_memory(section: str, what: str) -> Target:
    def reach(measured: Section) -> tuple[str, bool]:
        largest = max(measured.memory[name].largest for name in contenders.CHECK_BAD)
        return f"{size(largest)} of {size(measured.largest_layer)}", largest <= measured.largest_layer

    return Target(section, what, "<= one byte per element of the largest bad layer", reach)


def size(count: float) -> str:
    """Return bytes in words."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


_SHORT = {
    READ: "one read pass",
    CHECK: "a check",
    hooks.NO_HOOKS: "without hooks",
    RECORD: "the record's formula",
    contenders.TORCH_CLIP: "torch's clip alone",
}

TARGETS = [
    _slower("gpt2", "healthy check, GPT-2 small fp32", [CHECK], READ, 1.25),
    _slower("gpt2", "looking whether the model has changed, GPT-2 small's 148 tensors", [contenders.LOOK], CHECK, 0.02),
    _faster("gpt2", "healthy check, GPT-2 small fp32", CHECK, RECORD, 25),
    _faster("gpt2", "healthy check, GPT-2 small fp32", CHECK, ORIGINAL, 60),
    _slower("gpt2-bf16", "healthy check, GPT-2 small bf16", [CHECK], READ, 1.5),
    _slower("small", "healthy check, 1,000 small tensors", [CHECK], contenders.FOREACH_NORM, 1.2),
    _slower("gpt2", "every layer bad, GPT-2 small fp32, worst of four ways", EVERY_LAYER_BAD, READ, 6),
    _faster("gpt2", "full ten statistics, GPT-2 small fp32", STATISTICS, ORIGINAL, 10),
    _slower("gpt2", "check and clip, GPT-2 small fp32", [contenders.CLIP], contenders.TORCH_CLIP, 1.05),
    _slower("hooks", "400 tensors with a trivial hook of others on each", [hooks.HOOKS], hooks.NO_HOOKS, 2),
    _overhead("sb3", "stable-baselines3 PPO, defaults, whole run", 0.03),
    _overhead("sb3-short", "stable-baselines3 PPO, short rollouts, whole run", 0.03),
    _overhead("gpt", "small GPT training step", 0.015),
    _healthy_memory("gpt2", "largest temporary of a healthy check, GPT-2 small fp32"),
    _healthy_memory("gpt2-bf16", "largest temporary of a healthy check, GPT-2 small bf16"),
    _bad_memory("gpt2", "largest temporary of a bad check, GPT-2 small fp32"),
    _bad_memory("gpt2-bf16", "largest temporary of a bad check, GPT-2 small bf16"),
    _bad_memory("small", "largest temporary of a bad check, 1,000 small tensors"),
]
