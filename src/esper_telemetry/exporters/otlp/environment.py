"""What OpenTelemetry's standard variables say of pushing metrics; docs/opentelemetry.md goes through the list.

They are read here and handed to OpenTelemetry's own exporter, whose releases differ in what they read of them.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit, urlunsplit

from esper_telemetry import arguments
from esper_telemetry.exporters.otlp.variables import file, logger, milliseconds, of_metrics, word, words

DEFAULT_ENDPOINT = "http://localhost:4318"
INTERVAL_SECONDS = 15.0

_PATH = "/v1/metrics"
_FOREVER = 2.0**31
_SURELY_SECONDS = 100  # so few milliseconds were meant as the seconds that OpenTelemetry's Python takes them for
_HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]+=[ -~]*")
_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
    "none": logging.CRITICAL + 1,
}


@dataclass(frozen=True, slots=True)
class Settings:
    """Hold how to push.

    interval, timeout: seconds from the start of a push to the next, and for one push with its retries.
    delta: push counters as the difference to what has arrived, not as their sum.
    """

    url: str
    interval: float
    timeout: float
    headers: Mapping[str, str]
    compression: str
    ca_file: str | None
    client_certificate: str | None
    client_key: str | None
    delta: bool


def read_settings(endpoint: str | None) -> Settings:
    """Return how to push, to `endpoint` if one is given.

    Raise ValueError that begins with the variable, or with `endpoint`, when one is invalid.
    """
    protocol_variable, protocol = of_metrics("PROTOCOL")
    if protocol.strip().lower() not in ("", "http/protobuf"):
        raise ValueError(f"{protocol_variable}: expected http/protobuf, got {protocol!r}")
    settings = Settings(
        url=metrics_url(endpoint),
        interval=milliseconds("OTEL_METRIC_EXPORT_INTERVAL", INTERVAL_SECONDS * 1000) / 1000,
        timeout=_timeout_seconds(),
        headers=_headers(*of_metrics("HEADERS")),
        compression=word(of_metrics("COMPRESSION")[0], ("gzip", "deflate", "none")) or "none",
        ca_file=file(*of_metrics("CERTIFICATE")),
        client_certificate=file(*of_metrics("CLIENT_CERTIFICATE")),
        client_key=file(*of_metrics("CLIENT_KEY")),
        delta=word("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", ("cumulative", "delta", "lowmemory"))
        == "delta",
    )
    if settings.client_key is not None and settings.client_certificate is None:
        variable, _ = of_metrics("CLIENT_KEY")
        raise ValueError(f"{variable}: expected {variable.replace('KEY', 'CERTIFICATE')} too")
    _say_what_is_not_obeyed()
    return settings


def read_silence() -> str | None:
    """Return why nothing should be pushed; None if it should."""
    if word("OTEL_SDK_DISABLED", ("true", "false")) == "true":
        return "OTEL_SDK_DISABLED is true"
    exporters = words("OTEL_METRICS_EXPORTER", ("otlp", "prometheus", "console", "none"))
    if exporters and "otlp" not in exporters:
        return f"OTEL_METRICS_EXPORTER is {','.join(exporters)}"
    if "console" in exporters:
        logger.warning("esper: OTEL_METRICS_EXPORTER: esper pushes over OTLP and prints nothing to the console")
    return None


def set_log_level() -> None:
    """Log about pushing as loudly as OTEL_LOG_LEVEL says."""
    if level := word("OTEL_LOG_LEVEL", tuple(_LEVELS)):
        logger.setLevel(_LEVELS[level])


def metrics_url(endpoint: str | None) -> str:
    """Return the URL to push to: `endpoint`, or what the environment says, or http://localhost:4318.

    A base such as http://localhost:4318 gets the path /v1/metrics, but for OTEL_EXPORTER_OTLP_METRICS_ENDPOINT, which
    is used as it is. Raise ValueError if it is not a URL.
    """
    if endpoint is not None:
        return _with_path(_checked("endpoint", endpoint))
    if exact := os.environ.get("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"):
        return _checked("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", exact)
    base = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or DEFAULT_ENDPOINT
    return _with_path(_checked("OTEL_EXPORTER_OTLP_ENDPOINT", base))


def _timeout_seconds() -> float:
    variable, text = of_metrics("TIMEOUT")
    push = milliseconds(variable, 10_000, zero=_FOREVER)
    if text and push < _SURELY_SECONDS:
        logger.warning("esper: %s is in milliseconds; a push times out after %g s", variable, push / 1000)
    return min(push, milliseconds("OTEL_METRIC_EXPORT_TIMEOUT", 30_000, zero=_FOREVER)) / 1000


def _headers(variable: str, text: str) -> Mapping[str, str]:
    headers = {}
    for pair in filter(None, map(str.strip, text.split(","))):
        name, _, value = pair.partition("=")
        header = f"{unquote(name).strip().lower()}={unquote(value).strip()}"
        if "=" not in pair or not _HEADER.fullmatch(header):  # which is not shown: it may be a secret
            raise ValueError(f"{variable}: expected key=value,key=value, got something else")
        name, _, headers[name] = header.partition("=")
    return headers


def _say_what_is_not_obeyed() -> None:
    word(
        "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION",  # of which there are none
        ("explicit_bucket_histogram", "base2_exponential_bucket_histogram"),
    )
    if word("OTEL_METRICS_EXEMPLAR_FILTER", ("always_on", "always_off", "trace_based")) == "always_on":
        logger.warning("esper: OTEL_METRICS_EXEMPLAR_FILTER: esper pushes no exemplars")
    for variable in ("OTEL_CONFIG_FILE", "OTEL_EXPERIMENTAL_CONFIG_FILE"):
        if os.environ.get(variable):
            logger.warning("esper: %s is not supported; the other variables still apply", variable)


def _with_path(base: str) -> str:
    parts = urlsplit(base)
    path = parts.path.rstrip("/").removesuffix(_PATH) + _PATH
    return urlunsplit(parts._replace(path=path))


def _checked(name: str, url: str) -> str:
    if not isinstance(url, str):
        raise ValueError(f"{name}: expected a URL such as {DEFAULT_ENDPOINT}, got {arguments.shown(url)}")
    try:
        parts = urlsplit(url)
        right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # an invalid port
        right = False
    if not right or not url.isprintable() or " " in url:
        raise ValueError(f"{name}: expected a URL such as {DEFAULT_ENDPOINT}, got {url!r}")
    return url
