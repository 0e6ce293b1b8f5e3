"""Reading discoveries back: the ones behind a URI, or the latest; from memory first, else from the stream.

Strategy: a search is bounded in time and few run at once, so that questions about the distant past cost the live
streams nothing. What a token may not hear is not there for whoever brings it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import trio

from sse_trio.audience import Filter
from sse_trio.backlog import Backlog
from sse_trio.broadcaster import Broadcaster
from sse_trio.history import Frame, parse_event_id

__all__ = ["Latest", "NotInThisEpoch", "Reader", "SearchTooLong"]

SEARCH_TIMEOUT = 10.0
"""Seconds that one search may take."""

SEARCHES = 4
"""Searches of the stream that run at once; others wait for their turn, within their own time."""

CLOCK_SKEW = timedelta(hours=1)
"""How far behind the time in an id a discovery may have been published, and still be found by it alone."""

SCANNED_AT_ONCE = 500
"""Frames of memory that are looked at before others may run."""


class SearchTooLong(Exception):
    """The search has not ended within its time; with an event id it would be one read."""


class NotInThisEpoch(ValueError):
    """An event id is malformed, or of another incarnation of the feed."""


@dataclass(frozen=True, slots=True)
class Latest:
    """Frames, newest first, and the id to ask with for those before; None when there are none."""

    frames: list[Frame]
    next: str | None


class Reader:
    """Answers questions about the past."""

    def __init__(self, broadcaster: Broadcaster, backlog: Backlog) -> None:
        self._broadcaster = broadcaster
        self._backlog = backlog
        self._searches = trio.Semaphore(SEARCHES)

    async def find(self, uri: str, moment: int, heard: Filter, event_id: str | None = None) -> list[Frame]:
        """Every discovery with this URI that `heard` lets through, oldest first; `moment` is the time in it (unix s).

        With `event_id` the one that this names, if that has the URI.

        Raises:
            SearchTooLong: the stream was not searched to its end in time, or could not be asked.
        """
        try:
            with trio.fail_after(SEARCH_TIMEOUT):
                if event_id is not None:
                    named = await self._named(event_id)
                    if named is not None and _has(named, uri, heard):
                        return [named]
                found = await self._in_memory(uri, heard)
                if found or not self._broadcaster.durable:
                    return found
                async with self._searches:
                    return await self._in_stream(uri, moment, heard)
        except trio.TooSlowError:
            raise SearchTooLong("the search took too long; with event_id it is one read") from None

    async def _named(self, event_id: str) -> Frame | None:
        parsed = parse_event_id(event_id)
        if parsed is None or parsed[0] != self._broadcaster.epoch:
            return None
        frame = self._broadcaster.history.get(parsed[1])
        if frame is None and self._broadcaster.durable and parsed[1] <= self._broadcaster.history.floor:
            frame = await self._backlog.get(parsed[1])
        return frame

    async def _in_memory(self, uri: str, heard: Filter) -> list[Frame]:
        found = []
        for count, frame in enumerate(list(self._broadcaster.history), 1):
            if _has(frame, uri, heard):
                found.append(frame)
            if count % SCANNED_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
        return found

    async def _in_stream(self, uri: str, moment: int, heard: Filter) -> list[Frame]:
        """From an hour before the time in the id up to where memory begins."""
        try:
            since = datetime.fromtimestamp(moment, UTC) - CLOCK_SKEW
        except (OverflowError, ValueError, OSError):
            since = datetime(1970, 1, 1, tzinfo=UTC)
        first = await self._backlog.first_at(since)
        if first is None:
            return []
        found = []
        position, floor = first - 1, self._broadcaster.history.floor
        while position < floor:
            page = await self._backlog.read(position)
            found += [frame for frame in page.frames if position < frame.sequence <= floor and _has(frame, uri, heard)]
            position = page.last
        return found

    async def latest(self, heard: Filter, limit: int, before: str | None = None) -> Latest:
        """At most `limit` discoveries that `heard` lets through, newest first, those before the event `before`.

        A page may hold fewer where few are let through: `next` goes on from there.

        Raises:
            NotInThisEpoch: `before` is no id of this incarnation of the feed.
            SearchTooLong: the stream could not be asked in time.
        """
        history = self._broadcaster.history
        upto = history.head + 1
        if before is not None:
            parsed = parse_event_id(before)
            if parsed is None or parsed[0] != history.epoch:
                raise NotInThisEpoch("not an event id of this incarnation of the feed")
            upto = min(parsed[1], upto)
        found: list[Frame] = []
        for frame in history.before(upto):
            if frame.discovery is not None and heard.matches(frame):
                found.append(frame)
                if len(found) == limit:
                    return self._page(found, frame.sequence)
        upto = min(upto, history.floor + 1)
        if not self._broadcaster.durable:
            return Latest(found, None)
        try:
            with trio.fail_after(SEARCH_TIMEOUT):
                async with self._searches:
                    bounds = await self._backlog.bounds()
                    while bounds is not None and upto > bounds[0] and len(found) < limit:
                        frames, upto = await self._backlog.read_before(upto)
                        for frame in reversed(frames):
                            if heard.matches(frame):
                                found.append(frame)
                                if len(found) == limit:
                                    return self._page(found, frame.sequence)
        except trio.TooSlowError:
            if not found:
                raise SearchTooLong("the stream could not be read in time") from None
            return self._page(found, upto)
        return Latest(found, None)

    def _page(self, found: list[Frame], upto: int) -> Latest:
        return Latest(found, f"{self._broadcaster.epoch}-{upto}")


def _has(frame: Frame, uri: str, heard: Filter) -> bool:
    return frame.discovery is not None and frame.discovery.uri == uri and heard.matches(frame)
