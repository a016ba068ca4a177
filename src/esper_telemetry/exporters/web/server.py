"""A small HTTP/1.1 server: one thread, bounded connections, bounded work, and a deadline on what a client may delay.

The standard library's threading server gives every idle client a thread and lets a silent one block; here all clients
share one event loop, and a new one takes the place of one that was never answered, or else of the longest idle one.
"""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from esper_telemetry.exporters.web.connection import IDLE_SECONDS, REQUEST_SECONDS, BadRequest, Connection, Known
from esper_telemetry.exporters.web.exchange import Request, Response
from esper_telemetry.exporters.web.pace import Pace
from esper_telemetry.exporters.web.stream import Stream, TlsStream

MAX_CONNECTIONS = 512
SHARE_OF_FILES = 0.25
"""How many of the files that the process may open are clients at most; the others are the training's."""

FOLLOW_SECONDS = 0.5
"""How often the guard may look whether its rules have changed."""

HOLD_SECONDS = 5.0
"""How long a client that spoke neither TLS nor HTTP is held: who waits for the end cannot come again meanwhile."""

SILENT_SECONDS = 10
"""How long the kernel keeps a client that has said nothing yet to itself, where it can."""

_BACKLOG = 1024
_STOP_SECONDS = 10.0
_FULL_SECONDS = 0.1


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


class HttpServer:
    """Answer requests on a listening socket in a thread of its own until `stop()`."""

    def __init__(
        self, listener: socket.socket, respond: Callable[[Request], Response], guard: Guard | None = None
    ) -> None:
        self._listener = listener
        self._respond = respond
        self._guard = guard
        self._clients: dict[asyncio.Task[None], socket.socket] = {}
        self._strangers: dict[asyncio.Task[None], None] = {}  # those that were never answered, the oldest first
        self._others: dict[asyncio.Task[None], None] = {}  # the longest idle one first
        self._known: Known = {}
        self._pace = Pace()
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
        self._thread.join(_STOP_SECONDS)

    def let_go(self) -> None:
        """Give up, in a forked child, its copies of the sockets, so that they end when the parent closes them."""
        self._listener.close()
        nothing = os.open(os.devnull, os.O_RDWR)
        for wire in self._clients.values():
            if (copy := wire.fileno()) >= 0:
                os.dup2(nothing, copy, inheritable=False)  # the number stays taken: the socket's copy will close it
        os.close(nothing)

    def _run(self) -> None:
        asyncio.run(self._serve())
        self._listener.close()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        if hasattr(socket, "TCP_DEFER_ACCEPT"):
            self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, SILENT_SECONDS)
        self._listener.listen(_BACKLOG)
        self._listener.setblocking(False)
        self._door = asyncio.create_task(self._accept())
        self._serving.set()
        await self._follow_until_stopped()

    async def _follow_until_stopped(self) -> None:
        while not self._stopping.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(None if self._guard is None else FOLLOW_SECONDS):
                    await self._stopping.wait()
            if self._guard is not None:
                self._guard.follow()

    async def _accept(self) -> None:
        while True:
            await self._pace.door.next()
            try:
                wire, peer = await self._loop.sock_accept(self._listener)
            except OSError as error:  # the client may be gone already
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    await self._make_room()
                    await asyncio.sleep(_FULL_SECONDS)
                continue
            if len(self._clients) >= most_connections():
                await self._make_room()
            task = asyncio.create_task(self._attend(wire, peer))
            task.add_done_callback(partial(self._leave, wire))
            self._clients[task], self._strangers[task] = wire, None
            self._pace.door.charge()

    async def _attend(self, wire: socket.socket, peer: tuple[str, int]) -> None:
        try:
            async with asyncio.timeout(IDLE_SECONDS) as patience:
                await self._converse(wire, peer, patience)
        except (BadRequest, ssl.SSLError) as error:
            if not isinstance(error, ssl.SSLEOFError):
                await asyncio.sleep(HOLD_SECONDS)
        except (OSError, asyncio.CancelledError):
            pass

    async def _converse(self, wire: socket.socket, peer: tuple[str, int], patience: asyncio.Timeout) -> None:
        stream = Stream(wire)
        received = await stream.read()
        if not received:
            return
        patience.reschedule(self._loop.time() + REQUEST_SECONDS)
        await self._pace.newcomers.next(peer[0])
        if self._guard is not None and self._guard.context is not None:
            stream = TlsStream(wire, self._guard.context, received)
            received = b""
            if not self._guard.may_enter(await stream.shake_hands()):
                return
        task = asyncio.current_task()
        assert task is not None
        touch = partial(self._touch, task)
        connection = Connection(stream, peer, self._pace, self._known, patience, self._guarded, on_answer=touch)
        await connection.serve(received)
        await stream.end()

    async def _guarded(self, request: Request) -> Response:
        refusal = None if self._guard is None else await self._guard.refusal(request)
        response = self._respond(request) if refusal is None else refusal
        if self._guard is None or not self._guard.headers:
            return response
        return replace(response, headers=(*response.headers, *self._guard.headers))

    async def _make_room(self) -> None:
        """Drop the oldest client that was never answered: a flood does not cost a scraper its connection."""
        dropped = next(iter(self._strangers or self._others), None)
        if dropped is not None:
            dropped.cancel()
            await asyncio.wait([dropped])

    def _leave(self, wire: socket.socket, task: asyncio.Task[None]) -> None:
        wire.close()
        for clients in (self._clients, self._strangers, self._others):
            clients.pop(task, None)

    def _touch(self, task: asyncio.Task[None]) -> None:
        self._strangers.pop(task, None)
        self._others.pop(task, None)
        self._others[task] = None


def most_connections() -> int:
    """Return how many clients there may be at once."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(1, min(MAX_CONNECTIONS, int(files * SHARE_OF_FILES)))
