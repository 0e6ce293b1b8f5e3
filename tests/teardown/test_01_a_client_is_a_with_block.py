"""1. A client is in the registry exactly while a synchronous `with` block runs.

The guarantee: whatever ends a stream, wherever it stands, the moment it has ended the registry is as if the client had
never been there. The pattern is in `Broadcaster.subscribe`: membership in a dictionary needs no await, so the context
manager is a synchronous one, and cancellation, which is delivered at awaits only, has nowhere to land inside it.

The second half of this file is what proves the first: nine wrong ways to do the same, each seen in a real program,
each rejected. (The same parts put together rightly pass: what is rejected is the mistake.)
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from typing import Any

import pytest
import trio
from teardown.lab import Lab, discoveries
from trio.testing import MockClock, wait_all_tasks_blocked

from sse_trio.audience import EVERYTHING, Audience, Filter
from sse_trio.broadcaster import Broadcaster
from sse_trio.client import Client
from sse_trio.connection import Connection
from sse_trio.stream import EventStream
from sse_trio.testing import Report, TeardownError, cancel_at_every_step, raise_at_every_step


async def connect_and_listen(lab: Lab) -> None:
    """A client connects, hears two discoveries, and the request is cancelled, as it is when the peer leaves."""
    lab.begin()
    connection = lab.connect()
    async with trio.open_nursery() as request:
        request.start_soon(lab.stream, connection)
        await wait_all_tasks_blocked()
        await lab.publish_one_by_one(2)
        request.cancel_scope.cancel()


async def at_every_step(lab: Lab) -> Report:
    async def scenario() -> None:
        await connect_and_listen(lab)

    return await cancel_at_every_step(scenario, check=lab.check)


async def test_a_client_that_is_cancelled_at_any_step_was_never_there(autojump_clock: MockClock) -> None:
    report = await at_every_step(Lab())
    assert report.steps > 10, "it is a scenario worth the name"


async def test_a_client_that_resumes_and_is_cancelled_at_any_step_was_never_there(autojump_clock: MockClock) -> None:
    """Between registering and being live a resuming client reads history at its own pace: many more awaits."""
    lab = Lab(buffer=2, history=100)

    async def scenario() -> None:
        lab.begin()
        lab.publish(10)
        connection = lab.connect(window=400)
        async with trio.open_nursery() as request:
            request.start_soon(lab.stream, connection, "e-3")
            while discoveries(connection)[-1:] != [12]:
                await wait_all_tasks_blocked()
                connection.read()
                if lab.sequence < 12:
                    lab.publish()
            request.cancel_scope.cancel()
        assert discoveries(connection) == list(range(4, 13))

    report = await cancel_at_every_step(scenario, check=lab.check)
    assert report.steps > 20


async def test_a_client_whose_socket_fails_at_any_await_was_never_there(autojump_clock: MockClock) -> None:
    lab = Lab()

    async def scenario() -> None:
        await connect_and_listen(lab)

    await raise_at_every_step(scenario, lambda: trio.BrokenResourceError("injected"), check=lab.check)


async def test_a_client_that_meets_a_bug_of_ours_at_any_await_was_never_there(autojump_clock: MockClock) -> None:
    lab = Lab()

    async def scenario() -> None:
        await connect_and_listen(lab)

    await raise_at_every_step(scenario, lambda: ZeroDivisionError("injected"), check=lab.check)


# -- and now wrongly ---------------------------------------------------------------------------------------------------


def register(hub: Broadcaster, agent_id: str, filter: Filter) -> Client:
    """What `Broadcaster.subscribe` does on entry."""
    audience = hub._audiences.setdefault(filter, Audience(filter))
    client = Client(agent_id, audience, capacity=hub.settings.buffer, overflow=hub.settings.overflow)
    audience.enter(client)
    hub.clients[client.id] = client
    hub.connects += 1
    client.told = client.position = hub.head
    client.join()
    return client


def unregister(hub: Broadcaster, client: Client) -> None:
    """What it does on exit."""
    del hub.clients[client.id]
    audience = hub._audiences[client.filter]
    client.close()
    audience.leave(client)
    if not audience.size:
        del hub._audiences[client.filter]


class PutRight(Broadcaster):
    """What the wrong broadcasters below were meant to be."""

    @contextmanager
    def subscribe(self, agent_id: str, filter: Filter = EVERYTHING, **options: Any) -> Iterator[Client]:
        client = register(self, agent_id, filter)
        try:
            yield client
        finally:
            unregister(self, client)


class StreamPutRight(EventStream):
    """What the wrong streams below were meant to be."""

    async def _subscribed(self, connection: Connection) -> None:
        client = register(self.broadcaster, self.agent_id, self.filter)
        try:
            await connection.write(b": welcome\n")
            await self._serve(client, connection)
        finally:
            self.broadcaster.disconnects["left"] += 1
            unregister(self.broadcaster, client)


class NoFinally(Broadcaster):
    """Unregisters after the block, on the way that the author thought of. (The obvious one.)"""

    @contextmanager
    def subscribe(self, agent_id: str, filter: Filter = EVERYTHING, **options: Any) -> Iterator[Client]:
        client = register(self, agent_id, filter)
        yield client
        unregister(self, client)


class OnlyForErrors(Broadcaster):
    """`except Exception` for a `finally`: `trio.Cancelled` is a BaseException and passes by.

    Who comes from asyncio before Python 3.8 has learned it the other way round, where `CancelledError` was an
    Exception, and was swallowed by such lines.
    """

    @contextmanager
    def subscribe(self, agent_id: str, filter: Filter = EVERYTHING, **options: Any) -> Iterator[Client]:
        client = register(self, agent_id, filter)
        try:
            yield client
        except Exception:
            unregister(self, client)
            raise
        else:
            unregister(self, client)


class HalfForgotten(Broadcaster):
    """Takes the client out of the registry, and not out of its audience: a ghost that is published to for ever."""

    @contextmanager
    def subscribe(self, agent_id: str, filter: Filter = EVERYTHING, **options: Any) -> Iterator[Client]:
        client = register(self, agent_id, filter)
        try:
            yield client
        finally:
            del self.clients[client.id]
            client.close()


class ChannelForgotten(Broadcaster):
    """Leaves the channel to the garbage collector. Nothing warns of it: AnyIO's channels would, trio's do not."""

    @contextmanager
    def subscribe(self, agent_id: str, filter: Filter = EVERYTHING, **options: Any) -> Iterator[Client]:
        client = register(self, agent_id, filter)
        try:
            yield client
        finally:
            del self.clients[client.id]
            del self._audiences[client.filter]
            client.live = False


class Sweeper(Broadcaster):
    """The original broadcaster's way: a detached task that sleeps for an hour and then removes the client."""

    @contextmanager
    def subscribe(self, agent_id: str, filter: Filter = EVERYTHING, **options: Any) -> Iterator[Client]:
        client = register(self, agent_id, filter)

        async def sweep() -> None:
            await trio.sleep(3600)
            unregister(self, client)

        trio.lowlevel.spawn_system_task(sweep)
        yield client


