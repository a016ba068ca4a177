"""The `esper` command."""

from esper_telemetry.cli.main import main

__all__ = ["main"]
