"""One SSE response, from its head to its goodbye; it owns the client's subscription.

Strategy: the response's task is a loop over one question, "what comes next for this client?", asked anew after each
write. The answers stand in one order, in `_serve`: the rest of a cut chunk, what is queued, the goodbye, a gap that is
due, the place of its cursor, what it has not caught up on; and only when there is nothing of all this does the task
park, and the publisher may write to the socket. Its lifetime and the end of its token are looked at each time round,
and are timers, as the keep-alive is, around whatever else may take long: the parking, and the stream's answers.

The subscription is a synchronous `with` block around all of it, and the write deadline is the connection's: so
whatever ends the task, the registry is as if this client had never been there.
"""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Protocol, TypeVar

import structlog
import trio
from quart.utils import encode_headers

from sse_trio import sse
from sse_trio.access import AtCapacity
from sse_trio.audience import EVERYTHING, Filter
from sse_trio.broadcaster import Broadcaster
from sse_trio.client import Client
from sse_trio.connection import Connection, ConnectionResponse
from sse_trio.history import Batch, Frame, event_id, events_among, parse_event_id
from sse_trio.settings import Settings

__all__ = ["Backlog", "EventStream", "Page", "jittered"]

Answer = TypeVar("Answer")
Bounds = tuple[int, int]
"""The stream's first and last sequence."""

log = structlog.get_logger("sse_trio.stream")

READ_FRAMES = 500
"""Frames that a client catching up is given in one write; far fewer when they carry whole discoveries."""
READ_FULL_FRAMES = 20

SECOND_LOOK = 1.5
"""Seconds until the stream is asked again about a cursor beyond its end; longer than an answer counts as fresh."""

UNKNOWN_PLACE_POLL = 0.5
"""Seconds between two looks whether the stream can be asked about a cursor, while the feed is away."""


class Page(Protocol):
    """Frames of the stream, in order, and the sequence up to which they are complete."""

    @property
    def frames(self) -> Sequence[Frame]: ...

    @property
    def last(self) -> int: ...


class Backlog(Protocol):
    """Where a client reads what memory has forgotten: the feed, when it is durable."""

    async def bounds(self) -> Bounds | None:
        """The stream's first and last sequence; None while that cannot be known."""
        ...

    async def read(self, after: int) -> Page:
        """Frames that follow `after`; waits while the feed is away."""
        ...


def jittered(retry: int) -> int:
    """`retry` milliseconds ±50 %, so that clients who left together do not come back together."""
    return round(retry * random.uniform(0.5, 1.5))


