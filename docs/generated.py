"""Pages of the reference that are made from their source: metrics, alerts, and the command line.

Each function returns Markdown. Nothing here is written by hand anywhere else, so nothing has to be kept in step.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from esper_telemetry.cli.main import _parser
from esper_telemetry.metrics import METRICS, Metric

ROOT = Path(__file__).parents[1]
RULES = ("rules.yml", "norm.yml")


def metrics() -> str:
    """Return every metric as a table, in the order of `metrics.py`."""
    return "\n".join(["| metric | type | labels | meaning |", "|---|---|---|---|", *map(_row, METRICS)])


def alerts() -> str:
    """Return a section for each alert of the rules, and the recording rules as a table."""
    groups = [group for name in RULES for group in yaml.safe_load((ROOT / "alerts" / name).read_text())["groups"]]
    rules = [rule for group in groups for rule in group["rules"]]
    found: dict[str, list[dict[str, Any]]] = {}
    for rule in rules:
        if "alert" in rule:
            found.setdefault(rule["alert"], []).append(rule)
    recorded = dict.fromkeys(f"`{rule['record']}`" for rule in rules if "record" in rule)
    sections = [_alert(name, same) for name, same in found.items()]
    return "\n\n".join([*sections, "## Recording rules", "\n".join(f"- {name}" for name in recorded)])


def commands() -> str:
    """Return a section for each command of the parser, with its options as a table."""
    parser = _parser()
    [below] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    sections = [_command(parser), *(_command(command) for command in below.choices.values())]
    return "\n\n".join(sections)


def _row(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"| `{metric.name}` | {metric.type} | {labels} | {metric.help} |"


def _alert(name: str, rules: list[dict[str, Any]]) -> str:
    """Show what fires, after how long, and how loudly; the runbook says the rest."""
    lines = [f"## {name}", f"[Runbook](../alerts/runbooks/{name}.md)"]
    for rule in rules:
        waits = "".join(f", {key.replace('_', ' ')} {rule[key]}" for key in ("for", "keep_firing_for") if key in rule)
        lines += [f"Severity {rule['labels']['severity']}{waits}:", f"```promql\n{rule['expr'].strip()}\n```"]
    return "\n\n".join(lines)


def _command(parser: argparse.ArgumentParser) -> str:
    usage = " ".join(parser.format_usage().removeprefix("usage: ").split())
    rows = list(_options(parser))
    table = "\n".join(["| option | meaning |", "|---|---|", *rows])
    return f"## {parser.prog}\n\n{parser.description}\n\n```text\n{usage}\n```\n\n{table}"


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action._choices_actions:
                yield f"| [`{command.dest}`](#esper-{command.dest}) | {_cell(command.help)} |"
            continue
        value = action.metavar or ("|".join(map(str, action.choices)) if action.choices else None)
        if value is None and action.nargs != 0 and action.option_strings:
            value = action.dest.upper()
        names = ", ".join(action.option_strings) or str(action.metavar or action.dest)
        shown = f"{names} {value}" if value and action.option_strings else names
        yield f"| `{_cell(shown)}` | {_cell(action.help)} |"


def _cell(text: str | None) -> str:
    return re.sub(r"\s+", " ", text or "").replace("|", "\\|")
