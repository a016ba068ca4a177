"""What differs from one installation to the next."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

OWN_LABEL = "app.kubernetes.io/name"
_URL = re.compile(r"https?://[\w.~:/@%+\[\]-]*[\w/~\]-]", re.ASCII)  # needs quotes neither in YAML nor in a template
_DNS_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_NAME = r"[A-Za-z0-9](?:[\w.-]{0,61}[A-Za-z0-9])?"
_NAMESPACE = re.compile(_DNS_LABEL)
_LABEL_KEY = re.compile(rf"(?:{_DNS_LABEL}(?:\.{_DNS_LABEL})*/)?{_NAME}", re.ASCII)
_LABEL_VALUE = re.compile(rf"(?:{_NAME})?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Site:
    """Hold a site's own addresses, and what its cluster requires of manifests.

    Raise a ValueError that begins with the option at fault.

    grafana, alertmanager: where links lead.
    runbooks: where the pages are served; None is the files that are written.
    labels: of PodMonitor and PrometheusRule, such as those by which the Prometheus Operator selects.
    namespace: of every manifest; None leaves it to kubectl.
    """

    grafana: str = "http://127.0.0.1:3000"
    alertmanager: str = "http://127.0.0.1:9093"
    runbooks: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    namespace: str | None = None

    def __post_init__(self) -> None:
        for option, url in (
            ("--grafana-url", self.grafana),
            ("--alertmanager-url", self.alertmanager),
            ("--runbook-url", self.runbooks),
        ):
            if url is not None and not _is_url(url):
                raise ValueError(f"{option}: expected a URL such as https://grafana.my.org, got {url!r}")
        for key, value in self.labels.items():
            _check_label(key, value)
        if self.namespace is not None and not _NAMESPACE.fullmatch(self.namespace):
            raise ValueError(f"--namespace: expected a name such as monitoring, got {self.namespace!r}")


def _check_label(key: str, value: str) -> None:
    if not (_LABEL_KEY.fullmatch(key) and _LABEL_VALUE.fullmatch(value)):
        raise ValueError(f"--label: expected a label such as release=kube-prometheus-stack, got {f'{key}={value}'!r}")
    if key == OWN_LABEL:
        raise ValueError(f"--label: {OWN_LABEL} is already set to esper-telemetry")


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return bool(_URL.fullmatch(text) and parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False
