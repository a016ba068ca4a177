"""Manifests for the Prometheus Operator."""
