"""One connected client: its bounded queue, and what happens when that is full.

Strategy: the broadcaster offers batches, synchronously; the client's own task (`stream`) takes what was queued and
writes it. Three rules make the hand-over safe without a lock:

* The publisher may write to the socket itself only while the task is parked, and a parked task has nothing
  outstanding: `offer` then hands the batch to its `writer`, and what the kernel does not take goes through the channel.
  In a crowd the client sits in a `row` meanwhile, which does this for many at once; it stands up before its task runs.
* A client is `live` while everything published is offered to it. When its channel is full it either leaves the live
  path (history holds what follows; its task reads on from there and rejoins) or, without history, drops by policy.
* Whatever was dropped is told at its place: `take` puts the gap before what is kept (drop-oldest) or after it
  (drop-newest, which accepts nothing more until the gap has been taken).

What passes a client is in its `Books`; see `audience` for who counts it.
"""

from __future__ import annotations

import errno
import math
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime

import trio

from sse_trio import sse
from sse_trio.audience import Audience, Books, Passed
from sse_trio.history import Batch, Frame, events_among
from sse_trio.row import NOTHING, Row, Writer
from sse_trio.settings import Overflow

__all__ = ["Client"]

TAKE_BYTES = 256 * 1024
"""What one write joins at most: more would hold memory for a peer that may not read it."""


