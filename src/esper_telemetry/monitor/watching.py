"""`watch()`: a monitor that measures by itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import ParamSpec

from esper_telemetry.monitor.monitor import GradientMonitor

_Options = ParamSpec("_Options")


def _watching_by_itself(make: Callable[_Options, GradientMonitor]) -> Callable[_Options, GradientMonitor]:
    @wraps(make, assigned=())
    def watch(*args: _Options.args, **options: _Options.kwargs) -> GradientMonitor:
        """Return a GradientMonitor that measures at the end of each backward pass, before anything clips.

        Take the arguments of GradientMonitor, and raise what it raises.
        """
        monitor = make(*args, **options)
        monitor.check_after_backward()
        return monitor

    watch.__signature__ = signature(make).replace(return_annotation=make)  # type: ignore[attr-defined]
    return watch


watch = _watching_by_itself(GradientMonitor)  # takes what GradientMonitor takes
