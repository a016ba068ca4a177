"""OpenTelemetry's standard variables, as far as its own exporter does not read them, or says too late what is wrong."""

from __future__ import annotations

import math
import os
from urllib.parse import urlsplit, urlunsplit

DEFAULT_ENDPOINT = "http://localhost:4318"
INTERVAL_SECONDS = 15.0

_PATH = "/v1/metrics"
_FILES = ("CERTIFICATE", "CLIENT_CERTIFICATE", "CLIENT_KEY")


def metrics_url(endpoint: str | None) -> str:
    """Return the URL to push to: `endpoint`, or what the environment says, or http://localhost:4318.

    A base such as http://localhost:4318 gets the path /v1/metrics, but for OTEL_EXPORTER_OTLP_METRICS_ENDPOINT, which
    is taken as it is. Raise ValueError on what is no URL.
    """
    if endpoint is not None:
        return _with_path(_checked("endpoint", endpoint))
    if exact := os.environ.get("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"):
        return _checked("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", exact)
    base = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or DEFAULT_ENDPOINT
    return _with_path(_checked("OTEL_EXPORTER_OTLP_ENDPOINT", base))


def without_secrets(url: str) -> str:
    """Return a URL without its user, password and query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def interval_seconds() -> float:
    """Return the time between two pushes: OTEL_METRIC_EXPORT_INTERVAL, in milliseconds, or 15 s."""
    text = os.environ.get("OTEL_METRIC_EXPORT_INTERVAL")
    if not text:
        return INTERVAL_SECONDS
    try:
        milliseconds = float(text)
    except ValueError:
        milliseconds = math.nan
    if not 0 < milliseconds < math.inf:
        raise ValueError(f"OTEL_METRIC_EXPORT_INTERVAL: expected milliseconds above 0, got {text!r}")
    return milliseconds / 1000


def check_environment() -> None:
    """Raise ValueError on another protocol than http/protobuf, and on a certificate or key that cannot be read."""
    for signal in ("METRICS_", ""):
        name = f"OTEL_EXPORTER_OTLP_{signal}PROTOCOL"
        if protocol := os.environ.get(name):
            if protocol != "http/protobuf":
                raise ValueError(f"{name}: expected http/protobuf, got {protocol!r}")
            break
    for name in (f"OTEL_EXPORTER_OTLP_{signal}{file}" for signal in ("METRICS_", "") for file in _FILES):
        if path := os.environ.get(name):
            _check_file(name, path)


def _with_path(base: str) -> str:
    parts = urlsplit(base)
    path = parts.path.rstrip("/").removesuffix(_PATH) + _PATH
    return urlunsplit(parts._replace(path=path))


def _checked(name: str, url: str) -> str:
    try:
        parts = urlsplit(url)
        right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is none
        right = False
    if not right or not url.isprintable() or " " in url:
        raise ValueError(f"{name}: expected a URL such as {DEFAULT_ENDPOINT}, got {url!r}")
    return url


def _check_file(name: str, path: str) -> None:
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise ValueError(f"{name}: expected a file that can be read, got {path!r}: {error.strerror}") from None
