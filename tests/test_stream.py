"""One SSE response from head to goodbye, under the mock clock and without a socket.

Each test publishes into a real broadcaster and watches what the peer of a `MemoryConnection` can read.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
from memory_connection import LentConnection, MemoryConnection
from test_broadcaster import event, live_broadcaster, publish
from trio.testing import MockClock, wait_all_tasks_blocked

from sse_trio import audience
from sse_trio.access import AtCapacity
from sse_trio.audience import Filter
from sse_trio.broadcaster import Broadcaster
from sse_trio.history import Frame
from sse_trio.settings import Settings
from sse_trio.stream import EventStream


@asynccontextmanager
async def streaming(
    broadcaster: Broadcaster, connection: MemoryConnection, **options: Any
) -> AsyncIterator[trio.CancelScope]:
    """The stream runs while the block does, and leaves nothing behind."""
    stream = EventStream(broadcaster, broadcaster.settings, agent_id="a", **options)
    before = len(broadcaster.clients)
    with trio.fail_after(10_000):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.respond, connection)
            await wait_all_tasks_blocked()
            yield nursery.cancel_scope
            nursery.cancel_scope.cancel()
    assert len(broadcaster.clients) == before


def ids(connection: MemoryConnection, name: str = "discovery") -> list[str]:
    return [event.id for event in connection.events if event.event == name]


def names(connection: MemoryConnection) -> list[str]:
    return [event.event for event in connection.events]


@pytest.fixture(params=["write-first", "in-a-row", "through-the-channel"])
def connection(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryConnection]:
    """With write-first, alone and in a row, and without: the same frames."""
    connection = LentConnection() if request.param == "in-a-row" else MemoryConnection()
    connection.direct = request.param != "through-the-channel"
    monkeypatch.setattr(audience, "CROWD", 1 if request.param == "in-a-row" else 10_000)
    yield connection
    connection.release()


async def test_the_head_and_connected_come_at_once(connection: MemoryConnection, autojump_clock: MockClock) -> None:
    broadcaster = live_broadcaster()
    publish(broadcaster, 1, 2)
    async with streaming(broadcaster, connection):
        assert connection.status == 200
        assert connection.head[b"content-type"] == b"text/event-stream"
        assert connection.head[b"cache-control"] == b"no-cache, no-transform"
        assert connection.head[b"x-accel-buffering"] == b"no"
        (connected,) = connection.events
        (client,) = broadcaster.clients.values()
        assert json.loads(connected.data) == {"agent_id": "a", "client_id": client.id}
        assert connected.id == "e-2"


async def test_what_is_published_is_heard_in_order(connection: MemoryConnection, autojump_clock: MockClock) -> None:
    broadcaster = live_broadcaster()
    async with streaming(broadcaster, connection):
        publish(broadcaster, 1)
        await wait_all_tasks_blocked()
        publish(broadcaster, 2, 3)
        await wait_all_tasks_blocked()
        assert ids(connection) == ["e-1", "e-2", "e-3"]


async def test_silence_is_filled_with_a_comment_and_one_line_feed(
    connection: MemoryConnection, autojump_clock: MockClock
) -> None:
    broadcaster = live_broadcaster(keepalive_interval=30)
    async with streaming(broadcaster, connection):
        await trio.sleep(29)
        assert not connection.in_flight.endswith(b"keep-alive\n")
        await trio.sleep(2)
        assert connection.in_flight.endswith(b"\n\n: keep-alive\n")
        await trio.sleep(30)
        assert connection.in_flight.count(b": keep-alive\n") == 2


async def test_traffic_puts_the_keep_alive_off(connection: MemoryConnection, autojump_clock: MockClock) -> None:
    broadcaster = live_broadcaster(keepalive_interval=30)
    async with streaming(broadcaster, connection):
        for number in range(1, 11):
            await trio.sleep(20)
            publish(broadcaster, number)
        assert b"keep-alive" not in connection.in_flight
        await trio.sleep(31)
        assert connection.in_flight.count(b"keep-alive") == 1


async def test_a_client_whose_filter_skipped_events_gets_its_cursor_moved_on(
    connection: MemoryConnection, autojump_clock: MockClock
) -> None:
    broadcaster = live_broadcaster(keepalive_interval=30)
    async with streaming(broadcaster, connection, filter=Filter(agents=frozenset({"nobody"}))):
        publish(broadcaster, 1, 2)
        await trio.sleep(31)
        assert connection.in_flight.endswith(b"event: cursor\ndata: {}\nid: e-2\n\n")
        await trio.sleep(30)
        assert connection.in_flight.endswith(b": keep-alive\n")


async def test_a_slow_reader_gets_every_event_once_and_the_others_do_not_wait(
    connection: MemoryConnection, autojump_clock: MockClock
) -> None:
    broadcaster = live_broadcaster(buffer=4, write_timeout=1000)
    slow = connection
    slow.window, slow.timeout = 1000, 1000
    fast = MemoryConnection()
    async with streaming(broadcaster, slow), streaming(broadcaster, fast):
        for number in range(1, 101):
            publish(broadcaster, number)
            await wait_all_tasks_blocked()
        assert ids(fast) == [f"e-{n}" for n in range(1, 101)]
        while len(ids(slow)) < 100:
            slow.read(177)
            await wait_all_tasks_blocked()
        assert ids(slow) == [f"e-{n}" for n in range(1, 101)]
        assert "gap" not in names(slow)


async def test_what_history_lost_is_a_gap_at_its_place_with_the_exact_number(
    connection: MemoryConnection, autojump_clock: MockClock
) -> None:
    broadcaster = live_broadcaster(buffer=4, history=10)
    connection.window, connection.timeout = 600, 1000
    async with streaming(broadcaster, connection):
        for number in range(1, 101):
            publish(broadcaster, number)
            await wait_all_tasks_blocked()
        while "e-100" not in ids(connection):
            connection.read(500)
            await wait_all_tasks_blocked()
        heard = ids(connection)
        (gap,) = [e for e in connection.events if e.event == "gap"]
        missed = json.loads(gap.data)
        assert missed["reason"] == "overflow"
        assert missed["missed"] + len(heard) == 100
        place = names(connection).index("gap")
        assert connection.events[place + 1].id == f"e-{int(gap.id[2:]) + 1}"


@pytest.mark.parametrize("overflow", ["drop-oldest", "drop-newest"])
async def test_without_history_received_and_missed_add_up(
    connection: MemoryConnection, overflow: Any, autojump_clock: MockClock
) -> None:
    broadcaster = live_broadcaster(buffer=4, history=0, overflow=overflow)
    connection.window, connection.timeout = 600, 1000
    async with streaming(broadcaster, connection):
        for number in range(1, 101):
            publish(broadcaster, number)
            await wait_all_tasks_blocked()
            if number % 30 == 0:
                while connection.read():
                    await wait_all_tasks_blocked()
        while connection.read():
            await wait_all_tasks_blocked()
        publish(broadcaster, 101)
        await wait_all_tasks_blocked()
        told = [e for e in connection.events if e.event != "connected"]
        missed = sum(json.loads(e.data)["missed"] for e in told if e.event == "gap")
        assert missed > 0
        assert missed + len(ids(connection)) == 101
        numbers = [int(e.id[2:]) for e in told]
        assert numbers == sorted(set(numbers)), "gaps stand where the events are missing"


async def test_a_full_client_is_shown_the_door_by_policy(
    connection: MemoryConnection, autojump_clock: MockClock
) -> None:
    broadcaster = live_broadcaster(buffer=4, history=0, overflow="disconnect")
    connection.window, connection.timeout = 600, 1000
    async with streaming(broadcaster, connection):
        for number in range(1, 101):
            publish(broadcaster, number)
            await wait_all_tasks_blocked()
        while connection.read():
            await wait_all_tasks_blocked()
        assert connection.events[-1].data == '{"reason":"overflow"}'
        assert connection.ended
    assert broadcaster.disconnects["overflow"] == 1


async def test_a_reader_that_takes_nothing_is_gone_after_the_write_timeout(
    connection: MemoryConnection, autojump_clock: MockClock
) -> None:
    broadcaster = live_broadcaster()
    connection.window, connection.timeout = 600, 10
    async with streaming(broadcaster, connection):
        publish(broadcaster, *range(1, 9))
        await trio.sleep(9.5)
        assert broadcaster.clients
        await trio.sleep(1)
        assert not broadcaster.clients
    assert broadcaster.disconnects == {"stalled": 1}


async def test_a_reader_that_hangs_up_is_gone_with_the_next_event(
    connection: MemoryConnection, autojump_clock: MockClock
) -> None:
    broadcaster = live_broadcaster()
    async with streaming(broadcaster, connection):
        connection.hang_up()
        publish(broadcaster, 1)
        await wait_all_tasks_blocked()
        assert not broadcaster.clients
    assert broadcaster.disconnects == {"broken": 1}


async def test_one_that_spoke_early_is_closed_at_the_next_keep_alive(
    connection: MemoryConnection, autojump_clock: MockClock
) -> None:
    broadcaster = live_broadcaster(keepalive_interval=30)
    async with streaming(broadcaster, connection):
        connection.spoke = True
        await trio.sleep(31)
        assert not broadcaster.clients


async def test_draining_says_goodbye_after_what_is_queued(
    connection: MemoryConnection, autojump_clock: MockClock
) -> None:
    broadcaster = live_broadcaster(drain_window=5)
    async with streaming(broadcaster, connection):
        publish(broadcaster, 1)
        broadcaster.drain("shutdown")
        await wait_all_tasks_blocked()
        assert names(connection) == ["connected", "discovery", "goodbye"]
        assert connection.events[-1].data == '{"reason":"shutdown"}'
        retry = int(connection.in_flight.rpartition(b"retry: ")[2].split(b"\n")[0])
        assert 1000 <= retry <= 6000
        assert connection.ended


async def test_a_lifetime_ends_between_four_fifths_and_the_whole_of_it(
    connection: MemoryConnection, autojump_clock: MockClock
) -> None:
    broadcaster = live_broadcaster(max_lifetime=100, keepalive_interval=1000)
    async with streaming(broadcaster, connection):
        await trio.sleep(79)
        assert not connection.ended
        await trio.sleep(22)
        assert connection.events[-1].data == '{"reason":"lifetime"}'
        assert connection.ended


async def test_a_stream_ends_when_its_token_does(connection: MemoryConnection, autojump_clock: MockClock) -> None:
    broadcaster = live_broadcaster(keepalive_interval=1000)
    async with streaming(broadcaster, connection, expires_in=50.0):
        await trio.sleep(51)
        assert connection.events[-1].data == '{"reason":"expired"}'
        assert connection.ended


async def test_a_lifetime_ends_a_busy_stream_too(connection: MemoryConnection, autojump_clock: MockClock) -> None:
    broadcaster = live_broadcaster(max_lifetime=100)
    async with streaming(broadcaster, connection):
        for number in range(1, 120):
            publish(broadcaster, number)
            await trio.sleep(1)
        assert connection.ended


async def test_a_stream_whose_reader_never_catches_up_ends_when_its_token_does(
    connection: MemoryConnection, autojump_clock: MockClock
) -> None:
    broadcaster = live_broadcaster(history=0, buffer=50)
    async with streaming(broadcaster, connection, expires_in=50.0):
        connection.window = 3000
        for number in range(1, 1001):  # 2 KB a second, of which it reads a half
            publish(broadcaster, number)
            connection.read(100)
            await trio.sleep(0.1)
        connection.window = float("inf")
        connection.read()
        await wait_all_tasks_blocked()
        assert connection.events[-1].data == '{"reason":"expired"}'
        assert int(ids(connection)[-1].removeprefix("e-")) <= 500
        assert connection.ended


@pytest.mark.parametrize("wants_events", [True, False])
async def test_at_capacity_a_native_eventsource_is_told_when_to_come_back(
    connection: MemoryConnection, wants_events: bool, autojump_clock: MockClock
) -> None:
    class Full(AbstractContextManager[None]):
        def __enter__(self) -> None:
            raise AtCapacity("process", "full", 30)

        def __exit__(self, *_: object) -> None:
            raise AssertionError("what was not entered is not left")

    broadcaster = live_broadcaster()
    async with streaming(broadcaster, connection, admit=Full, wants_events=wants_events):
        assert connection.ended
        if wants_events:
            assert connection.status == 200
            assert connection.events[-1].data == '{"reason":"capacity"}'
            assert 30_000 <= int(connection.in_flight.split(b"\n")[0].split()[1]) <= 60_000
        else:
            assert connection.status == 503
            assert connection.head[b"retry-after"] == b"30"
            assert connection.head[b"content-type"] == b"application/problem+json"
            assert json.loads(connection.in_flight)["status"] == 503


# -- resuming ----------------------------------------------------------------------------------------------------------


async def test_a_cursor_in_memory_is_resumed_without_a_seam(
    connection: MemoryConnection, autojump_clock: MockClock
) -> None:
    broadcaster = live_broadcaster()
    publish(broadcaster, *range(1, 11))
    async with streaming(broadcaster, connection, cursor="e-4"):
        publish(broadcaster, 11)
        await wait_all_tasks_blocked()
        connected = connection.events[0]
        assert list(json.loads(connected.data).items())[-1] == ("resumed", True)
        assert connected.id == "e-4"
        assert ids(connection) == [f"e-{n}" for n in range(5, 12)]


@pytest.mark.parametrize(
    ("cursor", "reason", "connected_id", "gap_id", "heard"),
    [
        ("e-2", "expired", "e-2", "e-5", ["e-6", "e-7", "e-8", "e-9", "e-10"]),
        ("old-7", "restart", "e-10", "e-10", []),
        ("<script>", "restart", "e-10", "e-10", []),
        ("e-11", "restart", "e-10", "e-10", []),
    ],
)
async def test_a_cursor_that_cannot_be_resumed_is_a_gap(
    connection: MemoryConnection,
    cursor: str,
    reason: str,
    connected_id: str,
    gap_id: str,
    heard: list[str],
    autojump_clock: MockClock,
) -> None:
    broadcaster = live_broadcaster(history=5)
    publish(broadcaster, *range(1, 11))
    async with streaming(broadcaster, connection, cursor=cursor):
        connected, gap, *_ = connection.events
        assert json.loads(connected.data)["resumed"] is False
        assert connected.id == connected_id
        assert (gap.event, json.loads(gap.data), gap.id) == ("gap", {"reason": reason, "missed": None}, gap_id)
        publish(broadcaster, 11)
        await wait_all_tasks_blocked()
        assert ids(connection) == [*heard, "e-11"]


async def test_before_the_feed_is_live_there_is_no_id_and_nothing_is_known_of_a_cursor(
    connection: MemoryConnection, autojump_clock: MockClock
) -> None:
    broadcaster = Broadcaster(Settings())
    async with streaming(broadcaster, connection, cursor="e-1"):
        assert b"id:" not in connection.in_flight
        assert json.loads(connection.events[0].data)["resumed"] is None
        broadcaster.open_epoch("e", 0)
        publish(broadcaster, 1, 2, 3)
        broadcaster.go_live()
        await wait_all_tasks_blocked()
        assert ids(connection) == ["e-2", "e-3"]
        publish(broadcaster, 4)
        await wait_all_tasks_blocked()
        assert ids(connection)[-1] == "e-4"


async def test_a_client_from_before_the_feed_was_live_soon_has_an_id_to_come_back_with(
    connection: MemoryConnection, autojump_clock: MockClock
) -> None:
    broadcaster = Broadcaster(Settings(keepalive_interval=30))
    async with streaming(broadcaster, connection):
        broadcaster.open_epoch("e", 7)
        broadcaster.go_live()
        await trio.sleep(31)
        assert connection.in_flight.endswith(b"event: cursor\ndata: {}\nid: e-7\n\n")


async def test_a_new_incarnation_is_a_gap_and_then_its_events(
    connection: MemoryConnection, autojump_clock: MockClock
) -> None:
    broadcaster = live_broadcaster()
    async with streaming(broadcaster, connection):
        publish(broadcaster, 1)
        broadcaster.open_epoch("f", 0)
        publish(broadcaster, 1, 2)
        await wait_all_tasks_blocked()
        told = [(e.event, e.id) for e in connection.events[1:]]
        assert told == [("discovery", "e-1"), ("gap", "f-0"), ("discovery", "f-1"), ("discovery", "f-2")]


async def test_an_incarnation_that_comes_while_the_gap_of_another_is_written_is_told_too(
    connection: MemoryConnection, autojump_clock: MockClock
) -> None:
    broadcaster = live_broadcaster()
    async with streaming(broadcaster, connection):
        connection.window = 0
        broadcaster.open_epoch("f", 5)
        await wait_all_tasks_blocked()
        broadcaster.open_epoch("g", 7)
        connection.window = float("inf")
        connection.read()
        await wait_all_tasks_blocked()
        publish(broadcaster, 8)
        await wait_all_tasks_blocked()
        told = [(e.event, e.id) for e in connection.events[1:]]
        assert told == [("gap", "f-5"), ("gap", "g-7"), ("discovery", "g-8")]


# -- the stream behind memory ------------------------------------------------------------------------------------------


@dataclass
class ScriptedPage:
    frames: list[Frame]
    last: int


@dataclass
class ScriptedBacklog:
    """A stream of the sequences up to `last`, of which those below `first` are gone."""

    first: int = 1
    last: int = 0
    answers: bool = True
    reads: int = 0
    slow: float = 0.0
    page: int = 7
    opened: trio.Event = field(default_factory=trio.Event)

    async def bounds(self) -> tuple[int, int] | None:
        await trio.lowlevel.checkpoint()
        return (self.first, self.last) if self.answers else None

    async def read(self, after: int) -> ScriptedPage:
        await trio.sleep(self.slow)
        self.reads += 1
        sequences = range(max(after + 1, self.first), self.last + 1)[: self.page]
        frames = [Frame.of("e", *event(n)) for n in sequences]
        return ScriptedPage(frames, sequences[-1] if sequences else max(after, self.last))


def durable_broadcaster(**settings: Any) -> Broadcaster:
    broadcaster = Broadcaster(Settings(**settings))
    broadcaster.open_epoch("e", 0, durable=True)
    broadcaster.go_live()
    return broadcaster


async def test_a_cursor_behind_memory_reads_on_from_the_stream_without_a_seam(
    connection: MemoryConnection, autojump_clock: MockClock
) -> None:
    broadcaster = durable_broadcaster(buffer=5, history=5)
    publish(broadcaster, *range(1, 101))
    backlog = ScriptedBacklog(last=100)
    async with streaming(broadcaster, connection, cursor="e-10", backlog=backlog):
        for number in range(101, 111):
            backlog.last = number
            publish(broadcaster, number)
            await wait_all_tasks_blocked()
        assert json.loads(connection.events[0].data)["resumed"] is True
        assert ids(connection) == [f"e-{n}" for n in range(11, 111)]


async def test_what_retention_has_taken_is_a_gap_and_then_the_first_retained(
    connection: MemoryConnection, autojump_clock: MockClock
) -> None:
    broadcaster = durable_broadcaster(buffer=5, history=5)
    publish(broadcaster, *range(1, 101))
    async with streaming(broadcaster, connection, cursor="e-10", backlog=ScriptedBacklog(first=51, last=100)):
        connected, gap, *_ = connection.events
        assert (json.loads(connected.data)["resumed"], connected.id) == (False, "e-10")
        assert (gap.data, gap.id) == ('{"reason":"expired","missed":null}', "e-50")
        assert ids(connection) == [f"e-{n}" for n in range(51, 101)]


async def test_keep_alives_go_on_while_the_stream_is_asked(
    connection: MemoryConnection, autojump_clock: MockClock
) -> None:
    broadcaster = durable_broadcaster(buffer=5, history=5, keepalive_interval=10)
    publish(broadcaster, *range(1, 101))
    backlog = ScriptedBacklog(last=100, slow=9.0)
    async with streaming(broadcaster, connection, cursor="e-60", backlog=backlog):
        backlog.slow = 1e6
        await trio.sleep(60)
        assert connection.in_flight.count(b": keep-alive\n") >= 4
        backlog.slow = 1.0
        await trio.sleep(60)
        assert ids(connection) == [f"e-{n}" for n in range(61, 101)]


@pytest.mark.parametrize("how", ["shutdown", "kicked", "expired"])
async def test_who_waits_for_the_stream_while_nats_is_away_is_told_of_the_end(
    connection: MemoryConnection, autojump_clock: MockClock, how: str
) -> None:
    broadcaster = durable_broadcaster(buffer=5, history=5)
    publish(broadcaster, *range(1, 101))
    backlog = ScriptedBacklog(last=100, slow=1e6)
    async with streaming(broadcaster, connection, cursor="e-60", backlog=backlog, expires_in=50.0):
        if how == "shutdown":
            broadcaster.drain("shutdown")
        elif how == "kicked":
            (client,) = broadcaster.clients.values()
            client.end("kicked")
        else:
            await trio.sleep(50)
        await wait_all_tasks_blocked()
        assert connection.events[-1].data == f'{{"reason":"{how}"}}'
        assert connection.ended


async def test_who_waits_for_the_stream_hears_of_its_new_incarnation_at_once(
    connection: MemoryConnection, autojump_clock: MockClock
) -> None:
    broadcaster = durable_broadcaster(buffer=5, history=5)
    publish(broadcaster, *range(1, 101))
    async with streaming(broadcaster, connection, cursor="e-60", backlog=ScriptedBacklog(last=100, slow=1e6)):
        broadcaster.open_epoch("f", 3, durable=True)
        publish(broadcaster, 4)
        await wait_all_tasks_blocked()
        assert [(e.event, e.id) for e in connection.events[1:]] == [("gap", "f-3"), ("discovery", "f-4")]


@pytest.mark.parametrize("interval", [30.0, 0.5])
async def test_a_cursor_is_settled_however_often_the_client_is_kept_alive(
    connection: MemoryConnection, autojump_clock: MockClock, interval: float
) -> None:
    broadcaster = durable_broadcaster(buffer=5, history=5, keepalive_interval=interval)
    publish(broadcaster, *range(1, 101))
    backlog = ScriptedBacklog(last=100, answers=False)
    async with streaming(broadcaster, connection, cursor="e-103", backlog=backlog):
        backlog.answers = True
        await trio.sleep(3)
        assert [(e.event, e.id) for e in connection.events[1:]] == [("gap", "e-100")]


async def test_a_cursor_beyond_an_old_answer_is_no_restart(
    connection: MemoryConnection, autojump_clock: MockClock
) -> None:
    """A server that was frozen reads what NATS said before; another instance has served the client further since."""
    broadcaster = durable_broadcaster(buffer=5, history=5)
    publish(broadcaster, *range(1, 101))
    backlog = ScriptedBacklog(last=100)
    async with streaming(broadcaster, connection, cursor="e-103", backlog=backlog):
        backlog.last = 105
        await trio.sleep(2)
        assert json.loads(connection.events[0].data)["resumed"] is True
        publish(broadcaster, *range(101, 106))
        await wait_all_tasks_blocked()
        assert ids(connection) == ["e-104", "e-105"]


async def test_a_cursor_beyond_the_stream_is_a_restart(connection: MemoryConnection, autojump_clock: MockClock) -> None:
    broadcaster = durable_broadcaster(buffer=5, history=5)
    publish(broadcaster, *range(1, 101))
    async with streaming(broadcaster, connection, cursor="e-103", backlog=ScriptedBacklog(last=100)):
        await trio.sleep(2)
        connected, gap = connection.events
        assert (json.loads(connected.data)["resumed"], connected.id) == (False, "e-100")
        assert (gap.data, gap.id) == ('{"reason":"restart","missed":null}', "e-100")


async def test_a_cursor_is_placed_when_the_stream_can_be_asked_again(
    connection: MemoryConnection, autojump_clock: MockClock
) -> None:
    broadcaster = durable_broadcaster(buffer=5, history=5)
    publish(broadcaster, *range(1, 101))
    backlog = ScriptedBacklog(last=100, answers=False)
    async with streaming(broadcaster, connection, cursor="e-90", backlog=backlog):
        assert json.loads(connection.events[0].data)["resumed"] is None
        assert ids(connection) == []
        backlog.answers = True
        await trio.sleep(2)
        assert ids(connection) == [f"e-{n}" for n in range(91, 101)]


async def test_an_incarnation_that_comes_while_an_expired_gap_is_written_is_read_from_its_beginning(
    connection: MemoryConnection, autojump_clock: MockClock
) -> None:
    broadcaster = durable_broadcaster(buffer=5, history=5)
    publish(broadcaster, *range(1, 101))
    backlog = ScriptedBacklog(last=100, slow=1.0)
    async with streaming(broadcaster, connection, cursor="e-60", backlog=backlog):
        connection.window, backlog.first = 0, 81
        await trio.sleep(2)
        broadcaster.open_epoch("f", 3, durable=True)
        connection.window = float("inf")
        connection.read()
        await wait_all_tasks_blocked()
        publish(broadcaster, 4, 5)
        await wait_all_tasks_blocked()
        told = [(e.event, e.id) for e in connection.events[1:]]
        assert told == [("gap", "e-80"), ("gap", "f-3"), ("discovery", "f-4"), ("discovery", "f-5")]


@pytest.mark.parametrize(
    ("cursor", "told"),
    [
        ("e-90", [("gap", "f-3"), ("discovery", "f-4")]),
        ("f-2", [("discovery", "f-3"), ("discovery", "f-4")]),
    ],
    ids=["of the one before", "of this one"],
)
async def test_what_a_cursor_is_worth_in_a_new_incarnation_is_told_once(
    connection: MemoryConnection, autojump_clock: MockClock, cursor: str, told: list[tuple[str, str]]
) -> None:
    broadcaster = Broadcaster(Settings(buffer=5, history=5))
    broadcaster.open_epoch("e", 0, durable=True)
    async with streaming(broadcaster, connection, cursor=cursor, backlog=ScriptedBacklog(answers=False)):
        broadcaster.go_live()
        publish(broadcaster, *range(1, 101))
        if cursor.startswith("e"):
            await wait_all_tasks_blocked()  # it waits for the stream's answer
        broadcaster.open_epoch("f", 1, durable=True)
        publish(broadcaster, 2, 3)
        await trio.sleep(2)
        publish(broadcaster, 4)
        await wait_all_tasks_blocked()
        assert [(e.event, e.id) for e in connection.events[1:]] == told
