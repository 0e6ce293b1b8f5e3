"""The recent frames, by sequence: what resume and catch-up read from memory.

Strategy: a sequence number names a place in an incarnation (`epoch`) of the feed. Memory covers the half-open interval
`(floor, head]`: every event that exists with such a number is here; numbers may be absent in between (other subjects
share the stream, undecodable messages have no frame). Appending evicts the oldest frames over either bound and moves
`floor` up to the last one evicted, so "is it still here?" is one comparison and never a search.

A frame is encoded once, when it is made; everybody who hears it shares its bytes. A frame without a discovery is a
notice (a `gap` that stands at this place for everyone).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence

from sse_trio import sse
from sse_trio.discovery import Discovery

__all__ = ["Batch", "Frame", "History", "event_id", "events_among", "parse_event_id"]

FRAME_OVERHEAD = 600
"""Bytes that a frame and its discovery take in memory beside their payload and encoding (measured, rounded up)."""


def event_id(epoch: str, sequence: int) -> str:
    """The `id` of an event: names the incarnation and the place in it."""
    return f"{epoch}-{sequence}"


def parse_event_id(text: str) -> tuple[str, int] | None:
    """Epoch and sequence of an `id`; None for what cannot be one of ours (it comes from outside)."""
    epoch, _, number = text.rpartition("-")
    if not epoch or len(number) > 20 or not (number.isascii() and number.isdigit()):
        return None
    return epoch, int(number)


class Frame:
    """One event or notice, encoded: immutable, shared by all clients."""

    __slots__ = ("_full", "discovery", "id", "notification", "received_at", "sequence", "subject")

    def __init__(
        self,
        sequence: int,
        id: str,
        subject: str,
        discovery: Discovery | None,
        notification: bytes,
        received_at: float = 0.0,
    ) -> None:
        self.sequence = sequence
        self.id = id
        self.subject = subject
        self.discovery = discovery
        self.notification = notification
        self.received_at = received_at
        self._full: bytes | None = None

    @classmethod
    def of(cls, epoch: str, sequence: int, subject: str, discovery: Discovery, received_at: float = 0.0) -> Frame:
        """The frame that announces `discovery`; `received_at` is `time.perf_counter()` when NATS gave it to us."""
        id = event_id(epoch, sequence)
        return cls(sequence, id, subject, discovery, sse.discovery(discovery.uri, id), received_at)

    @classmethod
    def notice(cls, epoch: str, sequence: int, reason: sse.GapReason) -> Frame:
        """A `gap` that everybody who passes this place is told of."""
        id = event_id(epoch, sequence)
        return cls(sequence, id, "", None, sse.gap(reason, None, id))

    @property
    def full(self) -> bytes:
        """The frame with the whole discovery in it (`detail=full`), encoded at first use."""
        if self.discovery is None:
            return self.notification
        if self._full is None:
            self._full = sse.full_discovery(self.discovery.uri, self.id, self.discovery.published())
        return self._full

    @property
    def size(self) -> int:
        """Bytes of memory that the frame is counted with."""
        payload = len(self.discovery.payload) if self.discovery is not None else 0
        return FRAME_OVERHEAD + payload + len(self.notification)

    def __repr__(self) -> str:
        return f"<Frame {self.id}>"


def events_among(frames: Sequence[Frame]) -> int:
    """How many of the frames are events: a notice is none."""
    return sum([frame.discovery is not None for frame in frames])


class Batch:
    """The frames of one round for one audience: their bytes joined once, shared by every client of it.

    `chunk` is room for the transport to keep what it wraps around `payload` (the HTTP/1.1 chunk), also made once.
    """

    __slots__ = ("chunk", "events", "frames", "last", "payload", "round", "size")

    def __init__(self, frames: Sequence[Frame], full: bool, round: Sequence[Frame], events: int) -> None:
        self.frames = frames
        self.payload = b"".join([frame.full if full else frame.notification for frame in frames])
        self.size = len(self.payload)
        self.chunk: bytes | None = None
        self.last = frames[-1].sequence
        self.events = events
        self.round = round
        """All frames of the round, also those that are not for this audience."""

    @classmethod
    def filler(cls, payload: bytes, last: int) -> Batch:
        """Bytes that are no frames, and the sequence that whoever reads them knows to have passed."""
        batch = cls.__new__(cls)
        batch.frames = batch.round = ()
        batch.payload, batch.chunk = payload, None
        batch.last, batch.events, batch.size = last, 0, 0  # it is not counted with the frames
        return batch


class History:
    """Recent frames of one epoch, bounded by number and by bytes, whichever comes first."""

    def __init__(self, max_events: int, max_bytes: int) -> None:
        self.max_events = max_events
        self.max_bytes = max_bytes
        self.epoch: str | None = None
        self.head = 0
        self.floor = 0
        self.bytes = 0
        self.last_notice = -1
        """The sequence of the newest notice: a hole that spans it hides an unknown number of events."""
        # Two parallel lists with a common start: bisecting plain integers is ten times faster than with a key, and
        # evicting is an increment; what lies before the start goes when it is half of the list.
        self._frames: list[Frame | None] = []
        self._sequences: list[int] = []
        self._start = 0

    def __len__(self) -> int:
        return len(self._frames) - self._start

    def open(self, epoch: str, head: int) -> None:
        """Begin an epoch in which all events up to and with `head` are past; what was kept is forgotten."""
        self.epoch = epoch
        self.head = self.floor = head
        self.bytes = 0
        self.last_notice = -1
        self._frames.clear()
        self._sequences.clear()
        self._start = 0

    def append(self, frame: Frame) -> None:
        """Add the next frame; the head moves to it."""
        self.head = frame.sequence
        if frame.discovery is None:
            self.last_notice = frame.sequence
        self._frames.append(frame)
        self._sequences.append(frame.sequence)
        self.bytes += frame.size
        while len(self) and (len(self) > self.max_events or self.bytes > self.max_bytes):
            self._evict()

    def _evict(self) -> None:
        oldest = self._frames[self._start]
        assert oldest is not None
        self.floor = oldest.sequence
        self.bytes -= oldest.size
        self._frames[self._start] = None
        self._start += 1
        if self._start > 512 and self._start * 2 > len(self._frames):
            del self._frames[: self._start]
            del self._sequences[: self._start]
            self._start = 0

    def advance(self, head: int) -> None:
        """Move the head on past messages that have no frame."""
        self.head = max(self.head, head)

    def after(self, sequence: int, limit: int) -> list[Frame]:
        """At most `limit` frames that follow `sequence`, oldest first. Meaningful for `sequence >= floor`."""
        start = bisect_right(self._sequences, sequence, lo=self._start)
        return self._frames[start : start + limit]  # type: ignore[return-value]  # from _start on there is no None

    def between(self, first: int, last: int) -> list[Frame]:
        """The frames that follow `first` up to and with `last`, oldest first. Meaningful for `first >= floor`."""
        start = bisect_right(self._sequences, first, lo=self._start)
        stop = bisect_right(self._sequences, last, lo=start)
        return self._frames[start:stop]  # type: ignore[return-value]  # from _start on there is no None

    def before(self, sequence: int) -> Iterator[Frame]:
        """The frames that precede `sequence`, newest first."""
        stop = bisect_right(self._sequences, sequence - 1, lo=self._start)
        for index in range(stop - 1, self._start - 1, -1):
            frame = self._frames[index]
            assert frame is not None
            yield frame

    def get(self, sequence: int) -> Frame | None:
        """The frame with exactly this sequence, if it is here."""
        found = self.after(sequence - 1, 1)
        return found[0] if found and found[0].sequence == sequence else None

    def __iter__(self) -> Iterator[Frame]:
        return iter(self.after(self.floor, len(self)))

    def __repr__(self) -> str:
        return f"<History {self.epoch} ({self.floor}, {self.head}] {len(self)} frames, {self.bytes} bytes>"
