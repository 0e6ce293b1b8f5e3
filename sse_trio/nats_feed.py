"""What comes from NATS, given to the broadcaster in rounds; and the supervisor that keeps it coming.

Strategy: `run` opens a connection, feeds from it until it dies, says why, and opens the next, for ever: only a bug (or
`NATS_DURABLE=require` without JetStream) ends it, with its own exception. Connections are crash-only, so there is one
way to begin and one to end, and an outage is no special case.

On core NATS the numbers in ids are our own, and what is published while we are away is lost: everybody gets a `gap`
when we are back. With JetStream the numbers are the stream's, and nothing is lost that it retains (`jetstream`).
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Literal

import structlog
import trio

from sse_trio.backlog import Backlog, Page
from sse_trio.consumer import Batch, Consumer, ConsumerBroken, StoredMessage
from sse_trio.jetstream import JetStream, StreamInfo, base36
from sse_trio.nats_connection import NatsConnection, open_connection
from sse_trio.nats_protocol import NatsError
from sse_trio.rounds import Broadcaster, FeedCounters, Rounds
from sse_trio.settings import Settings
from sse_trio.subjects import is_subset

__all__ = ["FeedCounters", "FeedError", "FeedStatus", "NatsFeed"]

FIRST_DELAY, LAST_DELAY = 0.1, 5.0
"""Seconds before the next try: doubled each time from the first to the last, less a random part of up to a half."""

STEADY = timedelta(seconds=1)
"""A feed that was live for less than this goes on with the longer delays of before."""

WATCH_INTERVAL = 5.0
"""Seconds between two looks at whether the stream still takes what is published."""

ROLLBACK_PATIENCE = 5.0
"""Seconds that a stream's leader has to know of what we have already been given, before we believe that it is gone."""

log = structlog.get_logger("sse_trio.nats_feed")


class FeedError(Exception):
    """The feed cannot do what the settings ask for, and trying again would not help."""


@dataclass(frozen=True, slots=True)
class FeedStatus:
    """How the feed is: what `/health` tells."""

    live: bool = False
    reason: str | None = "connecting"
    """One word while not live: `connecting`, or that of a `NatsError`."""
    detail: str = "not connected yet"
    """One line without credentials."""
    mode: Literal["core", "jetstream"] | None = None
    """None until the first connection has decided it."""
    server: str | None = None
    """`host:port` while live."""
    reconnects: int = 0
    since: datetime = field(default_factory=lambda: datetime.now(UTC))
    """When it became so."""


