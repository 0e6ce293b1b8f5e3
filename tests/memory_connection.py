"""A client's connection without a socket: the peer's window is a number, and reading opens it.

It keeps the promises that `Connection` makes (one writer, a rest that goes first, no waiting in `write_now`), so that
streams can be watched under the mock clock; test_connection_contract.py holds it and the real one to the same list.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from typing import Any, cast

import trio

from sse_trio.connection import Connection, Writable
from sse_trio.sse import Decoder, ServerSentEvent


class MemoryConnection(Connection):
    """What the peer has read is in `body`; what it has not, fills its `window` (bytes)."""

    __slots__ = ("_moved", "body", "broken", "direct", "ended", "head", "in_flight", "spoke", "status", "window")

    def __init__(self, window: float = float("inf"), *, direct: bool = True, timeout: float = 10.0) -> None:
        scope = {"method": "GET", "http_version": "1.1", "scheme": "http", "client": ("127.0.0.1", 1)}
        super().__init__(scope, cast("Any", None), timeout, trio.Event())
        self.window = window
        self.direct = direct
        self.body = b""
        self.in_flight = b""
        self.status = 0
        self.head: dict[bytes, bytes] = {}
        self.ended = False
        self.broken = False
        self.spoke = False
        self._moved = trio.Event()

    # -- the peer's side ---------------------------------------------------------------------------------------------

    def read(self, size: int | None = None) -> bytes:
        """Take what was written, at most `size` bytes, which makes room for as much."""
        size = len(self.in_flight) if size is None else size
        data, self.in_flight = self.in_flight[:size], self.in_flight[size:]
        self._opened(data)
        return data

    def _opened(self, data: bytes) -> None:
        self.body += data
        self._moved.set()
        self._moved = trio.Event()

    def hang_up(self) -> None:
        self.broken = True
        self._moved.set()
        self._moved = trio.Event()

    @property
    def events(self) -> list[ServerSentEvent]:
        """All events in what was read and what could be."""
        return Decoder().feed(self.body + self.in_flight)

    @property
    def read_events(self) -> list[ServerSentEvent]:
        """The events that the peer has read to their end."""
        return Decoder().feed(self.body)

    # -- the server's side -------------------------------------------------------------------------------------------

    def _take(self, data: bytes | memoryview) -> int:
        if self.broken:
            raise trio.BrokenResourceError
        room = self.window - len(self.in_flight)
        taken = bytes(data if room >= len(data) else data[: max(0, int(room))])
        self.in_flight += taken
        return len(taken)

    async def start(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        await trio.lowlevel.checkpoint()
        self.status, self.head = status, dict(headers)

    async def write_rest(self) -> None:
        await trio.lowlevel.checkpoint()
        while self._rest is not None:
            sent = self._take(self._rest)
            self._rest = memoryview(self._rest)[sent:] if sent < len(self._rest) else None
            if self._rest is not None:
                with trio.move_on_after(self.timeout) as scope:
                    await self._moved.wait()
                if scope.cancelled_caught:
                    self.stalled = True
                    raise trio.BrokenResourceError

    async def finish(self) -> None:
        await self.write_rest()
        self.ended = True

    @property
    def can_write_now(self) -> bool:
        return self.direct and self._rest is None

    def write_now(self, batch: Writable) -> bool:
        sent = self._take(batch.payload)
        if sent == 0:
            return False
        if sent < len(batch.payload):
            self._rest = memoryview(batch.payload)[sent:]
        return True

    @property
    def spoke_early(self) -> bool:
        return self.spoke

    def abort(self) -> None:
        self.hang_up()


class LentConnection(MemoryConnection):
    """One that has a socket to lend, so that its client may sit in a row: an endless window is the kernel's.

    `small` makes it as small as that allows. Asking for what is in flight takes it out of the kernel.
    """

    __slots__ = ("_before", "_ours", "_theirs")

    def __init__(self, *, small: bool = False, **options: Any) -> None:
        self._ours, self._theirs = socket.socketpair()
        self._ours.setblocking(False)
        self._theirs.setblocking(False)
        if small:
            self._ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        super().__init__(**options)

    @property
    def in_flight(self) -> bytes:
        while data := self._receive(1 << 20):
            self._before += data
        return self._before

    @in_flight.setter
    def in_flight(self, data: bytes) -> None:
        self._before = data

    def _receive(self, size: int) -> bytes:
        try:
            return self._theirs.recv(size)
        except BlockingIOError:
            return b""

    def read(self, size: int | None = None) -> bytes:
        if size is None or self._before:
            return super().read(size)
        data = self._receive(size)
        self._opened(data)
        return data

    def _take(self, data: bytes | memoryview) -> int:
        if self.broken or self.window < float("inf"):
            return super()._take(data)
        try:
            return self._ours.send(data)
        except BlockingIOError:
            return 0

    def lend(self, closing: Callable[[], None]) -> int | None:
        lends = self.can_write_now and not self.broken and self.window == float("inf")
        return self._ours.fileno() if lends else None

    def framed(self, batch: Writable) -> bytes:
        return batch.payload

    def wrote(self, size: int) -> None:
        """It is in the socket."""

    def wrote_part(self, batch: Writable, size: int) -> None:
        self._rest = memoryview(batch.payload)[size:]

    def look(self) -> None:
        """Everything arrives."""

    def unwatch(self) -> None:
        """No kernel watches."""

    def release(self) -> None:
        self._ours.close()
        self._theirs.close()
