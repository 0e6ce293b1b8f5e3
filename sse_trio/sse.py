"""Server-Sent Events: frames to bytes, and bytes to events (WHATWG HTML section 9.2).

Strategy: a frame is made once, as bytes, and the same object goes to every client, so nothing here is lazy
and nothing depends on the reader. The lines of a frame stand in the order `retry`, `event`, `data`, `id`: a
client that commits the id as soon as it sees that line must not skip a frame that was cut short. `event` and
`id` refuse what could end their line; `data` is split wherever a reader would split it (CRLF, CR or LF, and
nowhere else), so no payload can forge a field. All data that we write ourselves is compact ASCII JSON, for
readers who split lines at U+2028 as well.

`Decoder` is the other half, for `sse-trio tail`, the listener and the tests: it works on bytes in any pieces.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, Literal

__all__ = [
    "KEEP_ALIVE",
    "Decoder",
    "GapReason",
    "GoodbyeReason",
    "ServerSentEvent",
    "compact",
    "connected",
    "cursor",
    "discovery",
    "encode",
    "full_discovery",
    "gap",
    "goodbye",
]

GapReason = Literal["overflow", "expired", "restart", "upstream"]
GoodbyeReason = Literal["shutdown", "lifetime", "overflow", "kicked", "capacity", "expired"]

# One line feed, not two: after an `id:` several clients make an empty event of a comment with a blank line
# behind it.
KEEP_ALIVE: bytes = b": keep-alive\n"

_LINE_END = re.compile(r"\r\n|\r|\n")
_FORBIDDEN = re.compile(r"[\r\n\0]")
_NOTIFICATION = "notifications/resources/updated"

compact = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode
"""An object as one line of compact ASCII JSON; ValueError for NaN, TypeError for what JSON does not have."""


def encode(event: str, data: str, *, id: str | None = None, retry: int | None = None) -> bytes:
    """One whole frame, up to and including its blank line.

    A reader gets back exactly `event`, `id`, and `data` with each CRLF and CR turned into LF. An empty
    `event` writes no such line (a reader then calls it `message`); an empty `id` resets the reader's cursor;
    None leaves it alone.

    Raises:
        ValueError: `event` or `id` holds CR, LF or NUL, `retry` (milliseconds) is negative, or a text holds a
            lone surrogate.
    """
    lines = []
    if retry is not None:
        if retry < 0:
            raise ValueError("retry is a number of milliseconds, not negative")
        lines.append(f"retry: {retry:d}")
    if event:
        if _FORBIDDEN.search(event):
            raise ValueError("an event's name holds no CR, LF or NUL")
        lines.append(f"event: {event}")
    lines += [f"data: {line}" for line in _LINE_END.split(data)]
    if id is not None:
        if _FORBIDDEN.search(id):
            raise ValueError("an event's id holds no CR, LF or NUL")
        lines.append(f"id: {id}")
    lines.append("\n")
    return "\n".join(lines).encode()


def connected(
    agent_id: str,
    client_id: str,
    *,
    retry: int,
    id: str | None,
    resumed: bool | EllipsisType | None = ...,
) -> bytes:
    """The first frame of a stream. `resumed` is for where a cursor was sent; None: not known yet."""
    data: dict[str, Any] = {"agent_id": agent_id, "client_id": client_id}
    if resumed is not ...:
        data["resumed"] = resumed
    return encode("connected", compact(data), id=id, retry=retry)


def discovery(uri: str, id: str) -> bytes:
    """The notification that a resource has come to be.

    The hot path, so it trusts its caller: `uri` is percent-encoded, and `id` is of `[A-Za-z0-9.-]`.
    """
    data = f'{{"jsonrpc":"2.0","method":"{_NOTIFICATION}","params":{{"uri":"{uri}"}}}}'
    return f"event: discovery\ndata: {data}\nid: {id}\n\n".encode("ascii")


def full_discovery(uri: str, id: str, published: dict[str, Any]) -> bytes:
    """The same with the whole discovery, as published, at `params._meta.discovery` (`detail=full`)."""
    params = {"uri": uri, "_meta": {"discovery": published}}
    return encode("discovery", compact({"jsonrpc": "2.0", "method": _NOTIFICATION, "params": params}), id=id)


def gap(reason: GapReason, missed: int | None, id: str) -> bytes:
    """Events are missing here, `id` being the last of them. `missed`: how many, None if not known."""
    return encode("gap", compact({"reason": reason, "missed": missed}), id=id)


def cursor(id: str) -> bytes:
    """Moves on the cursor of a client whose filter has skipped events."""
    return encode("cursor", "{}", id=id)


def goodbye(reason: GoodbyeReason, retry: int) -> bytes:
    """The last frame of a stream that the server ends: why, and after how many milliseconds to come back."""
    return encode("goodbye", compact({"reason": reason}), retry=retry)


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """One event as a reader sees it; `id` is the last event ID by then, perhaps an earlier event's."""

    event: str
    data: str
    id: str