class NatsFeed:
    """The one feed of a process."""

    def __init__(self, settings: Settings, broadcaster: Broadcaster) -> None:
        self.settings = settings
        self.broadcaster = broadcaster
        self.status = FeedStatus()
        self.counters = FeedCounters()
        self.first_attempt = trio.Event()
        """Set when the feed is live for the first time, or when the first try failed."""
        self.backlog = Backlog(lambda: broadcaster.head, self.counters)
        """Older events, from the stream; only with JetStream."""
        self.consumer: Consumer | None = None
        """The consumer of the stream while there is one."""
        self._mode: Literal["core", "jetstream"] | None = None
        self._rounds = Rounds(broadcaster, self.counters, settings.buffer)
        self._all_ours = False
        self._was_live = False
        self._outage: set[str] = set()
        """The reasons that the log has named since the feed was last live."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Feed the broadcaster until cancelled.

        Raises:
            FeedError: JetStream is required, and the first server that was reached does not have it.
        """
        task_status.started()
        delays = _Delays(len(self.settings.nats_url))
        while True:
            for url in self.settings.nats_url:
                self.counters.attempts += 1
                try:
                    async with open_connection(
                        url, creds=self.settings.nats_creds, ca=self.settings.nats_ca
                    ) as connection:
                        await self._feed(connection)
                except NatsError as error:
                    if self.status.live and datetime.now(UTC) - self.status.since >= STEADY:
                        delays.reset()
                    self._down(error)
                await trio.sleep(delays.next())

    async def _feed(self, connection: NatsConnection) -> None:
        """Feed from this connection until it fails. The first one decides the mode, once and for all."""
        stream = JetStream(connection, self.settings.nats_stream, self.settings.nats_subject)
        if self._mode is None:
            durable = self.settings.nats_durable
            if durable != "off" and await stream.is_available():
                self._mode = "jetstream"
            elif durable == "require":
                raise FeedError(f"NATS_DURABLE=require, and there is no JetStream at {connection.server}")
            else:
                self._mode = "core"
        if self._mode == "core":
            await self._feed_core(connection)
        else:
            await self._feed_stream(stream)

    # -- core NATS ---------------------------------------------------------------------------------------------------

    async def _feed_core(self, connection: NatsConnection) -> None:
        broadcaster = self.broadcaster
        inbox = await connection.subscribe(self.settings.nats_subject)
        if broadcaster.epoch is None:
            broadcaster.open_epoch(_run_epoch(), 0)
            broadcaster.go_live()
        else:
            broadcaster.gap("upstream", broadcaster.head + 1)
        self._up(connection, "core")
        while True:
            messages = await inbox.take()
            lost = inbox.lost
            received_at = time.perf_counter()
            await self._rounds.publish(
                (StoredMessage(0, message.subject, message.payload) for message in messages),
                received_at,
                numbered=False,
            )
            if lost:
                self.counters.lost += lost
                log.error("discoveries lost", count=lost, cause="they came faster than they could be sent on")
                broadcaster.gap("upstream", broadcaster.head + 1)

    # -- JetStream ---------------------------------------------------------------------------------------------------

    async def _feed_stream(self, stream: JetStream) -> None:
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            # Reads of older events run beside the feed. What ends the feed is carried around the nursery, which would
            # wrap it.
            try:
                nursery.start_soon(self._watch, stream)
                await self._follow(stream, nursery)
            except Exception as error:
                failure = error
            finally:
                self.consumer = None
                self.backlog.close()
                nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _follow(self, stream: JetStream, nursery: trio.Nursery) -> None:
        """Consume the stream from where the head is, with one consumer after another."""
        while True:
            # Before every consumer: a stream may have been purged, emptied by retention, or replaced while we were
            # away, and a consumer of the wrong one would wait in silence.
            info = await self._open_stream(stream)
            consumer = self.consumer = await stream.consume(self.broadcaster.head + 1)
            now = await stream.info()
            if now is None or now.epoch != info.epoch:
                stream.forget(consumer)  # replaced between the two requests
                continue
            self.backlog.open(stream, info.epoch, nursery)
            try:
                await self._consume(stream, consumer, info)
            except ConsumerBroken as broken:
                self.counters.consumer_restarts += 1
                log.info("consumer restarted", cause=str(broken))
                if broken.silent:
                    self._down(NatsError("stream", f"{stream.connection.server}: the consumer is silent: {broken}"))
            stream.forget(consumer)

    async def _open_stream(self, stream: JetStream) -> StreamInfo:
        """Find or create the stream, and tell the broadcaster what has become of its past."""
        broadcaster, settings = self.broadcaster, self.settings
        info = await stream.info()
        if info is None:
            info = await stream.create(
                max_age=settings.nats_stream_max_age,
                max_bytes=settings.nats_stream_max_bytes,
                replicas=settings.nats_stream_replicas,
            )
            log.info("stream created", stream=stream.name)
        info = await self._wait_for_leader(stream, info)
        self._all_ours = self._is_all_ours(info)
        if not info.collects(settings.nats_subject):
            # A consumer of it would be made, and would be silent for ever.
            collected = ", ".join(info.subjects)
            raise NatsError("stream", f"stream {stream.name} collects {collected}, nothing of {settings.nats_subject}")
        if not self._was_live and info.subjects and not is_subset(settings.nats_subject, info.subjects):
            log.warning("stream collects less than the subject", stream=stream.name, subjects=list(info.subjects))
        if broadcaster.epoch is None:
            head = max(info.first - 1, info.last - settings.history)
            broadcaster.open_epoch(info.epoch, head, durable=True)
        elif info.epoch != broadcaster.epoch:
            log.warning("stream replaced", stream=stream.name, first=info.first, last=info.last)
            self.backlog.forget()
            broadcaster.open_epoch(info.epoch, info.first - 1, durable=True)
        elif info.last < broadcaster.head:
            log.error("stream rolled back", stream=stream.name, head=broadcaster.head, last=info.last)
            self.backlog.forget()
            broadcaster.open_epoch(info.epoch, info.last, durable=True)
        elif info.first > broadcaster.head + 1:
            self._expired(info.first)
        return info

    async def _wait_for_leader(self, stream: JetStream, info: StreamInfo) -> StreamInfo:
        """Where the stream ends before our head, a new leader may be behind for a moment. Or it lost what it had."""
        with trio.move_on_after(ROLLBACK_PATIENCE):
            while info.epoch == self.broadcaster.epoch and info.last < self.broadcaster.head:
                await trio.sleep(FIRST_DELAY)
                info = await stream.info() or info
        return info

    def _expired(self, first: int) -> None:
        """What was between our head and the stream's first message is gone before we have heard it."""
        log.warning("discoveries expired unheard", after=self.broadcaster.head, before=first)
        self.broadcaster.gap("expired", first - 1)

    async def _consume(self, stream: JetStream, consumer: Consumer, info: StreamInfo) -> None:
        """Publish what the consumer gives until it breaks.

        For the first one, what was waiting for it is history: the feed is live when that has been delivered.
        """
        broadcaster, delivered, pending = self.broadcaster, 0, consumer.backlog
        await self._rounds.finish()
        if self._was_live or not pending:
            self._caught_up(stream)
        while True:
            batch = await consumer.take()
            received_at = time.perf_counter()
            messages = batch.messages
            if messages:
                for upto, first in await self._holes(stream, batch, pending):
                    done = len(batch.messages) - len(messages)
                    await self._rounds.publish(messages[: upto - done], received_at, numbered=True)
                    messages = messages[upto - done :]
                    self._expired(first)
                await self._rounds.publish(messages, received_at, numbered=True)
                pending = batch.pending[-1]
            if batch.skipped_to > broadcaster.head:
                broadcaster.publish([], batch.skipped_to)
            if not self.status.live:
                delivered += len(batch.messages)
                if delivered >= consumer.backlog or not pending or batch.skipped_to or broadcaster.head >= info.last:
                    self._caught_up(stream)

    def _caught_up(self, stream: JetStream) -> None:
        """All that was waiting, as far as this consumer knows, has been published.

        The head stays where the consumer has brought it, wherever else the stream may end: a consumer of a replica that
        lags has still to give what is in between, and a client that was put behind that would never hear it. That
        nothing of ours is in between is told by the consumer's first heartbeat.
        """
        self.broadcaster.go_live()
        if not self.status.live:
            self._up(stream.connection, "jetstream")

    async def _holes(self, stream: JetStream, batch: Batch, pending: int) -> list[tuple[int, int]]:
        """Where retention took messages that the consumer had not yet sent: (index in the batch, first one left).

        The consumer does not say so: it numbers what it sends. But then the stream's sequences jump, and the stream
        begins behind the jump. That is asked where a jump means something: any does while the stream collects
        nothing but what we listen to; else one by a consumer that was or is behind, having messages `pending`.
        """
        previous = self.broadcaster.head
        if batch.messages[-1].sequence - previous == len(batch.messages):
            return []
        jumps = []
        for index, (message, left) in enumerate(zip(batch.messages, batch.pending, strict=True)):
            if message.sequence > previous + 1 and (self._all_ours or pending or left):
                jumps.append((index, previous, message.sequence))
            previous, pending = message.sequence, left
        info = await stream.info() if jumps else None
        if info is None:
            return []
        self._all_ours = self._is_all_ours(info)
        return [(index, min(info.first, after)) for index, before, after in jumps if info.first > before + 1]

    def _is_all_ours(self, info: StreamInfo) -> bool:
        """Whether the stream collects only what we listen to."""
        ours = [self.settings.nats_subject]
        return bool(info.subjects) and all(is_subset(subject, ours) for subject in info.subjects)

    async def _watch(self, stream: JetStream) -> None:
        """Say it when publishers are refused, which the feed itself would only see as silence."""
        while True:
            await trio.sleep(WATCH_INTERVAL)
            try:
                trouble = await stream.trouble() or ""
            except NatsError:
                continue  # the feed finds out by itself
            if self.status.live and trouble != self.status.detail:
                self.status = replace(self.status, detail=trouble)
                if trouble:
                    log.warning("stream full", detail=trouble)

    # -- what the stream holds ---------------------------------------------------------------------------------------

    async def bounds(self) -> tuple[int, int] | None:
        """The stream's first and last sequence, at most a second old; None on core NATS, and while not connected."""
        return await self.backlog.bounds()

    async def read(self, after: int) -> Page:
        """Frames of the stream that follow `after`; see `Backlog.read`. On core NATS it waits for ever."""
        return await self.backlog.read(after)

    # -- status ------------------------------------------------------------------------------------------------------

    def _up(self, connection: NatsConnection, mode: Literal["core", "jetstream"]) -> None:
        now = datetime.now(UTC)
        if self._was_live:
            self.counters.reconnects += 1
        away = (now - self.status.since).total_seconds()
        self._was_live = True
        self._outage.clear()
        self.status = FeedStatus(True, None, "", mode, connection.server, self.counters.reconnects, now)
        self.first_attempt.set()
        log.info("feed live", server=connection.server, mode=mode, after_seconds=round(away, 3))

    def _down(self, error: NatsError) -> None:
        """Say once per outage and reason why the feed is not live."""
        since = datetime.now(UTC) if self.status.live else self.status.since
        self.status = replace(
            self.status, live=False, reason=error.reason, detail=error.detail, server=None, since=since
        )
        self.first_attempt.set()
        if error.reason not in self._outage:
            self._outage.add(error.reason)
            hint = {} if self._was_live else {"next": "it is tried again; NATS_URL names another"}
            log.warning("feed down", reason=error.reason, detail=error.detail, **hint)


class _Delays:
    """How long to wait before the next try: all servers are tried in quick succession, then the pauses grow."""

    def __init__(self, servers: int) -> None:
        self.servers = servers
        self.tries = 0

    def reset(self) -> None:
        self.tries = 0

    def next(self) -> float:
        rounds = self.tries // self.servers
        self.tries += 1
        return min(LAST_DELAY, FIRST_DELAY * 2.0 ** min(rounds, 20)) / self.servers * random.uniform(0.5, 1.0)


def _run_epoch() -> str:
    """Names this process's run: its start in milliseconds, and 24 random bits for what starts in the same one."""
    return base36(time.time_ns() // 1_000_000) + base36(random.SystemRandom().randrange(36**5)).rjust(5, "0")
