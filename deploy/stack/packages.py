"""Debian's packages, unpacked into a folder: without root, and without what installing them would change."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

FETCH_SECONDS = 600.0
_DEBIAN_KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"
_TEMPLATES = b"/usr/share/prometheus/alertmanager"
_AS_USER = ("-q", "-o", "APT::Sandbox::User=root")  # apt's own user cannot write to our folder


class ProgramNotFound(RuntimeError):
    """Say in one line which program is missing and what to install."""


def unpack(name: str, package: str, folder: Path, release: str | None = None, beside: tuple[str, ...] = ()) -> None:
    """Unpack the package of a program into `folder`, of the machine's release of Debian or of another one.

    beside: packages that it runs with. They are unpacked too, with all that these and it depend on and the machine does
        not have.

    Raise `ProgramNotFound` where that fails; then the folder is not there.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch:
        root = Path(scratch, "root")
        for archive in _download(name, (package, *beside), Path(scratch), release):
            _run(name, "dpkg", "-x", str(archive), str(root), folder=Path(scratch))
        _relocate_alertmanager(root)
        _relocate_chromium(root)
        shutil.rmtree(folder, ignore_errors=True)
        root.rename(folder)


def _download(name: str, packages: tuple[str, ...], scratch: Path, release: str | None) -> list[Path]:
    """Download with the machine's package lists, or with private ones where it has none, or none of that release."""
    cache = scratch / "cache" / "archives"
    (cache / "partial").mkdir(parents=True)
    get: tuple[str, ...] = ("download", *packages)
    if len(packages) > 1:
        needed = ("--download-only", "--reinstall", "--yes", "--no-install-recommends")
        get = ("-o", f"Dir::Cache={cache.parent}", "-o", "Debug::NoLocking=1", "install", *needed, *packages)
    if release is None:
        try:
            _run(name, "apt-get", *_AS_USER, *get, folder=scratch)
            return [*scratch.glob("*.deb"), *cache.glob("*.deb")]
        except ProgramNotFound:
            pass
    private = (*_AS_USER, *_private_lists(scratch, release))
    _run(name, "apt-get", *private, "update", folder=scratch)
    _run(name, "apt-get", *private, *get, folder=scratch)
    return [*scratch.glob("*.deb"), *cache.glob("*.deb")]


def _private_lists(scratch: Path, release: str | None) -> list[str]:
    """Return the options with which apt keeps lists of its own, of the machine's sources or of another release."""
    (scratch / "lists" / "partial").mkdir(parents=True)
    settings = [f"Dir::State::Lists={scratch}/lists", f"Dir::Cache={scratch}/cache"]
    if release is not None:
        sources = scratch / "sources.list"
        sources.write_text(f"deb [signed-by={_DEBIAN_KEYS}] http://deb.debian.org/debian {release} main\n")
        settings += [f"Dir::Etc::SourceList={sources}", "Dir::Etc::SourceParts=/dev/null"]
    return [option for setting in settings for option in ("-o", setting)]


def _run(name: str, *command: str, folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=FETCH_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise ProgramNotFound(f"{name}: {command[0]} took over {FETCH_SECONDS:.0f} s; install {name}") from None
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise ProgramNotFound(f"{name}: not on PATH, and {command[0]} failed ({reason}); install {name}")


def _relocate_alertmanager(root: Path) -> None:
    """Point Debian's Alertmanager, which has its templates' folder compiled in, to the folder unpacked beside it.

    A path of the same length takes the old one's place: descriptor 9, which the script `alertmanager` opens.
    """
    binary = root / "usr" / "bin" / "prometheus-alertmanager"
    if not binary.exists():
        return
    binary.write_bytes(binary.read_bytes().replace(_TEMPLATES, b"/proc/self/fd/9".ljust(len(_TEMPLATES), b"/")))
    _script(binary.with_name("alertmanager"), f'exec 9<"$here/../..{_TEMPLATES.decode()}" "$here/{binary.name}" "$@"')


def _relocate_chromium(root: Path) -> None:
    """Let Chromium find its libraries beside it, and fonts where the machine has none."""
    script = root / "usr" / "bin" / "chromium-headless-shell"
    if not script.exists():
        return
    folders = sorted({path.parent.relative_to(root).as_posix() for path in root.rglob("*.so*") if path.is_file()})
    (root / "fonts.conf").write_text(
        "<fontconfig><dir>/usr/share/fonts</dir><dir prefix='relative'>usr/share/fonts</dir>"
        "<cachedir prefix='xdg'>fontconfig</cachedir></fontconfig>\n"
    )
    _script(
        script,
        f"LD_LIBRARY_PATH={':'.join(f'$here/../../{folder}' for folder in folders)}; export LD_LIBRARY_PATH",
        '[ -e /etc/fonts/fonts.conf ] || export FONTCONFIG_FILE="$here/../../fonts.conf"',
        f'exec "$here/../lib/chromium/{script.name}" "$@"',
    )


def _script(path: Path, *lines: str) -> None:
    path.unlink(missing_ok=True)
    path.write_text("\n".join(["#!/bin/sh", "here=${0%/*}", *lines, ""]))
    path.chmod(0o755)
