"""The row of the verdict: whether the model is still alive, where its trouble began, and how much going back costs."""

from __future__ import annotations

from grafana import queries as q
from grafana.panels import CALM, ORANGE, RED, Panel, Placed, cells, column, graph, listing, paint, query
from grafana.queries import peak

PARTS = {
    "Parameters": "esper_nonfinite_parameters",
    "Buffers": "esper_nonfinite_buffers",
    "Optimizer": "esper_nonfinite_optimizer_state",
}


def panels() -> list[Placed]:
    """Return the panels with their places."""
    return [
        Placed(_verdicts(), 0, 0, 14, 8),
        Placed(_damage(), 14, 0, 10, 8),
        Placed(_tensors(), 0, 8, 24, 6),
    ]


def _verdicts() -> Panel:
    panel = listing(
        "Is the model alive?",
        "Inf and NaN elements in the parameters, buffers and optimizer state of each run, at the last scan: after a "
        "bad check, and now and then. Optimizer state alone: parameters are still finite, but the next steps will "
        "damage them. Parameters: go back to the last good checkpoint. Normal is 0 everywhere, and a last good check a "
        "few seconds ago.",
        *(cells(q.last_seen(metric), ref) for ref, metric in zip("ABC", PARTS.values(), strict=True)),
        cells(q.last_seen("esper_cause_info", "cause"), "D"),
        cells(q.seconds_since("esper_last_good_check_timestamp_seconds"), "E"),
        cells(q.last_seen("esper_checks_since_last_good_check"), "F"),
        columns={
            "run_id": "Run",
            **{f"Value #{ref}": name for ref, name in zip("ABC", PARTS, strict=True)},
            "cause": "Began in",
            "Value #E": "Last good check",
            "Value #F": "Checks since",
            "instance": "Instance",
            "Value #D": "D",
        },
        first="Parameters",
        no_value="No run is known",
    )
    for name in PARTS:
        steps = ((None, CALM), (1, RED))
        panel = column(panel, name, unit="locale", steps=steps, cell={"type": "color-text"}, noValue="-", width=95)
    panel = column(panel, "Began in", noValue="-")
    panel = column(panel, "Last good check", unit="s", decimals=0, noValue="-", width=120)
    panel = column(panel, "Checks since", unit="locale", noValue="-", width=110)
    return column(panel, "D", **{"custom.hidden": True})


def _damage() -> Panel:
    panel = graph(
        "Damaged elements",
        "Inf and NaN elements in parameters, buffers and optimizer state at the last scan, of the worst instance. "
        "Normal is 0: a bad gradient that was skipped or clipped away leaves no trace here.",
        *(query(peak(metric), name, ref) for ref, (name, metric) in zip("ABC", PARTS.items(), strict=True)),
        marks=((0.5, RED),),
        top=1,
    )
    return paint(panel.decimals(0), {"Parameters": RED, "Buffers": ORANGE, "Optimizer": "yellow"})


def _tensors() -> Panel:
    panel = listing(
        "Damaged tensors",
        "Tensors that held Inf or NaN at the last scan, worst first: parameters, buffers and optimizer state. Normal "
        "is an empty list.",
        cells(q.damaged_tensors(), "A"),
        columns={
            "tensor": "Tensor",
            "part": "Part",
            "Value": "Elements",
            "run_id": "Run",
            "instance": "Instance",
        },
        first="Elements",
        no_value="Nothing is damaged",
    )
    return column(panel, "Elements", unit="locale", width=100)
