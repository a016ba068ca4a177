"""Draw the medians as bars with their spread."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks import contenders, hooks, steps
from benchmarks.measurement import Section

_OURS = contenders.OURS | {steps.OURS, steps.NO_VERDICT, hooks.NO_HOOKS, hooks.HOOKS}
_OUR_COLOUR, _OTHER_COLOUR = "#1f6feb", "#9aa4af"
_BAR_INCHES = 0.28


def draw(sections: Mapping[str, Section], subtitle: str, path: Path) -> None:
    """Draw one panel per section, ours in blue."""
    heights = [len(section.samples) + 2 for section in sections.values()]
    figure = Figure(figsize=(10, 0.7 + _BAR_INCHES * sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"What looking at gradients costs (ours in blue)\n{subtitle}", fontsize=10)
    panels = figure.subplots(len(sections), 1, squeeze=False, height_ratios=heights)
    for axes, section in zip(panels[:, 0], sections.values(), strict=True):
        _draw_section(axes, section)
    figure.savefig(path, dpi=110)


def _draw_section(axes: Axes, section: Section) -> None:
    names = list(section.samples)
    ratios = [section.ratio(name) for name in names]
    medians = [ratio.median for ratio in ratios]
    spread = [[ratio.median - ratio.low for ratio in ratios], [ratio.high - ratio.median for ratio in ratios]]
    colours = [_OUR_COLOUR if name in _OURS else _OTHER_COLOUR for name in names]
    bars = axes.barh(names, medians, xerr=spread, color=colours, error_kw={"lw": 0.8, "ecolor": "#333333"})
    axes.bar_label(bars, [f"{median:.3g}" for median in medians], padding=4, fontsize=7)
    axes.axvline(1, color="#333333", lw=0.8, ls=":")
    axes.margins(x=0.1)
    axes.set_xscale("log" if section.memory else "linear")
    axes.invert_yaxis()
    axes.set_title(section.title, fontsize=8, loc="left")
    axes.set_xlabel(f"times {section.base}", fontsize=7)
    axes.tick_params(labelsize=7)
