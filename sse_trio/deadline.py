"""A socket stream whose writes end: a peer that takes nothing for too long is cut off.

Strategy: Hypercorn writes inside a shield without a deadline, so no timeout around it can fire. This stream
is put below Hypercorn (and below TLS) and brings the deadline along. What counts is time without progress,
and progress is either that the kernel took bytes or that its send queue grew shorter: a slow reader keeps a
socket unwritable for long, because the kernel waits for a third of the buffer to become free, and still it
reads. The kernel is asked every `STEP` seconds at the latest, and only while a write is blocked; a write that
is not blocked costs nothing extra.

A peer that has vanished blocks nothing: a keep-alive disappears into the kernel. So each write, every now and then,
asks how much of the earlier ones has arrived (`look`; whoever writes to the socket itself has to ask by that). While no
more than `SMALL` bytes are on their way (twice that, where others write), the kernel is told to give up after the timeout
by itself (TCP_USER_TIMEOUT). Beyond that it must not: it takes a small window for death.

Once the server is stopping, the peer gets `STOPPING` seconds in all, progress or not: a shutdown is bounded.
A peer that is cut off gets an RST, so that the kernel frees its buffer at once.
"""

from __future__ import annotations

import fcntl
import math
import os
import socket
import struct
import termios
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, Protocol, TypeVar

import trio

__all__ = ["STOPPING", "DeadlineStream", "OutOfPatience", "Patience", "Stopping"]

Answer = TypeVar("Answer")

STOPPING = 2.0
"""Seconds that a peer may hold up a server that is stopping."""

STEP = 0.5
"""Seconds between two looks at a blocked peer, at most; a quarter of the timeout where that is less."""

SEND_BUFFER = 64 * 1024
"""What the kernel is asked to hold at most for one peer; Linux doubles it, for its bookkeeping.

Measured on loopback: one write takes up to 130 KB, so a round of hundreds of frames still goes out in one; a peer that
stopped reading holds 65 KB (by trio's TCP_NOTSENT_LOWAT), and one that vanished up to 128 KB instead of 4 MB.
"""

SMALL = 4096
"""Bytes that every peer that lives has room for."""


class Stopping(Protocol):
    """An event that says when the server begins to stop; trio's and Hypercorn's events are such."""

    def is_set(self) -> bool: ...

    async def wait(self) -> object: ...


class OutOfPatience(trio.BrokenResourceError):
    """The peer has taken nothing for too long."""


class Patience:
    """How long one connection's peer is waited for."""

    __slots__ = ("_stop_at", "stopping", "timeout")

    def __init__(self, timeout: float, stopping: Stopping) -> None:
        self.timeout = timeout
        self.stopping = stopping
        self._stop_at = math.inf

    async def wait(
        self,
        wait: Callable[[], Awaitable[Answer]],
        left: Callable[[], int | None],
        since: float | None = None,
        *,
        least: int = 1,
    ) -> Answer:
        """What `wait()` returns, given time while `left()` shrinks; it was last seen to at `since`, else now.

        `wait` is cancelled and called again every now and then, so cancelling it must lose nothing. Less than `least`
        does not count until it has added up.

        Raises:
            OutOfPatience: `left()` has not shrunk by `least` for `timeout` seconds, or the server has been
                stopping for `STOPPING` seconds. Nothing has been done to the peer.
        """
        moved_at = trio.current_time() if since is None else since
        before = left()
        while True:
            now = trio.current_time()
            patience = self.timeout
            if self.stopping.is_set():
                patience = min(patience, STOPPING)
                self._stop_at = min(self._stop_at, now + STOPPING)
            ends_at = min(moved_at + patience, self._stop_at)
            if now >= ends_at:
                raise OutOfPatience("the peer takes nothing")
            with trio.move_on_at(min(now + min(STEP, self.timeout / 4), ends_at)):
                return await wait()
            after = left()
            if before is None or after is None or after > before:
                before = after
            elif after <= before - least:
                before, moved_at = after, trio.current_time()


