"""2. Publishing never waits, never fails because of a client, and nobody notices when one leaves in the middle of it.

The guarantee: `publish` is a plain function. It offers each client what there is and goes on; who cannot take it is
that client's own affair. So one client's end, however untimely, is invisible to all the others.

The trap: a broadcaster that awaits each client in turn (go-sse's `joe.go:87`, r3labs/sse before its PR 192) is as fast
as its slowest reader, and a cancelled reader takes the publisher's await along.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence

import pytest
import trio
from teardown.lab import Lab, discoveries
from trio.testing import MockClock, assert_no_checkpoints, wait_all_tasks_blocked

from sse_trio import broadcaster
from sse_trio.audience import Audience
from sse_trio.broadcaster import Broadcaster
from sse_trio.client import Client
from sse_trio.history import Batch
from sse_trio.testing import TeardownError, act_at_every_step, cancel_part_at_every_step

DIRECT = pytest.mark.parametrize("direct", [True, False], ids=["write-first", "through-the-channel"])


@DIRECT
@pytest.mark.parametrize("cursor", [None, "e-0"], ids=["new", "resuming"])
async def test_a_discovery_that_is_published_at_any_step_of_a_connect_is_heard_once_and_in_order(
    cursor: str | None, direct: bool, autojump_clock: MockClock
) -> None:
    lab = Lab()

    async def scenario() -> None:
        lab.begin()
        lab.publish(3)
        connection = lab.connect(direct=direct)
        async with trio.open_nursery() as request:
            request.start_soon(lab.stream, connection, cursor)
            await wait_all_tasks_blocked()
            await lab.publish_one_by_one(2)
            total = lab.sequence
            lab.hub.drain("shutdown")  # which writes what is queued, and ends the stream
        place = int(connection.events[0].id.removeprefix("e-"))
        assert cursor is None or place == 0
        assert discoveries(connection) == list(range(place + 1, total + 1))

    report = await act_at_every_step(scenario, lab.publish, check=lab.check)
    assert report.steps > 8


def one_of_three_leaves(lab: Lab, direct: bool = True) -> Callable[[trio.CancelScope], Awaitable[None]]:
    """Three listen, the second may be cancelled; the others hear everything."""

    async def scenario(leaving: trio.CancelScope) -> None:
        lab.begin()
        connections = [lab.connect(direct=direct) for _ in range(3)]

        async def leave() -> None:
            with leaving:
                await lab.stream(connections[1])

        async with trio.open_nursery() as requests:
            requests.start_soon(lab.stream, connections[0])
            requests.start_soon(leave)
            requests.start_soon(lab.stream, connections[2])
            await wait_all_tasks_blocked()
            for _ in range(4):
                lab.sequence += 1
                lab.hub.publish([lab.event(lab.sequence)])
                await trio.lowlevel.checkpoint()
                while lab.hub.deliver():
                    await trio.lowlevel.checkpoint()
            await wait_all_tasks_blocked()
            requests.cancel_scope.cancel()
        assert discoveries(connections[0]) == discoveries(connections[2]) == [1, 2, 3, 4]

    return scenario


@DIRECT
async def test_one_of_three_may_leave_at_any_step_of_a_round_and_the_others_hear_everything(
    direct: bool, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A round is served in slices; with one client in each, somebody always leaves in the middle of one.
    monkeypatch.setattr(broadcaster, "SLICE", 1)
    lab = Lab()
    report = await cancel_part_at_every_step(one_of_three_leaves(lab, direct), check=lab.check)
    assert report.steps > 20


@DIRECT
async def test_one_of_two_may_hang_up_at_any_step_and_the_other_hears_everything(
    direct: bool, autojump_clock: MockClock
) -> None:
    lab = Lab()

    async def scenario() -> None:
        lab.begin()
        leaver, stayer = lab.connect(direct=direct), lab.connect(direct=direct)
        async with trio.open_nursery() as requests:
            requests.start_soon(lab.stream, leaver)
            requests.start_soon(lab.stream, stayer)
            await wait_all_tasks_blocked()
            await lab.publish_one_by_one(2)
            leaver.hang_up()
            await lab.publish_one_by_one(1)
            assert len(lab.hub.clients) == 1, "with the next event it is gone"
            requests.cancel_scope.cancel()
        assert discoveries(stayer) == [1, 2, 3]

    await act_at_every_step(scenario, lambda: lab.connections[0].hang_up(), check=lab.check)


@DIRECT
@pytest.mark.parametrize("cursor", [None, "e-1", "e-0"], ids=["new", "nearly there", "far behind"])
async def test_one_who_comes_at_any_step_of_a_round_hears_everything_once(
    cursor: str | None, direct: bool, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round goes to those who were there when it began; who joins in the middle of it is at its end already."""
    monkeypatch.setattr(broadcaster, "SLICE", 1)
    lab = Lab()
    here = trio.Event()

    async def scenario() -> None:
        nonlocal here
        here = trio.Event()
        lab.begin()
        lab.publish()
        late = lab.connect(direct=direct)

        async def come() -> None:
            await here.wait()
            await lab.stream(late, cursor)

        async with trio.open_nursery() as requests:
            requests.start_soon(come)
            for _ in range(3):
                requests.start_soon(lab.stream, lab.connect(direct=direct))
            await wait_all_tasks_blocked()
            for _ in range(3):
                lab.sequence += 1
                lab.hub.publish([lab.event(lab.sequence)])
                await trio.lowlevel.checkpoint()
                while lab.hub.deliver():
                    await trio.lowlevel.checkpoint()
            here.set()
            await wait_all_tasks_blocked()
            lab.hub.drain("shutdown")
        place = int(late.events[0].id.removeprefix("e-"))
        assert discoveries(late) == list(range(place + 1, lab.sequence + 1))

    await act_at_every_step(scenario, lambda: here.set(), check=lab.check)


async def test_publishing_is_no_place_where_anything_else_could_run(autojump_clock: MockClock) -> None:
    lab = Lab(buffer=2)
    hub = lab.begin()
    with hub.subscribe("full"), hub.subscribe("full too"), assert_no_checkpoints():
        lab.publish(50)
    lab.hub.disconnects["left"] += 2
    lab.check()


# -- and now wrongly ---------------------------------------------------------------------------------------------------


class OverTheLivingRegistry(Broadcaster):
    """Iterates over the clients themselves, not over a copy: "dictionary changed size during iteration"."""

    def _serve(self, audiences: Sequence[Audience[Client]], frames: int) -> Iterator[None]:
        for audience in audiences:
            batch = audience.begin()
            for client in audience.standing:
                if batch is not None:
                    client.offer(batch, trio.current_time())
                yield


class ClosesFirst(Broadcaster):
    """Serves a round to those who were there when it began, without asking whether they still are."""

    @staticmethod
    def _offer(batch: Batch, clients: list[Client], now: float) -> int:
        for client in clients:
            for frame in batch.frames:
                client.send_channel.send_nowait(frame)
        return 0


@pytest.mark.parametrize(
    ("mistake", "complaint"),
    [
        (OverTheLivingRegistry, "RuntimeError.*dictionary changed size during iteration"),
        (ClosesFirst, "ClosedResourceError"),
    ],
)
async def test_the_harness_rejects(
    mistake: type[Broadcaster], complaint: str, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broadcaster, "SLICE", 1)
    lab = Lab(hub=mistake)
    with pytest.raises(TeardownError, match=f"cancelled in part at step .* the scenario raised .*{complaint}"):
        await cancel_part_at_every_step(one_of_three_leaves(lab, direct=False), check=lab.check)
