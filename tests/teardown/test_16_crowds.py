"""16. Many at once: readers who stop in a crowd, and thousands who come and go in every way.

The guarantee: stalled readers cost the healthy ones nothing they could notice, and after whatever number of clients the
process is as large as it was: tasks, descriptors, registry, memory.

In the suite these are short. With `TEARDOWN=full` in the environment they are what docs/teardown.md reports: 200 stalled
readers among 1,000 for a minute, and 10,000 clients.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import trio
from support import WITHIN, RawStream, a_discovery, eventually, fail_within, listen
from teardown.house import COMMANDS, IDLE, House, count_descriptors, held_by_the_kernel, house, report, reset

FULL = os.environ.get("TEARDOWN") == "full"
HEALTHY, STALLED, SECONDS = (800, 200, 60.0) if FULL else (80, 20, 4.0)
CYCLES = 10_000 if FULL else 400
RATE = 2 if FULL else 5
"""Discoveries a second for the healthy ones, and as many of 30 kB for the others."""


@pytest.fixture(scope="module", params=COMMANDS if FULL else COMMANDS[:1])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    # Who stalls is stalled for the whole of the run; and history must not be what grows.
    env = {"SSE_KEEPALIVE_INTERVAL": "15", "SSE_WRITE_TIMEOUT": str(SECONDS), "SSE_HISTORY": "50"}
    with house(tmp_path_factory.mktemp("house"), request.param, env=env) as made:
        yield made


def resident(pid: int) -> float:
    """MB of memory that the process holds."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def kernel_memory() -> float:
    """MB that the kernel holds in TCP buffers, of all processes here."""
    with open("/proc/net/sockstat") as file:
        line = next(line for line in file if line.startswith("TCP:")).split()
    return int(line[line.index("mem") + 1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@dataclass
class Listeners:
    """Clients that read, and how late each discovery was."""

    connected: int = 0
    arrivals: trio.Semaphore = field(default_factory=lambda: trio.Semaphore(50))
    heard: dict[int, int] = field(default_factory=dict)
    latencies: list[float] = field(default_factory=list)
    held_mb: float = 0.0
    """The most that the kernel held for all of the server's peers."""

    async def read(self, port: int, number: int, until: int) -> None:
        """Read until the discovery with the number `until`."""
        async with listen(port, f"agent-{number}", query="&detail=full&role=Quiet") as stream:
            async with self.arrivals:
                await stream.next("connected", within=3 * WITHIN)
            self.connected += 1
            count = 0
            with fail_within(6 * SECONDS + 2 * WITHIN, "all discoveries are heard"):
                while count < until:
                    assert await stream.read_some(), f"client {number} was cut off"
                    now = time.time()
                    events = [event for event in stream.events if event.event == "discovery"]
                    stream.events.clear()
                    stream.body = b""
                    for event in events:
                        content = json.loads(event.data)["params"]["_meta"]["discovery"]["content"]
                        index, sent = content.split()
                        self.latencies.append(now - float(sent))
                        count += 1
                        assert int(index) == count, f"client {number} lost something before {index}"
            self.heard[number] = count

    def percentile(self, share: float) -> float:
        return sorted(self.latencies)[int(len(self.latencies) * share)] * 1000


async def stall(port: int, number: int) -> None:
    """A client that reads nothing after the first event."""
    async with listen(port, f"stalled-{number}", query="&detail=full", rcvbuf=4096) as stream:
        await stream.next("connected")
        await trio.sleep_forever()


async def minute(server: House, stalled: int) -> Listeners:
    """Traffic for the healthy ones, a flood besides, and so many who do not read it."""
    total = int(SECONDS * RATE)
    listeners = Listeners()
    async with trio.open_nursery() as idle:
        async with trio.open_nursery() as nursery:
            for number in range(HEALTHY):
                nursery.start_soon(listeners.read, server.port, number, total)
            await eventually(lambda: listeners.connected == HEALTHY, "the healthy ones are connected", 3 * WITHIN)
            for number in range(stalled):
                idle.start_soon(stall, server.port, number)
            began = trio.current_time()
            for index in range(1, total + 1):
                await trio.sleep_until(began + index / RATE)
                flood = [("discoveries.insights", json.dumps(a_discovery(content="x" * 30_000)).encode())]
                quiet = a_discovery(agent_role="Quiet", content=f"{index} {time.time()}")
                await server.nats.publish(*flood, ("discoveries.insights", json.dumps(quiet).encode()))
                listeners.held_mb = max(listeners.held_mb, held_by_the_kernel(server.port) / 1e6)
        await idle_out(server)
        idle.cancel_scope.cancel()
    assert listeners.heard == dict.fromkeys(range(HEALTHY), total), "the healthy ones lose nothing"
    return listeners


async def idle_out(server: House) -> None:
    """Until those who stalled are gone by themselves."""

    async def nobody() -> bool:
        return await server.clients() == []

    await eventually(nobody, "the stalled ones are evicted", SECONDS + WITHIN)


async def test_healthy_readers_among_stalled_ones_lose_nothing_and_are_not_late(server: House) -> None:
    # The first crowd leaves room behind: Python's allocator gives memory back only where a whole megabyte is free. The
    # second finds that room, and leaves nothing.
    await minute(server, STALLED)
    worker = await server.worker()
    before, kernel_before, files_before = resident(worker), kernel_memory(), await server.settled()
    alone = await minute(server, 0)
    among = await minute(server, STALLED)
    await eventually(lambda: held_by_the_kernel(server.port) == 0, "the kernel has freed its buffers")
    await eventually(lambda: count_descriptors(worker) <= files_before, "the descriptors are closed")
    after, kernel_after = resident(worker), kernel_memory()
    again = await minute(server, 0) if FULL else alone
    report(
        f"{STALLED} stalled among {HEALTHY + STALLED}, {SECONDS:g} s",
        server.kind,
        p99_alone_ms=alone.percentile(0.99),
        p99_alone_again_ms=again.percentile(0.99),
        p99_among_stalled_ms=among.percentile(0.99),
        resident_before_mb=before,
        resident_after_mb=after,
        kernel_before_mb=kernel_before,
        kernel_after_mb=kernel_after,
        kernel_held_for_stalled_mb=among.held_mb,
    )
    assert among.held_mb > STALLED * 0.01, "those who stalled had filled their buffers"
    assert after - before < 5, f"{before:.0f} MB before, {after:.0f} MB after"
    if FULL:  # alone on a quiet machine: the kernel's sum is everybody's, and lateness has many reasons
        assert kernel_after - kernel_before < 5, f"{kernel_before:.0f} MB before, {kernel_after:.0f} MB after"
        without = max(alone.percentile(0.99), again.percentile(0.99))
        assert among.percentile(0.99) <= 1.5 * without
    else:
        assert among.percentile(0.99) < 1000 * SECONDS / 2, (
            "who waited for one that stalled was late by the write timeout"
        )


async def at_rest(server: House) -> int:
    """The number of tasks, once it has not moved for longer than Hypercorn keeps what stopped in mid-head."""
    last, since = await server.tasks(), trio.current_time()

    async def stands_still() -> bool:
        nonlocal last, since
        now = await server.tasks()
        last, since = (last, since) if now == last else (now, trio.current_time())
        return trio.current_time() - since > IDLE + 1

    await eventually(stands_still, "the number of tasks stands still", 4 * WITHIN)
    return last


async def come_and_go(server: House, kind: str) -> None:
    """One client that leaves in that way."""
    if kind in {"mid-head", "mid-head reset"}:
        stream = await trio.open_tcp_stream("127.0.0.1", server.port)
        await stream.send_all(b"GET /discoveries/stream?agent_id=mid-he")
        if kind == "mid-head reset":
            reset(stream)
        else:
            await stream.aclose()
        return
    async with listen(
        server.port, "passing", query="&detail=full", rcvbuf=4096 if kind == "mid-frame" else None
    ) as one:
        with fail_within(2 * WITHIN, f"a client that goes by {kind} is served"):
            await one.next("connected")
            if kind == "reset":
                reset(one)
            elif kind == "half-close":
                await one.stream.send_eof()
                await one.read_to_end()
            elif kind == "mid-frame":
                await until_in_the_middle(one)


async def until_in_the_middle(stream: RawStream) -> None:
    """Read a piece of a frame that is longer than the window."""
    while not stream.dechunker.buffer:
        assert await stream.read_some()


KINDS = ["close", "reset", "half-close", "mid-head", "mid-head reset", "mid-frame"]


async def test_clients_who_come_and_go_in_every_way_leave_the_process_as_it_was(server: House) -> None:
    draw = random.Random(1)
    worker = await server.worker()

    async def cycles(count: int) -> None:
        left = iter(range(count))

        async def some() -> None:
            for _ in left:
                await come_and_go(server, draw.choice(KINDS))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_publishing, server, nursery.cancel_scope)
            async with trio.open_nursery() as clients:
                for _ in range(20):
                    clients.start_soon(some)
            nursery.cancel_scope.cancel()
        await idle_out(server)

    await cycles(CYCLES // 4)
    tasks, files, before = await at_rest(server), await server.settled(), resident(worker)
    began = trio.current_time()
    await cycles(CYCLES)
    seconds = trio.current_time() - began
    tasks_after = await at_rest(server)
    await eventually(lambda: count_descriptors(worker) <= files, "the descriptors are closed", 2 * WITHIN)
    after = resident(worker)
    report(
        f"{CYCLES} clients come and go",
        server.kind,
        seconds=seconds,
        descriptors_before=files,
        descriptors_after=count_descriptors(worker),
        tasks_before=tasks,
        tasks_after=tasks_after,
        resident_before_mb=before,
        resident_after_mb=after,
    )
    assert tasks_after <= tasks
    assert after - before < 15, f"{before:.0f} MB before, {after:.0f} MB after"


async def keep_publishing(server: House, scope: trio.CancelScope) -> None:
    """Something to be in the middle of."""
    discovery = json.dumps(a_discovery(content="x" * 30_000)).encode()
    while not scope.cancel_called:
        await server.nats.publish(*[("discoveries.insights", discovery)] * 4)
        await trio.sleep(0.05)  # its pace; nobody waits for it
