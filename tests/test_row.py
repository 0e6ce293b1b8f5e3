"""Clients that are written to together: each hears and counts as if it were alone, whatever happens to the others.

The sockets are real, below a real Hypercorn; what a client does in the middle of a round is done to it between two slices.
"""

from __future__ import annotations

import math
import random
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import trio
from memory_connection import LentConnection
from serving import Server, serving
from support import RawStream, eventually, listen
from test_broadcaster import check_books, events, live_broadcaster, publish
from trio.testing import MockClock, wait_all_tasks_blocked

from sse_trio import audience, row
from sse_trio import broadcaster as broadcaster_module
from sse_trio.audience import CROWD, Books, Filter
from sse_trio.broadcaster import Broadcaster
from sse_trio.client import Client
from sse_trio.connection import ConnectionResponse
from sse_trio.deadline import DeadlineStream
from sse_trio.history import Batch
from sse_trio.stream import EventStream
from sse_trio.testing import cancel_part_at_every_step

SEATS = 8
"""Of one row, here."""

ROOMY = 60.0
"""A write timeout that nothing here runs into, in seconds."""


@dataclass
class Peer:
    """One client: what it has read, and what the server knows it as."""

    raw: RawStream
    client: Client

    async def hears(self, last: str) -> list[str]:
        """The ids of all discoveries that it has heard, once that one has come."""
        await self.raw.read_until(lambda: bool(self.raw.events) and self.raw.events[-1].id == last, f"{last} is heard")
        return [event.id for event in self.raw.events if event.event == "discovery"]

    @property
    def sits(self) -> bool:
        return self.client.row is not None

    @property
    def transport(self) -> DeadlineStream:
        found = self.client.writer._transport  # type: ignore[union-attr]
        assert isinstance(found, DeadlineStream)
        return found


@dataclass
class Crowd:
    broadcaster: Broadcaster
    server: Server
    stack: AsyncExitStack
    peers: list[Peer] = field(default_factory=list)

    async def join(self, *, rcvbuf: int | None = None) -> Peer:
        """One more; when this returns it has its `connected`, and its task is parked."""
        known = set(self.broadcaster.clients)
        raw = await self.stack.enter_async_context(listen(self.server.port, path="/stream", rcvbuf=rcvbuf))
        await raw.next("connected")
        (id,) = set(self.broadcaster.clients) - known
        peer = Peer(raw, self.broadcaster.clients[id])
        await eventually(lambda: peer.client.parked, "its task is parked")
        self.peers.append(peer)
        return peer

    @property
    def standing(self) -> list[Peer]:
        return [peer for peer in self.peers if not peer.sits]

    def begin(self, *sequences: int) -> None:
        """Publish, and serve the first slice only."""
        self.broadcaster.publish(events(*sequences))

    def go_on(self) -> None:
        while self.broadcaster.deliver():
            pass


@asynccontextmanager
async def crowd(number: int, *, timeout: float = ROOMY, **settings: Any) -> AsyncIterator[Crowd]:
    """So many clients that listen to one broadcaster."""
    broadcaster = live_broadcaster(**{"direct_writes": "together"} | settings)
    answer: Any = partial(EventStream, broadcaster, broadcaster.settings, agent_id="a")
    async with serving(response=answer, timeout=timeout) as server, AsyncExitStack() as stack:
        found = Crowd(broadcaster, server, stack)
        for _ in range(number):
            await found.join()
        yield found


def unsent_but_for(vanished: DeadlineStream) -> Callable[[DeadlineStream], int | None]:
    """What the kernel says has not arrived, where from now on nothing arrives at one peer."""
    unsent, arrived = DeadlineStream.unsent, vanished._written
    return lambda stream: stream._written - arrived if stream is vanished else unsent(stream)


@pytest.fixture(autouse=True)
def rows_of_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row, "SEATS", SEATS)
    monkeypatch.setattr(audience, "SEATS", SEATS)
    monkeypatch.setattr(broadcaster_module, "SLICE", SEATS)


