"""Samples as OpenTelemetry's data points.

The points are made here and not by the SDK's observable instruments, which refuse every value that is not finite: the
norm of a bad gradient would be left out, and the last finite one would stay in Prometheus for five more minutes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import version

from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.metrics.export import Metric as Instrument
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from esper_telemetry.exporters.otlp.sdk_log import SdkLog
from esper_telemetry.exporters.otlp.variables import logger
from esper_telemetry.exporters.samples import Sample
from esper_telemetry.metrics import Metric
from esper_telemetry.snapshot import RunInfo

_SCOPE = InstrumentationScope("esper-telemetry", version("esper-telemetry"))


def dotted(metric: Metric) -> str:
    """Return the metric's name in OpenTelemetry; on the way back `.` becomes `_`, and a counter gets its `_total`."""
    return metric.name.replace("esper_", "esper.", 1).removesuffix("_total")


def resource_of(run: RunInfo) -> Resource:
    """Describe the run; what OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME say comes first.

    An instance is RUN:RANK, as a scraped one is HOST:PORT: the rules take the part before the colon as the run.
    """
    of_run: Mapping[str, str] = {
        "service.name": "esper-telemetry",
        "service.namespace": "esper",
        "service.version": version("esper-telemetry"),
        "service.instance.id": f"{run.run_id}:{run.rank}",
        "host.name": run.host,
    }
    troubles: list[str] = []
    with SdkLog(troubles.append, of_all_threads=True):
        said = OTELResourceDetector().detect()
        resource = Resource.create(of_run).merge(said)
    for trouble in dict.fromkeys(troubles):  # it has read them twice
        logger.warning("esper: OTEL_RESOURCE_ATTRIBUTES: %s", trouble)
    instance = said.attributes.get("service.instance.id")
    if instance is None or run.world_size == 1:
        return resource
    return resource.merge(Resource({"service.instance.id": f"{instance}:{run.rank}"}))  # ranks share the environment


def metrics_data(
    resource: Resource,
    samples: Iterable[Sample],
    started: int,
    now: int,
    before: Mapping[tuple[Metric, tuple[str, ...]], float] | None,
) -> MetricsData:
    """Put samples together.

    started, now: when counting began, and when it was read, in nanoseconds since 1970.
    before: what has arrived already, up to `started`; counters are then the difference to it. None: they are sums.
    """
    points: dict[Metric, list[NumberDataPoint]] = {}
    for metric, labels, value in samples:
        attributes = dict(zip(metric.labels, labels, strict=True))
        counts = metric.type == "counter"
        value = value - (before or {}).get((metric, labels), 0) if counts else +value  # +True is an int, 1
        points.setdefault(metric, []).append(NumberDataPoint(attributes, started if counts else 0, now, value))
    temporality = AggregationTemporality.CUMULATIVE if before is None else AggregationTemporality.DELTA
    instruments = [_instrument(metric, of_metric, temporality) for metric, of_metric in points.items()]
    return MetricsData([ResourceMetrics(resource, [ScopeMetrics(_SCOPE, instruments, "")], "")])


def _instrument(metric: Metric, points: list[NumberDataPoint], temporality: AggregationTemporality) -> Instrument:
    unit = "" if metric.unit == "1" else metric.unit  # Prometheus would add `_ratio` to a gauge's name
    data: Gauge | Sum = Gauge(points)
    if metric.type == "counter":
        data = Sum(points, temporality, is_monotonic=True)
    return Instrument(dotted(metric), metric.help, unit, data)
