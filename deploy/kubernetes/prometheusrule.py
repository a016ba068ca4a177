"""Write `prometheusrule.yaml` from the alerts: python -m deploy.kubernetes.prometheusrule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "alerts" / "rules.yml"
MANIFEST = Path(__file__).with_name("prometheusrule.yaml")


class _Dumper(yaml.SafeDumper):
    """Write expressions as blocks, and no anchors, which not every tool for manifests knows."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write everything out."""
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


def render(rules: Path = RULES) -> str:
    """Return the manifest that holds these rules."""
    manifest = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "esper", "labels": {"app.kubernetes.io/name": "esper-telemetry"}},
        "spec": yaml.safe_load(rules.read_text()),
    }
    head = "# Made from alerts/rules.yml by python -m deploy.kubernetes.prometheusrule; edit that file instead.\n"
    return head + yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, width=1000, allow_unicode=True)


if __name__ == "__main__":
    MANIFEST.write_text(render())
