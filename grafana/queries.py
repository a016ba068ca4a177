"""The dashboard's PromQL: what was worst within a window, for the chosen job, instances and run.

Three windows: `WINDOW` is what "now" means in the banner, the recent window and the 3 minutes of the page's own rule;
`MEMORY` is how long a target that is gone is still known; `$__rate_interval` joins one point of a graph to the next, so
that no spike falls between two points, however far one zooms out.
"""

from __future__ import annotations

WINDOW = "5m"
MEMORY = "1h"
STEP = "$__rate_interval"
CHOSEN = 'job=~"$job", instance=~"$instance"'
CHOSEN_RUN = 'run_id=~"$run_id"'
NONFINITE = "instance_kind:esper_nonfinite_grad:recent_max"
OF_RUN = "run_kind:esper_nonfinite_grad:recent_max"
STATE = "instance:esper_run:state"
LAST_WORD = "instance:esper_run:last_word"
TROUBLE = (
    "EsperInfGradients|EsperNaNGradients|EsperTargetDown|EsperTargetAbsent|EsperLayersUnmeasured|EsperChecksStalled"
    "|EsperNeverMeasured"
)
ROWS, LINES = 24, 12
"""How many instances or layers a table or a graph names at most, the worst first."""
MOST_RANKS, WORST_RANKS = 64, 20
"""How many ranks a timeline draws; of more the worst."""

STATES = {
    "HEALTHY": "#24603c",
    "ENDED": "#5b6b82",
    "DRILL": "blue",
    "NOT MEASURING": "#585a61",
    "WARNING": "#8f4a00",
    "GONE": "dark-red",
    "CRITICAL": "semi-dark-red",
}
"""Every state with its colour, the worst last; the position is the value of the recording rule `STATE`."""

_CODES = {name: code for code, name in enumerate(STATES)}


def select(metric: str, *matchers: str) -> str:
    """Select a metric of the chosen job and instances."""
    return f"{metric}{{{', '.join((CHOSEN, *matchers))}}}"


def of_run(expression: str, window: str = MEMORY) -> str:
    """Keep only what belongs to the chosen run; the run is joined, as no other metric carries it."""
    run = select("esper_run_info", CHOSEN_RUN)
    return f"{expression} and on (job, instance) last_over_time({run}[{window}])"


def named(expression: str, *by: str, window: str = STEP, how: str = "max") -> str:
    """Name the run of each instance, besides its address; `by` is what else tells the series apart."""
    run = f"max by (job, instance, run_id) (last_over_time({select('esper_run_info', CHOSEN_RUN)}[{window}]))"
    one = f"topk by (job, instance) (1, {run})"  # a window may have seen two runs on the same port
    value = f"{how} by ({', '.join(('job', 'instance', *by))}) ({expression})"
    return f"max by ({', '.join(('run_id', 'instance', *by))}) ({value} * on (job, instance) group_left (run_id) {one})"


def peak(metric: str, *by: str, window: str = STEP) -> str:
    """Return the largest value within the window, of any instance."""
    value = of_run(f"max_over_time({select(metric)}[{window}])", window)
    return f"max by ({', '.join(by)}) ({value})" if by else f"max({value})"


def largest(metric: str, *by: str, window: str = STEP) -> str:
    """Return the largest value within the window, per instance."""
    return named(f"max_over_time({select(metric)}[{window}])", *by, window=window)


def latest(metric: str, *by: str) -> str:
    """Return the value at each point, per instance, for what is a state and not a peak."""
    return named(select(metric), *by)


def rate(metric: str) -> str:
    """Return how fast a counter grew, per instance."""
    return named(f"rate({select(metric)}[{STEP}])", how="sum")


def happened(metric: str, *by: str) -> str:
    """Return how much a counter grew, over all instances."""
    value = of_run(f"increase({select(metric)}[{STEP}])", STEP)
    return f"sum by ({', '.join(by)}) ({value})" if by else f"sum({value})"


def states() -> str:
    """Return the state of every instance, with its run."""
    return f"max by (run_id, rank, world_size, host, instance) ({_state()})"


def state_history() -> str:
    """Return the worst state of each point's time, per instance; of many, those with the worst of the shown time."""
    history = f"max_over_time({_state()}[{STEP}])"
    shown = f"max by (job, instance) (max_over_time({_state()}[$__range] @ end()))"
    return f"max by (run_id, instance) ({history} and on (job, instance) topk({LINES}, {shown}))"


def headline_state() -> str:
    """Return the worst state, and whose it is: the one run that the banner speaks of."""
    return f"max by (run_id, instance) ({of_headline(_state())})"


