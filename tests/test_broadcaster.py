"""Who is listening, and what each of them is offered: the hub without a socket.

The client's task is played by the test: it takes what was queued. A `Socket` stands for the connection of a parked
client; that the real one keeps the same promises is shown in test_connection.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import trio
from support import payload
from trio.testing import assert_no_checkpoints

from sse_trio.audience import Audience, Books, Filter
from sse_trio.broadcaster import SLICE, Broadcaster, Event
from sse_trio.client import Client
from sse_trio.discovery import decode
from sse_trio.history import Batch, Frame
from sse_trio.rounds import FeedCounters, Rounds
from sse_trio.settings import Settings
from sse_trio.sse import Decoder, ServerSentEvent


def event(sequence: int, subject: str = "discoveries.insights", **changes: Any) -> Event:
    return sequence, subject, decode(payload(sequence, **changes))


def events(*sequences: int) -> list[Event]:
    return [event(sequence) for sequence in sequences]


def live_broadcaster(**settings: Any) -> Broadcaster:
    broadcaster = Broadcaster(Settings(**settings))
    broadcaster.open_epoch("e", 0)
    broadcaster.go_live()
    return broadcaster


def publish(broadcaster: Broadcaster, *sequences: int) -> None:
    broadcaster.publish(events(*sequences))
    while broadcaster.deliver():
        pass


def heard(client: Client) -> list[ServerSentEvent]:
    return Decoder().feed(client.take()[0])


def is_live(client: Client) -> bool:
    return client.live


def ids(client: Client) -> list[str]:
    return [event.id for event in heard(client)]


def gaps(client: Client) -> list[tuple[str, str]]:
    return [(event.data, event.id) for event in heard(client) if event.event == "gap"]


def check_books(broadcaster: Broadcaster) -> Books:
    """The books of all streams, once they balance: each by itself, and all together."""
    for books in [*(client.books() for client in broadcaster.clients.values()), broadcaster.books()]:
        assert books.offered == sum(books[1:]), f"{books} does not balance"
        assert min(books) >= 0, f"{books} has less than nothing"
    return broadcaster.books()


class Socket:
    """A parked client's connection: takes `room` batches, cuts the next one, or is broken. It has nothing to lend."""

    timeout = 10.0
    spoke_early = False

    def __init__(self, room: int = 1000, *, cuts: bool = False, broken: bool = False) -> None:
        self.room = room
        self.cuts = cuts
        self.broken = broken
        self.has_rest = False
        self.written: list[Batch] = []

    def write_now(self, batch: Batch) -> bool:
        if self.broken:
            raise trio.BrokenResourceError
        if len(self.written) == self.room:
            if not self.cuts:
                return False
            self.has_rest = True
        self.written.append(batch)
        return True

    def lend(self, closing: Callable[[], None]) -> int | None:
        return None

    def reclaim(self) -> None: ...

    def framed(self, batch: Batch) -> bytes:
        return batch.payload

    def wrote(self, size: int) -> None: ...

    def wrote_part(self, batch: Batch, size: int) -> None: ...

    def look(self) -> None: ...

    def unwatch(self) -> None: ...


async def test_a_client_is_in_the_registry_exactly_while_the_block_runs() -> None:
    broadcaster = live_broadcaster()
    with broadcaster.subscribe("a") as client:
        assert list(broadcaster.clients.values()) == [client]
    assert not broadcaster.clients
    assert not broadcaster._audiences
    assert client.receive_channel.statistics().open_send_channels == 0


async def test_publishing_never_waits_however_full_the_clients_are() -> None:
    broadcaster = live_broadcaster(buffer=2)
    with broadcaster.subscribe("a"), broadcaster.subscribe("b"), assert_no_checkpoints():
        publish(broadcaster, *range(1, 50))


async def test_everybody_hears_everything_once_and_in_order() -> None:
    broadcaster = live_broadcaster()
    with broadcaster.subscribe("a") as a, broadcaster.subscribe("b") as b:
        publish(broadcaster, 1, 2)
        publish(broadcaster, 5)
        assert ids(a) == ids(b) == ["e-1", "e-2", "e-5"]


