"""Read the committed dashboard as Grafana and Prometheus will."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

AS_PROMETHEUS_SEES_THEM = {
    "$job": ".+",
    "$instance": ".+",
    "$run_id": ".+",
    "$__rate_interval": "20s",
    "$__range": "1h",
}


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every panel, those of collapsed rows too, and no rows."""
    every = [found for panel in board["panels"] for found in (panel, *panel.get("panels", ()))]
    return [panel for panel in every if panel["type"] != "row"]


def targets(board: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield every panel with each of its queries."""
    for panel in panels(board):
        for target in panel["targets"]:
            yield panel, target


def interpolate(expression: str, **values: str) -> str:
    """Put values in the place of variables."""
    for variable, value in (AS_PROMETHEUS_SEES_THEM | {f"${name}": value for name, value in values.items()}).items():
        expression = expression.replace(variable, value)
    assert "$" not in expression, f"a variable that the dashboard does not have: {expression}"
    return expression
