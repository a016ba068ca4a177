"""Print the oldest release of each dependency that pyproject.toml allows, as constraints for pip.

torch is the one of constraints.txt: PyPI has no older builds for the CPU alone.
"""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def lowest():
    """Return `name==version` for each dependency of the package and of its extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *(line for lines in project["optional-dependencies"].values() for line in lines)]
    bounds = dict(re.fullmatch(r"([\w-]+)>=([\w.]+)", line).groups() for line in named)
    pinned = re.search(r"^torch==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    return [f"{name}=={version}" for name, version in sorted({**bounds, "torch": pinned}.items())]


if __name__ == "__main__":
    print("\n".join(lowest()))