class Client:
    """A client in the registry. Its task reads; the broadcaster offers; both run in one thread and never at once."""

    __slots__ = (
        "_pending",
        "_settled",
        "accounted",
        "address",
        "agent_id",
        "asking",
        "audience",
        "bytes",
        "connected_at",
        "cursor",
        "dropped",
        "due",
        "ending",
        "ends_at",
        "filter",
        "filtered",
        "gone",
        "high_water",
        "id",
        "lagging_on_history",
        "live",
        "missed",
        "missed_id",
        "missed_unknown",
        "offered",
        "overflow",
        "overflows",
        "parked",
        "position",
        "receive_channel",
        "resumed",
        "row",
        "row_before",
        "seat",
        "send_channel",
        "sent",
        "timer",
        "told",
        "waiting",
        "writer",
        "wrote_at",
    )

    def __init__(
        self, agent_id: str, audience: Audience[Client], *, capacity: int, overflow: Overflow, address: str = ""
    ) -> None:
        self.id = str(uuid.uuid4())
        self.agent_id = agent_id
        self.audience = audience
        self.filter = audience.filter
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
        """Everything up to this sequence was offered to it, or is not for it."""
        self.told = -1
        """The sequence of the last `id` that it was given."""
        self.accounted = audience.passed
        """How much of what has passed its audience is in its books."""

        self.parked = False
        self.asking: trio.CancelScope | None = None
        """Around what its task waits for while it is not parked: cancelling it loses nothing but the answer."""
        self.writer: Writer | None = None
        """How the publisher writes to the parked client's socket; None: only through the channel."""
        self.wrote_at = 0.0
        self.timer: trio.CancelScope | None = None
        """Ends the parking when something is due: a keep-alive, if nobody else sees to that, or its end."""
        self.ends_at = math.inf
        """When the stream ends by itself at the latest (inf: never)."""
        self.row: Row | None = None
        """Where it sits; what the row was given since it settled is not in its place and its counters yet."""
        self.row_before: Row | None = None
        """Where it sat when its timer, and nobody else, ended its parking."""
        self.seat = 0
        self._settled = NOTHING
        self._pending: Frame | None = None

        self.sent = 0
        self.bytes = 0
        self.offered = 0
        self.filtered = 0
        self.dropped = 0
        self.waiting = 0
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
            return 0  # off the live path, or on it since this round began, at the head: these are not for it
        if self.parked and self.writer is not None:
            try:
                taken = self.writer.write_now(batch)
            except (OSError, trio.BrokenResourceError):
                self.disconnect()
                return 0
            if taken:
                self._took(batch, now)
                return batch.events
        self._queue_all(batch)
        return 0

    def _took(self, batch: Batch, now: float) -> None:
        self.position = self.told = batch.last
        self.sent += batch.events
        self.bytes += batch.size
        self.wrote_at = now
        if self.writer is not None and self.writer.has_rest:
            self.wake()

    def _queue_all(self, batch: Batch) -> None:
        for frame in batch.frames:
            if not self._queue(frame):
                self._stop_before(frame, batch)
                return
        self.position = batch.last

    def _queue(self, frame: Frame) -> bool:
        """Queue a frame or drop one by policy; False when the queue is full, and neither is to be done."""
        if self.missed and self.overflow == "drop-newest":
            self._miss(frame)  # nothing is accepted behind a gap that was not told yet
            return True
        try:
            self.send_channel.send_nowait(frame)
            self.parked = False
        except trio.WouldBlock:
            if self.lagging_on_history or self.overflow == "disconnect":
                return False
            if self.overflow == "drop-newest":
                self._miss(frame)
                return True
            oldest = self.receive_channel.receive_nowait()
            if oldest is not None:
                self.waiting -= oldest.discovery is not None
                self._miss(oldest)
            self.send_channel.send_nowait(frame)
        self.waiting += frame.discovery is not None
        return True

    def _miss(self, frame: Frame) -> None:
        """Account for a frame that this client will not get."""
        if frame.discovery is None:
            self.missed_unknown = True
        else:
            self.dropped += 1
        self.missed += 1
        self.missed_id = frame.id

    def _stop_before(self, frame: Frame, batch: Batch) -> None:
        """Leave the live path in the middle of a round."""
        self.position = frame.sequence - 1
        self.account(self.audience.passed_without([other for other in batch.round if other.sequence > self.position]))
        self.live = False
        if not self.lagging_on_history:
            self.end("overflow")

    # -- in a row: see there -----------------------------------------------------------------------------------------

    @property
    def may_sit(self) -> bool:
        """Whether it has nothing to do, nothing outstanding, and a socket that might be lent."""
        return self.live and self.parked and self.writer is not None and self.row is None

    def sit(self, row: Row) -> None:
        """Take a seat in the row, if the connection lends its socket."""
        assert self.writer is not None
        descriptor = self.writer.lend(self.disconnect)
        if descriptor is not None:
            del self.audience.standing[self]
            self.row = row
            self._settled = row.given
            row.admit(self, descriptor)

    def _sit_again(self) -> None:
        """Back to where it sat, if that has been given, since, what this client has."""
        row, self.row_before = self.row_before, None
        if (
            row is not None
            and row.guests
            and not row.is_full
            and not row.owed
            and row.last == self.told
            and self.may_sit
        ):
            self.sit(row)

    def settle(self) -> None:
        """Make its own what the row has been given since the last time."""
        row = self.row
        if row is None or row.given is self._settled:
            return
        since, self._settled = self._settled, row.given
        self.sent += row.given.events - since.events
        self.bytes += row.given.size - since.size
        self.position = self.told = row.last
        self.wrote_at = row.wrote_at
        assert self.writer is not None
        self.writer.wrote(row.given.wire - since.wire)

    def stand_up(self) -> Batch | None:
        """Leave the row, if it sits in one; what the round still has for that, and so for this client."""
        row = self.row
        if row is None:
            return None
        self.settle()
        assert self.writer is not None
        self.writer.reclaim()
        row.dismiss(self)
        self.row = None
        self.audience.standing[self] = None
        return row.owed

    def rest_until(self, when: float) -> None:
        """Its timer is for then, or for its end."""
        if self.timer is not None:
            self.timer.deadline = min(when, self.ends_at)

    @property
    def spoke_early(self) -> bool:
        return self.writer is not None and self.writer.spoke_early

    def fell_short(self, batch: Batch, taken: int, now: float) -> int:
        """It took so much of a batch that its row was given, or none for that errno (< 0); the events that it has."""
        if taken in (0, -errno.EAGAIN):
            if batch.frames:
                self._queue_all(batch)
            else:
                self.wake()  # its own keep-alive waits for room, with a deadline
            return 0
        if taken < 0:
            self.disconnect()
            return 0
        assert self.writer is not None
        self.writer.wrote_part(batch, taken)
        self._took(batch, now)
        return batch.events

    def look(self) -> None:
        """See whether what the row was given arrives."""
        self.settle()
        assert self.writer is not None
        try:
            self.writer.look()
        except (OSError, trio.BrokenResourceError):
            self.disconnect()

    def unwatch(self) -> None:
        """Have the kernel not give up on the peer by itself."""
        assert self.writer is not None
        self.writer.unwatch()

    # -- its books ---------------------------------------------------------------------------------------------------

    def account(self, upto: Passed) -> int:
        """Enter what has passed its audience since the last time, up to there; how many events of it are for it."""
        since, self.accounted = self.accounted, upto
        self.offered += upto.events - since.events
        self.filtered += upto.filtered - since.filtered
        return upto.heard - since.heard

    def _account_live(self) -> None:
        self.account(self.audience.passed_live(self.position))

    def pass_by(self, frames: Sequence[Frame]) -> Sequence[Frame]:
        """Enter frames that were read for it; those that it hears, which wait to be written."""
        heard = self.filter.let_through(frames)
        given, since = events_among(heard), self.accounted
        self.account(
            Passed(
                since.events + events_among(frames),
                since.heard + given,
                since.filtered + len(frames) - len(heard),
            )
        )
        self.waiting += given
        return heard

    def books(self) -> Books:
        """What has become of the events that passed it."""
        self.settle()
        if self.live:
            self._account_live()
        return Books(self.offered, self.sent, self.dropped, self.filtered, self.waiting)

    # -- on the live path and off it ---------------------------------------------------------------------------------

    def join(self) -> None:
        """Step onto the live path, at the head. Who is to end stays off it."""
        self.accounted = self.audience.passed
        self.live = self.ending is None

    def leave(self) -> None:
        """Step off the live path, if it is there."""
        if self.live:
            self.stand_up()
            self._account_live()
            self.live = False

    def wake(self) -> None:
        """Let the task look at its state again. One that neither is parked nor asks for something does so by itself."""
        if self.parked:
            self._unpark()
            if not self.queued:
                self.send_channel.send_nowait(None)
        elif self.asking is not None:
            self.asking.cancel()

    @property
    def interrupted(self) -> bool:
        """Whether something has come up that its task has to see to before it reads on."""
        return self.gone or self.ending is not None or self.due is not None

    def end(self, reason: sse.GoodbyeReason) -> None:
        """Have the stream say goodbye after what it still holds, and end. The first reason stands."""
        if self.ending is None:
            self.ending = reason
            self.leave()
            self.wake()

    def disconnect(self) -> None:
        """The peer is gone: have the stream end without a word."""
        self.leave()
        self.gone = True
        self.wake()

    # -- the task's side ---------------------------------------------------------------------------------------------

    async def wait(self) -> None:
        """Park until something was queued or the state changed. Cancelling it loses nothing."""
        self.parked = True
        self._sit_again()
        try:
            self._pending = await self.receive_channel.receive()
        finally:
            self._unpark()

    def _unpark(self) -> None:
        self.parked = False
        self.row_before = self.row
        if (owed := self.stand_up()) is not None:
            self._queue_all(owed)

    def take(self) -> tuple[bytes, int, Frame | None]:
        """What was queued, joined, with the gap where frames are missing; how many events; the last frame.

        The events are waiting until they are `written`.
        """
        pieces: list[bytes] = []
        events = size = 0
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
            events += frame.discovery is not None
            last = frame
        return b"".join(pieces), events, last

    def written(self, events: int, size: int) -> None:
        """That many events, which were waiting, have been written, in `size` bytes."""
        self.waiting -= events
        self.sent += events
        self.bytes += size

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
        self.leave()
        self.parked = False
        self.asking = self.timer = self.row_before = None
        self._pending = None
        self.writer = None
        self.send_channel.close()
        self.receive_channel.close()

    def __repr__(self) -> str:
        return f"<Client {self.id} {self.agent_id!r} {'live' if self.live else 'at ' + str(self.position)}>"
