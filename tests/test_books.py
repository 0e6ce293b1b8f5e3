"""An hour under the mock clock, in which the books of delivery balance all the while.

An agent shares a discovery a second, and every ten minutes a burst that no small queue holds. Readers with and without
filters listen: fast ones, slow ones, one that stops for ten minutes, visitors that leave in the middle of whatever goes
on and come back with their cursor, one that is thrown out. In the middle of rounds and between them the books of each
stream, and those of all, must balance; and each stream's are compared with what its peer could read and with what was
published meanwhile.
"""

from __future__ import annotations

import json
import random
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
from memory_connection import MemoryConnection
from support import payload
from test_broadcaster import check_books, event, events, live_broadcaster, publish
from test_seam import ODD, ScriptedSource, agent_of
from trio.testing import MockClock

from sse_trio import broadcaster as broadcaster_module
from sse_trio.audience import EVERYTHING, Books, Filter
from sse_trio.backlog import Backlog
from sse_trio.broadcaster import SLICE, Broadcaster
from sse_trio.client import Client
from sse_trio.rounds import FeedCounters
from sse_trio.settings import Settings
from sse_trio.sse import ServerSentEvent
from sse_trio.stream import EventStream
from sse_trio.testing import seeded

HOUR = 3600
STEP = 4
"""Seconds between two rounds."""

NOBODY = Filter(agents=frozenset({"nobody"}))
ODD_IN_FULL = Filter(agents=ODD.agents, full=True)


@dataclass
class Reader:
    """An agent that listens throughout the hour, with one stream after another."""

    name: str
    filter: Filter = EVERYTHING
    rate: Callable[[int], int] = lambda second: 1_000_000
    """Bytes that it reads at once, every two seconds."""
    window: int = 1_000_000
    direct: bool = True
    stays: float = 2 * HOUR
    """Seconds until it leaves; it comes back a minute later with its cursor."""


READERS = [
    Reader("everything"),
    Reader("through the queue", direct=False),
    Reader("odd", ODD),
    Reader("in full", ODD_IN_FULL, direct=False),
    Reader("nothing", NOBODY),
    Reader("slow", rate=lambda second: 240, window=2000),
    Reader("slow and odd", ODD, rate=lambda second: 60, window=500),
    Reader("stops", rate=lambda second: 0 if 1100 < second < 1700 else 100_000, window=5000),
    Reader("visitor", stays=250),
    Reader("slow visitor", rate=lambda second: 100, window=1000, stays=777),
    Reader("thrown out", direct=False),
]


@dataclass
class Stream:
    """One stream of a reader: what the server knows of it, and what its peer could read."""

    reader: Reader
    client: Client
    connection: MemoryConnection
    left: bool = False
    """Whether the reader left, in the middle of whatever went on."""
    head: int = 0
    """The newest event when it ended."""
    events: list[ServerSentEvent] = field(default_factory=list)

    def end(self, head: int) -> None:
        self.head = head
        self.events = self.connection.events

    @property
    def begin(self) -> int:
        """The place that it began at, as its peer was told."""
        connected, *following = self.events
        resumed_elsewhere = json.loads(connected.data).get("resumed") is False
        return number(following[0] if resumed_elsewhere else connected)

    @property
    def discoveries(self) -> list[int]:
        return [number(told) for told in self.events if told.event == "discovery"]

    @property
    def overflows(self) -> list[int | None]:
        """What each gap `overflow` says is missing."""
        gaps = [json.loads(told.data) for told in self.events if told.event == "gap"]
        return [gap["missed"] for gap in gaps if gap["reason"] == "overflow"]


def number(told: ServerSentEvent) -> int:
    return int(told.id.partition("-")[2])


