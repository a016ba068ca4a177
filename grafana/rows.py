"""What the dashboard shows: the banner and its rows, each a list of panels with their place."""

from __future__ import annotations

from typing import Any, NamedTuple

from grafana import queries as q
from grafana.panels import (
    CALM,
    GREY,
    ORANGE,
    RED,
    Panel,
    cells,
    column,
    graph,
    link,
    listing,
    now,
    number,
    paint,
    query,
)
from grafana.panels import timeline as states_over_time
from grafana.queries import happened, largest, latest

RUNBOOKS = "https://github.com/esper-telemetry/esper-telemetry/blob/main/alerts/runbooks"
WARNING, CRITICAL, HIGH_NORM, EXPLODED_NORM = 1, 6, 5, 10
STATE_WORDS = {str(code): (name, colour) for code, (name, colour) in enumerate(q.STATES.items())}
TIER_WORDS = {"0": ("calm", "transparent")} | {str(count): ("WARNING", "transparent") for count in range(1, CRITICAL)}
KIND_COLOURS = {"Inf": ORANGE, "NaN": RED}


class Placed(NamedTuple):
    """A panel with its width and height, and its column and line within its row."""

    panel: Panel
    x: int
    y: int
    w: int
    h: int


class Row(NamedTuple):
    """A titled row."""

    title: str
    panels: list[Placed]
    collapsed: bool = False


def banner() -> list[Placed]:
    """Return what is readable from across a room."""
    return [
        Placed(_state(), 0, 0, 6, 8),
        Placed(_count("NaN", "NaN does not recover once a step was taken with it."), 6, 0, 4, 5),
        Placed(_tier("NaN"), 6, 5, 4, 3),
        Placed(_count("Inf", "Inf can recover: see whether the next checks are clean."), 10, 0, 4, 5),
        Placed(_tier("Inf"), 10, 5, 4, 3),
        Placed(_first_bad_layer(), 14, 0, 6, 5),
        Placed(_bad_since(), 14, 5, 6, 3),
        Placed(_last_check(), 20, 0, 4, 5),
        Placed(_alerts(), 20, 5, 4, 3),
    ]


def rows() -> list[Row]:
    """Return the rows, the most urgent first."""
    return [
        Row("Health", _health()),
        Row("Layers", _layers()),
        Row("Heads", _heads()),
        Row("PPO", _ppo(), collapsed=True),
        Row("Run and monitor", _run()),
    ]


def _state() -> Panel:
    return number(
        "State",
        "The worst state among the chosen instances. HEALTHY: checks were made in the last 5 minutes, none was bad. "
        "WARNING: one check found 1 to 5 Inf or NaN. CRITICAL: more than 5. NOT MEASURING: no check for 5 minutes, or "
        "none ever. GONE: listed, and does not answer, and never said that its run ended. ENDED: it did say so. "
        "DRILL: only a made-up value is bad. Normal is HEALTHY. Needs the recording rules of alerts/rules.yml.",
        now(f"max({q.state()})"),
        words=STATE_WORDS,
        no_value="NO DATA",
        fill=True,
        steps=((None, GREY),),
    )


def _count(kind: str, then: str) -> Panel:
    return number(
        kind,
        f"{kind} elements in the worst single check of the last 5 minutes, of the worst instance: the number that "
        f"the page is about. Normal is 0. From 1 it is red; above 5 it is critical, and so is the tile below. {then}",
        now(q.worst_count(kind.lower())),
        steps=((None, CALM), (WARNING, RED)),
        unit="locale",
    )


def _tier(kind: str) -> Panel:
    return number(
        f"{kind} tier",
        f"The tier of the {kind} count above: calm at 0, WARNING from 1 to 5, and on red from 6. Normal is calm. A "
        "tile of its own, since Grafana colours either the text or the background of a tile.",
        now(q.worst_count(kind.lower())),
        unit="prefix:CRITICAL ",
        words=TIER_WORDS,
        fill=True,
        steps=((None, "transparent"), (CRITICAL, RED)),
    )


def _first_bad_layer() -> Panel:
    return number(
        "First bad layer, last bad check",
        "The layer nearest the loss that was bad in the most recent bad check: where it began, and how long ago that "
        "was. Normal is none.",
        now(q.origin(), "{{layer}} {{kind}}"),
        unit="dateTimeFromNow",
        words={"0": ("no bad check", CALM)},
        steps=((None, CALM), (1, RED)),
        name=True,
        size=28,
    )


