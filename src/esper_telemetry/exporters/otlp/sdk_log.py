"""What OpenTelemetry logs while we call it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

_LOGGERS = (
    "opentelemetry.exporter.otlp.proto.http.metric_exporter",
    "opentelemetry.exporter.otlp.common._aggregation",
    "opentelemetry.exporter.otlp.proto.common._internal.metrics_encoder",  # where it was before
    "opentelemetry.sdk.resources",
)


class SdkLog(logging.Filter):
    """Pass what OpenTelemetry logs in this thread to `tell`, and keep it from every other handler.

    It logs every attempt to push, and an invalid variable each time it reads one.

    of_all_threads: for when it starts its own threads to read them.
    """

    def __init__(self, tell: Callable[[str], object], *, of_all_threads: bool = False) -> None:
        super().__init__()
        self._tell = tell
        self._thread = None if of_all_threads else threading.get_ident()

    def __enter__(self) -> None:
        for name in _LOGGERS:
            logging.getLogger(name).addFilter(self)

    def __exit__(self, *_: object) -> None:
        for name in _LOGGERS:
            logging.getLogger(name).removeFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """Take a record, so that no other handler sees it."""
        if self._thread not in (None, record.thread):
            return True
        self._tell(record.getMessage())
        return False
