"""Deliver before the process is gone."""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

_deliveries: list[Callable[[], None]] = []


def at_exit(deliver: Callable[[], None]) -> None:
    """Call `deliver` when the process ends: normally, by an exception, or by a SIGTERM that nobody handles.

    A SIGTERM handler of the user's own is left alone: it may save a checkpoint and go on, and when it exits in the
    end, `deliver` is called. A forked child calls nothing by signal; `deliver` has to know its own process.
    """
    _deliveries.append(deliver)
    atexit.register(deliver)
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _deliver_and_die)


def not_at_exit(deliver: Callable[[], None]) -> None:
    """Take back what `at_exit` was given."""
    _deliveries.remove(deliver)
    atexit.unregister(deliver)


def _deliver_and_die(signum: int, _: FrameType | None) -> None:
    """Do what atexit would, then die of the signal, so that the parent sees the status it expects."""
    for deliver in tuple(reversed(_deliveries)):
        deliver()
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)