async def test_clients_with_equal_filters_share_the_same_bytes() -> None:
    broadcaster = live_broadcaster()
    first, second = Socket(), Socket()
    async with trio.open_nursery() as nursery:
        with broadcaster.subscribe("a", Filter()) as a, broadcaster.subscribe("b", Filter()) as b:
            a.writer, b.writer = first, second
            nursery.start_soon(a.wait)
            nursery.start_soon(b.wait)
            await trio.testing.wait_all_tasks_blocked()
            publish(broadcaster, 1, 2)
            assert first.written[0].payload is second.written[0].payload
            nursery.cancel_scope.cancel()


async def test_a_filter_lets_through_what_it_names() -> None:
    broadcaster = live_broadcaster()
    strict = Filter(types=frozenset({"Question"}), min_confidence=0.5, subjects=("discoveries.*",))
    with broadcaster.subscribe("a", strict) as client:
        broadcaster.publish(
            [
                event(1, "discoveries.questions", discovery_type="question", confidence=0.5),
                event(2, "discoveries.questions", discovery_type="Question", confidence=0.4),
                event(3, "discoveries.a.b", discovery_type="Question", confidence=0.9),
                event(4, "discoveries.insights", discovery_type="Insight", confidence=0.9),
            ]
        )
        assert ids(client) == ["e-1"]


async def test_without_history_the_oldest_are_dropped_and_the_gap_stands_before_what_is_kept() -> None:
    broadcaster = live_broadcaster(buffer=2, history=0)
    with broadcaster.subscribe("a") as client:
        publish(broadcaster, 1)
        publish(broadcaster, 2)
        publish(broadcaster, 3)
        publish(broadcaster, 4)
        told = heard(client)
    assert [(e.event, e.id) for e in told] == [("gap", "e-2"), ("discovery", "e-3"), ("discovery", "e-4")]
    assert told[0].data == '{"reason":"overflow","missed":2}'
    assert client.dropped == 2


async def test_without_history_the_newest_are_dropped_and_the_gap_stands_before_the_next_accepted() -> None:
    broadcaster = live_broadcaster(buffer=2, history=0, overflow="drop-newest")
    with broadcaster.subscribe("a") as client:
        publish(broadcaster, 1, 2, 3, 4, 5)
        told = heard(client)
        publish(broadcaster, 6)
        told += heard(client)
    assert [(e.event, e.id) for e in told] == [
        ("discovery", "e-1"),
        ("discovery", "e-2"),
        ("gap", "e-5"),
        ("discovery", "e-6"),
    ]
    assert told[2].data == '{"reason":"overflow","missed":3}'


async def test_without_history_a_full_client_may_be_shown_the_door() -> None:
    broadcaster = live_broadcaster(buffer=2, history=0, overflow="disconnect")
    with broadcaster.subscribe("slow") as slow, broadcaster.subscribe("fast") as fast:
        publish(broadcaster, 1, 2)
        heard(fast)
        publish(broadcaster, 3)
        assert slow.ending == "overflow"
        assert ids(fast) == ["e-3"]


async def test_a_dropped_notice_makes_the_number_of_missed_events_unknown() -> None:
    broadcaster = live_broadcaster(buffer=2, history=0)
    with broadcaster.subscribe("a") as client:
        broadcaster.gap("upstream", 1)
        publish(broadcaster, 2, 3, 4)
        assert gaps(client) == [('{"reason":"overflow","missed":null}', "e-2")]


async def test_with_history_a_full_client_leaves_the_live_path_and_reads_on() -> None:
    broadcaster = live_broadcaster(buffer=2)
    with broadcaster.subscribe("a") as client:
        publish(broadcaster, 1, 2, 3, 4)
        assert not is_live(client)
        assert ids(client) == ["e-1", "e-2"]
        assert [f.sequence for f in broadcaster.read(client, 10)] == [3, 4]
        assert is_live(client)
        publish(broadcaster, 5)
        assert ids(client) == ["e-5"]
        assert client.dropped == 0


async def test_what_history_no_longer_holds_is_counted_exactly() -> None:
    broadcaster = live_broadcaster(buffer=2, history=3)
    odd = Filter(agents=frozenset({"odd"}))
    with broadcaster.subscribe("all") as everything, broadcaster.subscribe("odd", odd) as filtered:
        for number in range(1, 21):
            broadcaster.publish([event(number, agent_id="odd" if number % 2 else "even")])
        assert ids(everything) == ["e-1", "e-2"]
        assert broadcaster.is_behind(everything)
        assert broadcaster.skip(everything) == 15  # 3 to 17
        assert [f.sequence for f in broadcaster.read(everything, 10)] == [18, 19, 20]
        assert ids(filtered) == ["e-1", "e-3"]
        assert broadcaster.skip(filtered) == 7  # 5, 7, 9, 11, 13, 15, 17
        assert [f.sequence for f in broadcaster.read(filtered, 10)] == [19]