@pytest.fixture(params=["a few are seated at once", "many are seated in slices"], autouse=True)
def seating(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audience, "MANY", 0 if "slices" in request.param else 1000)


async def test_all_of_a_crowd_sit_and_hear_every_event_once_and_in_order() -> None:
    async with crowd(20) as together:
        publish(together.broadcaster, 1)
        publish(together.broadcaster, 2, 3)
        assert all(peer.sits for peer in together.peers)
        assert len({peer.client.row for peer in together.peers}) == 3
        for peer in together.peers:
            assert await peer.hears("e-3") == ["e-1", "e-2", "e-3"]
        check_books(together.broadcaster)


async def test_a_few_do_not_sit() -> None:
    async with crowd(CROWD - 1) as together:
        publish(together.broadcaster, 1)
        assert not any(peer.sits for peer in together.peers)
        assert await together.peers[0].hears("e-1") == ["e-1"]
        await together.join()
        publish(together.broadcaster, 2)
        assert all(peer.sits for peer in together.peers)


@pytest.mark.parametrize("way", ["single", "off"])
async def test_nobody_sits_where_that_is_switched_off(way: str) -> None:
    async with crowd(CROWD, direct_writes=way) as together:
        publish(together.broadcaster, 1)
        assert not any(peer.sits for peer in together.peers)
        for peer in together.peers:
            assert await peer.hears("e-1") == ["e-1"]
        check_books(together.broadcaster)


async def test_whoever_asks_is_told_what_each_of_them_was_given() -> None:
    async with crowd(CROWD) as together:
        before = [len(peer.raw.body) for peer in together.peers]
        publish(together.broadcaster, 1)
        publish(together.broadcaster, 2, 3)
        assert check_books(together.broadcaster) == Books(offered=3 * CROWD, out=3 * CROWD)
        for peer, earlier in zip(together.peers, before, strict=True):
            assert peer.sits
            assert (peer.client.sent, peer.client.told, peer.client.position) == (3, 3, 3)
            await peer.hears("e-3")
            assert peer.client.bytes == len(peer.raw.body) - earlier


async def test_who_does_not_read_stands_up_and_nobody_else_does() -> None:
    async with crowd(CROWD, buffer=100_000) as together:
        slow = await together.join(rcvbuf=4096)
        number = 0
        while slow.sits or number == 0:
            assert number < 100_000
            publish(together.broadcaster, *range(number + 1, number + 101))
            number += 100
            for peer in together.peers[:CROWD]:
                await peer.hears(f"e-{number}")
        assert all(peer.sits for peer in together.peers[:CROWD])
        publish(together.broadcaster, number + 1)
        check_books(together.broadcaster)
        last = f"e-{number + 1}"
        everything = [f"e-{sequence}" for sequence in range(1, number + 2)]
        for peer in together.peers:
            assert await peer.hears(last) == everything
        await eventually(lambda: slow.client.parked, "it has nothing left to do")
        publish(together.broadcaster, number + 2)
        assert slow.sits, "and with the next round it sits again"


@pytest.mark.parametrize("wakes", ["wake", "disturb"])
async def test_who_stands_up_before_its_row_is_served_hears_the_round_once(wakes: str) -> None:
    async with crowd(CROWD) as together:
        publish(together.broadcaster, 1)
        together.begin(2)
        waiting = next(peer for peer in together.peers if peer.client.row is not None and peer.client.row.owed)
        if wakes == "wake":
            waiting.client.wake()
        else:
            waiting.client._unpark()  # as its task does whose timer has run out
            waiting.client.send_channel.send_nowait(None)
        assert not waiting.sits
        check_books(together.broadcaster)
        together.go_on()
        publish(together.broadcaster, 3)
        for peer in together.peers:
            assert await peer.hears("e-3") == ["e-1", "e-2", "e-3"]
        check_books(together.broadcaster)


