"""Write `dashboards/esper.json`: python -m grafana.build.

The JSON is of the classic kind, which Grafana 10 to 13 import; the SDK is the one for Grafana 10.1, the oldest.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard

from grafana import banner, heads, health, layers, ppo, queries, ranks, run, training, verdict
from grafana.panels import ADDRESSES, RUNBOOKS, SOURCE, Placed

DASHBOARD = Path(__file__).with_name("dashboards") / "esper.json"
SCHEMA_VERSION = 39  # the SDK writes 36; nothing here changed in between
ALL = dashboard.VariableOption(selected=True, text="All", value="$__all")
ROWS = {
    "Health": health.panels,
    "Model": verdict.panels,
    "Ranks": ranks.panels,
    "Training": training.panels,
    "Layers": layers.panels,
    "Heads": heads.panels,
    "PPO": ppo.panels,
    "Run and monitor": run.panels,
}
COLLAPSED = "PPO"  # most runs are none
_ALERT_TEXT = {"titleFormat": "{{alertname}}", "textFormat": "{{severity}}: {{instance}}", "tagKeys": "severity"}
_MADE_UP = ("id", "auto", "auto_count", "auto_min")  # one id for all variables, by which Grafana 10 tells them apart


def build() -> dict[str, Any]:
    """Return the dashboard as Grafana reads it."""
    made = (
        builders.Dashboard("Gradient health")
        .uid("esper")
        .description("Inf and NaN in gradients, from esper-telemetry. Alerts come from the same rules and numbers.")
        .tags(["esper", "pytorch"])
        .readonly()
        .refresh("10s")
        .time("now-1h", "now")
        .timezone("browser")
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .variables([_data_source(), *_choices(), _alertmanager()])
        .annotation(_annotation())
        .links(_links())
    )
    text = json.dumps(made.build(), cls=JSONEncoder)
    return _complete(json.loads(text))


def render() -> str:
    """Return the text of the file."""
    return json.dumps(build(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _data_source() -> builders.DatasourceVariable:
    return builders.DatasourceVariable("datasource").label("Data source").type("prometheus")


def _choices() -> list[builders.QueryVariable]:
    return [
        _choice("job", "Job", "label_values(esper_run_info, job)"),
        _choice("instance", "Instance", 'label_values(esper_run_info{job=~"$job"}, instance)'),
        _choice("run_id", "Run", f"label_values(esper_run_info{{{queries.CHOSEN}}}, run_id)"),
    ]


def _choice(name: str, label: str, asked: str) -> builders.QueryVariable:
    variable = builders.QueryVariable(name).label(label).query(asked).datasource(SOURCE).current(ALL)
    variable = variable.refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
    return variable.sort(dashboard.VariableSort.ALPHABETICAL_ASC).multi(True).include_all(True).all_value(".+")


def _alertmanager() -> builders.ConstantVariable:
    """Keep the address of Alertmanager, for the links."""
    return builders.ConstantVariable("alertmanager").label("Alertmanager").value(ADDRESSES["alertmanager"])


def _annotation() -> builders.AnnotationQuery:
    alerts = builders.AnnotationQuery().name("Alerts").datasource(SOURCE).icon_color("red").enable(True)
    return alerts.expr(f"max by (alertname, severity, instance) ({queries.firing()})")


def _links() -> list[builders.DashboardLink]:
    links = (("Runbooks", RUNBOOKS), ("Alertmanager", "${alertmanager}"))
    return [
        builders.DashboardLink(title).type(dashboard.DashboardLinkType.LINK).url(url).target_blank(True).icon("doc")
        for title, url in links
    ]


def _complete(made: dict[str, Any]) -> dict[str, Any]:
    """Place the panels, add what the SDK for Grafana 10.1 has no name for, and drop what it makes up."""
    for variable in made["templating"]["list"]:
        for key in _MADE_UP:
            del variable[key]
    made["schemaVersion"] = SCHEMA_VERSION
    made["annotations"]["list"][0] |= _ALERT_TEXT
    made["panels"] = _place()
    return made


def _place() -> list[dict[str, Any]]:
    """Lay out the banner and then row after row, and number the panels."""
    panels, top = _lay_out(banner.panels(), 0)
    for title, placed in ROWS.items():
        inside, below = _lay_out(placed(), top + 1)
        collapsed = title == COLLAPSED
        head = {"type": "row", "title": title, "gridPos": {"x": 0, "y": top, "w": 24, "h": 1}, "collapsed": collapsed}
        panels += [head | {"panels": inside}] if collapsed else [head | {"panels": []}, *inside]
        top = top + 1 if collapsed else below
    for number, panel in enumerate(_flat(panels), start=1):
        panel["id"] = number
    return panels


def _lay_out(placed: list[Placed], top: int) -> tuple[list[dict[str, Any]], int]:
    made = []
    for panel, x, y, w, h in placed:
        text = json.dumps(panel.build(), cls=JSONEncoder)
        made.append(json.loads(text) | {"gridPos": {"x": x, "y": top + y, "w": w, "h": h}})
    return made, max(top + place.y + place.h for place in placed)


def _flat(panels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [found for panel in panels for found in (panel, *panel.get("panels", ()))]


if __name__ == "__main__":
    DASHBOARD.write_text(render(), encoding="utf-8")
