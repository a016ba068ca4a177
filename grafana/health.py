"""The row of health: who is in which state, what fires, and what the gradients did."""

from __future__ import annotations

from grafana import queries as q
from grafana.panels import (
    CRITICAL,
    GREY,
    KIND_COLOURS,
    ORANGE,
    RED,
    RUNBOOKS,
    STATE_WORDS,
    Panel,
    Placed,
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
from grafana.queries import happened, largest

HIGH_NORM, EXPLODED_NORM = 5, 10


def panels() -> list[Placed]:
    """Return the panels with their places."""
    return [
        Placed(_state_over_time(), 0, 0, 14, 8),
        Placed(_firing(), 14, 0, 10, 8),
        Placed(_instances(), 0, 8, 24, 7),
        Placed(_counts_over_time(), 0, 15, 12, 8),
        Placed(_bad_checks(), 12, 15, 12, 8),
        Placed(_norm(), 0, 23, 10, 8),
        Placed(_dead_and_exploding(), 10, 23, 7, 8),
        Placed(_bad_share(), 17, 23, 7, 8),
    ]


def _state_over_time() -> Panel:
    return timeline(
        "State per instance",
        f"The state of each instance over time; with more than {q.LINES}, those with the worst check. Normal is one "
        "even line that says HEALTHY.",
        query(f"max by (instance) ({q.state()} and on (job, instance) {q.worst_instances()})", "{{instance}}"),
        words=STATE_WORDS,
    )


def _firing() -> Panel:
    panel = listing(
        "Firing alerts",
        "Every alert that fires on the chosen instances; its name leads to its runbook. Normal is none.",
        cells(f"max by (alertname, severity, instance) ({q.firing()})", "A"),
        columns={"alertname": "Alert", "severity": "Severity", "instance": "Instance", "Value": "Firing"},
        first="Severity",
        descending=False,
        no_value="No alert fires",
    )
    runbook = link("What to do", f"{RUNBOOKS}/${{__value.text}}.md")
    panel = column(panel, "Alert", links=runbook, width=210)
    severities = {"critical": ("critical", RED), "warning": ("warning", ORANGE)}
    panel = column(panel, "Severity", words=severities, cell={"type": "color-text"}, width=90)
    return column(panel, "Firing", **{"custom.hidden": True})


def _instances() -> Panel:
    panel = listing(
        "Instances",
        "Every chosen instance with its run, the worst first; its name leads to the exporter's own page. Normal is "
        "HEALTHY in every line, and a last check of some seconds ago.",
        cells(f"max by (instance) ({q.state()})", "A"),
        cells(q.worst_count("nan", " by (instance)"), "B"),
        cells(q.worst_count("inf", " by (instance)"), "C"),
        cells(q.origin_per_instance(), "D"),
        cells(q.unchecked_seconds(" by (instance)"), "E"),
        cells(q.run_of_instance(), "F"),
        columns={
            "instance": "Instance",
            "Value #A": "State",
            "Value #B": "NaN",
            "Value #C": "Inf",
            "layer": "First bad layer",
            "kind": "Kind",
            "Value #E": "Last check",
            "run_id": "Run",
            "rank": "Rank",
            "world_size": "Ranks",
            "host": "Host",
            "Value #D": "D",
            "Value #F": "F",
        },
        first="State",
        no_value="No instance is known",
    )
    panel = column(panel, "Instance", links=link("The exporter's page", "http://${__value.text}/"))
    panel = column(panel, "State", words=STATE_WORDS, cell={"type": "color-background", "mode": "basic"}, width=140)
    for kind in KIND_COLOURS:
        panel = count_column(panel, kind)
    for name in ("First bad layer", "Kind"):
        panel = column(panel, name, noValue="-")
    panel = column(panel, "Last check", unit="s", decimals=0, words={"nan": ("never", GREY)}, noValue="-", width=110)
    for name in ("D", "F"):
        panel = column(panel, name, **{"custom.hidden": True})
    return panel


def _counts_over_time() -> Panel:
    panel = graph(
        "Inf and NaN in one check",
        "The worst single check of each point's time, and of the recent window (2 minutes) before it: a bad check "
        "draws a plateau, and none falls between two points. Normal is 0; above the dashed line, 5, it is critical.",
        query(f"max({largest('esper_inf_grad_recent_max', 'instance')})", "Inf", "A"),
        query(f"max({largest('esper_nan_grad_recent_max', 'instance')})", "NaN", "B"),
        marks=((CRITICAL - 0.5, RED),),
        top=CRITICAL + 1,
    )
    return paint(panel, KIND_COLOURS)


def _bad_checks() -> Panel:
    panel = graph(
        "Bad checks",
        "Checks that found Inf or NaN, by tier, in the window that leads to each point (extrapolated by "
        "Prometheus, so not always whole). Normal is none; one every few hours is noise, a rising number is not.",
        query(happened("esper_nonfinite_checks_total", "kind", "tier"), "{{kind}} {{tier}}"),
        stacked=True,
    )
    colours = {"inf warning": "light-orange", "inf critical": ORANGE, "nan warning": "light-red", "nan critical": RED}
    return paint(panel.decimals(0), colours)


def _norm() -> Panel:
    panel = graph(
        "Gradient norm, before clipping",
        "L2 norm over everything watched: the largest of each point's time, and its median over 10 minutes as the "
        "trend. Normal depends on the model; what counts is a trend that rises. The dashed lines are the optional "
        "alerts of alerts/norm.yml, 5 (high) and 10 (exploding). Gaps are norms that overflowed.",
        query(f"topk({q.LINES}, {largest('esper_grad_norm')})", "{{instance}}", "A"),
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
        "Dead: over 90 % exact zeros in the gradient. Exploding: over 10 % of the elements beyond 10. Of the worst "
        "instance. Normal is 0 of both; 1 for 5 minutes warns, 3 is critical.",
        query(f"max({largest('esper_dead_layers')})", "dead", "A"),
        query(f"max({largest('esper_exploding_layers')})", "exploding", "B"),
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
