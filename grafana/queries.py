"""The dashboard's PromQL: what was worst within a window, for the chosen job, instances and run.

Three windows: `WINDOW`, the 5 minutes of the page's own rule, is what "now" means in the banner; `MEMORY` is how long a
target that is gone is still known; `$__rate_interval` joins one point of a graph to the next, so that no spike falls
between two points, however far one zooms out.
"""

from __future__ import annotations

WINDOW = "5m"
MEMORY = "1h"
STEP = "$__rate_interval"
CHOSEN = 'job=~"$job", instance=~"$instance"'
NONFINITE = "instance_kind:esper_nonfinite_grad:recent_max"
NONFINITE_ALERTS = "EsperInfGradients|EsperNaNGradients"
ROWS, LINES = 24, 12
"""How many instances or layers a table or a graph names at most, the worst first."""

STATES = {
    "HEALTHY": "#24603c",
    "ENDED": "#5b6b82",
    "DRILL": "blue",
    "NOT MEASURING": "#585a61",
    "WARNING": "#8f4a00",
    "GONE": "#36383d",
    "CRITICAL": "semi-dark-red",
}
"""Every state with its colour, the worst last; the position is the state's value in `state()`."""

_CODES = {name: code for code, name in enumerate(STATES)}


def select(metric: str, *matchers: str) -> str:
    """Select a metric of the chosen job and instances."""
    return f"{metric}{{{', '.join((CHOSEN, *matchers))}}}"


def of_run(expression: str, window: str = MEMORY) -> str:
    """Keep only what belongs to the chosen run; the run is joined, as no other metric carries it."""
    run = select("esper_run_info", 'run_id=~"$run_id"')
    return f"{expression} and on (job, instance) last_over_time({run}[{window}])"


def largest(metric: str, *by: str, window: str = STEP) -> str:
    """Return the largest value within the window, per instance unless `by` says otherwise."""
    value = of_run(f"max_over_time({select(metric)}[{window}])", window)
    return f"max by ({', '.join(by or ('instance',))}) ({value})"


def latest(metric: str, *by: str) -> str:
    """Return the value at each point, for what is a state and not a peak."""
    return f"max by ({', '.join(by or ('instance',))}) ({of_run(select(metric), STEP)})"


def happened(metric: str, *by: str, function: str = "increase") -> str:
    """Return how much a counter grew."""
    value = of_run(f"{function}({select(metric)}[{STEP}])", STEP)
    return f"sum by ({', '.join(by or ('instance',))}) ({value})"


def worst_count(kind: str, by: str = "") -> str:
    """Return the largest count of any one check of the window that the page uses; 0 only where checks were made."""
    counts = select(NONFINITE, f'kind="{kind}"')
    return f"max{by} ({of_run(f'({counts} > 0 or {counts} and on (job, instance) ({_checking()}))')})"


def state() -> str:
    """Return each instance's state: the worst of those that hold."""
    real, drill = (f"max_over_time({select(NONFINITE, drill)}[{STEP}])" for drill in ('drill=""', 'drill!=""'))
    down = f"{select('up')} == 0 unless on (job, instance) last_over_time({select('esper_run_ended')}[{MEMORY}]) == 1"
    absent = select("ALERTS", 'alertname="EsperTargetAbsent"', 'alertstate="firing"')
    conditions = {
        "CRITICAL": f"{real} > 5",
        "GONE": f"({down}) or {absent}",
        "WARNING": f"{real} > 0",
        "DRILL": f"{drill} > 0",
        "ENDED": f"{select('esper_run_ended')} == 1",
        "HEALTHY": _checking(),
        "NOT MEASURING": select("esper_last_check_timestamp_seconds"),
    }
    alternatives = (f"{_CODES[name]} * group by (job, instance) ({holds})" for name, holds in conditions.items())
    return f"({' or '.join(alternatives)}) and on (job, instance) {_known_run()}"


def origin() -> str:
    """Return when the last bad check was, in milliseconds, labelled with where it began; 0 where there was none."""
    return f"topk(1, {_origins('job, instance')}) or on () {_no_origin()}"


