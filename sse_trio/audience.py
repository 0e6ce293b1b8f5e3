"""Who hears the same: the filter, the clients that share it, and the books of what has passed them.

Strategy: clients with equal filters are one audience. A round is filtered, joined and counted once for all of them, so
neither filters nor books cost anything for each client on the live path; a client enters into its own books what has
passed its audience when it leaves that path, or is asked (`Client.account`). Those of a crowd that are parked sit in rows
(`row`) and are written to together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, NamedTuple, Protocol, TypeVar

from sse_trio.history import Batch, Frame, History, events_among
from sse_trio.row import SEATS, Guest, Row
from sse_trio.subjects import Patterns

__all__ = ["EVERYTHING", "Audience", "Books", "Filter", "Passed"]

CROWD = 16
"""From so many clients on an audience has rows: a row costs memory, and a few are written to as fast one by one."""

MANY = 2 * SEATS
"""More than are seated at once."""


class Visitor(Guest, Protocol):
    """What an audience asks of a client besides."""

    position: int
    told: int
    wrote_at: float

    def sit(self, row: Row) -> None:
        """Take a seat in the row, if its socket can be lent."""
        ...

    @property
    def may_sit(self) -> bool:
        """Whether it stands, has nothing to do and nothing outstanding."""
        ...


Member = TypeVar("Member", bound=Visitor)


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
    _asked: Patterns = field(init=False, repr=False, compare=False)
    _allowed: Patterns = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_asked", Patterns(self.subjects))
        object.__setattr__(self, "_allowed", Patterns(self.granted or ()))

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
            and (not self.subjects or self._asked.match(frame.subject))
            and (self.granted is None or self._allowed.match(frame.subject))
        )

    def let_through(self, frames: Sequence[Frame]) -> Sequence[Frame]:
        """Those of the frames that this client hears."""
        return frames if self.is_open else [frame for frame in frames if self.matches(frame)]

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


class Passed(NamedTuple):
    """How much has passed an audience up to some place: a number that means something beside another one only."""

    events: int
    heard: int
    filtered: int

    def plus(self, other: Passed) -> Passed:
        return Passed(self.events + other.events, self.heard + other.heard, self.filtered + other.filtered)

    def less(self, other: Passed) -> Passed:
        return Passed(self.events - other.events, self.heard - other.heard, self.filtered - other.filtered)


class Books(NamedTuple):
    """What has become of the events that passed one stream, or all: `offered` is the sum of the others, at any moment.

    Each is counted where it happens, none from the others. An event passes a stream once, while that is open: in a
    round of the live path, when it is read for it from memory or from JetStream, or when memory forgets it before. So
    what a stream that lags has still to read has not passed it; nor what followed when it was ended, for being full or
    for another reason; nor what retention took first (a gap `expired`), what a new incarnation of the feed cut off
    (`restart`), or what never came (`upstream`), whose numbers nobody knows. Notices are no events.
    """

    offered: int = 0
    out: int = 0
    """Written to the connection. What the kernel still holds when the peer goes may be lost yet."""
    dropped: int = 0
    """Missed because its queue was full or memory went on: what its gaps `overflow` name."""
    filtered: int = 0
    """Kept out by its filter."""
    waiting: int = 0
    """For it, in its queue or in the hands of its task."""
    undelivered: int = 0
    """What was waiting when the stream ended."""


class Audience(Generic[Member]):
    """The clients with one filter, and what has passed them together."""

    __slots__ = (
        "_coming",
        "_events",
        "_filtered",
        "_heard",
        "_known",
        "_last",
        "_round",
        "_rows",
        "_silence",
        "_to_offer",
        "filter",
        "size",
        "standing",
    )

    def __init__(self, filter: Filter, silence: float | None = None) -> None:
        """Rows keep alive after that many seconds of silence; None: it has no rows."""
        self.filter = filter
        self._silence = silence
        self.size = 0
        """Its clients."""
        self._rows: list[Row] = []
        self.standing: dict[Member, None] = {}
        """Those who do not sit in a row."""
        self._events = self._heard = self._filtered = 0
        self._last = 0
        self._round = (0, 0, 0)
        self._coming: tuple[Sequence[Frame], int] | None = None
        self._to_offer: tuple[Sequence[Frame], Sequence[Frame]] = ((), ())
        self._known: tuple[int, Passed] | None = None

    def expect(self, frames: Sequence[Frame], events: int) -> None:
        """A round of `events` events, or of notices (0), passes. It is looked at when it must be: see `begin`."""
        self._coming = frames, events

    def _look(self) -> None:
        """Filter and count the round that has come, if that has still to be done."""
        if self._coming is None:
            return
        (frames, events), self._coming = self._coming, None
        heard = self.filter.let_through(frames)
        given = len(heard) if events else 0
        kept_out = len(frames) - len(heard)
        self._events += events
        self._heard += given
        self._filtered += kept_out
        self._round = events, given, kept_out
        if heard:
            self._last = heard[-1].sequence
        self._to_offer = heard, frames

    def begin(self) -> Batch | None:
        """The round's turn is with this audience: what its clients shall be offered of it."""
        self._look()
        (heard, frames), self._to_offer = self._to_offer, ((), ())
        return Batch(heard, self.filter.full, frames, self._round[1]) if heard else None

    def reopen(self, head: int) -> None:
        """Sequences are another incarnation's from now on, above `head`; between two rounds."""
        self._last = head
        self._known = None

    def enter(self, client: Member) -> None:
        self.size += 1
        self.standing[client] = None

    def leave(self, client: Member) -> None:
        """A client that does not sit in a row goes."""
        self.size -= 1
        del self.standing[client]

    @property
    def is_crowd(self) -> bool:
        """Whether its clients may sit in rows."""
        return self._silence is not None and self.size >= CROWD

    def seat(self, now: float, last: int) -> list[Row]:
        """Before it is given what ends with `last`: have a few that stand sit, and make one row of two small ones; all rows.

        Who has come since the round began knows that already, and stands. Where many stand it is left to the round's
        slices, see `flocks`: to seat thousands takes a while.
        """
        if self.is_crowd:
            for row in [row for row in self._rows if row.is_small][1:3]:
                row.dissolve()
        self._rows = [row for row in self._rows if row.guests]
        if self.is_crowd and len(self.standing) <= MANY:
            free = [row for row in self._rows if not row.is_full]
            for client in [client for client in self.standing if client.position < last and client.may_sit]:
                if not free:
                    free.append(self._new_row(now))
                client.sit(free[-1])
                if free[-1].is_full:
                    free.pop()
        return self._rows

    def flocks(self) -> list[list[Member]]:
        """Those who stand, a row's worth in each, where they are so many that `seat` has left them."""
        if not self.is_crowd or len(self.standing) <= MANY:
            return []
        clients = list(self.standing)
        return [clients[start : start + SEATS] for start in range(0, len(clients), SEATS)]

    def seat_together(self, clients: Sequence[Member], now: float) -> Row:
        """A new row, of those of these clients who may sit. It must be given something at once."""
        row = self._new_row(now)
        for client in clients:
            if client.may_sit:
                client.sit(row)
        return row

    def gather(self, now: float, told: int) -> Row | None:
        """A new row of clients that stand, in silence for some time, and know to have passed just that. Between rounds.

        Of those who stand it looks at the first only: it is asked for each of them.
        """
        if self._silence is None or not self.is_crowd:
            return None
        before = now - self._silence / 2
        first = list(islice(self.standing, SEATS))
        self._rows = [row for row in self._rows if row.guests]
        return self.seat_together(
            [client for client in first if client.told == told and client.wrote_at <= before], now
        )

    def _new_row(self, now: float) -> Row:
        assert self._silence is not None, "only a crowd has rows"
        row = Row(now, self._silence)
        self._rows.append(row)
        return row

    @property
    def passed(self) -> Passed:
        """What has passed it, with the latest round."""
        self._look()
        return Passed(self._events, self._heard, self._filtered)

    def passed_live(self, place: int) -> Passed:
        """What has passed a live client at that place: the latest round only when it has been served it.

        One whose turn has still to come is not looked at for that: who asks for all books asks every audience at once.
        """
        if self._coming is not None and place < self._coming[0][0].sequence:
            return Passed(self._events, self._heard, self._filtered)
        passed = self.passed
        return passed.less(Passed(*self._round)) if place < self._last else passed

    def passed_without(self, newest: Sequence[Frame]) -> Passed:
        """What had passed it before these frames came, which are the newest."""
        return self.passed.less(self._among(newest))

    def passed_at(self, place: int, history: History) -> Passed:
        """What had passed it at a place that memory holds.

        It is counted from the head, or from where it was last asked for, if that is nearer: when a crowd comes back,
        most are at about the same place.
        """
        known, passed = history.head, self.passed
        if self._known is not None and abs(self._known[0] - place) < known - place and self._known[0] >= history.floor:
            known, passed = self._known
        if place < known:
            passed = passed.less(self._among(history.between(place, known)))
        else:
            passed = passed.plus(self._among(history.between(known, place)))
        self._known = place, passed
        return passed

    def _among(self, frames: Sequence[Frame]) -> Passed:
        heard = self.filter.let_through(frames)
        return Passed(events_among(frames), events_among(heard), len(frames) - len(heard))