async def test_who_is_ended_before_its_row_is_served_does_not_hear_the_round() -> None:
    async with crowd(CROWD) as together:
        publish(together.broadcaster, 1)
        together.begin(2)
        waiting = next(peer for peer in together.peers if peer.client.row is not None and peer.client.row.owed)
        served = next(peer for peer in together.peers if peer.client.row is not None and not peer.client.row.owed)
        for peer in (waiting, served):
            peer.client.end("lifetime")
            assert not peer.sits
        assert waiting.client.books() == Books(offered=1, out=1)
        assert served.client.books() == Books(offered=2, out=2)
        together.go_on()
        assert await served.hears("e-2") == ["e-1", "e-2"]
        assert await waiting.hears("e-1") == ["e-1"]
        for peer in (waiting, served):
            await peer.raw.next("goodbye")
        check_books(together.broadcaster)


async def test_who_comes_in_the_middle_of_a_round_hears_what_follows_it() -> None:
    async with crowd(CROWD) as together:
        together.begin(1)
        late = await together.join()
        together.go_on()
        publish(together.broadcaster, 2)
        assert await late.hears("e-2") == ["e-2"]
        assert await together.peers[0].hears("e-2") == ["e-1", "e-2"]
        check_books(together.broadcaster)


async def test_who_comes_before_the_turn_of_its_crowd_does_not_sit_with_those_who_still_hear_the_round() -> None:
    async with crowd(0) as together:
        with ExitStack() as others:
            for n in range(3 * SEATS):
                others.enter_context(together.broadcaster.subscribe("other", Filter(min_confidence=(n + 1) / 10_000)))
            for _ in range(CROWD):
                await together.join()
            publish(together.broadcaster, 1)
            together.begin(2)
            late = await together.join()
            together.go_on()
            assert late in together.standing
            publish(together.broadcaster, 3)
            assert late not in together.standing
            assert await late.hears("e-3") == ["e-3"]
            for peer in together.peers[:CROWD]:
                assert await peer.hears("e-3") == ["e-1", "e-2", "e-3"]
            check_books(together.broadcaster)


@pytest.mark.parametrize("how", ["abort", "aclose"])
async def test_a_socket_that_is_closed_is_never_written_to_under_its_number(how: str) -> None:
    async with crowd(CROWD) as together:
        publish(together.broadcaster, 1)
        cut_off = together.peers[3]
        number = cut_off.transport.socket.fileno()
        together.begin(2)
        if how == "abort":
            cut_off.transport.abort()
        else:
            await cut_off.transport.aclose()
        assert not cut_off.sits
        ours, theirs = trio.socket.socketpair()
        with ours, theirs:
            assert number in (ours.fileno(), theirs.fileno()), "the kernel gives the lowest free number"
            together.go_on()
            publish(together.broadcaster, 3)
            for end in (ours, theirs):
                with pytest.raises(BlockingIOError):
                    end._sock.recv(100)  # type: ignore[attr-defined]
        for peer in together.peers:
            if peer is not cut_off:
                assert await peer.hears("e-3") == ["e-1", "e-2", "e-3"]
        await eventually(lambda: cut_off.client.id not in together.broadcaster.clients, "its stream has ended")


async def test_a_peer_that_has_vanished_is_found_while_it_sits(monkeypatch: pytest.MonkeyPatch) -> None:
    async with crowd(CROWD) as together:
        publish(together.broadcaster, 1)
        vanished = together.peers[5]
        vanished.client.settle()
        monkeypatch.setattr(DeadlineStream, "unsent", unsent_but_for(vanished.transport))
        publish(together.broadcaster, 2)
        vanished.client.settle()
        vanished.transport._moved_at = -math.inf
        assert vanished.client.row is not None
        vanished.client.row._look_at = -math.inf  # it is time
        publish(together.broadcaster, 3)
        assert not vanished.sits
        assert vanished.client.gone
        await eventually(lambda: together.broadcaster.disconnects["stalled"] == 1, "its stream has ended, as stalled")
        for peer in together.peers:
            assert peer is vanished or peer.sits


