"""The real parts that tests are made of: a nats-server, the server under test as a process, and a client on a bare socket.

Each is an async context manager that owns what it starts: when the test ends, in whatever way, its processes are gone
and their output can be read. No wait is without a deadline (`WITHIN`), and a deadline that passes says what was
waited for, with the server's own words.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from sse_trio.sse import Decoder, ServerSentEvent

WITHIN = 30.0
"""Seconds that a wait for a state may take on a busy machine before the test fails."""

BIN = Path(sys.executable).parent


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody uses now, and that no outgoing connection takes before a server has it."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    draw = random.SystemRandom()  # several test processes draw at once, and the module's own is seeded by some
    while True:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", draw.randrange(10_000, first) if first > 20_000 else 0))
            return int(probe.getsockname()[1])


async def eventually(condition: Callable[[], Any], what: str, within: float = WITHIN) -> Any:
    """The first true value of `condition()`, asked every few milliseconds; AssertionError with `what` after `within`."""
    deadline = trio.current_time() + within
    while True:
        value = condition()
        if hasattr(value, "__await__"):
            value = await value
        if value:
            return value
        if trio.current_time() > deadline:
            raise AssertionError(f"not within {within:g} s: {what}")
        await trio.sleep(0.01)


async def unless_terminated(run: Callable[[], Awaitable[bool]]) -> bool:
    """What `run()` says; False when SIGTERM came first, after it has taken down what it had started."""
    good = False
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:

            async def end_on_signal() -> None:
                async for number in signals:
                    nursery.cancel_scope.cancel(f"signal {number}")

            nursery.start_soon(end_on_signal)
            good = await run()
            nursery.cancel_scope.cancel("it is done")
    return good


@contextmanager
def fail_within(seconds: float, what: str) -> Any:
    """Fail with `what` when the body takes more than `seconds`."""
    with trio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise AssertionError(f"not within {seconds:g} s: {what}")


class NatsServer:
    """A real nats-server with a port and a directory of its own, that a test may kill, freeze and start again."""

    def __init__(self, directory: Path, *, jetstream: bool = True, options: tuple[str, ...] = ()) -> None:
        self.port = free_port()
        self.url = f"nats://127.0.0.1:{self.port}"
        self.directory = directory
        self.log = directory / "nats.log"
        self.jetstream = jetstream
        self.options = options
        self.process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Start it (again), and wait until it answers."""
        self.directory.mkdir(parents=True, exist_ok=True)
        command = [str(BIN / "nats-server"), "-a", "127.0.0.1", "-p", str(self.port), "-l", str(self.log)]
        if self.jetstream:
            command += ["-js", "-sd", str(self.directory / "store")]
        self.process = subprocess.Popen([*command, *self.options], stderr=subprocess.DEVNULL)
        await eventually(self._greets, f"nats-server on port {self.port} says INFO")

    async def _greets(self) -> bool:
        try:
            stream = await trio.open_tcp_stream("127.0.0.1", self.port)
        except OSError:
            return False
        async with stream:
            with trio.move_on_after(1):
                return (await stream.receive_some()).startswith(b"INFO")
        return False

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def freeze(self) -> None:
        """Stop it in its tracks (SIGSTOP): its sockets stay open and silent."""
        assert self.process is not None
        self.signal(signal.SIGSTOP)
        # The signal reaches one thread after the other; until the last has stopped, some still answer.
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def thaw(self) -> None:
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it at once (SIGKILL) and wait for it."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    async def restart(self) -> None:
        self.kill()
        await self.start()

    async def publish(self, *messages: tuple[str, bytes], headers: Mapping[str, str] | None = None) -> None:
        """Publish (subject, payload) pairs, in order; returns when the server has them (PING/PONG)."""
        with fail_within(WITHIN, "the nats-server took the messages"):
            stream = await trio.open_tcp_stream("127.0.0.1", self.port)
            async with stream:
                await stream.receive_some()
                wire = [b'CONNECT {"verbose":false,"pedantic":false,"headers":true}\r\n']
                for subject, payload in messages:
                    if headers is None:
                        wire.append(b"PUB %s %d\r\n%s\r\n" % (subject.encode(), len(payload), payload))
                    else:
                        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
                        head = f"NATS/1.0\r\n{lines}\r\n".encode()
                        total = len(head) + len(payload)
                        wire.append(b"HPUB %s %d %d\r\n%s%s\r\n" % (subject.encode(), len(head), total, head, payload))
                await stream.send_all(b"".join(wire) + b"PING\r\n")
                heard = b""
                while b"PONG" not in heard:
                    data = await stream.receive_some()
                    assert data, f"nats-server closed the connection: {heard!r}"
                    heard += data


