"""One POST of JSON, which raises if it was not accepted."""

from __future__ import annotations

import base64
import urllib.error
import urllib.request
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from esper_telemetry.arguments import shown
from esper_telemetry.exporters.urls import is_loopback


class Target(NamedTuple):
    """Where to post, and who asks."""

    url: str
    headers: dict[str, str]


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    """A POST that was moved would arrive as an empty GET."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def checked_url(url: str) -> Target:
    """Split a URL; raise ValueError in one line if it is invalid."""
    try:
        parts = urlsplit(url if isinstance(url, str) else "")
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and url.isprintable()
    except ValueError:
        usable = False
    if not usable or " " in url:
        raise ValueError(f"webhook: expected a URL such as http://127.0.0.1:5001/alerts, got {shown(url)}")
    headers = {"Content-Type": "application/json", "User-Agent": "esper-telemetry"}
    if parts.username is not None:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
    return Target(parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment="").geturl(), headers)


def post(target: Target, body: bytes, timeout: float) -> None:
    """Post once; raise OSError that says in a line why it did not arrive.

    Loopback is asked directly, other hosts through the proxy of the environment.
    """
    proxies = [urllib.request.ProxyHandler({})] if is_loopback(target.url) else []
    opener = urllib.request.build_opener(_NoRedirection, *proxies)
    request = urllib.request.Request(target.url, body, target.headers, method="POST")
    try:
        opener.open(request, timeout=timeout).close()
    except urllib.error.HTTPError as error:
        with error:
            raise OSError(f"it answered {error.code}: {error.reason}") from None
    except urllib.error.URLError as error:
        raise OSError(str(error.reason)) from None
