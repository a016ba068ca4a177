"""Draw how long a look at every gradient takes, beside the time that reading them takes at best."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.gpu.contenders import OURS

_OUR_COLOUR, _OTHER_COLOUR = "#1f6feb", "#9aa4af"
_BAR_INCHES = 0.24
_COLUMNS = 2


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw one panel per model, ours in blue; a dotted line is what reading takes at best."""
    sections = [section for section in results["sections"].values() if section.get("kind") == "checks"]
    if not sections:
        return
    rows, bars = -(-len(sections) // _COLUMNS), max(len(section["contenders"]) for section in sections)
    figure = Figure(figsize=(12, 0.8 + _BAR_INCHES * rows * (bars + 3)), layout="constrained")
    FigureCanvasAgg(figure)
    machine = results["machine"]
    figure.suptitle(
        "What looking at every gradient costs on a GPU (ours in blue; dotted: what reading them once takes at best)\n"
        f"{machine['GPU']}, torch {machine['torch'].split(',')[0]}",
        fontsize=10,
    )
    ceiling = results["sections"].get("ceiling", {}).get("read_bytes_per_second")
    panels = figure.subplots(rows, _COLUMNS, squeeze=False, sharey=True)
    for axes, section in zip(panels.flat, sections, strict=False):
        _draw_section(axes, section, ceiling)
    for axes in panels.flat[len(sections) :]:
        axes.set_visible(False)
    panels[0, 0].invert_yaxis()  # which all panels share
    figure.savefig(path, dpi=110)


def _draw_section(axes: Axes, section: Mapping[str, Any], ceiling: float | None) -> None:
    names = list(section["contenders"])
    times = [[seconds * 1e3 for seconds in section["contenders"][name]["device"]] for name in names]
    medians = [median(each) for each in times]
    spread = [
        [middle - min(each) for middle, each in zip(medians, times, strict=True)],
        [max(each) - middle for middle, each in zip(medians, times, strict=True)],
    ]
    colours = [_OUR_COLOUR if name in OURS else _OTHER_COLOUR for name in names]
    bars = axes.barh(names, medians, xerr=spread, color=colours, error_kw={"lw": 0.8, "ecolor": "#333333"})
    axes.bar_label(bars, [f"{middle:.3g}" for middle in medians], padding=4, fontsize=7)
    if ceiling:
        axes.axvline(section["bytes"] / ceiling * 1e3, color="#333333", lw=0.8, ls=":")
    axes.margins(x=0.1)
    axes.set_xscale("log")
    axes.set_title(section["title"], fontsize=8, loc="left")
    axes.set_xlabel("device, ms", fontsize=7)
    axes.tick_params(labelsize=7)
