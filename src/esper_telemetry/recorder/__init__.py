"""The flight recorder: the checks before trouble, in a file, and how to show them. Reading a file needs no torch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esper_telemetry.recorder.recorder import BatchId, FlightRecorder

__all__ = ["BatchId", "FlightRecorder"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from esper_telemetry.recorder import recorder

    return getattr(recorder, name)
