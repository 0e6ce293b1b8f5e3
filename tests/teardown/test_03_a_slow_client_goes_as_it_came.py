"""3. A slow client loses frames, is told of it, leaves the live path and comes back, and may go at any moment of that.

The guarantee: what a client may hold is bounded, what it missed is said at its place, and none of the places where it
can be (live, queued, reading history, being told of a gap) keeps anything of it when it goes.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio
from memory_connection import MemoryConnection
from teardown.lab import Lab, discoveries
from trio.testing import MockClock, wait_all_tasks_blocked

from sse_trio.testing import act_at_every_step, cancel_at_every_step, delay_at_every_step

POLICIES = pytest.mark.parametrize(
    "settings",
    [
        {"overflow": "drop-oldest", "history": 0},
        {"overflow": "drop-newest", "history": 0},
        {"overflow": "drop-oldest", "history": 4},
        {"overflow": "disconnect", "history": 0},
        {"overflow": "disconnect", "history": 4},
        {"history": 1000},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)

TOTAL = 12


def told_of_all(connection: MemoryConnection, total: int) -> bool:
    """Whether every discovery up to `total` was heard, or counted by a gap, in order."""
    missed: int = sum(json.loads(event.data)["missed"] for event in connection.events if event.event == "gap")
    heard = discoveries(connection)
    assert heard == sorted(set(heard)), f"doubled or out of order: {heard}"
    return len(heard) + missed == total


async def read_slowly(lab: Lab) -> None:
    """The peer takes two events' worth and stops; ten are published; then it reads on."""
    lab.begin()
    connection = lab.connect(window=400, timeout=1000)
    async with trio.open_nursery() as request:
        request.start_soon(lab.stream, connection)
        await wait_all_tasks_blocked()
        await lab.publish_one_by_one(TOTAL)
        while True:
            await wait_all_tasks_blocked()
            if not connection.in_flight:
                break
            connection.read(150)
        request.cancel_scope.cancel()
    if lab.settings.overflow == "disconnect" and lab.settings.history < TOTAL:
        assert connection.events[-1].event == "goodbye"
    else:
        assert told_of_all(connection, TOTAL), f"heard {discoveries(connection)}"


@POLICIES
async def test_a_slow_client_that_is_cancelled_at_any_step_was_never_there(
    settings: dict[str, Any], autojump_clock: MockClock
) -> None:
    lab = Lab(buffer=2, **settings)

    async def scenario() -> None:
        await read_slowly(lab)

    report = await cancel_at_every_step(scenario, check=lab.check)
    assert report.steps > 30


@POLICIES
async def test_a_slow_client_that_hangs_up_at_any_step_was_never_there(
    settings: dict[str, Any], autojump_clock: MockClock
) -> None:
    lab = Lab(buffer=2, **settings)

    async def scenario() -> None:
        lab.begin()
        connection = lab.connect(window=400, timeout=1000)
        async with trio.open_nursery() as requests:
            requests.start_soon(lab.stream, connection)
            await wait_all_tasks_blocked()
            await lab.publish_one_by_one(TOTAL)
            connection.read(300)
            await wait_all_tasks_blocked()
            connection.hang_up()
            lab.publish()
        assert not lab.hub.clients, "nobody cancelled it: it has ended by itself"

    await act_at_every_step(scenario, lambda: lab.connections[0].hang_up(), check=lab.check)


@POLICIES
async def test_a_slow_client_is_told_of_everything_however_late_it_is_served(
    settings: dict[str, Any], autojump_clock: MockClock
) -> None:
    lab = Lab(buffer=2, keepalive_interval=30, **settings)

    async def scenario() -> None:
        await read_slowly(lab)

    await delay_at_every_step(scenario, 30, check=lab.check)
