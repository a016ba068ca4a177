"""Prometheus: a collector over a snapshot, for any registry."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from inspect import getattr_static
from itertools import chain

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from esper_telemetry import arguments, metrics
from esper_telemetry.exporters.samples import Sample, Source, read_samples
from esper_telemetry.metrics import Metric

logger = logging.getLogger("esper_telemetry")

Family = CounterMetricFamily | GaugeMetricFamily


class EsperCollector(Collector):
    """Collect a monitor's snapshot at each scrape.

    In your own registry: `REGISTRY.register(EsperCollector(monitor))`. A snapshot that cannot be read is counted in
    `esper_exporter_collect_errors_total`; it never raises.

    labels: added to every series, for when neither a scrape nor a resource identifies the run.
    more: returns samples that are not from the snapshot.
    """

    def __init__(
        self,
        source: Source,
        *,
        labels: Mapping[str, str] | None = None,
        more: Callable[[], Iterable[Sample]] = tuple,
    ) -> None:
        if getattr_static(source, "snapshot", None) is None:  # read at each scrape, not here
            raise arguments.no_monitor("source", source)
        self._source = source
        self._labels = labels or {}
        self._more = more
        self._errors = 0

    def describe(self) -> Iterable[Family]:
        """Return the families without samples, so that registering does not collect."""
        return [_family(metric) for metric in metrics.METRICS]

    def collect(self) -> Iterator[Family]:
        """Build the families from the current snapshot."""
        try:
            families = self._families(chain(read_samples(self._source.snapshot), self._more()))
        except Exception:
            self.fail()
            families = []
        yield from families
        yield from self._families([Sample(metrics.COLLECT_ERRORS, (), self._errors)])

    def fail(self) -> None:
        """Count the exception at hand, and log it when it is the first."""
        if self._errors == 0:
            logger.exception("esper: no page could be built; later failures are counted, not logged")
        self._errors += 1

    def _families(self, samples: Iterable[Sample]) -> list[Family]:
        families: dict[str, Family] = {}
        for metric, labels, value in samples:
            if metric.name not in families:
                families[metric.name] = _family(metric)
            named = {**self._labels, **dict(zip(metric.labels, labels, strict=True))}
            families[metric.name].add_sample(metric.name, named, value)
        return list(families.values())


def _family(metric: Metric) -> Family:
    family = CounterMetricFamily if metric.type == "counter" else GaugeMetricFamily
    return family(metric.name, metric.help, labels=metric.labels)