async def test_what_passes_memory_before_a_resumed_client_has_read_it_is_counted_exactly() -> None:
    broadcaster = live_broadcaster(history=3)
    publish(broadcaster, 1, 2, 3)
    with broadcaster.subscribe("a", cursor="e-1") as client:
        publish(broadcaster, 4, 5, 6, 7)
        assert broadcaster.skip(client) == 3  # 2 to 4
        assert client.books() == Books(offered=3, dropped=3)


async def test_what_passes_memory_after_a_restart_is_counted_from_its_beginning() -> None:
    broadcaster = live_broadcaster(buffer=2, history=3)
    with broadcaster.subscribe("a") as client:
        publish(broadcaster, 1, 2, 3, 4)  # two queued, two to be read
        broadcaster.open_epoch("f", 0)
        publish(broadcaster, 1, 2, 3, 4, 5)
        assert broadcaster.skip(client) == 2
        assert client.books() == Books(offered=4, dropped=2, waiting=2)


async def test_a_parked_client_is_written_to_at_once() -> None:
    broadcaster = live_broadcaster()
    socket = Socket()
    async with trio.open_nursery() as nursery:
        with broadcaster.subscribe("a") as client:
            client.writer = socket
            nursery.start_soon(client.wait)
            await trio.testing.wait_all_tasks_blocked()
            publish(broadcaster, 1, 2)
            assert [batch.events for batch in socket.written] == [2]
            assert (client.sent, client.queued) == (2, 0)
            nursery.cancel_scope.cancel()


async def test_a_client_that_is_busy_is_never_written_to_by_the_publisher() -> None:
    broadcaster = live_broadcaster()
    socket = Socket()
    with broadcaster.subscribe("a") as client:
        client.writer = socket
        publish(broadcaster, 1)
        assert not socket.written
        assert ids(client) == ["e-1"]


async def test_what_the_kernel_does_not_take_goes_through_the_channel() -> None:
    broadcaster = live_broadcaster()
    socket = Socket(room=1)
    with broadcaster.subscribe("a") as client:
        client.writer = socket
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.wait)
            await trio.testing.wait_all_tasks_blocked()
            publish(broadcaster, 1)
            publish(broadcaster, 2, 3)
        assert not client.parked
        assert [batch.last for batch in socket.written] == [1]
        assert ids(client) == ["e-2", "e-3"]


async def test_a_cut_batch_wakes_the_task_which_must_finish_it_first() -> None:
    broadcaster = live_broadcaster()
    socket = Socket(room=0, cuts=True)
    with broadcaster.subscribe("a") as client:
        client.writer = socket
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.wait)
            await trio.testing.wait_all_tasks_blocked()
            publish(broadcaster, 1)
            publish(broadcaster, 2)
        assert [batch.last for batch in socket.written] == [1]
        assert ids(client) == ["e-2"]


async def test_a_broken_socket_ends_its_own_client_and_nothing_else() -> None:
    broadcaster = live_broadcaster()
    async with trio.open_nursery() as nursery:
        with broadcaster.subscribe("gone") as gone, broadcaster.subscribe("here") as here:
            gone.writer = Socket(broken=True)
            nursery.start_soon(gone.wait)
            await trio.testing.wait_all_tasks_blocked()
            publish(broadcaster, 1)
            assert gone.gone
            assert not gone.parked
            assert ids(here) == ["e-1"]
            nursery.cancel_scope.cancel()


async def test_a_large_round_is_served_in_slices() -> None:
    broadcaster = live_broadcaster()
    with broadcaster.subscribe("first") as first:
        others = [broadcaster.subscribe(f"c{n}") for n in range(SLICE)]
        clients = [other.__enter__() for other in others]
        broadcaster.publish(events(1))
        assert first.queued == 1
        assert clients[-1].queued == 0
        with broadcaster.subscribe("late") as late:
            assert not broadcaster.deliver()
            assert clients[-1].queued == 1
            assert late.queued == 0
            assert late.told == 1
        for other in others:
            other.__exit__(None, None, None)


