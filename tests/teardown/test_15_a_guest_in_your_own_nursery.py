"""15. The application runs in anybody's nursery, and when that is cancelled nothing of it is left.

The guarantee: no task, no descriptor, no thread, no asyncio task, no child process. Not after a while: when the nursery's
block has ended.

This is structured concurrency's promise, and one detached helper anywhere below breaks it for everybody above. So the
test looks from outside, at what the operating system knows of this process.
"""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import hypercorn.trio
import pytest
import trio
from hypercorn.config import Config
from support import NatsServer, eventually, free_port, payload
from teardown.house import crowd, is_full, note

from sse_trio.application import App, create_app
from sse_trio.server import bind_socket, run_app
from sse_trio.settings import Settings
from sse_trio.testing import assert_nothing_left, living_tasks

WRITE_TIMEOUT = 3.0


def descriptors() -> dict[str, str]:
    """This process's open files, by number."""
    found = {}
    for number in os.listdir("/proc/self/fd"):
        try:
            found[number] = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:
            pass  # the directory itself, as it was read
    return found


def threads() -> set[str]:
    """Trio keeps idle threads for ten seconds, to use them again: they are its own, and hold nothing."""
    return {thread.name for thread in threading.enumerate() if not thread.name.startswith("Trio thread")}


def children() -> set[str]:
    found: set[str] = set()
    for task in Path("/proc/self/task").iterdir():
        found.update((task / "children").read_text().split())
    return found


def asyncio_tasks() -> list[object]:
    gc.collect()
    return [one for one in gc.get_objects() if isinstance(one, asyncio.Task) and not one.done()]


@asynccontextmanager
async def nothing_left() -> AsyncIterator[None]:
    """When the block has ended, this process is as it was before."""
    await trio.to_thread.run_sync(int)  # what trio opens once, for its first thread
    tasks, files, own_threads, own_children = living_tasks(), descriptors(), threads(), children()
    yield
    assert_nothing_left(tasks)
    assert descriptors() == files
    assert threads() == own_threads
    assert children() == own_children
    assert asyncio_tasks() == []


async def by_our_server(app: App, port: int, task_status: trio.TaskStatus[object]) -> None:
    with bind_socket(f"127.0.0.1:{port}") as bound:
        await run_app(app, bound, trio.Event(), task_status=task_status)


async def by_hypercorn(app: App, port: int, task_status: trio.TaskStatus[object]) -> None:
    config = Config()
    config.bind = [f"127.0.0.1:{port}"]
    config.errorlog = None
    await hypercorn.trio.serve(app, config, shutdown_trigger=trio.sleep_forever, task_status=task_status)


Serve = Callable[..., Awaitable[None]]
SERVERS = pytest.mark.parametrize("serve", [by_our_server, by_hypercorn], ids=["run_app", "hypercorn.trio.serve"])


def app_for(url: str) -> App:
    return create_app(Settings(nats_url=(url,), write_timeout=WRITE_TIMEOUT, nats_durable="off"))


@SERVERS
async def test_cancelled_with_streams_open_and_readers_stalled_it_leaves_nothing(
    serve: Serve, core_nats: NatsServer
) -> None:
    port = free_port()
    app = app_for(core_nats.url)
    async with nothing_left(), trio.open_nursery() as outside:

        async def run(task_status: trio.TaskStatus[trio.CancelScope]) -> None:
            async with trio.open_nursery() as nursery:
                await nursery.start(serve, app, port)
                task_status.started(nursery.cancel_scope)

        scope = await outside.start(run)
        await eventually(lambda: app.feed.status.live, "the feed is live")
        async with crowd(port, healthy=10, stalled=3) as clients:
            flood = [("discoveries.insights", payload(n, content=f"{n} ".ljust(8000, "x"))) for n in range(100)]
            await core_nats.publish(*flood)
            await eventually(lambda: all(map(is_full, clients.stalled)), "the stalled ones take no more")
            began = trio.current_time()
            scope.cancel()
            await eventually(lambda: not outside.child_tasks, "the application has ended")
            note("cancel of the whole app, 10 streams and 3 stalled", trio.current_time() - began, WRITE_TIMEOUT)
        assert not app.broadcaster.clients


@SERVERS
async def test_cancelled_while_it_looks_for_nats_it_leaves_nothing(serve: Serve) -> None:
    async with nothing_left():
        app = app_for(f"nats://127.0.0.1:{free_port()}")
        with trio.move_on_after(1):
            async with trio.open_nursery() as nursery:
                await nursery.start(serve, app, free_port())
                await trio.sleep_forever()


@SERVERS
async def test_cancelled_idle_it_leaves_nothing_and_can_be_run_again(serve: Serve, core_nats: NatsServer) -> None:
    app = app_for(core_nats.url)
    for _ in range(3):
        async with nothing_left(), trio.open_nursery() as nursery:
            await nursery.start(serve, app, free_port())
            await eventually(lambda: app.feed.status.live, "the feed is live")
            nursery.cancel_scope.cancel()
