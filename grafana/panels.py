"""Short ways to a panel of each kind, all on the chosen data source, with a unit and a word on what is normal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import yaml
from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as dashboard_builders
from grafana_foundation_sdk.builders import prometheus, stat, statetimeline, table, timeseries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common, dashboard
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from grafana.queries import STATES

ADDRESSES: dict[str, str] = yaml.safe_load((Path(__file__).parents[1] / "deploy" / "addresses.yml").read_text())
RUNBOOKS = ADDRESSES["runbooks"]
SOURCE = dashboard.DataSourceRef(type_val="prometheus", uid="${datasource}")
CALM = "text"
GREY = "#8e9096"
RED = "red"
ORANGE = "orange"
AMBER, ALARM = STATES["WARNING"], STATES["CRITICAL"]  # behind white text
KIND_COLOURS = {"NaN": "purple", "Inf": "blue"}  # neither says how bad it is; amber and red do, for both alike
WARNING, CRITICAL = 1, 6  # the least count of each tier
RUN = "{{run_id}} · {{instance}}"
STATE_WORDS = {str(code): (name, colour) for code, (name, colour) in enumerate(STATES.items())}
NONE = "none"  # Grafana's unit of plain numbers and of words

_PLACES = {"bottom": common.LegendPlacement.BOTTOM, "right": common.LegendPlacement.RIGHT}
_SPECIAL = ("nan", "null+nan")  # a tile that holds nothing but NaN needs the second

Query: TypeAlias = prometheus.Dataquery
Panel: TypeAlias = Builder[dashboard.Panel]
Step: TypeAlias = tuple[float | None, str]
Words: TypeAlias = Mapping[str, tuple[str, str | None]]
"""Value -> the word to show for it and its colour; the values of `_SPECIAL` too."""


class Placed(NamedTuple):
    """A panel with its column and line within its row, its width and its height."""

    panel: Panel
    x: int
    y: int
    w: int
    h: int


def query(expression: str, legend: str = "", ref: str = "A") -> Query:
    """Ask for values over the shown time."""
    return prometheus.Dataquery().expr(expression).legend_format(legend).ref_id(ref).range().datasource(SOURCE)


def now(expression: str, legend: str = "", ref: str = "A") -> Query:
    """Ask for the values at the end of the shown time."""
    return prometheus.Dataquery().expr(expression).legend_format(legend).ref_id(ref).instant().datasource(SOURCE)


def cells(expression: str, ref: str) -> Query:
    """Ask for the values at the end of the shown time, as rows of a table."""
    return now(expression, ref=ref).format(PromQueryFormat.TABLE)


def number(
    title: str,
    description: str,
    *queries: Query,
    unit: str = NONE,
    steps: Iterable[Step] = ((None, CALM),),
    words: Words | None = None,
    no_value: str = "no data",
    fill: bool = False,
    name: bool = False,
    size: int | None = None,
) -> stat.Panel:
    """Show the last value in large type.

    steps: colours from a value upwards. fill: colour the tile instead of the text. name: show the series' name too.
    """
    panel = stat.Panel().graph_mode(common.BigValueGraphMode.NONE).justify_mode(common.BigValueJustifyMode.CENTER)
    panel = _dress(panel, title, description, queries, unit, no_value, words).thresholds(_thresholds(steps))
    panel = panel.color_mode(common.BigValueColorMode.BACKGROUND_SOLID if fill else common.BigValueColorMode.VALUE)
    panel = panel.text_mode(common.BigValueTextMode.VALUE_AND_NAME if name else common.BigValueTextMode.VALUE)
    panel = panel.reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]).values(False).fields(""))
    if size:
        panel = panel.text(common_builders.VizTextDisplayOptions().value_size(size).title_size(size))
    return panel


def graph(
    title: str,
    description: str,
    *queries: Query,
    unit: str = NONE,
    marks: Iterable[Step] = (),
    stacked: bool = False,
    log: int | None = None,
    top: float | None = None,
    legend: str = "bottom",
    no_value: str = "no data",
) -> timeseries.Panel:
    """Draw values over time; `marks` are dashed lines, and the axis reaches at least up to `top`."""
    panel = _dress(timeseries.Panel(), title, description, queries, unit, no_value)
    panel = panel.show_points(common.VisibilityMode.AUTO).span_nulls(False).line_width(1)
    panel = panel.fill_opacity(40 if stacked else 5).min(0) if log is None else panel.fill_opacity(0)
    panel = panel.legend(_legend(_PLACES[legend])).tooltip(_tooltip())
    if stacked:
        panel = panel.stacking(common_builders.StackingConfig().mode(common.StackingMode.NORMAL).group("A"))
    if log is not None:
        scale = common_builders.ScaleDistributionConfig().type(common.ScaleDistribution.LOG).log(log)
        panel = panel.scale_distribution(scale)
    if top is not None:
        panel = panel.axis_soft_max(top)
    if steps := tuple(marks):
        dashed = common_builders.GraphThresholdsStyleConfig().mode(common.GraphTresholdsStyleMode.DASHED)
        panel = panel.thresholds(_thresholds(((None, "transparent"), *steps))).thresholds_style(dashed)
    return panel


def free_axis(panel: timeseries.Panel) -> timeseries.Panel:
    """Let the axis begin where the values do, for what may be negative or has no natural zero."""
    panel.build().field_config.defaults.min_val = None
    return panel


def timeline(
    title: str, description: str, *queries: Query, words: Words, no_value: str = "no data"
) -> statetimeline.Panel:
    """Draw states over time, one line each; every word carries its colour, so that equal states can be merged."""
    panel = _dress(statetimeline.Panel(), title, description, queries, NONE, no_value, words)
    panel = panel.show_value(common.VisibilityMode.AUTO).merge_values(True).row_height(0.85).fill_opacity(90)
    panel = panel.color_scheme(_colours(dashboard.FieldColorModeId.PALETTE_CLASSIC)).max_data_points(400)
    return panel.legend(_legend(common.LegendPlacement.BOTTOM, show=False)).tooltip(_tooltip())


def listing(
    title: str,
    description: str,
    *queries: Query,
    columns: Mapping[str, str],
    first: str,
    no_value: str,
    descending: bool = True,
) -> table.Panel:
    """Show one row per label set, sorted by the column `first`; `columns` names what is shown, in that order."""
    panel = _dress(table.Panel(), title, description, queries, NONE, no_value)
    panel = panel.with_transformation(dashboard.DataTransformerConfig(id_val="merge", options={}))
    panel = panel.with_transformation(
        dashboard.DataTransformerConfig(
            id_val="organize",
            options={
                "excludeByName": {"Time": True},
                "indexByName": {name: place for place, name in enumerate(columns)},
                "renameByName": dict(columns),
            },
        )
    )
    panel = panel.sort_by([common_builders.TableSortByFieldState().display_name(first).desc(descending)])
    return panel.cell_height(common.TableCellHeight.SM).show_header(True)


def column(panel: table.Panel, name: str, **properties: Any) -> table.Panel:
    """Give a column of a table its unit, words, link or width."""
    ids = {"cell": "custom.cellOptions", "width": "custom.width", "words": "mappings", "steps": "thresholds"}
    if "words" in properties:
        properties["words"] = _mappings(properties["words"])
    if "steps" in properties:
        properties["steps"] = _thresholds(properties["steps"]).build()
    values = [dashboard.DynamicConfigValue(ids.get(key, key), value) for key, value in properties.items()]
    return panel.override_by_name(name, values)


def count_column(panel: table.Panel, name: str) -> table.Panel:
    """Make a column of counts, amber from 1 and red from 6."""
    steps = ((None, CALM), (WARNING, ORANGE), (CRITICAL, RED))
    return column(panel, name, unit="locale", steps=steps, cell={"type": "color-text"}, noValue="-", width=80)


def link(title: str, url: str) -> list[dict[str, object]]:
    """Make the link of a column."""
    return [{"title": title, "url": url, "targetBlank": True}]


def alertmanager(label: str) -> list[dict[str, object]]:
    """Make the link of a column to the alerts in Alertmanager that have its value as this label."""
    matcher = f"%7B{label}%3D%22${{__value.text:percentencode}}%22%7D"
    return link("In Alertmanager", f"${{alertmanager}}/#/alerts?filter={matcher}")


def paint(panel: Any, colours: Mapping[str, str]) -> Any:
    """Give series their colours, by name."""
    for name, colour in colours.items():
        fixed = {"mode": "fixed", "fixedColor": colour}
        panel = panel.override_by_name(name, [dashboard.DynamicConfigValue("color", fixed)])
    return panel


def _dress(
    panel: Any,
    title: str,
    description: str,
    queries: Sequence[Query],
    unit: str,
    no_value: str,
    words: Words | None = None,
) -> Any:
    panel = panel.title(title).description(description).datasource(SOURCE).targets(list(queries))
    return panel.unit(unit).no_value(no_value).mappings(_mappings(words or {}))


def _mappings(words: Words) -> list[dashboard.ValueMapping]:
    plain, special = {}, []
    for place, (value, (text, colour)) in enumerate(words.items()):
        result = dashboard.ValueMappingResult(text=text, color=colour, index=place)
        if value in _SPECIAL:
            match = dashboard.SpecialValueMatch(value)
            options = dashboard.DashboardSpecialValueMapOptions(match=match, result=result)
            special.append(dashboard.SpecialValueMap(options=options))
        else:
            plain[value] = result
    return [*([dashboard.ValueMap(options=plain)] if plain else []), *special]


def _thresholds(steps: Iterable[Step]) -> dashboard_builders.ThresholdsConfig:
    made = [dashboard.Threshold(value=value, color=colour) for value, colour in steps]
    return dashboard_builders.ThresholdsConfig().mode(dashboard.ThresholdsMode.ABSOLUTE).steps(made)


def _colours(mode: dashboard.FieldColorModeId) -> dashboard_builders.FieldColor:
    return dashboard_builders.FieldColor().mode(mode)


def _legend(placement: common.LegendPlacement, show: bool = True) -> common_builders.VizLegendOptions:
    legend = common_builders.VizLegendOptions().show_legend(show).placement(placement)
    return legend.display_mode(common.LegendDisplayMode.LIST).calcs([])


def _tooltip() -> common_builders.VizTooltipOptions:
    mode, sort = common.TooltipDisplayMode.MULTI, common.SortOrder.DESCENDING
    return common_builders.VizTooltipOptions().mode(mode).sort(sort)
