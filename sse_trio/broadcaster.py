"""Who is listening, and giving each of them what they ask for.

Strategy: `publish` is one synchronous step: the events go into history, the head moves, and a round begins in which
every live client is offered what its audience (the clients with its filter) shall hear, joined once per audience.
A round over thousands of sockets takes longer than the event loop may stand still, and so does making the bytes of
thousands of audiences. So it is served in slices, each about a row of clients that sit together (`row`) or as many that do
not: the feed calls `deliver` until it says False, and lets others run in between. A round is always finished before the
next begins.

Why nothing is lost or doubled: a client joins with its place fixed at the head (or at its cursor) in one block without
an await, and a round goes to exactly those who were live when it began. Who is not live reads history at its own pace,
and steps back onto the live path in one such block, when its place is the head.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import trio

from sse_trio import sse
from sse_trio.audience import EVERYTHING, Audience, Books, Filter, Passed
from sse_trio.bulk_write import BulkWrite
from sse_trio.client import Client
from sse_trio.discovery import Discovery
from sse_trio.history import Batch, Frame, History, event_id, events_among, parse_event_id
from sse_trio.row import SEATS, Row
from sse_trio.settings import Settings

__all__ = ["Broadcaster", "Event", "Latency"]

Event = tuple[int, str, Discovery]
"""Sequence, NATS subject, discovery."""

SLICE = SEATS
"""Clients that are served before others may run: about a millisecond of writes."""

FRAMES = 16
"""Frames of a round that take an audience about as long to look at as it takes to serve a client."""

Portion = tuple[int, Callable[[float], int]]
"""So many clients of a round, and what serves them, given the time; it returns the events that went into sockets."""


class Latency:
    """A histogram of the time from NATS to the socket, counted per delivered event."""

    BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
    """Upper bounds of the buckets, in seconds."""

    def __init__(self) -> None:
        self.counts = [0] * (len(self.BOUNDS) + 1)
        self.sum = 0.0

    def observe(self, seconds: float, events: int) -> None:
        self.counts[bisect_left(self.BOUNDS, seconds)] += events
        self.sum += seconds * events


class Broadcaster:
    """The registry of clients, and the recent history that they read from."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.history = History(settings.history, settings.history_bytes)
        self.clients: dict[str, Client] = {}
        self.live = False
        """Whether the feed has ever been live: before that there is no head to be at."""
        self.durable = False
        """Whether what history has forgotten can be read from the stream."""
        self.stopping: sse.GoodbyeReason | None = None
        self.latency = Latency()
        self.connects = 0
        self.disconnects: Counter[str] = Counter()
        self.gaps: Counter[str] = Counter()
        self.resumes: Counter[str] = Counter()
        """Cursors that were settled: from `memory`, from the `stream`, or `none` of them."""
        self.published = 0
        self.past: Counter[str] = Counter()
        """What was counted of clients that have left; `/metrics` adds those who are here."""
        self._past_books = Books()
        self._audiences: dict[Filter, Audience[Client]] = {}
        self._round: Iterator[None] | None = None
        """What serves the rest of it, and stops wherever others may run."""
        self._received_at = 0.0
        self._settled = 0
        self._waiting_for_head: set[Client] = set()
        has_rows = settings.direct_writes == "together" and BulkWrite.works()
        self._silence = settings.keepalive_interval if has_rows else None

    # -- the feed's side: synchronous, never raises because of a client ----------------------------------------------

    @property
    def epoch(self) -> str | None:
        return self.history.epoch

    @property
    def head(self) -> int:
        return self.history.head

    @property
    def head_id(self) -> str | None:
        """The id of the newest event; None while the feed has not been live."""
        return event_id(self.history.epoch, self.head) if self.live and self.history.epoch is not None else None

    @property
    def _holds_history(self) -> bool:
        """Whether a client that is behind can read on from somewhere."""
        return self.durable or self.settings.history > 0

    @property
    def settled(self) -> int:
        """The head that every live client has been offered everything up to."""
        return self._settled

    def open_epoch(self, epoch: str, head: int, *, durable: bool = False) -> None:
        """Begin an incarnation of the feed whose events will have sequences above `head`.

        With `durable` the feed can be asked for what history has forgotten. Clients of another incarnation get a
        `gap` (`restart`) after what they still hold, and go on from `head`.
        """
        self._finish_round()
        self.durable = durable
        if durable:
            # The seam between the stream and the live path needs one buffer's worth of overlap.
            self.history.max_events = max(self.settings.history, self.settings.buffer)
            self.history.max_bytes = max(self.settings.history_bytes, 1 << 20)
        self.history.open(epoch, head)
        self._settled = head
        for client in self.clients.values():
            client.lagging_on_history = self._holds_history
        if self.live:
            for client in self.clients.values():
                client.leave()
                if client.cursor is None:  # else `resolve` finds out: it may be of this very incarnation
                    client.due = "restart"
                    client.position = client.told = head
                    client.accounted = client.audience.passed
                client.wake()
        for audience in self._audiences.values():
            audience.reopen(head)

    def go_live(self) -> None:
        """The feed is live: who came before it without a cursor hears everything from now on."""
        if self.live:
            return
        self.live = True
        self._settled = self.head
        for client in self.clients.values():
            if client.cursor is None:
                client.position = self.head  # not `told`: its first keep-alive brings it an id to come back with
                client.join()
            else:
                client.wake()  # its task finds out what the cursor is worth

    def publish(self, events: Sequence[Event], head: int | None = None, *, received_at: float = 0.0) -> None:
        """Add the events to history and offer them to the clients; call `deliver` until it says False.

        Sequences ascend; `head` is where the feed stands after them (messages that are no events move it too).
        `received_at` is the `time.perf_counter()` of their arrival. Before `go_live` nobody is offered anything.
        """
        epoch = self.history.epoch
        assert epoch is not None, "open_epoch comes before publish"
        limit = self.settings.buffer
        for start in range(0, len(events), limit):
            self._finish_round()
            frames = [Frame.of(epoch, *event, received_at) for event in events[start : start + limit]]
            self.published += len(frames)
            self._begin_round(frames, received_at)
        if head is not None:
            self.history.advance(head)
        self.deliver()

    def gap(self, reason: sse.GapReason, sequence: int) -> None:
        """Put a notice at `sequence`, above the head: everybody who passes it is told that events are missing there."""
        epoch = self.history.epoch
        assert epoch is not None, "open_epoch comes before gap"
        self._finish_round()
        self.gaps[reason] += len(self.clients)
        self._begin_round([Frame.notice(epoch, sequence, reason)], time.perf_counter())
        self._finish_round()

    def _begin_round(self, frames: list[Frame], received_at: float) -> None:
        for frame in frames:
            self.history.append(frame)
        self._received_at = received_at
        if not self.live:
            return
        events = events_among(frames)
        for audience in self._audiences.values():
            audience.expect(frames, events)
        # Audiences that are here now. A client that comes later is at the head already: its place tells.
        self._round = self._serve(tuple(self._audiences.values()), len(frames))

    def _serve(self, audiences: Sequence[Audience[Client]], frames: int) -> Iterator[None]:
        """Serve a round to one audience after the other, each with bytes that are made when it is its turn."""
        done = 0
        looks: list[Row] = []
        for audience in audiences:
            if done >= SLICE:
                done = 0
                yield
            done += 1 + frames // FRAMES
            batch = audience.begin()
            if batch is None:
                continue
            for size, serve in self._portions(audience, batch, looks):
                if done >= SLICE:
                    done = 0
                    yield
                done += size
                written = serve(trio.current_time())
                if written and self._received_at:
                    self.latency.observe(time.perf_counter() - self._received_at, written)
        for row in looks:  # which takes time, when all have been served
            yield
            row.look(trio.current_time())

    def _portions(self, audience: Audience[Client], batch: Batch, looks: list[Row]) -> list[Portion]:
        """All clients of an audience; the rows that are to be looked at, too, go to `looks`."""
        now = trio.current_time()
        portions: list[Portion] = []
        for row in audience.seat(now, batch.last):
            portions.append((len(row.guests), row.owe(batch)))
            if row.is_due(now):
                looks.append(row)
        if flocks := audience.flocks():
            portions += [(len(flock), partial(self._seat_and_offer, audience, batch, flock)) for flock in flocks]
        else:
            standing = list(audience.standing)
            for start in range(0, len(standing), SLICE):
                some = standing[start : start + SLICE]
                portions.append((len(some), partial(self._offer, batch, some)))
        return portions

    @staticmethod
    def _offer(batch: Batch, clients: list[Client], now: float) -> int:
        return sum([client.offer(batch, now) for client in clients])

    @staticmethod
    def _seat_and_offer(audience: Audience[Client], batch: Batch, clients: list[Client], now: float) -> int:
        row = audience.seat_together([client for client in clients if client.position < batch.last], now)
        seated = row.owe(batch)(now)
        return seated + sum([client.offer(batch, now) for client in clients if client.row is None])

    def deliver(self) -> bool:
        """Serve the next slice of the round; whether some clients still wait for theirs."""
        if self._waiting_for_head:
            self._wake_those_ahead()
        if self._round is not None and next(self._round, "it is over") is None:
            return True
        self._round = None
        self._settled = self.head
        return False

    def _finish_round(self) -> None:
        while self.deliver():
            pass

    def _wake_those_ahead(self) -> None:
        for client in [client for client in self._waiting_for_head if client.position <= self.head]:
            self._waiting_for_head.discard(client)
            client.wake()

    def drain(self, reason: sse.GoodbyeReason) -> None:
        """End every stream with a goodbye; who comes after this gets one at once."""
        self.stopping = reason
        for client in self.clients.values():
            client.end(reason)

    # -- the streams' side -------------------------------------------------------------------------------------------

    @contextmanager
    def subscribe(
        self,
        agent_id: str,
        filter: Filter = EVERYTHING,
        *,
        cursor: str | None = None,
        address: str = "",
    ) -> Iterator[Client]:
        """A client that is in the registry exactly while the block runs.

        Synchronous from the first line to the last: cancellation has nowhere to land in it. Without a `cursor` the
        client is live at once (as soon as the feed is); with one, see `resolve`.
        """
        audience = self._audiences.get(filter)
        if audience is None:
            audience = self._audiences[filter] = Audience(filter, self._silence)
        filter = audience.filter  # the same for all: this frame keeps it for as long as the client is here
        client = Client(
            agent_id, audience, capacity=self.settings.buffer, overflow=self.settings.overflow, address=address
        )
        client.lagging_on_history = self._holds_history
        client.wrote_at = trio.current_time()
        client.cursor = cursor
        audience.enter(client)
        self.clients[client.id] = client
        self.connects += 1
        if self.live:
            client.position = self.head
            if cursor is None:
                client.told = self.head
                client.join()
            else:
                self.resolve(client)
        if self.stopping is not None:
            client.end(self.stopping)
        try:
            yield client
        finally:
            self._waiting_for_head.discard(client)
            del self.clients[client.id]
            client.close()
            audience.leave(client)
            if not audience.size:
                del self._audiences[filter]
            books = client.books()
            self._past_books = _sum(self._past_books, books._replace(waiting=0, undelivered=books.waiting))
            self.past["bytes"] += client.bytes
            self.past["overflows"] += client.overflows
            self.past["high_water"] = max(self.past["high_water"], client.high_water)

    def resolve(self, client: Client, bounds: tuple[int, int] | None = None) -> None:
        """Find out what the client's cursor is worth, and put the client at its place.

        Clears `client.cursor` and sets `client.resumed`, `position` and the gap that is `due` once that is known: at
        once where history holds the place, else with the stream's `bounds` (first and last sequence).
        """
        assert client.cursor is not None
        parsed = parse_event_id(client.cursor)
        if parsed is None or parsed[0] != self.history.epoch:
            self._settle_cursor(client, self.head, "restart")
            return
        sequence = parsed[1]
        if self.history.floor <= sequence <= self.head:
            self._settle_cursor(client, sequence)
        elif not self.durable and sequence > self.head:
            self._settle_cursor(client, self.head, "restart")
        elif not self.durable:
            self._settle_cursor(client, self.history.floor, "expired")
        elif bounds is not None:
            first, last = bounds
            if sequence > max(last, self.head):
                self._settle_cursor(client, self.head, "restart")
            elif sequence < first - 1:
                # Not at the memory's floor: the stream may hold what lies between.
                self._settle_cursor(client, first - 1, "expired")
            else:
                self._settle_cursor(client, sequence)

    def _settle_cursor(self, client: Client, position: int, due: sse.GapReason | None = None) -> None:
        self.resumes["none" if due else "memory" if position >= self.history.floor else "stream"] += 1
        client.cursor = None
        client.resumed = due is None
        client.due = due
        client.position = client.told = position
        if position == self.head and due is None:
            client.join()
        elif not self.durable:  # there nothing is ever skipped, and this is not asked for
            client.accounted = self._passed(client)

    def _passed(self, client: Client) -> Passed:
        """What had passed the client's audience at its place, which memory holds."""
        return client.audience.passed_at(client.position, self.history)

    def read(self, client: Client, limit: int) -> Sequence[Frame]:
        """What history holds for a client off the live path, at most `limit` frames scanned; it moves on past them.

        When that reaches the head the client is live again from the same moment. Nothing for a client that is behind
        history (see `is_behind`) or ahead of the head (it is woken when the head gets there).
        """
        if client.position > self.head:
            self._waiting_for_head.add(client)
            return []
        frames = self.history.after(client.position, limit)
        client.position = frames[-1].sequence if len(frames) == limit else self.head
        heard = client.pass_by(frames)
        if client.position == self.head:
            client.join()
        return heard

    def filler(self, client: Client) -> Batch:
        """What fills a silence for this client: an id, where filters have kept out what it has passed, else a comment."""
        if client.live and self.settled > client.told and self.epoch is not None:
            return Batch.filler(sse.cursor(event_id(self.epoch, self.settled)), self.settled)
        return Batch.filler(sse.KEEP_ALIVE, client.told)

    def keep_others_alive(self, client: Client, filler: Batch) -> None:
        """Give what `filler` has found for a client to those who sat with it, or who stand in silence as it does."""
        now = trio.current_time()
        row = client.row_before
        if row is None and client.writer is not None and self._round is None:
            row = client.audience.gather(now, client.told)
        if row is not None and row.owed is None:
            row.keep_alive(filler, now)

    def is_behind(self, client: Client) -> bool:
        """Whether history no longer holds what this client needs next."""
        return client.position < self.history.floor

    def skip(self, client: Client) -> int | None:
        """Put a client that is behind at the oldest place that history holds; how many events it missed.

        None where that cannot be known: a notice of unknown loss lies in the hole.
        """
        hides_notice = client.position < self.history.last_notice <= self.history.floor
        client.position = self.history.floor
        client.told = client.position
        missed = client.account(self._passed(client))
        client.dropped += missed
        return None if hides_notice else missed

    def books(self) -> Books:
        """What has become of the events that passed the streams that there are and were."""
        return _sum(self._past_books, *(client.books() for client in self.clients.values()))

    def __repr__(self) -> str:
        state = "live" if self.live else "not live"
        return f"<Broadcaster {len(self.clients)} clients, {state}, {self.history!r}>"


def _sum(*books: Books) -> Books:
    return Books(*map(sum, zip(*books, strict=True)))
