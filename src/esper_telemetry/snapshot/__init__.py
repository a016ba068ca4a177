"""What every reader sees: frozen, plain data, replaced as a whole by the next check. No torch."""

from esper_telemetry.snapshot.snapshot import KindHistory, RunInfo, Snapshot

__all__ = ["KindHistory", "RunInfo", "Snapshot"]