async def test_a_peer_that_has_vanished_is_found_though_nothing_but_keep_alives_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with crowd(CROWD, timeout=1.0, keepalive_interval=0.1) as together:
        publish(together.broadcaster, 1)
        vanished = together.peers[5]
        vanished.client.settle()
        monkeypatch.setattr(DeadlineStream, "unsent", unsent_but_for(vanished.transport))
        await eventually(lambda: together.broadcaster.disconnects["stalled"] == 1, "it is found")
        assert len(together.broadcaster.clients) == CROWD - 1


async def test_who_has_heard_nothing_for_long_has_the_whole_timeout_for_what_comes_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with crowd(CROWD) as together:
        publish(together.broadcaster, 1)
        for peer in together.peers:
            await peer.hears("e-1")
            await eventually(lambda peer=peer: peer.transport.unsent() == 0, "it has arrived")  # type: ignore[misc]
        for peer in together.peers:
            assert peer.client.row is not None
            peer.client.row._look_at = -math.inf
        publish(together.broadcaster, 2)
        late = together.peers[5]
        await late.hears("e-2")
        # Long after that, an event comes, and is looked for before its acknowledgement can have come.
        late.client.settle()
        late.transport._acked, late.transport._moved_at = late.transport._written, -math.inf
        assert late.client.row is not None
        late.client.row._look_at = -math.inf
        monkeypatch.setattr(DeadlineStream, "unsent", unsent_but_for(late.transport))
        publish(together.broadcaster, 3)
        assert late.sits


def kernel_timeout(peer: Peer) -> int:
    return peer.transport.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)


async def test_the_kernel_does_not_give_up_on_a_peer_that_more_is_on_its_way_to_than_it_may_have_room_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(audience, "MANY", 1000)  # who stands sits down in a row that there is
    async with crowd(CROWD) as together:
        publish(together.broadcaster, 1)
        for peer in together.peers:
            await eventually(lambda peer=peer: peer.transport.unsent() == 0, "it has arrived")  # type: ignore[misc]
            assert peer.client.row is not None
            peer.client.row._look_at = -math.inf
        publish(together.broadcaster, 2)
        watched = [peer for peer in together.peers if kernel_timeout(peer)]
        assert len(watched) >= CROWD // 2, "little is on its way to them"
        publish(together.broadcaster, *range(3, 100))
        assert all(peer.sits for peer in together.peers)
        assert [kernel_timeout(peer) for peer in together.peers] == [0] * CROWD

        # Who sits down there later is not watched either; and after the next look they are again.
        watched[0].client.wake()
        await eventually(lambda: watched[0].client.parked, "it has looked at its state")
        watched[0].transport._watch(True)
        publish(together.broadcaster, 100)
        assert watched[0].sits
        assert kernel_timeout(watched[0]) == 0
        for peer in together.peers:
            await peer.hears("e-100")
            await eventually(lambda peer=peer: peer.transport.unsent() == 0, "it has arrived")  # type: ignore[misc]
            assert peer.client.row is not None
            peer.client.row.look(trio.current_time())
        assert all(kernel_timeout(peer) for peer in together.peers)
        publish(together.broadcaster, *range(101, 200))
        assert not any(kernel_timeout(peer) for peer in together.peers)


async def test_small_rows_become_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audience, "MANY", 1000)
    async with crowd(CROWD + 8) as together:
        publish(together.broadcaster, 1)
        (everybody,) = together.broadcaster._audiences.values()
        assert [len(row.guests) for row in everybody._rows] == [8, 8, 8]
        for start in (0, 8, 16):
            for peer in together.peers[start : start + 6]:
                await peer.raw.stream.aclose()
        await eventually(lambda: len(together.broadcaster.clients) == 6, "most have left")
        for _ in range(10):
            await together.join()
        publish(together.broadcaster, 2)
        assert sorted(len(row.guests) for row in everybody._rows) == [8, 8]
        publish(together.broadcaster, 3)
        for peer in together.peers:
            if peer.client.id in together.broadcaster.clients:
                assert (await peer.hears("e-3"))[-2:] == ["e-2", "e-3"]
        check_books(together.broadcaster)


