"""The row of layers: which are bad, where it began, and which will be next."""

from __future__ import annotations

from grafana import queries as q
from grafana.panels import (
    ALARM,
    KIND_COLOURS,
    Panel,
    Placed,
    cells,
    column,
    count_column,
    graph,
    listing,
    query,
    timeline,
)
from grafana.queries import peak


def panels() -> list[Placed]:
    """Return the panels with their places."""
    return [
        Placed(_worst_layers(), 0, 0, 12, 8),
        Placed(_origin_history(), 12, 0, 12, 8),
        Placed(_layer_norms(), 0, 8, 12, 8),
        Placed(_layer_counts(), 12, 8, 12, 8),
    ]


def _worst_layers() -> Panel:
    panel = listing(
        "Worst layers",
        "Layers that held Inf or NaN in the last minutes: the most in one check, their share of all bad elements of "
        "the instance, and the norm of their finite part. Normal is an empty list. At most "
        f"{q.ROWS} of each kind; esper_layers_dropped says how many have no series at all.",
        cells(q.bad_layers("esper_layer_nan_grad_count"), "A"),
        cells(q.bad_layers("esper_layer_inf_grad_count"), "B"),
        cells(q.bad_share(), "C"),
        cells(q.bad_layer_norms(), "D"),
        columns={
            "layer": "Layer",
            "Value #A": "NaN",
            "Value #B": "Inf",
            "Value #C": "Share",
            "Value #D": "Norm",
            "run_id": "Run",
            "instance": "Instance",
        },
        first="Share",
        no_value="No bad layer in the last minutes",
    )
    for kind in KIND_COLOURS:
        panel = count_column(panel, kind)
    panel = column(panel, "Share", unit="percentunit", decimals=0, width=80)
    return column(panel, "Norm", unit="short", decimals=3, noValue="-", width=100)


def _origin_history() -> Panel:
    return timeline(
        "Where it began",
        "The bad layer nearest the loss, for as long as its count is shown. Normal is an empty panel; the first line "
        "to begin is the one to look at.",
        query(q.origin_history(), "{{layer}} {{kind}} · {{run_id}}"),
        words={"1": ("bad", ALARM)},
        no_value="No bad layer in this time",
    )


def _layer_norms() -> Panel:
    norms = peak("esper_layer_grad_norm", "layer")
    return graph(
        "Largest layer norms",
        "L2 norm of each layer's gradient before clipping, the largest of any instance. Normal is a steady order; one "
        "layer that leaves the others behind is where Inf comes next.",
        query(f"topk({q.LINES}, {norms})", "{{layer}}"),
        log=10,
        legend="right",
    )


def _layer_counts() -> Panel:
    return graph(
        "Bad elements, worst layers",
        "The most Inf and NaN elements in one check of the recent window, per layer, of any instance. Normal is an "
        "empty panel.",
        query(f"topk({q.LINES}, {peak('esper_layer_inf_grad_count', 'layer')} > 0)", "{{layer}} Inf", "A"),
        query(f"topk({q.LINES}, {peak('esper_layer_nan_grad_count', 'layer')} > 0)", "{{layer}} NaN", "B"),
        legend="right",
        no_value="No bad layer in this time",
    )
