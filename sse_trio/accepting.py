"""Accepting connections when thousands come at once, as after a redeploy: none is lost, and they begin one by one.

Trio's listener takes one connection out of the kernel's queue in a turn of the event loop, and so at the pace at which
they are served. Meanwhile the rest waits in the kernel. That holds few (at most `net.core.somaxconn`, 4,096 if nobody
has changed it), drops what comes beyond, and forgets after some seconds peers that believe to be connected: what they
send is answered with a reset. So in each turn a part of its queue is taken out, to wait here: many when it is long,
and none when it is short, for workers share it, and who takes much keeps it from the others. One still begins in a turn.
"""

from __future__ import annotations

import resource
import socket
import struct
from collections import deque

import trio

from sse_trio.limits import FD_RESERVE

__all__ = ["AT_ONCE", "MOST_WAITING", "PART", "EagerListener"]

PART = 64
"""Of the kernel's queue, a 64th is taken out in a turn of the event loop: fewer than 64 are left to whoever comes first."""

AT_ONCE = 64
"""Connections that are taken out in a turn at most: a millisecond."""

MOST_WAITING = 10_000
"""Connections that wait here at most; more stay in the kernel."""

_UNACKED = struct.Struct("24x I")
"""`tcpi_unacked` in Linux's `struct tcp_info`: of a listening socket, how many wait to be accepted."""


class EagerListener(trio.abc.Listener[trio.SocketStream]):
    """A `trio.SocketListener` that keeps the kernel's queue short. Owns `listening`.

    Connections are handed out from the kernel's queue and from those that wait here in turn, each in the order in which
    they came: so who asks for `/health` in the midst of a crowd is soon answered, and the crowd goes on. Those that wait
    do not take of the last `FD_RESERVE` files, which who is served may need. When this is closed they are closed, as the
    kernel does with a queue that nobody listens to. Errors are those of `trio.SocketListener`; they are raised when nobody
    waits here.
    """

    def __init__(self, listening: trio.socket.SocketType) -> None:
        self._listener = trio.SocketListener(listening)
        self._kernel = socket.fromfd(listening.fileno(), listening.family, listening.type)
        self._kernel.setblocking(False)
        self._waiting: deque[socket.socket] = deque()
        self._kernel_next = False
        self._files_are_few = False
        """A connection has had one of the last files; true until nobody waits here."""

    async def accept(self) -> trio.SocketStream:
        """A connection. Always takes a turn of the loop, and where many wait, only one; a cancel loses none."""
        if self._waiting:
            await trio.lowlevel.checkpoint()
        if self._waiting:
            accepted = self._next()
        else:
            self._files_are_few = False
            accepted = await self._listener.accept()
        self._take()
        return accepted

    def _next(self) -> trio.SocketStream:
        self._kernel_next = not self._kernel_next
        from_kernel = self._kernel_next and not self._files_are_few
        accepted = (self._from_kernel() if from_kernel else None) or self._waiting.popleft()
        return trio.SocketStream(trio.socket.from_stdlib_socket(accepted))

    def _take(self) -> None:
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        for _ in range(min(self._in_kernel() // PART, AT_ONCE, MOST_WAITING - len(self._waiting))):
            if self._files_are_few or (accepted := self._from_kernel()) is None:
                return
            self._waiting.append(accepted)
            # The kernel gives the lowest number that is free: all below it are in use.
            self._files_are_few = files != resource.RLIM_INFINITY and accepted.fileno() >= files - FD_RESERVE

    def _from_kernel(self) -> socket.socket | None:
        try:
            return self._kernel.accept()[0]
        except OSError:
            return None  # none is there, as a rule; what else it may be is said when nobody waits here any more

    def _in_kernel(self) -> int:
        try:
            info = self._kernel.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _UNACKED.size)
            waiting: int = _UNACKED.unpack(info)[0]
        except (OSError, struct.error):
            return 0  # not TCP: who connects to a Unix socket waits until there is room
        return waiting

    async def aclose(self) -> None:
        self._kernel.close()
        while self._waiting:
            self._waiting.popleft().close()
        await self._listener.aclose()
