"""The chaos run: everything is broken at random for some minutes, and at the end the books must balance.

    make chaos                          ten minutes, a new seed
    make chaos CHAOS='--minutes 2 --seed 7'    the same faults in the same order

A NATS cluster of three keeps the stream; two servers of two workers stand behind HAProxy; a publisher numbers what it
shares; 200 clients of several kinds listen. Against them, drawn from the printed seed: kill -9 of a worker, of a NATS
node, of the stream's leader; SIGSTOP for seconds; a rolling redeploy; a restart of all NATS nodes; readers that stall;
TCP resets through the proxy. For every client, each published discovery must have been received once and in order, or
been named by a gap.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from socket import SO_LINGER, SOL_SOCKET
from typing import Any

import trio

sys.path.insert(0, str(Path(__file__).parent))

from provision import node, node_modules, which
from support import BIN, NatsServer, Server, eventually, free_port, listen, request, run_server, unless_terminated

from sse_trio.listener import Interruption, follow
from sse_trio.nats_protocol import NatsError
from sse_trio.publisher import open_publisher

RATE = 50
"""Discoveries a second."""

SETTLE = 120.0
"""Seconds that clients may take at the end to have everything."""

NODE_CLIENT = """
const { createRequire } = require("module");
const load = createRequire(process.argv[2] + "/");
const { EventSource } = load("eventsource");
for (let number = 0; number < Number(process.argv[4]); number++) {
  const source = new EventSource(process.argv[3] + number);
  const print = (...words) => process.stdout.write(JSON.stringify([number, ...words]) + "\\n");
  const say = (event) => print(event.type, event.lastEventId, event.data);
  for (const name of ["discovery", "gap"]) source.addEventListener(name, say);
  source.onerror = () => { if (source.readyState === 2) print("closed"); };
}
"""


@dataclass
class Heard:
    """What one client heard: sequences in the order of their coming, and its gaps."""

    name: str
    sequences: list[int] = field(default_factory=list)
    gaps: list[tuple[str, int | None, int]] = field(default_factory=list)
    resumes: int = 0
    last_at: float = field(default_factory=time.monotonic)
    longest_silence: float = 0.0

    def take(self, kind: str, id: str, data: str) -> None:
        now = time.monotonic()
        if kind == "discovery":
            self.sequences.append(int(id.rpartition("-")[2]))
            self.longest_silence = max(self.longest_silence, now - self.last_at)
            self.last_at = now
        elif kind == "gap":
            said = json.loads(data)
            self.gaps.append((said["reason"], said["missed"], int(id.rpartition("-")[2])))

    def faults(self, truth: list[int]) -> list[str]:
        """What is wrong with it, given the sequences that the stream holds."""
        found = []
        if self.sequences != sorted(set(self.sequences)):
            counted = Counter(self.sequences)
            doubled = [sequence for sequence, times in counted.items() if times > 1]
            found.append(f"doubled {doubled[:5]}" if doubled else "out of order")
        lost = sorted(set(truth) - set(self.sequences))
        if lost and not self.gaps:
            found.append(f"lost {len(lost)}: {lost[:5]}")
        return found


class World:
    """The parts, and what is done to them."""

    def __init__(self, directory: Path, draw: random.Random, clients: int) -> None:
        self.directory = directory
        self.draw = draw
        self.count = clients
        self.nats: dict[str, NatsServer] = {}
        self.servers: list[Server | None] = [None, None]
        self.ports = [free_port(), free_port()]
        self.proxy_port = free_port()
        self.admin = directory / "haproxy.sock"
        self.heard: list[Heard] = []
        self.published: dict[str, int] = {}
        self.finished = False
        self.faults: Counter[str] = Counter()
        self.resumes: Counter[str] = Counter()
        self.started = time.monotonic()

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.started:7.1f} s  {text}", flush=True)

    # -- parts -------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def cluster(self) -> AsyncIterator[None]:
        routes = [free_port() for _ in range(3)]
        joined = ",".join(f"nats://127.0.0.1:{port}" for port in routes)
        for number, port in enumerate(routes):
            name = f"n{number}"
            options = ("-n", name, "--cluster_name", "c", "--cluster", f"nats://127.0.0.1:{port}", "--routes", joined)
            self.nats[name] = NatsServer(self.directory / name, options=options)
        try:
            for server in self.nats.values():
                await server.start()
            yield
        finally:
            for server in self.nats.values():
                if server.process is not None:
                    server.thaw()
                server.kill()

    @property
    def nats_urls(self) -> str:
        return ",".join(server.url for server in self.nats.values())

    async def serve(self, number: int, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """A server that is started again when it ends, as an init system would."""
        port = self.ports[number]
        command = (str(BIN / "sse-trio"), "serve", "--workers", "2", "--bind", f"127.0.0.1:{port}")
        env = {
            "NATS_STREAM_REPLICAS": "3",
            "NATS_DURABLE": "require",
            "SSE_BUFFER": "64",
            "SSE_HISTORY": "300",
            "SSE_RETRY": "500",
            "SSE_DRAIN_WINDOW": "1",
            "SSE_WRITE_TIMEOUT": "5",
            "LOG_LEVEL": "warning",
        }
        while True:
            async with run_server(
                self.directory, nats_url=self.nats_urls, command=command, env=env, port=port, wait=False
            ) as server:
                self.servers[number] = server
                with trio.move_on_after(60):
                    await eventually(partial(self._is_up, server), "the server is ready", 60)
                task_status.started()
                task_status = trio.TASK_STATUS_IGNORED
                while server.process.poll() is None:
                    await trio.sleep(0.05)
            self.servers[number] = None

    async def _is_up(self, server: Server) -> bool:
        return server.process.poll() is not None or (await server.health())[0] == 200

    @asynccontextmanager
    async def proxy(self) -> AsyncIterator[None]:
        config = self.directory / "haproxy.cfg"
        backends = "\n".join(
            f"  server s{number} 127.0.0.1:{port} check inter 500ms fall 2 rise 1"
            for number, port in enumerate(self.ports)
        )
        # A native EventSource never returns from a 503: with no server at all, the proxy asks it to come back.
        nobody = self.directory / "503.http"
        nobody.write_bytes(
            b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\nretry: 1000\n\n"
        )
        config.write_text(
            f"""
