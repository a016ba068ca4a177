"""Plots as inline SVG, without a script: a title on each point is what a mouse shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape
from itertools import groupby

from esper_telemetry.recorder.report.numbers import number

_WIDTH, _HEIGHT = 720, 132
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 10, 12, 20
_DECADES = 4
_POWERS = -323, 308
"""The powers of ten that a float can hold."""

Scale = Callable[[float], float]


def line_plot(checks: Sequence[int], values: Sequence[float | None], label: str) -> str:
    """Draw a line over checks, with gaps where nothing was measured and a red mark at the top for Inf and NaN.

    The axis is logarithmic where the values span more than a factor of ten.
    """
    finite = [value for value in values if value is not None and math.isfinite(value)]
    ticks, height = _axis(finite)
    spacing = (_WIDTH - _LEFT - _RIGHT) / max(1, len(checks) - 1)
    places = [_LEFT + spacing * position for position in range(len(checks))]
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">'
        + "".join(_grid_line(tick, height(tick)) for tick in ticks)
        + "".join(_check_label(checks, places, position) for position in _shown(len(checks)))
        + "".join(_lines(places, values, height))
        + "".join(_points(checks, places, values, height, spacing))
        + "</svg>"
    )


def _axis(finite: Sequence[float]) -> tuple[list[float], Scale]:
    """Return where the grid lines are and the height of a value."""
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    if 0 < low < high / 10:
        first, last = max(_POWERS[0], math.floor(math.log10(low))), min(_POWERS[1], math.ceil(math.log10(high)))
        ticks = [10.0**power for power in range(first, last + 1, max(1, (last - first) // _DECADES))]
        return ticks, lambda value: _height((math.log10(value) - first) / (last - first))
    if low == high:
        margin = abs(low) or 1.0
        low, high = low - margin, high + margin
    return [low, low + (high - low) / 2, high], lambda value: _height((value - low) / (high - low))


def _height(share: float) -> float:
    return _HEIGHT - _BOTTOM - max(0.0, min(1.0, share)) * (_HEIGHT - _TOP - _BOTTOM)


def _grid_line(value: float, y: float) -> str:
    return (
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>'
    )


def _shown(count: int) -> list[int]:
    return sorted({0, (count - 1) // 2, count - 1})


def _check_label(checks: Sequence[int], places: Sequence[float], position: int) -> str:
    anchor = "start" if position == 0 else "end" if position == len(checks) - 1 else "middle"
    text = f"check {checks[position]}"
    return f'<text x="{places[position]:.1f}" y="{_HEIGHT - 4}" text-anchor="{anchor}">{text}</text>'


def _lines(places: Sequence[float], values: Sequence[float | None], height: Scale) -> Iterator[str]:
    points = zip(places, values, strict=True)
    for drawn, run in groupby(points, key=lambda point: point[1] is not None and math.isfinite(point[1])):
        if drawn:
            line = " ".join(f"{x:.1f},{height(value):.1f}" for x, value in run if value is not None)
            yield f'<polyline class="line" points="{line}"/>'


def _points(
    checks: Sequence[int], places: Sequence[float], values: Sequence[float | None], height: Scale, spacing: float
) -> Iterator[str]:
    for check, x, value in zip(checks, places, values, strict=True):
        if value is None:
            continue
        if math.isfinite(value):
            yield f'<circle class="point" cx="{x:.1f}" cy="{height(value):.1f}" r="1.5"/>'
        else:
            yield f'<line class="bad" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>'
            yield f'<circle class="bad" cx="{x:.1f}" cy="{_TOP}" r="4"/>'
        yield (
            f'<rect class="hover" x="{x - spacing / 2:.1f}" y="0" width="{max(1.0, spacing):.1f}" '
            f'height="{_HEIGHT - _BOTTOM}"><title>check {check}: {number(value)}</title></rect>'
        )
