"""A small HTTP/1.1 server: one thread, bounded connections, and a deadline on everything a client may delay.

The standard library's threading server gives every idle client a thread and lets a silent one block; here all clients
share one event loop, h11 reads their requests, and the longest idle one makes room for a new one.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import h11

logger = logging.getLogger("esper_telemetry")

MAX_CONNECTIONS = 512
REQUEST_SECONDS = 10.0
IDLE_SECONDS = 90.0
"""How long a connection is kept between requests; above the usual scrape intervals."""

_MAX_HEADER_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for, and from where; header names are lower case."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    client: str


@dataclass(frozen=True, slots=True)
class Response:
    """What is answered. `sent` is called when the whole body was handed to the kernel; for HEAD it is not."""

    status: int
    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    headers: tuple[tuple[str, str], ...] = ()
    sent: Callable[[], None] = lambda: None


class HttpServer:
    """Answer requests on a listening socket in a thread of its own until `stop()`."""

    def __init__(self, listener: socket.socket, respond: Callable[[Request], Response]) -> None:
        self._listener = listener
        self._respond = respond
        self._clients: dict[asyncio.Task[None], None] = {}  # the longest idle one first
        self._loop = asyncio.new_event_loop()
        self._serving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="esper-exporter", daemon=True)
        self._thread.start()
        self._serving.wait()

    def stop(self) -> None:
        """Drop every client and free the port."""
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(REQUEST_SECONDS)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._stopping = asyncio.Event()
        server = await asyncio.start_server(self._accept, sock=self._listener, backlog=MAX_CONNECTIONS)
        self._serving.set()
        async with server:
            await self._stopping.wait()
            for task in tuple(self._clients):
                task.cancel()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._clients) >= MAX_CONNECTIONS:
            next(iter(self._clients)).cancel()
        self._clients[task] = None
        writer.transport.set_write_buffer_limits(high=0)  # so that drain() ends when the kernel has everything
        try:
            await _Connection(reader, writer, self._respond).serve(on_request=lambda: self._touch(task))
        except (TimeoutError, ConnectionError, h11.ProtocolError, asyncio.CancelledError):
            writer.transport.abort()
        finally:
            self._clients.pop(task, None)
            writer.close()

    def _touch(self, task: asyncio.Task[None]) -> None:
        if task in self._clients:
            self._clients[task] = self._clients.pop(task)


class _Connection:
    """Answer one client's requests, one after the other."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, respond: Callable[[Request], Response]
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._respond = respond
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=_MAX_HEADER_BYTES)

    async def serve(self, on_request: Callable[[], None]) -> None:
        while True:
            try:
                request = await self._next_request()
            except h11.RemoteProtocolError as error:
                await self._refuse(error.error_status_hint)
                return
            if request is None:
                return
            on_request()
            await self._answer(request)
            if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
                return
            self._http.start_next_cycle()

    async def _next_request(self) -> h11.Request | None:
        """Read up to the end of a request; a client may be idle before it, but not dawdle in it."""
        request: h11.Request | None = None
        async with asyncio.timeout(REQUEST_SECONDS if self._http.trailing_data[0] else IDLE_SECONDS) as limit:
            started = False
            while True:
                event = self._http.next_event()
                if event is h11.NEED_DATA:
                    self._http.receive_data(await self._reader.read(_MAX_HEADER_BYTES))
                    if not started:
                        started = True
                        limit.reschedule(asyncio.get_running_loop().time() + REQUEST_SECONDS)
                elif isinstance(event, h11.Request):
                    request = event
                elif isinstance(event, h11.EndOfMessage):
                    return request
                elif not isinstance(event, h11.Data):
                    return None

    async def _answer(self, request: h11.Request) -> None:
        path, _, query = request.target.decode("ascii").partition("?")
        headers = {name.decode("ascii"): value.decode("latin-1") for name, value in request.headers}
        client = self._writer.get_extra_info("peername")[0]
        response = self._respond(Request(request.method.decode("ascii"), path, query, headers, client))
        await self._send(response, with_body=request.method != b"HEAD")

    async def _refuse(self, status: int) -> None:
        if self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            await self._send(Response(status, b"bad request\n", headers=(("Connection", "close"),)))

    async def _send(self, response: Response, with_body: bool = True) -> None:
        head = h11.Response(
            status_code=response.status,
            headers=[
                ("Content-Type", response.content_type),
                ("Content-Length", str(len(response.body))),
                ("X-Content-Type-Options", "nosniff"),
                *response.headers,
            ],
        )
        out = self._http.send(head) or b""
        if with_body:
            out += self._http.send(h11.Data(response.body)) or b""
        out += self._http.send(h11.EndOfMessage()) or b""
        self._writer.write(out)
        async with asyncio.timeout(REQUEST_SECONDS):
            await self._writer.drain()
        if with_body:
            response.sent()
