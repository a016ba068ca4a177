"""Engines that skip steps by themselves, and count them: DeepSpeed does where a gradient has overflowed."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from esper_telemetry.monitor.latest import Latest


class EngineSkips:
    """Count the skips of the engines among the watched models as skipped updates, from now on."""

    def __init__(self, roots: Iterable[Any], latest: Latest) -> None:
        engines = [each for each in roots if is_engine(each) and hasattr(each, "skipped_steps")]
        self._engines = [weakref.ref(engine) for engine in engines]
        self._latest = latest
        self._seen = self._skips()
        if engines:
            latest.change(skipped_updates=latest.snapshot.skipped_updates | {"engine": 0})

    def count(self) -> None:
        """Take in what was skipped since the last call."""
        if self._engines and (skips := self._skips()) != self._seen:
            before = self._latest.snapshot.skipped_updates
            self._latest.change(skipped_updates=before | {"engine": before.get("engine", 0) + skips - self._seen})
            self._seen = skips

    def _skips(self) -> int:
        return sum(engine.skipped_steps for reference in self._engines if (engine := reference()) is not None)


def is_engine(model: object) -> bool:
    """Tell whether a model is DeepSpeed's, which steps copies of its parameters."""
    return type(model).__module__.startswith("deepspeed.")