class Hour:
    """One run of the script."""

    def __init__(self, *, durable: bool, **settings: Any) -> None:
        self.settings = Settings(buffer=32, write_timeout=1e6, **settings)
        self.broadcaster = Broadcaster(self.settings)
        self.broadcaster.open_epoch("e", 0, durable=durable)
        self.broadcaster.go_live()
        self.durable = durable
        self.source = ScriptedSource(random.Random(0))
        self.backlog = Backlog(lambda: self.broadcaster.head, FeedCounters()) if durable else None
        self.published: list[int] = []
        self.matching: dict[Filter, list[int]] = {reader.filter: [] for reader in READERS}
        self.streams: list[Stream] = []
        self.audits_within_rounds = 0
        self.over = False

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            if self.backlog is not None:
                self.backlog.open(self.source, "e", nursery)
            async with trio.open_nursery() as acting:
                acting.start_soon(self.publish)
                for reader in READERS:
                    acting.start_soon(self.read, reader)
            nursery.cancel_scope.cancel()

    async def publish(self) -> None:
        for second in range(0, HOUR, STEP):
            batch = [event(n, agent_id=agent_of(n)) for n in self.make(300 if second % 600 == 300 else STEP)]
            self.broadcaster.publish(batch)
            while self.broadcaster.deliver():
                self.audit(second)
                self.audits_within_rounds += second % 100 == 0
                await trio.sleep(0.01)
            self.audit(second)
            if second == 1200:
                self.source.last += 1
                self.broadcaster.gap("expired" if self.durable else "upstream", self.source.last)
            elif second == 2400:
                (client,) = (c for c in self.broadcaster.clients.values() if c.agent_id == "thrown out")
                client.end("kicked")
            await trio.sleep(STEP)
        self.over = True

    def audit(self, second: int) -> None:
        """Now and then only: to be asked for the books also brings them up to date."""
        if second % 100 == 0:
            check_books(self.broadcaster)

    def make(self, count: int) -> Iterable[int]:
        for _ in range(count):
            self.source.last = sequence = self.source.last + 1
            agent_id = agent_of(sequence)
            self.source.stored[sequence] = payload(sequence, agent_id=agent_id)
            self.published.append(sequence)
            for filter, matching in self.matching.items():
                if not filter.agents or agent_id in filter.agents:
                    matching.append(sequence)
            yield sequence

    # -- the readers -------------------------------------------------------------------------------------------------

    async def read(self, reader: Reader) -> None:
        cursor = None
        while True:
            stream = await self.read_once(reader, cursor)
            if self.over:
                return
            cursor = next((told.id for told in reversed(stream.connection.read_events) if told.id), cursor)
            await trio.sleep(60 if stream.left else 0)

    async def read_once(self, reader: Reader, cursor: str | None) -> Stream:
        """One stream, to its end, or until the reader leaves; at the end of the hour, until it has caught up."""
        connection = MemoryConnection(reader.window, direct=reader.direct, timeout=1e6)
        response = EventStream(
            self.broadcaster,
            self.settings,
            agent_id=reader.name,
            filter=reader.filter,
            cursor=cursor,
            backlog=self.backlog,
        )
        before = set(self.broadcaster.clients)
        async with trio.open_nursery() as life:
            life.start_soon(response.respond, connection)
            await trio.testing.wait_all_tasks_blocked()
            (client,) = (
                client
                for id, client in self.broadcaster.clients.items()
                if id not in before and client.agent_id == reader.name
            )
            stream = Stream(reader, client, connection)
            self.streams.append(stream)
            until = trio.current_time() + reader.stays
            while client.id in self.broadcaster.clients and not (self.over and self.has_all(stream)):
                connection.read(None if self.over else reader.rate(round(trio.current_time())))
                await trio.sleep(2)
                if trio.current_time() > until and not self.over:
                    stream.left = True
                    break
            stream.end(self.broadcaster.head)
            life.cancel_scope.cancel()
        return stream

    def has_all(self, stream: Stream) -> bool:
        client = stream.client
        return client.live and client.parked and not client.queued and not stream.connection.has_rest

    # -- what must be so ---------------------------------------------------------------------------------------------

    def check(self, stream: Stream) -> Books:
        """The books of a stream that is over, against what its peer could read and what was published."""
        books = stream.client.books()
        matching = self.matching[stream.reader.filter]

        def passed(sequences: list[int], upto: int) -> int:
            return bisect_right(sequences, upto) - bisect_right(sequences, stream.begin)

        seen = max([stream.begin, *stream.discoveries])
        assert passed(self.published, seen) <= books.offered <= passed(self.published, stream.head)
        assert books.filtered <= passed(self.published, stream.head) - passed(matching, stream.head)
        if stream.client.ending is None and not stream.left:
            assert books.offered == passed(self.published, stream.head)
            assert books.filtered == passed(self.published, stream.head) - passed(matching, stream.head)
            assert books.out + books.dropped == passed(matching, stream.head)
        if not stream.left:
            assert books.out == len(stream.discoveries)
            said = [missed for missed in stream.overflows if missed is not None]
            if len(said) == len(stream.overflows):
                assert books.dropped == sum(said)
        return books


