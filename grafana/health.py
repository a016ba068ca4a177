"""The row of health: who is in which state, what fires, and what the gradients did."""

from __future__ import annotations

from grafana import queries as q
from grafana.panels import (
    CALM,
    CRITICAL,
    GREY,
    KIND_COLOURS,
    ORANGE,
    RED,
    RUN,
    RUNBOOKS,
    STATE_WORDS,
    WARNING,
    Panel,
    Placed,
    alertmanager,
    cells,
    column,
    count_column,
    graph,
    link,
    listing,
    paint,
    query,
    timeline,
)
from grafana.queries import happened, largest, peak

HIGH_NORM, EXPLODED_NORM = 5, 10


def panels() -> list[Placed]:
    """Return the panels with their places."""
    return [
        Placed(_state_over_time(), 0, 0, 13, 8),
        Placed(_firing(), 13, 0, 11, 8),
        Placed(_runs(), 0, 8, 24, 7),
        Placed(_counts_over_time(), 0, 15, 12, 8),
        Placed(_bad_checks(), 12, 15, 12, 8),
        Placed(_norm(), 0, 23, 10, 8),
        Placed(_dead_and_exploding(), 10, 23, 7, 8),
        Placed(_bad_share(), 17, 23, 7, 8),
    ]


def _state_over_time() -> Panel:
    return timeline(
        "State per run",
        f"The state of each run over time, one line per instance; with more than {q.LINES}, only those in the worst "
        "state. Normal is an unbroken HEALTHY line.",
        query(q.state_history(), RUN),
        words=STATE_WORDS,
    )


def _firing() -> Panel:
    panel = listing(
        "Firing alerts",
        "Every firing alert of the chosen instances. The name links to the runbook, the group and the instance to "
        "Alertmanager; all alerts of a group are one page. Normal is none.",
        cells(q.firing_alerts(), "A"),
        columns={
            "alertname": "Alert",
            "severity": "Severity",
            "run_id": "Run",
            "run": "Group",
            "instance": "Instance",
            "Value": "Firing",
        },
        first="Severity",
        descending=False,
        no_value="No alert is firing",
    )
    runbook = link("What to do", f"{RUNBOOKS}/${{__value.text}}.md")
    panel = column(panel, "Alert", links=runbook, width=190)
    severities = {"critical": ("critical", RED), "warning": ("warning", ORANGE)}
    panel = column(panel, "Severity", words=severities, cell={"type": "color-text"}, width=80)
    panel = column(panel, "Run", noValue="-")
    panel = column(panel, "Group", links=alertmanager("run"), width=110)
    panel = column(panel, "Instance", links=alertmanager("instance"))
    return column(panel, "Firing", **{"custom.hidden": True})


def _runs() -> Panel:
    panel = listing(
        "Runs",
        "Every chosen run, one line per instance, worst first; the address links to the exporter's own page. Normal is "
        "HEALTHY in every line, a last check a few seconds ago, and no layer that was not measured.",
        cells(q.states(), "A"),
        cells(q.count_per_instance("nan"), "B"),
        cells(q.count_per_instance("inf"), "C"),
        cells(q.origin_per_instance(), "D"),
        cells(q.unchecked_seconds_per_instance(), "E"),
        cells(q.unmeasured_per_instance(), "F"),
        columns={
            "run_id": "Run",
            "Value #A": "State",
            "Value #B": "NaN",
            "Value #C": "Inf",
            "layer": "First bad layer",
            "kind": "Kind",
            "Value #E": "Last check",
            "Value #F": "Not measured",
            "rank": "Rank",
            "world_size": "Ranks",
            "host": "Host",
            "instance": "Instance",
            "Value #D": "D",
        },
        first="State",
        no_value="No run is known",
    )
    panel = column(panel, "Instance", links=link("The exporter's page", "http://${__value.text}/"))
    panel = column(panel, "State", words=STATE_WORDS, cell={"type": "color-background", "mode": "basic"}, width=140)
    for kind in KIND_COLOURS:
        panel = count_column(panel, kind)
    for name in ("First bad layer", "Kind"):
        panel = column(panel, name, noValue="-")
    panel = column(panel, "Last check", unit="s", decimals=0, words={"nan": ("never", GREY)}, noValue="-", width=110)
    steps = ((None, CALM), (1, ORANGE))
    panel = column(panel, "Not measured", steps=steps, cell={"type": "color-text"}, noValue="-", width=110)
    for name in ("Rank", "Ranks"):
        panel = column(panel, name, width=70)
    return column(panel, "D", **{"custom.hidden": True})


