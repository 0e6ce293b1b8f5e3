"""7. The feed goes away and comes back, in another incarnation even, and clients may leave at any moment of it.

The guarantee: a client that waits for the feed waits as any other does: its end is prompt and leaves nothing, neither
with the broadcaster nor with the backlog that it was reading. A read of the stream belongs to the connection to NATS,
so that a client that leaves takes nothing from those who wait for the same page.
"""

from __future__ import annotations

import json
import random
from functools import partial

import pytest
import trio
from support import payload
from teardown.lab import Lab, discoveries
from test_seam import ScriptedSource
from trio.testing import MockClock, wait_all_tasks_blocked

from sse_trio.backlog import Backlog
from sse_trio.rounds import FeedCounters
from sse_trio.testing import act_at_every_step, cancel_at_every_step, cancel_part_at_every_step


async def test_a_client_that_waits_for_the_first_feed_may_be_cancelled_at_any_step(autojump_clock: MockClock) -> None:
    lab = Lab()

    async def scenario() -> None:
        lab.begin(live=False)
        new, resuming = lab.connect(), lab.connect()
        async with trio.open_nursery() as requests:
            requests.start_soon(lab.stream, new)
            requests.start_soon(lab.stream, resuming, "e-1")
            await wait_all_tasks_blocked()
            lab.publish(2)
            lab.hub.go_live()
            await lab.publish_one_by_one(1)
            requests.cancel_scope.cancel()
        assert discoveries(new) == [3], "it hears everything from the moment the feed is live"
        assert discoveries(resuming) == [2, 3]

    await cancel_at_every_step(scenario, check=lab.check)


@pytest.mark.parametrize("cursor", [None, "e-1"], ids=["new", "resuming"])
async def test_a_new_incarnation_at_any_step_is_one_gap_and_then_its_events(
    cursor: str | None, autojump_clock: MockClock
) -> None:
    lab = Lab()

    def restart() -> None:
        if lab.hub.epoch == "e":
            lab.hub.open_epoch("f", 0)
            lab.sequence = 0

    async def scenario() -> None:
        lab.begin()
        lab.publish(3)
        connection = lab.connect()
        async with trio.open_nursery() as requests:
            requests.start_soon(lab.stream, connection, cursor)
            await wait_all_tasks_blocked()
            restart()
            await wait_all_tasks_blocked()
            await lab.publish_one_by_one(2)
            requests.cancel_scope.cancel()
        told = [(event.event, event.id) for event in connection.events]
        if ("gap", "f-0") in told:
            assert told[told.index(("gap", "f-0")) :] == [("gap", "f-0"), ("discovery", "f-1"), ("discovery", "f-2")]
            (gap,) = [event for event in connection.events if event.event == "gap"]
            assert json.loads(gap.data) == {"reason": "restart", "missed": None}
        else:
            assert cursor is None, "its cursor belongs to the old one"
            assert told == [("connected", "f-0"), ("discovery", "f-1"), ("discovery", "f-2")]

    await act_at_every_step(scenario, restart, check=lab.check)


async def test_a_gap_of_the_feed_at_any_step_is_told_once_to_everybody_who_was_there(
    autojump_clock: MockClock,
) -> None:
    lab = Lab(direct_writes="single")  # at the very last step only the publisher itself can still write it
    struck: list[int] = []

    def outage() -> None:
        lab.sequence += 1
        struck.append(len(lab.hub.clients))
        lab.hub.gap("upstream", lab.sequence)

    async def scenario() -> None:
        struck.clear()
        lab.begin()
        connection = lab.connect(window=600)
        async with trio.open_nursery() as requests:
            requests.start_soon(lab.stream, connection)
            await wait_all_tasks_blocked()
            await lab.publish_one_by_one(3)
            connection.read()
            await wait_all_tasks_blocked()
            requests.cancel_scope.cancel()
        gaps = [event for event in connection.events if event.event == "gap"]
        assert len(gaps) == sum(struck)

    await act_at_every_step(scenario, outage, check=lab.check)


class Stream:
    """The stream behind memory: a backlog, and a connection to NATS that comes and goes."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.source = ScriptedSource(random.Random(0))
        self.backlog = Backlog(lambda: lab.hub.head, FeedCounters())

    def publish(self, count: int) -> None:
        for _ in range(count):
            self.lab.publish()
            self.source.stored[self.lab.sequence] = payload(self.lab.sequence)
            self.source.last = self.lab.sequence

    async def connected(self) -> None:
        """A connection to NATS, until it is cancelled."""
        async with trio.open_nursery() as nursery:
            self.backlog.open(self.source, "e", nursery)
            try:
                await trio.sleep_forever()
            finally:
                self.backlog.close()


async def test_clients_that_read_the_stream_may_be_cancelled_at_any_step_while_the_feed_goes_and_comes(
    autojump_clock: MockClock,
) -> None:
    lab = Lab(buffer=2, history=2, keepalive_interval=30)

    async def scenario() -> None:
        lab.begin(durable=True)
        stream = Stream(lab)
        stream.publish(20)
        connections = [lab.connect(), lab.connect()]
        async with trio.open_nursery() as requests:
            for connection in connections:
                requests.start_soon(partial(lab.stream, connection, "e-3", backlog=stream.backlog))
            await trio.sleep(0.3)
            for _ in range(2):
                with trio.move_on_after(0.6):
                    await stream.connected()
                await trio.sleep(1)
            async with trio.open_nursery() as feed:
                feed.start_soon(stream.connected)
                await trio.sleep(5)
                stream.publish(1)
                await trio.sleep(5)
                feed.cancel_scope.cancel()
            requests.cancel_scope.cancel()
        for connection in connections:
            assert discoveries(connection) == list(range(4, 22))

    await cancel_at_every_step(scenario, check=lab.check, within=1000)


async def test_a_client_that_leaves_takes_nothing_from_another_that_waits_for_the_same_page(
    autojump_clock: MockClock,
) -> None:
    lab = Lab(buffer=2, history=2)

    async def scenario(leaving: trio.CancelScope) -> None:
        lab.begin(durable=True)
        stream = Stream(lab)
        stream.publish(20)
        leaver, stayer = lab.connect(), lab.connect()

        async def leave() -> None:
            with leaving:
                await lab.stream(leaver, "e-3", backlog=stream.backlog)

        async with trio.open_nursery() as feed:
            feed.start_soon(stream.connected)
            async with trio.open_nursery() as requests:
                requests.start_soon(leave)
                await trio.lowlevel.checkpoint()
                requests.start_soon(partial(lab.stream, stayer, "e-3", backlog=stream.backlog))
                await trio.sleep(30)
                requests.cancel_scope.cancel()
            feed.cancel_scope.cancel()
        assert discoveries(stayer) == list(range(4, 21))

    await cancel_part_at_every_step(scenario, check=lab.check, within=1000)
