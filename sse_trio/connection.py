"""Everything that reaches below an ASGI `send`: the socket, deadlines, the end of a connection, the end of
the server.

Strategy: Quart routes, and a `ConnectionResponse` is handed the connection in place of a body to iterate
over. One walk, at each request, goes from `send` down through Hypercorn's HTTPStream and its protocol to the
TCPServer, and puts a `DeadlineStream` below it; each step is checked by type. Where another server stands, or
a Hypercorn that was built differently, that is said once, and the connection is plain ASGI.
tests/test_pinned_insides.py names each inside used.

What always holds:
* A connection has one writer at a time. What could not be written is its `rest`; nothing is written before
  it.
* `write` has taken its payload when it is called, cancelled or not: a chunk is never left cut with something
  behind it.
* Messages to Hypercorn run in a shield, since a cancel inside its `send` loses bytes that its protocols count
  as sent, and its own cleaning up. The shield is bounded, and the stream below has a deadline.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Any, Protocol, cast

import h11
import structlog
import trio
from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes
from hypercorn.config import Config
from hypercorn.protocol.h2 import H2Protocol, StreamBuffer
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.protocol.http_stream import ASGIHTTPState, HTTPStream
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.typing import ASGIReceiveCallable, ASGIReceiveEvent, ASGISendCallable, ASGISendEvent
from quart_trio.asgi import TrioASGIHTTPConnection
from quart_trio.wrappers import TrioResponse

from sse_trio.deadline import DeadlineStream, OutOfPatience, Stopping

__all__ = ["ASGIConnection", "Connection", "ConnectionResponse", "Worker", "Writable"]

log = structlog.get_logger("sse_trio.connection")

Headers = Iterable[tuple[bytes, bytes]]
Respond = Callable[["Connection"], Awaitable[None]]

BACKSTOP = 6
"""A shield around a send to Hypercorn lasts this many write timeouts: the deadline below it ends it long
before."""

MAX_STREAMS = 1000
"""Streams that one HTTP/2 connection may have open at once, where Hypercorn's default would stand."""


class Writable(Protocol):
    """Bytes for many clients: whole frames, and room for the chunk around them, made by the first that needs
    it."""

    payload: bytes
    chunk: bytes | None


