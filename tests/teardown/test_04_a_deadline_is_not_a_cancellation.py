"""4. A deadline that has passed is not a wait that was in vain: ask `cancelled_caught`, never `cancel_called`.

The guarantee: however late the machine is, a frame that arrived is delivered.

The trap: a keep-alive is a receive with a deadline. When the frame arrives just before the deadline passes, the receive
returns it, and `scope.cancel_called` is true all the same, since the deadline has passed by the time it is asked. Both
SSE servers that were read for this project ask just that (sse-starlette 3.4.5, `sse.py:368`; Parsec's
`server/parsec/asgi/rpc.py:1019`) and throw the frame away as "silence". `cancelled_caught` says whether the block was
really left by this scope. (In asyncio: whether TimeoutError was caught, not what time it is by now.)

No cancellation shows it. So here time is what strikes, at every step.
"""

from __future__ import annotations

import pytest
import trio
from teardown.lab import Lab, discoveries
from trio.testing import MockClock, wait_all_tasks_blocked

from sse_trio.client import Client
from sse_trio.connection import Connection
from sse_trio.stream import EventStream
from sse_trio.testing import TeardownError, cancel_at_every_step, delay_at_every_step

SILENCE = 30.0


async def listen(lab: Lab) -> None:
    """Three discoveries, with and without silence between them, through the channel."""
    lab.begin()
    connection = lab.connect(direct=False)
    async with trio.open_nursery() as request:
        request.start_soon(lab.stream, connection)
        await wait_all_tasks_blocked()
        await lab.publish_one_by_one(2)
        await trio.sleep(SILENCE + 1)
        await lab.publish_one_by_one(1)
        request.cancel_scope.cancel()
    assert discoveries(connection) == [1, 2, 3], f"heard only {discoveries(connection)} of three"
    assert b": keep-alive\n" in connection.in_flight


async def test_a_frame_that_comes_just_in_time_is_delivered_however_late_it_is_by_then(
    autojump_clock: MockClock,
) -> None:
    lab = Lab(keepalive_interval=SILENCE)

    async def scenario() -> None:
        await listen(lab)

    report = await delay_at_every_step(scenario, SILENCE, check=lab.check, within=1000)
    assert report.steps > 10


class CancelCalled(EventStream):
    """The same loop, with the wrong question."""

    async def _park(self, client: Client, connection: Connection) -> bool:
        with trio.move_on_at(client.wrote_at + self.settings.keepalive_interval) as scope:
            frame = await client.receive_channel.receive()
        if scope.cancel_called:
            await self._keep_alive(client, connection, self.broadcaster.filler(client))
        else:
            client._pending = frame
        return True


async def test_the_harness_rejects_cancel_called_when_time_strikes_and_only_then(autojump_clock: MockClock) -> None:
    lab = Lab(stream=CancelCalled, keepalive_interval=SILENCE)

    async def scenario() -> None:
        await listen(lab)

    await cancel_at_every_step(scenario, check=lab.check)
    with pytest.raises(TeardownError, match=r"delayed by 30 s at step .* of three"):
        await delay_at_every_step(scenario, SILENCE, check=lab.check, within=1000)
