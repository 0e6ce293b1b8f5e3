"""Nothing lost, nothing doubled, at any seam: a model of ten lines against the whole of it.

A run is drawn from a seed: windows, buffers and history so small that everything overflows, events that are published
while clients subscribe, read, stall, leave and come back with their cursor, retention that takes what nobody has read,
and trio's own order of tasks. What each client heard is then compared with what was published: every event once and in
order, or named by a gap that stands exactly where the events are missing. All the while, the books balance.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import pytest
import trio
from memory_connection import LentConnection, MemoryConnection
from support import payload
from test_broadcaster import check_books, event
from trio.testing import MockClock

from sse_trio import audience, row
from sse_trio import broadcaster as broadcaster_module
from sse_trio.audience import EVERYTHING, Filter
from sse_trio.backlog import PAGE, Backlog
from sse_trio.broadcaster import Broadcaster
from sse_trio.rounds import FeedCounters
from sse_trio.settings import Settings
from sse_trio.sse import ServerSentEvent
from sse_trio.stream import EventStream
from sse_trio.testing import seeded

SEEDS = [*range(60), 364]
"""The last found a cursor that went before what was queued in the same moment."""

ODD = Filter(agents=frozenset({"odd"}))
FULL = Filter(full=True)
"""Large enough for a round to be cut by the smallest window of a kernel."""


def agent_of(sequence: int) -> str:
    return "odd" if sequence % 3 == 0 else "even"


@dataclass
class Bounds:
    epoch: str
    first: int
    last: int


@dataclass
class ScriptedSource:
    """A stream in memory with a retention of its own; reading takes random time."""

    draw: random.Random
    stored: dict[int, bytes] = field(default_factory=dict)
    first: int = 1
    last: int = 0
    direct: bool = True
    subject: str = "discoveries.>"

    async def info(self) -> Bounds:
        await trio.sleep(self.draw.random())
        return Bounds("e", self.first, self.last)

    async def read(self, sequence: int, limit: int) -> tuple[Sequence[tuple[int, str, bytes]], bool]:
        await trio.sleep(self.draw.random())
        found = [n for n in sorted(self.stored) if n >= sequence]
        answer = [(n, "discoveries.insights", self.stored[n]) for n in found[:limit]]
        return answer, len(found) <= limit

    async def next(self, sequence: int) -> tuple[int, str, bytes] | None:
        await trio.sleep(self.draw.random())
        found = [n for n in sorted(self.stored) if n >= sequence]
        return (found[0], "discoveries.insights", self.stored[found[0]]) if found else None

    async def get(self, sequence: int) -> tuple[int, str, bytes] | None:
        raise AssertionError("not read singly here")

    async def first_at(self, moment: datetime) -> int | None:
        raise AssertionError("not read by time here")


class World:
    """One run: a publisher, clients that come and go, and what they heard."""

    def __init__(self, seed: int, *, durable: bool, rows: bool) -> None:
        self.draw = draw = random.Random(seed)
        self.rows = rows
        self.durable = durable
        overflow: Any = draw.choice(["drop-oldest", "drop-newest"])
        self.settings = Settings(
            buffer=draw.randint(1, 8),
            history=draw.choice([0, 3, 20, 1000]),
            overflow=overflow,
            keepalive_interval=draw.choice([0.5, 30]),
            write_timeout=1e6,
            direct_writes="together" if rows else "single",
        )
        self.broadcaster = Broadcaster(self.settings)
        self.broadcaster.open_epoch("e", 0, durable=durable)
        self.broadcaster.go_live()
        self.source = ScriptedSource(draw)
        self.backlog = Backlog(lambda: self.broadcaster.head, FeedCounters()) if durable else None
        self.retention = draw.choice([None, None, 30])
        self.published: list[int] = []
        self.finished = False

    async def publish(self, total: int) -> None:
        sequence = 0
        while len(self.published) < total:
            batch = []
            for _ in range(self.draw.randint(1, 6)):
                sequence += self.draw.choice([1, 1, 1, 2])
                batch.append(event(sequence, agent_id=agent_of(sequence)))
                self.source.stored[sequence] = payload(sequence, agent_id=agent_of(sequence))
                self.source.last = sequence
                self.published.append(sequence)
            if self.retention is not None:
                while len(self.source.stored) > self.retention:
                    del self.source.stored[min(self.source.stored)]
                self.source.first = min(self.source.stored)
            self.broadcaster.publish(batch)
            while self.broadcaster.deliver():
                check_books(self.broadcaster)
                await trio.sleep(self.draw.choice([0, 0.01, 0.2]))
            check_books(self.broadcaster)
            await trio.sleep(self.draw.choice([0, 0, 0.01, 0.3]))
        self.finished = True

    async def client(self, filter: Filter, nursery: trio.Nursery, heard: list[ServerSentEvent]) -> None:
        """A client that leaves and resumes until it has heard the last event."""
        draw = self.draw
        cursor = "e-0"
        await trio.sleep(draw.random() * 2)
        while True:
            connection: MemoryConnection
            if self.rows:
                connection = LentConnection(small=draw.random() < 0.7, direct=draw.random() < 0.9, timeout=1e6)
            else:
                connection = MemoryConnection(draw.choice([200, 700, 5000]), direct=draw.random() < 0.6, timeout=1e6)
            stream = EventStream(
                self.broadcaster, self.settings, agent_id="a", filter=filter, cursor=cursor, backlog=self.backlog
            )
            async with trio.open_nursery() as life:
                life.start_soon(stream.respond, connection)
                stay = draw.random() < 0.3
                until = trio.current_time() + draw.random() * 8
                while not self._complete(filter, heard, connection) and (stay or trio.current_time() < until):
                    await trio.sleep(draw.choice([0, 0.01, 0.1, 0.9]))
                    check_books(self.broadcaster)
                    connection.read(draw.choice([50, 200, 1000, 100_000]))
                if not self._complete(filter, heard, connection) and draw.random() < 0.5:
                    connection.hang_up()
                life.cancel_scope.cancel()
            connection.release()
            events = connection.read_events  # whole frames only: the rest is cut off with the connection
            heard += events
            if events and events[-1].id:
                cursor = events[-1].id
            if self.finished and self._has_all(filter, heard):
                return

    def _complete(self, filter: Filter, heard: list[ServerSentEvent], connection: MemoryConnection) -> bool:
        return self.finished and self._has_all(filter, [*heard, *connection.read_events])

    def _has_all(self, filter: Filter, heard: list[ServerSentEvent]) -> bool:
        wanted = [n for n in self.published if not filter.agents or n % 3 == 0]
        last = max((int(e.id[2:]) for e in heard if e.id), default=0)
        return last >= wanted[-1]

    def check(self, filter: Filter, heard: list[ServerSentEvent]) -> int:
        """The model: walk through what was heard; whatever is not there must be named. Returns the number named."""
        wanted = iter([n for n in self.published if not filter.agents or n % 3 == 0])
        named = 0
        for told in heard:
            if told.event == "discovery":
                assert int(told.id[2:]) == next(wanted), "lost, doubled or out of order"
            elif told.event == "gap":
                said = json.loads(told.data)
                missing = []
                remaining = list(wanted)
                while remaining and remaining[0] <= int(told.id[2:]):
                    missing.append(remaining.pop(0))
                wanted = iter(remaining)
                assert said["missed"] in {None, len(missing)}, f"{len(missing)} were missing, the gap says {said}"
                assert said["missed"] is not None or said["reason"] == "expired"
                named += len(missing)
        assert list(wanted) == [], "the last were lost without a word"
        return named


async def run(seed: int, *, durable: bool, rows: bool = False) -> tuple[int, int]:
    """Heard and named events of all clients of one run; with `rows` each that may sits in one, of two."""
    # Rounds of a few clients are served in slices too, so that clients come, leave and rejoin in the middle of one.
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(broadcaster_module, "SLICE", random.Random(seed).choice([1, 2, 100]))
        patched.setattr(audience, "CROWD", 1)
        patched.setattr(audience, "MANY", random.Random(seed).choice([0, 1, 100]))
        patched.setattr(audience, "SEATS", 2)
        patched.setattr(row, "SEATS", 2)
        return await run_world(seed, durable=durable, rows=rows)


async def run_world(seed: int, *, durable: bool, rows: bool) -> tuple[int, int]:
    world = World(seed, durable=durable, rows=rows)
    filters = [FULL, FULL, ODD] if rows else [EVERYTHING, ODD]
    clients: list[tuple[Filter, list[ServerSentEvent]]] = [(world.draw.choice(filters), []) for _ in range(4)]
    with trio.fail_after(100_000):
        async with trio.open_nursery() as nursery:
            if world.backlog is not None:
                world.backlog.open(world.source, "e", nursery)
            async with trio.open_nursery() as acting:
                acting.start_soon(world.publish, 150)
                for filter, heard in clients:
                    acting.start_soon(world.client, filter, acting, heard)
            nursery.cancel_scope.cancel()
    assert not world.broadcaster.clients
    books = check_books(world.broadcaster)
    assert books.waiting == 0
    assert books.out + books.undelivered >= sum(told.event == "discovery" for _, heard in clients for told in heard)
    named = sum(world.check(filter, heard) for filter, heard in clients)
    if durable and world.retention is None:
        assert named == 0, "the stream keeps everything: nothing may be missed"
    return sum(len(heard) for _, heard in clients), named


@pytest.mark.parametrize("seed", SEEDS)
async def test_on_core_nats_each_event_is_heard_once_or_named_by_a_gap(seed: int, autojump_clock: MockClock) -> None:
    with seeded(seed):
        heard, _ = await run(seed, durable=False)
    assert heard > 0


@pytest.mark.parametrize("seed", SEEDS)
async def test_with_a_stream_nothing_is_missed_that_it_keeps(seed: int, autojump_clock: MockClock) -> None:
    assert PAGE > 1
    with seeded(seed):
        heard, _ = await run(seed, durable=True)
    assert heard > 0


@pytest.mark.parametrize("durable", [False, True], ids=["core NATS", "a stream"])
@pytest.mark.parametrize("seed", SEEDS)
async def test_those_who_sit_in_rows_miss_nothing_either(seed: int, durable: bool, autojump_clock: MockClock) -> None:
    with seeded(seed):
        heard, _ = await run(seed, durable=durable, rows=True)
    assert heard > 0
