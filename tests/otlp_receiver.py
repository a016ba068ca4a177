"""An OTLP receiver that keeps what it was sent, and shows it to Prometheus as a collector would."""

import re
import ssl
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import AGGREGATION_TEMPORALITY_DELTA


class Point(NamedTuple):
    """One decoded data point."""

    name: str
    type: str
    unit: str
    help: str
    labels: dict
    value: int | float
    start: int
    time: int
    delta: bool


class Push(NamedTuple):
    """One decoded request; header names are lower case."""

    path: str
    headers: dict
    resource: dict
    points: list

    @property
    def time(self):
        """Return when it was made."""
        return self.points[0].time

    def shows(self, name):
        """Tell whether there is a point of that name."""
        return any(point.name == name for point in self.points)

    def value(self, name, **labels):
        """Return the value of the one point of that name with these labels."""
        (value,) = (
            point.value for point in self.points if point.name == name and labels.items() <= point.labels.items()
        )
        return value

    def page(self):
        """Return what a collector would serve: names translated, `job` and `instance` on each series."""
        resource = self.resource
        origin = {
            "job": f"{resource['service.namespace']}/{resource['service.name']}",
            "instance": resource["service.instance.id"],
        }
        return "".join(
            f"{prometheus_name(point)}{{{_labels(point.labels | origin)}}} {_number(point.value)}\n"
            for point in self.points
        )


class Receiver:
    """Listen while the `with` block lasts. POSTs are kept, oldest first; GET shows the last of each instance.

    `answers` are statuses for the next pushes, which are not kept if refused; after that every one is accepted.
    `seconds` is how long an answer takes. As somebody's proxy it takes what is meant for others, and tunnels nothing.
    """

    def __init__(self, port=0, tls=None):
        self.pushes = []
        self.answers = []
        self.seconds = 0.0
        self._changed = threading.Condition()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_port
        self.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def wait(self, condition, seconds=20):
        """Wait until a push meets a condition, and return the first that does."""
        found = lambda: next(filter(condition, self.pushes), None)  # noqa: E731
        with self._changed:
            assert self._changed.wait_for(found, seconds), f"none of {len(self.pushes)} pushes"
            return found()

    def page(self):
        """Return the last push of every instance as a page."""
        last = {push.resource["service.instance.id"]: push for push in list(self.pushes)}
        return "".join(push.page() for push in last.values())

    def _accept(self, push):
        if self.answers and (status := self.answers.pop(0)) >= 300:
            return status
        with self._changed:
            self.pushes.append(push)
            self._changed.notify_all()
        return 200

    def _handler(receiver):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                status = receiver._accept(_decode(self.path, headers, body))
                time.sleep(receiver.seconds)
                self._answer(status, b"", "application/x-protobuf")

            def do_CONNECT(self):
                self._answer(403, b"", "text/plain")

            def do_GET(self):
                self._answer(200, receiver.page().encode(), "text/plain; version=0.0.4")

            def _answer(self, status, body, content_type):
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        return Handler


def prometheus_name(point):
    """Name a series as Prometheus' and the collector's translation does, by OpenTelemetry's specification of it.

    Words are joined by underscores; a unit that is a word to Prometheus, and no {annotation}, is appended unless it is
    one of the words already; a gauge of unit 1 is a ratio; a counter ends in `total`.
    """
    words = [word for word in re.split(r"[^a-zA-Z0-9:]+", point.name) if word]
    unit = "" if "{" in point.unit or point.unit == "1" else {"s": "seconds"}.get(point.unit, point.unit)
    if unit and unit not in words:
        words.append(unit)
    last = {("counter", True): "total", ("counter", False): "total", ("gauge", True): "ratio"}
    if word := last.get((point.type, point.unit == "1")):
        words = [each for each in words if each != word] + [word]
    return "_".join(words)


def server_tls(certificate, key, client_ca=None):
    """Return a server's TLS; with `client_ca`, clients have to show a certificate."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    if client_ca is not None:
        tls.verify_mode = ssl.CERT_REQUIRED
        tls.load_verify_locations(client_ca)
    return tls


def _decode(path, headers, body):
    if headers.get("content-encoding") in ("gzip", "deflate"):
        body = zlib.decompress(body, wbits=zlib.MAX_WBITS | 32)
    request = ExportMetricsServiceRequest.FromString(body)
    (resource,) = request.resource_metrics
    (scope,) = resource.scope_metrics
    points = [point for metric in scope.metrics for point in _points(metric)]
    return Push(path, headers, _attributes(resource.resource.attributes), points)


def _points(metric):
    data = getattr(metric, metric.WhichOneof("data"))
    if metric.HasField("sum"):
        assert data.is_monotonic
    for point in data.data_points:
        yield Point(
            metric.name,
            "counter" if metric.HasField("sum") else "gauge",
            metric.unit,
            metric.description,
            _attributes(point.attributes),
            getattr(point, point.WhichOneof("value")),
            point.start_time_unix_nano,
            point.time_unix_nano,
            metric.HasField("sum") and data.aggregation_temporality == AGGREGATION_TEMPORALITY_DELTA,
        )


def _attributes(pairs):
    return {pair.key: pair.value.string_value for pair in pairs}


def _labels(labels):
    escaped = {
        name: value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") for name, value in labels.items()
    }
    return ",".join(f'{name}="{value}"' for name, value in escaped.items())


def _number(value):
    return {"inf": "+Inf", "-inf": "-Inf", "nan": "NaN"}.get(str(value), str(value))
