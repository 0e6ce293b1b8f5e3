"""9. The application may be cancelled at any step of its start: in the middle of connecting to NATS, too.

The guarantee: below the feed lies asyncio (NATS's client needs it), in one block of one module. Wherever the
cancellation lands while that is built up, served or taken down, it leaves no asyncio task, no socket and no thread.

The trap: a cancelled `await` of a coroutine that belongs to asyncio cancels what runs there, and whoever forgets to wait
for its end leaves a task that writes to a closed transport later. The pattern: one loop for one connection, and the
block ends when everything in it has ended, in a shield with a deadline.

The nats-server is a real one, and so is the clock: the steps differ a little from run to run, and each of them is tried
once.
"""

from __future__ import annotations

import asyncio
import gc
import os

import pytest
import trio
from support import NatsServer, eventually, payload

from sse_trio.application import App
from sse_trio.broadcaster import Broadcaster
from sse_trio.nats_feed import NatsFeed
from sse_trio.settings import Settings
from sse_trio.testing import cancel_at_every_step


def sockets() -> int:
    """How many sockets and event queues this process has open."""
    found = 0
    for number in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{number}").startswith(("socket:", "anon_inode:"))
        except FileNotFoundError:
            pass  # the directory itself, as it was read
    return found


def asyncio_tasks() -> list[object]:
    return [one for one in gc.get_objects() if isinstance(one, asyncio.Task) and not one.done()]


class Process:
    """What this process had open before, and whether it is so again."""

    def __init__(self) -> None:
        self.sockets = sockets()

    def check(self) -> None:
        assert sockets() == self.sockets, "a socket is open"
        assert asyncio_tasks() == [], "asyncio has a task left"


@pytest.fixture(params=["core NATS", "JetStream"])
async def settings(request: pytest.FixtureRequest, nats: NatsServer) -> Settings:
    await trio.to_thread.run_sync(int)  # what trio opens once, for its first thread
    return Settings(nats_url=(nats.url,), nats_durable="off" if request.param == "core NATS" else "require")


async def test_a_feed_that_is_cancelled_at_any_step_from_connecting_to_its_first_event_leaves_nothing(
    settings: Settings, nats: NatsServer
) -> None:
    process = Process()

    async def scenario() -> None:
        broadcaster = Broadcaster(settings)
        feed = NatsFeed(settings, broadcaster)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(feed.run)
            await feed.first_attempt.wait()
            head = broadcaster.head
            await nats.publish(("discoveries.insights", payload()))
            await eventually(lambda: broadcaster.head > head, "the event is there")
            nursery.cancel_scope.cancel()

    report = await cancel_at_every_step(scenario, check=process.check, seeds=None, within=30)
    assert report.steps > 50


async def test_an_application_that_is_cancelled_at_any_step_of_its_start_leaves_nothing(settings: Settings) -> None:
    app = App(settings)
    process = Process()

    async def scenario() -> None:
        said = trio.Event()

        async def receive() -> dict[str, str]:
            if asked:
                await said.wait()
            asked.append(True)
            return {"type": "lifespan.startup"}

        async def send(message: dict[str, str]) -> None:
            said.set()

        asked: list[bool] = []
        await app({"type": "lifespan", "asgi": {}, "state": {}}, receive, send)  # type: ignore[arg-type]

    report = await cancel_at_every_step(scenario, check=process.check, seeds=None, within=30)
    assert report.steps > 50
