"""Write the shipped files into a folder, all or none."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from esper_telemetry.assets.filling import filled
from esper_telemetry.assets.shipped import shipped
from esper_telemetry.assets.site import Site


def write(folder: Path, site: Site) -> list[Path]:
    """Write the files and return their paths; the folder is made if it is missing.

    Nothing is overwritten and nothing is left half done. Raise ValueError where something of ours is there already,
    OSError where the folder cannot be written to.
    """
    files, folder = shipped(), folder.absolute()
    tops = sorted({name.partition("/")[0] for name in files})
    if taken := [top for top in tops if (folder / top).exists()]:
        raise ValueError(
            f"{folder / taken[0]} already exists, and nothing is overwritten; move it, or choose another folder"
        )
    made = _make(folder)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".esper-assets-") as scratch:
            for name, source in files.items():
                target = Path(scratch, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(filled(name, source.read_text("utf-8"), site, folder), "utf-8")
            _move(Path(scratch), folder, tops)
    except BaseException:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
        raise
    return [folder / name for name in files]


def _make(folder: Path) -> Path | None:
    """Make a folder with those above it; return the topmost that was missing."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing[-1] if missing else None


def _move(scratch: Path, folder: Path, tops: list[str]) -> None:
    try:
        for top in tops:
            (scratch / top).rename(folder / top)
    except OSError:
        for top in tops:  # none of them was there before
            shutil.rmtree(folder / top, ignore_errors=True)
        raise
