"""Older events, read from the stream for those whom memory no longer serves, and read once for all of them.

Strategy: the stream is read in pages that begin at multiples of their size, so that clients on their way through the
same past ask for the same pages. One read of a page is in flight at most; everybody who wants it waits for it, and it
is decoded and encoded once. Pages are kept for a while, bounded by bytes; full ones never change.

A read belongs to the connection (it runs in the nursery given to `open`), never to the client who asked first, so a
client that leaves takes nothing from the others. While the feed is away, readers wait; a read that a dying connection
took along is made again on the next one.

Few pages are read at once, and where more are wanted, a reader is followed for a while before the next one has its turn:
it comes by those who wait further on, and from there they go together. Page by page in turn they would all stay as far
apart as they were, and each page be read for one of them.

The end of a page is what a later read goes on from, so it has to be right: see `_end`.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import structlog
import trio

from sse_trio.discovery import InvalidDiscovery, decode
from sse_trio.history import FRAME_OVERHEAD, Frame
from sse_trio.nats_protocol import NatsError
from sse_trio.rounds import Arrived, FeedCounters
from sse_trio.subjects import matches

__all__ = ["Backlog", "Page", "Source"]

PAGE = 500
"""Sequences that a page is meant for, and messages that it holds at most."""

SMALL_PAGE = 100
"""The same where the loop has time. The server sends a page in one go, and live events stand behind it in the server's
queue, on the connection and in our loop; but each page takes several turns of the loop, and where these are long, small
ones are read more slowly than new events come."""

SLOW, FAST = 0.0003, 0.0001
"""Seconds for each message of a page, from asking for it to the last frame: above the first the loop has no time, below
the second it has again."""

CACHE_BYTES = 8 << 20
"""Bytes of pages that are kept, at most (or a single page)."""

BOUNDS_AGE = 1.0
"""Seconds for which the stream's bounds count as known."""

RETRY = 0.2
"""Seconds before a read that failed or found nothing new is made again."""

READS_AT_ONCE = 4
"""Different pages that are read at the same time."""

FOLLOWED = 1.0
"""Seconds for which what follows the last page comes before what others have waited for longer."""

ASKED_AGAIN = 0.05
"""Seconds in which a reader has written a page and asks for what follows it, in a loop that has no time; else it is slow."""

WORK = 0.0005
"""Seconds of decoding before other tasks may run, at least."""

LONGEST_WORK = 0.005
"""Seconds of decoding before other tasks may run, where they take long."""

SHARE = 0.1
"""How long a page is decoded, of the time that the others took before. A loop that has no time left takes long for each
turn; with ever the same little work in each of them, reading fell behind what was published, and readers never caught
up."""

PAUSE = 0.0005
"""Seconds (the kernel makes it one millisecond) between. A live event needs several turns of the loop, and a process
that never rests is kept waiting by others on a busy machine: with mere checkpoints live clients waited ten times longer
while somebody read from far back."""

ENDS = frozenset({"unreachable", "frozen", "closed"})
"""Reasons of a dead connection, of which the feed tells."""

WIDEST = 64 * PAGE
"""Sequences that are looked through in one step back, when the stream holds mostly other subjects."""

log = structlog.get_logger("sse_trio.backlog")


class Bounded(Protocol):
    @property
    def epoch(self) -> str: ...
    @property
    def first(self) -> int: ...
    @property
    def last(self) -> int: ...


class Source(Protocol):
    """A stream on an open connection; see `JetStream`. Methods raise `NatsError`."""

    direct: bool

    @property
    def subject(self) -> str: ...
    async def info(self) -> Bounded | None: ...
    async def read(self, sequence: int, limit: int) -> tuple[Sequence[Arrived], bool]: ...
    async def next(self, sequence: int) -> Arrived | None: ...
    async def get(self, sequence: int) -> Arrived | None: ...
    async def first_at(self, moment: datetime) -> int | None: ...


@dataclass(frozen=True, slots=True)
class Page:
    """Frames in order; between the place that was asked for and `last` (inclusive) there are no others."""

    frames: list[Frame]
    last: int


@dataclass(frozen=True, slots=True)
class _Kept:
    """A page in the cache, and its bytes; `at_end` when the stream had no more."""

    page: Page
    size: int
    at_end: bool