def _bad_since() -> Panel:
    return number(
        "Bad since",
        "When the oldest alert on Inf or NaN that is still on began. Normal is none.",
        now(q.bad_since()),
        unit="dateTimeFromNow",
        words={"0": ("not now", CALM)},
        steps=((None, CALM), (1, RED)),
        size=28,
    )


def _last_check() -> Panel:
    return number(
        "Since the last check",
        "Time since gradients were last looked at, of the instance that waits longest and has not ended, by the "
        "trainer's clock. Normal is a few seconds, or one training step; a count of 0 means nothing without it.",
        now(q.unchecked_seconds()),
        unit="s",
        words={"null+nan": ("never", GREY)},
        steps=((None, CALM), (120, ORANGE)),
    ).decimals(0)


def _alerts() -> Panel:
    return number(
        "Alerts firing",
        "Alerts on the chosen instances, the watchdog left out. Normal is 0; the row below names them.",
        now(f"count({q.firing()}) or 0 * max({latest('esper_run_info')})"),
        steps=((None, CALM), (1, RED)),
    )


def _health() -> list[Placed]:
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
    return states_over_time(
        "State per instance",
        f"The state of each instance over time; with more than {q.ROWS}, those with the worst check. Normal is one "
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
        *(
            cells(f"max by (instance) ({q.of_run(q.select(q.NONFINITE, matcher))})", ref)
            for matcher, ref in (('kind="nan"', "B"), ('kind="inf"', "C"))
        ),
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
        panel = _count_column(panel, kind)
    for name in ("First bad layer", "Kind"):
        panel = column(panel, name, noValue="-")
    panel = column(panel, "Last check", unit="s", decimals=0, words={"null+nan": ("never", GREY)}, width=110)
    for name in ("D", "F"):
        panel = column(panel, name, **{"custom.hidden": True})
    return panel


def _count_column(panel: Any, kind: str) -> Any:
    steps = ((None, CALM), (WARNING, RED))
    return column(panel, kind, unit="locale", steps=steps, cell={"type": "color-text"}, noValue="-", width=80)


def _counts_over_time() -> Panel:
    panel = graph(
        "Inf and NaN in one check",
        "The worst single check of each point's time, and of the recent window (2 minutes) before it: a bad check "
        "draws a plateau, and none falls between two points. Normal is 0; above the dashed line, 5, it is critical.",
        query(f"max({largest('esper_inf_grad_recent_max', 'instance')})", "Inf", "A"),
        query(f"max({largest('esper_nan_grad_recent_max', 'instance')})", "NaN", "B"),
        marks=((CRITICAL - 0.5, RED),),
    )
    return paint(panel.axis_soft_max(CRITICAL + 1), KIND_COLOURS)


def _bad_checks() -> Panel:
    panel = graph(
        "Bad checks",
        "Checks that found Inf or NaN, by tier, per point of the graph (extrapolated by Prometheus, so not always "
        "whole). Normal is none; one bad check every few hours is noise, a rising number is not.",
        query(happened("esper_nonfinite_checks_total", "kind", "tier"), "{{kind}} {{tier}}"),
        bars=True,
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
    )
    return paint(panel.axis_soft_max(4).decimals(0), {"dead": "blue", "exploding": ORANGE})


def _bad_share() -> Panel:
    elements = largest("esper_grad_elements")
    panel = graph(
        "Share of bad elements",
        "Bad elements of the worst check as a share of all elements watched. Normal is 0 %; near 100 % the weights "
        "themselves are bad.",
        query(f"max({largest('esper_inf_grad_recent_max')} / on (instance) {elements})", "Inf", "A"),
        query(f"max({largest('esper_nan_grad_recent_max')} / on (instance) {elements})", "NaN", "B"),
        unit="percentunit",
    )
    return paint(panel, KIND_COLOURS)


def _layers() -> list[Placed]:
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
            "instance": "Instance",
        },
        first="Share",
        no_value="No bad layer in the last minutes",
    )
    for kind in KIND_COLOURS:
        panel = _count_column(panel, kind)
    panel = column(panel, "Share", unit="percentunit", decimals=0, width=80)
    return column(panel, "Norm", unit="sci", decimals=2, noValue="-", width=100)


