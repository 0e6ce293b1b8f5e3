"""`python -m benchmarks.recovery`: servers that die, clients that come back late, read slowly or hear little.

Each scenario has a real nats-server with JetStream and a real `sse-trio serve`; the clients are a process of their own
(`crowd`). The discoveries are numbered as the stream numbers them and carry the time of their publication, so the books
of every client are known by the event. A table of figures is printed; the exit code is 1 when some books do not balance
or a target is missed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import trio

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from support import BIN, NatsServer, Server, eventually, fail_within, free_port, listen, nats_server, run_server

from sse_trio.backlog import SMALL_PAGE

from .procs import usage

WITHIN = 120.0
"""Seconds that a state may be in coming."""

SUBJECT = "discoveries.insights"
INBOX = "_INBOX.recovery"
ACKED = re.compile(rb'"seq":(\d+)')

AT_ONCE = 1000
"""Messages that are published before the stream's acknowledgement is waited for: it drops what it cannot buffer."""

TICK = 0.01
"""Seconds between two looks at what is due to be published."""


@dataclass
class Outcome:
    """What a scenario has shown: figures to print, and what is wrong."""

    title: str
    figures: list[tuple[str, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    """Targets that were missed: on a busy machine they say little."""

    def figure(self, name: str, value: str) -> None:
        self.figures.append((name, value))

    def require(self, holds: bool, fault: str) -> None:
        if not holds:
            self.faults.append(fault)

    def target(self, holds: bool, what: str) -> None:
        if not holds:
            self.missed.append(what)

    def balance(self, name: str, books: dict[str, Any], each: int | None = None) -> None:
        """Hold the books of a crowd against what must be in them: `each` events for every client."""
        for what in ("lost", "disordered", "foreign", "gaps"):
            self.require(books[what] == 0, f"{name}: {what} {books[what]}")
        if each is not None:
            wanted = each * books["clients"]
            self.require(books["delivered"] == wanted, f"{name}: {books['delivered']} delivered, not {wanted}")


# -- parts -----------------------------------------------------------------------------------------------------------


class Publisher:
    """Publishes discoveries whose number is their sequence in the stream."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.sending = trio.Lock()
        self.number = 0
        self.acked = 0
        self.stopping = False

    async def send(self, count: int, rare: frozenset[int] = frozenset()) -> None:
        """The next `count`, the last one with a request for its acknowledgement; `rare` are numbers of another role."""
        wire = []
        for left in range(count - 1, -1, -1):
            self.number += 1
            role = "Rare" if self.number in rare else "Bench"
            body = json.dumps(
                {
                    "agent_id": f"bench-{self.number}-{time.monotonic_ns()}",
                    "agent_role": role,
                    "discovery_type": "Anomaly",
                    "content": "unusual login pattern from internal subnet",
                    "confidence": 0.75,
                    "timestamp": "2009-02-13T23:31:30Z",
                    "related_to": None,
                }
            ).encode()
            wire.append(f"PUB {SUBJECT} {INBOX + ' ' if left == 0 else ''}{len(body)}\r\n".encode() + body + b"\r\n")
        async with self.sending:
            await self.stream.send_all(b"".join(wire))

    async def burst(self, count: int, rare: frozenset[int] = frozenset()) -> None:
        """`count` of them as fast as the stream takes them; returns when it has them all."""
        last = self.number + count
        while self.number < last:
            await self.send(min(AT_ONCE, last - self.number), rare)
            await self.settle()

    @asynccontextmanager
    async def flowing(self, rate: float, rare: frozenset[int] = frozenset()) -> AsyncIterator[None]:
        """`rate` of them each second, until `stop` or the end of the block."""
        self.stopping = False
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._flow, rate, rare)
            yield
            self.stopping = True

    async def _flow(self, rate: float, rare: frozenset[int]) -> None:
        began, published = time.monotonic(), 0
        while not self.stopping:
            due = min(int((time.monotonic() - began) * rate) - published, AT_ONCE)
            if due > 0:
                await self.send(due, rare)
                published += due
            await trio.sleep(TICK)

    async def stop(self) -> None:
        """Publish no more; returns when the stream has them all."""
        self.stopping = True
        async with self.sending:
            pass
        await self.settle()

    async def settle(self) -> None:
        """Wait until the stream has all of them, each at its own number."""
        await eventually(lambda: self.acked >= self.number, "the stream has what was published", WITHIN)
        assert self.acked == self.number, "the stream holds what we have not published"

    async def hear(self) -> None:
        heard = b""
        while data := await self.stream.receive_some():
            *lines, heard = (heard + data).split(b"\r\n")
            for line in lines:
                assert not line.startswith(b"-ERR"), line
                if line == b"PING":
                    async with self.sending:
                        await self.stream.send_all(b"PONG\r\n")
                elif found := ACKED.search(line):
                    self.acked = max(self.acked, int(found[1]))


@asynccontextmanager
async def publisher(nats: NatsServer) -> AsyncIterator[Publisher]:
    async with await trio.open_tcp_stream("127.0.0.1", nats.port) as stream, trio.open_nursery() as nursery:
        await stream.send_all(b'CONNECT {"verbose":false,"pedantic":false}\r\n' + f"SUB {INBOX} 1\r\n".encode())
        publishing = Publisher(stream)
        nursery.start_soon(publishing.hear)
        yield publishing
        nursery.cancel_scope.cancel()


class Crowd:
    """The clients' process."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.heard = b""

    async def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        with fail_within(WITHIN, "the clients answer"):
            while b"\n" not in self.heard:
                data = await self.process.stdout.receive_some()
                assert data, "the clients' process has ended"
                self.heard += data
        line, _, self.heard = self.heard.partition(b"\n")
        said: dict[str, Any] = json.loads(line)
        return said

    async def tell(self, command: str) -> None:
        assert self.process.stdin is not None
        await self.process.stdin.send_all(command.encode() + b"\n")

    async def books(self) -> dict[str, Any]:
        await self.tell("books")
        return await self.answer()

    async def until(self, number: int) -> dict[str, Any]:
        """The books when every client has got to `number`."""
        await self.tell(f"until {number}")
        return await self.answer()

    async def all_live(self) -> dict[str, Any]:
        """The books when every client is live."""
        await self.tell("live")
        return await self.answer()

    async def settled(self) -> None:
        """Forget the latencies, among them those of what came while they were sorted."""
        await self.books()
        await trio.sleep(0.5)
        await self.books()


@asynccontextmanager
async def crowd(port: int, clients: int, *options: str, ready: bool = True) -> AsyncIterator[Crowd]:
    """So many clients; all of them are connected, unless `ready` is False: that is the first answer then."""
    command = [sys.executable, "-m", "benchmarks.crowd", "--port", str(port), "--clients", str(clients), *options]
    process = await trio.lowlevel.open_process(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent
    )
    crowd = Crowd(process)
    try:
        if ready:
            await crowd.answer()
        yield crowd
    finally:
        process.kill()
        with trio.move_on_after(5, shield=True):
            await process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                await trio.aclose_forcefully(pipe)


@asynccontextmanager
async def serving(directory: Path, nats: NatsServer, port: int, **env: object) -> AsyncIterator[Server]:
    """A server whose feed is live."""
    command = (str(BIN / "sse-trio"), "serve", "--bind", f"127.0.0.1:{port}")
    settings = {"NATS_DURABLE": "require", "LOG_LEVEL": "warning"} | {name: str(value) for name, value in env.items()}
    async with run_server(directory, nats_url=nats.url, command=command, port=port, env=settings) as server:
        await eventually(server.is_live, "the feed is live")
        yield server


@asynccontextmanager
async def parts(directory: Path, **env: object) -> AsyncIterator[tuple[NatsServer, Server, Publisher]]:
    async with (
        nats_server(directory / "nats") as nats,
        serving(directory, nats, free_port(), **env) as server,
        publisher(nats) as publishing,
    ):
        yield nats, server, publishing


async def metric(server: Server, name: str) -> int:
    """What `/metrics` says; 0 for what it does not name."""
    _, body = await server.get("/metrics")
    found = re.search(rf"^{re.escape(name)} (\S+)$", body.decode(), re.MULTILINE)
    return 0 if found is None else int(float(found[1]))


async def reads(server: Server) -> int:
    return await metric(server, "sse_trio_stream_reads_total")


async def epoch(server: Server) -> str:
    async with listen(server.port) as client:
        return (await client.next("connected")).id.rpartition("-")[0]


# -- scenarios -------------------------------------------------------------------------------------------------------


async def killed(directory: Path, *, clients: int = 500, rate: int = 300, seconds: float = 5) -> Outcome:
    """kill -9 of the only server, and started again at once."""
    outcome = Outcome(f"kill -9 the only server under {clients} clients at {rate} events/s, and start it again")
    port = free_port()
    async with (
        nats_server(directory / "nats") as nats,
        serving(directory, nats, port, SSE_RETRY=1000) as first,
        publisher(nats) as publishing,
        crowd(port, clients) as listening,
    ):
        async with publishing.flowing(rate):
            await listening.all_live()
            await trio.sleep(seconds)
            first.process.kill()
            first.process.wait()
            at = time.monotonic()
            async with serving(directory, nats, port, SSE_RETRY=1000):
                outcome.figure("server ready after", f"{time.monotonic() - at:.1f} s")
                books = await listening.all_live()
                outcome.figure("last client live again after", f"{books['live_at'] - at:.1f} s")
                await trio.sleep(seconds / 2)
                await publishing.stop()
                books = await listening.until(publishing.number)
        outcome.balance("clients", books, publishing.number)
        outcome.require(books["connects"] == 2 * clients, f"{books['connects']} connections")
        outcome.figure("events", f"{publishing.number:,}")
        outcome.figure("deliveries", f"{books['delivered']:,}")
    return outcome


async def far_back(
    directory: Path, *, back: int = 100_000, rate: int = 500, live: int = 50, seconds: float = 10
) -> Outcome:
    """One client that comes back from far away, while others are live."""
    outcome = Outcome(f"a client resumes {back:,} events back while {rate} events/s arrive")
    async with nats_server(directory / "nats") as nats, publisher(nats) as publishing:
        async with serving(directory, nats, free_port()) as server:  # makes the stream
            place = await epoch(server)
            await publishing.burst(back)
        # Another one, whose memory has not grown by the burst.
        async with (
            serving(directory, nats, free_port()) as server,
            crowd(server.port, live, "--latencies") as listening,
            # What the start of its process costs, and to watch the memory, is no part of what is compared.
            crowd(server.port, 1, "--hold", ready=False) as late,
        ):
            async with publishing.flowing(rate), trio.open_nursery() as nursery:
                await listening.all_live()
                await trio.sleep(seconds / 5)
                before = peak = usage(server.process.pid).rss

                async def watch() -> None:
                    nonlocal peak
                    while True:
                        peak = max(peak, usage(server.process.pid).rss)
                        await trio.sleep(0.05)

                nursery.start_soon(watch)
                await listening.settled()
                await trio.sleep(seconds)
                undisturbed = await listening.books()
                reads_before = await reads(server)
                await listening.settled()
                began, behind = time.monotonic(), publishing.number - back
                await late.tell(f"go {place}-{behind}")
                await late.answer()
                books = await late.all_live()
                disturbed = await listening.books()
                outcome.figure("it is live after", f"{books['live_at'] - began:.1f} s")
                outcome.figure("reads of the stream", f"{await reads(server) - reads_before}")
                await trio.sleep(seconds / 5)
                await publishing.stop()
                outcome.balance("resuming", await late.until(publishing.number), publishing.number - behind)
                nursery.cancel_scope.cancel()
            outcome.balance("live", await listening.until(publishing.number), publishing.number - back)
            grown = (peak - before) / 1e6
            outcome.figure("RSS before, and at most during", f"{before / 1e6:.1f} MB, +{grown:.1f} MB")
            ratio = disturbed["p99"] / undisturbed["p99"]
            outcome.figure(
                f"p50 / p99 / max of {live} live clients, undisturbed",
                f"{undisturbed['p50'] * 1e3:.1f} / {undisturbed['p99'] * 1e3:.1f} / {undisturbed['max'] * 1e3:.1f} ms",
            )
            outcome.figure(
                "during the resume",
                f"{disturbed['p50'] * 1e3:.1f} / {disturbed['p99'] * 1e3:.1f} / {disturbed['max'] * 1e3:.1f} ms"
                f" (p99 {ratio:.1f}×)",
            )
            outcome.target(grown < 20, f"memory grew by {grown:.1f} MB, not by less than 20")
            outcome.target(ratio <= 2, f"p99 of the live clients was {ratio:.1f}×, not within 2×")
    return outcome


async def together(directory: Path, *, clients: int = 1000, back: int = 5000) -> Outcome:
    """Many clients that come back at once from the same place."""
    outcome = Outcome(f"{clients:,} clients resume from the same {back:,}-event-old cursor at once")
    async with parts(directory, SSE_HISTORY=100, SSE_BUFFER=100) as (_, server, publishing):
        place = await epoch(server)
        await publishing.burst(back)
        await eventually(partial(_head_is, server, back), "the server has it all", WITHIN)
        reads_before = await reads(server)
        async with crowd(server.port, clients, "--cursor", f"{place}-0", ready=False) as listening:
            await listening.answer()
            books = await listening.until(back)
            outcome.balance("clients", books, back)
            outcome.figure("the last one has everything after", f"{books['seconds']:.1f} s")
            outcome.figure("deliveries/s", f"{books['delivered'] / books['seconds']:,.0f}")
        count = await reads(server) - reads_before
        outcome.figure("reads of the stream", f"{count} (small pages: {-(-back // SMALL_PAGE)})")
        outcome.require(count <= 2 * (back // SMALL_PAGE + 1), f"{count} reads of the stream")
    return outcome


async def _head_is(server: Server, number: int) -> bool:
    async with listen(server.port) as client:
        return int((await client.next("connected")).id.rpartition("-")[2]) >= number


async def slow(
    directory: Path, *, rate: int = 500, seconds: float = 60, every: float = 1.0, patience: float = 10, clients: int = 5
) -> Outcome:
    """Readers at 1 KB/s, and readers that read nothing, both fast again in the end."""
    outcome = Outcome(
        f"readers at {1 / every:g} KB/s on a {rate / 5:.0f} KB/s stream for {seconds:g} s, then fast again"
    )
    async with parts(directory, SSE_WRITE_TIMEOUT=patience, SSE_RETRY=1000) as (_, server, publishing):
        pace = ("--rcvbuf", "4096", "--every", str(every))
        async with (
            crowd(server.port, clients, *pace, "--pace", "1024") as slowly,
            crowd(server.port, clients, *pace, "--pace", "0") as not_at_all,
        ):
            async with publishing.flowing(rate):
                await eventually(lambda: publishing.number >= rate * seconds, "all are published", seconds + WITHIN)
                await publishing.stop()
            stalled = 'sse_trio_disconnects_total{reason="stalled"}'

            async def cut_off() -> bool:
                return await metric(server, stalled) >= clients

            await eventually(cut_off, "those who read nothing are cut off", WITHIN)
            behind = (await slowly.books())["reached"]
            outcome.figure("the slow ones had got, of", f"{behind:,} of {publishing.number:,}")
            outcome.require(behind < publishing.number, "they were not slow")
            at = time.monotonic()
            for late in (slowly, not_at_all):
                await late.tell("fast")
            books = await slowly.until(publishing.number)
            outcome.figure("fast again, they have everything after", f"{time.monotonic() - at:.1f} s")
            outcome.balance("slow", books, publishing.number)
            outcome.require(books["connects"] == clients, f"slow readers connected {books['connects']} times")
            books = await not_at_all.until(publishing.number)
            outcome.balance("stalled", books, publishing.number)
            outcome.require(books["connects"] == 2 * clients, f"stalled readers connected {books['connects']} times")
            outcome.figure("cut off for no progress, and resumed", f"{await metric(server, stalled)} of {clients}")
    return outcome


async def rare(
    directory: Path, *, events: int = 200_000, one_in: int = 100_000, history: int = 1000, rate: int = 5000
) -> Outcome:
    """Clients whose filter lets hardly anything through."""
    outcome = Outcome(
        f"a filter that lets one event in {one_in:,} through, for {events:,} events (memory: {history:,})"
    )
    numbers = frozenset(range(one_in, events + one_in, one_in))
    env: dict[str, Any] = {"SSE_HISTORY": history, "SSE_BUFFER": min(history, 1024), "SSE_KEEPALIVE_INTERVAL": 1}
    async with parts(directory, **env) as (_, server, publishing):
        options = ("--query", "&role=Rare", "--filtered")
        clients = 5
        async with crowd(server.port, clients, *options) as listening:
            async with publishing.flowing(rate, numbers):
                oldest = 0
                while publishing.number < events:
                    acked = publishing.acked
                    oldest = max(oldest, acked - (await listening.books())["reached"])
                    await trio.sleep(0.1)
                await publishing.stop()
            at = publishing.number
            books = await listening.until(at)
            heard = len([number for number in numbers if number <= at])
            outcome.balance("filtered", books, heard)
            outcome.figure("events heard, cursors told, per client", f"{heard}, {books['cursors'] // clients}")
            outcome.figure("a cursor was never older than", f"{oldest / rate:.1f} s ({oldest:,} events)")
        stream_reads = await reads(server)
        await publishing.burst(history // 2, frozenset({at + history // 2}))
        began = time.monotonic()
        async with crowd(server.port, clients, *options, "--cursor", books["cursor"]) as again:
            outcome.balance("filtered, resumed", await again.until(publishing.number), 1)
        outcome.figure("resuming takes", f"{time.monotonic() - began:.1f} s")
        stream_reads = await reads(server) - stream_reads
        outcome.figure("reads of the stream for resuming", f"{stream_reads}")
        outcome.require(stream_reads <= 1, f"{stream_reads} reads of the stream")
    return outcome


SCENARIOS: dict[str, Callable[[Path], Awaitable[Outcome]]] = {
    "killed": killed,
    "far-back": far_back,
    "together": together,
    "slow": slow,
    "rare": rare,
}


async def run(names: list[str]) -> list[Outcome]:
    outcomes = []
    for name in names:
        with tempfile.TemporaryDirectory(prefix="sse-trio-recovery-") as directory:
            outcome = await SCENARIOS[name](Path(directory))
        print(f"\n{outcome.title}", flush=True)
        for figure, value in outcome.figures:
            print(f"  {figure:45} {value}", flush=True)
        for fault in outcome.faults + outcome.missed:
            print(f"  WRONG: {fault}", flush=True)
        outcomes.append(outcome)
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery")
    parser.add_argument("--only", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS), metavar="SCENARIO")
    outcomes = trio.run(run, parser.parse_args().only)
    print("\n| what happens | figures |\n|---|---|")
    for outcome in outcomes:
        print(f"| {outcome.title} | {'; '.join(f'{name}: {value}' for name, value in outcome.figures)} |")
    wrong = [text for outcome in outcomes for text in outcome.faults + outcome.missed]
    print("\nEvery book balances." if not wrong else f"\nWRONG: {wrong}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
