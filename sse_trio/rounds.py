"""From messages to rounds: decoding what came from NATS, and giving it to the broadcaster in portions.

Strategy: whatever arrived together is published together, up to a round's limits, since a round costs one write per
client however many events it carries. Between rounds, and while decoding, other tasks get their turn: a hundred
thousand messages in a second must not stop the loop for longer than a frame of a film. What does not decode is
counted, logged now and then, and skipped.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import structlog
import trio

from sse_trio.discovery import Discovery, InvalidDiscovery, decode

__all__ = ["Arrived", "Broadcaster", "FeedCounters", "Rounds"]

Event = tuple[int, str, Discovery]

Arrived = tuple[int, str, bytes]
"""Sequence, subject, payload."""

ROUND_BYTES = 1 << 20
"""Bytes of payload in one round, at most (or a single message)."""

DECODED_AT_ONCE = 16
"""Messages that are decoded before other tasks may run: a few tenths of a millisecond. An answer to `/health` takes two
dozen turns of the loop, each of which may have such a portion in it."""

LOG_INTERVAL = 10.0
"""Seconds between two log lines about invalid discoveries of one kind."""

log = structlog.get_logger("sse_trio.rounds")


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
    """Pages of older events that were read from the stream."""


class Rounds:
    """The way of messages to one broadcaster."""

    def __init__(self, broadcaster: Broadcaster, counters: FeedCounters, limit: int) -> None:
        """A round has at most `limit` events."""
        self.broadcaster = broadcaster
        self.counters = counters
        self.limit = limit
        self._invalid = _InvalidLog()

    async def publish(self, messages: Iterable[tuple[int, str, bytes]], received_at: float, *, numbered: bool) -> None:
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
            if len(events) >= self.limit or size >= ROUND_BYTES:
                await self._round(events, head, received_at)
                events, size = [], 0
            elif count % DECODED_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
        if events or head > self.broadcaster.head:
            await self._round(events, head, received_at)

    async def _round(self, events: list[Event], head: int, received_at: float) -> None:
        self.broadcaster.publish(events, head, received_at=received_at)
        await self.finish()

    async def finish(self) -> None:
        """Serve what is left of a round: of this one, or of one that was cancelled in the middle."""
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
            "invalid discovery",
            subject=ascii(subject[:200])[1:-1],
            reason=reason,
            suppressed=self._suppressed.pop(reason, 0),
        )
