"""Every metric once: what it is called, what it means, what it is measured in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

KINDS = ("inf", "nan")


@dataclass(frozen=True, slots=True)
class Metric:
    """Describe one metric; `unit` is UCUM, as OpenTelemetry spells it, and counters carry their `_total`."""

    name: str
    type: Literal["gauge", "counter"]
    help: str
    unit: str = "1"
    labels: tuple[str, ...] = ()


def _gauge(name: str, help: str, unit: str = "1", labels: tuple[str, ...] = ()) -> Metric:
    return Metric(name, "gauge", help, unit, labels)


def _counter(name: str, help: str, unit: str = "1", labels: tuple[str, ...] = ()) -> Metric:
    return Metric(name, "counter", help, unit, labels)


INF_GRAD_COUNT = _gauge("esper_inf_grad_count", "Inf elements in the gradient at the last check.", "{element}")
NAN_GRAD_COUNT = _gauge("esper_nan_grad_count", "NaN elements in the gradient at the last check.", "{element}")
INF_GRAD_RECENT_MAX = _gauge(
    "esper_inf_grad_recent_max", "Largest number of Inf elements in one check of the recent window.", "{element}"
)
NAN_GRAD_RECENT_MAX = _gauge(
    "esper_nan_grad_recent_max", "Largest number of NaN elements in one check of the recent window.", "{element}"
)
LOCAL_INF_GRAD_RECENT_MAX = _gauge(
    "esper_local_inf_grad_recent_max",
    "Most Inf elements that this rank's own backward made in one check of the recent window; NaN where not measured.",
    "{element}",
)
LOCAL_NAN_GRAD_RECENT_MAX = _gauge(
    "esper_local_nan_grad_recent_max",
    "Most NaN elements that this rank's own backward made in one check of the recent window; NaN where not measured.",
    "{element}",
)
UNMEASURED_LAYERS = _gauge(
    "esper_unmeasured_layers",
    "Largest number of layers in one check of the recent window whose gradient was not measured.",
    "{layer}",
)
RECENT_WINDOW = _gauge("esper_recent_window_seconds", "Length of the recent window.", "s")
CHECKS = _counter("esper_checks_total", "Checks made; 0 means that nothing has been measured yet.", "{check}")
NONFINITE_CHECKS = _counter(
    "esper_nonfinite_checks_total",
    "Checks that found this kind, by tier: 1 to 5 elements is warning, more is critical.",
    "{check}",
    ("kind", "tier"),
)
NONFINITE_GRADS = _counter(
    "esper_nonfinite_grads_total", "Elements of this kind, summed over all checks.", "{element}", ("kind",)
)
UNMONITORED_STEPS = _counter(
    "esper_unmonitored_steps_total", "Optimizer steps taken with gradients that no check had seen.", "{step}"
)
GRAD_SCOPE = _gauge(
    "esper_grad_scope_info",
    "What the last check covered: whole, replica, shard, mixed or local; whether ranks add up; when it was made.",
    labels=("scope", "exact", "when"),
)
LAST_CHECK = _gauge("esper_last_check_timestamp_seconds", "Unix time of the last check; NaN before the first.", "s")
LAST_NONFINITE = _gauge(
    "esper_last_nonfinite_timestamp_seconds",
    "Unix time of the last check that found this kind; NaN before the first.",
    "s",
    ("kind",),
)
GRAD_NORM = _gauge("esper_grad_norm", "L2 norm of the gradient before clipping; NaN before the first check.")
GRAD_ELEMENTS = _gauge("esper_grad_elements", "Elements covered by the last check; NaN before the first.", "{element}")
DEAD_LAYERS = _gauge(
    "esper_dead_layers", "Layers with over 90 % exact zeros in their gradient; NaN until measured.", "{layer}"
)
EXPLODING_LAYERS = _gauge(
    "esper_exploding_layers",
    "Layers with over 10 % of the gradient above 10 in magnitude; NaN until measured.",
    "{layer}",
)
LAYER_INF_GRAD_COUNT = _gauge(
    "esper_layer_inf_grad_count",
    "Most Inf elements in one check of the recent window; worst layers only.",
    "{element}",
    ("layer",),
)
LAYER_NAN_GRAD_COUNT = _gauge(
    "esper_layer_nan_grad_count",
    "Most NaN elements in one check of the recent window; worst layers only.",
    "{element}",
    ("layer",),
)
LAYERS_DROPPED = _gauge(
    "esper_layers_dropped", "Bad layers of the recent window without a series of their own.", "{layer}"
)
LAYER_GRAD_NORM = _gauge(
    "esper_layer_grad_norm", "L2 norm of the layer's gradient before clipping; largest only.", labels=("layer",)
)
ORIGIN_LAYER = _gauge(
    "esper_origin_layer_info",
    "Layer nearest the loss in the last check that found this kind: where it began.",
    labels=("layer", "kind"),
)
HEAD_GRAD_NORM = _gauge(
    "esper_head_grad_norm", "L2 norm of the head's gradient before clipping; NaN until measured.", labels=("head",)
)
HEAD_NONFINITE_LATCHED = _gauge(
    "esper_head_nonfinite_latched",
    "1 if any check of this run found this kind in the head.",
    labels=("head", "kind"),
)
SKIPPED_UPDATES = _counter(
    "esper_skipped_updates_total", "Optimizer steps that were skipped, by reason.", "{update}", ("reason",)
)
AMP_SCALE = _gauge("esper_amp_scale", "Scale of the watched GradScaler.")
AMP_CONSECUTIVE_SKIPS = _gauge(
    "esper_amp_consecutive_skips", "Consecutive optimizer steps skipped by the watched GradScaler.", "{update}"
)
NONFINITE_PARAMETERS = _gauge(
    "esper_nonfinite_parameters",
    "Inf and NaN elements in the model's parameters at the last scan of the model; NaN before the first.",
    "{element}",
)
NONFINITE_BUFFERS = _gauge(
    "esper_nonfinite_buffers",
    "Inf and NaN elements in the model's buffers at the last scan of the model; NaN before the first.",
    "{element}",
)
NONFINITE_OPTIMIZER_STATE = _gauge(
    "esper_nonfinite_optimizer_state",
    "Inf and NaN elements in the optimizer state at the last scan of the model; NaN before the first.",
    "{element}",
)
DAMAGED_TENSOR = _gauge(
    "esper_damaged_tensor_elements",
    "Inf and NaN elements of a damaged tensor at the last scan of the model; the worst of each part only.",
    "{element}",
    ("part", "tensor"),
)
CAUSE = _gauge("esper_cause_info", "Where the last trouble began, as far as could be seen.", labels=("cause",))
LAST_GOOD_CHECK = _gauge(
    "esper_last_good_check_timestamp_seconds",
    "Unix time of the last check that found nothing in a model not known to be damaged; NaN before the first.",
    "s",
)
CHECKS_SINCE_GOOD = _gauge(
    "esper_checks_since_last_good_check", "Checks since the last good one; NaN before the first.", "{check}"
)
PPO_POLICY_LOSS = _gauge("esper_ppo_policy_loss", "Policy loss of the last PPO update.")
PPO_VALUE_LOSS = _gauge("esper_ppo_value_loss", "Value loss of the last PPO update.")
PPO_ENTROPY = _gauge("esper_ppo_entropy", "Mean policy entropy in the last PPO update.", "{nat}")
PPO_APPROX_KL = _gauge("esper_ppo_approx_kl", "Approximate KL divergence of the last PPO update.", "{nat}")
PPO_CLIP_FRACTION = _gauge("esper_ppo_clip_fraction", "Share of clipped samples in the last PPO update.")
PPO_EXPLAINED_VARIANCE = _gauge("esper_ppo_explained_variance", "Explained variance at the last PPO update.")
PPO_REWARD = _gauge("esper_ppo_episode_reward", "Mean reward of the last 100 episodes; NaN before the first ended.")
PPO_INF_GRADS = _gauge("esper_ppo_inf_grads", "Inf elements in the worst check of the last PPO update.", "{element}")
PPO_NAN_GRADS = _gauge("esper_ppo_nan_grads", "NaN elements in the worst check of the last PPO update.", "{element}")
PPO_UPDATE_SECONDS = _gauge("esper_ppo_update_seconds", "Duration of the last PPO update.", "s")
PPO_UPDATES = _counter("esper_ppo_updates_total", "PPO updates made.", "{update}")
PPO_EPISODES = _counter("esper_ppo_episodes_total", "Episodes finished.", "{episode}")
COLLECT_ERRORS = _counter(
    "esper_exporter_collect_errors_total", "Scrapes that failed because the page could not be built.", "{error}"
)
SCRAPE_DURATION = _gauge("esper_exporter_scrape_duration_seconds", "Time taken to build the previous page.", "s")
WEB_CONFIG_RELOAD_FAILURES = _counter(
    "esper_web_config_reload_failures_total",
    "Web config reloads that failed; the previous configuration stays in use.",
    "{reload}",
)
OTLP_EXPORT_FAILURES = _counter(
    "esper_otlp_export_failures_total", "OTLP pushes that failed; exported over OTLP only.", "{push}"
)
TRAIN_LOSS = _gauge("esper_train_loss", "Loss last reported by the training loop; NaN until reported.")
TRAIN_LEARNING_RATE = _gauge(
    "esper_train_learning_rate", "Learning rate last reported by the training loop; NaN until reported."
)
TRAIN_STEP = _gauge("esper_train_step", "Step last reported by the training loop; NaN until reported.", "{step}")
TRAIN_SAMPLES = _counter(
    "esper_train_samples_total", "Samples processed, as reported by the training loop.", "{sample}"
)
MONITOR_ERRORS = _counter(
    "esper_monitor_errors_total", "Checks that failed because of an error in esper-telemetry.", "{error}"
)
MONITOR_SECONDS = _counter("esper_monitor_seconds_total", "Time spent measuring in the training thread.", "s")
GLOBAL_INF_GRAD_RECENT_MAX = _gauge(
    "esper_global_inf_grad_recent_max",
    "Largest number of Inf elements in one check of the whole run within the recent window, each once; from rank 0.",
    "{element}",
)
GLOBAL_NAN_GRAD_RECENT_MAX = _gauge(
    "esper_global_nan_grad_recent_max",
    "Largest number of NaN elements in one check of the whole run within the recent window, each once; from rank 0.",
    "{element}",
)
BAD_RANKS = _gauge(
    "esper_bad_ranks",
    "Ranks whose own backward pass was bad within the recent window; NaN where ranks do not measure that.",
    "{rank}",
)
RANKS_EXPECTED = _gauge("esper_ranks_expected", "Ranks of the run.", "{rank}")
RANKS_REPORTING = _gauge(
    "esper_ranks_reporting",
    "Ranks that rank 0 hears from, or that have ended; NaN where the job has no store.",
    "{rank}",
)
RANKS_GONE = _gauge(
    "esper_ranks_gone",
    "Ranks that rank 0 no longer hears from and that never reported their end.",
    "{rank}",
)
RANK_NONFINITE_GRADS = _gauge(
    "esper_rank_nonfinite_grads",
    "Most bad elements in one check of the rank's own backward pass within the recent window; the worst 5 ranks only.",
    "{element}",
    ("rank", "host", "kind"),
)
RANK_ORIGIN_LAYER = _gauge(
    "esper_rank_origin_layer",
    "Order in which the rank went bad, 1 for the first, with the layer where it began; the worst 5 ranks only.",
    labels=("rank", "host", "layer"),
)
RANK_CAUSE = _gauge(
    "esper_rank_cause",
    "Order in which the rank went bad, 1 for the first, with where its trouble began; the worst 5 ranks only.",
    labels=("rank", "host", "cause"),
)
GLOBAL_MODEL_DAMAGE = _gauge(
    "esper_global_model_damage",
    "Worst damage on any rank: 0 intact, 1 optimizer state, 2 buffers, 3 parameters; NaN before the first scan.",
)
DAMAGED_RANKS = _gauge(
    "esper_damaged_ranks",
    "Ranks whose part of the model holds Inf or NaN; NaN before the first scan.",
    "{rank}",
)
RANK_DAMAGED_ELEMENTS = _gauge(
    "esper_rank_damaged_elements",
    "Bad elements in the worst damaged part of the rank's model, with its worst tensor; the worst 5 ranks only.",
    "{element}",
    ("rank", "host", "part", "tensor"),
)
GLOBAL_LAST_GOOD_CHECK = _gauge(
    "esper_global_last_good_check_timestamp_seconds",
    "Time of the last check that was good on every rank; from rank 0.",
    "s",
)
GLOBAL_CHECKS_SINCE_GOOD = _gauge(
    "esper_global_checks_since_last_good_check",
    "Checks since the last one that was good on every rank; from rank 0.",
    "{check}",
)
RUN_ENDED = _gauge("esper_run_ended", "1 after the monitor was closed; no more checks will follow.")
RUN_INFO = _gauge(
    "esper_run_info", "Identity of the run behind this target.", labels=("run_id", "rank", "world_size", "host", "pid")
)
BUILD_INFO = _gauge(
    "esper_build_info", "Versions of esper-telemetry, PyTorch and Python.", labels=("version", "torch", "python")
)

METRICS = tuple(value for value in globals().values() if isinstance(value, Metric))