class RegisteredOutside(EventStream):
    """Registers when the response is made, unregisters when its body ends: a body that never begins never ends.

    So does every framework in which the handler registers and an async generator unregisters: a generator that was
    never started runs no `finally`.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.client = register(self.broadcaster, self.agent_id, self.filter)

    async def _subscribed(self, connection: Connection) -> None:
        try:
            await self._serve(self.client, connection)
        finally:
            self.broadcaster.disconnects["left"] += 1
            unregister(self.broadcaster, self.client)


class AwaitInBetween(EventStream):
    """Writes the head between registering and the `try`: a peer that leaves while it is written stays for ever."""

    async def _subscribed(self, connection: Connection) -> None:
        client = register(self.broadcaster, self.agent_id, self.filter)
        await connection.write(b": welcome\n")
        try:
            await self._serve(client, connection)
        finally:
            self.broadcaster.disconnects["left"] += 1
            unregister(self.broadcaster, client)


class PoliteGoodbye(EventStream):
    """An `await` in the `finally`, without a shield: in a task that was cancelled it raises at once, and what stands
    below it never runs.

    The same line in asyncio works, most of the time: there a cancellation is delivered once, here it is a state.
    """

    async def _subscribed(self, connection: Connection) -> None:
        client = register(self.broadcaster, self.agent_id, self.filter)
        try:
            await self._serve(client, connection)
        finally:
            self.broadcaster.disconnects["left"] += 1
            await connection.write(b": goodbye\n")  # noqa: ASYNC102
            unregister(self.broadcaster, client)


class AsyncWithBlock(EventStream):
    """An async context manager where a synchronous one would do: it has somewhere for cancellation to land."""

    @asynccontextmanager
    async def subscription(self) -> AsyncIterator[Client]:
        client = register(self.broadcaster, self.agent_id, self.filter)
        try:
            yield client
        finally:
            self.broadcaster.disconnects["left"] += 1
            async with self.lock:  # noqa: ASYNC102
                unregister(self.broadcaster, client)

    async def _subscribed(self, connection: Connection) -> None:
        self.lock = trio.Lock()
        async with self.subscription() as client:
            await self._serve(client, connection)


def lab_with(part: type[Broadcaster] | type[EventStream]) -> Lab:
    return Lab(hub=part) if issubclass(part, Broadcaster) else Lab(stream=part)


@pytest.mark.parametrize("part", [PutRight, StreamPutRight])
async def test_the_harness_accepts(part: type[Broadcaster] | type[EventStream], autojump_clock: MockClock) -> None:
    report = await at_every_step(lab_with(part))
    assert report.steps > 10


@pytest.mark.parametrize(
    ("mistake", "complaint"),
    [
        (NoFinally, "in the registry"),
        (OnlyForErrors, "in the registry"),
        (HalfForgotten, "an audience is left"),
        (ChannelForgotten, "the channel of .* is open"),
        (Sweeper, "(?s)in the registry.*still running:\n  task .*Sweeper.*sweep"),
        (RegisteredOutside, "in the registry"),
        (AwaitInBetween, "in the registry"),
        (PoliteGoodbye, "in the registry"),
        (AsyncWithBlock, "in the registry"),
    ],
)
async def test_the_harness_rejects(
    mistake: type[Broadcaster] | type[EventStream], complaint: str, autojump_clock: MockClock
) -> None:
    with pytest.raises(TeardownError, match=complaint):
        await at_every_step(lab_with(mistake))


def subscription_of(hub: Broadcaster) -> AbstractContextManager[Client]:
    return hub.subscribe("agent")


async def test_the_subscription_is_a_synchronous_context_manager() -> None:
    """Said as a test, so that nobody makes it an async one by and by."""
    hub = Lab().begin()
    with subscription_of(hub) as client:
        assert list(hub.clients.values()) == [client]
    assert not hub.clients
