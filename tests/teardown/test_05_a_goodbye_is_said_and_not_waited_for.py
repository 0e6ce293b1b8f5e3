"""5. A server that stops says goodbye to every stream, and waits for none.

The guarantee: whenever the drain begins, a stream whose head was sent ends with a `goodbye` and a proper last chunk if
its peer reads, and within the write timeout if it does not. The drain is a state (`Broadcaster.stopping`), not an event
that one could miss: who connects a step later gets its goodbye too.

The trap: Hypercorn tells an application that it stops after all connections are gone (`hypercorn/trio/run.py:116`), so
that endless streams burn the whole grace period and are then cut without a last chunk; and a goodbye in a shield
without a deadline is a server that one reader keeps alive for ever (`hypercorn/trio/tcp_server.py:84-88`).
"""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import trio
from memory_connection import MemoryConnection
from teardown.lab import Lab, names
from trio.testing import MockClock, wait_all_tasks_blocked

from sse_trio.client import Client
from sse_trio.connection import Connection
from sse_trio.stream import EventStream
from sse_trio.testing import TeardownError, act_at_every_step, cancel_at_every_step

WINDOW = 5


def said_goodbye(connection: MemoryConnection, reason: str) -> None:
    assert connection.ended, f"no proper end: {names(connection)}"
    assert names(connection).count("goodbye") == 1
    last = connection.events[-1]
    assert (last.event, json.loads(last.data)) == ("goodbye", {"reason": reason})
    assert last.id == connection.events[-2].id, "a goodbye moves no cursor"


@pytest.mark.parametrize("cursor", [None, "e-2", "x-1"], ids=["new", "resuming", "lost"])
async def test_a_drain_at_any_step_is_a_goodbye_and_a_proper_end(cursor: str | None, autojump_clock: MockClock) -> None:
    lab = Lab(drain_window=WINDOW)

    async def scenario() -> None:
        lab.begin()
        lab.publish(5)
        connection = lab.connect()
        async with trio.open_nursery() as requests:
            requests.start_soon(lab.stream, connection, cursor)
            await wait_all_tasks_blocked()
            await lab.publish_one_by_one(2)
            lab.hub.drain("shutdown")
        # Nobody cancelled it: it has ended by itself.
        said_goodbye(connection, "shutdown")

    report = await act_at_every_step(scenario, lambda: lab.hub.drain("shutdown"), check=lab.check)
    assert report.steps > 10


async def test_a_drain_that_is_cancelled_at_any_step_leaves_nothing(autojump_clock: MockClock) -> None:
    lab = Lab()

    async def scenario() -> None:
        lab.begin()
        async with trio.open_nursery() as requests:
            for window in (1e9, 300, 1e9):
                requests.start_soon(lab.stream, lab.connect(window))
            await wait_all_tasks_blocked()
            lab.publish(3)
            lab.hub.drain("shutdown")
            requests.start_soon(lab.stream, lab.connect())

    await cancel_at_every_step(scenario, check=lab.check)


async def test_a_client_that_is_thrown_out_at_any_step_hears_why(autojump_clock: MockClock) -> None:
    lab = Lab()

    def kick() -> None:
        for client in lab.hub.clients.values():
            client.end("kicked")

    async def scenario() -> None:
        lab.begin()
        connection = lab.connect()
        async with trio.open_nursery() as requests:
            requests.start_soon(lab.stream, connection)
            await wait_all_tasks_blocked()
            await lab.publish_one_by_one(2)
            kick()
        said_goodbye(connection, "kicked")

    await act_at_every_step(scenario, kick, check=lab.check)


async def test_lifetimes_that_end_at_any_step_end_with_a_goodbye(autojump_clock: MockClock) -> None:
    lab = Lab(max_lifetime=600, keepalive_interval=30)

    async def scenario() -> None:
        lab.begin()
        connection = lab.connect()
        began = trio.current_time()
        await lab.stream(connection)
        assert 480 <= trio.current_time() - began <= 600
        said_goodbye(connection, "lifetime")

    await cancel_at_every_step(scenario, check=lab.check, within=1000)


async def test_a_peer_that_takes_no_goodbye_holds_up_a_drain_for_the_write_timeout_and_no_longer(
    autojump_clock: MockClock,
) -> None:
    lab = Lab()

    async def scenario() -> None:
        lab.begin()
        async with trio.open_nursery() as requests:
            requests.start_soon(lab.stream, lab.connect(window=300, timeout=10))
            await wait_all_tasks_blocked()
            await lab.publish_one_by_one(3)
            began = trio.current_time()
            lab.hub.drain("shutdown")
        assert trio.current_time() - began <= 10
        assert lab.hub.disconnects == {"stalled": 1}

    await cancel_at_every_step(scenario, check=lab.check)


class GoodbyeInAShield(EventStream):
    """Makes sure that the goodbye is heard: in a shield, and without a deadline."""

    async def _goodbye(self, client: Client, connection: Connection) -> str:
        reason = await super()._goodbye(client, connection)
        assert isinstance(connection, MemoryConnection)
        with trio.CancelScope(shield=True):
            while connection.in_flight:
                await trio.sleep(1)
        return reason


@pytest.mark.parametrize("reads", [True, False])
async def test_the_harness_rejects_a_goodbye_that_is_waited_for_as_soon_as_one_does_not_read(
    reads: bool, autojump_clock: MockClock
) -> None:
    """As long as everybody reads, it is a fine idea."""
    lab = Lab(stream=GoodbyeInAShield)

    async def scenario() -> None:
        lab.begin()
        connection = lab.connect()

        async def read() -> None:
            while lab.hub.clients:
                connection.read()
                await trio.sleep(0.5)

        async with trio.open_nursery() as requests:
            requests.start_soon(lab.stream, connection)
            await wait_all_tasks_blocked()
            if reads:
                requests.start_soon(read)
            lab.hub.drain("shutdown")

    rejected = pytest.raises(TeardownError, match=r"struck at step .*: it had not ended after 60 s")
    with nullcontext() if reads else rejected:
        await act_at_every_step(scenario, lambda: lab.hub.drain("shutdown"), check=lab.check)


class GoodbyeOnlyToThePresent(EventStream):
    """Hears of the drain as an event, and only while it is parked: who was on the way then is never told."""

    async def _subscribed(self, connection: Connection) -> None:
        stopping, self.broadcaster.stopping = self.broadcaster.stopping, None
        try:
            await super()._subscribed(connection)
        finally:
            self.broadcaster.stopping = stopping


async def test_the_harness_rejects_a_drain_that_one_can_miss(autojump_clock: MockClock) -> None:
    lab = Lab(stream=GoodbyeOnlyToThePresent)
    drained: list[bool] = []

    def drain() -> None:
        if not drained:
            drained.append(True)
            lab.hub.drain("shutdown")

    async def scenario() -> None:
        drained.clear()
        lab.begin()
        connection = lab.connect()
        async with trio.open_nursery() as requests:
            requests.start_soon(lab.stream, connection)
            await wait_all_tasks_blocked()
            drain()

    with pytest.raises(TeardownError, match=r"struck at step .*: it had not ended after 60 s"):
        await act_at_every_step(scenario, drain, check=lab.check)
