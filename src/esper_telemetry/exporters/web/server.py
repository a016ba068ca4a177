"""A small HTTP/1.1 server: one thread, bounded connections, bounded work, and a deadline on what a client may delay.

The standard library's threading server gives every idle client a thread and lets a silent one block; here all clients
share one event loop, h11 reads their requests, and a new one takes the place of one that was never answered, or else of
the longest idle one. A scraper sends the same bytes each time, so a request that was read before is known by its bytes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any, Protocol

import h11

from esper_telemetry.exporters.web.exchange import Request, Response
from esper_telemetry.exporters.web.pace import PacedSelector
from esper_telemetry.exporters.web.stream import Stream, TlsStream

logger = logging.getLogger("esper_telemetry")

MAX_CONNECTIONS = 512
SHARE_OF_FILES = 0.25
"""How many of the files that the process may open are clients at most; the others are the training's."""

REQUEST_SECONDS = 10.0
IDLE_SECONDS = 90.0
"""How long a connection is kept between requests; above the usual scrape intervals."""

FOLLOW_SECONDS = 0.5
"""How often the guard may look whether its rules have changed."""

_ACCEPTS_PER_ROUND = 1  # the selector rests between rounds, so that newcomers are not let in all at once
_PIPELINE_SECONDS = 0.001
_GOODBYE_SECONDS = 1.0
_MAX_HEADER_BYTES = 16 * 1024
_MAX_KNOWN = 64


class Guard(Protocol):
    """Say who may ask."""

    @property
    def context(self) -> ssl.SSLContext | None:
        """Return the TLS context for the next client, None for plain HTTP."""

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """Return the headers that every answer carries."""

    def may_enter(self, certificate: dict[str, Any] | None) -> bool:
        """Tell whether a client with this certificate may ask at all."""

    async def refusal(self, request: Request) -> Response | None:
        """Return the answer to a request that is refused, None where it is not."""

    def follow(self) -> None:
        """Look whether the rules have changed."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """Hold what was read; `last` says that the connection ends with the answer."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    last: bool