def _origin_history() -> Panel:
    return states_over_time(
        "Where it began",
        "The layer nearest the loss that was bad, for as long as its count is shown. Normal is an empty panel; the "
        "first line to begin is the one to look at.",
        query(q.origin_history(), "{{layer}} {{kind}} · {{instance}}"),
        words={"1": ("bad", RED)},
        no_value="No bad layer in this time",
    )


def _layer_norms() -> Panel:
    norms = largest("esper_layer_grad_norm", "layer")
    return graph(
        "Layer norms, the largest",
        "L2 norm of each layer's gradient before clipping, the largest of any instance. Normal is a steady order; one "
        "layer that leaves the others behind is where Inf comes next.",
        query(f"topk({q.LINES}, {norms})", "{{layer}}"),
        log=10,
        legend="right",
    )


def _layer_counts() -> Panel:
    return graph(
        "Bad elements per layer, the worst",
        "The most Inf and NaN elements in one check of the recent window, per layer, of any instance. Normal is an "
        "empty panel.",
        query(f"topk({q.LINES}, {largest('esper_layer_inf_grad_count', 'layer')} > 0)", "{{layer}} Inf", "A"),
        query(f"topk({q.LINES}, {largest('esper_layer_nan_grad_count', 'layer')} > 0)", "{{layer}} NaN", "B"),
        legend="right",
        no_value="No bad layer in this time",
    )


def _heads() -> list[Placed]:
    norms = graph(
        "Norm per head",
        "L2 norm of each head's gradient before clipping, the largest of any instance. Normal is that no head is far "
        "above or below the others for long.",
        query(largest("esper_head_grad_norm", "head"), "{{head}}"),
        log=10,
        no_value="No heads are watched",
    )
    latched = number(
        "Heads that ever held Inf or NaN",
        "Latched for the whole run: BAD says that some check of this run found that kind in that head, on any "
        "instance. Normal is clean.",
        now(largest("esper_head_nonfinite_latched", "head", "kind", window=q.WINDOW), "{{head}} {{kind}}"),
        words={"0": ("clean", "transparent"), "1": ("BAD", RED)},
        no_value="No heads are watched",
        fill=True,
        name=True,
        size=20,
    )
    return [Placed(norms, 0, 0, 14, 7), Placed(latched, 14, 0, 10, 7)]


def _ppo() -> list[Placed]:
    return [
        Placed(_ppo_graph("Episode reward", "esper_ppo_episode_reward", "It should rise, then stay."), 0, 0, 8, 7),
        Placed(
            _ppo_graph("Approximate KL", "esper_ppo_approx_kl", "Normal is below 0.02; above, steps are too large."),
            8,
            0,
            8,
            7,
        ),
        Placed(
            _ppo_graph(
                "Clip fraction", "esper_ppo_clip_fraction", "Normal is 5 % to 30 %; 0 learns nothing.", "percentunit"
            ),
            16,
            0,
            8,
            7,
        ),
        Placed(
            _ppo_graph("Entropy", "esper_ppo_entropy", "It should fall slowly; at 0 exploration is over."), 0, 7, 8, 7
        ),
        Placed(
            _ppo_graph(
                "Explained variance",
                "esper_ppo_explained_variance",
                "It should rise towards 1; below 0 the value network is worse than a constant.",
            ),
            8,
            7,
            8,
            7,
        ),
        Placed(_losses(), 16, 7, 8, 7),
        Placed(_ppo_pace(), 0, 14, 12, 7),
        Placed(_ppo_bad(), 12, 14, 12, 7),
    ]


def _ppo_graph(title: str, metric: str, normal: str, unit: str = "none") -> Panel:
    panel = graph(
        title,
        f"Of the last PPO update, per instance. {normal}",
        query(latest(metric), "{{instance}}"),
        unit=unit,
        no_value="No PPO run",
    )
    return _free_axis(panel)


def _free_axis(panel: Any) -> Panel:
    panel.build().field_config.defaults.min_val = None
    return panel


def _losses() -> Panel:
    panel = graph(
        "Losses",
        "Policy and value loss of the last PPO update, per instance. Normal: the policy loss is about 0, the value "
        "loss falls.",
        query(latest("esper_ppo_policy_loss"), "policy {{instance}}", "A"),
        query(latest("esper_ppo_value_loss"), "value {{instance}}", "B"),
        no_value="No PPO run",
    )
    return _free_axis(panel)


