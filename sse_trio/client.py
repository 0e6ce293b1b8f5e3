"""One connected client: its filter, its bounded queue, and what happens when that is full.

Strategy: the broadcaster offers batches, synchronously; the client's own task (`stream`) takes what was queued and
writes it. Three rules make the hand-over safe without a lock:

* The publisher may write to the socket itself only while the task is parked, and a parked task has nothing
  outstanding: `offer` then hands the batch to its `writer`, and what the kernel does not take goes through the channel.
* A client is `live` while everything published is offered to it. When its channel is full it either leaves the live
  path (history holds what follows; its task reads on from there and rejoins) or, without history, drops by policy.
* Whatever was dropped is told at its place: `take` puts the gap before what is kept (drop-oldest) or after it
  (drop-newest, which accepts nothing more until the gap has been taken).
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

import trio

from sse_trio import sse
from sse_trio.history import Batch, Frame
from sse_trio.settings import Overflow
from sse_trio.subjects import matches

__all__ = ["EVERYTHING", "Client", "Filter", "Writer"]

TAKE_BYTES = 256 * 1024
"""What one write joins at most: more would hold memory for a peer that may not read it."""


@dataclass(frozen=True, slots=True)
class Filter:
    """Which discoveries a client hears, and whether in full. Clients with equal filters are one audience.

    `subjects` are the patterns that the client asked for, `granted` those that its token lets it hear; an empty
    tuple of the former and None of the latter mean all.
    """

    types: frozenset[str] = frozenset()
    roles: frozenset[str] = frozenset()
    agents: frozenset[str] = frozenset()
    min_confidence: float = 0.0
    subjects: tuple[str, ...] = ()
    granted: tuple[str, ...] | None = None
    full: bool = False

    @property
    def is_open(self) -> bool:
        """Whether it lets everything through."""
        return not (
            self.types
            or self.roles
            or self.agents
            or self.min_confidence > 0
            or self.subjects
            or self.granted is not None
        )

    def matches(self, frame: Frame) -> bool:
        """Whether this client hears `frame`. Notices are for everybody."""
        discovery = frame.discovery
        if discovery is None:
            return True
        return (
            (not self.types or discovery.discovery_type in self.types)
            and (not self.roles or discovery.agent_role in self.roles)
            and (not self.agents or discovery.agent_id in self.agents)
            and discovery.confidence >= self.min_confidence
            and (not self.subjects or any(matches(pattern, frame.subject) for pattern in self.subjects))
            and (self.granted is None or any(matches(pattern, frame.subject) for pattern in self.granted))
        )

    def describe(self) -> dict[str, object]:
        """The filter as `GET /clients` shows it: only what is set."""
        shown: dict[str, object] = {}
        for name, values in (("type", self.types), ("role", self.roles), ("agent", self.agents)):
            if values:
                shown[name] = sorted(values)
        if self.min_confidence > 0:
            shown["min_confidence"] = self.min_confidence
        if self.subjects:
            shown["subject"] = list(self.subjects)
        if self.full:
            shown["detail"] = "full"
        return shown


EVERYTHING = Filter()


class Writer(Protocol):
    """What a client's socket can do for the publisher while the client's task is parked."""

    def write_now(self, batch: Batch) -> bool:
        """Write without waiting. True: the batch is taken, whole or with a rest that is kept; False: none of it.

        Raises:
            OSError, trio.BrokenResourceError: the peer is gone.
        """
        ...

    @property
    def has_rest(self) -> bool:
        """Whether the last batch was cut and its rest must be written before anything else."""
        ...


class Client:
    """A client in the registry. Its task reads; the broadcaster offers; both run in one thread and never at once."""

    __slots__ = (
        "_pending",
        "accounted",
        "address",
        "agent_id",
        "bytes",
        "connected_at",
        "cursor",
        "dropped",
        "due",
        "ending",
        "filter",
        "gone",
        "high_water",
        "id",
        "lagging_on_history",
        "live",
        "missed",
        "missed_id",
        "missed_unknown",
        "overflow",
        "overflows",
        "parked",
        "position",
        "receive_channel",
        "resumed",
        "send_channel",
        "sent",
        "told",
        "writer",
        "wrote_at",
    )

    def __init__(self, agent_id: str, filter: Filter, *, capacity: int, overflow: Overflow, address: str = "") -> None:
        self.id = str(uuid.uuid4())
        self.agent_id = agent_id
        self.filter = filter
        self.address = address
        self.connected_at = datetime.now(UTC)
        self.overflow = overflow
        self.send_channel, self.receive_channel = trio.open_memory_channel[Frame | None](capacity)
        self.gone = False
        """Whether the publisher found the peer gone."""
        self.ending: sse.GoodbyeReason | None = None

        self.live = False
        self.lagging_on_history = True
        """Whether a full channel takes the client off the live path (else it drops by policy)."""
        self.cursor: str | None = None
        """The cursor it came with, until it is known what that is worth."""
        self.resumed: bool | None = None
        self.due: sse.GapReason | None = None
        """A gap that stands before `position`, to be told next."""
        self.position = 0
        """Everything up to this sequence was given to it, or is not for it. Stands still while it is live."""
        self.told = -1
        """The sequence of the last `id` that it was given."""
        self.accounted = 0
        """Off the live path: how many of its audience's events were given to it or reported missed."""

        self.parked = False
        self.writer: Writer | None = None
        """How the publisher writes to the parked client's socket; None: only through the channel."""
        self.wrote_at = 0.0
        self._pending: Frame | None = None

        self.sent = 0
        self.bytes = 0
        self.dropped = 0
        self.overflows = 0
        """Gaps that it was told of because its queue was full."""
        self.high_water = 0
        self.missed = 0
        self.missed_unknown = False
        self.missed_id = ""

    # -- the publisher's side: synchronous, never waits, never raises because of the peer ----------------------------

    def offer(self, batch: Batch, now: float) -> int:
        """Give it a round's frames; the number that went straight into its socket."""
        if not self.live or batch.last <= self.position:
            return 0  # off the live path, or back on it since this round began: history has given it these
        if self.parked and self.writer is not None:
            try:
                taken = self.writer.write_now(batch)
            except (OSError, trio.BrokenResourceError):
                self.disconnect()
                return 0
            if taken:
                self.sent += batch.count
                self.bytes += len(batch.payload)
                self.told = batch.last
                self.wrote_at = now
                if self.writer.has_rest:
                    self.wake()
                return batch.count
        for index, frame in enumerate(batch.frames):
            if not self._queue(frame):
                self.accounted = batch.before + index
                self.position = frame.sequence - 1
                break
        return 0

    def _queue(self, frame: Frame) -> bool:
        """Queue a frame or drop one; False when that has taken the client off the live path."""
        if self.missed and self.overflow == "drop-newest":
            self._miss(frame)  # nothing is accepted behind a gap that was not told yet
            return True
        try:
            self.send_channel.send_nowait(frame)
            self.parked = False
        except trio.WouldBlock:
            if self.lagging_on_history:
                self.live = False
            elif self.overflow == "disconnect":
                self.end("overflow")
            elif self.overflow == "drop-newest":
                self._miss(frame)
            else:
                oldest = self.receive_channel.receive_nowait()
                if oldest is not None:
                    self._miss(oldest)
                self.send_channel.send_nowait(frame)
        return self.live

    def _miss(self, frame: Frame) -> None:
        """Account for a frame that this client will not get."""
        if frame.discovery is None:
            self.missed_unknown = True
        self.missed += 1
        self.dropped += 1
        self.missed_id = frame.id

    def wake(self) -> None:
        """Let the task look at its state again. A task that is not parked does so by itself."""
        if self.parked:
            self.parked = False
            self.send_channel.send_nowait(None)

    def end(self, reason: sse.GoodbyeReason) -> None:
        """Have the stream say goodbye after what it still holds, and end. The first reason stands."""
        if self.ending is None:
            self.ending = reason
            self.live = False
            self.wake()

    def disconnect(self) -> None:
        """The peer is gone: have the stream end without a word."""
        self.live = False
        self.gone = True
        self.wake()

    # -- the task's side ---------------------------------------------------------------------------------------------

    async def wait(self) -> None:
        """Park until something was queued or the state changed. Cancelling it loses nothing."""
        self.parked = True
        try:
            self._pending = await self.receive_channel.receive()
        finally:
            self.parked = False

    def take(self) -> tuple[bytes, int, Frame | None]:
        """What was queued, joined, with the gap where frames are missing; how many frames; the last of them."""
        pieces: list[bytes] = []
        frames = size = 0
        last: Frame | None = None
        self.high_water = max(self.high_water, self.queued)
        while size < TAKE_BYTES:
            if self._pending is not None:
                # What woke the task left the channel before anything that was dropped from it.
                frame, self._pending = self._pending, None
            else:
                if self.missed and self.overflow != "drop-newest":
                    pieces.append(self._take_gap())
                try:
                    queued = self.receive_channel.receive_nowait()
                except trio.WouldBlock:
                    if self.missed:
                        pieces.append(self._take_gap())
                    break
                if queued is None:
                    continue
                frame = queued
            encoded = frame.full if self.filter.full else frame.notification
            pieces.append(encoded)
            size += len(encoded)
            frames += 1
            last = frame
        return b"".join(pieces), frames, last

    def _take_gap(self) -> bytes:
        gap = sse.gap("overflow", None if self.missed_unknown else self.missed, self.missed_id)
        self.missed = 0
        self.missed_unknown = False
        self.overflows += 1
        return gap

    @property
    def queued(self) -> int:
        """Frames that wait for its task."""
        return self.receive_channel.statistics().current_buffer_used + (self._pending is not None)

    def close(self) -> None:
        """Drop what is queued; nothing can be offered any more."""
        self.live = False
        self.parked = False
        self._pending = None
        self.writer = None
        self.send_channel.close()
        self.receive_channel.close()

    def __repr__(self) -> str:
        return f"<Client {self.id} {self.agent_id!r} {'live' if self.live else 'at ' + str(self.position)}>"
