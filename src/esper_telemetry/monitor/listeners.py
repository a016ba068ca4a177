"""Who is told of each new snapshot, in the training thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from esper_telemetry import arguments
from esper_telemetry.snapshot import Snapshot

Listener = Callable[[Snapshot], None]


class Listeners:
    """Tell each of them everything; what one raises hurts neither the others nor training.

    fail: takes note of the exception.
    """

    def __init__(self, fail: Callable[[str], None], *listeners: Listener) -> None:
        self._listeners = list(listeners)
        self._fail = fail

    def add(self, listener: Listener) -> Callable[[], None]:
        """Tell this one too; return a function that ends that."""
        arguments.function("listener", listener)
        self._listeners.append(listener)
        return partial(self._listeners.remove, listener)

    def tell(self, news: Sequence[Snapshot]) -> None:
        """Tell each snapshot in its order."""
        for snapshot in news:
            for listener in tuple(self._listeners):
                try:
                    listener(snapshot)
                except Exception:
                    self._fail(f"{listener} failed")
