"""Send a snapshot over OTLP, through OpenTelemetry's own exporter."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from esper_telemetry import metrics
from esper_telemetry.exporters.otlp.environment import Settings
from esper_telemetry.exporters.otlp.sdk_log import SdkLog
from esper_telemetry.exporters.otlp.variables import logger
from esper_telemetry.exporters.samples import Sample, Source, read_samples
from esper_telemetry.exporters.urls import is_loopback, without_secrets
from esper_telemetry.metrics import Metric

try:
    import requests
    from opentelemetry.exporter.otlp.proto.http import Compression
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.sdk.metrics.export import MetricExportResult
    from requests.utils import select_proxy

    from esper_telemetry.exporters.otlp.points import metrics_data, resource_of
except ImportError as error:
    raise ImportError("OpenTelemetry's exporter is not installed: pip install 'esper-telemetry[otlp]'") from error


class OtlpSender:
    """Send what a source's snapshot shows at each `send()`, from one thread.

    failures: how many sends failed; it is itself sent, as is the number of snapshots that could not be read.
    trouble: what went wrong in the last send so far; None if nothing did.
    """

    def __init__(self, source: Source, settings: Settings) -> None:
        self.failures = 0
        self.trouble: str | None = None
        self._source = source
        self._settings = settings
        self._resource = resource_of(source.snapshot.run)
        self._exporter = self._new_exporter(settings.timeout)
        self._started = time.time_ns()
        self._shown: set[tuple[Metric, tuple[str, ...]]] = set()
        self._counted: dict[tuple[Metric, tuple[str, ...]], float] | None = {} if settings.delta else None
        self._errors = 0

    def send(self, timeout: float | None = None) -> None:
        """Send once, with the SDK's retries.

        timeout: seconds, in place of what the settings say.
        """
        self.trouble = None
        now = time.time_ns()
        samples: list[Sample] = []
        try:
            exporter = self._exporter if timeout is None else self._new_exporter(timeout)
            samples = self._samples()
            with SdkLog(self._fail):
                result = exporter.export(metrics_data(self._resource, samples, self._started, now, self._counted))
        except Exception as error:
            self._fail(repr(error))
            result = MetricExportResult.FAILURE
        if result is MetricExportResult.SUCCESS:
            self._keep(samples, now)
            self.trouble = None
        else:
            self.failures += 1
            if self.trouble is None:
                self._fail("no reason given")

    def interrupt(self) -> None:
        """End a wait before a retry; from here on every `send()` needs a timeout of its own."""
        self._exporter.shutdown()

    def _keep(self, arrived: list[Sample], now: int) -> None:
        self._shown = {(metric, labels) for metric, labels, value in arrived if value == value}
        if self._counted is not None:
            self._counted |= {(metric, labels): value for metric, labels, value in arrived if metric.type == "counter"}
            self._started = now

    def _fail(self, reason: str) -> None:
        self.trouble = self.trouble or reason  # the first is the one to tell
        logger.debug("esper: a try to push: %s", reason)

    def _new_exporter(self, timeout: float) -> OTLPMetricExporter:
        settings = self._settings
        with SdkLog(lambda _: None):  # the settings have told
            return OTLPMetricExporter(
                settings.url,
                certificate_file=settings.ca_file,
                client_key_file=settings.client_key,
                client_certificate_file=settings.client_certificate,
                headers=dict(settings.headers),
                timeout=timeout,
                compression=Compression(settings.compression),
                session=_Session(self._fail),
            )

    def _samples(self) -> list[Sample]:
        samples = [*self._read(), *self._own()]
        # A scraper marks a series that is gone as stale. Over OTLP its last value would stay for five more minutes.
        gone = self._shown - {(metric, labels) for metric, labels, _ in samples}
        if self._counted is not None:  # a delta does not stay
            gone -= self._counted.keys()
        return [*samples, *(Sample(metric, labels, math.nan) for metric, labels in gone)]

    def _read(self) -> list[Sample]:
        try:
            return list(read_samples(self._source.snapshot))
        except Exception:
            if self._errors == 0:
                logger.exception("esper: the snapshot could not be read; later failures are counted, not logged")
            self._errors += 1
            return []

    def _own(self) -> Iterator[Sample]:
        yield Sample(metrics.COLLECT_ERRORS, (), self._errors)
        yield Sample(metrics.OTLP_EXPORT_FAILURES, (), self.failures)


class _Session(requests.Session):
    """Ask loopback directly, trust whom the settings name, and take no redirection for a delivery."""

    def __init__(self, fail: Callable[[str], None]) -> None:
        super().__init__()
        self._fail = fail

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        proxy = select_proxy(request.url or "", options.get("proxies"))
        by = f" through the proxy {without_secrets(proxy)}" if proxy else ""
        try:
            response = super().send(request, **options)
            if 300 <= response.status_code < 400:
                place = response.headers.get("Location", "nowhere")
                raise requests.RequestException(f"it answered {response.status_code}, moved to {place}")
        except Exception as error:
            self._fail(f"{_root(error)}{by}")
            raise
        if proxy and not response.ok:
            self._fail(f"it answered {response.status_code}{by}")
        return response

    def merge_environment_settings(self, url: Any, proxies: Any, stream: Any, verify: Any, cert: Any) -> dict[str, Any]:
        # Not REQUESTS_CA_BUNDLE; and to older releases an empty OTEL_EXPORTER_OTLP_CERTIFICATE is trust in everybody.
        verify = (self.verify if verify is None else verify) or True
        settings = super().merge_environment_settings(url, proxies, stream, verify, cert)
        return settings | {"proxies": {}} if is_loopback(url) else settings


def _root(error: BaseException) -> BaseException:
    """Return the root cause: `[Errno 111] Connection refused` rather than four layers of wrapping."""
    while error.__context__ is not None:
        error = error.__context__
    return error
