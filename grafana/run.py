"""The row of the run: skipped steps, the cost of measuring, and errors of the exporter itself."""

from __future__ import annotations

from grafana import queries as q
from grafana.panels import RED, RUN, Panel, Placed, cells, column, graph, listing, paint, query
from grafana.queries import happened, latest, peak, rate


def panels() -> list[Placed]:
    """Return the panels with their places."""
    return [
        Placed(_skipped(), 0, 0, 8, 7),
        Placed(_amp(), 8, 0, 8, 7),
        Placed(_cost(), 16, 0, 8, 7),
        Placed(_pace(), 0, 7, 8, 7),
        Placed(_errors(), 8, 7, 8, 7),
        Placed(_targets(), 16, 7, 8, 7),
        Placed(_versions(), 0, 14, 24, 5),
    ]


def _skipped() -> Panel:
    return graph(
        "Skipped updates",
        "Optimizer steps that were skipped: amp by the GradScaler itself, engine by DeepSpeed, intervention and rewind "
        "by on_critical. Normal is none, or now and then one by amp when it tries a larger scale.",
        query(happened("esper_skipped_updates_total", "reason"), "{{reason}}"),
        stacked=True,
    ).decimals(0)


def _amp() -> Panel:
    panel = graph(
        "AMP loss scale",
        "The scale of the GradScaler, the smallest of any instance, and the longest streak of skipped steps. Normal is "
        "a scale of 1,000 to 100,000 and a streak of 0 to 2; below a scale of 1 nothing is learned.",
        query(f"min({latest('esper_amp_scale')})", "scale", "A"),
        query(peak("esper_amp_consecutive_skips"), "skips in a row", "B"),
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
        query(f"topk({q.LINES}, {rate('esper_monitor_seconds_total')})", RUN),
        unit="percentunit",
    )


def _pace() -> Panel:
    return graph(
        "Checks per second",
        "How often gradients are checked. Normal is one check per backward pass, steadily; 0 means not measuring.",
        query(f"bottomk({q.LINES}, {rate('esper_checks_total')})", RUN),
        unit="cps",
    )


def _errors() -> Panel:
    return graph(
        "Exporter errors",
        "Failed scrapes, checks, OTLP pushes and web config reloads, and layers without a series because 50 others "
        "were worse. Normal is 0 for all.",
        query(happened("esper_exporter_collect_errors_total"), "pages not built", "A"),
        query(happened("esper_monitor_errors_total"), "checks failed", "B"),
        query(happened("esper_otlp_export_failures_total"), "pushes failed", "C"),
        query(happened("esper_web_config_reload_failures_total"), "reloads failed", "D"),
        query(peak("esper_layers_dropped"), "layers without series", "E"),
        top=1,
    ).decimals(0)


def _targets() -> Panel:
    up = q.select("up")
    panel = graph(
        "Targets",
        "Targets of the chosen job that answer Prometheus, and those that do not. Normal is that all answer, except "
        "for runs that ended and are still listed.",
        query(f"sum({up})", "answer", "A"),
        query(f"count({up}) - sum({up})", "do not answer", "B"),
    )
    return paint(panel.decimals(0), {"answer": "blue", "do not answer": RED})


def _versions() -> Panel:
    panel = listing(
        "Versions",
        "What each instance runs. Normal is one version of each over all ranks of a run.",
        cells(q.versions(), "A"),
        columns={
            "run_id": "Run",
            "instance": "Instance",
            "version": "esper-telemetry",
            "torch": "PyTorch",
            "python": "Python",
        },
        first="Run",
        no_value="No instance is known",
    )
    return column(panel, "Value", **{"custom.hidden": True})
