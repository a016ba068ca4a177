"""The row of training: what the loop reports, so that a bad gradient is shown beside the loss that led to it."""

from __future__ import annotations

from grafana.panels import NONE, RUN, Panel, Placed, free_axis, graph, query
from grafana.queries import latest, rate


def panels() -> list[Placed]:
    """Return the panels with their places."""
    samples = graph(
        "Samples per second",
        "How fast the loop processes samples. Normal is steady; a line that falls to 0 is a run that hangs.",
        query(rate("esper_train_samples_total"), RUN),
        unit="short",
        no_value="No loop reports samples",
    )
    return [
        Placed(_told("Loss", "train_loss", "It should fall; a jump before a bad check is where to look."), 0, 0, 9, 7),
        Placed(_told("Learning rate", "train_learning_rate", "It should follow its schedule.", "sci"), 9, 0, 5, 7),
        Placed(_told("Step", "train_step", "It should rise steadily."), 14, 0, 5, 7),
        Placed(samples, 19, 0, 5, 7),
    ]


def _told(title: str, metric: str, normal: str, unit: str = NONE) -> Panel:
    panel = graph(
        title,
        f"As last reported by the training loop, per instance: monitor.record(), or an integration. {normal}",
        query(latest(f"esper_{metric}"), RUN),
        unit=unit,
        no_value="No loop reports it",
    )
    return free_axis(panel)
