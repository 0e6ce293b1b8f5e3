"""The second half of the lab: a real server process, real sockets, and peers that misbehave.

A `House` is a nats-server and an sse-trio, started by the plain `hypercorn` command or by `sse-trio serve`. It is kept
for all tests of a file (a process takes longer to start than most of them run), and after each test it must be as it
was before: nobody registered, no descriptor more.

The times that the tests measure go to the file that `TEARDOWN_TIMES` names, one JSON object a line: the table in
docs/teardown.md is made from them.
"""

from __future__ import annotations

import ctypes
import fcntl
import ipaddress
import json
import math
import os
import signal
import socket
import struct
import subprocess
import termios
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import serving
import trio
from support import BIN, WITHIN, NatsServer, RawStream, Server, eventually, fail_within, free_port, listen, payload

from sse_trio.deadline import STEP

WRITE_TIMEOUT = 3.0
KEEPALIVE = 2.0

IDLE = 5.0
"""Seconds that an idle connection is kept, and one that has stopped in mid-head: the option `--keep-alive`."""

SOON = IDLE - 0.5
"""Seconds in which must be done what is done at once: what is forgotten is done after `IDLE`."""

COMMANDS = ("hypercorn", "sse-trio serve")

PIECE = 8000
"""Bytes of content in each of the discoveries that fill buffers."""

FLOOD = 300
"""So many of them: far more than both kernels hold for a peer that does not read."""

COUNTING = """
import sse_trio.application
import trio

begin = sse_trio.application.App.__init__

def counting(self, *args, **options):
    begin(self, *args, **options)

    @self.get("/tasks")
    async def tasks():
        return {"tasks": trio.lowlevel.current_statistics().tasks_living}

sse_trio.application.App.__init__ = counting
"""
"""What a server imports first, as `sitecustomize`, to tell how many tasks it has."""


def late(bound: float) -> float:
    """`bound` seconds, and those that this machine may be late for reasons of its own; what has a bug is late for ever."""
    return bound + 4.0 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def command_of(name: str, bind: str, options: tuple[str, ...] = ()) -> list[str]:
    if name == "hypercorn":
        start = [str(BIN / "hypercorn"), "sse_trio.app:app", "--worker-class", "trio"]
    else:
        start = [str(BIN / "sse-trio"), "serve"]
    return [*start, "--bind", bind, "--keep-alive", f"{IDLE:g}", *options]


