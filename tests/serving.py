"""A real Hypercorn in the test's own nursery, serving a small app whose one stream runs the test's script.

The clients are bare sockets, and an HTTP/2 client that reads only the streams it is told to: the peers that matter here
read slowly, or not at all, or leave without a word.
"""

from __future__ import annotations

import errno
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.settings
import hypercorn.trio
import trio
import trustme
from hypercorn.config import Config
from quart import Response, request
from quart.utils import encode_headers
from quart_trio import QuartTrio
from support import WITHIN, Dechunker, eventually, fail_within

from sse_trio.asgi import ASGIConnection, RefusedWebSocket
from sse_trio.connection import Connection, ConnectionResponse, Worker
from sse_trio.hypercorn_connection import accept_eagerly, contain_failures

TIMEOUT = 1.0
"""The write timeout of these servers, in seconds."""

SLACK = 2.0
"""Seconds that a busy machine may be late."""

FRAME = b"event: discovery\ndata: {}\nid: x-1\n\n"
HUGE = FRAME * 300_000
"""More than the kernel holds for a peer that does not read."""

Script = Callable[[Connection], Awaitable[None]]


class Scripted(ConnectionResponse):
    """The stream of these tests: what happens on the connection is the test's affair."""

    def __init__(self, script: Script) -> None:
        super().__init__("", content_type="text/event-stream")
        self.script = script

    async def respond(self, connection: Connection) -> None:
        await connection.start(200, encode_headers(self.headers))
        await connection.write_rest()
        await self.script(connection)


@dataclass
class Batch:
    payload: bytes
    chunk: bytes | None = None


class Errors(logging.Handler):
    """What Hypercorn logs as an error: the exceptions of the app."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self.format(record))


@dataclass
class Server:
    """A Hypercorn in this process."""

    port: int
    tls: bool
    stop: trio.Event = field(default_factory=trio.Event)
    stopped: trio.Event = field(default_factory=trio.Event)
    errors: Errors = field(default_factory=Errors)
    workers: list[Worker] = field(default_factory=list)
    host: str = "127.0.0.1"
    make_socket: Callable[[], trio.socket.SocketType] = trio.socket.socket
    """Makes a client's socket."""

    async def connect(self, *, rcvbuf: int | None = None, alpn: str = "http/1.1") -> Any:
        """A SocketStream, or an SSLStream, to this server."""
        sock = self.make_socket()
        if rcvbuf is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
        try:
            await sock.connect((self.host, self.port))
            stream = trio.SocketStream(sock)
            if not self.tls:
                return stream
            context = ssl.create_default_context()
            authority().configure_trust(context)
            context.set_alpn_protocols([alpn])
            secure = trio.SSLStream(stream, context, server_hostname="localhost", https_compatible=True)
            await secure.do_handshake()
        except BaseException:
            sock.close()
            raise
        return secure


@cache
def authority() -> trustme.CA:
    return trustme.CA()


