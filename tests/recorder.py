"""A broadcaster that keeps what the feed does to it, and holds the feed to the contract while it does.

Its methods are those of the real one (a test compares them); every broken promise is an AssertionError in the feed,
which must come out of `NatsFeed.run`.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import trio
from support import WITHIN, NatsServer, eventually, payload

from sse_trio.discovery import Discovery
from sse_trio.nats_connection import NatsConnection, open_connection
from sse_trio.nats_feed import NatsFeed
from sse_trio.settings import Settings

Event = tuple[int, str, Discovery]


class Recorder:
    """What was published, in order, gaps and epochs included."""

    def __init__(self, *, slices: int = 0) -> None:
        """Each round takes `slices` more calls of `deliver`."""
        self.epoch: str | None = None
        self.head = 0
        self.live = False
        self.durable = False
        self.events: list[Event] = []
        self.rounds: list[int] = []
        self.notices: list[tuple[object, ...]] = []
        """("epoch", epoch, head), ("live", head), ("gap", reason, sequence), as they came."""
        self.blocked = False
        """While true, a round is never finished."""
        self._slices = slices
        self._left = 0

    def open_epoch(self, epoch: str, head: int, *, durable: bool = False) -> None:
        assert re.fullmatch(r"[a-z0-9]+", epoch), epoch
        self.epoch, self.head, self.durable = epoch, head, durable
        self.notices.append(("epoch", epoch, head))

    def publish(self, events: Sequence[Event], head: int | None = None, *, received_at: float = 0.0) -> None:
        assert self.epoch is not None, "open_epoch comes first"
        assert self._left == 0, "a round begins after the last was delivered"
        assert not events or received_at > 0
        for event in events:
            assert event[0] > self.head, "sequences ascend"
            self.head = event[0]
            self.events.append(event)
        if head is not None:
            assert head >= self.head, "the head never goes back"
            self.head = head
        if events:
            self.rounds.append(len(events))
            self._left = self._slices

    def deliver(self) -> bool:
        self._left = max(self._left - 1, 0)
        return (self.blocked and bool(self.events)) or self._left > 0

    def go_live(self) -> None:
        if not self.live:
            self.live = True
            self.notices.append(("live", self.head))

    def gap(self, reason: str, sequence: int) -> None:
        assert self.epoch is not None, "open_epoch comes first"
        assert sequence > self.head, "a gap stands above the head"
        self.head = sequence
        self.notices.append(("gap", reason, sequence))

    @property
    def numbers(self) -> list[int]:
        """What the discoveries call themselves (see `support.payload`)."""
        return [number_of(discovery) for _, _, discovery in self.events]

    @property
    def sequences(self) -> list[int]:
        return [sequence for sequence, _, _ in self.events]

    @property
    def gaps(self) -> list[tuple[str, int]]:
        return [(str(notice[1]), int(str(notice[2]))) for notice in self.notices if notice[0] == "gap"]

    def holes(self) -> list[int]:
        """Where numbers are missing (the discoveries count on from each other): the index of the event behind."""
        numbers = self.numbers
        return [index for index in range(1, len(numbers)) if numbers[index] != numbers[index - 1] + 1]

    def gap_places(self) -> list[int]:
        """Where the gaps stand: the index of the event behind."""
        return [bisect_right(self.sequences, sequence) for _, sequence in self.gaps]

    @property
    def epochs(self) -> list[tuple[object, ...]]:
        return [notice[1:] for notice in self.notices if notice[0] == "epoch"]

    async def hears(self, number: int, within: float = WITHIN) -> None:
        """Wait until the discovery that calls itself so was published."""
        await eventually(
            lambda: self.events and number in self.numbers[-5000:], f"discovery {number} is published", within
        )


def number_of(discovery: Discovery) -> int:
    return int(discovery.content.split()[-1])


@asynccontextmanager
async def running(
    url: str | NatsServer, recorder: Recorder | None = None, *, feed: NatsFeed | None = None, **settings: Any
) -> AsyncIterator[tuple[NatsFeed, Recorder]]:
    """A feed that runs, and what it publishes to; it is cancelled when the block ends."""
    recorder = Recorder() if recorder is None else recorder
    if feed is None:
        urls = tuple((url if isinstance(url, str) else url.url).split(","))
        feed = NatsFeed(Settings(nats_url=urls, **settings), recorder)
    async with trio.open_nursery() as nursery:
        await nursery.start(feed.run)
        yield feed, recorder
        nursery.cancel_scope.cancel()


async def live(feed: NatsFeed, within: float = WITHIN) -> None:
    await eventually(lambda: feed.status.live, f"the feed is live; it is {feed.status}", within)


async def down(feed: NatsFeed, reason: str, within: float = WITHIN) -> None:
    await eventually(
        lambda: not feed.status.live and feed.status.reason == reason, f"down for {reason}; it is {feed.status}", within
    )


@asynccontextmanager
async def fake_server(serve: Callable[[trio.SocketStream], Awaitable[None]]) -> AsyncIterator[str]:
    """The URL of a server that treats each connection with `serve`; a client may break it off at any moment."""

    async def handle(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):  # a connection that is given up with bytes unread is reset
            await serve(stream)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, handle, 0, host="127.0.0.1"))
        yield f"nats://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def operator(server: NatsServer) -> AsyncIterator[Operator]:
    """Somebody else who uses the same server."""
    async with open_connection(server.url) as connection:
        yield Operator(connection)


STORE_FAILED = 10049
"""JetStream's error for a stream whose files cannot be made: the server still removes those of one with the same name."""


class Operator:
    """Does to streams what operators and other programs do."""

    def __init__(self, connection: NatsConnection) -> None:
        self.connection = connection

    async def _ask(self, operation: str, request: object) -> dict[str, Any]:
        body = json.dumps(request).encode() if request is not None else b""
        answer: dict[str, Any] = json.loads((await self.connection.request(f"$JS.API.{operation}", body)).payload)
        return answer

    async def api(self, operation: str, request: object = None) -> dict[str, Any]:
        answer = await self._ask(operation, request)
        assert "error" not in answer, answer
        return answer

    async def create_stream(self, **config: Any) -> dict[str, Any]:
        defaults = {"name": "DISCOVERIES", "subjects": ["discoveries.>"], "storage": "file", "allow_direct": True}
        answer: dict[str, Any] = {}

        async def answered() -> bool:
            nonlocal answer
            answer = await self._ask(f"STREAM.CREATE.{config.get('name', 'DISCOVERIES')}", defaults | config)
            return bool(answer.get("error", {}).get("err_code") != STORE_FAILED)

        await eventually(answered, "the files of a stream that was deleted a moment ago are out of the way")
        assert "error" not in answer, answer
        return answer

    async def update_stream(self, **changes: Any) -> dict[str, Any]:
        config = (await self.api("STREAM.INFO.DISCOVERIES"))["config"]
        return await self.api("STREAM.UPDATE.DISCOVERIES", config | changes)

    async def share(self, *numbers: int, subject: str = "discoveries.insights", **changes: Any) -> None:
        """Publish discoveries that call themselves so; the stream has them on return."""
        *first, last = numbers
        for number in first:
            await self.connection.publish(subject, payload(number, **changes))
        # The stream acknowledges in order, so it has those before, too.
        await self.store(subject, payload(last, **changes))

    async def store(self, subject: str, data: bytes, **headers: str) -> int:
        """Publish with acknowledgement; the sequence."""
        answer = await self.connection.request(subject, data, headers=headers or None)
        return int(json.loads(answer.payload)["seq"])