async def test_a_row_that_all_have_left_is_gone() -> None:
    async with crowd(CROWD) as together:
        publish(together.broadcaster, 1)
        (everybody,) = together.broadcaster._audiences.values()
        assert len(everybody._rows) == 2
        for peer in together.peers[:8]:
            await peer.raw.stream.aclose()
        await eventually(lambda: len(together.broadcaster.clients) == CROWD - 8, "half of them have left")
        publish(together.broadcaster, 2)
        assert len(everybody._rows) == 1
        assert check_books(together.broadcaster).out == 2 * CROWD - 8


# -- keep-alives: under the mock clock, with connections whose window is not a kernel's --------------------------------


@dataclass
class Quiet:
    """A crowd that hears little."""

    broadcaster: Broadcaster
    connections: list[LentConnection]
    timers: list[str]
    """The clients whose timers ran out."""
    nursery: trio.Nursery

    def join(self, **options: Any) -> LentConnection:
        connection = LentConnection()
        answer: ConnectionResponse = EventStream(
            self.broadcaster, self.broadcaster.settings, agent_id=f"{len(self.connections)}", **options
        )
        self.nursery.start_soon(answer.respond, connection)
        self.connections.append(connection)
        return connection

    def fillers(self) -> list[list[str]]:
        """What has filled the silence of each since the last time."""
        found = []
        for connection in self.connections:
            lines = connection.read().decode().splitlines()
            found.append([line for line in lines if line.startswith(":") or line == "event: cursor"])
        return found