def _counts_over_time() -> Panel:
    panel = graph(
        "Inf and NaN in one check",
        "The worst single check since the previous point, and in the recent window (2 minutes) before it: a bad check "
        "draws a plateau, and none is lost between two points. Normal is 0; from the amber line up it is a warning, "
        "above the red line (5) critical.",
        query(peak("esper_inf_grad_recent_max"), "Inf", "A"),
        query(peak("esper_nan_grad_recent_max"), "NaN", "B"),
        marks=((WARNING - 0.5, ORANGE), (CRITICAL - 0.5, RED)),
        top=CRITICAL + 1,
    )
    return paint(panel, KIND_COLOURS)


def _bad_checks() -> Panel:
    panel = graph(
        "Bad checks",
        "Checks that found Inf or NaN, by tier, in the window that leads to each point (extrapolated by "
        "Prometheus, so not always whole numbers). Normal is none; one every few hours is noise, a rising number "
        "is not.",
        query(happened("esper_nonfinite_checks_total", "kind", "tier"), "{{kind}} {{tier}}"),
        stacked=True,
    )
    colours = {"inf warning": "light-orange", "nan warning": ORANGE, "inf critical": "light-red", "nan critical": RED}
    return paint(panel.decimals(0), colours)


def _norm() -> Panel:
    panel = graph(
        "Gradient norm, before clipping",
        "L2 norm over everything watched: the largest since the previous point, and its median over 10 minutes as the "
        "trend. Normal depends on the model; what counts is a trend that rises. The dashed lines are the optional "
        "alerts of alerts/norm.yml, 5 (high) and 10 (exploding). Gaps are norms that overflowed.",
        query(f"topk({q.LINES}, {largest('esper_grad_norm')})", RUN, "A"),
        query(f"max({_median_norm()})", "trend", "B"),
        marks=((HIGH_NORM, ORANGE), (EXPLODED_NORM, RED)),
        log=10,
    )
    return paint(panel.axis_soft_min(1), {"trend": "white"})


def _median_norm() -> str:
    return q.of_run(f"quantile_over_time(0.5, {q.select('esper_grad_norm')}[10m])")


def _dead_and_exploding() -> Panel:
    panel = graph(
        "Dead and exploding layers",
        "Dead: over 90 % exact zeros in the gradient. Exploding: over 10 % of the elements above 10. Of the worst "
        "instance. Normal is 0 for both, except in the first steps; 1 for 10 to 15 minutes is a warning, 3 a page.",
        query(peak("esper_dead_layers"), "dead", "A"),
        query(peak("esper_exploding_layers"), "exploding", "B"),
        marks=((1, ORANGE), (3, RED)),
        top=4,
    )
    return paint(panel.decimals(0), {"dead": "blue", "exploding": ORANGE})


def _bad_share() -> Panel:
    elements = largest("esper_grad_elements")
    panel = graph(
        "Share of bad elements",
        "Bad elements of the worst check as a share of all elements watched. Normal is 0 %; near 100 % the weights "
        "themselves are bad.",
        query(f"max({largest('esper_inf_grad_recent_max')} / on (instance) {elements})", "Inf", "A"),
        query(f"max({largest('esper_nan_grad_recent_max')} / on (instance) {elements})", "NaN", "B"),
        unit="percentunit",
        top=0.001,
    )
    return paint(panel, KIND_COLOURS)