def origin_per_instance() -> str:
    """Return the same for every instance, as 1."""
    per_instance = f"topk by (instance) (1, {_origins('job, instance')})"
    return f"max by (instance, layer, kind) ({of_run(per_instance)}) > bool 0"


def bad_since() -> str:
    """Return when the oldest alert on Inf or NaN that is still on began, in milliseconds; 0 where none is."""
    alerts = select("ALERTS_FOR_STATE", f'alertname=~"{NONFINITE_ALERTS}"')
    return f"1000 * min({of_run(alerts)}) or 0 * max({of_run(_checking())})"


def unchecked_seconds(by: str = "") -> str:
    """Return the seconds since the last check, of the instance that waits longest; NaN before the first check."""
    seen = f"last_over_time({select('esper_last_check_timestamp_seconds')}[{MEMORY}])"
    running = f"time() - ({seen} unless on (job, instance) {select('esper_run_ended')} == 1)"
    return f"max{by} ({of_run(running)})"


def firing(*matchers: str) -> str:
    """Select the alerts that fire; the watchdog always does."""
    return select("ALERTS", 'alertname=~"Esper.*"', 'alertname!="EsperWatchdog"', 'alertstate="firing"', *matchers)


def bad_layers(metric: str) -> str:
    """Return the layers that held a bad element within the window, the worst first."""
    return f"topk({ROWS}, {largest(metric, 'instance', 'layer', window=WINDOW)} > 0)"


def bad_share() -> str:
    """Return which share of all bad elements a layer held."""
    inf, nan = (_layer_counts(kind) for kind in ("inf", "nan"))
    both = f"({inf} + {nan})"
    return f"{both} / on (instance) group_left () sum by (instance) {both} > 0"


def _layer_counts(kind: str) -> str:
    return largest(f"esper_layer_{kind}_grad_count", "instance", "layer", window=WINDOW)


def bad_layer_norms() -> str:
    """Return the norms of the layers that held a bad element."""
    inf, nan = (_layer_counts(kind) for kind in ("inf", "nan"))
    norms = largest("esper_layer_grad_norm", "instance", "layer", window=WINDOW)
    return f"{norms} and ({inf} > 0 or {nan} > 0)"


def origin_history() -> str:
    """Return 1 where a layer was where it began, for as long as the count of that kind is shown."""
    bad = f"max_over_time({select(NONFINITE)}[{STEP}]) > 0"
    began = f"last_over_time({select('esper_origin_layer_info')}[{STEP}]) and on (job, instance, kind) ({bad})"
    return f"max by (instance, layer, kind) ({of_run(f'({began})', STEP)})"


def run_of_instance() -> str:
    """Return the run of every instance, as 1."""
    return f"max by (instance, run_id, rank, world_size, host) ({_known_run()})"


def versions() -> str:
    """Return the versions that every instance runs, as 1."""
    return f"max by (instance, version, torch, python) ({of_run(select('esper_build_info'))})"


def worst_instances() -> str:
    """Choose the instances with the worst check of the shown time, as many as one panel can name."""
    history = f"max_over_time({select('esper_last_check_timestamp_seconds')}[$__range] @ end()) * 0"
    counts = f"max by (job, instance) (max_over_time({select(NONFINITE)}[$__range] @ end()))"
    return f"topk({LINES}, {counts} or max by (job, instance) ({history}))"


def _origins(by: str) -> str:
    layers = f"max by ({by}, layer, kind) (last_over_time({select('esper_origin_layer_info')}[{WINDOW}]))"
    times = select("esper_last_nonfinite_timestamp_seconds", 'drill=""')
    when = f"max by ({by}, kind) (1000 * last_over_time({times}[{WINDOW}]))"
    return of_run(f"{layers} * on ({by}, kind) group_left () {when}")


def _no_origin() -> str:
    measured = f"{select('esper_last_check_timestamp_seconds')} > 0"
    return f'label_replace(0 * max({of_run(measured)}), "layer", "none", "", "")'


def _checking() -> str:
    """Return the instances that made a check within the window."""
    checked = select("esper_last_check_timestamp_seconds")
    return f"{checked} > 0 unless {checked} == {checked} offset {WINDOW}"


def _known_run() -> str:
    return of_run("").removeprefix(" and on (job, instance) ")