@asynccontextmanager
async def nats_server(
    directory: Path, *, jetstream: bool = True, options: tuple[str, ...] = ()
) -> AsyncIterator[NatsServer]:
    """A nats-server that is gone when the block ends."""
    server = NatsServer(directory, jetstream=jetstream, options=options)
    try:
        await server.start()
        yield server
    finally:
        if server.process is not None:
            server.process.send_signal(signal.SIGCONT)
        server.kill()


def a_discovery(number: int = 0, **changes: Any) -> dict[str, Any]:
    """A discovery as an agent would share it; `changes` replace or add keys."""
    return {
        "agent_id": "security-001",
        "agent_role": "Security",
        "discovery_type": "Anomaly",
        "content": f"unusual login pattern {number}",
        "confidence": 0.75,
        "timestamp": "2009-02-13T23:31:30Z",
        "related_to": None,
    } | changes


def payload(number: int = 0, **changes: Any) -> bytes:
    return json.dumps(a_discovery(number, **changes)).encode()


@dataclass
class Server:
    """The server under test: a process, where it listens, and what it has said."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    async def get(self, path: str, headers: Mapping[str, str] | None = None) -> tuple[int, Any]:
        """Status and body (parsed where it is JSON) of one GET on a connection of its own."""
        status, fields, body = await request(self.port, "GET", path, headers=headers)
        return status, json.loads(body) if "json" in fields.get("content-type", "") else body

    async def health(self) -> tuple[int, dict[str, Any]]:
        try:
            status, body = await self.get("/health")
        except OSError:
            return 0, {}
        return status, body

    async def is_live(self) -> bool:
        return (await self.health())[0] == 200

    async def exited(self, within: float = WITHIN) -> int:
        """Its exit code, waited for."""
        await eventually(lambda: self.process.poll() is not None, f"the server ends\n{self.output}", within)
        return self.process.returncode


async def request(
    port: int, method: str, path: str, *, headers: Mapping[str, str] | None = None, body: bytes = b""
) -> tuple[int, dict[str, str], bytes]:
    """Status, lower-cased header fields and body of one request with `Connection: close`."""
    with fail_within(WITHIN, f"{method} {path} is answered"):
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            fields = {"Host": f"127.0.0.1:{port}", "Connection": "close"} | dict(headers or {})
            if body:
                fields["Content-Length"] = str(len(body))
            head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in fields.items()) + "\r\n"
            await stream.send_all(head.encode() + body)
            answer = b""
            try:
                while data := await stream.receive_some():
                    answer += data
            except trio.BrokenResourceError as error:
                raise ConnectionResetError("the server broke the connection") from error
    if b"\r\n\r\n" not in answer:
        raise ConnectionResetError("the server closed the connection without an answer")
    top, _, rest = answer.partition(b"\r\n\r\n")
    status_line, *lines = top.decode("latin-1").split("\r\n")
    answered = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if answered.get("transfer-encoding") == "chunked":
        rest = Dechunker().feed(rest)
    return int(status_line.split()[1]), answered, rest


@asynccontextmanager
async def run_server(
    directory: Path,
    *,
    nats_url: str,
    command: tuple[str, ...] | None = None,
    options: tuple[str, ...] = (),
    env: Mapping[str, str] | None = None,
    port: int | None = None,
    wait: bool = True,
    **popen: Any,
) -> AsyncIterator[Server]:
    """The real `hypercorn` command (or `command`) serving sse_trio.app:app, ready to answer; killed at the end.

    With `wait=False` the block starts at once, whatever has become of the process.
    """
    port = free_port() if port is None else port
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / f"server-{port}.log"
    if command is None:
        command = (
            str(BIN / "hypercorn"),
            "sse_trio.app:app",
            "--worker-class",
            "trio",
            "-b",
            f"127.0.0.1:{port}",
        )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SSE_", "NATS_", "LOG_"))}
    environment |= {"NATS_URL": nats_url, "PYTHONUNBUFFERED": "1"} | dict(env or {})
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*command, *options], env=environment, stdout=output, stderr=subprocess.STDOUT, **popen
        )
    server = Server(process, port, log)
    try:
        if wait:
            await eventually(
                lambda: _answers(server),
                f"the server answers on port {port}\n{server.output}",
                within=2 * WITHIN,
            )
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.terminate()
            with trio.move_on_after(10, shield=True):
                while process.poll() is None:
                    await trio.sleep(0.01)
        if process.poll() is None:
            process.kill()
        process.wait()


async def _answers(server: Server) -> bool:
    assert server.process.poll() is None, f"the server ended with {server.process.returncode}:\n{server.output}"
    try:
        status, _ = await server.get("/livez")
    except OSError:
        return False
    return status == 200


class Dechunker:
    """The payload inside HTTP/1.1 chunks (RFC 9112 section 7.1); remembers whether the last chunk has come."""

    def __init__(self) -> None:
        self.buffer = b""
        self.chunks: list[bytes] = []
        self.ended = False

    def feed(self, data: bytes) -> bytes:
        self.buffer += data
        out = []
        while not self.ended:
            size, newline, rest = self.buffer.partition(b"\r\n")
            if not newline:
                break
            length = int(size, 16)
            if len(rest) < length + 2:
                break
            assert rest[length : length + 2] == b"\r\n", "a chunk ends with CRLF"
            self.buffer = rest[length + 2 :]
            if length == 0:
                self.ended = True
            else:
                self.chunks.append(rest[:length])
                out.append(rest[:length])
        return b"".join(out)


@dataclass
class RawStream:
    """A client of the stream on a bare socket: sees the bytes, the chunks and the events."""

    stream: trio.SocketStream
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    head: bytes = b""
    body: bytes = b""
    events: list[ServerSentEvent] = field(default_factory=list)
    closed: bool = False
    decoder: Decoder = field(default_factory=Decoder)
    dechunker: Dechunker = field(default_factory=Dechunker)
    _taken: int = 0

    @property
    def ended(self) -> bool:
        """Whether the body ended properly, with its last chunk."""
        return self.dechunker.ended

    async def read_some(self) -> bool:
        """Read once; False when the peer has closed."""
        try:
            data = await self.stream.receive_some(65536)
        except trio.BrokenResourceError:
            data = b""
        if not data:
            self.closed = True
            return False
        if not self.status:
            self.head += data
            if b"\r\n\r\n" not in self.head:
                return True
            self.head, _, data = self.head.partition(b"\r\n\r\n")
            status_line, *lines = self.head.decode("latin-1").split("\r\n")
            self.status = int(status_line.split()[1])
            self.headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        if self.headers.get("transfer-encoding") == "chunked":
            data = self.dechunker.feed(data)
        self.body += data
        self.events += self.decoder.feed(data)
        return True

    async def read_until(self, condition: Callable[[], bool], what: str, within: float = WITHIN) -> None:
        with fail_within(within, f"{what}; got {self.status} {self.body[-2000:]!r}"):
            while not condition():
                if not await self.read_some():
                    assert condition(), f"the stream closed before: {what}; got {self.status} {self.body[-2000:]!r}"

    async def next(self, name: str | None = None, within: float = WITHIN) -> ServerSentEvent:
        """The next event that was not taken yet; with `name`, the next of that name."""
        while True:
            await self.read_until(lambda: len(self.events) > self._taken, f"an event {name or ''}", within)
            event = self.events[self._taken]
            self._taken += 1
            if name is None or event.event == name:
                return event

    async def take(self, count: int, name: str = "discovery") -> list[ServerSentEvent]:
        return [await self.next(name) for _ in range(count)]

    async def read_to_end(self, within: float = WITHIN) -> None:
        """Read until the body's proper end or the peer's close."""
        with fail_within(within, "the stream ends"):
            while not self.ended and await self.read_some():
                pass


@asynccontextmanager
async def listen(
    port: int,
    agent_id: str = "agent-1",
    *,
    query: str = "",
    headers: Mapping[str, str] | None = None,
    method: str = "GET",
    version: str = "1.1",
    path: str | None = None,
    rcvbuf: int | None = None,
) -> AsyncIterator[RawStream]:
    """A client that has sent its request; the connection closes with the block."""
    sock = trio.socket.socket()
    if rcvbuf is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
    await sock.connect(("127.0.0.1", port))
    stream = trio.SocketStream(sock)
    target = path if path is not None else f"/discoveries/stream?agent_id={agent_id}{query}"
    fields = {"Host": f"127.0.0.1:{port}", "Accept": "text/event-stream"} | dict(headers or {})
    head = f"{method} {target} HTTP/{version}\r\n" + "".join(f"{k}: {v}\r\n" for k, v in fields.items()) + "\r\n"
    try:
        await stream.send_all(head.encode())
        yield RawStream(stream)
    finally:
        stream.socket.close()
