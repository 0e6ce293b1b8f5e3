"""Parked clients that are served together: the fast half of "write first, queue second".

Strategy: a client whose task is parked has nothing outstanding, and one event is to all of an audience the same bytes.
So when a round begins, an audience that is a crowd puts those that are parked into rows, and a row gets the round's bytes
in one system call (`bulk_write`). Nothing of a client is touched by that, neither its counters nor its place: these are
the row's, and a client makes them its own when it stands up or is asked (`settle`). Who takes less than all stands up, and
goes on by itself as any other.

What always holds: a client sits only while its task is parked and its connection has lent its socket. It stands up before
anything else writes, before it leaves the live path, and before its socket is closed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from sse_trio.bulk_write import BulkWrite
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

    def stand_up(self) -> Batch | None: ...

    def fell_short(self, batch: Batch, taken: int, now: float) -> int: ...

    def look(self) -> None: ...


class Row:
    """At most `SEATS` parked clients of one audience."""

    __slots__ = ("_bulk", "_look_at", "given", "guests", "last", "owed", "wrote_at")

    def __init__(self, now: float) -> None:
        self.guests: list[Guest] = []
        self.given = NOTHING
        self.last = 0
        """The sequence of the last frame that it was given, and when that was."""
        self.wrote_at = now
        self.owed: Batch | None = None
        """What the round has for it, until it is served."""
        self._bulk = BulkWrite()
        self._look_at = now

    @property
    def is_full(self) -> bool:
        return len(self.guests) == SEATS

    def admit(self, guest: Guest, descriptor: int) -> None:
        """Have it sit in the last seat."""
        guest.seat = len(self.guests)
        self.guests.append(guest)
        self._bulk.add(descriptor)

    def dismiss(self, guest: Guest) -> None:
        """Free its seat; the last one moves there."""
        self._bulk.remove(guest.seat)
        last = self.guests.pop()
        if last is not guest:
            last.seat = guest.seat
            self.guests[guest.seat] = last

    def owe(self, batch: Batch) -> Callable[[float], int]:
        """A round begins; what gives its batch to those who still sit here then."""
        self.owed = batch
        return self.serve

    def serve(self, now: float) -> int:
        """Give what it is owed to all; the number of events that went into sockets."""
        batch, self.owed = self.owed, None
        if batch is None or not self.guests:
            return 0
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
        return batch.events * len(self.guests) + sum([guest.fell_short(batch, taken, now) for guest, taken in short])

    def is_due(self, now: float) -> bool:
        """Whether it is time to see whether what it was given arrives."""
        return now >= self._look_at

    def look(self, now: float) -> int:
        """See that for each of them; 0."""
        for guest in list(self.guests):
            guest.look()
            assert guest.writer is not None
            self._look_at = now + guest.writer.timeout / 4
        return 0