def of_headline(expression: str) -> str:
    """Keep the instance in the worst state; of several, the one with the worst check."""
    count = f"max by (job, instance) ({select(NONFINITE)})"
    badness = f"{_state()} + on (job, instance) group_left () ({count} / ({count} + 1)) or {_state()}"
    return f"{expression} and on (job, instance) topk(1, {badness})"


def headline_count(kind: str) -> str:
    """Return the banner's count of a kind."""
    return f"max({of_headline(f'({_counts(kind)})')})"


def count_per_instance(kind: str) -> str:
    """Return the count of a kind of every instance."""
    return f"max by (instance) (({_counts(kind)}) and on (job, instance) {_state()})"


def headline_origin() -> str:
    """Return when the last bad check was, in milliseconds, labelled with where it began; 0 where there was none."""
    none = f'label_replace(0 * max({of_headline(f"({_covered()})")}), "layer", "none", "", "")'
    return f"topk(1, {of_headline(_origins())}) or on () {none}"


def origin_per_instance() -> str:
    """Return where the last bad check of every instance began, as 1."""
    last = f"topk by (instance) (1, {_origins()})"
    return f"max by (instance, layer, kind) ({last} and on (job, instance) {_state()}) > bool 0"


def headline_since() -> str:
    """Return when the oldest alert on the banner's run that is still on began, in milliseconds; 0 where none is."""
    alerts = select("ALERTS_FOR_STATE", f'alertname=~"{TROUBLE}"')
    return f"1000 * min({of_headline(alerts)}) or 0 * max({of_headline(f'({_checking()})')})"


def headline_unchecked_seconds() -> str:
    """Return the seconds since the last check of the banner's run; NaN before the first."""
    return f"max({of_headline(f'({_unchecked_seconds()})')})"


def unchecked_seconds_per_instance() -> str:
    """Return the same of every instance."""
    return f"max by (instance) ({_unchecked_seconds()} and on (job, instance) {_state()})"


def headline_unmeasured() -> str:
    """Return how many layers of the banner's run could not be measured."""
    return f"max({of_headline(f'({_not_measured()})')})"


def unmeasured_per_instance() -> str:
    """Return the same of every instance."""
    return f"max by (instance) (({_not_measured()}) and on (job, instance) {_state()})"


def firing(*matchers: str) -> str:
    """Select the alerts that fire; the watchdog always does."""
    return select("ALERTS", 'alertname=~"Esper.*"', 'alertname!="EsperWatchdog"', 'alertstate="firing"', *matchers)


def firing_count(severity: str) -> str:
    """Return how many alerts of a severity fire."""
    alerts = _of_chosen_run(firing(f'severity="{severity}"'))
    return f"count({alerts}) or 0 * max({_state()})"


def firing_alerts() -> str:
    """Return every alert that fires, with the name of its run where that is known, as 1."""
    alerts = f"max by (job, instance, alertname, severity, run) ({_of_chosen_run(firing())})"
    run = f"max by (job, instance, run_id) ({_state()} >= bool 0)"
    with_run = f"{alerts} * on (job, instance) group_left (run_id) {run}"
    without = f"{alerts} unless on (job, instance) {_state()}"
    return f"max by (alertname, severity, run, instance, run_id) ({with_run} or {without})"


def last_seen(metric: str, *by: str) -> str:
    """Return the last value of every instance within the window."""
    return named(f"last_over_time({select(metric)}[{WINDOW}])", *by, window=WINDOW)


def seconds_since(metric: str) -> str:
    """Return the seconds since the last value of every instance, which is a time."""
    return named(f"time() - last_over_time({select(metric)}[{WINDOW}])", window=WINDOW)


def damaged_tensors() -> str:
    """Return the tensors that held a bad element at the last scan, the worst first."""
    return f"topk({ROWS}, {latest('esper_damaged_tensor_elements', 'part', 'tensor')})"


def bad_layers(metric: str) -> str:
    """Return the layers that held a bad element within the window, the worst first."""
    return f"topk({ROWS}, {largest(metric, 'layer', window=WINDOW)} > 0)"


def bad_share() -> str:
    """Return which share of all bad elements a layer held."""
    inf, nan = (_layer_counts(kind) for kind in ("inf", "nan"))
    both = f"({inf} + {nan})"
    return f"{both} / on (instance) group_left () sum by (instance) {both} > 0"


def bad_layer_norms() -> str:
    """Return the norms of the layers that held a bad element."""
    inf, nan = (_layer_counts(kind) for kind in ("inf", "nan"))
    norms = largest("esper_layer_grad_norm", "layer", window=WINDOW)
    return f"{norms} and ({inf} > 0 or {nan} > 0)"


