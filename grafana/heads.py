"""The row of heads: the norm of each, and what was ever bad there."""

from __future__ import annotations

from grafana import queries as q
from grafana.panels import ALARM, Placed, graph, now, number, query
from grafana.queries import peak


def panels() -> list[Placed]:
    """Return the panels with their places."""
    norms = graph(
        "Norm per head",
        "L2 norm of each head's gradient before clipping, the largest of any instance. Normal is that no head stays "
        "far above or below the others.",
        query(peak("esper_head_grad_norm", "head"), "{{head}}"),
        log=10,
        no_value="No heads are watched",
    )
    latched = number(
        "Heads that ever held Inf or NaN",
        "Latched for the whole run: BAD means that some check of this run found that kind in that head, on any "
        "instance. Normal is clean.",
        now(peak("esper_head_nonfinite_latched", "head", "kind", window=q.WINDOW), "{{head}} {{kind}}"),
        words={"0": ("clean", "transparent"), "1": ("BAD", ALARM)},
        no_value="No heads are watched",
        fill=True,
        name=True,
        size=20,
    )
    return [Placed(norms, 0, 0, 14, 7), Placed(latched, 14, 0, 10, 7)]
