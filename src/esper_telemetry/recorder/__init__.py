"""The flight recorder: what stood before trouble, in a file, and how it is shown."""

from esper_telemetry.recorder.recorder import BatchId, FlightRecorder

__all__ = ["BatchId", "FlightRecorder"]
