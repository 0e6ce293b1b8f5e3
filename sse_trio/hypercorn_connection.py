"""Connections under Hypercorn: the socket below an ASGI `send`, and the deadline that is put there.

Strategy: one walk, at each request, goes from `send` down through Hypercorn's HTTPStream and its protocol to the
TCPServer, and puts a `DeadlineStream` below it; each step is checked by type. Bodies of HTTP/1.1 then go straight to
the socket, in chunks that are made once for all clients, or into TLS; h11's state stays right, and the last chunk is
Hypercorn's. HTTP/2 and HTTP/1.0 take Hypercorn's way. tests/test_pinned_insides.py names each inside that is used.

What always holds: messages to Hypercorn run in a shield, since a cancel inside its `send` loses bytes that its
protocols count as sent, and cuts its own cleaning up. The shield is bounded, and the stream below has a deadline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any, cast

import h11
import hypercorn.trio.run
import structlog
import trio
from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes
from hypercorn.config import Config
from hypercorn.protocol.h2 import H2Protocol, StreamBuffer
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.protocol.http_stream import ASGIHTTPState, HTTPStream
from hypercorn.protocol.ws_stream import WSStream
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.typing import ASGIReceiveCallable, ASGIReceiveEvent, ASGISendCallable, ASGISendEvent

from sse_trio.accepting import EagerListener
from sse_trio.connection import Connection, Headers, PeerGone, Respond, Writable
from sse_trio.deadline import DeadlineStream, OutOfPatience

__all__ = ["accept_eagerly", "chunk", "connection_below", "contain_failures"]

log = structlog.get_logger("sse_trio.connection")

BACKSTOP = 6
"""A shield around a send to Hypercorn lasts this many write timeouts: the deadline below it ends it long before."""

SEGMENT = 1460
"""Bytes of an HTTP/2 stream that its peer must take, in the write timeout, to count as one that reads. A kernel opens the
window of a connection by no less; a stream's may be opened by a byte a second, and never be found."""

MAX_STREAMS = 1000
"""Streams that one HTTP/2 connection may have open at once, where Hypercorn's default would stand."""


def connection_below(send: ASGISendCallable, scope: Any, timeout: float) -> tuple[Connection, Any] | None:
    """The connection below Hypercorn's `send`, with a deadline of `timeout` s, and the worker's context.

    None when `send` is not Hypercorn's, or not as we know it.
    """
    found = _beneath(send)
    if found is None:
        return None
    http, protocol, server = found
    transport = _adopt(server, timeout)
    if isinstance(protocol, H2Protocol):
        _unlimit(protocol)
        return _H2Connection(scope, send, http, protocol, transport), http.context
    tls = server.stream if isinstance(server.stream, trio.SSLStream) else None
    return _H11Connection(scope, send, http, protocol, transport, cast("Any", tls)), http.context


