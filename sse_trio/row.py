"""Parked clients that are served together: the fast half of "write first, queue second".

Strategy: a client whose task is parked has nothing outstanding, and one event is to all of an audience the same bytes.
So when a round comes to an audience that is a crowd, those that are parked sit down in rows, and a row gets the round's
bytes in one system call (`bulk_write`). Nothing of a client is touched by that, neither its counters nor its place: these
are the row's, and a client makes them its own when it stands up or is asked (`settle`). Who takes less than all stands up,
and goes on by itself as any other. Keep-alives are a row's, too: of a hundred timers the first one's is left.

What always holds: a client sits only while its task is parked and its connection has lent its socket. It stands up before
anything else writes, before it leaves the live path, and before its socket is closed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

from sse_trio.bulk_write import BulkWrite
from sse_trio.deadline import SMALL
from sse_trio.history import Batch

__all__ = ["NOTHING", "SEATS", "Given", "Guest", "Row", "Writer"]

SEATS = 100
"""Clients of one row, which is served without letting others run: less than a millisecond."""


class Writer(Protocol):
    """What a client's socket can do for the publisher while the client's task is parked."""

    timeout: float

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

    @property
    def spoke_early(self) -> bool:
        """Whether the peer has said something after its request, so that its end would go unseen."""
        ...

    def lend(self, closing: Callable[[], None]) -> int | None:
        """The descriptor of the socket, for others to write `framed` batches to; None where there is none to lend.

        `closing` is called before it is closed.
        """
        ...

    def reclaim(self) -> None:
        """It is lent no more."""
        ...

    def framed(self, batch: Batch) -> bytes:
        """The batch as it goes into a socket that is lent."""
        ...

    def wrote(self, size: int) -> None:
        """Others have written so many bytes to the socket, in whole batches."""
        ...

    def wrote_part(self, batch: Batch, size: int) -> None:
        """Others have written the first `size` bytes of a framed batch, and what follows is the rest."""
        ...

    def look(self) -> None:
        """See whether what was written arrives.

        Raises:
            OSError, trio.BrokenResourceError: the peer is gone.
        """
        ...

    def unwatch(self) -> None:
        """Have the kernel not give up on the peer by itself: more is on its way than it need have room for."""
        ...


class Given(NamedTuple):
    """What a row has been given in all: a number that means something beside an earlier one only."""

    events: int
    size: int
    """Bytes of the frames."""
    wire: int
    """Bytes with what the connection puts around them."""


NOTHING = Given(0, 0, 0)


class Guest(Protocol):
    """What a row asks of a client."""

    seat: int
    writer: Writer | None

    def settle(self) -> None:
        """Make its own what the row has been given since the last time."""
        ...

    def stand_up(self) -> Batch | None:
        """Leave the row; what the round still has for that."""
        ...

    def fell_short(self, batch: Batch, taken: int, now: float) -> int:
        """It took so much of a batch, or none for that errno (< 0); the number of events that it has then."""
        ...

    def look(self) -> None:
        """See whether what the row was given arrives."""
        ...

    def unwatch(self) -> None:
        """See `Writer`."""
        ...

    def wake(self) -> None:
        """Have its task look at its state, and so stand up."""
        ...

    def rest_until(self, when: float) -> None:
        """Have its task sleep until then."""
        ...

    @property
    def spoke_early(self) -> bool:
        """See `Writer`."""
        ...


class Row:
    """At most `SEATS` parked clients of one audience."""

    __slots__ = ("_bulk", "_look_at", "_silence", "_since_look", "given", "guests", "last", "owed", "wrote_at")

    def __init__(self, now: float, silence: float) -> None:
        """A silence of so many seconds is filled with a keep-alive."""
        self._silence = silence
        self.guests: list[Guest] = []
        self.given = NOTHING
        self.last = 0
        """The sequence that all of them know to have passed."""
        self.wrote_at = now
        """When it was given something."""
        self.owed: Batch | None = None
        """What the round has for it, until it is served."""
        self._bulk = BulkWrite()
        self._look_at = now
        self._since_look = 0

    @property
    def is_full(self) -> bool:
        return len(self.guests) >= SEATS

    @property
    def is_small(self) -> bool:
        """Whether another of its kind would fit in."""
        return len(self.guests) <= SEATS // 2

    def admit(self, guest: Guest, descriptor: int) -> None:
        """Have it sit in the last seat. A row whose first guest that is must be given something, or owe it, at once."""
        guest.seat = len(self.guests)
        self.guests.append(guest)
        self._bulk.add(descriptor)
        if self._since_look > SMALL:
            guest.unwatch()
        guest.rest_until(self.wrote_at + self._silence if guest.seat == 0 else math.inf)

    def dismiss(self, guest: Guest) -> None:
        """Free its seat; the last one moves there."""
        self._bulk.remove(guest.seat)
        last = self.guests.pop()
        if last is not guest:
            last.seat = guest.seat
            self.guests[guest.seat] = last
            if guest.seat == 0:
                last.rest_until(self.wrote_at + self._silence)

    def owe(self, batch: Batch) -> Callable[[float], int]:
        """The turn of its audience has come; what gives the batch to those who still sit here then."""
        self.owed = batch
        return self.serve

    def serve(self, now: float) -> int:
        """Give what it is owed to all; the number of events that went into sockets."""
        batch, self.owed = self.owed, None
        return self._give(batch, now) if batch is not None and self.guests else 0

    def keep_alive(self, filler: Batch, now: float) -> None:
        """Give all what fills a silence. It is the first one's timer that ran out; who is first now has the next."""
        if self.is_due(now):
            self.look(now)
        for guest in [guest for guest in self.guests if guest.spoke_early]:
            guest.wake()
        if self.guests:
            self._give(filler, now)
        for guest in self.guests[:1]:
            guest.rest_until(now + self._silence)

    def _give(self, batch: Batch, now: float) -> int:
        writer = self.guests[0].writer
        assert writer is not None, "who sits has lent its socket"
        data = writer.framed(batch)
        short = [(self.guests[seat], taken) for seat, taken in self._bulk.write(data)]
        for guest, _ in short:
            guest.stand_up()
        events, size, wire = self.given
        self.given = Given(events + batch.events, size + batch.size, wire + len(data))
        self.last = batch.last
        self.wrote_at = now
        was_little = self._since_look <= SMALL
        self._since_look += len(data)
        if was_little and self._since_look > SMALL:
            for guest in self.guests:
                guest.unwatch()
        return batch.events * len(self.guests) + sum([guest.fell_short(batch, taken, now) for guest, taken in short])

    def is_due(self, now: float) -> bool:
        """Whether it is time to see whether what it was given arrives."""
        return now >= self._look_at

    def look(self, now: float) -> None:
        """See whether it arrives at each of them."""
        self._since_look = 0
        for guest in list(self.guests):
            assert guest.writer is not None
            self._look_at = now + guest.writer.timeout / 4
            guest.look()

    def dissolve(self) -> None:
        """Have all stand up, while nothing is owed, for another row to take them at once: no timer of theirs is set."""
        for guest in list(self.guests):
            guest.stand_up()
