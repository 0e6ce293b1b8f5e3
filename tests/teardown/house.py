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
import json
import os
import signal
import socket
import ssl
import struct
import subprocess
import termios
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import serving
import trio
from support import BIN, WITHIN, NatsServer, RawStream, Server, eventually, fail_within, free_port, listen, payload

from sse_trio.server import KEEP_ALIVE

WRITE_TIMEOUT = 3.0
KEEPALIVE = 2.0
SLACK = 3.0
"""Seconds that a busy machine may be late; a bound that is missed by a bug is missed for ever."""

IDLE = {"hypercorn": 5.0, "sse-trio serve": KEEP_ALIVE}
"""Seconds that an idle connection is kept, and one that has stopped in mid-head: Hypercorn's `keep_alive_timeout`."""

COMMANDS = tuple(IDLE)

PIECE = 8000
"""Bytes of content in each of the discoveries that fill buffers."""


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


def command_of(name: str, bind: str, options: tuple[str, ...] = ()) -> list[str]:
    if name == "hypercorn":
        return [str(BIN / "hypercorn"), "sse_trio.app:app", "--worker-class", "trio", "-b", bind, *options]
    return [str(BIN / "sse-trio"), "serve", "--bind", bind, *options]


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
        self.command = command
        self.nats = nats
        self.server = server
        self.port = server.port
        self.secure = isinstance(server, SecureServer)
        self.number = 0

    async def clients(self) -> list[str]:
        """The agents who are registered."""
        status, answer = await self.server.get("/clients")
        assert status == 200, answer
        return [client["agent_id"] for client in answer["clients"]]

    async def gone(self, agent_id: str, within: float) -> float:
        """Wait until that agent is no longer registered; the seconds that it took."""
        began = trio.current_time()

        async def is_gone() -> bool:
            return agent_id not in await self.clients()

        await eventually(is_gone, f"{agent_id} is gone\n{self.server.output[-2000:]}", within)
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
        within = IDLE[self.command] + WITHIN
        await eventually(lambda: count_descriptors(worker) <= descriptors, "the descriptors are closed", within)
        assert await self.clients() == []


def count_descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


class SecureServer(Server):
    """As `Server`, over TLS."""

    async def get(self, path: str, headers: Mapping[str, str] | None = None) -> tuple[int, Any]:
        with fail_within(WITHIN, f"GET {path} is answered"):
            context = ssl.create_default_context()
            serving.authority().configure_trust(context)
            plain = await trio.open_tcp_stream("127.0.0.1", self.port)
            async with trio.SSLStream(plain, context, server_hostname="localhost", https_compatible=True) as stream:
                fields = {"Host": f"127.0.0.1:{self.port}", "Connection": "close"} | dict(headers or {})
                head = f"GET {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in fields.items()) + "\r\n"
                await stream.send_all(head.encode())
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
    assert seconds <= bound + SLACK, f"{case}: {seconds:.2f} s, where {bound:g} s are promised"


def report(case: str, server: str, **figures: float) -> None:
    """Keep figures that are no times."""
    if path := os.environ.get("TEARDOWN_TIMES"):
        with open(path, "a") as file:
            file.write(
                json.dumps({"case": case, "server": server} | {k: round(v, 1) for k, v in figures.items()}) + "\n"
            )


def is_full(stream: RawStream) -> bool:
    """Whether a client that does not read has all that its kernel takes, so that its window is closed."""
    answer = fcntl.ioctl(stream.stream.socket.fileno(), termios.FIONREAD, b"\0\0\0\0")
    return int(struct.unpack("i", answer)[0]) > 2000


def reset(stream: RawStream | trio.SocketStream) -> None:
    """Leave with an RST."""
    sock = stream.stream.socket if isinstance(stream, RawStream) else stream.socket
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@asynccontextmanager
async def listening(house: House, agent_id: str, **options: Any) -> AsyncIterator[RawStream]:
    """A client who hears whole discoveries and has been told that it is connected."""
    async with listen(house.port, agent_id, query="&detail=full", **options) as stream:
        await stream.next("connected")
        yield stream


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
        self.name = f"teardown-{os.getpid()}"
        self.near, self.far = f"tdn{os.getpid() % 100000}", f"tdf{os.getpid() % 100000}"
        network = f"10.213.{os.getpid() % 250}"
        self.server, self.client = f"{network}.1", f"{network}.2"

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

    def socket(self) -> socket.socket:
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
        return made[0]

    def _ip(self, *arguments: str, inside: bool = False) -> str:
        command = ["ip", *(["-n", self.name] if inside else []), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise AssertionError("iproute2 is missing: a peer that vanishes cannot be tested without it") from None
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"
        return done.stdout
