"""Older events: read in shared pages, complete to the last one, whatever replicas, retention and connections do.

First against a stream made of a dict, which can lag, fail and change while it is read; then against a real one.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import structlog.testing
import trio
import trio.testing
from recorder import down, live, number_of, operator, running
from support import WITHIN, NatsServer, eventually, fail_within, nats_server, payload

from sse_trio import backlog as backlog_module
from sse_trio import jetstream
from sse_trio.backlog import Backlog, Page
from sse_trio.jetstream import JetStream
from sse_trio.nats_connection import NatsConnection, open_connection
from sse_trio.nats_protocol import Message, NatsError
from sse_trio.rounds import Arrived, FeedCounters

PAGE = 500
"""Of these tests: the sequences in them are told against it, so it is theirs, whatever is best at the time."""


@pytest.fixture(autouse=True, scope="module")
def pages_of_five_hundred() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backlog_module, "PAGE", PAGE)
        patch.setattr(backlog_module, "SMALL_PAGE", PAGE)
        yield


@dataclass
class Bounds:
    epoch: str
    first: int
    last: int


class FakeStream:
    """A stream of which one replica answers reads; the leader knows everything."""

    def __init__(
        self, numbers: Sequence[int], *, epoch: str = "e", payload_of: Callable[[int], bytes] = payload
    ) -> None:
        self.messages = {number: payload_of(number) for number in numbers}
        self.first = min(numbers, default=1)
        self.epoch = epoch
        self.subject = "discoveries.>"
        self.direct = True
        self.replica_has = 1 << 60
        """The last sequence that the answering replica knows."""
        self.most = PAGE
        self.failures: list[NatsError] = []
        self.reads: list[int] = []
        self.infos = 0
        self.gate = trio.Event()
        self.gate.set()
        self.delay = 0.0
        """Seconds that each answer takes."""

    async def _answer(self) -> None:
        await trio.sleep(self.delay)
        await self.gate.wait()
        if self.failures:
            raise self.failures.pop(0)

    async def info(self) -> Bounds | None:
        self.infos += 1
        await self._answer()
        return Bounds(self.epoch, self.first, max(self.messages, default=0))

    async def read(self, sequence: int, limit: int) -> tuple[list[Arrived], bool]:
        self.reads.append(sequence)
        await self._answer()
        known = [number for number in sorted(self.messages) if sequence <= number <= self.replica_has]
        chosen = known[: min(limit, self.most)]
        return [(number, "discoveries.x", self.messages[number]) for number in chosen], chosen == known

    async def next(self, sequence: int) -> Arrived | None:
        await self._answer()
        following = [number for number in sorted(self.messages) if number >= sequence]
        return (following[0], "discoveries.x", self.messages[following[0]]) if following else None

    async def get(self, sequence: int) -> Arrived | None:
        await self._answer()
        return (sequence, "discoveries.x", self.messages[sequence]) if sequence in self.messages else None

    async def first_at(self, moment: datetime) -> int | None:
        await self._answer()
        return self.first


@asynccontextmanager
async def reading(stream: FakeStream, head: int | None = None) -> AsyncIterator[tuple[Backlog, trio.Nursery]]:
    backlog = Backlog(lambda: max(stream.messages, default=0) if head is None else head, FeedCounters())
    async with trio.open_nursery() as nursery:
        backlog.open(stream, stream.epoch, nursery)
        yield backlog, nursery
        backlog.close()
        nursery.cancel_scope.cancel()


def sequences(page: Page) -> list[int]:
    return [frame.sequence for frame in page.frames]


async def everything(backlog: Backlog, after: int, upto: int) -> list[int]:
    """What a client hears who reads from `after` until it is at `upto`."""
    heard: list[int] = []
    with fail_within(WITHIN, f"reading gets from {after} to {upto}; it has {heard[-3:]}"):
        while after < upto:
            page = await backlog.read(after)
            assert page.last > after
            heard += [frame.sequence for frame in page.frames if frame.sequence > after]
            after = page.last
    return heard


async def all_hear_all(backlog: Backlog, places: Sequence[int], upto: int) -> None:
    """Clients at all these places read on at once, and each hears what follows its own, up to `upto`."""
    heard = {}

    async def client(after: int) -> None:
        heard[after] = await everything(backlog, after, upto)

    async with trio.open_nursery() as nursery:
        for after in places:
            nursery.start_soon(client, after)
    assert heard == {after: list(range(after + 1, upto + 1)) for after in places}


# -- a stream made of a dict -------------------------------------------------------------------------------------------


async def test_pages_begin_at_the_same_places_for_everyone_and_are_read_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    stream = FakeStream(range(1, 2101))
    async with reading(stream) as (backlog, _):
        await all_hear_all(backlog, range(0, 2000, 7), 2100)
        assert sorted(set(stream.reads)) == [1, 501, 1001, 1501, 2001]
        # The unfinished page at the end is not kept; all others are read once.
        assert len([start for start in stream.reads if start != 2001]) == 4
        assert backlog.counters.stream_reads == len(stream.reads)


async def test_pages_are_small_while_the_loop_has_time_and_large_while_it_has_none(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlog_module, "SMALL_PAGE", 100)
    async with reading(FakeStream(range(1, 5001))) as (backlog, _):

        async def spans(after: int, slow: float, fast: float) -> list[tuple[int, int]]:
            """The first and last sequence of the next three pages, where this counts as slow, and that as fast."""
            monkeypatch.setattr(backlog_module, "SLOW", slow)
            monkeypatch.setattr(backlog_module, "FAST", fast)
            found = []
            for _ in range(3):
                page = await backlog.read(after)
                found.append((page.frames[0].sequence, page.last))
                after = page.last
            return found

        never, always = math.inf, 0.0
        assert await spans(0, never, never) == [(1, 100), (101, 200), (201, 300)]
        assert await spans(1000, always, always) == [(1001, 1100), (1001, 1500), (1501, 2000)]
        assert await spans(2000, never, always) == [(2001, 2500), (2501, 3000), (3001, 3500)]
        assert await spans(3500, never, never) == [(3501, 4000), (4001, 4100), (4101, 4200)]


async def test_a_page_that_is_there_or_on_its_way_serves_whatever_size_one_would_have_now(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlog_module, "SMALL_PAGE", 100)
    stream = FakeStream(range(1, 1001))
    stream.gate = trio.Event()
    async with reading(stream) as (backlog, _):
        backlog._took(math.inf)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(backlog.read, 0)
            await trio.testing.wait_all_tasks_blocked()
            backlog._took(0.0)
            nursery.start_soon(backlog.read, 350)
            await trio.testing.wait_all_tasks_blocked()
            stream.gate.set()
        backlog._took(0.0)
        await backlog.read(420)
        assert stream.reads == [1]


async def test_readers_far_apart_come_together_and_each_page_is_read_for_all_of_them(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlog_module, "CACHE_BYTES", 0)  # what was read for one who is ahead is forgotten
    stream = FakeStream(range(1, 20_001))
    stream.delay = 0.1
    async with reading(stream) as (backlog, _):
        await all_hear_all(backlog, range(0, 20_000, 1000), 20_000)
        # With turns of one page each, every page would be read anew for nearly every reader that comes by it: 420 times
        # in all (that many, or a few less, were counted; and 116 to 208 like this).
        assert len(stream.reads) < 300


async def test_who_waits_has_its_turn_however_far_others_still_have_to_go(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlog_module, "READS_AT_ONCE", 1)
    stream = FakeStream(range(1, 50_001))
    stream.delay = 0.1
    async with reading(stream) as (backlog, _), trio.open_nursery() as nursery:
        nursery.start_soon(everything, backlog, 10_000, 50_000)
        nursery.start_soon(everything, backlog, 9000, 50_000)
        await eventually(lambda: len(stream.reads) > 3, "they are on their way")
        began, reads = trio.current_time(), len(stream.reads)
        assert sequences(await backlog.read(0)) == list(range(1, 501))
        # One turn of each of the two others, at most.
        assert trio.current_time() - began <= 2 * (backlog_module.FOLLOWED + 0.2) + 0.2
        assert len(stream.reads) - reads > 5, "who is followed is served more than a page"
        nursery.cancel_scope.cancel()


async def test_what_waits_for_its_turn_when_reading_is_closed_is_not_read_for_nobody(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlog_module, "READS_AT_ONCE", 1)
    stream, other = FakeStream(range(1, 5001)), FakeStream(range(1, 5001))
    stream.gate = trio.Event()
    other.delay = 0.1
    async with reading(stream) as (backlog, nursery), trio.open_nursery() as readers:
        for after in (0, 1000, 2000):
            readers.start_soon(everything, backlog, after, 5000)
        await trio.testing.wait_all_tasks_blocked()
        backlog.open(other, "e", nursery)
        stream.gate.set()
    assert len(stream.reads) == 1
    assert len(other.reads) >= 10


async def test_frames_of_a_page_are_made_once(autojump_clock: trio.testing.MockClock) -> None:
    async with reading(FakeStream(range(1, 1001))) as (backlog, _):
        one, two = await backlog.read(0), await backlog.read(499)
        assert one.frames[7] is two.frames[7]
        assert one.frames[7].id == "e-8"


@pytest.mark.parametrize(
    ("turn", "pauses"),
    [(0.001, range(10, 16)), (0.01, range(4, 8)), (1.0, range(1, 3))],
    ids=["idle", "busy", "overrun"],
)
async def test_the_slower_the_loop_turns_the_more_of_a_page_is_decoded_in_a_turn(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch, turn: float, pauses: range
) -> None:
    class Time:
        """A message takes 12 µs to decode, and other tasks `turn` seconds whenever they are let run."""

        looked = 0

        def perf_counter(self) -> float:
            self.looked += 1
            return self.looked * 12e-6 + trio.current_time() / backlog_module.PAUSE * turn

    async with reading(FakeStream(range(1, 501))) as (backlog, _):
        began = trio.current_time()
        monkeypatch.setattr(backlog_module, "time", Time())
        await backlog.read(0)
        assert round((trio.current_time() - began) / backlog_module.PAUSE) in pauses


async def test_a_client_that_leaves_during_a_read_takes_nothing_from_the_others(
    autojump_clock: trio.testing.MockClock,
) -> None:
    stream = FakeStream(range(1, 501))
    stream.gate = trio.Event()
    async with reading(stream) as (backlog, _):
        pages: list[Page] = []

        async def stays() -> None:
            pages.append(await backlog.read(0))

        async with trio.open_nursery() as nursery:
            with trio.move_on_after(1):
                await backlog.read(0)
            nursery.start_soon(stays)
            await trio.testing.wait_all_tasks_blocked()
            stream.gate.set()
        assert sequences(pages[0]) == list(range(1, 501))
        assert stream.reads == [1]


async def test_a_page_that_its_size_has_cut_is_continued_where_it_ends(autojump_clock: trio.testing.MockClock) -> None:
    stream = FakeStream(range(1, 1101))
    stream.most = 60
    async with reading(stream) as (backlog, _):
        assert await everything(backlog, 0, 1100) == list(range(1, 1101))
        assert await everything(backlog, 333, 1100) == list(range(334, 1101))
        assert len(stream.reads) <= 22


async def test_what_does_not_decode_is_left_out_and_passed(autojump_clock: trio.testing.MockClock) -> None:
    stream = FakeStream(range(1, 1001), payload_of=lambda number: payload(number) if number % 3 else b"no discovery")
    async with reading(stream) as (backlog, _):
        assert await everything(backlog, 0, 1000) == [number for number in range(1, 1001) if number % 3]


async def test_at_the_end_a_page_reaches_to_where_the_feed_is(autojump_clock: trio.testing.MockClock) -> None:
    # The last messages of the stream are on other subjects: nothing of ours follows 10, and the feed is at 99.
    async with reading(FakeStream(range(1, 11)), head=99) as (backlog, _):
        assert (await backlog.read(0)).last == 10
        assert await backlog.read(10) == Page([], 99)


async def test_a_lagging_replica_makes_no_hole(autojump_clock: trio.testing.MockClock) -> None:
    stream = FakeStream(range(1, 301))
    stream.replica_has = 120
    async with reading(stream) as (backlog, _):
        page = await backlog.read(0)
        assert (sequences(page), page.last) == (list(range(1, 121)), 120)

        async with trio.open_nursery() as nursery:
            rest: list[int] = []

            async def goes_on() -> None:
                rest.extend(await everything(backlog, 120, 300))

            nursery.start_soon(goes_on)
            await trio.sleep(5)
            assert rest == []
            stream.replica_has = 300
        assert rest == list(range(121, 301))


async def test_a_replica_that_knows_nothing_yet_makes_no_hole(autojump_clock: trio.testing.MockClock) -> None:
    stream = FakeStream(range(1, 11))
    stream.replica_has = 0
    async with reading(stream) as (backlog, nursery):

        async def catches_up() -> None:
            await trio.sleep(3)
            stream.replica_has = 10

        nursery.start_soon(catches_up)
        assert await everything(backlog, 0, 10) == list(range(1, 11))
        assert trio.current_time() >= 3


async def test_failures_are_tried_again_and_bounds_are_unknown_meanwhile(
    autojump_clock: trio.testing.MockClock,
) -> None:
    stream = FakeStream(range(1, 11))
    async with reading(stream) as (backlog, _):
        with structlog.testing.capture_logs() as lines:
            for wanted in (
                lambda: backlog.read(0),
                lambda: backlog.get(1),
                lambda: backlog.first_at(datetime.now(UTC)),
                lambda: backlog.read_before(11),
                lambda: backlog.read(0),
            ):
                backlog._pages.clear()
                stream.failures = [NatsError(reason, "no") for reason in ("timeout", "stream", "unreachable")]
                assert await wanted()
                assert stream.failures == []
        # Who reads must not wait in silence; but of a dead connection the feed tells.
        assert [line["reason"] for line in lines] == ["timeout", "stream"]
        backlog.forget()
    async with reading(stream) as (backlog, _):
        stream.failures = [NatsError("timeout", "no answer")]
        asked = stream.infos
        assert await backlog.bounds() is None
        assert await backlog.bounds() is None
        assert stream.infos == asked + 1
        await trio.sleep(backlog_module.RETRY)
        assert await backlog.bounds() == (1, 10)


async def test_where_direct_reading_is_not_allowed_the_leader_is_asked(autojump_clock: trio.testing.MockClock) -> None:
    stream = FakeStream(range(1, 11))
    stream.failures = [NatsError("permissions", "may not publish to $JS.API.DIRECT.GET")]
    async with reading(stream) as (backlog, _):
        with structlog.testing.capture_logs() as lines:
            assert sequences(await backlog.read(0)) == list(range(1, 11))
        assert not stream.direct
        assert [line["event"] for line in lines] == ["stream cannot be read directly"]


async def test_readers_wait_while_the_feed_is_away_and_go_on_with_the_next_connection(
    autojump_clock: trio.testing.MockClock,
) -> None:
    stream = FakeStream(range(1, 11))
    stream.gate = trio.Event()
    backlog = Backlog(lambda: 10, FeedCounters())
    pages: list[Page] = []

    async def client() -> None:
        pages.append(await backlog.read(0))

    async with trio.open_nursery() as clients:
        for _ in range(3):
            clients.start_soon(client)
        await trio.sleep(100)
        assert await backlog.bounds() is None
        async with trio.open_nursery() as connection:
            backlog.open(stream, "e", connection)
            await trio.testing.wait_all_tasks_blocked()
            assert len(stream.reads) == 1
            backlog.close()
            connection.cancel_scope.cancel()
        assert pages == []
        stream.gate.set()
        async with trio.open_nursery() as connection:
            backlog.open(stream, "e", connection)
            await trio.sleep(1)
            connection.cancel_scope.cancel()
    assert [sequences(page) for page in pages] == [list(range(1, 11))] * 3


async def test_a_reader_of_a_stream_that_was_replaced_is_sent_back(autojump_clock: trio.testing.MockClock) -> None:
    old, new = FakeStream(range(1, 11)), FakeStream(range(1, 6), epoch="f")
    old.gate = trio.Event()
    backlog = Backlog(lambda: 10, FeedCounters())
    async with trio.open_nursery() as nursery:
        backlog.open(old, "e", nursery)
        answers: list[object] = []

        async def ask(question: Callable[[], Any]) -> None:
            answers.append(await question())

        nursery.start_soon(ask, lambda: backlog.read(8))
        await trio.testing.wait_all_tasks_blocked()
        backlog.open(new, "f", nursery)
        old.gate.set()
        await eventually(lambda: answers, "the reader is answered")
        assert answers == [Page([], 8)]
        assert sequences(await backlog.read(0)) == [1, 2, 3, 4, 5]
        nursery.cancel_scope.cancel()


async def test_bounds_are_asked_once_a_second_by_however_many(autojump_clock: trio.testing.MockClock) -> None:
    stream = FakeStream(range(5, 11))
    async with reading(stream) as (backlog, _):
        answers = []

        async def ask() -> None:
            answers.append(await backlog.bounds())

        for round_number in (1, 2):
            async with trio.open_nursery() as nursery:
                for _ in range(100):
                    nursery.start_soon(ask)
            assert stream.infos == round_number
            await trio.sleep(1.1)
        assert answers == [(5, 10)] * 200
        stream.epoch = "another"
        assert await backlog.bounds() is None


async def test_after_a_page_with_a_hole_bounds_are_fresh(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = FakeStream(range(1, 1001))
    async with reading(stream, head=1000) as (backlog, _):
        assert await backlog.bounds() == (1, 1000)
        stream.messages = {number: data for number, data in stream.messages.items() if number > 300}
        stream.first = 301
        page = await backlog.read(0)
        assert page.frames[0].sequence == 301
        assert await backlog.bounds() == (301, 1000)
        # The same when nothing is left, so that there is no message behind the hole.
        stream.messages, stream.first = {}, 1001
        assert await backlog.read(900) == Page([], 1000)
        assert await backlog.bounds() == (1001, 0)
        # The same when the bounds are just being asked for while a page with a hole comes.
        await trio.sleep(2)
        asked = FakeStream.info

        async def slow_info(self: FakeStream) -> Bounds | None:
            answer = await asked(self)
            await trio.sleep(1)
            return answer

        monkeypatch.setattr(FakeStream, "info", slow_info)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(backlog.bounds)
            await trio.sleep(0.5)
            stream.messages, stream.first = {1500: payload(1500)}, 1500
            assert (await backlog.read(1000)).frames[0].sequence == 1500
            assert await backlog.bounds() == (1500, 1500)


async def test_a_hole_that_retention_made_while_a_page_was_read_is_where_the_next_page_begins(
    autojump_clock: trio.testing.MockClock,
) -> None:
    stream = FakeStream([*range(1, 51), *range(101, 201), *range(251, 701)])
    async with reading(stream) as (backlog, _):
        # Sequences are missing, but they are other subjects' or were deleted: nothing of it is retention's work.
        assert len((await backlog.read(0)).frames) == 500
        backlog.forget()
    stream.first = 240
    async with reading(stream) as (backlog, _):
        assert sequences(await backlog.read(0)) == list(range(1, 51))
        assert sequences(await backlog.read(50)) == list(range(101, 201))
        assert (await backlog.read(200)).frames[0].sequence == 251
        assert await backlog.bounds() == (240, 700)


async def test_the_last_page_is_kept_for_those_to_whom_it_has_something_to_give(
    autojump_clock: trio.testing.MockClock,
) -> None:
    stream = FakeStream(range(1, 701))
    async with reading(stream) as (backlog, _):
        for after in (500, 500, 600, 699):
            assert sequences(await backlog.read(after)) == list(range(501, 701))
        assert stream.reads == [501]
        stream.messages |= {number: payload(number) for number in range(701, 1001)}
        assert sequences(await backlog.read(699)) == list(range(501, 701))
        assert stream.reads == [501]
        for after in (700, 800, 500):
            assert sequences(await backlog.read(after)) == list(range(501, 1001))
        assert stream.reads == [501, 501]
        assert backlog._bytes == sum(kept.size for kept in backlog._pages.values())


async def test_a_crowd_that_asks_for_the_bounds_is_answered_together(autojump_clock: trio.testing.MockClock) -> None:
    stream = FakeStream(range(1, 11))
    stream.gate = trio.Event()
    answers: list[tuple[int, int] | None] = []
    async with reading(stream) as (backlog, _), trio.open_nursery() as nursery:

        async def ask() -> None:
            answers.append(await backlog.bounds())

        for _ in range(100):
            nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        stream.gate.set()
        turns = 0
        while len(answers) < 100:
            turns += 1
            await trio.lowlevel.checkpoint()
        assert turns < 10
        assert set(answers) == {(1, 10)}
        assert stream.infos == 1


async def test_who_asks_for_the_bounds_may_leave_and_another_asks_instead(
    autojump_clock: trio.testing.MockClock,
) -> None:
    stream = FakeStream(range(1, 11))
    stream.gate = trio.Event()
    answers: list[tuple[int, int] | None] = []
    async with reading(stream) as (backlog, _), trio.open_nursery() as nursery:

        async def ask(scope: trio.CancelScope) -> None:
            with scope:
                answers.append(await backlog.bounds())

        scopes = [trio.CancelScope() for _ in range(5)]
        nursery.start_soon(ask, scopes[0])
        await trio.testing.wait_all_tasks_blocked()
        for scope in scopes[1:]:
            nursery.start_soon(ask, scope)
        await trio.testing.wait_all_tasks_blocked()
        scopes[0].cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert stream.infos == 2
        stream.gate.set()
        await trio.testing.wait_all_tasks_blocked()
        assert answers == [(1, 10)] * 4


async def test_pages_are_kept_within_bounds_and_the_least_wanted_go_first(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = FakeStream(range(1, 5001))
    async with reading(stream) as (backlog, _):
        await backlog.read(0)
        monkeypatch.setattr(backlog_module, "CACHE_BYTES", 3 * backlog._bytes + 10_000)
        for start in (500, 1000, 0, 1500, 0):
            await backlog.read(start)
        assert [start for start, _ in backlog._pages] == [1000, 1500, 0]
        assert backlog._bytes <= backlog_module.CACHE_BYTES
        assert backlog._bytes == sum(kept.size for kept in backlog._pages.values())


async def test_reading_backwards_comes_by_everything_once(autojump_clock: trio.testing.MockClock) -> None:
    for numbers in (range(1, 2101), range(700, 2101), [1, 2, 9000, 9001, 60_000], [5]):
        async with reading(FakeStream(numbers)) as (backlog, _):
            before, heard = max(numbers) + 1, []
            while before > min(numbers):
                frames, before = await backlog.read_before(before)
                heard += [frame.sequence for frame in reversed(frames)]
            assert heard == sorted(numbers, reverse=True)
            assert await backlog.read_before(before) == ([], before)


# -- a real one --------------------------------------------------------------------------------------------------------


async def test_two_hundred_clients_read_five_thousand_events_with_a_dozen_reads(nats: NatsServer) -> None:
    async with operator(nats) as others:
        await others.create_stream()
        await others.share(*range(1, 5001))
        async with running(nats, history=10) as (feed, _):
            await live(feed)
            results: list[list[int]] = []

            async def client(after: int) -> None:
                results.append(await everything(feed.backlog, after, 5000))

            async with trio.open_nursery() as nursery:
                for number in range(200):
                    nursery.start_soon(client, number)
            assert sorted(results) == sorted(list(range(number + 1, 5001)) for number in range(200))
            assert feed.counters.stream_reads <= 12


async def test_a_reader_goes_on_over_the_death_of_the_server(nats: NatsServer) -> None:
    async with operator(nats) as others:
        await others.create_stream()
        await others.share(*range(1, 3001))
        async with running(nats, history=10) as (feed, _):
            await live(feed)
            heard: list[int] = []

            async def client() -> None:
                position = 0
                while position < 3000:
                    page = await feed.read(position)
                    heard.extend(number_of(frame.discovery) for frame in page.frames if frame.discovery is not None)
                    position = page.last
                    if position == 1000:
                        nats.kill()
                    await trio.sleep(0.01)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(client)
                await down(feed, "unreachable")
                assert await feed.bounds() is None
                await nats.start()
            assert heard == list(range(1, 3001))


async def test_a_reader_that_retention_overtakes_can_tell_each_hole(nats: NatsServer) -> None:
    total = 20_000
    async with operator(nats) as others:
        await others.create_stream(max_msgs=700)
        async with running(nats, history=10) as (feed, _):
            await live(feed)
            heard: list[int] = []
            told: list[tuple[int, int]] = []

            async def client() -> None:
                position = 0
                while position < total:
                    page = await feed.read(position)
                    bounds = await feed.bounds()
                    following = [frame.sequence for frame in page.frames if frame.sequence > position]
                    upto = following[0] if following else page.last + 1
                    if upto > position + 1:
                        assert bounds is not None
                        if bounds[0] > position + 1:
                            told.append((position, upto))
                    heard.extend(following)
                    position = page.last

            async with trio.open_nursery() as nursery:
                nursery.start_soon(client)
                message = ("discoveries.x", payload(1))
                for _ in range(10):
                    await nats.publish(*[message] * (total // 10))
            holes = [(one, two) for one, two in pairwise([0, *heard, total + 1]) if two > one + 1]
            assert holes
            assert [hole for hole in holes if hole not in told] == []


async def test_large_discoveries_deleted_ones_and_other_subjects_are_read_exactly(nats: NatsServer) -> None:
    async with operator(nats) as others:
        await others.create_stream(subjects=["discoveries.>", "orders.*"])
        expected = []
        for number in range(1, 201):
            if number % 5 == 0:
                await others.store("orders.1", b"")
            elif number % 7 == 0:
                await others.store("discoveries.x", b"not a discovery")
            else:
                expected.append(await others.store("discoveries.x", payload(number, extra="x" * 60_000)))
        await others.api("STREAM.MSG.DELETE.DISCOVERIES", {"seq": expected.pop(10)})
        with structlog.testing.capture_logs():
            async with running(nats, history=0) as (feed, recorder):
                await live(feed)
                assert await everything(feed.backlog, 0, 200) == expected
                assert recorder.head == 200
                for sequence in range(198, 202):
                    frame = await feed.backlog.get(sequence)
                    assert (frame is not None) == (sequence in expected)


@pytest.mark.parametrize("direct", [True, False])
async def test_the_first_event_at_a_time_is_found(nats: NatsServer, direct: bool) -> None:
    async with operator(nats) as others:
        await others.create_stream(subjects=["discoveries.>", "orders.*"], allow_direct=direct)
        times = []
        for number in range(1, 8):
            await others.store("orders.1", b"")
            times.append(datetime.now(UTC))
            await others.store("discoveries.x", payload(number))
            await trio.sleep(0.002)  # the moments must differ
        async with running(nats, history=0) as (feed, _):
            await live(feed)
            for number, moment in enumerate(times, 1):
                assert await feed.backlog.first_at(moment) == 2 * number
            assert await feed.backlog.first_at(times[0] - timedelta(days=1)) == 2
            assert await feed.backlog.first_at(datetime.now(UTC)) is None
            assert sequences(await feed.read(0)) == [2, 4, 6, 8, 10, 12, 14]
            assert [frame.sequence for frame in (await feed.backlog.read_before(9))[0]] == [2, 4, 6, 8]


async def test_a_server_that_knows_no_batches_is_read_message_by_message(
    nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jetstream, "_version", lambda _: (2, 10, 29))
    async with operator(nats) as others:
        await others.create_stream()
        await others.share(*range(1, 701))
        async with running(nats, history=0) as (feed, _):
            await live(feed)
            assert await everything(feed.backlog, 0, 700) == list(range(1, 701))


async def test_direct_reading_that_is_forbidden_is_done_without(tmp_path: Path) -> None:
    config = tmp_path / "nats.conf"
    config.write_text(
        'authorization: { users: [ {user: a, password: b, permissions: { publish: { deny: ["$JS.API.DIRECT.>"] } } },'
        " {user: admin, password: b} ] }"
    )
    async with nats_server(tmp_path / "nats", options=("-c", str(config))) as server:
        place = f"127.0.0.1:{server.port}"
        async with running(f"nats://a:b@{place}", history=0) as (feed, recorder):
            await live(feed)
            await server_publish(f"nats://admin:b@{place}", 20)
            await recorder.hears(20)
            with structlog.testing.capture_logs() as lines:
                assert await everything(feed.backlog, 0, 20) == list(range(1, 21))
            assert [line["event"] for line in lines] == ["stream cannot be read directly"]


async def server_publish(url: str, count: int) -> None:
    async with open_connection(url) as connection:
        for number in range(1, count + 1):
            await connection.request("discoveries.x", payload(number))


async def test_an_answer_with_a_hole_is_not_taken(nats: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async with operator(nats) as others:
        await others.create_stream()
        await others.share(*range(1, 11))
        stream = JetStream(others.connection, "DISCOVERIES", "discoveries.>")
        assert [message.sequence for message in (await stream.read(1, 100))[0]] == list(range(1, 11))
        original = NatsConnection.request_many

        async def loses_one(self: NatsConnection, *args: Any, **options: Any) -> list[Message]:
            answers = await original(self, *args, **options)
            del answers[4]
            return answers

        monkeypatch.setattr(NatsConnection, "request_many", loses_one)
        with pytest.raises(NatsError, match="hole"):
            await stream.read(1, 100)
