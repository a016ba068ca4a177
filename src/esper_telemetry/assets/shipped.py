"""The files that come with the package: beside this one in a wheel, in the folders of the repository in a checkout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

FOLDERS = (
    "alerts",
    "grafana/dashboards",
    "grafana/provisioning",
    "deploy/alertmanager",
    "deploy/kubernetes",
    "deploy/prometheus",
    "deploy/systemd",
)
FILES = ("grafana/kustomization.yaml",)
_SUFFIXES = {".json", ".md", ".service", ".tmpl", ".yaml", ".yml"}
_INSTALLED = Path(__file__).with_name("files")
_CHECKOUT = Path(__file__).parents[3]


def shipped() -> dict[str, Path]:
    """Return where each file is, by the name that it has in the repository. Raise ValueError where none is."""
    for home in (_INSTALLED, _CHECKOUT):
        if (home / "alerts" / "rules.yml").is_file():
            return {path.relative_to(home).as_posix(): path for path in sorted(_below(home))}
    raise ValueError(f"expected the files of the wheel in {_INSTALLED}, found none; reinstall esper-telemetry")


def _below(home: Path) -> Iterator[Path]:
    yield from (home / name for name in FILES)
    for folder in FOLDERS:
        for path in (home / folder).rglob("*"):
            if path.suffix in _SUFFIXES and not path.is_relative_to(home / "alerts" / "tests"):
                yield path
