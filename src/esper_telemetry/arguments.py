"""What arguments have to be: each check returns what was given, or raises ValueError in one line. No torch."""

from __future__ import annotations

import math
import os
from numbers import Integral, Real
from pathlib import Path

_LONGEST = 80
_FOREVER_SECONDS = 1e9  # 30 years; clocks and locks take no more than some multiples of it
_PLAIN = (str, bytes, int, float, type(None))


def shown(given: object) -> str:
    """Return what was given as a line has room for it: its value where that is short, else its type."""
    value = repr(given) if isinstance(given, _PLAIN) else ""
    return value if 0 < len(value) <= _LONGEST and value.isprintable() else type(given).__name__


def flag(name: str, given: object) -> bool:
    """Check that it is True or False: `"no"` would mean yes."""
    if not isinstance(given, bool):
        raise ValueError(f"{name}: expected True or False, got {shown(given)}")
    return given


def whole(name: str, given: object, at_least: int) -> int:
    """Check that it is a whole number, not too small a one."""
    if isinstance(given, bool) or not isinstance(given, Integral) or given < at_least:
        raise ValueError(f"{name}: expected at least {at_least}, got {shown(given)}")
    return int(given)


def seconds(name: str, given: object) -> float:
    """Check that it is a time that can be waited for."""
    number = _number(given)
    if not 0 <= number <= _FOREVER_SECONDS:
        raise ValueError(f"{name}: expected seconds of at least 0, got {shown(given)}")
    return number


def seconds_above_0(name: str, given: object) -> float:
    """Check that it is a time that passes."""
    number = _number(given)
    if not 0 < number <= _FOREVER_SECONDS:
        raise ValueError(f"{name}: expected seconds above 0, got {shown(given)}")
    return number


def path(name: str, given: object) -> Path:
    """Check that it names a file or a folder."""
    if not isinstance(given, str | os.PathLike) or not isinstance(os.fspath(given), str):
        raise ValueError(f"{name}: expected a path, got {shown(given)}")
    if any(character < " " for character in os.fspath(given)):
        raise ValueError(f"{name}: expected a path without control characters, got {os.fspath(given)[:_LONGEST]!r}")
    return Path(given)


def function(name: str, given: object) -> None:
    """Check that it can be called."""
    if not callable(given):
        raise ValueError(f"{name}: expected a function, got {shown(given)}")


def no_monitor(name: str, given: object) -> ValueError:
    """Return the error for what was given as a monitor and is none."""
    return ValueError(f"{name}: expected a monitor, as returned by watch(model), got {type(given).__name__}")


def _number(given: object) -> float:
    if isinstance(given, bool) or not isinstance(given, Real):
        return math.nan
    try:
        return float(given)
    except OverflowError:
        return math.inf
