"""What is asked and what is answered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

ANSWER_SECONDS = 10.0
"""How long an answer may take at most."""


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for, and from where; header names are lower case.

    port: of the client, by which its connections are told apart.
    """

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    client: str
    port: int = 0

    @property
    def patience(self) -> float:
        """Return the seconds after which nobody waits for the answer any more; scrapers say theirs."""
        with suppress(ValueError):
            asked = float(self.headers.get("x-prometheus-scrape-timeout-seconds", ""))
            return asked if 0 < asked < ANSWER_SECONDS else ANSWER_SECONDS
        return ANSWER_SECONDS


@dataclass(frozen=True, slots=True)
class Response:
    """What is answered. `sent` is called when the kernel has the whole body, in time; for HEAD it is not."""

    status: int
    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    headers: tuple[tuple[str, str], ...] = ()
    sent: Callable[[], None] = lambda: None
