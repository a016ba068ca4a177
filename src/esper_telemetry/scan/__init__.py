"""Counting kernels behind one function."""

from esper_telemetry.scan.clip import ClipScan
from esper_telemetry.scan.dispatch import Scanner, scan
from esper_telemetry.scan.early import with_early
from esper_telemetry.scan.elements import BadElement, first_bad_elements
from esper_telemetry.scan.result import PendingScan, Scan
from esper_telemetry.scan.statistics import collect_per_layer_gradients, describe, find_dead_and_exploding

__all__ = [
    "BadElement",
    "ClipScan",
    "PendingScan",
    "Scan",
    "Scanner",
    "collect_per_layer_gradients",
    "describe",
    "find_dead_and_exploding",
    "first_bad_elements",
    "scan",
    "with_early",
]
