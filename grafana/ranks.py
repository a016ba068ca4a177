"""The row of runs of several ranks: who reports, who is at fault, and the state of each rank over time."""

from __future__ import annotations

from grafana import queries as q
from grafana.panels import (
    CALM,
    GREY,
    ORANGE,
    RED,
    STATE_WORDS,
    Panel,
    Placed,
    cells,
    column,
    count_column,
    listing,
    now,
    number,
    query,
    timeline,
)
from grafana.queries import largest, latest


def panels() -> list[Placed]:
    """Return the panels with their places."""
    return [
        Placed(_runs(), 0, 0, 12, 7),
        Placed(_at_fault(), 12, 0, 12, 7),
        Placed(_damaged(), 0, 7, 24, 5),
        Placed(_over_time(), 0, 12, 21, 16),
        Placed(_shown(), 21, 12, 3, 16),
    ]


def _runs() -> Panel:
    panel = listing(
        "Runs of several ranks",
        "Each run as its rank 0 counts it: how many of its ranks report, are gone, were bad before any reduction, and "
        "hold Inf or NaN in their part of the model; then the worst single check of the whole run in the last 5 "
        "minutes, each element counted once. Normal is that all ranks report and the rest is 0; a dash means not "
        "known.",
        cells(latest("esper_ranks_reporting"), "A"),
        cells(latest("esper_ranks_expected"), "B"),
        cells(latest("esper_ranks_gone"), "C"),
        cells(largest("esper_bad_ranks", window=q.WINDOW), "D"),
        cells(largest("esper_global_nan_grad_recent_max", window=q.WINDOW), "E"),
        cells(largest("esper_global_inf_grad_recent_max", window=q.WINDOW), "F"),
        cells(latest("esper_damaged_ranks"), "G"),
        columns={
            "run_id": "Run",
            "Value #A": "Report",
            "Value #B": "Ranks",
            "Value #C": "Gone",
            "Value #D": "Bad",
            "Value #G": "Damaged",
            "Value #E": "NaN",
            "Value #F": "Inf",
            "instance": "Rank 0",
        },
        first="NaN",
        no_value="No run of several ranks",
    )
    alarm = ((None, CALM), (1, RED))
    for name, width in (("Gone", 65), ("Bad", 60), ("Damaged", 95)):
        panel = column(panel, name, steps=alarm, cell={"type": "color-text"}, noValue="-", width=width)
    panel = column(column(panel, "Report", width=75), "Ranks", width=70)
    return count_column(count_column(panel, "NaN"), "Inf")


def _at_fault() -> Panel:
    panel = listing(
        "Ranks at fault",
        "The worst five ranks of each run whose own backward pass was bad in the last minutes, before any reduction, "
        "in the order in which they went bad: the first is the suspect, the others may only have followed. Normal is "
        "none; a bad run without one overflowed in its reduction.",
        cells(largest("esper_rank_origin_layer", "rank", "host", "layer", window=q.WINDOW), "A"),
        cells(q.bad_ranks("nan"), "B"),
        cells(q.bad_ranks("inf"), "C"),
        cells(largest("esper_rank_cause", "rank", "host", "cause", window=q.WINDOW), "D"),
        columns={
            "Value #A": "Place",
            "rank": "Rank",
            "host": "Host",
            "layer": "First in layer",
            "cause": "Began in",
            "Value #B": "NaN",
            "Value #C": "Inf",
            "run_id": "Run",
            "Value #D": "D",
        },
        first="Place",
        descending=False,
        no_value="No rank is bad",
    )
    panel = column(column(panel, "Began in", noValue="-"), "D", **{"custom.hidden": True})
    panel = column(column(panel, "Place", width=75), "Rank", width=70)
    return count_column(count_column(panel, "NaN"), "Inf")


def _damaged() -> Panel:
    panel = listing(
        "Damaged ranks",
        "The worst five ranks of each run that hold Inf or NaN in their part of the model: how many elements of the "
        "worst damaged part, and its worst tensor. Normal is an empty list. The runbook of EsperModelDamaged says what "
        "to do.",
        cells(latest("esper_rank_damaged_elements", "rank", "host", "part", "tensor"), "A"),
        columns={
            "rank": "Rank",
            "host": "Host",
            "part": "Part",
            "tensor": "Worst tensor",
            "Value": "Elements",
            "run_id": "Run",
            "instance": "Rank 0",
        },
        first="Elements",
        no_value="No rank is damaged",
    )
    return column(panel, "Elements", unit="locale", width=100)


def _over_time() -> Panel:
    return timeline(
        "Ranks over time",
        f"The state of each rank of the chosen runs over time; with more than {q.MOST_RANKS}, the {q.WORST_RANKS} in "
        "the worst state. Normal is HEALTHY in every line. Ranks that are not scraped have none.",
        query(q.rank_history(), "{{rank}} · {{host}}"),
        words=STATE_WORDS,
        no_value="No rank is scraped",
    )


def _shown() -> Panel:
    panel = number(
        "Ranks shown",
        "How many ranks the timeline beside it shows, and out of how many. Normal is all.",
        now(q.rank_count("<="), "all", "A"),
        now(q.rank_count(">"), "some", "B"),
        steps=((None, GREY), (1, CALM)),
        size=20,
    )
    panel = column(panel, "all", unit="prefix:all ")
    return column(panel, "some", unit=f"prefix:worst {q.WORST_RANKS} of ", steps=((None, ORANGE),))