Place = tuple[int, int]
"""Where a page begins (behind that sequence), and its size."""


class _Read:
    """A read in flight."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.page: Page | None = None


class _Opened:
    """The stream that can be read now, and where reads run."""

    def __init__(self, source: Source, epoch: str, nursery: trio.Nursery) -> None:
        self.source = source
        self.epoch = epoch
        self.nursery = nursery
        self.reads: dict[Place, _Read] = {}
        """The pages that are wanted, those in flight among them."""
        self.queue: dict[Place, None] = {}
        """Those of them that wait for their turn, in the order in which they were asked for."""
        self.running = 0
        """How many are read now."""
        self.queued = trio.Event()
        """Set, and replaced, when another one waits."""
        self.said: set[str] = set()
        """The reasons for which reads have failed, which the log has named."""


class Backlog:
    """What the stream holds, for everybody who asks. Methods wait while it cannot be read, and may be cancelled."""

    def __init__(self, head: Callable[[], int], counters: FeedCounters) -> None:
        """`head` tells up to which sequence the feed has been given everything."""
        self.counters = counters
        self._head = head
        self._opened: _Opened | None = None
        self._changed = trio.Event()
        self._pages: OrderedDict[Place, _Kept] = OrderedDict()
        self._size = SMALL_PAGE
        self._bytes = 0
        self._epoch: str | None = None
        self._incarnation = 0
        self._bounds: tuple[int, int] | None = None
        self._bounds_until = -1.0
        self._holes = 0
        """Pages with a hole that were read; bounds that were asked before one of them may be too old for it."""
        self._asking: trio.Event | None = None

    # -- the feed's side ---------------------------------------------------------------------------------------------

    def open(self, source: Source, epoch: str, nursery: trio.Nursery) -> None:
        """The stream can be read through `source` until `close`; reads run in `nursery`."""
        if epoch != self._epoch:
            self.forget()
            self._epoch = epoch
        self.close()
        self._opened = _Opened(source, epoch, nursery)

    def forget(self) -> None:
        """What was read is no longer what the stream holds: begin anew. Reads that wait end with an empty page."""
        self._incarnation += 1
        self._pages.clear()
        self._bytes = 0
        self.close()

    def close(self) -> None:
        """The stream cannot be read now. Who waits goes on waiting, for the next `open`."""
        opened, self._opened = self._opened, None
        self._bounds_until = -1.0
        self._changed.set()
        self._changed = trio.Event()
        if opened is not None:
            opened.queue.clear()  # who waits asks the next one
            for read in opened.reads.values():
                read.done.set()

    # -- the readers' side -------------------------------------------------------------------------------------------

    async def bounds(self) -> tuple[int, int] | None:
        """The stream's first and last sequence, at most a second old; None while that cannot be known."""
        await trio.lowlevel.checkpoint()
        while True:
            opened = self._opened
            if opened is None:
                return None
            if trio.current_time() < self._bounds_until:
                return self._bounds
            if self._asking is None:
                return await self._ask(opened)
            # All at once, when the answer is there: a lock would be handed on from one to the next for a thousand.
            await self._asking.wait()

    async def _ask(self, opened: _Opened) -> tuple[int, int] | None:
        """Ask the stream for its bounds, for all who want to know."""
        asking = self._asking = trio.Event()
        holes = self._holes
        try:
            info = await opened.source.info()
        except NatsError:
            info = None
        finally:
            self._asking = None
            asking.set()
        if opened is not self._opened:
            return None
        known = info is not None and info.epoch == opened.epoch
        # That it is not known is remembered for a while, too: those who wait behind must not all wait for it again.
        self._bounds = (info.first, info.last) if known and info is not None else None
        if holes == self._holes:
            self._bounds_until = trio.current_time() + (BOUNDS_AGE if known else RETRY)
        return self._bounds

    async def read(self, after: int) -> Page:
        """The page in which the frames that follow `after` are; its `last` is always above `after`.

        It may begin with frames that do not follow `after`. Where retention has taken the next ones it goes on with
        what is left: compare with `bounds`, which is then never older than the page. There is no such hole between its
        frames. Where the stream was replaced while we waited, the page is empty and ends at `after`.
        """
        place = self._place(await self._ready(), after)
        incarnation = self._incarnation
        while True:
            page = await self._page(place, after)
            if self._incarnation != incarnation:
                return Page([], after)
            if page.last > after:
                return page
            if page.last > place[0]:
                place = (page.last, place[1])  # large messages: the page ended before its time
            else:
                await trio.sleep(RETRY)  # a lagging replica, or nothing has been published yet

    async def read_before(self, before: int) -> tuple[list[Frame], int]:
        """Frames before the sequence `before`, in order, and the sequence from which on they are complete.

        Ask again with that one for the frames before these; none are left when it is at or below the first bound.
        """
        width = PAGE
        while True:
            bounds = await self._known_bounds()
            low = max(bounds[0], before - width)
            frames: list[Frame] = []
            position = low - 1
            while position < before - 1:
                page = await self.read(position)
                if page.last == position:
                    return [], before  # the stream was replaced
                frames += [frame for frame in page.frames if position < frame.sequence < before]
                position = page.last
            if frames or low <= bounds[0]:
                return frames, low
            before, width = low, min(width * 4, WIDEST)

    async def get(self, sequence: int) -> Frame | None:
        """The frame with exactly this sequence; None when the stream does not hold it (any more)."""
        while True:
            opened = await self._ready()
            try:
                stored = await opened.source.get(sequence)
            except NatsError:
                await trio.sleep(RETRY)
                continue
            if stored is None or not matches(opened.source.subject, stored[1]):
                return None
            return _frame(opened.epoch, stored)

    async def first_at(self, moment: datetime) -> int | None:
        """The sequence of the first event stored at or after `moment` (aware); None when there is none."""
        while True:
            opened = await self._ready()
            try:
                return await opened.source.first_at(moment)
            except NatsError:
                await trio.sleep(RETRY)

    async def _ready(self) -> _Opened:
        await trio.lowlevel.checkpoint()
        while self._opened is None:
            await self._changed.wait()
        return self._opened

    async def _known_bounds(self) -> tuple[int, int]:
        while True:
            bounds = await self.bounds()
            if bounds is not None:
                return bounds
            await self._ready()
            await trio.sleep(RETRY)

    # -- pages -------------------------------------------------------------------------------------------------------

    def _place(self, opened: _Opened, after: int) -> Place:
        """The page with what follows `after`: one that is there or on its way, or one to be read."""
        for size in (PAGE, SMALL_PAGE):
            place = (after - after % size, size)
            kept = self._pages.get(place)
            if place in opened.reads or (kept is not None and kept.page.last > after):
                return place
        return (after - after % self._size, self._size)

    async def _page(self, place: Place, after: int) -> Page:
        """This page: from the cache, or from the read that is in flight, or read.

        One that the end of the stream cut short is read again when it has nothing that follows `after`.
        """
        while True:
            opened = await self._ready()
            kept = self._pages.get(place)
            if kept is not None and (kept.page.last > after or not kept.at_end):
                self._pages.move_to_end(place)
                return kept.page
            read = opened.reads.get(place)
            if read is None:
                read = opened.reads[place] = _Read()
                opened.queue[place] = None
                opened.queued.set()
                opened.queued = trio.Event()
                if opened.running < READS_AT_ONCE:
                    opened.running += 1
                    opened.nursery.start_soon(self._run, opened)
            await read.done.wait()
            if read.page is not None:
                return read.page
            if opened is self._opened:
                await trio.sleep(RETRY)

    async def _run(self, opened: _Opened) -> None:
        """Read pages, one after the other, for as long as some wait for their turn."""
        try:
            while opened.queue:
                follow_until = trio.current_time() + FOLLOWED
                place: Place | None = next(iter(opened.queue))
                while place is not None:
                    del opened.queue[place]
                    last = await self._run_one(opened, place)
                    place = await self._following(opened, last, follow_until)
        finally:
            opened.running -= 1

    async def _following(self, opened: _Opened, last: int, until: float) -> Place | None:
        """The page with what follows `last`, when somebody asks for it in time; None also when nobody else waits."""
        with trio.move_on_at(min(until, trio.current_time() + ASKED_AGAIN)):
            while opened.queue and trio.current_time() < until:
                for start, size in opened.queue:
                    if start <= last < start + size:
                        return start, size
                await opened.queued.wait()
        return None

    async def _run_one(self, opened: _Opened, place: Place) -> int:
        """Read one page; whatever becomes of it, those who wait are woken. Up to where it is complete."""
        read = opened.reads[place]
        try:
            began = time.perf_counter()
            read.page = await self._load(opened, *place)
            self._took((time.perf_counter() - began) / place[1])
            return read.page.last
        except NatsError as error:
            if error.reason == "permissions" and opened.source.direct:
                opened.source.direct = False
                log.warning("stream cannot be read directly", detail=error.detail)
            elif error.reason not in ENDS and error.reason not in opened.said:
                opened.said.add(error.reason)
                log.warning("stream cannot be read", reason=error.reason, detail=error.detail)
            return place[0]
        finally:
            del opened.reads[place]
            read.done.set()

    def _took(self, seconds: float) -> None:
        """A page took so long for each message that it is meant for; the next ones are as large as that demands."""
        if seconds > SLOW:
            self._size = PAGE
        elif seconds < FAST:
            self._size = SMALL_PAGE

    async def _load(self, opened: _Opened, start: int, size: int) -> Page:
        self.counters.stream_reads += 1
        head = self._head()
        read, at_end = await opened.source.read(start + 1, size)
        stored = await self._up_to_hole(opened, read)
        at_end = at_end and len(stored) == len(read)
        last = stored[-1][0] if stored else start
        if at_end and not stored:
            last = await self._end(opened, last, head)
        if last > start + len(stored):
            # Retention may have taken what is missing, even while this was read: whoever asks from now on must not get
            # bounds that are older than this page.
            self._holes += 1
            self._bounds_until = -1.0
        frames = []
        occupied = FRAME_OVERHEAD  # a page without frames takes room, too
        rest_at = time.perf_counter() + WORK
        for message in stored:
            if (frame := _frame(opened.epoch, message)) is not None:
                frames.append(frame)
                occupied += frame.size
            if (now := time.perf_counter()) >= rest_at:
                await trio.sleep(PAUSE)
                resumed = time.perf_counter()
                rest_at = resumed + min(max(WORK, SHARE * (resumed - now)), LONGEST_WORK)
        page = Page(frames, last)
        if opened is self._opened and last > start:
            self._keep((start, size), _Kept(page, occupied, at_end))
        return page

    async def _up_to_hole(self, opened: _Opened, stored: Sequence[Arrived]) -> Sequence[Arrived]:
        """The messages before the first hole that retention has made between them, if any, while they were read.

        Then the next page begins with the hole, where its reader looks for one.
        """
        if not stored or stored[-1][0] - stored[0][0] == len(stored) - 1:
            return stored
        info = await opened.source.info()
        first = info.first if info is not None else 0
        for index in range(1, len(stored)):
            before = stored[index - 1][0]
            if stored[index][0] > before + 1 and first > before + 1:
                return stored[:index]
        return stored

    async def _end(self, opened: _Opened, last: int, head: int) -> int:
        """Up to where an empty page is complete: its replica had nothing to give behind `last`.

        The feed was at `head` before, so the stream holds all there is up to there. But does that replica? The leader
        is asked: if nothing of ours follows up to `head`, the page is complete up to `head`, else as far as it goes.
        """
        if last >= head:
            return last
        following = await opened.source.next(last + 1)
        return head if following is None or following[0] > head else last

    def _keep(self, place: Place, kept: _Kept) -> None:
        if (replaced := self._pages.pop(place, None)) is not None:
            self._bytes -= replaced.size
        self._pages[place] = kept
        self._bytes += kept.size
        while self._bytes > CACHE_BYTES and len(self._pages) > 1:
            _, oldest = self._pages.popitem(last=False)
            self._bytes -= oldest.size

    def __repr__(self) -> str:
        state = "open" if self._opened is not None else "closed"
        return f"<Backlog {state}, {len(self._pages)} pages, {self._bytes} bytes>"


def _frame(epoch: str, stored: Arrived) -> Frame | None:
    """The frame of a stored message; None for what is no discovery (the feed has counted it when it came)."""
    sequence, subject, payload = stored
    try:
        return Frame.of(epoch, sequence, subject, decode(payload))
    except InvalidDiscovery:
        return None
