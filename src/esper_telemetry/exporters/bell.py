"""Wake a waiting thread."""

from __future__ import annotations

import threading
from contextlib import suppress


class Bell:
    """Let one thread wait until another rings; rings before anybody waits count as one.

    Unlike `threading.Event` it takes no lock to ring, so that a signal handler may ring in the middle of a ring.
    """

    def __init__(self) -> None:
        self._silence = threading.Lock()
        self._silence.acquire()

    def ring(self) -> None:
        """Wake the thread that waits, or the next that will."""
        with suppress(RuntimeError):  # it rings already
            self._silence.release()

    def wait(self, seconds: float) -> bool:
        """Wait for a ring, at most `seconds`; return whether there was one."""
        return self._silence.acquire(timeout=min(seconds, threading.TIMEOUT_MAX))
