"""The bytes of one client, in plaintext or under TLS.

asyncio's own TLS begins with the connection, holds 256 KiB for each, and leaves cycles of objects behind when one ends.
Here TLS begins with the first byte, so that a client that says nothing costs next to nothing; and nothing is kept
between the kernel and who reads or writes.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

READ_BYTES = 16 * 1024
"""How much is read at once."""

_T = TypeVar("_T")


class Stream:
    """Talk to a client in plaintext, over a non-blocking socket."""

    def __init__(self, wire: socket.socket) -> None:
        self._wire = wire
        self._loop = asyncio.get_running_loop()

    async def read(self) -> bytes:
        """Return what has come, at least one byte and at most READ_BYTES; nothing at the end."""
        return await self._loop.sock_recv(self._wire, READ_BYTES)

    async def write(self, data: bytes) -> None:
        """Wait until the kernel has all of it."""
        await self._loop.sock_sendall(self._wire, data)

    async def end(self) -> None:
        """Say that nothing more will be written."""


class TlsStream(Stream):
    """Speak TLS with a client; raise OSError where it does not.

    received: what was read from it so far.
    """

    def __init__(self, wire: socket.socket, context: ssl.SSLContext, received: bytes) -> None:
        super().__init__(wire)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._incoming.write(received)
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)

    async def shake_hands(self) -> dict[str, Any] | None:
        """Return the client's certificate, None where it has none."""
        await self._until_done(self._tls.do_handshake)
        return self._tls.getpeercert()

    async def read(self) -> bytes:
        """Return what has come, at least one byte and at most READ_BYTES; nothing at the end."""
        return await self._until_done(lambda: self._tls.read(READ_BYTES))

    async def write(self, data: bytes) -> None:
        """Wait until the kernel has all of it."""
        self._tls.write(data)
        await self._flush()

    async def end(self) -> None:
        """Say that nothing more will be written."""
        with suppress(ssl.SSLError):  # the client's own goodbye is not waited for
            self._tls.unwrap()
        await self._flush()

    async def _until_done(self, step: Callable[[], _T]) -> _T:
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:
                pass
            finally:
                await self._flush()  # when it fails too: the client is told why
            if received := await super().read():
                self._incoming.write(received)
            else:
                self._incoming.write_eof()

    async def _flush(self) -> None:
        if self._outgoing.pending:
            await super().write(self._outgoing.read())