def environment(nats_url: str, more: Mapping[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SSE_", "NATS_", "LOG_"))}
    return (
        kept
        | {
            "NATS_URL": nats_url,
            "PYTHONUNBUFFERED": "1",
            "LOG_FORMAT": "json",
            "SSE_WRITE_TIMEOUT": str(WRITE_TIMEOUT),
            "SSE_KEEPALIVE_INTERVAL": str(KEEPALIVE),
        }
        | dict(more)
    )


class House:
    """A nats-server and an sse-trio for several tests."""

    def __init__(self, command: str, nats: NatsServer, server: Server) -> None:
        self.nats = nats
        self.server = server
        self.port = server.port
        self.secure = isinstance(server, SecureServer)
        self.kind = f"{command}, {'TLS' if self.secure else 'plain'}"
        self.peers = serving.Server(self.port, self.secure)
        """What connects to it."""
        self.number = 0

    async def clients(self) -> list[str]:
        """The agents who are registered."""
        status, answer = await self.server.get("/clients")
        assert status == 200, answer
        return [client["agent_id"] for client in answer["clients"]]

    async def gone(self, agent_id: str, bound: float = 0.0) -> float:
        """Wait until that agent is no longer registered, so many seconds at most; those that it took."""
        began = trio.current_time()

        async def is_gone() -> bool:
            return agent_id not in await self.clients()

        await eventually(is_gone, f"{agent_id} is gone\n{self.server.output[-2000:]}", late(bound))
        return trio.current_time() - began

    async def worker(self) -> int:
        """The process that serves."""
        _, answer = await self.server.get("/clients")
        return int(answer["instance"].rsplit("-", 2)[1])

    async def tasks(self) -> int:
        """The tasks of the process that serves, this request's included; see `COUNTING`."""
        status, answer = await self.server.get("/tasks")
        assert status == 200
        return int(answer["tasks"])

    def reason(self, agent_id: str) -> str:
        """Why the server says that this agent's stream ended."""
        for line in reversed(self.server.output.splitlines()):
            if "client disconnected" in line and f'"{agent_id}"' in line:
                return str(json.loads(line)["reason"])
        raise AssertionError(f"nothing is logged about {agent_id}\n{self.server.output[-2000:]}")

    async def publish(self, count: int, size: int = PIECE) -> None:
        """The next `count` discoveries, with `size` bytes of content each."""
        messages = []
        for _ in range(count):
            self.number += 1
            messages.append(("discoveries.insights", payload(self.number, content=f"{self.number} ".ljust(size, "x"))))
        await self.nats.publish(*messages)

    async def settled(self) -> int:
        """The worker's open descriptors, once their number stands still: answered requests take a moment to close."""
        worker = await self.worker()
        last, since = count_descriptors(worker), 0

        def stands_still() -> bool:
            nonlocal last, since
            now = count_descriptors(worker)
            last, since = (last, since + 1) if now == last else (now, 0)
            return since == 20

        await eventually(stands_still, "the number of descriptors stands still")
        return last

    async def as_before(self, descriptors: int) -> None:
        """Nobody is registered, and no descriptor is open that was not when there were `descriptors`."""
        worker = await self.worker()
        await eventually(lambda: count_descriptors(worker) <= descriptors, "the descriptors are closed", IDLE + WITHIN)
        assert await self.clients() == []


def count_descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


class SecureServer(Server):
    """As `Server`, over TLS."""

    async def get(self, path: str, headers: Mapping[str, str] | None = None) -> tuple[int, Any]:
        assert headers is None
        with fail_within(WITHIN, f"GET {path} is answered"):
            async with await serving.Server(self.port, tls=True).connect() as stream:
                await stream.send_all(serving.get(path, close=True))
                answer = b""
                while data := await stream.receive_some():
                    answer += data
        top, _, body = answer.partition(b"\r\n\r\n")
        return int(top.split()[1]), json.loads(body)


@contextmanager
def house(
    directory: Path,
    command: str,
    *,
    options: tuple[str, ...] = (),
    env: Mapping[str, str] | None = None,
    secure: bool = False,
) -> Iterator[House]:
    """For a fixture that lasts longer than one test, and so longer than one run of trio: plain synchronous."""
    if secure:
        chain = serving.certificate(directory)
        options = (*options, "--certfile", chain, "--keyfile", chain)
    (directory / "sitecustomize.py").write_text(COUNTING)
    path = [str(directory), os.getcwd(), os.environ.get("PYTHONPATH", "")]
    nats = NatsServer(directory / "nats", jetstream=False)
    port = free_port()
    log = directory / "server.log"
    process: subprocess.Popen[bytes] | None = None
    try:
        trio.run(nats.start)
        with log.open("ab") as output:
            process = subprocess.Popen(
                command_of(command, f"0.0.0.0:{port}", options),
                env=environment(nats.url, {"PYTHONPATH": os.pathsep.join(filter(None, path))} | dict(env or {})),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        server = (SecureServer if secure else Server)(process, port, log)
        made = House(command, nats, server)

        async def wait() -> None:
            await eventually(server.is_live, f"the server is live\n{server.output}", 2 * WITHIN)

        trio.run(wait)
        yield made
    finally:
        if process is not None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        nats.kill()


def note(case: str, seconds: float, bound: float, server: str = "") -> None:
    """Assert the bound, and keep what was measured for the documentation's table."""
    if path := os.environ.get("TEARDOWN_TIMES"):
        with open(path, "a") as file:
            file.write(
                json.dumps({"case": case, "server": server, "seconds": round(seconds, 2), "bound": bound}) + "\n"
            )
    assert seconds <= late(bound), f"{case}: {seconds:.2f} s, where {bound:g} s are promised"


def report(case: str, server: str, **figures: float) -> None:
    """Keep figures that are no times."""
    if path := os.environ.get("TEARDOWN_TIMES"):
        with open(path, "a") as file:
            file.write(
                json.dumps({"case": case, "server": server} | {k: round(v, 1) for k, v in figures.items()}) + "\n"
            )


# -- clients -----------------------------------------------------------------------------------------------------------


def wire(stream: Any) -> trio.SocketStream:
    """What is below a client, whatever it is: the socket's own stream."""
    inner = stream.stream if isinstance(stream, RawStream | serving.H2Client) else stream
    return inner.transport_stream if isinstance(inner, trio.SSLStream) else inner


def is_full(stream: RawStream) -> bool:
    """Whether a client that does not read has all that its kernel takes, so that its window is closed."""
    answer = fcntl.ioctl(wire(stream).socket.fileno(), termios.FIONREAD, b"\0\0\0\0")
    return int(struct.unpack("i", answer)[0]) > 2000


def reset(stream: Any) -> None:
    """Leave with an RST."""
    sock = wire(stream).socket
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@asynccontextmanager
async def listening(
    server: House, agent_id: str, *, rcvbuf: int | None = None, through: serving.Server | None = None
) -> AsyncIterator[RawStream]:
    """A client who hears whole discoveries and has been told that it is connected."""
    stream = RawStream(await (through or server.peers).connect(rcvbuf=rcvbuf))
    try:
        await stream.stream.send_all(serving.get(f"/discoveries/stream?agent_id={agent_id}&detail=full"))
        await stream.next("connected")
        yield stream
    finally:
        await trio.aclose_forcefully(stream.stream)  # noqa: ASYNC102  # it cancels itself


async def flooded(server: House, agent_id: str) -> float:
    """Flood everybody until that agent is gone, which must be in time; the seconds that it took.

    Somebody who reads must hear everything, and does not wait for the other's end.
    """
    heard_at = math.inf
    async with listening(server, "healthy") as healthy, trio.open_nursery() as nursery:

        async def read() -> None:
            nonlocal heard_at
            await healthy.take(FLOOD)
            heard_at = trio.current_time()

        nursery.start_soon(read)
        began = trio.current_time()
        await server.publish(FLOOD)
        await server.gone(agent_id, WRITE_TIMEOUT)
        gone_at = trio.current_time()
        assert heard_at < gone_at, "the healthy reader had everything long before"
    await server.gone("healthy")
    return gone_at - began


# -- what the kernel says ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A TCP socket in the kernel's table."""

    local: str
    remote: str
    unsent: int
    """Bytes that the kernel holds because the peer has not taken them."""
    inode: int
    """0 while it is nobody's: not accepted yet, or closed already."""


def tcp_table() -> list[Row]:
    with open("/proc/net/tcp") as file:
        rows = [line.split() for line in file][1:]
    return [Row(one[1], one[2], int(one[4].partition(":")[0], 16), int(one[9])) for one in rows]


def held_by_the_kernel(port: int) -> int:
    """Bytes that it holds for peers of that port's server."""
    return sum(row.unsent for row in tcp_table() if row.local.endswith(f":{port:04X}"))


class OtherEnd:
    """The server's end of a client's connection, also when the client's own is closed."""

    def __init__(self, stream: Any) -> None:
        sock = wire(stream).socket
        self._ends = (_in_the_table(sock.getpeername()), _in_the_table(sock.getsockname()))

    def _row(self) -> Row | None:
        return next((row for row in tcp_table() if (row.local, row.remote) == self._ends), None)

    @property
    def unsent(self) -> int | None:
        """Bytes that the kernel holds for this peer; None when nothing of the connection is left."""
        row = self._row()
        return None if row is None else row.unsent

    async def freed(self) -> None:
        """Wait until nothing of the connection is left. (Its streams may have gone a step before it.)"""
        await eventually(lambda: self.unsent is None, "the kernel has freed the connection", late(STEP))

    async def descriptor(self, server: House) -> Callable[[], bool]:
        """Wait until it is accepted; the answer tells whether the server's process still has it open."""
        row = await eventually(lambda: (row := self._row()) and row.inode and row, "the connection is accepted")
        name, files = f"socket:[{row.inode}]", Path(f"/proc/{await server.worker()}/fd")
        return lambda: any(_link(file) == name for file in files.iterdir())


def _in_the_table(address: tuple[str, int]) -> str:
    (number,) = struct.unpack("=I", socket.inet_aton(address[0]))
    return f"{number:08X}:{address[1]:04X}"


def _link(file: Path) -> str:
    try:
        return os.readlink(file)
    except FileNotFoundError:
        return ""  # closed meanwhile


# -- many of them ------------------------------------------------------------------------------------------------------


class Crowd:
    """Many clients: some read all they get, some have stopped."""

    def __init__(self) -> None:
        self.healthy: list[RawStream] = []
        self.stalled: list[RawStream] = []

    @property
    def size(self) -> int:
        return len(self.healthy) + len(self.stalled)


@asynccontextmanager
async def crowd(port: int, healthy: int, stalled: int = 0) -> AsyncIterator[Crowd]:
    """Connected clients; the healthy ones hear the role Quiet only, so that a flood is for the stalled ones.

    The healthy ones read until their stream ends, in tasks of this block; it ends when all of them have ended.
    """
    made = Crowd()
    async with AsyncExitStack() as connections, trio.open_nursery() as nursery:
        arrivals = trio.Semaphore(50)

        async def arrive(number: int, *, reads: bool) -> RawStream:
            query, rcvbuf = ("&role=Quiet", None) if reads else ("&detail=full", 4096)
            async with arrivals:
                client = listen(port, f"agent-{number}", query=query, rcvbuf=rcvbuf)
                stream = await connections.enter_async_context(client)
                await stream.next("connected")
            (made.healthy if reads else made.stalled).append(stream)
            return stream

        async def read(number: int) -> None:
            stream = await arrive(number, reads=True)
            while not stream.ended and await stream.read_some():
                pass

        for number in range(healthy):
            nursery.start_soon(read, number)
        for number in range(stalled):
            nursery.start_soon(partial(arrive, healthy + number, reads=False))
        await eventually(lambda: made.size == healthy + stalled, "everybody is connected", 3 * WITHIN)
        yield made
        await eventually(
            lambda: all(stream.ended or stream.closed for stream in made.healthy), "the healthy streams end", 2 * WITHIN
        )


# -- a peer whose packets are dropped ----------------------------------------------------------------------------------


class Namespace:
    """A network of its own at the end of a virtual cable, which can be made to swallow every packet."""

    def __init__(self) -> None:
        # Several may be there at once, each process's own. 198.18.0.0/15 is for tests of networks (RFC 2544).
        number = os.getpid()
        self.name, self.near, self.far = f"teardown-{number}", f"tdn{number}", f"tdf{number}"
        network = int(ipaddress.IPv4Address("198.18.0.0")) + 4 * (number % (1 << 15))
        self.server, self.client = (str(ipaddress.IPv4Address(network + host)) for host in (1, 2))

    def __enter__(self) -> Namespace:
        if os.geteuid() != 0:
            raise AssertionError("a network namespace needs root: a peer that vanishes cannot be tested without it")
        self._ip("netns", "add", self.name)
        try:
            self._ip("link", "add", self.near, "type", "veth", "peer", "name", self.far, "netns", self.name)
            self._ip("addr", "add", f"{self.server}/30", "dev", self.near)
            self._ip("link", "set", self.near, "up")
            self._ip("addr", "add", f"{self.client}/30", "dev", self.far, inside=True)
            self._ip("link", "set", self.far, "up", inside=True)
        except BaseException:
            self._ip("netns", "delete", self.name)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._ip("link", "delete", self.near)
        self._ip("netns", "delete", self.name)

    def swallow(self) -> None:
        """From now on every packet to the other side vanishes there; nobody answers, and nobody is told."""
        address = json.loads(self._ip("-json", "link", "show", self.far, inside=True))[0]["address"]
        # The near side must not notice that nobody answers for the address any more: it would say so to the sender.
        self._ip("neigh", "replace", self.client, "lladdr", address, "dev", self.near, "nud", "permanent")
        self._ip("addr", "flush", "dev", self.far, inside=True)

    def to(self, server: House) -> serving.Server:
        """The way to that server from there."""
        return serving.Server(server.port, server.secure, host=self.server, make_socket=self.socket)

    def socket(self) -> trio.socket.SocketType:
        """A TCP socket that lives in there. A socket belongs to the namespace in which it was made."""
        made: list[socket.socket] = []

        def make() -> None:
            libc = ctypes.CDLL(None, use_errno=True)
            with open(f"/run/netns/{self.name}") as there:
                if libc.setns(there.fileno(), 0x40000000) == 0:  # CLONE_NEWNET, of this thread only
                    made.append(socket.socket())

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        assert made, "setns failed: a peer that vanishes cannot be tested here"
        return trio.socket.from_stdlib_socket(made[0])

    def _ip(self, *arguments: str, inside: bool = False) -> str:
        command = ["ip", *(["-n", self.name] if inside else []), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise AssertionError("iproute2 is missing: a peer that vanishes cannot be tested without it") from None
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"
        return done.stdout
