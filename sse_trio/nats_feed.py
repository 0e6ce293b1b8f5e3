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
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Literal, Protocol

import structlog
import trio

from sse_trio.discovery import Discovery, InvalidDiscovery, decode
from sse_trio.nats_connection import NatsConnection, NatsError, open_connection
from sse_trio.settings import Settings

__all__ = ["FeedCounters", "FeedError", "FeedStatus", "NatsFeed"]

Event = tuple[int, str, Discovery]

FIRST_DELAY, LAST_DELAY = 0.1, 5.0
"""Seconds before the next try: doubled each time from the first to the last, less a random part of up to a half."""

ROUND_BYTES = 1 << 20
"""Bytes of payload in one round, at most (or a single message)."""

DECODED_AT_ONCE = 256
"""Messages that are decoded before other tasks may run: about 3 ms."""

LOG_INTERVAL = 10.0
"""Seconds between two log lines about invalid discoveries of one kind."""

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"

log = structlog.get_logger()


class FeedError(Exception):
    """The feed cannot do what the settings ask for, and trying again would not help."""


class Broadcaster(Protocol):
    """What the feed needs of the broadcaster: all synchronous, never raising because of a client."""

    @property
    def head(self) -> int: ...
    @property
    def epoch(self) -> str | None: ...
    def open_epoch(self, epoch: str, head: int, *, durable: bool = False) -> None: ...
    def publish(self, events: list[Event], head: int | None = None, *, received_at: float = 0.0) -> None: ...
    def deliver(self) -> bool: ...
    def go_live(self) -> None: ...
    def gap(self, reason: Literal["upstream", "expired"], sequence: int) -> None: ...


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


@dataclass
class FeedCounters:
    """What has happened since the start; plain numbers that only grow."""

    received: int = 0
    """Messages taken from NATS."""
    received_bytes: int = 0
    decoded: int = 0
    """Of those, the ones that became events."""
    invalid: Counter[str] = field(default_factory=Counter)
    """Of those, the ones that are no discoveries, by reason."""
    lost: int = 0
    """Messages that did not fit into memory before they could be taken."""
    reconnects: int = 0
    attempts: int = 0
    """Connections tried."""
    consumer_restarts: int = 0
    stream_reads: int = 0
    """Requests that read older events from the stream."""


class NatsFeed:
    """The one feed of a process."""

    def __init__(self, settings: Settings, broadcaster: Broadcaster) -> None:
        self.settings = settings
        self.broadcaster = broadcaster
        self.status = FeedStatus()
        self.counters = FeedCounters()
        self.first_attempt = trio.Event()
        """Set when the feed is live for the first time, or when the first try failed."""
        self._invalid = _InvalidLog()
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
                    if self.status.live:
                        delays.reset()
                    self._down(error)
                await trio.sleep(delays.next())

    async def _feed(self, connection: NatsConnection) -> None:
        """Feed from this connection until it fails."""
        await self._feed_core(connection)

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
            await self._publish(
                ((0, message.subject, message.payload) for message in messages), received_at, numbered=False
            )
            if lost:
                self.counters.lost += lost
                log.error("discoveries_lost", count=lost, cause="they came faster than they could be sent on")
                broadcaster.gap("upstream", broadcaster.head + 1)

    # -- rounds ------------------------------------------------------------------------------------------------------

    async def _publish(self, messages: Iterable[tuple[int, str, bytes]], received_at: float, *, numbered: bool) -> None:
        """Decode (sequence, subject, payload) and publish them in rounds; other tasks run in between.

        Without `numbered` the sequences count on from the head; then what does not decode needs none.
        """
        events: list[Event] = []
        head, size = self.broadcaster.head, 0
        for count, (sequence, subject, payload) in enumerate(messages, 1):
            discovery = self._decode(subject, payload)
            if numbered:
                head = sequence
            elif discovery is not None:
                head += 1
            if discovery is not None:
                events.append((head, subject, discovery))
                size += len(payload)
            if len(events) >= self.settings.buffer or size >= ROUND_BYTES:
                await self._round(events, head, received_at)
                events, size = [], 0
            elif count % DECODED_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
        if events or head > self.broadcaster.head:
            await self._round(events, head, received_at)

    async def _round(self, events: list[Event], head: int, received_at: float) -> None:
        self.broadcaster.publish(events, head, received_at=received_at)
        while True:
            await trio.lowlevel.checkpoint()
            if not self.broadcaster.deliver():
                return

    def _decode(self, subject: str, payload: bytes) -> Discovery | None:
        counters = self.counters
        counters.received += 1
        counters.received_bytes += len(payload)
        try:
            discovery = decode(payload)
        except InvalidDiscovery as error:
            counters.invalid[error.reason] += 1
            self._invalid.log(subject, error.reason)
            return None
        counters.decoded += 1
        return discovery

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
        log.info("feed_live", server=connection.server, mode=mode, after_seconds=round(away, 3))

    def _down(self, error: NatsError) -> None:
        """Say once per outage and reason why the feed is not live."""
        since = datetime.now(UTC) if self.status.live else self.status.since
        self.status = replace(
            self.status, live=False, reason=error.reason, detail=error.detail, server=None, since=since
        )
        self.first_attempt.set()
        if error.reason not in self._outage:
            self._outage.add(error.reason)
            log.warning("feed_down", reason=error.reason, detail=error.detail)


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


class _InvalidLog:
    """One line about the first invalid discovery of each kind, then at most one every `LOG_INTERVAL`."""

    def __init__(self) -> None:
        self._next: dict[str, float] = {}
        self._suppressed: Counter[str] = Counter()

    def log(self, subject: str, reason: str) -> None:
        now = time.monotonic()
        if now < self._next.get(reason, now):
            self._suppressed[reason] += 1
            return
        self._next[reason] = now + LOG_INTERVAL
        log.warning(
            "discovery_invalid",
            subject=ascii(subject[:200])[1:-1],
            reason=reason,
            suppressed=self._suppressed.pop(reason, 0),
        )


def base36(number: int) -> str:
    """A non-negative number in the digits 0-9a-z."""
    digits = ""
    while number >= 36:
        number, digit = divmod(number, 36)
        digits = _DIGITS[digit] + digits
    return _DIGITS[number] + digits


def _run_epoch() -> str:
    """Names this process's run: its start in milliseconds, and 24 random bits for what starts in the same one."""
    return base36(time.time_ns() // 1_000_000) + base36(random.SystemRandom().randrange(36**5)).rjust(5, "0")
