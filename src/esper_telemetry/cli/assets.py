"""`esper assets`: write rules, runbooks, dashboard and manifests with your own addresses filled in."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from esper_telemetry.assets.site import Site
from esper_telemetry.cli.parser import EXIT_USAGE, Commands

_ASSETS = (
    "Write alerting rules, runbooks, the Grafana dashboard and its provisioning, manifests for the Prometheus Operator,"
    " example configurations of Prometheus and Alertmanager, and a systemd unit, with your addresses filled in."
    " Nothing is overwritten."
)
_NEXT = """\
esper assets: {count} files in {folder}

Prometheus     add to prometheus.yml: rule_files: [{folder}/alerts/rules.yml]
               a whole file to start from: {folder}/deploy/prometheus/prometheus.yml
Alertmanager   routes, receivers and templates: {folder}/deploy/alertmanager
Grafana        import {folder}/grafana/dashboards/esper.json, or provision it from {folder}/grafana/provisioning
Kubernetes     kubectl apply -k {folder}/deploy/kubernetes (needs the Prometheus Operator)
systemd        {folder}/deploy/systemd/esper-trainer@.service
Then           rehearse a page: esper drill --help

Links lead to  Grafana {grafana}
               runbooks {runbooks}
               Alertmanager {alertmanager}"""


def add_assets(commands: Commands) -> None:
    """Add the command."""
    command = commands.add_parser("assets", help="write rules, runbooks, dashboard and manifests", description=_ASSETS)
    command.set_defaults(run=_assets)
    default = Site()
    command.add_argument("folder", metavar="DIR", type=Path, help="folder to write to; created if it is missing")
    command.add_argument(
        "--grafana-url", metavar="URL", default=default.grafana, help=f"your Grafana (default: {default.grafana})"
    )
    command.add_argument(
        "--runbook-url",
        metavar="URL",
        help="where you serve alerts/runbooks (default: the written files)",
    )
    command.add_argument(
        "--alertmanager-url",
        metavar="URL",
        default=default.alertmanager,
        help=f"your Alertmanager (default: {default.alertmanager})",
    )
    command.add_argument(
        "--label",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="a label for PodMonitor and PrometheusRule, such as release=kube-prometheus-stack; may be repeated",
    )
    command.add_argument("--namespace", metavar="NAME", help="the namespace of the manifests, where the trainers run")


def _assets(options: argparse.Namespace) -> int:
    from esper_telemetry.assets.filling import runbooks
    from esper_telemetry.assets.writing import write

    try:
        site = Site(
            grafana=options.grafana_url,
            alertmanager=options.alertmanager_url,
            runbooks=options.runbook_url,
            labels=_labels(options.label),
            namespace=options.namespace,
        )
        written = write(options.folder, site)
    except ValueError as error:
        print(f"esper assets: {error}", file=sys.stderr)
        return EXIT_USAGE
    except OSError as error:
        print(f"esper assets: {error.filename or options.folder}: {error.strerror}", file=sys.stderr)
        return EXIT_USAGE
    folder = options.folder.absolute()
    where = {"grafana": site.grafana, "runbooks": runbooks(site, folder), "alertmanager": site.alertmanager}
    print(_NEXT.format(count=len(written), folder=folder, **where))
    return 0


def _labels(given: list[str]) -> dict[str, str]:
    labels: dict[str, str] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--label: expected KEY=VALUE, got {text!r}")
        if key in labels:
            raise ValueError(f"--label: {key} is given twice")
        labels[key] = value
    return labels
