"""The exporter's own page: one file that needs nothing from elsewhere, and the policy that holds it to that."""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from importlib.metadata import version
from importlib.resources import files

_HTML = files(__package__).joinpath("page.html").read_text(encoding="utf-8")

PAGE = _HTML.replace("{version}", version("esper-telemetry")).encode()


def _source(tag: str) -> str:
    """Return how a policy names the one inline script or style: by its hash."""
    [text] = re.findall(f"<{tag}>(.*?)</{tag}>", PAGE.decode(), re.DOTALL)
    return f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


PAGE_HEADERS = (
    (
        "Content-Security-Policy",
        f"default-src 'none'; script-src {_source('script')}; style-src {_source('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'",
    ),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-cache"),
)