def chunk(payload: bytes) -> bytes:
    """The HTTP/1.1 chunk that holds `payload`, which is not empty (an empty chunk ends the body)."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


class Connection:
    """One request's connection, to an ASGI server of which nothing is known. Subclasses know Hypercorn's."""

    __slots__ = (
        "_rest",
        "_scope",
        "_send",
        "http_version",
        "is_tls",
        "method",
        "peer",
        "stalled",
        "stopping",
        "timeout",
    )

    def __init__(self, scope: Any, send: ASGISendCallable, timeout: float, stopping: Stopping) -> None:
        self._send = send
        self._rest: bytes | memoryview | None = None
        self._scope: trio.CancelScope | None = None
        self.method: str = scope["method"]
        self.http_version: str = scope["http_version"]
        self.is_tls: bool = scope["scheme"] == "https"
        client = scope.get("client")
        self.peer: tuple[str, int | None] | None = None if client is None else (client[0], client[1])
        self.timeout = timeout
        self.stopping = stopping
        self.stalled = False
        """Whether the peer was cut off because it took nothing for the timeout."""

    # -- ASGI ------------------------------------------------------------------------------------------------

    async def send(self, message: ASGISendEvent) -> None:
        """The ASGI `send` for responses that are not ours. To a peer that is gone it sends into the void."""
        with suppress(trio.BrokenResourceError):
            await self._guarded(message)

    async def start(self, status: int, headers: Headers) -> None:
        """Send the head of the response.

        Raises:
            trio.BrokenResourceError: the peer is gone.
        """
        message = {"type": "http.response.start", "status": status, "headers": list(headers)}
        await self._guarded(cast("ASGISendEvent", message))

    async def finish(self) -> None:
        """Write what is left, and end the body. The server then keeps, or closes, the connection.

        Raises:
            trio.BrokenResourceError: the peer is gone, or was cut off because it took nothing.
        """
        await self.write_rest()
        await self._guarded({"type": "http.response.body", "body": b"", "more_body": False})

    async def _guarded(self, message: ASGISendEvent) -> None:
        """Send so that a cancel cannot cut it in the middle, and a deadline can."""
        with trio.move_on_after(self.timeout, shield=True) as scope:
            await self._send(message)
        if scope.cancelled_caught:
            self.stalled = True
            raise trio.BrokenResourceError("the server has not taken a message in time")

    async def run(self, respond: Respond, receive: ASGIReceiveCallable) -> None:
        """Run a response of ours; it is cancelled when the peer leaves."""
        async with trio.open_nursery() as nursery:
            self._scope = nursery.cancel_scope
            nursery.start_soon(self._watch, receive)
            await respond(self)
            self._scope.cancel()

    async def _watch(self, receive: ASGIReceiveCallable) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass  # a body that nobody asked for
        assert self._scope is not None
        self._scope.cancel()

    # -- bodies ----------------------------------------------------------------------------------------------

    async def write(self, payload: bytes) -> None:
        """Write `payload`, after what is left of earlier ones. Waits for the peer, while that makes progress.

        Cancelled, what was not written is the rest, for the next `write`, `write_rest` or `finish`.

        Raises:
            trio.BrokenResourceError: the peer is gone, or was cut off because it took nothing.
        """
        if payload:
            self._rest = payload if self._rest is None else b"".join((self._rest, payload))
        await self.write_rest()

    async def write_rest(self) -> None:
        """Write what is left. As `write`."""
        await trio.lowlevel.checkpoint()
        if self._rest is not None:
            await self._guarded({"type": "http.response.body", "body": bytes(self._rest), "more_body": True})
            self._rest = None

    @property
    def has_rest(self) -> bool:
        """Whether something must be written before anything else."""
        return self._rest is not None

    @property
    def can_write_now(self) -> bool:
        """Whether `write_now` may be used at all on this connection, now."""
        return False

    def write_now(self, batch: Writable) -> bool:
        """Write without waiting. True: all of it is written, or its end is the rest; False: nothing was
        taken.

        Only while no other task writes, and after the head.

        Raises:
            trio.BrokenResourceError: the peer is gone.
        """
        return False

    # -- the peer --------------------------------------------------------------------------------------------

    @property
    def spoke_early(self) -> bool:
        """Whether the peer sent something after its request: Hypercorn then reads no more, and cannot see it
        leave."""
        return False

    def abort(self) -> None:
        """Cut the peer off, at once, and cancel the response."""
        if self._scope is not None:
            self._scope.cancel()

    def unsent(self) -> int | None:
        """Bytes that the kernel holds because the peer has not taken them; None where that is not known."""
        return None

    def release(self) -> None:
        """The request is over, however it ended: leave nothing waiting for it."""


class _HypercornConnection(Connection):
    """What the connections of all protocols under Hypercorn share."""

    __slots__ = ("_http", "_transport")

    def __init__(self, scope: Any, send: ASGISendCallable, http: HTTPStream, transport: DeadlineStream) -> None:
        super().__init__(scope, send, transport.timeout, transport.stopping)
        self._http = http
        self._transport = transport

    async def _guarded(self, message: ASGISendEvent) -> None:
        await self._ready()
        with trio.move_on_after(BACKSTOP * self.timeout, shield=True) as scope:
            await self._send(message)
        if scope.cancelled_caught:
            self._transport.abort()
            raise trio.BrokenResourceError("the connection has not taken a message in time")
        if self._http.closed and message.get("more_body", True):
            # Hypercorn does not say so: it drops what is sent to a peer that is gone.
            self.stalled = self._transport.stalled
            raise trio.BrokenResourceError("the peer is gone")

    async def run(self, respond: Respond, receive: ASGIReceiveCallable) -> None:
        """As above, with no task of its own for the peer's leaving: Hypercorn's reader cancels the
        response."""
        self._scope = scope = trio.CancelScope()

        async def hear(message: ASGIReceiveEvent) -> None:
            if message["type"] == "http.disconnect":
                scope.cancel()

        self._http.app_put = hear
        _drain(receive)
        if self._http.closed:  # it said so to the queue
            scope.cancel()
        with scope:
            await respond(self)

    async def _ready(self) -> None:
        """Wait until a message can be taken, so that little waiting is left for the shield."""
        try:
            await self._transport.wait_writable()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self.stalled = self._transport.stalled
            raise trio.BrokenResourceError("the peer is gone") from error

    def unsent(self) -> int | None:
        return self._transport.unsent()


class _H11Connection(_HypercornConnection):
    """HTTP/1.x. Without TLS and with chunks, bodies go straight to the socket, past h11, whose state stays
    right."""

    __slots__ = ("_chunked", "_protocol")

    def __init__(
        self,
        scope: Any,
        send: ASGISendCallable,
        http: HTTPStream,
        protocol: H11Protocol,
        transport: DeadlineStream,
    ) -> None:
        super().__init__(scope, send, http, transport)
        self._protocol = protocol
        self._chunked = False
        """Whether the head is sent and the body is ours to write, in chunks, to the socket."""

    async def start(self, status: int, headers: Headers) -> None:
        await super().start(status, headers)
        self._chunked = not self.is_tls and _is_chunked(self._protocol.connection)

    async def write(self, payload: bytes) -> None:
        await super().write(chunk(payload) if self._chunked and payload else payload)

    async def write_rest(self) -> None:
        if not self._chunked:
            await super().write_rest()
            return
        await trio.lowlevel.checkpoint()
        try:
            while self._rest is not None:
                sent = await self._transport.send_some(self._rest)
                self._keep(self._rest, sent)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self.stalled = self._transport.stalled
            raise trio.BrokenResourceError("the peer is gone") from error

    def _keep(self, data: bytes | memoryview, sent: int) -> None:
        self._rest = memoryview(data)[sent:] if sent < len(data) else None

    async def finish(self) -> None:
        await self.write_rest()
        self._chunked = False
        await super().finish()

    @property
    def can_write_now(self) -> bool:
        return self._chunked and self._rest is None

    def write_now(self, batch: Writable) -> bool:
        data = batch.chunk
        if data is None:
            data = batch.chunk = chunk(batch.payload)
        try:
            sent = self._transport.send_now(data)
        except trio.ClosedResourceError as error:
            raise trio.BrokenResourceError("the peer is gone") from error
        if sent == len(data):
            return True
        if sent == 0:
            return False
        self._keep(data, sent)
        return True

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
                await self._transport.wait(buffer.drain, lambda: len(buffer.buffer))
            except OutOfPatience:
                self.stalled = True
                self.abort()
                raise
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


class Worker:
    """The server process behind a connection: whether it is stopping, and the way to make it stop."""

    def __init__(self, context: Any) -> None:
        self.context = context
        self.stopping: Stopping = context.terminated

    async def stop(self) -> None:
        """Have the worker stop: it accepts nothing more and waits, within its grace period, for its
        connections."""
        await self.context.terminate.set()


class _Seen:
    """What an app has seen of its servers, kept in its `extensions`."""

    def __init__(self) -> None:
        self.context: Any = None
        self.unknown = False
        self.never = trio.Event()


def _open(app: Any, scope: Any, send: ASGISendCallable) -> Connection:
    """The connection below `send`. The first time in a server, the app hears of the `Worker`:
    `app.server_found`."""
    timeout = float(app.config.get("SSE_WRITE_TIMEOUT", 10.0))
    seen: _Seen = app.extensions.setdefault("sse_trio.connection", _Seen())
    found = _beneath(send)
    if found is None:
        if not seen.unknown:
            seen.unknown = True
            log.warning("unknown server: no write deadline, no abort, no word when it stops", send=repr(send)[:200])
        return Connection(scope, send, timeout, seen.never)
    http, protocol, server = found
    if seen.context is not http.context:
        seen.context = http.context
        if (server_found := getattr(app, "server_found", None)) is not None:
            server_found(Worker(http.context))
    transport = _adopt(server, timeout)
    if isinstance(protocol, H2Protocol):
        _unlimit(protocol)
        return _H2Connection(scope, send, http, protocol, transport)
    return _H11Connection(scope, send, http, protocol, transport)


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
    # One stream too many and Hypercorn ends the whole connection. A limit that the operator chose stays.
    if protocol.config.h2_max_concurrent_streams == Config.h2_max_concurrent_streams:
        protocol.connection.update_settings({SettingCodes.MAX_CONCURRENT_STREAMS: MAX_STREAMS})


class ConnectionResponse(TrioResponse):
    """A response whose body is its own affair: everything up to the head is Quart's, then `respond` is
    called."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.timeout = None

    async def respond(self, connection: Connection) -> None:
        """Write the response, from its head to its end. Cancelled when the peer leaves."""
        raise NotImplementedError


class ASGIConnection(TrioASGIHTTPConnection):
    """One HTTP request; set as `app.asgi_http_class`, so that every request of every route goes through here.

    Quart does what it always does, up to the point where it would send a `ConnectionResponse`. That one is
    kept until Quart has returned: nothing of the request, its context and its tasks is then left while the
    response runs, which may be for hours.
    """

    _connection: Connection
    _ours: ConnectionResponse | None = None
    _left = False

    async def __call__(self, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        self._connection = _open(self.app, self.scope, send)
        try:
            await super().__call__(receive, self._connection.send)
            response, self._ours = self._ours, None
            if response is not None and not self._left:
                await self._connection.run(response.respond, receive)
        finally:
            self._connection.release()
            _drain(receive)

    async def handle_messages(self, *args: Any) -> None:
        await super().handle_messages(*args)
        self._left = True  # it returns when the peer has left, and else is cancelled

    async def _send_response(self, send: ASGISendCallable, response: Any) -> None:
        if isinstance(response, ConnectionResponse):
            self._ours = response
        else:
            await super()._send_response(send, response)
