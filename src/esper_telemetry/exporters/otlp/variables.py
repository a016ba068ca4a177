"""How one of OpenTelemetry's variables is read.

An empty one counts as unset. An invalid number or file is refused at start-up; an unknown word is logged and ignored,
as OpenTelemetry's specification asks.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence

logger = logging.getLogger("esper_telemetry.otlp")


def of_metrics(name: str) -> tuple[str, str]:
    """Return a setting of the exporter after the variable that says it: the one for metrics, or the one for all."""
    special, common = f"OTEL_EXPORTER_OTLP_METRICS_{name}", f"OTEL_EXPORTER_OTLP_{name}"
    return next(
        ((variable, text) for variable in (special, common) if (text := os.environ.get(variable))), (common, "")
    )


def milliseconds(variable: str, default: float, zero: float | None = None) -> float:
    """Return a number of milliseconds; `zero` is what 0 means, if it means anything special.

    Raise ValueError on anything else.
    """
    text = os.environ.get(variable)
    if not text:
        return default
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if number == 0 and zero is not None:
        return zero
    if not 0 < number < math.inf:
        expected = "above 0" if zero is None else "of at least 0"
        raise ValueError(f"{variable}: expected milliseconds {expected}, got {text!r}")
    return number


def word(variable: str, known: Sequence[str]) -> str | None:
    """Return which of the known words a variable says."""
    return next(_known(variable, [os.environ.get(variable, "")], known), None)


def words(variable: str, known: Sequence[str]) -> list[str]:
    """Return the known words of a list with commas."""
    return list(_known(variable, os.environ.get(variable, "").split(","), known))


def file(variable: str, path: str) -> str | None:
    """Return the path of a file; raise ValueError where it cannot be read."""
    if not path:
        return None
    try:
        with open(path, "rb"):
            return path
    except OSError as error:
        raise ValueError(f"{variable}: expected a readable file, got {path!r}: {error.strerror}") from None


def _known(variable: str, said: Sequence[str], known: Sequence[str]) -> Iterator[str]:
    for text in said:
        if (lower := text.strip().lower()) in known:
            yield lower
        elif lower:
            logger.warning("esper: %s: expected %s; %r is ignored", variable, " or ".join(known), text.strip())