@pytest.mark.parametrize(
    ("durable", "history", "overflow"),
    [
        (False, 0, "drop-oldest"),
        (False, 0, "drop-newest"),
        (False, 0, "disconnect"),
        (False, 100, "drop-oldest"),
        (False, 100, "disconnect"),
        (True, 100, "drop-oldest"),
    ],
)
async def test_over_an_hour_the_books_balance_for_each_stream_and_for_all(
    durable: bool, history: int, overflow: str, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broadcaster_module, "SLICE", 2)
    with seeded(1), trio.fail_after(3 * HOUR):
        hour = Hour(durable=durable, history=history, overflow=overflow)
        await hour.run()
    total = check_books(hour.broadcaster)
    each = [hour.check(stream) for stream in hour.streams]
    assert hour.audits_within_rounds > 100
    assert total.waiting == 0
    for name in ("offered", "out", "dropped", "filtered"):
        assert getattr(total, name) == sum(getattr(books, name) for books in each), name
    assert total.undelivered == sum(books.waiting for books in each)
    assert (total.dropped > 0) == (not durable and overflow != "disconnect")
    assert (total.undelivered > 0) == (overflow != "disconnect")
    assert total.filtered > len(hour.published)


async def test_a_new_incarnation_begins_with_books_that_balance() -> None:
    broadcaster = live_broadcaster(buffer=2)
    with broadcaster.subscribe("a") as keeps_up, broadcaster.subscribe("b", ODD) as filters:
        publish(broadcaster, 1, 2, 3, 4)
        assert check_books(broadcaster) == Books(offered=6, filtered=4, waiting=2), "3 and 4 are still to be read by a"
        broadcaster.open_epoch("f", 0)
        for client in (keeps_up, filters):
            assert not broadcaster.read(client, 10)
        assert check_books(broadcaster) == Books(offered=6, filtered=4, waiting=2), "and never will be"
        keeps_up.take()
        publish(broadcaster, 1)
        assert check_books(broadcaster) == Books(offered=8, filtered=5, waiting=3)
    assert broadcaster.books() == Books(offered=8, filtered=5, undelivered=3)


async def test_a_stream_that_ends_in_the_middle_of_a_round_was_offered_what_it_was_served() -> None:
    broadcaster = live_broadcaster()
    others = [broadcaster.subscribe(f"c{n}") for n in range(SLICE)]
    for other in others:
        other.__enter__()
    with broadcaster.subscribe("ended") as ended, broadcaster.subscribe("left") as left:
        publish(broadcaster, 1)
        broadcaster.publish(events(2, 3))
        ended.end("kicked")
        left.close()
        assert ended.books() == left.books() == Books(offered=1, waiting=1)
        while broadcaster.deliver():
            check_books(broadcaster)
        assert ended.books() == left.books() == Books(offered=1, waiting=1)
    for other in others:
        other.__exit__(None, None, None)
    assert check_books(broadcaster) == Books(offered=302, undelivered=302)


async def test_a_notice_is_no_event() -> None:
    broadcaster = live_broadcaster(buffer=2, history=0)
    with broadcaster.subscribe("queue") as queue, broadcaster.subscribe("odd", ODD):
        broadcaster.gap("upstream", 1)
        assert check_books(broadcaster) == Books()
        publish(broadcaster, 2, 3, 4)
        assert queue.books() == Books(offered=3, dropped=1, waiting=2)
        payload, written, _ = queue.take()
        queue.written(written, len(payload))
        assert queue.books() == Books(offered=3, dropped=1, out=2)
        check_books(broadcaster)