@asynccontextmanager
async def quiet_crowd(number: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> AsyncIterator[Quiet]:
    broadcaster = live_broadcaster(keepalive_interval=30, direct_writes="together")
    timers: list[str] = []
    find = Broadcaster.filler

    def filler(broadcaster: Broadcaster, client: Client) -> Batch:
        timers.append(client.agent_id)
        return find(broadcaster, client)

    monkeypatch.setattr(Broadcaster, "filler", filler)
    connections: list[LentConnection] = []
    try:
        async with trio.open_nursery() as nursery:
            quiet = Quiet(broadcaster, connections, timers, nursery)
            for _ in range(number):
                quiet.join(**options)
            await wait_all_tasks_blocked()
            yield quiet
            nursery.cancel_scope.cancel()
    finally:
        for connection in connections:
            connection.release()


async def test_one_timer_keeps_a_whole_row_alive(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    async with quiet_crowd(16, monkeypatch) as quiet:
        await trio.sleep(20)
        publish(quiet.broadcaster, 1)
        quiet.fillers()
        await trio.sleep(29)
        assert quiet.fillers() == [[]] * 16
        for _ in range(10):
            await trio.sleep(2)
            assert quiet.fillers() == [[": keep-alive"]] * 16
            await trio.sleep(28)
        assert len(quiet.timers) == 10 * 2, "there are two rows"
        sizes = {client.bytes for client in quiet.broadcaster.clients.values()}
        assert len(sizes) == 1, "what fills a silence is not counted with the frames"
        publish(quiet.broadcaster, 2)
        assert all(client.told == 2 for client in quiet.broadcaster.clients.values())
        check_books(quiet.broadcaster)


async def test_a_crowd_that_has_never_heard_anything_gathers_in_rows_by_itself(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with quiet_crowd(16, monkeypatch) as quiet:
        await trio.sleep(1)
        for number in range(8):
            await trio.sleep(30)
            assert quiet.fillers() == [[": keep-alive"]] * 16
            if number >= 3:
                assert len(quiet.timers) <= 8, "a few of sixteen: those of the rows, and of who has just stood up"
            quiet.timers.clear()
        publish(quiet.broadcaster, 1)
        for connection in quiet.connections:
            assert connection.events[-1].id == "e-1"
        check_books(quiet.broadcaster)


async def test_a_row_whose_filter_has_kept_something_out_is_told_of_its_place(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with quiet_crowd(16, monkeypatch, filter=Filter(agents=frozenset({"nobody"}))) as quiet:
        publish(quiet.broadcaster, 1, 2)
        quiet.fillers()
        await trio.sleep(31)
        assert {connection.in_flight for connection in quiet.connections} == {b"event: cursor\ndata: {}\nid: e-2\n\n"}
        quiet.fillers()
        await trio.sleep(30)
        assert quiet.fillers() == [[": keep-alive"]] * 16
        check_books(quiet.broadcaster)


async def test_one_in_a_row_that_spoke_early_is_closed_and_the_others_are_kept_alive(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with quiet_crowd(16, monkeypatch) as quiet:
        publish(quiet.broadcaster, 1)
        quiet.connections[5].spoke = True
        quiet.fillers()
        await trio.sleep(31)
        assert quiet.fillers() == [[": keep-alive"] if number != 5 else [] for number in range(16)]
        assert quiet.broadcaster.disconnects["spoke early"] == 1


async def test_one_in_a_row_that_has_no_room_waits_for_it_alone_and_has_a_deadline(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with quiet_crowd(16, monkeypatch) as quiet:
        publish(quiet.broadcaster, 1)
        quiet.fillers()
        full = quiet.connections[5]
        with suppress(BlockingIOError):
            while True:
                full._ours.send(b"\n" * 65536)
        await trio.sleep(31)
        assert quiet.connections[6].read() == b": keep-alive\n"
        await trio.sleep(11)
        assert quiet.broadcaster.disconnects["stalled"] == 1
        assert len(quiet.broadcaster.clients) == 15


async def test_nobody_waits_longer_for_a_sign_of_life_because_others_come_and_go(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(4)
    async with quiet_crowd(16, monkeypatch) as quiet:
        heard_at = dict.fromkeys(range(16), 0.0)
        sequence = 0
        for now in range(1, 600):
            await trio.sleep(1)
            if chance.random() < 0.02:
                sequence += 1
                publish(quiet.broadcaster, sequence)
            if chance.random() < 0.1:
                heard_at[len(quiet.connections)] = now
                quiet.join()
                await wait_all_tasks_blocked()
            if chance.random() < 0.1:
                leaver = chance.choice(list(quiet.broadcaster.clients.values()))
                heard_at.pop(int(leaver.agent_id))
                leaver.disconnect()
                await wait_all_tasks_blocked()
            for number in heard_at:
                if quiet.connections[number].read():
                    heard_at[number] = now
                assert now - heard_at[number] <= 31
        check_books(quiet.broadcaster)


# -- cancellation ------------------------------------------------------------------------------------------------------


async def test_wherever_one_of_them_is_cancelled_the_others_hear_everything_once(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audience, "CROWD", 1)
    monkeypatch.setattr(row, "SEATS", 2)
    broadcaster = live_broadcaster(direct_writes="together")
    sequence = 0

    async def scenario(scope: trio.CancelScope) -> None:
        nonlocal sequence
        connections = [LentConnection() for _ in range(3)]

        async def stream(connection: LentConnection) -> None:
            answer: ConnectionResponse = EventStream(broadcaster, broadcaster.settings, agent_id="a")
            with scope if connection is connections[0] else trio.CancelScope():
                await answer.respond(connection)

        try:
            async with trio.open_nursery() as nursery:
                for connection in connections:
                    nursery.start_soon(stream, connection)
                await wait_all_tasks_blocked()
                for _ in range(3):
                    sequence += 1
                    broadcaster.publish(events(sequence))
                    await trio.lowlevel.checkpoint()
                    while broadcaster.deliver():
                        await trio.lowlevel.checkpoint()
                check_books(broadcaster)
                await wait_all_tasks_blocked()
                for connection in connections[1:]:
                    ids = [event.id for event in connection.events if event.event == "discovery"]
                    assert ids == [f"e-{number}" for number in range(sequence - 2, sequence + 1)]
                nursery.cancel_scope.cancel()
        finally:
            for connection in connections:
                connection.release()

    def check() -> None:
        assert not broadcaster.clients
        assert not broadcaster._audiences

    await cancel_part_at_every_step(scenario, check=check)
