"""Basic authentication whose work is bounded: no flood of wrong passwords takes the trainer's CPU.

A bcrypt check costs some 50 ms of a core by design. One thread makes them, one at a time, and rests after each; a
password that was right once is known by a keyed digest afterwards, so a scraper costs one check per run.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from enum import Enum
from functools import partial

try:
    import bcrypt
except ImportError as error:
    raise ImportError("a web config file needs PyYAML and bcrypt: pip install 'esper-telemetry[server]'") from error

SHARE = 0.005
"""How much of one core checks may take, once a first few were made."""

MAX_WAITING = 16

_BCRYPT_BYTES = 72  # bcrypt looks at no more, and the library refuses what is longer
_BURST_SECONDS = 0.5


class Verdict(Enum):
    """Say what became of a request's credentials."""

    WELCOME = "welcome"
    UNKNOWN = "unknown"
    BUSY = "busy"


class BasicAuth:
    """Check credentials against bcrypt hashes by user name. Call it from one event loop.

    An unknown user takes as long as a wrong password. Each client address has at most one password in the queue, so
    that a flood from one does not lock out another.
    """

    def __init__(self, users: Mapping[str, str], worker: CheckWorker) -> None:
        self._users = {name.encode(): hashed.encode() for name, hashed in users.items()}
        self._decoy = max(self._users.values(), key=lambda hashed: hashed[4:6])  # of the highest cost
        self._secret = os.urandom(32)
        self._known: dict[bytes, bytes] = {}
        self._worker = worker

    async def judge(self, authorization: str, client: str) -> Verdict:
        """Return what becomes of the value of an Authorization header."""
        credentials = _credentials(authorization)
        if credentials is None:
            return Verdict.UNKNOWN
        user, password = credentials
        digest = self._digest(user, password)
        if hmac.compare_digest(self._known.get(user, bytes(len(digest))), digest):
            return Verdict.WELCOME
        right = await self._worker.check(password[:_BCRYPT_BYTES], self._users.get(user, self._decoy), client)
        if right is None:
            return Verdict.BUSY
        if not right or user not in self._users:
            return Verdict.UNKNOWN
        self._known[user] = digest
        return Verdict.WELCOME

    def _digest(self, user: bytes, password: bytes) -> bytes:
        return hmac.digest(self._secret, hashlib.sha256(user).digest() + password, "sha256")


class CheckWorker:
    """Check passwords one at a time, in a thread that lives as long as a check does."""

    def __init__(self) -> None:
        self._waiting: set[str] = set()
        self._turn = asyncio.Lock()
        self._free_at = 0.0

    async def check(self, password: bytes, hashed: bytes, client: str) -> bool | None:
        """Return whether the password is right, or None when too many wait already."""
        if client in self._waiting or len(self._waiting) >= MAX_WAITING:
            return None
        self._waiting.add(client)
        # A client that is gone does not give its turn to the next before its check has ended.
        return await asyncio.shield(asyncio.create_task(self._check_in_turn(password, hashed, client)))

    async def _check_in_turn(self, password: bytes, hashed: bytes, client: str) -> bool:
        try:
            async with self._turn:
                now = time.monotonic()
                await asyncio.sleep(max(self._free_at - now - _BURST_SECONDS / SHARE, 0.0))
                right, seconds = await _in_thread(partial(_timed_check, password, hashed))
                self._free_at = max(self._free_at, now) + seconds / SHARE
                return right
        finally:
            self._waiting.discard(client)


async def _in_thread(work: Callable[[], tuple[bool, float]]) -> tuple[bool, float]:
    """Run in a daemon thread, which does not hold up the end of the process as those of an executor do."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[tuple[bool, float]] = loop.create_future()

    def settle(result: tuple[bool, float]) -> None:
        if not done.done():
            done.set_result(result)

    def run() -> None:
        result = work()
        with suppress(RuntimeError):  # the server has stopped meanwhile
            loop.call_soon_threadsafe(settle, result)

    threading.Thread(target=run, name="esper-password", daemon=True).start()
    return await done


def _timed_check(password: bytes, hashed: bytes) -> tuple[bool, float]:
    started = time.thread_time()
    try:
        right = bcrypt.checkpw(password, hashed)
    except ValueError:  # some versions refuse a password that holds NUL
        right = False
    return right, time.thread_time() - started


def _credentials(authorization: str) -> tuple[bytes, bytes] | None:
    scheme, _, encoded = authorization.partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        user, colon, password = base64.b64decode(encoded.strip(), validate=True).partition(b":")
    except (binascii.Error, ValueError):
        return None
    return (user, password) if colon else None
