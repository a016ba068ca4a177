"""OpenTelemetry: push a snapshot over OTLP."""

from esper_telemetry.exporters.otlp.exporter import OtlpExporter, start_otlp

__all__ = ["OtlpExporter", "start_otlp"]