def _ppo_pace() -> Panel:
    return graph(
        "Updates and episodes per second",
        "How fast the run goes on. Normal is steady; a line that falls to 0 is a run that hangs.",
        query(happened("esper_ppo_updates_total", function="rate"), "updates {{instance}}", "A"),
        query(happened("esper_ppo_episodes_total", function="rate"), "episodes {{instance}}", "B"),
        unit="cps",
        no_value="No PPO run",
    )


def _ppo_bad() -> Panel:
    panel = graph(
        "Inf and NaN in the worst check of an update",
        "The same counts as above, by PPO update. Normal is 0.",
        query(f"max({largest('esper_ppo_inf_grads')})", "Inf", "A"),
        query(f"max({largest('esper_ppo_nan_grads')})", "NaN", "B"),
        marks=((CRITICAL - 0.5, RED),),
        no_value="No PPO run",
    )
    return paint(panel.axis_soft_max(CRITICAL + 1), KIND_COLOURS)


def _run() -> list[Placed]:
    return [
        Placed(_skipped(), 0, 0, 8, 7),
        Placed(_amp(), 8, 0, 8, 7),
        Placed(_cost(), 16, 0, 8, 7),
        Placed(_pace(), 0, 7, 8, 7),
        Placed(_faults(), 8, 7, 8, 7),
        Placed(_targets(), 16, 7, 8, 7),
        Placed(_versions(), 0, 14, 24, 5),
    ]


def _skipped() -> Panel:
    return graph(
        "Skipped updates",
        "Optimizer steps that were not taken: amp is the GradScaler's own doing, intervention is on_critical. Normal "
        "is none, or now and then one by amp when it tries a larger scale.",
        query(happened("esper_skipped_updates_total", "reason"), "{{reason}}"),
        bars=True,
    ).decimals(0)


def _amp() -> Panel:
    panel = graph(
        "AMP loss scale",
        "The scale of the GradScaler, the smallest of any instance, and the longest streak of skipped steps. Normal is "
        "a scale of 1,000 to 100,000 and a streak of 0 to 2; below a scale of 1 nothing is learned.",
        query(f"min({latest('esper_amp_scale')})", "scale", "A"),
        query(f"max({largest('esper_amp_consecutive_skips')})", "skips in a row", "B"),
        no_value="No GradScaler is watched",
    )
    return column(
        panel, "scale", **{"custom.scaleDistribution": {"type": "log", "log": 2}, "custom.axisPlacement": "right"}
    )


def _cost() -> Panel:
    return graph(
        "Cost of measuring",
        "Time spent measuring in the training thread, as a share of the wall time. Normal is below 3 %; many very "
        "small layers cost more.",
        query(f"topk({q.LINES}, {happened('esper_monitor_seconds_total', function='rate')})", "{{instance}}"),
        unit="percentunit",
    )


def _pace() -> Panel:
    return graph(
        "Checks per second",
        "How often gradients are looked at. Normal is one check per backward pass, steadily; 0 is not measuring.",
        query(f"bottomk({q.LINES}, {happened('esper_checks_total', function='rate')})", "{{instance}}"),
        unit="cps",
    )


def _faults() -> Panel:
    return graph(
        "Faults of our own",
        "Pages that could not be built, checks that the monitor failed, and layers that have no series because 50 "
        "others were worse. Normal is 0 of all.",
        query(f"sum({happened('esper_exporter_collect_errors_total')})", "pages not built", "A"),
        query(f"sum({happened('esper_monitor_errors_total')})", "checks failed", "B"),
        query(f"max({largest('esper_layers_dropped')})", "layers without series", "C"),
    ).decimals(0)


def _targets() -> Panel:
    up = q.select("up")
    panel = graph(
        "Targets",
        "Listed instances of the chosen job that answer Prometheus, and those that do not. Normal is none that does "
        "not; a finished run has to be taken off the list.",
        query(f"sum({up})", "answer", "A"),
        query(f"count({up}) - sum({up})", "do not answer", "B"),
    )
    return paint(panel.decimals(0), {"answer": "blue", "do not answer": RED})


def _versions() -> Panel:
    panel = listing(
        "Versions",
        "What each instance runs. Normal is one version of each over all ranks of a run.",
        cells(q.versions(), "A"),
        columns={"instance": "Instance", "version": "esper-telemetry", "torch": "PyTorch", "python": "Python"},
        first="Instance",
        no_value="No instance is known",
    )
    return column(panel, "Value", **{"custom.hidden": True})
