"""The bytes of one client, between real sockets."""

import asyncio
import gc
import socket
import ssl
import threading
import weakref
from contextlib import closing

import pytest

from esper_telemetry.exporters.web.stream import Stream, TlsStream
from tests.certificates import AUTHORITY, client_context


@pytest.fixture
def context():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    AUTHORITY.issue_cert("127.0.0.1").configure_cert(context)
    return context


@pytest.fixture(params=["plain", "tls"])
def opened(request, context):
    """Return a function that opens the stream, and one that opens the client's end."""
    if request.param == "plain":
        return open_plain, lambda wire: wire
    return lambda wire: open_tls(context, wire), trusting


async def open_plain(wire):
    return Stream(wire)


async def open_tls(context, wire):
    stream = TlsStream(wire, context, await Stream(wire).read())
    await stream.shake_hands()
    return stream


def trusting(wire):
    return client_context().wrap_socket(wire, server_hostname="127.0.0.1", suppress_ragged_eofs=False)


def converse(serve, client):
    """Run `serve(wire)` and, in a thread, `client(wire)`; return what both return."""

    def connect(port):
        with closing(socket.create_connection(("127.0.0.1", port), timeout=30)) as wire:
            return client(wire)

    async def both():
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setblocking(False)
            talking = asyncio.create_task(asyncio.to_thread(connect, listener.getsockname()[1]))
            wire, _ = await asyncio.get_running_loop().sock_accept(listener)
            with wire:
                served = await serve(wire)
            return served, await talking

    return asyncio.run(both())


async def read_all(stream):
    parts = []
    while part := await stream.read():
        parts.append(part)
    return b"".join(parts)


def receive_all(wire):
    parts = []
    while part := wire.recv(65536):
        parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize("size", [1, 16 * 1024, 100_000])
def test_what_was_sent_is_read_and_what_is_written_arrives_up_to_a_clean_end(opened, size):
    open_stream, open_client = opened
    sent = bytes(range(251)) * (size // 251 + 1)

    async def echo(wire):
        stream = await open_stream(wire)
        heard = b""
        while len(heard) < len(sent):
            heard += await stream.read()
        await stream.write(heard)
        await stream.end()

    def client(wire):
        wire = open_client(wire)
        wire.sendall(sent)
        return receive_all(wire)

    assert converse(echo, client)[1] == sent


@pytest.mark.parametrize("length", [1, 7, 1000])
def test_records_may_come_in_any_pieces(context, length):
    async def listen(wire):
        return await read_all(await open_tls(context, wire))

    def client(wire):
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = client_context().wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")

        def send():
            while piece := outgoing.read(length):
                wire.sendall(piece)

        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                send()
                incoming.write(wire.recv(65536))
        tls.write(b"x" * 5000)
        with pytest.raises(ssl.SSLWantReadError):
            tls.unwrap()
        send()
        receive_all(wire)  # who closes with something unread resets the connection

    assert converse(listen, client)[0] == b"x" * 5000


def test_what_a_slow_client_does_not_take_is_waited_for(opened):
    open_stream, open_client = opened
    stuck = threading.Event()
    size = 20_000_000  # more than any kernel keeps

    async def serve(wire):
        stream = await open_stream(wire)
        writing = asyncio.create_task(stream.write(b"y" * size))
        await asyncio.sleep(0)
        assert not writing.done()
        stuck.set()
        await writing
        await stream.end()

    def client(wire):
        wire = open_client(wire)
        assert stuck.wait(30)
        return len(receive_all(wire))

    assert converse(serve, client)[1] == size


def test_who_does_not_speak_tls_is_an_error(context):
    async def serve(wire):
        with pytest.raises(OSError, match=r"(?i)http request"):
            await open_tls(context, wire)

    converse(serve, lambda wire: wire.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"))


def test_a_client_that_is_refused_is_told_why(context):
    async def serve(wire):
        with pytest.raises(OSError, match=r"(?i)unsupported protocol"):
            await open_tls(context, wire)

    def client(wire):
        old = client_context()
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises(OSError, match=r"(?i)alert protocol version"):
            old.wrap_socket(wire, server_hostname="127.0.0.1")

    context.minimum_version = ssl.TLSVersion.TLSv1_3
    converse(serve, client)


def test_a_client_that_goes_without_a_word_is_an_end_or_an_error(context):
    async def serve(wire):
        stream = await open_tls(context, wire)
        try:
            return await stream.read()
        except OSError as error:  # not so in older Pythons, which ask OpenSSL to take it for an end
            return error

    def client(wire):
        wire = trusting(wire)
        wire.shutdown(socket.SHUT_WR)  # below TLS
        receive_all(wire)

    served, _ = converse(serve, client)
    if context.options & ssl.OP_IGNORE_UNEXPECTED_EOF:
        assert served == b""
    else:
        assert isinstance(served, OSError)
        assert "EOF" in str(served)


def test_a_client_leaves_nothing_for_the_garbage_collector(context):
    streams = []

    async def serve(wire):
        stream = await open_tls(context, wire)
        streams.append(weakref.ref(stream))
        await stream.read()
        await stream.write(b"x")
        await stream.end()

    def client(wire):
        wire = trusting(wire)
        wire.sendall(b"x")
        return receive_all(wire)

    gc.disable()
    try:
        converse(serve, client)
        assert streams[0]() is None
    finally:
        gc.enable()
