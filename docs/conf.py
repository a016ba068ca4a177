"""How the documentation is built; `make docs` does it. Nothing is fetched, neither here nor by who reads the pages."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from docs import generated  # noqa: E402

project = "esper-telemetry"
html_title = "esper-telemetry"
html_theme = "furo"
html_copy_source = False
html_show_copyright = False
extensions = ["myst_parser", "sphinx.ext.autodoc"]
# Pages are read on a forge too, so they stay where their links work: the source folder is the whole repository.
root_doc = "docs/index"
include_patterns = ["docs/*.md", "alerts/runbooks/*.md", "benchmarks/*.md", "*.md"]
exclude_patterns = [".*", "**/.*", "build", "dist", "src", "tests", "README.md"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
default_role = "literal"
smartquotes = False
suppress_warnings = ["misc.highlighting_failure"]  # Pygments knows no recording rule: a name with a colon
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True


class Generated(SphinxDirective):
    """Show what a function of `docs/generated.py` returns."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Parse it as if it stood in the page."""
        markdown = getattr(generated, self.arguments[0])()
        return self.parse_text_to_nodes(markdown, allow_section_headings=True)


def list_arguments(_: Sphinx, what: str, name: str, found: object, options: Any, lines: list[str]) -> None:
    """Turn the lines `argument: what it is` of a docstring into a list."""
    known, listed = _names_in(found), False
    made: list[str] = []
    for line in lines:
        said = re.match(r"(\w+(?:, \w+)*): ", line)
        if said and known.issuperset(said[1].split(", ")):
            names = ", ".join(f"``{each}``" for each in said[1].split(", "))
            made += [*([] if listed else [""]), f"* {names}: {line[said.end() :]}"]
            listed = True
        elif listed and line.startswith(" "):
            made.append(f"  {line.strip()}")
        else:
            made += [*([""] if listed else []), line]
            listed = False
    lines[:] = [line.replace("|", r"\|") for line in made]  # |g| is no substitution


def _names_in(found: object) -> set[str]:
    fields = set(getattr(found, "__dataclass_fields__", ()))
    try:
        return fields | set(inspect.signature(found).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return fields


def draw_as_table(_: Sphinx, page: str, source: list[str]) -> None:
    """Show a drawing that a forge draws as a table: what would draw it here comes from elsewhere."""
    source[0] = re.sub(r"```mermaid\n(.*?)```", lambda drawing: _table(drawing[1]), source[0], flags=re.DOTALL)


def _table(drawing: str) -> str:
    rooms = dict(re.findall(r"(\w+)\[\"<b>.*?</b><br>(.*?)\"\]", drawing))
    names = dict(re.findall(r"(\w+)\[\"<b>(.*?)</b>", drawing))
    rows = ["| room | what it is | imports |", "|---|---|---|"]
    for room, what in rooms.items():
        below = ", ".join(f"`{names[to]}`" for to in re.findall(rf"^ +{room} --> (\w+)$", drawing, re.MULTILINE))
        rows.append(f"| `{names[room]}` | {what} | {below or 'nothing'} |")
    return "\n".join(rows)


def forward_to_the_first_page(app: Sphinx, error: Exception | None) -> None:
    """Make the folder itself lead to the first page."""
    if error is None and app.builder.format == "html":
        page = (
            '<!doctype html><meta http-equiv="refresh" content="0; url=docs/index.html"><title>esper-telemetry</title>'
        )
        (Path(app.outdir) / "index.html").write_text(page)


def setup(app: Sphinx) -> None:
    """Add what is ours."""
    app.add_directive("generated", Generated)
    app.connect("autodoc-process-docstring", list_arguments)
    app.connect("source-read", draw_as_table)
    app.connect("build-finished", forward_to_the_first_page)