def chunk(payload: bytes) -> bytes:
    """The HTTP/1.1 chunk that holds `payload`, which is not empty (an empty chunk ends the body)."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


class _HypercornConnection(Connection):
    """What the connections of all protocols under Hypercorn share."""

    __slots__ = ("_http", "_transport")

    def __init__(self, scope: Any, send: ASGISendCallable, http: HTTPStream, transport: DeadlineStream) -> None:
        super().__init__(scope, send, transport.timeout, transport.stopping)
        self._http = http
        self._transport = transport

    @contextmanager
    def _shielded(self, what: str) -> Iterator[None]:
        """Against a cancel, which would cut `what` in its middle; where it takes too long, the peer is cut off."""
        with trio.move_on_after(BACKSTOP * self.timeout, shield=True) as scope:
            yield
        if scope.cancelled_caught:
            self._transport.abort()
            raise PeerGone(f"the connection has not taken {what} in time")

    async def _guarded(self, message: ASGISendEvent) -> None:
        await self._ready()
        with self._shielded("a message"):
            await self._send(message)
        if self._http.closed and message.get("more_body", True):
            # Hypercorn does not say so: it drops what is sent to a peer that is gone.
            raise self._gone()

    def _gone(self) -> PeerGone:
        self.stalled = self._transport.stalled
        return PeerGone("the peer is gone")

    async def run(self, respond: Respond, receive: ASGIReceiveCallable) -> None:
        """Run a response of ours, without a task that waits for the peer's leaving: Hypercorn's reader cancels it."""
        self._scope = scope = trio.CancelScope()

        async def hear(message: ASGIReceiveEvent) -> None:
            if message["type"] == "http.disconnect":
                scope.cancel()

        self._http.app_put = hear
        _drain(receive)
        if self._http.config.log.access_logger is None:
            self._http.scope["headers"] = []  # nothing else looks at them again, and a browser's are 1 to 2 KB
        if self._http.closed:  # it said so to the queue
            scope.cancel()
        with scope:
            await respond(self)

    async def start(self, status: int, headers: Headers) -> None:
        await super().start(status, headers)
        if self._http.config.log.access_logger is None:
            self._http.response["headers"] = []  # as above

    async def _ready(self) -> None:
        """Wait until a message can be taken, so that little waiting is left for the shield."""
        if self._transport.unsent() == 0:
            return  # the usual case, without a round through the kernel's poll
        try:
            await self._transport.wait_writable()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise self._gone() from error

    def unsent(self) -> int | None:
        return self._transport.unsent()


class _H11Connection(_HypercornConnection):
    """HTTP/1.x. Bodies in chunks go past h11, whose state stays right: to the socket, or into TLS."""

    __slots__ = ("_chunked", "_protocol", "_tls")

    def __init__(
        self,
        scope: Any,
        send: ASGISendCallable,
        http: HTTPStream,
        protocol: H11Protocol,
        transport: DeadlineStream,
        tls: trio.SSLStream[DeadlineStream] | None,
    ) -> None:
        super().__init__(scope, send, http, transport)
        self._protocol = protocol
        self._tls = tls
        self._chunked = False
        """Whether the head is made and the body is ours to write, in chunks."""

    async def start(self, status: int, headers: Headers) -> None:
        if self._tls is not None:
            await super().start(status, headers)
            self._chunked = _is_chunked(self._protocol.connection)
            return
        # Hypercorn would write the head by itself. It is kept, to go out with the first chunk: one packet less.
        self._transport.held = held = bytearray()
        try:
            await super().start(status, headers)
        finally:
            self._transport.held = None
        self._rest = bytes(held)
        self._chunked = _is_chunked(self._protocol.connection)
        if not self._chunked:
            with self._shielded("the head"):
                await self._write_past_h11()

    async def write(self, payload: bytes) -> None:
        await super().write(chunk(payload) if self._chunked and payload else payload)

    async def write_rest(self) -> None:
        await (self._write_past_h11() if self._chunked else super().write_rest())

    async def _write_past_h11(self) -> None:
        try:
            await (self._write_to_socket() if self._tls is None else self._write_into(self._tls))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise self._gone() from error

    async def _write_to_socket(self) -> None:
        await trio.lowlevel.checkpoint()
        while self._rest is not None:
            sent = await self._transport.send_some(self._rest)
            self._keep(self._rest, sent)

    async def _write_into(self, tls: trio.SSLStream[DeadlineStream]) -> None:
        await trio.lowlevel.checkpoint()
        if self._rest is not None:
            await self._ready()
            with self._shielded("a chunk"):
                await tls.send_all(self._rest)
            self._rest = None

    def _keep(self, data: bytes | memoryview, sent: int) -> None:
        self._rest = memoryview(data)[sent:] if sent < len(data) else None

    async def finish(self) -> None:
        await self.write_rest()
        self._chunked = False
        await super().finish()

    @property
    def can_write_now(self) -> bool:
        return self._chunked and self._tls is None and self._rest is None

    def write_now(self, batch: Writable) -> bool:
        data = self.framed(batch)
        try:
            sent = self._transport.send_now(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise self._gone() from error
        if sent:
            self._keep(data, sent)
        return sent > 0

    def lend(self, closing: Callable[[], None]) -> int | None:
        if not self.can_write_now or (descriptor := self._transport.socket.fileno()) < 0:
            return None
        self._transport.closing = closing
        return descriptor

    def reclaim(self) -> None:
        self._transport.closing = None

    def framed(self, batch: Writable) -> bytes:
        if batch.chunk is None:
            batch.chunk = chunk(batch.payload)
        return batch.chunk

    def wrote(self, size: int) -> None:
        self._transport.count(size)

    def wrote_part(self, batch: Writable, size: int) -> None:
        self._transport.count(size)
        self._keep(self.framed(batch), size)

    def look(self) -> None:
        try:
            self._transport.look()
        except trio.BrokenResourceError as error:
            raise self._gone() from error

    def unwatch(self) -> None:
        self._transport.unwatch()

    @property
    def spoke_early(self) -> bool:
        return self._protocol.connection.trailing_data[0] != b""

    def abort(self) -> None:
        self._chunked = False
        super().abort()
        self._transport.abort()
        # The reader may wait for the end of the response, and not see its own. It is woken and told; cancelling its
        # nursery is no way: Hypercorn's TaskGroup drops what the nursery says of its own Cancelled, which then goes on
        # upwards and ends the server.
        self._protocol.connection = cast("Any", _OVER)
        self._protocol.task_group.spawn(self._protocol.can_read.set)

    def release(self) -> None:
        # Hypercorn's reader waits until the response to the first request has ended. One that will not end,
        # since it failed or the peer was cut off, would leave the reader waiting for ever.
        unfinished = self._http.state is ASGIHTTPState.RESPONSE or self._http.closed
        if self.spoke_early and unfinished and self._http.state is not ASGIHTTPState.CLOSED:
            self.abort()


class _Over:
    """What stands in h11's place once the peer was cut off: whoever asks is told that the connection is closed."""

    our_state = their_state = h11.ERROR
    trailing_data = (b"", True)
    they_are_waiting_for_100_continue = False

    def next_event(self) -> h11.ConnectionClosed:
        return h11.ConnectionClosed()

    def receive_data(self, data: bytes) -> None:
        pass

    def send(self, event: object) -> bytes:
        raise h11.LocalProtocolError("the peer was cut off")