class DeadlineStream(Patience, trio.abc.HalfCloseableStream):
    """A `trio.SocketStream` whose sends fail with `trio.BrokenResourceError` when patience runs out.

    Reading, closing and half-closing are the socket stream's own. `stalled` tells afterwards that the peer
    was cut off for taking nothing.
    """

    __slots__ = (
        "_acked",
        "_eof",
        "_look_at",
        "_moved_at",
        "_sending",
        "_watched",
        "_written",
        "closing",
        "held",
        "stalled",
        "stream",
    )

    def __init__(self, stream: trio.SocketStream, timeout: float, stopping: Stopping) -> None:
        super().__init__(timeout, stopping)
        self.stream = stream
        self.stalled = False
        self.held: bytearray | None = None
        """Where it is not None, what is sent collects here, for the holder to write."""
        self.closing: Callable[[], None] | None = None
        """Called before the socket is closed: somebody else may be writing to it, by its number."""
        self._sending = False
        self._eof = False
        self._written = 0
        """Bytes that the kernel took, ever."""
        self._acked = -math.inf
        """How many of them had arrived when we last looked; below zero: what others wrote before us is on its way."""
        self._moved_at = self._look_at = -math.inf
        """When we last saw some arrive, and when to look again."""
        self._watched = False
        """Whether the kernel gives up by itself."""

    @property
    def socket(self) -> trio.socket.SocketType:
        """The trio socket."""
        return self.stream.socket

    def bound_kernel(self) -> None:
        """Bound what the kernel holds for this peer."""
        with suppress(OSError):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)

    def _watch(self, watched: bool) -> None:
        """Have the kernel give up on a peer that acknowledges nothing for the timeout, or not."""
        self._watched = watched
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            # OSError: closed, or not a TCP socket, where nobody vanishes without the kernel knowing.
            with suppress(OSError):
                milliseconds = math.ceil(self.timeout * 1000) if watched else 0
                self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)

    def unwatch(self) -> None:
        """Have the kernel not give up by itself until all has arrived: others write more than `SMALL`."""
        if self._watched:
            self._watch(False)

    def look(self) -> None:
        """See whether earlier writes arrive.

        Raises:
            trio.BrokenResourceError: nothing of them has for the timeout; the peer was cut off.
        """
        self._look(trio.current_time())

    def _look(self, now: float) -> None:
        self._look_at = now + self.timeout / 4
        acked = self._written - (self.unsent() or 0)
        if acked > self._acked or acked == self._written:
            self._moved_at = now
        elif now - self._moved_at >= self.timeout:
            self.stalled = True
            self.abort()
            raise OutOfPatience("nothing of the earlier writes arrives")
        self._acked = acked
        if acked == self._written and not self._watched:
            self._watch(True)

    def unsent(self) -> int | None:
        """Bytes that the kernel holds because the peer has not taken them; None where it does not say."""
        try:
            answer = fcntl.ioctl(self.socket.fileno(), termios.TIOCOUTQ, b"\0\0\0\0")
        except (OSError, ValueError):
            return None
        return int(struct.unpack("i", answer)[0])

    def send_now(self, data: bytes | bytearray | memoryview) -> int:
        """The number of bytes of `data` that the kernel took without waiting; 0 when it has no room.

        Raises:
            trio.BrokenResourceError: the peer is gone, or nothing of earlier writes has arrived for the timeout.
            trio.ClosedResourceError: the stream was closed on this side.
        """
        descriptor = self.socket.fileno()  # asked each time: the number of a closed one may be another connection's
        if descriptor < 0 or self._eof:
            raise trio.ClosedResourceError("the stream was closed")
        if (now := trio.current_time()) >= self._look_at:
            self._look(now)
        try:
            sent = os.write(descriptor, data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise trio.BrokenResourceError(f"the peer is gone: {error}") from error
        self.count(sent)
        return sent

    def count(self, sent: int) -> None:
        """The kernel took so many bytes, from whom ever."""
        if self._acked == self._written:
            self._moved_at = trio.current_time()  # nothing was on its way: the peer's time begins now
        self._written += sent
        if self._watched and self._written - self._acked > SMALL:
            self._watch(False)

    async def send_some(self, data: bytes | bytearray | memoryview) -> int:
        """The number of bytes of `data`, at least one, that the kernel took, waiting for room.

        Cancelled, none of them were taken. A peer that takes nothing for too long is cut off.
        """
        if sent := self.send_now(data):
            return sent

        async def wait_and_send() -> int:
            while True:
                await trio.lowlevel.wait_writable(self.socket.fileno())
                if sent := self.send_now(data):
                    return sent

        return await self._wait(wait_and_send)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        self._sending = True
        try:
            await trio.lowlevel.checkpoint()
            if self.socket.fileno() < 0 or self._eof:
                raise trio.ClosedResourceError("the stream was closed")
            if self.held is not None:
                self.held += data
                return
            with memoryview(data) as view:
                sent = 0
                while sent < len(view):
                    with view[sent:] as rest:
                        sent += await self.send_some(rest)
        finally:
            self._sending = False

    async def wait_send_all_might_not_block(self) -> None:
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        self._sending = True
        try:
            await self.stream.wait_send_all_might_not_block()
        finally:
            self._sending = False

    async def wait_writable(self) -> None:
        """Wait until the kernel has room; a peer that takes nothing for too long is cut off."""
        await self._wait(self.stream.wait_send_all_might_not_block)

    async def _wait(self, wait: Callable[[], Awaitable[Answer]]) -> Answer:
        self._look(trio.current_time())
        try:
            return await self.wait(wait, self.unsent, self._moved_at)
        except OutOfPatience:
            self.stalled = True
            self.abort()
            raise

    def receive_some(self, max_bytes: int | None = None) -> Coroutine[Any, Any, bytes]:
        return self.stream.receive_some(max_bytes)  # and no coroutine of our own, which would wait beside it

    async def send_eof(self) -> None:
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        self._eof = True
        self._tell_of_closing()
        await self.stream.send_eof()

    async def aclose(self) -> None:
        self._tell_of_closing()
        await self.stream.aclose()

    def abort(self) -> None:
        """Close at once, with an RST: what the kernel still held for the peer is dropped, and it learns of
        it."""
        self._tell_of_closing()
        with suppress(OSError):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def _tell_of_closing(self) -> None:
        if self.closing is not None:
            self.closing()