async def test_a_round_for_many_audiences_is_served_in_slices_with_bytes_that_are_made_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broadcaster = live_broadcaster()
    made: list[Audience[Client]] = []
    begin = Audience.begin

    def counting(audience: Audience[Client]) -> Batch | None:
        made.append(audience)
        return begin(audience)

    looked: list[Filter] = []
    let_through = Filter.let_through

    def looking(filter: Filter, frames: Sequence[Frame]) -> Sequence[Frame]:
        looked.append(filter)
        return let_through(filter, frames)

    monkeypatch.setattr(Audience, "begin", counting)
    monkeypatch.setattr(Filter, "let_through", looking)
    with ExitStack() as stack:
        filters = [Filter(min_confidence=n / 10_000) for n in range(4 * SLICE)]
        clients = [stack.enter_context(broadcaster.subscribe("a", filter)) for filter in filters]
        broadcaster.publish([event(1, confidence=1), event(2, confidence=0.0001)])
        turns = 1
        while len(made) < len(filters):
            assert len(made) <= turns * SLICE, "no more than a slice of them in one turn"
            check_books(broadcaster)
            assert len(looked) == len(made), "the books of the others have nothing of this round yet"
            assert broadcaster.deliver() is (len(made) < len(filters))
            turns += 1
        assert turns > 4
        assert len(set(made)) == len(filters)
        assert [ids(client) for client in clients[:3]] == [["e-1", "e-2"], ["e-1", "e-2"], ["e-1"]]
        assert all(ids(client) == ["e-1"] for client in clients[3:])
        check_books(broadcaster)


@pytest.mark.parametrize("comes", ["anew", "by reading on"])
async def test_who_joins_an_audience_whose_turn_has_still_to_come_is_not_given_the_round_again(comes: str) -> None:
    broadcaster = live_broadcaster()
    with ExitStack() as stack:
        for n in range(2 * SLICE):
            stack.enter_context(broadcaster.subscribe("a", Filter(min_confidence=n / 10_000)))
        last = Filter(agents=frozenset({"agent-1"}))
        there = stack.enter_context(broadcaster.subscribe("there", last))
        late = stack.enter_context(broadcaster.subscribe("late", last))
        if comes == "by reading on":
            late.leave()
        broadcaster.publish([event(1, agent_id="agent-1"), event(2, agent_id="agent-2")])
        if comes == "anew":
            late = stack.enter_context(broadcaster.subscribe("late", last))
        else:
            assert [frame.id for frame in broadcaster.read(late, 10)] == ["e-1"]
            late.written(1, 100)
        assert is_live(late)
        assert late.books() == (Books(offered=2, out=1, filtered=1) if comes == "by reading on" else Books())
        assert there.books() == Books(), "its turn has still to come"
        while broadcaster.deliver():
            pass
        assert (there.books(), ids(there)) == (Books(offered=2, filtered=1, waiting=1), ["e-1"])
        assert ids(late) == []
        broadcaster.publish([event(3, agent_id="agent-1")])
        while broadcaster.deliver():
            pass
        assert ids(late) == ["e-3"]
        check_books(broadcaster)


async def test_what_had_passed_an_audience_at_a_place_is_what_counting_from_there_says() -> None:
    draw = random.Random(1)
    broadcaster = live_broadcaster(history=60, buffer=1000)
    only = Filter(agents=frozenset({"agent-1"}))
    with broadcaster.subscribe("a", only):
        audience = broadcaster._audiences[only]
        history, sequence = broadcaster.history, 0
        for _ in range(300):
            batch = []
            for _ in range(draw.randint(1, 5)):
                sequence += draw.choice([1, 1, 3])
                batch.append(event(sequence, agent_id=f"agent-{draw.randint(1, 2)}"))
            broadcaster.publish(batch)
            while broadcaster.deliver():
                pass
            if draw.random() < 0.1:
                sequence += 1
                broadcaster.gap("upstream", sequence)
            for _ in range(draw.randint(0, 3)):
                place = draw.randint(history.floor, history.head)
                assert audience.passed_at(place, history) == audience.passed_without(history.after(place, 1000))


