"""The code blocks of the documents, to be run as they stand there."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


class Block(NamedTuple):
    """A fenced block: where it stands, its language and what is in it."""

    page: str
    heading: str
    language: str
    code: str


def fences(page):
    """Return every fenced block of a page, a path relative to the repository."""
    found, heading, language, code = [], "", None, []
    for line in (ROOT / page).read_text().splitlines():
        if language is None and line.startswith("#"):
            heading = line.lstrip("# ")
        if not line.startswith("```"):
            code.append(line)
        elif language is None:
            language, code = line.removeprefix("```"), []
        else:
            found.append(Block(page, heading, language, "\n".join([*code, ""])))
            language = None
    assert language is None, f"{page}: a block that does not end"
    return found


def python_of(page):
    """Return the Python blocks of a page, in order."""
    return [block.code for block in fences(page) if block.language == "python"]


def blocks(page="loops.md"):
    """Return heading -> code of the section's Python block."""
    return {block.heading: block.code for block in fences(f"docs/{page}") if block.language == "python"}


def without_our_lines(code):
    """Return a block as it was before."""
    return "\n".join(line for line in code.splitlines() if not re.search("esper|monitor", line, re.IGNORECASE))