class HttpServer:
    """Answer requests on a listening socket in a thread of its own until `stop()`."""

    def __init__(
        self, listener: socket.socket, respond: Callable[[Request], Response], guard: Guard | None = None
    ) -> None:
        self._listener = listener
        self._respond = respond
        self._guard = guard
        self._clients: dict[asyncio.Task[None], asyncio.WriteTransport] = {}  # the longest idle one first
        self._strangers: dict[asyncio.Task[None], None] = {}  # those that were never answered, the oldest first
        self._known: dict[bytes, _Asked] = {}
        self._pace = PacedSelector()
        self._loop = asyncio.SelectorEventLoop(self._pace)
        self._serving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="esper-exporter", daemon=True)
        self._thread.start()
        self._serving.wait()

    @property
    def strained(self) -> bool:
        """Tell whether so much is asked that work is to be saved."""
        return self._pace.strained

    def stop(self) -> None:
        """Drop every client and free the port."""
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(REQUEST_SECONDS)

    def let_go(self) -> None:
        """Give up, in a forked child, its copies of the sockets, so that they end when the parent closes them."""
        self._listener.close()
        nothing = os.open(os.devnull, os.O_RDWR)
        for wire in self._clients.values():
            if (copy := _number(wire)) >= 0:
                os.dup2(nothing, copy, inheritable=False)  # the number stays taken: the event loop's copy will close it
        os.close(nothing)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._stopping = asyncio.Event()
        server = await self._loop.create_server(self._protocol, sock=self._listener, backlog=_ACCEPTS_PER_ROUND)
        self._listener.listen(MAX_CONNECTIONS)  # asyncio has one number for how many wait and how many it accepts
        self._serving.set()
        async with server:
            await self._follow_until_stopped()
            for task in tuple(self._clients):
                task.cancel()

    def _protocol(self) -> asyncio.StreamReaderProtocol:
        return asyncio.StreamReaderProtocol(asyncio.StreamReader(), self._accept)

    async def _follow_until_stopped(self) -> None:
        while not self._stopping.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(None if self._guard is None else FOLLOW_SECONDS):
                    await self._stopping.wait()
            if self._guard is not None:
                self._guard.follow()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._clients) >= most_connections():
            self._make_room()
        self._clients[task] = wire = writer.transport
        self._strangers[task] = None
        number = _number(wire)
        try:
            stream = await self._let_in(reader, writer)
            if stream is not None:
                connection = _Connection(stream, writer.get_extra_info("peername"), self._known, self._guarded)
                await connection.serve(on_answer=lambda: self._touch(task, number))
                stream.end()
            writer.close()
            async with asyncio.timeout(_GOODBYE_SECONDS):
                await writer.wait_closed()
        except (TimeoutError, OSError, asyncio.CancelledError):
            pass
        finally:
            wire.abort()
            self._forget(task)
            self._pace.known.discard(number)

    async def _let_in(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Stream | None:
        plain = Stream(reader, writer)
        if writer.get_extra_info("peername") is None:  # gone already
            return None
        if self._guard is None or self._guard.context is None:
            return plain
        async with asyncio.timeout(IDLE_SECONDS):
            received = await plain.read()
        stream = TlsStream(reader, writer, self._guard.context, received)
        async with asyncio.timeout(REQUEST_SECONDS):
            certificate = await stream.shake_hands()
        return stream if self._guard.may_enter(certificate) else None

    async def _guarded(self, request: Request) -> Response:
        refusal = None if self._guard is None else await self._guard.refusal(request)
        response = self._respond(request) if refusal is None else refusal
        if self._guard is None or not self._guard.headers:
            return response
        return replace(response, headers=(*response.headers, *self._guard.headers))

    def _make_room(self) -> None:
        """Drop the oldest client that was never answered: a flood does not cost a scraper its connection."""
        dropped = next(iter(self._strangers), None) or next(iter(self._clients))
        self._forget(dropped)  # so that the next newcomer does not choose it again
        dropped.cancel()

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._clients.pop(task, None)
        self._strangers.pop(task, None)

    def _touch(self, task: asyncio.Task[None], number: int) -> None:
        if task in self._clients:
            self._clients[task] = self._clients.pop(task)
            self._strangers.pop(task, None)
            self._pace.known.add(number)


class _Connection:
    """Answer one client's requests, one after the other."""

    def __init__(
        self,
        stream: Stream,
        peer: tuple[str, int],
        known: dict[bytes, _Asked],
        respond: Callable[[Request], Awaitable[Response]],
    ) -> None:
        self._stream = stream
        self._client = peer[0].removeprefix("::ffff:")  # IPv4, on a socket that takes IPv6 too
        self._port = peer[1]
        self._known = known
        self._respond = respond
        self._read = b""  # what has come and was not asked for yet

    async def serve(self, on_answer: Callable[[], None]) -> None:
        while True:
            try:
                asked = await self._next_request()
            except h11.RemoteProtocolError as error:
                async with asyncio.timeout(REQUEST_SECONDS):
                    await self._send(Response(error.error_status_hint, b"bad request\n"), last=True)
                return
            if asked is None:
                return
            request = Request(asked.method, asked.path, asked.query, asked.headers, self._client, self._port)
            async with asyncio.timeout(request.patience):
                response = await self._respond(request)
                if response.status == HTTPStatus.OK:
                    on_answer()
                await self._send(response, asked.last, with_body=asked.method != "HEAD")
            if asked.last:
                return
            if self._read:  # who sends many requests at once gives others a turn after each
                await asyncio.sleep(_PIPELINE_SECONDS)

    async def _next_request(self) -> _Asked | None:
        """Read up to the end of a request; a client may be idle before it, but not dawdle in it."""
        if not self._read:
            async with asyncio.timeout(IDLE_SECONDS):
                self._read = await self._stream.read()
        asked = self._known.get(self._read)
        if asked is not None:
            self._read = b""
            return asked
        async with asyncio.timeout(REQUEST_SECONDS):
            return await self._parse()

    async def _parse(self) -> _Asked | None:
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=_MAX_HEADER_BYTES)
        first = self._read
        request: h11.Request | None = None
        http.receive_data(first)
        whole = True
        while not isinstance(event := http.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                http.receive_data(await self._stream.read())
                whole = False
            elif isinstance(event, h11.Request):
                request = event
            elif not isinstance(event, h11.Data):
                return None
        assert request is not None
        self._read = http.trailing_data[0]
        asked = _asked(request, last=http.their_state is not h11.DONE)
        if whole and not self._read and not asked.last:
            self._remember(first, asked)
        return asked

    def _remember(self, read: bytes, asked: _Asked) -> None:
        """Know the request by its bytes from now on; of too many, forget the oldest."""
        while len(self._known) >= _MAX_KNOWN:
            del self._known[next(iter(self._known))]
        self._known[read] = asked

    async def _send(self, response: Response, last: bool, with_body: bool = True) -> None:
        self._stream.write(_head(response, last) + (response.body if with_body else b""))
        if self._stream.waiting:
            await self._stream.drain()
        if with_body:
            response.sent()


def _number(wire: asyncio.WriteTransport) -> int:
    """Return the number of a client's file descriptor, -1 when it is closed."""
    number: int = wire.get_extra_info("socket").fileno()
    return number


def _asked(request: h11.Request, last: bool) -> _Asked:
    path, _, query = request.target.decode("ascii").partition("?")
    headers = {name.decode("ascii"): value.decode("latin-1") for name, value in request.headers}
    return _Asked(request.method.decode("ascii"), path, query, headers, last)


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


def most_connections() -> int:
    """Return how many clients there may be at once."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(1, min(MAX_CONNECTIONS, int(files * SHARE_OF_FILES)))