_OVER = _Over()


def _drain(receive: Any) -> None:
    """Empty the queue of a request that is not listened to any more: Hypercorn's reader may wait for room."""
    channel = getattr(receive, "__self__", None)
    if isinstance(channel, trio.MemoryReceiveChannel):
        with suppress(trio.WouldBlock):
            while True:
                channel.receive_nowait()


def _is_chunked(connection: Any) -> bool:
    """Whether h11 has begun a body in chunks: not to HTTP/1.0, to HEAD, or with a Content-Length."""
    return (
        isinstance(connection, h11.Connection)
        and connection.our_state is h11.SEND_BODY
        and type(getattr(connection, "_writer", None)).__name__ == "ChunkedWriter"
    )


class _H2Connection(_HypercornConnection):
    """A stream of an HTTP/2 connection. It waits for its own flow control, and is cut off without the
    others."""

    __slots__ = ("_protocol",)

    def __init__(
        self,
        scope: Any,
        send: ASGISendCallable,
        http: HTTPStream,
        protocol: H2Protocol,
        transport: DeadlineStream,
    ) -> None:
        super().__init__(scope, send, http, transport)
        self._protocol = protocol

    @property
    def _buffer(self) -> StreamBuffer | None:
        return self._protocol.stream_buffers.get(self._http.stream_id)

    async def _ready(self) -> None:
        buffer = self._buffer
        if buffer is None:
            return
        if buffer.buffer:
            try:
                await self._transport.wait(buffer.drain, lambda: len(buffer.buffer), least=SEGMENT)
            except OutOfPatience as error:
                self.stalled = True
                self.abort()
                raise PeerGone("the peer takes nothing of this stream") from error
        # We have just waited in its place, and with a deadline: let it not wait in its `push`.
        await buffer._paused.set()

    def abort(self) -> None:
        Connection.abort(self)
        self._protocol.task_group.spawn(self._reset)

    async def _reset(self) -> None:
        """What Hypercorn does when the peer resets a stream, and the frame that tells the peer."""
        protocol, stream_id = self._protocol, self._http.stream_id
        with suppress(ProtocolError):
            protocol.connection.reset_stream(stream_id, ErrorCodes.CANCEL)
        if (buffer := self._buffer) is not None:
            await buffer.close()
        await protocol._close_stream(stream_id)
        await protocol._window_updated(stream_id)
        await protocol._flush()


