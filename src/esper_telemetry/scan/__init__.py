"""Counting kernels behind one function."""

from esper_telemetry.scan.clip import ClipScan
from esper_telemetry.scan.dispatch import Scanner, scan
from esper_telemetry.scan.result import PendingScan, Scan, total_norm
from esper_telemetry.scan.statistics import collect_per_layer_gradients, describe, with_dead_and_exploding

__all__ = [
    "ClipScan",
    "PendingScan",
    "Scan",
    "Scanner",
    "collect_per_layer_gradients",
    "describe",
    "scan",
    "total_norm",
    "with_dead_and_exploding",
]
