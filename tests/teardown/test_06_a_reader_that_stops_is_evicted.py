"""6. A reader that stops reading is gone when its time is up, with all that was kept for it.

The guarantee: a write makes progress or ends. Nobody else waits meanwhile, and nothing stays behind, however the
eviction meets with a drain, a publisher, or the peer's own end.

Here a peer's window is a number and the clock is trio's mock clock, so that "when its time is up" is exact. What the
kernel makes of it is in 11 and 12.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
from teardown.lab import Lab, discoveries
from trio.testing import MockClock, wait_all_tasks_blocked

from sse_trio.testing import act_at_every_step, cancel_at_every_step, raise_at_every_step

TIMEOUT = 10.0

DIRECT = pytest.mark.parametrize("direct", [True, False], ids=["write-first", "through-the-channel"])


async def stall(lab: Lab, *, direct: bool) -> None:
    """One peer stops reading, another reads; ten discoveries are published."""
    lab.begin()
    stalled = lab.connect(window=300, direct=direct, timeout=TIMEOUT)
    healthy = lab.connect(direct=direct)
    began = trio.current_time()
    async with trio.open_nursery() as requests:
        requests.start_soon(lab.stream, healthy)
        async with trio.open_nursery() as request:
            request.start_soon(lab.stream, stalled)
            await wait_all_tasks_blocked()
            await lab.publish_one_by_one(10)
            assert discoveries(healthy) == list(range(1, 11)), "the healthy one waits for nobody"
        await trio.lowlevel.checkpoint()  # cancelled, it is not the eviction that ended the request
        assert trio.current_time() - began == TIMEOUT
        assert lab.hub.disconnects == {"stalled": 1}
        assert len(lab.hub.clients) == 1
        requests.cancel_scope.cancel()


@DIRECT
async def test_a_reader_that_stops_is_gone_after_exactly_the_timeout_and_may_be_cancelled_before(
    direct: bool, autojump_clock: MockClock
) -> None:
    lab = Lab(buffer=4)

    async def scenario() -> None:
        await stall(lab, direct=direct)

    report = await cancel_at_every_step(scenario, check=lab.check)
    assert report.steps > 20


def hang_up(lab: Lab) -> None:
    lab.connections[0].hang_up()


def drain(lab: Lab) -> None:
    lab.hub.drain("shutdown")


@DIRECT
@pytest.mark.parametrize("strike", [hang_up, drain])
async def test_an_eviction_may_meet_at_any_step_with(
    strike: Callable[[Lab], None], direct: bool, autojump_clock: MockClock
) -> None:
    lab = Lab(buffer=4)

    async def scenario() -> None:
        lab.begin()
        connection = lab.connect(window=300, direct=direct, timeout=TIMEOUT)
        began = trio.current_time()
        async with trio.open_nursery() as request:
            request.start_soon(lab.stream, connection)
            await wait_all_tasks_blocked()
            await lab.publish_one_by_one(5)
        assert trio.current_time() - began <= TIMEOUT

    await act_at_every_step(scenario, lambda: strike(lab), check=lab.check)


async def test_a_failure_at_any_await_of_one_stream_ends_that_stream_and_nothing_else(
    autojump_clock: MockClock,
) -> None:
    """The injected error stands for a bug of ours. Whom it hits is gone; the other hears everything."""
    lab = Lab()
    failed: list[Exception] = []

    async def scenario() -> None:
        lab.begin()
        failed.clear()
        connections = [lab.connect(direct=False), lab.connect(direct=False)]

        async def serve(index: int) -> None:
            try:
                await lab.stream(connections[index])
            except ZeroDivisionError as error:
                failed.append(error)  # the server's task group does the same: it logs it, and goes on

        async with trio.open_nursery() as requests:
            requests.start_soon(serve, 0)
            requests.start_soon(serve, 1)
            await wait_all_tasks_blocked()
            await lab.publish_one_by_one(3)
            assert len(lab.hub.clients) == 2 - len(failed)
            requests.cancel_scope.cancel()
        complete = [discoveries(connection) == [1, 2, 3] for connection in connections]
        assert sum(complete) >= 2 - len(failed)

    await raise_at_every_step(scenario, lambda: ZeroDivisionError("a bug"), check=lab.check)


async def test_at_capacity_the_refused_are_never_registered(autojump_clock: MockClock) -> None:
    lab = Lab(max_connections=1)

    async def scenario() -> None:
        lab.begin()
        async with trio.open_nursery() as requests:
            requests.start_soon(lab.stream, lab.connect())
            await wait_all_tasks_blocked()
            await lab.stream(lab.connect())
            assert lab.hub.disconnects["capacity"] == 1
            requests.cancel_scope.cancel()

    await cancel_at_every_step(scenario, check=lab.check)