def _beneath(send: Any) -> tuple[HTTPStream, H11Protocol | H2Protocol, TCPServer] | None:
    """Hypercorn's objects below its ASGI `send`; None when they are not the ones that we know."""
    http = getattr(send, "__self__", None)
    if not isinstance(http, HTTPStream) or getattr(send, "__func__", None) is not HTTPStream.app_send:
        return None
    protocol = getattr(http.send, "__self__", None)
    if not isinstance(protocol, H11Protocol | H2Protocol):
        return None
    server = getattr(protocol.send, "__self__", None)
    if not isinstance(server, TCPServer):
        return None
    stream = server.stream
    transport: object = stream.transport_stream if isinstance(stream, trio.SSLStream) else stream
    return (http, protocol, server) if isinstance(transport, trio.SocketStream | DeadlineStream) else None


def _adopt(server: TCPServer, timeout: float) -> DeadlineStream:
    """The deadline below this TCP connection, put there at its first request."""
    stream: Any = server.stream
    tls = isinstance(stream, trio.SSLStream)
    inner = stream.transport_stream if tls else stream
    if isinstance(inner, DeadlineStream):
        return inner
    transport = DeadlineStream(inner, timeout, server.context.terminated)
    transport.bound_kernel()
    if tls:
        stream.transport_stream = transport
    else:
        cast("Any", server).stream = transport
    return transport


def _unlimit(protocol: H2Protocol) -> None:
    """Let streams that last live beside many requests on one HTTP/2 connection; done at its first request."""
    if protocol.keep_alive_requests < 0:
        return
    # Past `keep_alive_max_requests` Hypercorn says GOAWAY, and every stream that is open goes silent.
    protocol.keep_alive_requests = -(1 << 62)
    protocol.streams = _Streams(protocol.streams)
    # One stream too many and Hypercorn ends the whole connection. A limit that the operator chose stays.
    if protocol.config.h2_max_concurrent_streams == Config.h2_max_concurrent_streams:
        protocol.connection.update_settings({SettingCodes.MAX_CONCURRENT_STREAMS: MAX_STREAMS})


class _Streams(dict[int, HTTPStream | WSStream]):
    """The open streams of an HTTP/2 connection. To one that has ended, more of its request is sent into the void.

    Hypercorn looks up the stream of each DATA frame; one that arrives after the answer (a body that nobody waited for)
    would be a KeyError in its reader, which ends the worker.
    """

    def __missing__(self, stream_id: int) -> HTTPStream | WSStream:
        return cast("HTTPStream", _Gone())


class _Gone:
    async def handle(self, event: object) -> None:
        """Ignore it."""


def accept_eagerly() -> None:
    """Have Hypercorn's trio worker, this and any later one in the process, listen with an `EagerListener`.

    It makes its listeners itself, by the name `trio.SocketListener`; so its module's `trio` is one where that is ours.
    """
    vars(hypercorn.trio.run)["trio"] = SimpleNamespace(**vars(trio) | {"SocketListener": EagerListener})


def contain_failures() -> None:
    """Have a failure in a connection of Hypercorn's trio worker end that connection, and not the worker.

    Some bytes that any client can send make Hypercorn's reader raise, and its nursery then takes down all connections
    and the process: a path that is not ASCII over HTTP/2, a WebSocket handshake with a body, DATA after the answer.
    Nothing below an ASGI `send` can be reached before the first request, so this replaces `TCPServer.run`, once. And
    `_read_data`: a connection whose peer has left, before its first request or between two, is closed at once.
    """
    run = TCPServer.run
    if getattr(run, "contains_failures", False):
        return

    async def contained(server: TCPServer) -> None:
        try:
            await run(server)
        except* Exception as group:
            error: BaseException = group
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            log.warning("a connection failed in Hypercorn", error=repr(error))
        finally:
            # The server and its protocol know each other: cut, they are freed now, and not when a collection, which
            # looks at everything that ten thousand clients hold, comes round to them.
            vars(server).clear()

    read = TCPServer._read_data

    async def read_to_the_end(server: TCPServer) -> None:
        await read(server)
        # The peer has left. Hypercorn would wait for the end of the keep-alive time with the socket open.
        await server.idle_task.stop()

    contained.contains_failures = True  # type: ignore[attr-defined]
    TCPServer.run = contained  # type: ignore[assignment, method-assign]
    TCPServer._read_data = read_to_the_end  # type: ignore[assignment, method-assign]
