"""Where to listen."""

from __future__ import annotations

import errno
import os
import socket

DEFAULT_PORT = 19301

_TRIES = 20  # of the ports after one that is in use


def default_address(local_rank: int = 0) -> str:
    """Return ESPER_LISTEN_ADDRESS, or the loopback address of this process: port 19301 plus its local rank."""
    return os.environ.get("ESPER_LISTEN_ADDRESS") or f"127.0.0.1:{DEFAULT_PORT + local_rank}"


def parse_address(address: object) -> tuple[str, int]:
    """Split HOST:PORT, [IPv6]:PORT or :PORT (all addresses); a number is a port on loopback, and 0 picks a free one.

    Raise ValueError on anything else.
    """
    text = f"127.0.0.1:{address}" if isinstance(address, int) and not isinstance(address, bool) else address
    if not isinstance(text, str):
        raise ValueError(f"address: expected HOST:PORT or a port, got {type(address).__name__}")
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535 or (":" in host and not bracketed):
        raise ValueError(f"address: expected HOST:PORT such as 127.0.0.1:{DEFAULT_PORT}, got {text!r}")
    return host.strip("[]"), int(port)


def listen(host: str, port: int) -> socket.socket:
    """Listen at an address; without a host on all, IPv4 and IPv6. Raise OSError, which says why not."""
    everywhere = host == "" and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if ":" in host or everywhere else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, dualstack_ipv6=everywhere)
    except OSError as error:
        reason = str(error.strerror).partition(" (while ")[0]
        raise OSError(error.errno, f"cannot listen on {_shown(host, port)}: {reason}") from None


def listen_nearby(host: str, port: int) -> socket.socket:
    """Listen at the first free port after one that is in use; raise OSError where there is none."""
    for near in range(port + 1, min(port + 1 + _TRIES, 65536)):
        try:
            return listen(host, near)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise OSError(errno.EADDRINUSE, f"cannot listen on {_shown(host, port)} or the {_TRIES} ports after it: all in use")


def url_of(listener: socket.socket, secure: bool) -> str:
    """Return the URL at which a listening socket can be reached."""
    host, port = listener.getsockname()[:2]
    return f"{'https' if secure else 'http'}://{_shown(host, port)}"


def _shown(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
