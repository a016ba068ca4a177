"""Fill in a site's own values: every placeholder address, every path, and the metadata of manifests."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import urlsplit

from esper_telemetry.assets.site import OWN_LABEL, Site

PLACEHOLDERS = {  # as in deploy/addresses.yml
    "grafana": "https://grafana.example.com",
    "runbooks": "https://runbooks.example.com",
    "alertmanager": "https://alertmanager.example.com",
}
_METADATA = f"metadata:\n  name: esper\n  labels:\n    {OWN_LABEL}: esper-telemetry\n"
_KUSTOMIZATION = "kind: Kustomization\n"


def filled(name: str, text: str, site: Site, folder: Path) -> str:
    """Return the text of the file `name` as it will stand below `folder`."""
    addresses = {
        "grafana": site.grafana.rstrip("/"),
        "runbooks": runbooks(site, folder),
        "alertmanager": site.alertmanager.rstrip("/"),
    }
    for whose, placeholder in PLACEHOLDERS.items():
        text = text.replace(placeholder, addresses[whose])
    if name.startswith("deploy/kubernetes/"):
        return _in_cluster(text, site)
    for old, new in _local(name, site, folder).items():
        text = text.replace(old, new)
    return text


def runbooks(site: Site, folder: Path) -> str:
    """Return where runbooks are: the site's address, or the files that are written."""
    return (folder / "alerts" / "runbooks").as_uri() if site.runbooks is None else site.runbooks.rstrip("/")


def _in_cluster(text: str, site: Site) -> str:
    namespace = "" if site.namespace is None else f"namespace: {site.namespace}\n"
    labels = "".join(f'    {key}: "{value}"\n' for key, value in site.labels.items())
    metadata = _METADATA.replace("  labels:\n", f"  {namespace}  labels:\n" if namespace else "  labels:\n")
    return text.replace(_METADATA, metadata + labels).replace(_KUSTOMIZATION, _KUSTOMIZATION + namespace)


def _local(name: str, site: Site, folder: Path) -> dict[str, str]:
    """Return what stands for a container in these files, and what it is on a host."""
    if name.startswith("grafana/provisioning/"):
        return {
            "/var/lib/grafana/dashboards": json.dumps(str(folder / "grafana" / "dashboards")),
            "http://prometheus:9090": "http://127.0.0.1:9090",
            "http://alertmanager:9093": site.alertmanager.rstrip("/"),
        }
    if name == "deploy/prometheus/prometheus.yml":
        return {"    - static_configs:\n        - targets: [alertmanager:9093]\n": _alertmanager(site)}
    if name.startswith("deploy/prometheus/targets/"):
        return {"trainer:19301": "127.0.0.1:19301"}
    return {}


def _alertmanager(site: Site) -> str:
    """Return how Prometheus is told where Alertmanager is."""
    url = urlsplit(site.alertmanager.rstrip("/"))
    host = url.netloc if url.port else f"{url.netloc}:{443 if url.scheme == 'https' else 80}"
    prefix = f"      path_prefix: {url.path}\n" if url.path else ""
    return f"    - scheme: {url.scheme}\n{prefix}      static_configs:\n        - targets: ['{host}']\n"
