"""Clients that no server likes, all in one process of their own."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import ssl
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

USER, PASSWORD = "prometheus", "secret"
SCRAPE = "scrape"
_PATIENCE = 20.0


@dataclass(frozen=True, slots=True)
class Target:
    """Say what is attacked."""

    port: int

    async def connect(self, tls: bool = True) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection, and do not care whose certificate it shows."""
        return await asyncio.open_connection("127.0.0.1", self.port, ssl=_careless() if tls else None)


def request(path: str = "/metrics", password: str = PASSWORD) -> bytes:
    """Return a request as a scraper sends it."""
    credentials = base64.b64encode(f"{USER}:{password}".encode()).decode()
    return (
        f"GET {path} HTTP/1.1\r\nHost: trainer\r\nAccept: text/plain;version=0.0.4\r\nAccept-Encoding: gzip\r\n"
        f"Authorization: Basic {credentials}\r\n\r\n"
    ).encode()


async def stay_idle(target: Target) -> None:
    """Connect and say nothing."""
    reader, _ = await target.connect(tls=False)
    await reader.read()


async def begin_handshake(target: Target) -> None:
    """Say hello as TLS clients do, and nothing more."""
    hello = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        _careless().wrap_bio(ssl.MemoryBIO(), hello).do_handshake()
    reader, writer = await target.connect(tls=False)
    writer.write(hello.read())
    while await reader.read(65536):
        pass


async def send_slowly(target: Target) -> None:
    """Send a request, one byte a second."""
    _, writer = await target.connect()
    for byte in request():
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(1)


async def send_megabyte(target: Target) -> None:
    """Send 1 MB of headers as fast as they are taken."""
    reader, writer = await target.connect()
    writer.write(b"GET / HTTP/1.1\r\nX: " + b"x" * 1_000_000)
    await reader.read()


async def send_garbage(target: Target) -> None:
    """Send random bytes, half of them below TLS."""
    reader, writer = await target.connect(tls=random.random() < 0.5)
    writer.write(os.urandom(1000))
    await reader.read()


async def climb_out(target: Target) -> None:
    """Ask for files of the system, as fast as answers come."""
    reader, writer = await target.connect()
    while True:
        await _ask(reader, writer, request("/" + "../" * random.randint(1, 9) + "etc/passwd"))


async def guess_passwords(target: Target) -> None:
    """Try one wrong password after the other, as fast as answers come."""
    reader, writer = await target.connect()
    while True:
        await _ask(reader, writer, request(password=str(random.random())))


async def scrape_too_often(target: Target) -> None:
    """Scrape at 10 Hz."""
    reader, writer = await target.connect()
    while True:
        started = time.perf_counter()
        await _ask(reader, writer, request())
        await asyncio.sleep(max(0.1 - (time.perf_counter() - started), 0))


ABUSES: dict[str, Sequence[tuple[Callable[[Target], Awaitable[None]], int]]] = {
    "500 idle connections": [(stay_idle, 500)],
    "50 handshakes that never end": [(begin_handshake, 50)],
    "50 clients at one byte a second": [(send_slowly, 50)],
    "1 MB of headers, garbage, path traversal": [(send_megabyte, 2), (send_garbage, 2), (climb_out, 2)],
    "wrong passwords": [(guess_passwords, 5)],
    "50 scrapers at 10 Hz": [(scrape_too_often, 50)],
}
ABUSES["all of it at once"] = [
    # The server holds 512 connections, and makes room by dropping the longest idle ones.
    *(each for abuse in ABUSES.values() for each in abuse)
]


def main(what: str, port: str, core: str) -> None:
    """Abuse until the process is ended; or be good scrapers until told to stop, and print what each scrape took."""
    os.sched_setaffinity(0, {int(core)})
    target = Target(int(port))
    asyncio.run(_scrape_until_told(target) if what == SCRAPE else _all(target, ABUSES[what]))


async def _all(target: Target, clients: Sequence[tuple[Callable[[Target], Awaitable[None]], int]]) -> None:
    await asyncio.gather(*(_again_and_again(client, target) for client, count in clients for _ in range(count)))


async def _again_and_again(client: Callable[[Target], Awaitable[None]], target: Target) -> None:
    while True:
        with suppress(OSError, EOFError, ValueError, TimeoutError):
            await client(target)
        await asyncio.sleep(0.05)


async def _scrape_until_told(target: Target) -> None:
    kept = [await target.connect() for _ in range(4)]
    for client in kept:
        await _ask(*client, request())  # the first one checks the password
    print("ready", flush=True)
    took: dict[str, list[tuple[float, float]]] = {"kept": [], "new": []}
    scrapers = [_scrape_again_and_again(_OverKept(target, *client), took["kept"]) for client in kept]
    scrapers += [_scrape_again_and_again(_OverNew(target), took["new"]) for _ in range(2)]
    tasks = [asyncio.create_task(scraper) for scraper in scrapers]
    await asyncio.to_thread(sys.stdin.read)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    print(json.dumps(took))


class _OverKept:
    """Scrape over one connection; the next takes its place when it is lost."""

    def __init__(self, target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._target, self._reader, self._writer = target, reader, writer

    async def scrape(self) -> None:
        await _ask(self._reader, self._writer, request())

    async def recover(self) -> None:
        self._writer.close()
        self._reader, self._writer = await self._target.connect()


class _OverNew:
    """Scrape over a new connection each time, as probes do, and scrapers that keep none."""

    def __init__(self, target: Target) -> None:
        self._target = target

    async def scrape(self) -> None:
        reader, writer = await self._target.connect()
        await _ask(reader, writer, request())
        writer.close()

    async def recover(self) -> None:
        pass


async def _scrape_again_and_again(scraper: _OverKept | _OverNew, took: list[tuple[float, float]]) -> None:
    """Scrape twice a second, and note when each scrape began and what it took; infinity is one that never came."""
    await asyncio.sleep(random.random() / 2)
    while True:
        started = time.monotonic()
        try:
            async with asyncio.timeout(_PATIENCE):
                await scraper.scrape()
            took.append((started, time.monotonic() - started))
        except asyncio.CancelledError:  # told to stop before the answer came
            took.append((started, time.monotonic() - started))
            raise
        except (OSError, EOFError, ValueError, TimeoutError):
            took.append((started, float("inf")))
            with suppress(OSError):
                await scraper.recover()
        await asyncio.sleep(max(started + 0.5 - time.monotonic(), 0.1))


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: bytes) -> None:
    writer.write(asked)
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
    await reader.readexactly(int(length.partition(b":")[2]))


@cache
def _careless() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


if __name__ == "__main__":
    main(*sys.argv[1:])