@asynccontextmanager
async def serving(
    script: Script | None = None,
    *,
    response: type[ConnectionResponse] | None = None,
    tls: str | Literal[False] = False,
    timeout: float = TIMEOUT,
    graceful: float = 30.0,
    max_content_length: int = 1 << 20,
    **settings: Any,
) -> AsyncIterator[Server]:
    """A Hypercorn with a stream at /stream, ordinary answers elsewhere; stopped at the end, and no error was
    logged."""
    app = QuartTrio(__name__)
    app.asgi_http_class = ASGIConnection
    app.asgi_websocket_class = RefusedWebSocket  # type: ignore[assignment]
    app.config["SSE_WRITE_TIMEOUT"] = timeout
    app.config["MAX_CONTENT_LENGTH"] = max_content_length
    server = Server(0, bool(tls))
    app.server_found = server.workers.append  # type: ignore[attr-defined]

    @app.get("/stream")
    async def stream() -> Response:
        if response is not None:
            return response()
        assert script is not None
        return Scripted(script)

    @app.get("/plain")
    async def plain() -> str:
        return "plain"

    @app.get("/huge")
    async def huge() -> Response:
        return Response(HUGE)

    @app.post("/echo")
    async def echo() -> str:
        return str(len(await request.get_data(as_text=False)))

    contain_failures()
    accept_eagerly()
    config = Config()
    config.bind = ["127.0.0.1:0"]
    config.graceful_timeout = graceful
    config.keep_alive_timeout = 1000.0
    logger = logging.Logger("hypercorn of a test")
    logger.addHandler(server.errors)
    config.errorlog = logger
    if tls:
        config.certfile = config.keyfile = tls
    for name, value in settings.items():
        setattr(config, name, value)

    async with trio.open_nursery() as nursery:

        async def serve(task_status: trio.TaskStatus[list[str]]) -> None:
            await hypercorn.trio.serve(app, config, shutdown_trigger=server.stop.wait, task_status=task_status)
            server.stopped.set()

        (bind,) = await nursery.start(serve)
        server.port = int(bind.rpartition(":")[2])
        yield server
        asked = server.stop.is_set() or any(worker.context.terminate.is_set() for worker in server.workers)
        assert asked or not server.stopped.is_set(), "the server ended by itself"
        server.stop.set()
        with fail_within(WITHIN, "the server stops"):
            await server.stopped.wait()
    assert server.errors.texts == [], server.errors.texts


def get(path: str, *, version: str = "1.1", method: str = "GET", close: bool = False) -> bytes:
    connection = "Connection: close\r\n" if close else ""
    return f"{method} {path} HTTP/{version}\r\nHost: localhost\r\n{connection}\r\n".encode()


async def write_on(connection: Connection) -> None:
    while True:
        await connection.write(FRAME)


async def read_to_end(stream: Any) -> bytes:
    heard = bytearray()
    with fail_within(WITHIN, "the peer closes"):
        while data := await stream.receive_some(1 << 16):
            heard += data
    return bytes(heard)


async def read_until(stream: Any, what: bytes) -> bytes:
    heard = b""
    with fail_within(WITHIN, f"the peer says {what[:100]!r}"):
        while what not in heard:
            data = await stream.receive_some(1 << 16)
            assert data, f"closed after {heard[-1000:]!r}"
            heard += data
    return heard


def body_of(answer: bytes) -> tuple[bytes, Dechunker]:
    """The body of a chunked answer, and the reader that has read it."""
    head, _, rest = answer.partition(b"\r\n\r\n")
    assert b"chunked" in head.lower()
    dechunker = Dechunker()
    return dechunker.feed(rest), dechunker


def was_reset(stream: Any) -> bool:
    """Whether an RST has come, asked without reading."""
    inner = stream.transport_stream if isinstance(stream, trio.SSLStream) else stream
    return int(inner.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)) == errno.ECONNRESET


class Gate:
    """What a script tells its test."""

    def __init__(self) -> None:
        self.connection: Connection | None = None
        self.reached = trio.Event()
        self.go = trio.Event()
        self.ended = trio.Event()
        self.began_at = self.ended_at = 0.0
        self.error: BaseException | None = None

    async def stall(self, connection: Connection) -> None:
        """Write more than the peer will take, and note when that was given up."""
        self.connection = connection
        self.began_at = trio.current_time()
        self.reached.set()
        try:
            while True:
                await connection.write(FRAME * 10_000)
        except trio.BrokenResourceError as error:
            self.error = error
        finally:
            self.ended_at = trio.current_time()
            self.ended.set()

    async def stand(self, connection: Connection) -> None:
        """Say that the stream stands, and do no more."""
        self.connection = connection
        await connection.write(FRAME)
        self.reached.set()
        try:
            await trio.sleep_forever()
        finally:
            self.ended.set()

    async def wait(self) -> None:
        with fail_within(WITHIN, "the script ends"):
            await self.ended.wait()


