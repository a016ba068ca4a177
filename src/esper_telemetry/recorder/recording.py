"""A recording: what the flight recorder writes at the first bad check of an episode of trouble, as JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

FORMAT = "esper-recording"
VERSION = 1

_LARGEST = 64 << 20
_FAR = 1 << 63
_FAR_FUTURE = 1e11
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""JSON has no number for these."""


@dataclass(frozen=True, slots=True)
class Element:
    """Name a bad element: its index in the gradient's own shape, the same in row-major order, and its value."""

    index: tuple[int, ...]
    flat: int
    value: str


@dataclass(frozen=True, slots=True)
class BadLayer:
    """Describe a layer that held a bad element.

    first_bad: its first bad elements in row-major order; None, like shape and dtype, where the gradient was gone before
        the result arrived from its device.
    """

    layer_name: str
    inf_count: int
    nan_count: int
    numel: int
    shape: tuple[int, ...] | None
    dtype: str | None
    first_bad: tuple[Element, ...] | None


@dataclass(frozen=True, slots=True)
class PastCheck:
    """Describe one check of the history.

    scale: of the GradScaler, None where none is watched.
    learning_rates: of the optimizers' parameter groups; None for one that is on a device.
    """

    check: int
    timestamp: float
    inf_count: int
    nan_count: int
    grad_norm: float
    scale: float | None
    learning_rates: tuple[float | None, ...]
    batch_id: int | str | None


@dataclass(frozen=True, slots=True)
class Recording:
    """Hold what is known of the first bad check of an episode, and the checks before it.

    timestamp: unix time of that check.
    batch_id: what the loop called the batch, if it did.
    origin_layer: the bad layer that gradients reached first, the one nearest the loss.
    clean_before, clean_after: the nearest layers without a bad element that gradients reached before and after it;
        None where there is none.
    layers: bad layers, worst first, the origin always among them; layers_left_out counts the others.
    history: the last checks, oldest first; the last one is the bad one.
    layer_norms: of the origin, its clean neighbours and the worst layers, one norm per check of the history; None
        where there was no gradient, or where the check is too long ago for a model of so many layers.
    damage, cause: the verdict, as in a snapshot; it is written into the file when it is known, and None before.
    """

    run_id: str
    rank: int
    world_size: int
    host: str
    pid: int
    devices: tuple[str, ...]
    versions: Mapping[str, str]
    check: int
    timestamp: float
    batch_id: int | str | None
    inf_count: int
    nan_count: int
    elements: int
    watched_layers: int
    origin_layer: str
    clean_before: str | None
    clean_after: str | None
    layers: tuple[BadLayer, ...]
    layers_left_out: int
    history: tuple[PastCheck, ...]
    layer_norms: Mapping[str, tuple[float | None, ...]]
    damage: str | None = None
    cause: str | None = None

    def write(self, path: Path) -> None:
        """Write the recording as a whole or not at all, and sync it to disk."""
        page = {"format": FORMAT, "version": VERSION, **_encoded(asdict(self))}
        draft = path.with_name(path.name + ".tmp")
        try:
            with draft.open("w", encoding="utf-8") as file:
                json.dump(page, file, allow_nan=False)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise


def read_recording(path: Path) -> Recording:
    """Read a recording; raise ValueError when the file is not one, and OSError when it cannot be read."""
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError("it is too large")
        page = json.loads(path.read_text("utf-8"))
        if not isinstance(page, dict) or page.get("format") != FORMAT:
            raise ValueError("it is another kind of file")
        if page.get("version") != VERSION:
            raise ValueError(f"it has version {page.get('version')!r}, and only {VERSION} can be read")
        return _recording(page)
    except KeyError as error:
        reason = f"it has no {error}"
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
    raise ValueError(f"expected a recording, got {str(path)!r}: {reason}")


def _recording(page: Mapping[str, Any]) -> Recording:
    recording = Recording(
        **_plain(Recording, page)
        | {
            "devices": tuple(map(_text, page["devices"])),
            "versions": {_text(name): _text(version) for name, version in page["versions"].items()},
            "layers": tuple(map(_layer, page["layers"])),
            "history": tuple(map(_past_check, page["history"])),
            "layer_norms": {_text(name): tuple(map(_number, norms)) for name, norms in page["layer_norms"].items()},
        }
    )
    if not recording.history:
        raise ValueError("its history is empty")
    if not 0 <= recording.timestamp < _FAR_FUTURE:
        raise ValueError("its time is out of range")
    if any(len(norms) != len(recording.history) for norms in recording.layer_norms.values()):
        raise ValueError("its layer_norms and its history differ in length")
    return recording


def _layer(page: Mapping[str, Any]) -> BadLayer:
    shape, first_bad = page["shape"], page["first_bad"]
    return BadLayer(
        **_plain(BadLayer, page)
        | {
            "shape": None if shape is None else tuple(map(_whole, shape)),
            "first_bad": None if first_bad is None else tuple(map(_element, first_bad)),
        }
    )


def _element(page: Mapping[str, Any]) -> Element:
    return Element(tuple(map(_whole, page["index"])), _whole(page["flat"]), _text(page["value"]))


def _past_check(page: Mapping[str, Any]) -> PastCheck:
    return PastCheck(**_plain(PastCheck, page) | {"learning_rates": tuple(map(_number, page["learning_rates"]))})


_READERS: Mapping[str, Any] = {
    "int": lambda value: _whole(value),
    "float": lambda value: float(_number(value)),  # type: ignore[arg-type]
    "float | None": lambda value: _number(value),
    "str": lambda value: _text(value),
    "str | None": lambda value: None if value is None else _text(value),
    "int | str | None": lambda value: value if value is None or isinstance(value, int) else _text(value),
}
"""How to read a field, by its type; those of other types are read one by one."""


def _plain(kind: type, page: Mapping[str, Any]) -> dict[str, Any]:
    plain = [field for field in fields(kind) if field.type in _READERS]
    given = {field.name: None for field in plain if field.default is None} | dict(page)
    return {field.name: _READERS[str(field.type)](given[field.name]) for field in plain}


def _whole(value: Any) -> int:
    if not -_FAR <= value <= _FAR:
        raise ValueError(f"it has an impossible number: {value}")
    return int(value)


def _text(value: Any) -> str:
    """Return text without what would move the cursor of a terminal: a file can come from anywhere."""
    return "".join(character if character.isprintable() else "?" for character in str(value))


def _number(value: Any) -> float | None:
    return None if value is None else _NOT_FINITE[value] if isinstance(value, str) else float(value)


def _encoded(value: Any) -> Any:
    """Spell out the numbers that JSON has not."""
    if isinstance(value, Mapping):
        return {key: _encoded(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_encoded(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