def origin_history() -> str:
    """Return 1 where a layer was where it began, for as long as the count of that kind is shown."""
    bad = f"max_over_time({select(NONFINITE)}[{STEP}]) > 0"
    began = f"last_over_time({select('esper_origin_layer_info')}[{STEP}]) and on (job, instance, kind) ({bad})"
    return named(began, "layer", "kind")


def bad_ranks(kind: str) -> str:
    """Return what the worst ranks made of a kind before any reduction."""
    counts = select("esper_rank_nonfinite_grads", f'kind="{kind}"')
    return named(f"max_over_time({counts}[{WINDOW}])", "rank", "host", window=WINDOW)


def rank_history() -> str:
    """Return the worst state of each point's time, per rank; of too many, those with the worst of the shown time."""
    history = f"max_over_time({_rank_state()}[{STEP}])"
    few = f"{_shown_ranks()} and on () {rank_count('<=')}"
    shown = f"{few} or topk({WORST_RANKS}, {_shown_ranks()})"
    return f"max by (run_id, rank, host) ({history} and on (job, instance) ({shown}))"


def rank_count(compared: str) -> str:
    """Return how many ranks there are, where that is few or many enough."""
    return f"count({_shown_ranks()}) {compared} {MOST_RANKS}"


def versions() -> str:
    """Return the versions that every instance runs, as 1."""
    return named(select("esper_build_info"), "version", "torch", "python", window=MEMORY)


def _state() -> str:
    return select(STATE, CHOSEN_RUN)


def _rank_state() -> str:
    return select(STATE, CHOSEN_RUN, 'world_size!="1"')


def _shown_ranks() -> str:
    return f"max by (job, instance) (max_over_time({_rank_state()}[$__range] @ end()))"


def _of_chosen_run(alerts: str) -> str:
    """Leave out what is known to belong to another run; an instance that left the list has alerts and no state."""
    others = select(STATE, CHOSEN_RUN.replace("=~", "!~"))
    return f"{alerts} unless on (job, instance) {others}"


def _counts(kind: str) -> str:
    """Return the largest count of any one check: of a drill only where nothing is real, 0 only where all is known."""
    real, made_up = (select(NONFINITE, f'kind="{kind}"', drill) for drill in ('drill=""', 'drill!=""'))
    whole = select(OF_RUN, f'kind="{kind}"', 'drill=""')  # of rank 0, whose own share may be smaller
    drill = f"{made_up} and on (job, instance) {_state()} == {_CODES['DRILL']}"
    alternatives = (f"{whole} > 0", f"{real} > 0", drill, f"{real} and on (job, instance) ({_covered()})")
    return " or on (job, instance) ".join(f"max by (job, instance) ({value})" for value in alternatives)


def _layer_counts(kind: str) -> str:
    return largest(f"esper_layer_{kind}_grad_count", "layer", window=WINDOW)


def _origins() -> str:
    by = "job, instance"
    layers = f"max by ({by}, layer, kind) (last_over_time({select('esper_origin_layer_info')}[{WINDOW}]))"
    times = select("esper_last_nonfinite_timestamp_seconds", 'drill=""')
    when = f"max by ({by}, kind) (1000 * last_over_time({times}[{WINDOW}]))"
    return f"{layers} * on ({by}, kind) group_left () {when}"


def _checking() -> str:
    """Return the instances that made a check within the window."""
    checked = select("esper_last_check_timestamp_seconds")
    return f"{checked} > 0 unless {checked} == {checked} offset {WINDOW}"


def _covered() -> str:
    """Return those of them that measured every layer: only of these a 0 is good news."""
    return f"{_checking()} unless on (job, instance) {_unmeasured()} > 0"


def _unchecked_seconds() -> str:
    """Return the seconds since the last check of what has not ended; a run that is gone is remembered by the rules."""
    seen = f"last_over_time({select('esper_last_check_timestamp_seconds')}[{MEMORY}])"
    last = f"({seen} or on (job, instance) {select(LAST_WORD)} > 0)"
    return f"time() - ({last} unless on (job, instance) {_state()} == {_CODES['ENDED']})"


def _unmeasured() -> str:
    return f"max_over_time({select('esper_unmeasured_layers')}[{WINDOW}])"


def _not_measured() -> str:
    """Return how many layers could not be measured; 0 only where checks were made."""
    return f"{_unmeasured()} > 0 or {_unmeasured()} and on (job, instance) ({_checking()})"
