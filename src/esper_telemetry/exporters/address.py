"""Where to listen."""

from __future__ import annotations

import os

DEFAULT_PORT = 19301


def default_address() -> str:
    """Return the loopback address of this process: port 19301, plus LOCAL_RANK under torchrun."""
    return f"127.0.0.1:{DEFAULT_PORT + int(os.environ.get('LOCAL_RANK', '0'))}"


def parse_address(address: str) -> tuple[str, int]:
    """Split HOST:PORT, [IPv6]:PORT or :PORT (all addresses); port 0 picks a free one.

    Raise ValueError on anything else.
    """
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535 or (":" in host and not bracketed):
        raise ValueError(f"address: expected HOST:PORT such as 127.0.0.1:{DEFAULT_PORT}, got {address!r}")
    return host.strip("[]"), int(port)