global
  stats socket {self.admin} level admin
defaults
  mode http
  timeout connect 2s
  timeout client 1h
  timeout server 1h
  option http-no-delay
  errorfile 503 {nobody}
  errorfile 502 {nobody}
  option redispatch
  retries 3
frontend front
  bind 127.0.0.1:{self.proxy_port}
  default_backend back
backend back
  balance roundrobin
  option httpchk GET /livez
{backends}
"""
        )
        binary = which("haproxy")
        assert binary is not None, "haproxy is needed: tests/provision.py gets it"
        process = subprocess.Popen([binary, "-f", str(config), "-db"], stderr=subprocess.DEVNULL)
        try:
            yield
        finally:
            process.kill()
            process.wait()

    async def tell_proxy(self, command: str) -> None:
        with suppress(OSError):
            async with await trio.open_unix_socket(str(self.admin)) as stream:
                await stream.send_all(command.encode() + b"\n")
                await stream.receive_some()

    # -- clients -----------------------------------------------------------------------------------------------------

    async def publish(self, until: float) -> None:
        number = 0
        async with open_publisher(self.nats_urls, agent_id="chaos", agent_role="Chaos", within=60) as publisher:
            while time.monotonic() < until:
                number += 1
                content = f"number {number}"
                msg_id = f"chaos-{number}"
                while content not in self.published:
                    try:
                        await publisher.share("Insight", content, 0.5, msg_id=msg_id)
                        self.published[content] = number
                    except NatsError as error:
                        self.say(f"publishing waits: {error.detail[:80]}")
                        await trio.sleep(0.5)
                await trio.sleep(1 / RATE)

    def client(self, kind: str, number: int) -> Heard:
        heard = Heard(f"{kind}-{number}")
        self.heard.append(heard)
        return heard

    async def raw(self, kind: str, number: int) -> None:
        """A client on a bare socket that resumes; `dropper` resets its connection now and then, `slow` and `stalling`
        read as their names say."""
        heard = self.client(kind, number)
        draw = random.Random(f"{kind}{number}")
        cursor = f"{self.epoch}-0"
        slow = kind == "slow"
        while True:
            headers = {"Last-Event-ID": cursor}
            try:
                async with listen(
                    self.proxy_port, f"{kind}-{number}", headers=headers, rcvbuf=4096 if slow else None
                ) as client:
                    leave_at = time.monotonic() + draw.uniform(2, 15) if kind == "dropper" else float("inf")
                    while time.monotonic() < leave_at and not client.ended:
                        before = len(client.events)
                        with trio.move_on_after(40) as silence:
                            if not await client.read_some():
                                break
                        if silence.cancelled_caught or client.status not in {0, 200}:
                            break
                        for event in client.events[before:]:
                            heard.take(event.event, event.id, event.data)
                            if event.id:
                                cursor = event.id
                        client.events.clear()
                        if slow and not self.finished:
                            await trio.sleep(0.2)
                        if kind == "stalling" and not self.finished and draw.random() < 0.002:
                            await trio.sleep(8)
                    if kind == "dropper":
                        client.stream.socket.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
            except (OSError, trio.BrokenResourceError, AssertionError):
                pass
            heard.resumes += 1
            await trio.sleep(draw.uniform(0.2, 1.0))

    async def listener(self, number: int) -> None:
        heard = self.client("httpx", number)
        url = f"http://127.0.0.1:{self.proxy_port}"
        async with follow(url, agent_id=f"httpx-{number}", last_event_id=f"{self.epoch}-0", idle_timeout=40) as events:
            async for told in events:
                if isinstance(told, Interruption):
                    heard.resumes += 1
                else:
                    heard.take(told.event, told.id, told.data)

    async def node_clients(self, count: int) -> None:
        program = node()
        assert program is not None, "Node is needed: tests/provision.py gets it"
        assert node_modules().exists(), "Node's packages are needed: tests/provision.py gets them"
        heard = [self.client("eventsource", number) for number in range(count)]
        url = f"http://127.0.0.1:{self.proxy_port}/discoveries/stream?last_event_id={self.epoch}-0&agent_id=node-"
        script = self.directory / "client.cjs"
        script.write_text(NODE_CLIENT)
        arguments = [program, str(script), str(node_modules().parent), url, str(count)]
        process = await trio.lowlevel.open_process(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout is not None
        buffer = b""
        try:
            async for data in process.stdout:
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    number, kind, *rest = json.loads(line)
                    if kind == "closed":
                        raise AssertionError(f"EventSource {number} was closed for good")
                    heard[number].take(kind, *rest)
        finally:
            process.kill()
            with trio.move_on_after(5, shield=True):
                await process.wait()
                await process.stdout.aclose()

    # -- faults ------------------------------------------------------------------------------------------------------

    def children(self, server: Server) -> list[int]:
        path = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
        with suppress(OSError):
            return [int(pid) for pid in path.read_text().split()]
        return []

    async def kill_worker(self) -> None:
        server = self.draw.choice([server for server in self.servers if server is not None] or [None])
        workers = self.children(server) if server is not None else []
        if workers:
            os.kill(self.draw.choice(workers), signal.SIGKILL)

    async def freeze_worker(self) -> None:
        server = self.draw.choice([server for server in self.servers if server is not None] or [None])
        workers = self.children(server) if server is not None else []
        if workers:
            pid = self.draw.choice(workers)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                await trio.sleep(self.draw.uniform(1, 4))
                os.kill(pid, signal.SIGCONT)

    async def kill_nats(self, name: str | None = None) -> None:
        server = self.nats[name or self.draw.choice(sorted(self.nats))]
        server.kill()
        await trio.sleep(self.draw.uniform(1, 4))
        await server.start()

    async def kill_leader(self) -> None:
        await self.kill_nats(await self.leader())

    async def leader(self) -> str | None:
        for server in self.nats.values():
            with suppress(OSError, AssertionError), trio.move_on_after(2):
                answer = await api(server, "$JS.API.STREAM.INFO.DISCOVERIES")
                if (leader := answer.get("cluster", {}).get("leader")) in self.nats:
                    return str(leader)
        return None

    async def freeze_nats(self) -> None:
        server = self.nats[self.draw.choice(sorted(self.nats))]
        server.freeze()
        await trio.sleep(self.draw.uniform(2, 8))
        server.thaw()

    async def restart_all_nats(self) -> None:
        for server in self.nats.values():
            server.kill()
        await trio.sleep(1)
        for server in self.nats.values():
            await server.start()

    async def redeploy(self) -> None:
        for number in (0, 1):
            server = self.servers[number]
            if server is not None and server.process.poll() is None:
                server.process.terminate()
                with trio.move_on_after(60):
                    while (new := self.servers[number]) is None or new is server or not await new.is_live():
                        await trio.sleep(0.1)

    async def reset_through_proxy(self) -> None:
        await self.tell_proxy(f"shutdown sessions server back/s{self.draw.randrange(2)}")

    async def break_things(self, until: float) -> None:
        kinds: list[Callable[[], Awaitable[None]]] = [
            self.kill_worker,
            self.freeze_worker,
            self.kill_nats,
            self.kill_leader,
            self.freeze_nats,
            self.restart_all_nats,
            self.redeploy,
            self.reset_through_proxy,
        ]
        queue: list[Callable[[], Awaitable[None]]] = []
        while time.monotonic() < until:
            await trio.sleep(self.draw.uniform(2, 8))
            if not queue:
                queue = self.draw.sample(kinds, len(kinds))
            fault = queue.pop()
            self.faults[fault.__name__] += 1
            self.say(fault.__name__.replace("_", " "))
            await fault()

    async def count_resumes(self) -> None:
        """Add up what workers say about resuming, as long as they live."""
        seen: dict[tuple[str, str], float] = {}
        while True:
            for port in self.ports:
                with suppress(OSError, AssertionError), trio.move_on_after(2):
                    _, _, body = await request(port, "GET", "/metrics")
                    for line in body.decode().splitlines():
                        if line.startswith("sse_trio_resumes_total{"):
                            key = (f"{port}", line.partition('"')[2].partition('"')[0])
                            value = float(line.split()[-1])
                            before = seen.get(key, 0.0)
                            self.resumes[key[1]] += int(value - before if value >= before else value)
                            seen[key] = value
            await trio.sleep(1)

    # -- the run -----------------------------------------------------------------------------------------------------

    async def run(self, seconds: float) -> bool:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.cluster())
            await stack.enter_async_context(self.proxy())
            nursery = await stack.enter_async_context(trio.open_nursery())
            await nursery.start(self.serve, 0)
            await nursery.start(self.serve, 1)
            await eventually(self._has_epoch, "the stream has begun", 60)
            self.say(f"begun; the stream is {self.epoch}")
            kinds = ["dropper", "slow", "stalling", "steady"]
            nodes, listeners = self.count // 5, self.count // 5
            nursery.start_soon(self.node_clients, nodes)
            for number in range(listeners):
                nursery.start_soon(self.listener, number)
            for number in range(self.count - nodes - listeners):
                nursery.start_soon(self.raw, kinds[number % len(kinds)], number)
            nursery.start_soon(self.count_resumes)
            until = time.monotonic() + seconds
            async with trio.open_nursery() as acting:
                acting.start_soon(self.publish, until)
                acting.start_soon(self.break_things, until)
            self.finished = True
            self.say(f"published {len(self.published)}; waiting for the clients")
            truth = await self.truth()
            with trio.move_on_after(SETTLE):
                while any(not heard.sequences or heard.sequences[-1] < truth[-1] for heard in self.heard):
                    await trio.sleep(0.2)
            balanced = self.balance(truth)
            nursery.cancel_scope.cancel()
        return balanced

    async def _has_epoch(self) -> bool:
        for port in self.ports:
            with suppress(OSError, ValueError, AssertionError):
                _, _, body = await request(port, "GET", "/health")
                self.epoch = json.loads(body)["epoch"]
                return bool(self.epoch)
        return False

    async def truth(self) -> list[int]:
        """The sequences that the stream holds, read back by listing; each published number must be in it once.

        An instance that has just lost NATS lists what it knew until then: it is asked again until it knows all.
        """
        until = time.monotonic() + SETTLE
        while True:
            found = await self._listed()
            contents = Counter(content for _, content in found)
            missing, more = self.published.keys() - contents.keys(), contents.keys() - self.published.keys()
            assert not more, f"nobody has published {sorted(more)[:5]}"
            assert max(contents.values(), default=1) == 1, "the stream took each of them once"
            if not missing:
                return sorted(sequence for sequence, _ in found)
            numbers = sorted(self.published[content] for content in missing)
            self.say(f"{len(missing)} are not listed, from {numbers[0]} to {numbers[-1]}")
            assert time.monotonic() < until, "the stream has what was acknowledged"
            await trio.sleep(1)

    async def _listed(self) -> list[tuple[int, str]]:
        """Sequence and content of all events, paged back from the newest."""
        found: list[tuple[int, str]] = []
        query = "limit=500"
        while query:
            status, _, body = await request(self.proxy_port, "GET", f"/discoveries?{query}")
            if status != 200:
                await trio.sleep(0.5)
                continue
            page = json.loads(body)
            found += [(int(one["id"].rpartition("-")[2]), one["discovery"]["content"]) for one in page["discoveries"]]
            query = f"limit=500&before={page['next']}" if page["next"] is not None else ""
        return found

    def balance(self, truth: list[int]) -> bool:
        """Print the books; whether they balance."""
        wrong = {heard.name: faults for heard in self.heard if (faults := heard.faults(truth))}
        gaps = Counter(reason for heard in self.heard for reason, _, _ in heard.gaps)
        delivered = sum(len(heard.sequences) for heard in self.heard)
        silences = sorted(heard.longest_silence for heard in self.heard)
        print(f"faults             {dict(self.faults)}")
        print(f"published          {len(truth)}")
        print(f"delivered          {delivered} of {len(truth) * len(self.heard)} to {len(self.heard)} clients")
        print(f"resumed            {dict(self.resumes)} (as far as workers lived to tell)")
        print(f"came back          {sum(heard.resumes for heard in self.heard)} times (clients that count it)")
        print(f"gaps               {dict(gaps)}")
        print(f"longest silence    median {silences[len(silences) // 2]:.1f} s, most {silences[-1]:.1f} s")
        for name, faults in list(wrong.items())[:20]:
            print(f"WRONG  {name}: {'; '.join(faults)}")
        print("the books balance" if not wrong else f"the books do NOT balance for {len(wrong)} clients")
        return not wrong


async def api(server: NatsServer, subject: str) -> dict[str, Any]:
    """One request to the JetStream API, on a bare socket."""
    async with await trio.open_tcp_stream("127.0.0.1", server.port) as stream:
        await stream.receive_some()
        connect = b'CONNECT {"verbose":false,"pedantic":false,"headers":true,"no_responders":true}\r\n'
        await stream.send_all(connect + b"SUB answer 1\r\n" + f"PUB {subject} answer 0\r\n\r\n".encode())
        heard = b""
        while True:
            heard += await stream.receive_some()
            if b"MSG answer" in heard and heard.endswith(b"\r\n"):
                with suppress(ValueError):
                    return dict(json.loads(heard[heard.index(b"{", heard.index(b"MSG answer")) :]))


async def chaos(seconds: float, seed: int, clients: int) -> bool:
    """One run; whether the books balance."""
    directory = Path(tempfile.mkdtemp(prefix="sse-trio-chaos-"))
    print(f"seed {seed}, {seconds:g} s, {clients} clients", flush=True)
    balanced = False
    try:
        balanced = await World(directory, random.Random(seed), clients).run(seconds)
    finally:
        if balanced:
            shutil.rmtree(directory, ignore_errors=True)
        else:
            print(f"logs are in {directory}")
    return balanced


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31))
    parser.add_argument("--clients", type=int, default=200)
    options = parser.parse_args()
    run = partial(chaos, options.minutes * 60, options.seed, options.clients)
    return 0 if trio.run(unless_terminated, run) else 1


if __name__ == "__main__":
    sys.exit(main())
