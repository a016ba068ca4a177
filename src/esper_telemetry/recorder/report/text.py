"""A recording in the terminal: tables and sparklines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from textwrap import wrap

from esper_telemetry.health import HealthTier
from esper_telemetry.recorder.recording import Recording
from esper_telemetry.recorder.report.numbers import elements, facts, number, rates, trails

_BARS = "▁▂▃▄▅▆▇█"
_BAD = "!"
_STYLES = {HealthTier.WARNING: "\033[1;31m{}\033[0m", HealthTier.CRITICAL: "\033[1;7;31m{}\033[0m"}
_LAST_CHECKS = 8
_LAYERS = 12


def report_text(recording: Recording, width: int = 80, color: bool = False) -> str:
    """Return the report as lines of at most `width` characters, long names aside."""
    blocks = [
        [_headline(recording, color)],
        _facts(recording, width),
        _layers(recording, width),
        _trails(recording, width),
        _last_checks(recording, width),
    ]
    return "\n\n".join("\n".join(block) for block in blocks)


def _headline(recording: Recording, color: bool) -> str:
    shown = []
    for name, count in (("NaN", recording.nan_count), ("Inf", recording.inf_count)):
        style = _STYLES.get(HealthTier.of(count), "{}") if color else "{}"
        shown += [style.format(f"{name}:{count}")] if count else []
    return f"{' '.join(shown)} first in {recording.origin_layer}"


def _facts(recording: Recording, width: int) -> list[str]:
    before, after = recording.clean_before or "none", recording.clean_after or "none"
    known = {"nearest clean": f"{before} (nearer the loss), {after} (after it)", **facts(recording)}
    return [
        line
        for name, value in known.items()
        for line in wrap(
            f"{name:<14} {value}",
            max(40, width),
            subsequent_indent=" " * 15,
            break_long_words=False,
            break_on_hyphens=False,
        )
    ]


def _layers(recording: Recording, width: int) -> list[str]:
    rows = [("bad layer", "Inf", "NaN", "of", "first at")]
    for layer in recording.layers[:_LAYERS]:
        where = elements(layer) if layer.first_bad is not None else ["unknown: the gradient was gone"]
        rows.append(
            (layer.layer_name, f"{layer.inf_count:,}", f"{layer.nan_count:,}", f"{layer.numel:,}", " ".join(where))
        )
    left_out = len(recording.layers) - len(rows) + 1 + recording.layers_left_out
    return [_cut(line, width) for line in _table(rows, "<>>><")] + ([f"and {left_out} more layers"] if left_out else [])


def _trails(recording: Recording, width: int) -> list[str]:
    lines = [f"the last {len(recording.history)} checks, the bad one at the right"]
    for name, values in trails(recording).items():
        finite = [value for value in values if value is not None and math.isfinite(value)]
        span = f"{number(min(finite))} to {number(max(finite))}, " if finite else ""
        lines += [f"{name}: {span}last {number(values[-1])}", f"  {sparkline(values, width - 2)}"]
    return lines


def _last_checks(recording: Recording, width: int) -> list[str]:
    history = recording.history[-_LAST_CHECKS:]
    rows = [("check", "after", "Inf", "NaN", "norm", "learning rate", "scale", "batch")]
    steps = [math.nan, *(later.timestamp - earlier.timestamp for earlier, later in pairwise(history))]
    for each, seconds in zip(history, steps, strict=True):
        after = "" if math.isnan(seconds) else f"{seconds:.3f} s"
        batch = "-" if each.batch_id is None else str(each.batch_id)
        counts = f"{each.inf_count:,}", f"{each.nan_count:,}"
        rows.append((str(each.check), after, *counts, number(each.grad_norm), rates(each), number(each.scale), batch))
    return [_cut(line, width) for line in _table(rows, ">>>>>>><")]


def _table(rows: Sequence[Sequence[str]], alignment: str) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(_align, row, alignment, widths)).rstrip() for row in rows]


def _align(text: str, side: str, width: int) -> str:
    return f"{text:{side}{width}}"


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else line[: width - 1] + "…"


def sparkline(values: Sequence[float | None], width: int) -> str:
    """Draw values as bars, the largest of each bucket, with ! where one is Inf or NaN and a blank where there is none.

    Heights are logarithmic where the values span more than a factor of ten.
    """
    per_bar = math.ceil(len(values) / width)
    first = len(values) % per_bar - per_bar if len(values) % per_bar else 0  # whole buckets end at the last value
    buckets = [
        [value for value in values[max(0, start) : start + per_bar] if value is not None]
        for start in range(first, len(values), per_bar)
    ]
    finite = [value for bucket in buckets for value in bucket if math.isfinite(value)]
    return "".join(_bar(bucket, finite) for bucket in buckets)


def _bar(bucket: Sequence[float], finite: Iterable[float]) -> str:
    if not bucket:
        return " "
    if not all(map(math.isfinite, bucket)):
        return _BAD
    low, high = min(finite), max(finite)
    value = max(bucket)
    if 0 < low < high / 10:
        low, high, value = math.log(low), math.log(high), math.log(value)
    share = (value - low) / (high - low) if low < high else 0.5
    return _BARS[min(len(_BARS) - 1, int(max(0.0, min(1.0, share)) * len(_BARS)))]
