"""The row of PPO: what the algorithm says about itself."""

from __future__ import annotations

from grafana.panels import CRITICAL, KIND_COLOURS, NONE, RED, RUN, Panel, Placed, free_axis, graph, paint, query
from grafana.queries import latest, peak, rate


def panels() -> list[Placed]:
    """Return the panels with their places."""
    kl = _of_update("Approximate KL", "approx_kl", "Normal is below 0.02; above, steps are too large.")
    clipped = _of_update("Clip fraction", "clip_fraction", "Normal is 5 % to 30 %; 0 learns nothing.", "percentunit")
    entropy = _of_update("Entropy", "entropy", "It should fall slowly; at 0 exploration is over.")
    explained = _of_update(
        "Explained variance", "explained_variance", "It should rise towards 1; below 0 a constant would predict better."
    )
    return [
        Placed(_of_update("Episode reward", "episode_reward", "It should rise, then stay."), 0, 0, 8, 7),
        Placed(kl, 8, 0, 8, 7),
        Placed(clipped, 16, 0, 8, 7),
        Placed(entropy, 0, 7, 8, 7),
        Placed(explained, 8, 7, 8, 7),
        Placed(_losses(), 16, 7, 8, 7),
        Placed(_pace(), 0, 14, 12, 7),
        Placed(_bad(), 12, 14, 12, 7),
    ]


def _of_update(title: str, metric: str, normal: str, unit: str = NONE) -> Panel:
    panel = graph(
        title,
        f"Of the last PPO update, per instance. {normal}",
        query(latest(f"esper_ppo_{metric}"), RUN),
        unit=unit,
        no_value="No PPO run",
    )
    return free_axis(panel)


def _losses() -> Panel:
    panel = graph(
        "Losses",
        "Policy and value loss of the last PPO update, per instance. Normal: the policy loss is about 0, the value "
        "loss falls.",
        query(latest("esper_ppo_policy_loss"), f"policy {RUN}", "A"),
        query(latest("esper_ppo_value_loss"), f"value {RUN}", "B"),
        no_value="No PPO run",
    )
    return free_axis(panel)


def _pace() -> Panel:
    return graph(
        "Updates and episodes per second",
        "How fast the run progresses. Normal is steady; a line that falls to 0 is a run that hangs.",
        query(rate("esper_ppo_updates_total"), f"updates {RUN}", "A"),
        query(rate("esper_ppo_episodes_total"), f"episodes {RUN}", "B"),
        unit="cps",
        no_value="No PPO run",
    )


def _bad() -> Panel:
    panel = graph(
        "Inf and NaN in the worst check of an update",
        "The same counts as above, by PPO update. Normal is 0.",
        query(peak("esper_ppo_inf_grads"), "Inf", "A"),
        query(peak("esper_ppo_nan_grads"), "NaN", "B"),
        marks=((CRITICAL - 0.5, RED),),
        top=CRITICAL + 1,
        no_value="No PPO run",
    )
    return paint(panel, KIND_COLOURS)
