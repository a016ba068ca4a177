"""The code blocks of the documents, to be run as they stand there."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page="loops.md"):
    """Return heading -> code of the section's first block."""
    sections = re.split(r"^## ", (DOCS / page).read_text(), flags=re.MULTILINE)[1:]
    found = {section.partition("\n")[0]: re.search(r"```python\n(.*?)```", section, re.DOTALL) for section in sections}
    return {heading: block[1] for heading, block in found.items() if block}


def without_our_lines(code):
    """Return a block as it was before."""
    return "\n".join(line for line in code.splitlines() if not re.search("esper|monitor", line, re.IGNORECASE))
