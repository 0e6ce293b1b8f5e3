"""The bench of the teardown lab: a real broadcaster and real streams, clients without sockets, and one check for all.

`Lab.check` is what "clean" means in this folder. It runs at the very moment at which a scenario has ended:

* the registry is empty, and so is everything else in which the broadcaster keeps clients;
* both ends of every channel that was ever opened are closed, nothing is in them, nobody waits at them;
* every stream that was counted in was counted out, once, with a reason.

That no task and no async generator is left, `sse_trio.testing` sees to by itself.
"""

from __future__ import annotations

from typing import Any

import trio
from memory_connection import MemoryConnection
from support import payload
from trio.testing import wait_all_tasks_blocked

from sse_trio.broadcaster import Broadcaster, Event
from sse_trio.client import Client
from sse_trio.discovery import decode
from sse_trio.limits import Limits
from sse_trio.settings import Settings
from sse_trio.stream import EventStream
from sse_trio.testing import channel_is_closed


class Registry(dict[str, Client]):
    """The registry, with a memory: every client that was ever in it."""

    def __init__(self) -> None:
        super().__init__()
        self.ever: list[Client] = []

    def __setitem__(self, key: str, client: Client) -> None:
        super().__setitem__(key, client)
        self.ever.append(client)


class Lab:
    """One bench: `begin` makes everything new for a run, `check` says whether all of it is gone."""

    def __init__(
        self, *, hub: type[Broadcaster] = Broadcaster, stream: type[EventStream] = EventStream, **settings: Any
    ) -> None:
        """`hub` and `stream` are the classes under test: the real ones, or wrong ones that must be rejected."""
        self.settings = Settings(**settings)
        self._hub = hub
        self._stream = stream
        self.registry = Registry()
        self.connections: list[MemoryConnection] = []

    def begin(self, *, durable: bool = False, live: bool = True) -> Broadcaster:
        """A broadcaster in its first epoch, which is `e`."""
        self.hub = self._hub(self.settings)
        self.hub.clients = self.registry = Registry()
        self.limits = Limits(self.settings, timer=trio.current_time)
        self.connections = []
        self.sequence = 0
        self.hub.open_epoch("e", 0, durable=durable)
        if live:
            self.hub.go_live()
        return self.hub

    def connect(self, window: float = float("inf"), *, direct: bool = True, timeout: float = 10.0) -> MemoryConnection:
        """A peer that takes `window` bytes without reading."""
        connection = MemoryConnection(window, direct=direct, timeout=timeout)
        self.connections.append(connection)
        return connection

    async def stream(self, connection: MemoryConnection, cursor: str | None = None, **options: Any) -> None:
        """One request, as the application serves it: the response is made, some time passes, it is written."""
        response = self._stream(
            self.hub,
            self.settings,
            agent_id="agent",
            cursor=cursor,
            admit=lambda: self.limits.admit("127.0.0.1", None),
            **options,
        )
        await trio.lowlevel.checkpoint()
        await response.respond(connection)

    @staticmethod
    def event(sequence: int) -> Event:
        return sequence, "discoveries.insights", decode(payload(sequence))

    def publish(self, count: int = 1) -> None:
        """The next `count` discoveries, in one round."""
        events = [self.event(self.sequence + number) for number in range(1, count + 1)]
        self.sequence += count
        self.hub.publish(events)
        while self.hub.deliver():
            pass

    async def publish_one_by_one(self, count: int) -> None:
        """The next discoveries, each when the last one has gone as far as it goes."""
        for _ in range(count):
            self.publish()
            await wait_all_tasks_blocked()

    def check(self) -> None:
        hub, registry = self.hub, self.registry
        assert not hub.clients, f"in the registry: {list(hub.clients.values())}"
        assert not hub._audiences, f"an audience is left: {list(hub._audiences)}"
        assert not hub._waiting_for_head, f"waiting for the head: {hub._waiting_for_head}"
        for client in registry.ever:
            for channel in (client.send_channel, client.receive_channel):
                assert channel_is_closed(channel.statistics()), f"the channel of {client} is open"
            assert not client.live, f"{client} would still be offered something"
        assert self.limits.statistics().connections == 0, "a stream is still counted"
        reasons = dict(hub.disconnects)
        reasons.pop("capacity", None)  # was never in
        assert sum(reasons.values()) == hub.connects, f"{hub.connects} came, but left: {reasons}"


def discoveries(connection: MemoryConnection) -> list[int]:
    """The sequences of the discoveries that the peer has got or could read now."""
    return [int(event.id.rpartition("-")[2]) for event in connection.events if event.event == "discovery"]


def names(connection: MemoryConnection) -> list[str]:
    return [event.event for event in connection.events]
