"""Tell people without Prometheus."""

from esper_telemetry.notify.webhook import Webhook, webhook

__all__ = ["Webhook", "webhook"]