# -- HTTP/2 ----------------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """What came on one HTTP/2 stream."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    ended: bool = False
    reset: int | None = None


class H2Client:
    """An HTTP/2 client. A stream in `stalled` gets no more window than it began with; the others are read."""

    def __init__(self, stream: Any, window: int) -> None:
        self.stream = stream
        self.connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.connection.local_settings = h2.settings.Settings(
            client=True, initial_values={h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window}
        )
        self.sending = trio.Lock()
        self.answers: dict[int, Answer] = {}
        self.stalled: set[int] = set()
        self.goodbye = False
        self.closed = False
        self.limit: int | None = None
        """The server's limit of concurrent streams, once it has said so."""

    async def flush(self) -> None:
        async with self.sending:
            if data := self.connection.data_to_send():
                await self.stream.send_all(data)

    async def request(self, path: str, *, method: str = "GET", stalled: bool = False, body: bool = False) -> int:
        """Send a request, and go on; the number of its stream."""
        number = self.connection.get_next_available_stream_id()
        self.answers[number] = Answer()
        if stalled:
            self.stalled.add(number)
        scheme = "https" if isinstance(self.stream, trio.SSLStream) else "http"
        fields = [(":method", method), (":scheme", scheme), (":authority", "localhost"), (":path", path)]
        self.connection.send_headers(number, fields, end_stream=not body)
        await self.flush()
        return number

    async def get(self, path: str) -> Answer:
        """The whole answer."""
        number = await self.request(path)
        await self.until(lambda: self.answers[number].ended, f"{path} is answered")
        return self.answers[number]

    async def until(self, condition: Callable[[], Any], what: str) -> None:
        await eventually(lambda: condition() or self.closed, what)
        assert condition(), f"the server closed the connection before: {what}"

    async def read(self) -> None:
        """Read until the server closes. The task of the client's whole life."""
        while True:
            try:
                data = await self.stream.receive_some(1 << 16)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                data = b""
            if not data:
                self.closed = True
                return
            for event in self.connection.receive_data(data):
                self.heard(event)
            await self.flush()

    def heard(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.ResponseReceived):
            answer = self.answers[event.stream_id]
            answer.headers = {str(name): str(value) for name, value in event.headers}
            answer.status = int(answer.headers[":status"])
        elif isinstance(event, h2.events.DataReceived):
            self.answers[event.stream_id].body += event.data
            if not event.flow_controlled_length:
                pass  # the end of a stream, in an empty frame
            elif event.stream_id in self.stalled:
                # The connection's window is everybody's.
                self.connection.increment_flow_control_window(event.flow_controlled_length)
            else:
                self.connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded):
            self.answers[event.stream_id].ended = True
        elif isinstance(event, h2.events.StreamReset):
            self.answers[event.stream_id].reset = event.error_code
        elif isinstance(event, h2.events.ConnectionTerminated):
            self.goodbye = True
        elif isinstance(event, h2.events.RemoteSettingsChanged):
            changed = event.changed_settings.get(h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS)
            self.limit = self.limit if changed is None else changed.new_value


@asynccontextmanager
async def h2_client(server: Server, *, window: int = 65535, rcvbuf: int | None = None) -> AsyncIterator[H2Client]:
    """A client over TLS where the server has it, else with prior knowledge."""
    stream = await server.connect(rcvbuf=rcvbuf, alpn="h2")
    client = H2Client(stream, window)
    try:
        client.connection.initiate_connection()
        await client.flush()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.read)
            await client.until(lambda: client.limit is not None, "the server introduces itself")
            yield client
            nursery.cancel_scope.cancel()
    finally:
        await trio.aclose_forcefully(stream)


def certificate(directory: Path) -> str:
    """The path of a certificate for localhost, with its key."""
    path = directory / "localhost.pem"
    authority().issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(path))
    return str(path)
