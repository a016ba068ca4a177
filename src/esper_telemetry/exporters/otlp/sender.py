"""Send a snapshot over OTLP, through OpenTelemetry's own exporter."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from esper_telemetry import metrics
from esper_telemetry.exporters.otlp.environment import check_environment
from esper_telemetry.exporters.samples import Sample, Source, read_samples
from esper_telemetry.metrics import Metric

try:
    import requests
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.sdk.metrics.export import MetricExportResult

    from esper_telemetry.exporters.otlp.points import metrics_data, resource_of
except ImportError as error:
    raise ImportError("OpenTelemetry's exporter is not installed: pip install 'esper-telemetry[otlp]'") from error

logger = logging.getLogger("esper_telemetry")

_sdk_logger = logging.getLogger("opentelemetry.exporter.otlp.proto.http.metric_exporter")


class OtlpSender:
    """Send what a source's snapshot shows at each `send()`, from one thread.

    failures: how often that failed. It is sent itself, as is the number of snapshots that could not be read.
    trouble: what went wrong with the last one, as far as it has got; None if nothing did.
    """

    def __init__(self, source: Source, url: str) -> None:
        check_environment()
        self.failures = 0
        self.trouble: str | None = None
        self._source = source
        self._url = url
        self._resource = resource_of(source.snapshot.run)
        self._exporter = self._new_exporter()
        self._started = time.time_ns()
        self._shown: set[tuple[Metric, tuple[str, ...]]] = set()
        self._errors = 0

    def send(self, timeout: float | None = None) -> None:
        """Send once, with the SDK's retries.

        timeout: seconds, in place of what the environment says.
        """
        self.trouble = None
        with _SdkLog(self._fail):
            try:
                exporter = self._exporter if timeout is None else self._new_exporter(timeout)
                samples = self._samples()
                arrived = exporter.export(metrics_data(self._resource, samples, self._started))
            except Exception as error:
                self._fail(repr(error))
                arrived = MetricExportResult.FAILURE
        if arrived is MetricExportResult.SUCCESS:
            self._shown = {(metric, labels) for metric, labels, value in samples if value == value}
            self.trouble = None
        else:
            self.failures += 1
            self._fail("no reason given")

    def interrupt(self) -> None:
        """End a wait before a retry; from here on every `send()` needs a timeout of its own."""
        self._exporter.shutdown()

    def _fail(self, reason: str) -> None:
        self.trouble = self.trouble or reason  # the first is the one to tell

    def _new_exporter(self, timeout: float | None = None) -> OTLPMetricExporter:
        return OTLPMetricExporter(self._url, timeout=timeout, session=_Session(self._fail))

    def _samples(self) -> list[Sample]:
        samples = [*self._read(), *self._own()]
        # A scraper marks a series that is gone as stale. Over OTLP its last value would stand for five minutes more.
        gone = self._shown.difference((metric, labels) for metric, labels, _ in samples)
        return [*samples, *(Sample(metric, labels, math.nan) for metric, labels in gone)]

    def _read(self) -> list[Sample]:
        try:
            return list(read_samples(self._source.snapshot))
        except Exception:
            if self._errors == 0:
                logger.exception("esper: the snapshot could not be read; this is counted and not logged again")
            self._errors += 1
            return []

    def _own(self) -> Iterator[Sample]:
        yield Sample(metrics.COLLECT_ERRORS, (), self._errors)
        yield Sample(metrics.OTLP_EXPORT_FAILURES, (), self.failures)


class _Session(requests.Session):
    """Prefer OTEL_EXPORTER_OTLP_CERTIFICATE to REQUESTS_CA_BUNDLE, and see that a redirection is no delivery."""

    def __init__(self, fail: Callable[[str], None]) -> None:
        super().__init__()
        self._fail = fail

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        try:
            response = super().send(request, **options)
            if 300 <= response.status_code < 400:
                place = response.headers.get("Location", "nowhere")
                raise requests.RequestException(f"it answered {response.status_code}, moved to {place}")
        except Exception as error:
            self._fail(str(_root(error)))
            raise
        return response

    def merge_environment_settings(self, url: Any, proxies: Any, stream: Any, verify: Any, cert: Any) -> dict[str, Any]:
        verify = self.verify if verify is None else verify
        return super().merge_environment_settings(url, proxies, stream, verify, cert)


class _SdkLog(logging.Filter):
    """Keep what the SDK logs in this thread, which is every try, to ourselves."""

    def __init__(self, fail: Callable[[str], None]) -> None:
        super().__init__()
        self._fail = fail
        self._thread = threading.get_ident()

    def __enter__(self) -> None:
        _sdk_logger.addFilter(self)

    def __exit__(self, *_: object) -> None:
        _sdk_logger.removeFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        if record.thread != self._thread:
            return True
        self._fail(record.getMessage())
        return False


def _root(error: BaseException) -> BaseException:
    """Return what began it: `[Errno 111] Connection refused` rather than what four layers made of it."""
    while error.__context__ is not None:
        error = error.__context__
    return error
