"""The dashboard: built by code, committed as JSON, provisioned into Grafana."""