async def test_a_round_that_was_cancelled_in_the_middle_is_finished_by_who_comes_next() -> None:
    broadcaster = live_broadcaster()
    rounds = Rounds(broadcaster, FeedCounters(), 1024)
    with ExitStack() as stack:
        clients = [stack.enter_context(broadcaster.subscribe("a")) for _ in range(2 * SLICE)]
        with trio.CancelScope() as scope:
            scope.cancel()
            await rounds.publish([(1, "discoveries.insights", payload(1))], 1.0, numbered=True)
        assert scope.cancelled_caught
        assert (clients[-1].queued, broadcaster.settled) == (0, 0)
        await rounds.finish()
        assert [client.queued for client in clients] == [1] * len(clients)
        assert broadcaster.settled == 1


@pytest.mark.parametrize("resumes", [False, True], ids=["rejoins", "resumes"])
async def test_who_joins_the_live_path_in_the_middle_of_a_round_is_not_given_it_again(resumes: bool) -> None:
    broadcaster = live_broadcaster()
    others = [broadcaster.subscribe(f"c{n}") for n in range(SLICE)]
    for other in others:
        other.__enter__()
    with broadcaster.subscribe("last") as last:
        last.live = False
        if resumes:
            last.cursor = "e-0"  # its worth was not known when it came
        broadcaster.publish(events(1, 2))
        if resumes:
            broadcaster.resolve(last)
        assert [frame.id for frame in broadcaster.read(last, 10)] == ["e-1", "e-2"]
        assert is_live(last)
        while broadcaster.deliver():
            pass
        publish(broadcaster, 3)
        assert ids(last) == ["e-3"]
        assert is_live(last)
    for other in others:
        other.__exit__(None, None, None)


async def test_a_round_is_finished_before_the_next_begins() -> None:
    broadcaster = live_broadcaster()
    others = [broadcaster.subscribe(f"c{n}") for n in range(SLICE + 1)]
    clients = [other.__enter__() for other in others]
    broadcaster.publish(events(1))
    publish(broadcaster, 2)
    assert ids(clients[-1]) == ["e-1", "e-2"]
    for other in others:
        other.__exit__(None, None, None)


async def test_the_settled_head_waits_for_the_last_client_of_a_round() -> None:
    broadcaster = live_broadcaster()
    others = [broadcaster.subscribe(f"c{n}") for n in range(SLICE + 1)]
    for other in others:
        other.__enter__()
    broadcaster.publish(events(1))
    assert (broadcaster.head, broadcaster.settled) == (1, 0)
    while broadcaster.deliver():
        pass
    assert broadcaster.settled == 1
    for other in others:
        other.__exit__(None, None, None)


# -- before the feed is live, cursors, incarnations --------------------------------------------------------------------


async def test_who_comes_before_it_is_known_that_there_is_a_stream_reads_on_from_it_too() -> None:
    broadcaster = Broadcaster(Settings(history=0, buffer=2))
    with broadcaster.subscribe("early") as early:
        broadcaster.open_epoch("e", 0, durable=True)
        broadcaster.go_live()
        with broadcaster.subscribe("late") as late:
            for number in range(1, 6):
                publish(broadcaster, number)
            assert (early.dropped, late.dropped) == (0, 0)
            assert not early.live
            assert not late.live
            check_books(broadcaster)


async def test_who_comes_before_the_feed_is_live_hears_everything_from_then_on() -> None:
    broadcaster = Broadcaster(Settings())
    with broadcaster.subscribe("early") as client:
        assert broadcaster.head_id is None
        broadcaster.open_epoch("e", 0)
        publish(broadcaster, 1)  # a backlog: history, not news
        broadcaster.go_live()
        publish(broadcaster, 2)
        assert ids(client) == ["e-2"]


@pytest.mark.parametrize(
    ("cursor", "resumed", "due", "position"),
    [
        ("e-20", True, None, 20),
        ("e-18", True, None, 18),
        ("e-17", True, None, 17),
        ("e-16", False, "expired", 17),
        ("e-21", False, "restart", 20),
        ("f-18", False, "restart", 20),
        ("nonsense", False, "restart", 20),
    ],
)
async def test_what_a_cursor_is_worth_on_core_nats(cursor: str, resumed: bool, due: str | None, position: int) -> None:
    broadcaster = live_broadcaster(history=3)
    publish(broadcaster, *range(1, 21))
    with broadcaster.subscribe("a", cursor=cursor) as client:
        assert (client.resumed, client.due, client.position) == (resumed, due, position)
        assert client.live == (cursor == "e-20")


