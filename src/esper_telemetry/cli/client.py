"""Ask servers over HTTP, and say in one line why one gave no answer."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

from esper_telemetry.exporters.urls import is_loopback

_REQUEST_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Login:
    """Hold who asks, and which authority vouches for the servers; see `esper drill --help`."""

    ca_file: str | None = None
    user: str | None = None
    password_file: str | None = None


class Client:
    """Ask servers whose URLs begin with one of `urls`; only these are told a password, and only when they ask for it.

    Loopback is asked directly, other hosts through the proxy of the environment.

    Raise a ValueError that begins with the option at fault.
    """

    def __init__(self, urls: Iterable[str], login: Login) -> None:
        passwords = urllib.request.HTTPPasswordMgrWithDefaultRealm()
        if login.user is not None:
            passwords.add_password(None, tuple(urls), login.user, _password(login.password_file))
        elif login.password_file is not None:
            raise ValueError("--password-file: expected --user too")
        context = _trust(login.ca_file)
        self._direct = _opener(context, passwords, urllib.request.ProxyHandler({}))
        self._by_proxy = _opener(context, passwords)

    def ask(self, option: str, url: str, method: str = "GET") -> bytes:
        """Return the answer of the server at `url`, which `option` gave; raise ValueError if there is none."""
        proxy = _proxy(url)
        by = "" if proxy is None else f" through the proxy {proxy}"
        opener = self._direct if proxy is None else self._by_proxy
        try:
            request = urllib.request.Request(url, method=method, headers={"X-Esper-Drill": "1"})
            with opener.open(request, timeout=_REQUEST_SECONDS) as response:
                body: bytes = response.read()
                return body
        except urllib.error.HTTPError as error:
            reason = error.read().decode(errors="replace").strip().partition("\n")[0] or error.reason
            hint = "; set --user and --password-file" if error.code == 401 else ""
            raise ValueError(f"{option}: {url} answered {error.code}{by}: {reason}{hint}") from None
        except (OSError, ValueError, HTTPException) as error:
            hint = "; set --ca-file to trust its CA" if "CERTIFICATE_VERIFY_FAILED" in str(error) else ""
            raise ValueError(
                f"{option}: expected the URL of a server that answers{by}, got {url!r}: {_reason(error)}{hint}"
            ) from None


def _opener(
    context: ssl.SSLContext, passwords: urllib.request.HTTPPasswordMgr, *proxies: urllib.request.ProxyHandler
) -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(
        urllib.request.HTTPSHandler(context=context), urllib.request.HTTPBasicAuthHandler(passwords), *proxies
    )


def _reason(error: Exception) -> str:
    """Return the root cause: `Connection refused` rather than urllib's wrapping of it."""
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return reason.strerror or str(reason) if isinstance(reason, OSError) else str(reason) or type(error).__name__


def _proxy(url: str) -> str | None:
    """Return the proxy that the environment puts before a URL, without its password."""
    parts = urlsplit(url)
    if is_loopback(url) or urllib.request.proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    proxy = urllib.request.getproxies().get(parts.scheme)
    return proxy and proxy.rpartition("//")[2].rpartition("@")[2]


def _trust(ca_file: str | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        reason = error.strerror if error.errno and not isinstance(error, ssl.SSLError) else "no certificate in it"
        raise ValueError(f"--ca-file: expected a file of certificates, got {ca_file!r}: {reason}") from None


def _password(path: str | None) -> str:
    if path is None:
        raise ValueError("--user: expected --password-file too")
    try:
        return Path(path).read_text("utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ValueError(f"--password-file: expected a readable file, got {path!r}: {reason}") from None
