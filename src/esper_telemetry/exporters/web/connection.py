"""One client's requests, one after the other."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus

import h11

from esper_telemetry.exporters.web.exchange import Request, Response
from esper_telemetry.exporters.web.pace import Pace
from esper_telemetry.exporters.web.stream import Stream

REQUEST_SECONDS = 10.0
IDLE_SECONDS = 90.0
"""How long a connection is kept between requests; above the usual scrape intervals."""

_PAUSE_SECONDS = 0.25  # a client that asks again sooner takes its turns with those that never pause
_PIECES = 2  # of a request; of one that comes in more, each of the others needs a turn
_MAX_HEADER_BYTES = 16 * 1024
_MAX_KNOWN = 64


class BadRequest(Exception):
    """Say that a client does not speak HTTP, and was told so."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Hold what was read; `last` says that the connection ends with the answer."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    last: bool


Known = dict[bytes, Asked]
"""Requests by their bytes: a scraper sends the same ones each time."""


class Connection:
    """Answer one client.

    patience: ends everything when the client, or an answer, takes too long.
    respond: answers a request; `on_answer` is called when that is no refusal.
    """

    def __init__(
        self,
        stream: Stream,
        peer: tuple[str, int],
        pace: Pace,
        known: Known,
        patience: asyncio.Timeout,
        respond: Callable[[Request], Awaitable[Response]],
        on_answer: Callable[[], None],
    ) -> None:
        self._stream = stream
        self._client = peer[0].removeprefix("::ffff:")  # IPv4, on a socket that takes IPv6 too
        self._port = peer[1]
        self._pace = pace
        self._known = known
        self._patience = patience
        self._respond = respond
        self._on_answer = on_answer
        self._loop = asyncio.get_running_loop()
        self._read = b""  # what has come and was not asked for yet

    async def serve(self, received: bytes) -> None:
        """Answer until one side has had enough; raise BadRequest where that is the server.

        received: what was read so far. The turn in which it is answered has begun.
        """
        self._read = received
        turns, content, answered = self._pace.newcomers, False, 0.0
        while (asked := await self._next_request()) is not None:
            request = Request(asked.method, asked.path, asked.query, asked.headers, self._client, self._port)
            self._wait_at_most(request.patience)
            if answered:
                regular = content and self._loop.time() - answered > _PAUSE_SECONDS
                turns = self._pace.regulars if regular else self._pace.others
                await turns.next(self._client)
            response = await self._respond(request)
            if response.status == HTTPStatus.OK:
                content = True
                self._on_answer()
            await self._send(response, asked.last, with_body=asked.method != "HEAD")
            turns.charge()
            if asked.last:
                return
            answered = self._loop.time()
            if self._read:  # who sends many requests at once gives others a turn after each
                await asyncio.sleep(0)

    async def _next_request(self) -> Asked | None:
        """Read up to the end of a request; a client may be idle before it, but not dawdle in it."""
        if not self._read:
            self._wait_at_most(IDLE_SECONDS)
            self._read = await self._stream.read()
        asked = self._known.get(self._read)
        if asked is not None:
            self._read = b""
            return asked
        self._wait_at_most(REQUEST_SECONDS)
        try:
            return await self._parse()
        except h11.RemoteProtocolError as error:
            await self._send(Response(error.error_status_hint, b"bad request\n"), last=True)
            raise BadRequest from error

    async def _parse(self) -> Asked | None:
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=_MAX_HEADER_BYTES)
        first = self._read
        request: h11.Request | None = None
        http.receive_data(first)
        pieces = 1
        while not isinstance(event := http.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                if pieces >= _PIECES:
                    self._pace.others.charge()
                    await self._pace.others.next(self._client)
                http.receive_data(await self._stream.read())
                pieces += 1
            elif isinstance(event, h11.Request):
                request = event
            elif not isinstance(event, h11.Data):
                return None
        assert request is not None
        self._read = http.trailing_data[0]
        asked = _asked(request, last=http.their_state is not h11.DONE)
        if pieces == 1 and not self._read and not asked.last:
            self._remember(first, asked)
        return asked

    def _remember(self, read: bytes, asked: Asked) -> None:
        """Know the request by its bytes from now on; of too many, forget the oldest."""
        while len(self._known) >= _MAX_KNOWN:
            del self._known[next(iter(self._known))]
        self._known[read] = asked

    async def _send(self, response: Response, last: bool, with_body: bool = True) -> None:
        await self._stream.write(_head(response, last) + (response.body if with_body else b""))
        if with_body:
            response.sent()

    def _wait_at_most(self, seconds: float) -> None:
        self._patience.reschedule(self._loop.time() + seconds)


def _asked(request: h11.Request, last: bool) -> Asked:
    path, _, query = request.target.decode("ascii").partition("?")
    headers = {name.decode("ascii"): value.decode("latin-1") for name, value in request.headers}
    return Asked(request.method.decode("ascii"), path, query, headers, last)


def _head(response: Response, last: bool) -> bytes:
    headers = {
        "Content-Type": response.content_type,
        "Content-Length": len(response.body),
        "X-Content-Type-Options": "nosniff",
        **dict(response.headers),
        **({"Connection": "close"} if last else {}),
    }
    fields = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    status = HTTPStatus(response.status)
    return f"HTTP/1.1 {status.value} {status.phrase}\r\n{fields}\r\n".encode("latin-1")
