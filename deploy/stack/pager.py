"""A receiver of Alertmanager's webhooks that keeps what it hears.

`python -m deploy.stack.pager --listen-address 127.0.0.1:19309` prints every page.
"""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, NamedTuple, Self

_PAGERDUTY_ACCEPTED = 202


class Notice(NamedTuple):
    """One accepted POST; `path` is /page, /pagerduty, /slack or /alive."""

    path: str
    body: dict[str, Any]
    authorization: str | None

    @property
    def lines(self) -> list[str]:
        """Return a page as one line per alert."""
        return [
            f"{alert['status'].upper()} {alert['labels'].get('severity')}: {alert['annotations'].get('summary')}"
            for alert in self.body.get("alerts", ())
        ]


class Pager:
    """Listen while the `with` block lasts; `notices` holds what arrived, oldest first.

    `answers` are statuses for the next pages, refused ones among them; after that every one is accepted.
    """

    def __init__(
        self, address: tuple[str, int] = ("127.0.0.1", 0), listener: Callable[[Notice], None] | None = None
    ) -> None:
        self.notices: list[Notice] = []
        self.answers: list[int] = []
        self._listener = listener
        self._server = ThreadingHTTPServer(address, self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, name="pager", daemon=True)
        self.url = f"http://{address[0]}:{self._server.server_port}"

    def __enter__(self) -> Self:
        """Start to listen."""
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Stop."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def pages(self, **labels: str) -> list[dict[str, Any]]:
        """Return the pages whose alerts have all these labels in common."""
        bodies = [notice.body for notice in self.notices if notice.path == "/page"]
        return [body for body in bodies if labels.items() <= body["commonLabels"].items()]

    def wait(self) -> None:
        """Wait until the pager is closed."""
        self._thread.join()

    def _accept(self, notice: Notice) -> int:
        if notice.path == "/page" and self.answers and (status := self.answers.pop(0)) >= 300:
            return status
        self.notices.append(notice)
        if self._listener is not None:
            self._listener(notice)
        return _PAGERDUTY_ACCEPTED if notice.path == "/pagerduty" else 200

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        pager = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(pager._accept(Notice(self.path, body, self.headers["Authorization"])))
                self.end_headers()
                self.wfile.write(b"ok")

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler


def _print_page(notice: Notice) -> None:
    if notice.path == "/page":
        print(*notice.lines, sep="\n", flush=True)


def main() -> None:
    """Print pages until interrupted."""
    parser = argparse.ArgumentParser("pager", description="Print every page of Alertmanager.")
    parser.add_argument("--listen-address", default="127.0.0.1:19309", metavar="HOST:PORT")
    host, _, port = parser.parse_args().listen_address.rpartition(":")
    with Pager((host, int(port)), _print_page) as pager:
        print(f"pager: listening at {pager.url}", flush=True)
        with suppress(KeyboardInterrupt):
            pager.wait()


if __name__ == "__main__":
    main()
