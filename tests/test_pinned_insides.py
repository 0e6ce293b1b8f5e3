"""The insides of Hypercorn, h11, h2, Quart-Trio and trio that we reach for: a new version that moves them fails here.

Two tables. ATTRIBUTES are the names that `hypercorn_connection` and `asgi` use, looked up on the live objects of a real
connection. SOURCES are functions whose behaviour we count on, by a digest of their source: when one has changed, read
what stands beside it, look whether it still holds, and put the new digest in.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import h11
import h11._writers
import hypercorn.protocol.h2
import hypercorn.protocol.h11
import hypercorn.protocol.http_stream
import hypercorn.trio.run
import hypercorn.trio.task_group
import hypercorn.trio.tcp_server
import hypercorn.trio.worker_context
import pytest
import quart_trio.asgi
import trio
from hypercorn.config import Config
from serving import FRAME, Gate, get, h2_client, read_until, serving

from sse_trio.connection import Worker
from sse_trio.hypercorn_connection import _is_chunked

HTTPStream = hypercorn.protocol.http_stream.HTTPStream
H11Protocol = hypercorn.protocol.h11.H11Protocol
H2Protocol = hypercorn.protocol.h2.H2Protocol
StreamBuffer = hypercorn.protocol.h2.StreamBuffer
TaskGroup = hypercorn.trio.task_group.TaskGroup
TCPServer = hypercorn.trio.tcp_server.TCPServer
TrioASGIHTTPConnection = quart_trio.asgi.TrioASGIHTTPConnection


def parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


@asynccontextmanager
async def a_connection(http2: bool) -> AsyncIterator[Any]:
    """The connection of a stream that stands on a real server."""
    gate = Gate()
    async with serving(gate.stand) as server:
        if http2:
            async with h2_client(server) as client:
                number = await client.request("/stream")
                await client.until(lambda: client.answers[number].body == FRAME, "the stream stands")
                yield gate.connection
        else:
            async with await server.connect() as peer:
                await peer.send_all(get("/stream"))
                await read_until(peer, FRAME)
                yield gate.connection


async def test_the_walk_down_from_send_to_the_socket_over_http_1_1() -> None:
    async with a_connection(http2=False) as connection:
        assert type(connection).__name__ == "_H11Connection", "send → HTTPStream → H11Protocol → TCPServer → .stream"
        http, protocol = connection._http, connection._protocol
        assert connection._send.__self__ is http
        assert connection._send.__func__ is HTTPStream.app_send
        assert http.send.__self__ is protocol
        server = protocol.send.__self__
        assert type(server) is TCPServer
        assert server.stream is connection._transport, (
            "TCPServer reads and writes through its attribute `stream`, always"
        )
        assert type(connection._transport.stream) is trio.SocketStream
        assert http.context is server.context, "the worker's context"
        assert http.closed is False, "closed says that the peer is gone"
        assert type(http.state) is hypercorn.protocol.http_stream.ASGIHTTPState, (
            "state says how far the response has come"
        )
        assert http.config.log.access_logger is None, (
            "the only one that looks at the headers of scope and response again"
        )
        assert http.scope["headers"] == []
        assert http.response["headers"] == []
        assert callable(http.app_put), "app_put is how Hypercorn's reader tells the app of what came"
        assert type(protocol.task_group) is TaskGroup
        assert callable(protocol.can_read.set), "what the reader waits for when its peer has spoken early"
        assert isinstance(protocol.connection, h11.Connection)
        assert protocol.connection.trailing_data == (b"", False), "what came after the request"


async def test_the_walk_down_from_send_to_the_socket_over_http_2() -> None:
    async with a_connection(http2=True) as connection:
        assert type(connection).__name__ == "_H2Connection", "send → HTTPStream → H2Protocol → TCPServer → .stream"
        http, protocol = connection._http, connection._protocol
        assert protocol.send.__self__.stream is connection._transport
        assert http.stream_id == 1
        assert isinstance(protocol.stream_buffers, dict), "what each stream has not sent"
        assert isinstance(protocol.streams, dict), "the streams that are open; __missing__ stands for those that were"
        assert protocol.keep_alive_requests < -1_000_000, "it counts the requests of this connection, against GOAWAY"
        assert protocol.config.h2_max_concurrent_streams == Config.h2_max_concurrent_streams == 100
        assert protocol.connection.local_settings.max_concurrent_streams == 1000
        assert parameters(protocol._close_stream) == ["stream_id"]
        assert parameters(protocol._window_updated) == ["stream_id"]
        assert parameters(protocol._flush) == []
        assert parameters(protocol.task_group.spawn) == ["func", "args"]
        assert parameters(protocol.connection.reset_stream) == ["stream_id", "error_code"]


async def test_the_buffer_of_an_http_2_stream() -> None:
    buffer = StreamBuffer(hypercorn.trio.worker_context.EventWrapper)
    await buffer._paused.set()
    with trio.fail_after(1):
        await buffer.push(b"x" * (1 << 20))  # a push does not wait when the pause was lifted before it
    assert buffer.buffer == b"x" * (1 << 20)
    with trio.move_on_after(0.01) as scope:
        await buffer.drain()
    assert scope.cancelled_caught, "drain waits until all is sent"
    await buffer.close()
    assert buffer.buffer == b"", "close frees what was not sent"
    with trio.fail_after(1):
        await buffer.drain()


async def test_the_workers_events_are_what_a_worker_waits_for() -> None:
    context = hypercorn.trio.worker_context.WorkerContext(None)
    worker = Worker(context)
    assert not worker.stopping.is_set()
    await context.terminated.set()
    with trio.fail_after(1):
        await worker.stopping.wait()
    assert worker.stopping.is_set()
    await worker.stop()
    assert context.terminate.is_set()
    source = inspect.getsource(hypercorn.trio.run.worker_serve)
    assert "nursery.start_soon(raise_shutdown, context.terminate.wait)" in source, "terminate stops the worker"
    assert "await context.terminated.set()" in source, "said before connections are waited for"


@pytest.mark.parametrize(
    ("version", "method", "headers", "chunked"),
    [
        ("1.1", "GET", [], True),
        ("1.0", "GET", [], False),
        ("1.1", "HEAD", [], False),
        ("1.1", "GET", [(b"content-length", b"5")], False),
    ],
)
def test_h11_says_whether_it_writes_chunks(
    version: str, method: str, headers: list[tuple[bytes, bytes]], chunked: bool
) -> None:
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(f"{method} / HTTP/{version}\r\nHost: x\r\n\r\n".encode())
    assert isinstance(connection.next_event(), h11.Request)
    assert not _is_chunked(connection)
    connection.send(h11.Response(status_code=200, headers=headers))
    assert _is_chunked(connection) is chunked, "h11.Connection._writer is a ChunkedWriter while it writes chunks"
    if chunked:
        assert connection.send(h11.Data(data=b"x" * 26)) == b"1a\r\n" + b"x" * 26 + b"\r\n", "as we write them"
        assert connection.send(h11.EndOfMessage()) == b"0\r\n\r\n", "it has no memory of the chunks before"
        assert not _is_chunked(connection)


def test_the_receive_of_an_app_is_that_of_a_trio_channel() -> None:
    source = inspect.getsource(TaskGroup.spawn_app)
    assert "app_receive_channel.receive," in source, "the queue is emptied when a response of ours takes over"


def test_an_ssl_stream_reads_and_writes_through_its_attribute_transport_stream() -> None:
    assert "self.transport_stream" in inspect.getsource(trio.SSLStream.__init__)
    assert "await self.transport_stream.send_all(to_send)" in inspect.getsource(trio.SSLStream._retry)
    assert "await self.transport_stream.receive_some()" in inspect.getsource(trio.SSLStream._retry)


SOURCES: list[tuple[Callable[..., Any], set[str], str]] = [
    (
        hypercorn.trio.run.worker_serve,
        {"8dc8347a9fc3"},
        "It makes its listeners with trio.SocketListener, after the app's start-up (accept_eagerly), and gives them to "
        "trio.serve_listeners, which says that no file is left, and waits.",
    ),
    (
        TCPServer.protocol_send,
        {"225856426bff"},
        "It writes in a shield without a deadline, and takes Broken- and ClosedResourceError for the peer's leaving.",
    ),
    (
        TCPServer._read_data,
        {"7ca747d922c6"},
        "Broken- and ClosedResourceError end the reader; nothing else of it is caught (contain_failures).",
    ),
    (
        TCPServer._close,
        {"bc73c4ae25a1"},
        "It stands a stream that is closed already (abort), and one that it cannot half-close.",
    ),
    (
        HTTPStream.app_send,
        {"c806044b9973"},
        "Bodies are not sent to HEAD; the end of a response goes EndBody, state CLOSED, StreamClosed; None, after the "
        "app has returned, closes what is unfinished.",
    ),
    (HTTPStream.handle, {"6ed2e34c5e70"}, "StreamClosed sets `closed` before it tells the app."),
    (
        H11Protocol._maybe_recycle,
        {"3ac53f52bc4e"},
        "It tells the app of the end (http.disconnect) before it makes the connection idle or closes it: the last "
        "send must not be cancelled.",
    ),
    (
        H11Protocol._handle_events,
        {"bd4a76b2837e"},
        "A peer that speaks early makes it wait in can_read until the response has ended (spoke_early, release).",
    ),
    (
        H2Protocol.stream_send,
        {"d8fc824e2770"},
        "No message but a body waits for flow control; a body waits in push only (the pause), the end in drain only.",
    ),
    (
        H2Protocol._send_data,
        {"a89ce4286f36"},
        "A stream that was reset is forgotten, with its buffer, when it is woken.",
    ),
    (
        H2Protocol._handle_events,
        {"3378aef0a234"},
        "What it does on StreamReset is what _reset does; DATA looks its stream up.",
    ),
    (hypercorn.trio.task_group._handle, {"06081a56a993"}, "After the app, whatever became of it, send(None)."),
    (
        TrioASGIHTTPConnection.__call__,
        {"98802020652f", "f502fbff800c"},
        "It ends when handle_request has, or the peer has left; nothing of the request lives on.",
    ),
    (
        TrioASGIHTTPConnection.handle_messages,
        {"8d994a7d28dc", "a7d080021450"},
        "It returns when the peer has left, and only then.",
    ),
    (
        TrioASGIHTTPConnection.handle_request,
        {"93e58fe22209"},
        "It calls _send_response(send, response) once, without a timeout where response.timeout is None.",
    ),
]


@pytest.mark.parametrize(
    ("function", "digests", "counted_on"), SOURCES, ids=lambda value: getattr(value, "__qualname__", "")
)
def test_what_we_count_on_has_not_been_rewritten(
    function: Callable[..., Any], digests: set[str], counted_on: str
) -> None:
    digest = hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:12]
    assert digest in digests, (
        f"{function.__module__}.{function.__qualname__} has changed. We count on this: {counted_on}"
    )


def test_contained_is_the_run_that_hypercorn_calls() -> None:
    assert "return self.run().__await__()" in inspect.getsource(TCPServer.__await__)
