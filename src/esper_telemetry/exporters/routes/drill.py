"""A fire drill: made-up values that say so in a label of their own, from the page to the pager."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from urllib.parse import parse_qs

from esper_telemetry import metrics
from esper_telemetry.exporters.samples import Sample
from esper_telemetry.metrics import KINDS

MAX_SECONDS = 900.0
LABEL = "drill"

_RECENT_MAX = {"inf": metrics.INF_GRAD_RECENT_MAX, "nan": metrics.NAN_GRAD_RECENT_MAX}


@dataclass(frozen=True, slots=True)
class Drill:
    """Hold a made-up bad check; it ends by itself at `until`, in monotonic seconds."""

    kind: str
    count: int
    timestamp: float
    until: float

    @classmethod
    def parse(cls, query: str) -> Drill:
        """Read kind=inf|nan&count=N&seconds=S; raise ValueError on anything else."""
        given = {name: values[-1] for name, values in parse_qs(query).items()}
        kind, count, seconds = given.get("kind", ""), given.get("count", ""), given.get("seconds", "")
        if kind not in KINDS or not count.isdecimal() or not seconds.isdecimal():
            raise ValueError(f"expected kind=inf|nan&count=N&seconds=S, got {query!r}")
        if not 1 <= int(count) <= 2**53 or not 1 <= int(seconds) <= MAX_SECONDS:
            raise ValueError(f"expected a count of at least 1 and 1 to {MAX_SECONDS:.0f} seconds, got {query!r}")
        return cls(kind, int(count), time.time(), time.monotonic() + int(seconds))

    def samples(self) -> Iterator[Sample]:
        """Yield the made-up samples while the drill lasts."""
        if time.monotonic() < self.until:
            for metric, labels, value in (
                (_RECENT_MAX[self.kind], (), self.count),
                (metrics.LAST_NONFINITE, (self.kind,), self.timestamp),
            ):
                yield Sample(replace(metric, labels=(*metric.labels, LABEL)), (*labels, "true"), value)
