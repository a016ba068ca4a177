"""Render the shipped configurations for loopback: the same files, with other addresses, folders and times."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ALERTMANAGER = ROOT / "deploy" / "alertmanager" / "alertmanager.yml"
TEMPLATES = ALERTMANAGER.with_name("esper.tmpl")
PROMETHEUS = ROOT / "deploy" / "prometheus" / "prometheus.yml"
RULES = ROOT / "alerts" / "rules.yml"


def replace_all(text: str, replacements: Mapping[str, str]) -> str:
    """Replace every key by its value. Raises `ValueError` on one that the text does not hold."""
    for old, new in replacements.items():
        if old not in text:
            raise ValueError(f"nothing to replace: {old!r}")
        text = text.replace(old, new)
    return text


def alertmanager_config(
    folder: Path, receiver: str, *, group_wait: str = "8s", group_interval: str = "1m", token: str = "local"
) -> Path:
    """Write the Alertmanager configuration with every receiver at one URL: /page, /pagerduty, /slack and /alive.

    Its templates are written beside it.

    The webhook carries `Authorization: Bearer <token>`.
    """
    secrets = folder / "secrets"
    secrets.mkdir(parents=True, exist_ok=True)
    for name, secret in {"pagerduty_key": "local", "slack_url": f"{receiver}/slack", "pager_token": token}.items():
        (secrets / name).write_text(secret)
    text = replace_all(
        ALERTMANAGER.read_text(),
        {
            "/etc/alertmanager/secrets": str(secrets),
            "https://events.pagerduty.com/v2/enqueue": f"{receiver}/pagerduty",
            "http://pager:19309": receiver,
            "group_wait: 8s": f"group_wait: {group_wait}",
            "group_interval: 1m": f"group_interval: {group_interval}",
        },
    )
    _write(folder / TEMPLATES.name, TEMPLATES.read_text())
    return _write(folder / "alertmanager.yml", text)


def rules(folder: Path, windows: Mapping[str, str]) -> Path:
    """Write the rules with other windows, such as `{"5m": "10s"}`, so that a test need not wait for the all-clear.

    Raises `ValueError` on a window that the rules do not have.
    """
    text = RULES.read_text()
    for old, new in windows.items():
        text, found = re.subn(rf"\b{old}\b", new, text)
        if not found:
            raise ValueError(f"no window to replace: {old!r}")
    return _write(folder / "rules.yml", text)


def prometheus_config(
    folder: Path,
    alertmanager: str,
    *,
    trainers: Iterable[str] = (),
    nodes: Iterable[str] = (),
    rule_file: Path = RULES,
    interval: str = "5s",
    replica: str = "a",
    leader: str | None = None,
) -> Path:
    """Write the Prometheus configuration for targets `host:port`, scraped and evaluated every `interval`.

    leader: `host:port` of the rank 0 that lists the ranks of a run.
    """
    list_targets(folder / "targets" / "trainers.json", trainers)
    list_targets(folder / "targets" / "nodes.json", nodes)
    list_targets(folder / "targets" / "collectors.json", ())
    text = replace_all(
        PROMETHEUS.read_text(),
        {
            "scrape_timeout: 4s": f"scrape_timeout: {interval}",
            "_interval: 5s": f"_interval: {interval}",
            "../../alerts/rules.yml": str(rule_file),
            "alertmanager:9093": alertmanager.removeprefix("http://"),
            "replica: a": f"replica: {replica}",
        }
        | ({} if leader is None else _discovery(leader)),
    )
    return _write(folder / "prometheus.yml", text)


def _discovery(leader: str) -> dict[str, str]:
    """Return what to replace so that rank 0 lists the targets."""
    return {
        "    # http_sd_configs:": "    http_sd_configs:",
        "    #   - url: http://rank0.example:19301": f"      - url: http://{leader}",
        "    #     refresh_": "        refresh_",
    }


def list_targets(file: Path, targets: Iterable[str]) -> None:
    """List these targets and no others; Prometheus sees a change at once."""
    scratch = _write(file.with_suffix(".tmp"), json.dumps([{"targets": list(targets)}]))
    scratch.replace(file)


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path