@pytest.mark.parametrize(
    ("cursor", "resumed", "due", "position"),
    [
        ("e-17", True, None, 17),
        ("e-9", True, None, 9),
        ("e-4", True, None, 4),
        ("e-3", False, "expired", 4),
        ("e-25", True, None, 25),
        ("e-26", False, "restart", 20),
    ],
)
async def test_what_a_cursor_is_worth_where_the_stream_can_be_read(
    cursor: str, resumed: bool, due: str | None, position: int
) -> None:
    broadcaster = Broadcaster(Settings(history=3, buffer=3))
    broadcaster.open_epoch("e", 0, durable=True)
    broadcaster.go_live()
    publish(broadcaster, *range(1, 21))
    with broadcaster.subscribe("a", cursor=cursor) as client:
        broadcaster.resolve(client, (5, 25)) if client.cursor else None
        assert (client.resumed, client.due, client.position) == (resumed, due, position)


async def test_a_client_ahead_of_this_instance_waits_until_the_head_gets_there() -> None:
    broadcaster = Broadcaster(Settings())
    broadcaster.open_epoch("e", 0, durable=True)
    broadcaster.go_live()
    publish(broadcaster, 1, 2)
    with broadcaster.subscribe("a", cursor="e-4") as client:
        broadcaster.resolve(client, (1, 9))
        assert broadcaster.read(client, 10) == []
        publish(broadcaster, 3, 4)
        assert not client.live
        publish(broadcaster, 5)
        assert [f.sequence for f in broadcaster.read(client, 10)] == [5]
        assert client.live


async def test_a_new_incarnation_is_told_and_read_from_its_beginning() -> None:
    broadcaster = live_broadcaster()
    with broadcaster.subscribe("a") as client:
        publish(broadcaster, 1)
        broadcaster.open_epoch("f", 0)
        publish(broadcaster, 1, 2)
        assert ids(client) == ["e-1"]
        assert client.due == "restart"
        assert [f.id for f in broadcaster.read(client, 10)] == ["f-1", "f-2"]


@pytest.mark.parametrize("head", [0, 100])
async def test_what_was_heard_before_a_new_incarnation_stays_in_the_books(head: int) -> None:
    broadcaster = live_broadcaster()
    with broadcaster.subscribe("a"), broadcaster.subscribe("b", Filter(agents=frozenset({"nobody"}))):
        publish(broadcaster, 1, 2)
        publish(broadcaster, 3)
        broadcaster.open_epoch("f", head)
        assert check_books(broadcaster) == Books(offered=6, waiting=3, filtered=3)


async def test_messages_that_are_no_events_move_the_head() -> None:
    broadcaster = live_broadcaster()
    with broadcaster.subscribe("a") as client:
        broadcaster.publish(events(3), head=8)
        assert (broadcaster.head, broadcaster.settled, client.told) == (8, 8, 0)
        assert ids(client) == ["e-3"]


async def test_messages_that_are_no_events_do_not_hurry_a_round() -> None:
    broadcaster = live_broadcaster()
    others = [broadcaster.subscribe(f"c{n}") for n in range(SLICE + 1)]
    clients = [other.__enter__() for other in others]
    broadcaster.publish(events(1), head=2)
    assert clients[-1].queued == 0
    assert (broadcaster.head, broadcaster.settled) == (2, 0)
    with broadcaster.subscribe("late") as late:
        assert not broadcaster.deliver()
        assert (clients[-1].queued, late.queued) == (1, 0)
        assert broadcaster.settled == 2
        check_books(broadcaster)
    for other in others:
        other.__exit__(None, None, None)


async def test_draining_ends_everybody_and_who_comes_after() -> None:
    broadcaster = live_broadcaster()
    with broadcaster.subscribe("a") as client:
        publish(broadcaster, 1)
        broadcaster.drain("shutdown")
        assert client.ending == "shutdown"
        assert ids(client) == ["e-1"]
        with broadcaster.subscribe("late") as late:
            assert late.ending == "shutdown"


async def test_rounds_hold_no_more_than_a_client_may_have_queued() -> None:
    broadcaster = live_broadcaster(buffer=3)
    socket = Socket()
    async with trio.open_nursery() as nursery:
        with broadcaster.subscribe("a") as client:
            client.writer = socket
            nursery.start_soon(client.wait)
            await trio.testing.wait_all_tasks_blocked()
            publish(broadcaster, *range(1, 9))
            assert [batch.events for batch in socket.written] == [3, 3, 2]
            nursery.cancel_scope.cancel()