_ENDS = re.compile(rb"[\r\n]")
_BOM = b"\xef\xbb\xbf"


class Decoder:
    """Reads a stream of events in pieces of any size, by the rules for EventSource.

    `last_event_id` is the cursor to reconnect with (given one, it stays until the stream sets another);
    `retry` is the reconnection time in milliseconds that the stream asked for last, None until it has. An
    event that the stream's end cuts short is never dispatched, nor is its id taken.

    A line end is an ASCII byte that is no part of another character, so splitting bytes and decoding line by
    line (malformed UTF-8 becomes U+FFFD) gives what decoding the whole stream would.
    """

    __slots__ = ("_data", "_event", "_id", "_pieces", "_skip_line_feed", "_started", "last_event_id", "retry")

    def __init__(self, last_event_id: str = "") -> None:
        self.last_event_id = last_event_id
        self.retry: int | None = None
        self._id = last_event_id
        self._event = ""
        self._data: list[str] = []
        self._pieces: list[bytes] = []  # of a line whose end has not come yet
        self._skip_line_feed = False  # the last chunk ended with CR: an LF that comes now belongs to it
        self._started = False  # whether the first line has been seen, before which a BOM may stand

    def feed(self, chunk: bytes) -> list[ServerSentEvent]:
        """The events that this chunk completes, in order."""
        events: list[ServerSentEvent] = []
        start = 0
        if self._skip_line_feed and chunk:
            self._skip_line_feed = False
            start = 1 if chunk.startswith(b"\n") else 0
        while match := _ENDS.search(chunk, start):
            end = match.start()
            line = chunk[start:end]
            if self._pieces:
                line = b"".join([*self._pieces, line])
                self._pieces.clear()
            if not self._started:
                self._started = True
                line = line.removeprefix(_BOM)
            start = end + 1
            if chunk[end] == 0x0D:
                if start == len(chunk):
                    self._skip_line_feed = True
                elif chunk[start] == 0x0A:
                    start += 1
            if line:
                self._field(line)
            elif (event := self._dispatch()) is not None:
                events.append(event)
        if start < len(chunk):
            self._pieces.append(chunk[start:])
        return events

    def _field(self, line: bytes) -> None:
        name, _, rest = line.partition(b":")
        value = rest.removeprefix(b" ").decode("utf-8", "replace")
        if name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._event = value
        elif name == b"id":
            if "\0" not in value:
                self._id = value
        elif name == b"retry" and value.isascii() and value.isdigit():
            # Python refuses to convert absurdly many digits; a wait beyond the age of the universe is one.
            self.retry = int(value.lstrip("0")[:20] or "0")

    def _dispatch(self) -> ServerSentEvent | None:
        # "Set the last event ID string of the event source to the value of the last event ID buffer": also
        # where the data is empty and nothing is dispatched.
        self.last_event_id = self._id
        data, name = self._data, self._event
        self._event = ""
        if not data:
            return None
        self._data = []
        return ServerSentEvent(name or "message", "\n".join(data), self._id)
