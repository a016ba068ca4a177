"""Who may ask what, as the web config file says now; a change of its files is followed, a broken one is not."""

from __future__ import annotations

import logging
import os
import ssl
from dataclasses import dataclass
from pathlib import Path

from esper_telemetry.exporters.web.auth import BasicAuth, CheckWorker, Verdict
from esper_telemetry.exporters.web.exchange import Request, Response
from esper_telemetry.exporters.web.tls import may_enter, server_context
from esper_telemetry.exporters.web.web_config import WebConfig, WebConfigError, read_web_config

logger = logging.getLogger("esper_telemetry")

WITHOUT_PASSWORD = "/-/healthy"

_UNAUTHORIZED = Response(401, b"unauthorized\n", headers=(("WWW-Authenticate", 'Basic realm="esper"'),))
_BUSY = Response(429, b"too many passwords to check\n", headers=(("Retry-After", "5"),))

_Stamp = tuple[tuple[int, int, int] | None, ...]


@dataclass(frozen=True, slots=True)
class _Rules:
    """Hold the rules that follow from one state of the files."""

    config: WebConfig
    context: ssl.SSLContext | None
    auth: BasicAuth | None


class Access:
    """Hold the rules of a web config file; raise WebConfigError when the first read fails."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._files: tuple[Path, ...] = (self._path,)
        self._worker = CheckWorker()
        self.reload_failures = 0
        self._rules = self._read()
        self._seen = self._tried

    @property
    def context(self) -> ssl.SSLContext | None:
        """Return the TLS context for the next client, None for plain HTTP."""
        return self._rules.context

    @property
    def open_to_all(self) -> bool:
        """Tell whether there is neither TLS nor a password."""
        return self._rules.context is None and self._rules.auth is None

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """Return the headers that every answer carries."""
        return self._rules.config.headers

    def may_enter(self, certificate: dict[str, object] | None) -> bool:
        """Tell whether a client with this certificate may ask at all."""
        tls = self._rules.config.tls
        return tls is None or may_enter(certificate, tls.client_allowed_sans)

    async def refusal(self, request: Request) -> Response | None:
        """Return the answer to a request whose password is not right, None where all is well."""
        auth = self._rules.auth
        if auth is None or request.path == WITHOUT_PASSWORD:
            return None
        verdict = await auth.judge(request.headers.get("authorization", ""), request.client)
        return {Verdict.WELCOME: None, Verdict.UNKNOWN: _UNAUTHORIZED, Verdict.BUSY: _BUSY}[verdict]

    def follow(self) -> None:
        """Reload the files if they changed and have not changed again since the last call."""
        stamp = self._stamp()
        settled, self._seen = stamp == self._seen, stamp
        if not settled or stamp == self._tried:
            return
        try:
            rules = self._read()
            if (rules.context is None) != (self._rules.context is None):
                raise WebConfigError(f"{self._path}: tls_server_config: cannot be switched on or off while serving")
        except Exception as error:
            logger.error("esper: keeping the old web config: %s", error)
            self.reload_failures += 1
        else:
            self._rules = rules
            logger.info("esper: the web config was reloaded: %s", self._path)

    def _read(self) -> _Rules:
        self._tried = self._stamp()  # taken before, so that a change meanwhile is seen
        config = read_web_config(self._path)
        self._files = (self._path, *(config.tls.files if config.tls is not None else ()))
        self._tried = (self._tried[0], *self._stamp()[1:])
        context = None if config.tls is None else server_context(config.tls, self._path)
        return _Rules(config, context, BasicAuth(config.users, self._worker) if config.users else None)

    def _stamp(self) -> _Stamp:
        return tuple(map(_file_stamp, self._files))


def _file_stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