class EventStream(ConnectionResponse):
    """The answer to `GET /discoveries/stream`."""

    def __init__(
        self,
        broadcaster: Broadcaster,
        settings: Settings,
        *,
        agent_id: str,
        filter: Filter = EVERYTHING,
        cursor: str | None = None,
        backlog: Backlog | None = None,
        admit: Callable[[], AbstractContextManager[None]] = nullcontext,
        wants_events: bool = True,
        address: str = "",
        expires_in: float | None = None,
        request_id: str = "",
    ) -> None:
        """Nothing is registered before the response is written.

        `admit` counts the stream, and raises `AtCapacity` where there is no room; `wants_events` says whether the
        client asked for `text/event-stream` by name, and so survives no other status than 200. `expires_in` is the
        number of seconds that its token lasts.
        """
        super().__init__(
            "",
            headers={
                "Content-Type": "text/event-stream",
                "Cache-Control": "no-cache, no-transform",
                "X-Accel-Buffering": "no",
            },
        )
        self.broadcaster = broadcaster
        self.settings = settings
        self.agent_id = agent_id
        self.filter = filter
        self.cursor = cursor
        self.backlog = backlog
        self.admit = admit
        self.wants_events = wants_events
        self.address = address
        self.expires_in = expires_in
        self.request_id = request_id

    async def respond(self, connection: Connection) -> None:
        """Serve the stream to its end. Cancelled when the peer leaves."""
        try:
            with self.admit():
                await self._subscribed(connection)
        except AtCapacity as full:
            await self._refuse(connection, full)

    async def _refuse(self, connection: Connection, full: AtCapacity) -> None:
        """A native EventSource never returns from a 503: it is told when to come back, on a stream that ends."""
        self.broadcaster.disconnects["capacity"] += 1
        if self.wants_events:
            await connection.start(200, encode_headers(self.headers))
            await connection.write(sse.goodbye("capacity", random.randint(30_000, 60_000)))
        else:
            self.headers["Content-Type"] = "application/problem+json"
            self.headers["Cache-Control"] = "no-store"
            self.headers.update(full.headers)
            await connection.start(full.status, encode_headers(self.headers))
            problem = {
                "type": "about:blank",
                "title": full.title,
                "status": full.status,
                "detail": full.detail,
            }
            await connection.write(sse.compact(problem).encode())
        await connection.finish()

    async def _subscribed(self, connection: Connection) -> None:
        began = trio.current_time()
        reason = "error"
        with self.broadcaster.subscribe(self.agent_id, self.filter, cursor=self.cursor, address=self.address) as client:
            log.info(
                "client connected",
                client_id=client.id,
                agent_id=self.agent_id,
                address=self.address,
                cursor=self.cursor,
                filter=self.filter.describe(),
                request_id=self.request_id,
            )
            try:
                reason = await self._serve(client, connection)
            except trio.BrokenResourceError:
                reason = "stalled" if connection.stalled else "broken"
            except (trio.Cancelled, GeneratorExit):
                reason = "left"
                raise
            finally:
                self.broadcaster.disconnects[reason] += 1
                books = client.books()
                log.info(
                    "client disconnected",
                    client_id=client.id,
                    agent_id=self.agent_id,
                    reason=reason,
                    seconds=round(trio.current_time() - began, 3),
                    offered=books.offered,
                    sent=books.out,
                    dropped=books.dropped,
                    filtered=books.filtered,
                    undelivered=books.waiting,
                    request_id=self.request_id,
                )

    async def _serve(self, client: Client, connection: Connection) -> str:
        """The stream's life; why it ended."""
        broadcaster = self.broadcaster
        client.ends_at, self._ends_as = self._end_of_life()
        cursor = self.cursor
        if client.cursor is not None and broadcaster.live:
            # `connected` says what the cursor is worth; a feed that is away is not waited for.
            broadcaster.resolve(client, await self._bounds_for(client.cursor, self._bounds))
        if cursor is None:
            hello = partial(sse.connected, id=broadcaster.head_id)
        else:
            # Not the head when resuming: a connection lost in the middle of the replay would skip the rest of it.
            lost = client.due == "restart"
            id = None if broadcaster.head_id is None else broadcaster.head_id if lost else cursor
            hello = partial(sse.connected, id=id, resumed=client.resumed)
        first = hello(self.agent_id, client.id, retry=jittered(self.settings.retry))
        await connection.start(200, encode_headers(self.headers))
        # What is kept here is kept for as long as the stream lasts, ten thousand times.
        self.headers.clear()
        self.filter = client.filter
        await connection.write(first)
        client.wrote_at = trio.current_time()
        if connection.can_write_now and self.settings.direct_writes != "off":
            client.writer = connection

        while not client.gone:
            if trio.current_time() >= client.ends_at:
                client.end(self._ends_as)
            if connection.has_rest:
                await connection.write_rest()
                client.wrote_at = trio.current_time()
            payload, events, last = client.take()
            if payload:
                await self._write(client, connection, payload, events, last)
            elif client.ending is not None:
                return await self._goodbye(client, connection)
            elif client.due is not None:
                due, client.due = client.due, None  # while this is written, another may come
                await self._tell_gap(client, connection, due, None)
            elif not client.live and broadcaster.live and not await self._catch_up(client, connection):
                continue
            elif not await self._park(client, connection):
                return "spoke early"
        return "stalled" if connection.stalled else "broken"

    def _end_of_life(self) -> tuple[float, sse.GoodbyeReason]:
        """When the stream ends by itself at the latest (inf: never), and what its goodbye says then."""
        now = trio.current_time()
        ends_at, ends_as = float("inf"), "lifetime"
        if self.settings.max_lifetime > 0:
            ends_at = now + self.settings.max_lifetime * random.uniform(0.8, 1.0)
        if self.expires_in is not None and now + self.expires_in < ends_at:
            ends_at, ends_as = now + self.expires_in, "expired"
        return ends_at, ends_as  # type: ignore[return-value]  # both literals are reasons

    async def _write(
        self, client: Client, connection: Connection, payload: bytes, events: int, last: Frame | None
    ) -> None:
        with trio.move_on_at(client.ends_at):
            await connection.write(payload)  # what is left of it then is the rest, which goes before anything else
        client.wrote_at = trio.current_time()
        client.written(events, len(payload))
        if last is not None:
            client.told = last.sequence
            if last.received_at:
                self.broadcaster.latency.observe(time.perf_counter() - last.received_at, events)

    async def _tell_gap(
        self, client: Client, connection: Connection, reason: sse.GapReason, missed: int | None
    ) -> None:
        epoch = self.broadcaster.epoch
        assert epoch is not None, "a gap has a place"
        self.broadcaster.gaps[reason] += 1
        await connection.write(sse.gap(reason, missed, event_id(epoch, client.position)))
        client.wrote_at = trio.current_time()
        client.told = client.position

    async def _goodbye(self, client: Client, connection: Connection) -> str:
        reason = client.ending
        assert reason is not None
        if reason == "shutdown":
            retry = 1000 + random.randint(0, round(self.settings.drain_window * 1000))
        else:
            retry = jittered(self.settings.retry)
        await connection.write(sse.goodbye(reason, retry))
        await connection.finish()
        return reason

    # -- off the live path -------------------------------------------------------------------------------------------

    async def _catch_up(self, client: Client, connection: Connection) -> bool:
        """One step towards the head; True when there is nothing to do but to wait."""
        broadcaster = self.broadcaster
        if client.cursor is not None:
            return await self._find_place(client, connection)
        if broadcaster.is_behind(client):
            if broadcaster.durable:
                await self._read_backlog(client, connection)
            else:
                await self._skip(client, connection)
            return False
        frames = broadcaster.read(client, READ_FULL_FRAMES if self.filter.full else READ_FRAMES)
        if frames:
            await self._write_frames(client, connection, frames)
        elif client.position > broadcaster.head:
            return True  # without an await in between: the broadcaster wakes a task that is parked
        else:
            await trio.lowlevel.checkpoint()
        return False

    async def _write_frames(self, client: Client, connection: Connection, frames: Sequence[Frame]) -> None:
        full = self.filter.full
        payload = b"".join([frame.full if full else frame.notification for frame in frames])
        await self._write(client, connection, payload, events_among(frames), None)
        client.told = frames[-1].sequence

    async def _skip(self, client: Client, connection: Connection) -> None:
        """History went on without it: say what it missed."""
        if self.settings.overflow == "disconnect":
            client.end("overflow")
        elif (missed := self.broadcaster.skip(client)) != 0:
            await self._tell_gap(client, connection, "overflow", missed)

    async def _find_place(self, client: Client, connection: Connection) -> bool:
        """The cursor's worth was not known when the client came: ask again."""
        assert client.cursor is not None
        ask = partial(self._while_quiet, client, connection, self._bounds)
        self.broadcaster.resolve(client, await self._bounds_for(client.cursor, ask))
        if client.cursor is not None and not client.interrupted:
            with trio.move_on_after(UNKNOWN_PLACE_POLL):
                await client.wait()
        return False

    async def _bounds_for(self, cursor: str, ask: Callable[[], Awaitable[Bounds | None]]) -> Bounds | None:
        """The stream's bounds, asked for twice where the cursor lies beyond them.

        One answer may be old: of a server that was frozen, of a leader that does not know yet that it is none any more.
        To believe it would send a client back that another instance had served further.
        """
        bounds = await ask()
        parsed = parse_event_id(cursor)
        if bounds is not None and parsed is not None and parsed[0] == self.broadcaster.epoch and parsed[1] > bounds[1]:
            await trio.sleep(SECOND_LOOK)
            bounds = await ask()
        return bounds

    async def _bounds(self) -> Bounds | None:
        return await self.backlog.bounds() if self.backlog is not None else None

    async def _read_backlog(self, client: Client, connection: Connection) -> None:
        """One page of the stream for a client that memory no longer serves."""
        assert self.backlog is not None, "a durable broadcaster has a backlog"
        position = client.position
        page = await self._while_quiet(client, connection, partial(self.backlog.read, position))
        bounds = await self._while_quiet(client, connection, self._bounds)
        if page is None or client.interrupted:
            return  # the world changed while we waited; the loop asks anew
        following = [frame for frame in page.frames if frame.sequence > position]
        upto = following[0].sequence if following else page.last + 1
        if bounds is None and upto > position + 1:
            return  # whether retention has taken what comes next cannot be known now
        if bounds is not None and upto > position + 1 and bounds[0] > position + 1:
            # Retention has taken what comes next; a page that was read before that may still have some of it.
            client.position = min(bounds[0], upto) - 1
            await self._tell_gap(client, connection, "expired", None)
            if client.due is not None:
                return  # its place is one of another incarnation by now
        client.position = max(client.position, page.last)
        frames = client.pass_by(following)
        step = READ_FULL_FRAMES if self.filter.full else READ_FRAMES
        for start in range(0, len(frames), step):
            await self._write_frames(client, connection, frames[start : start + step])

    async def _while_quiet(
        self, client: Client, connection: Connection, ask: Callable[[], Awaitable[Answer]]
    ) -> Answer | None:
        """The answer to `ask`, which may be long in coming: keep-alives go on, and it is asked again after each of them.

        None when something comes up that the stream has to see to first.
        """
        while not client.interrupted and trio.current_time() < client.ends_at:
            alive_at = client.wrote_at + self.settings.keepalive_interval
            with trio.move_on_at(min(alive_at, client.ends_at)) as client.asking:
                return await ask()
            if trio.current_time() >= alive_at:
                await self._keep_alive(client, connection, self.broadcaster.filler(client))
        return None

    # -- parked ------------------------------------------------------------------------------------------------------

    async def _park(self, client: Client, connection: Connection) -> bool:
        """Wait for something to do, at most until something is due; False for a client to be closed."""
        alive_at = client.wrote_at + self.settings.keepalive_interval
        with trio.move_on_at(min(alive_at, client.ends_at)) as client.timer:
            await client.wait()
        if not client.timer.cancelled_caught or client.queued:
            return True  # also what was queued between the timer's end and now goes before any cursor
        if client.wrote_at + self.settings.keepalive_interval <= trio.current_time() < client.ends_at:
            filler = self.broadcaster.filler(client)
            self.broadcaster.keep_others_alive(client, filler)
            # Hypercorn stops reading a connection that sent bytes after its request, so its end would go unseen.
            if connection.spoke_early:
                return False
            await self._keep_alive(client, connection, filler)
        return True

    async def _keep_alive(self, client: Client, connection: Connection, filler: Batch) -> None:
        client.told = filler.last
        await connection.write(filler.payload)
        client.wrote_at = trio.current_time()
