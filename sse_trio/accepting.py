"""Accepting connections when thousands come at once, as after a redeploy: all are taken in, and begin one by one.

Trio's listener takes one connection out of the kernel's queue in a turn of the event loop, so while ten thousand are
served, the rest waits in the kernel. That holds few (4,096 by Linux's default, `net.core.somaxconn`, whatever is asked
for), drops what comes beyond, and forgets after some seconds peers that believe to be connected: what they send is
answered with a reset. Here the queue is emptied in each turn, and one connection is handed out: what begins it, a few
milliseconds for each, is no more in a turn than it was.
"""

from __future__ import annotations

import resource
import socket
from collections import deque

import trio

from sse_trio.limits import FD_RESERVE

__all__ = ["AT_ONCE", "EagerListener"]

AT_ONCE = 32
"""Connections that are taken out of the kernel's queue in a turn of the event loop: half a millisecond. More than can
come between two turns; few enough that workers who share the queue share a crowd."""


class EagerListener(trio.abc.Listener[trio.SocketStream]):
    """A `trio.SocketListener` that holds accepted connections until they are asked for. Owns `listening`.

    They do not take of the last `FD_RESERVE` files: who waits must not keep those from ending who are served. Those that
    wait here when it is closed are closed. Raises what `trio.SocketListener` does, once none waits here.
    """

    def __init__(self, listening: trio.socket.SocketType) -> None:
        self._listener = trio.SocketListener(listening)
        self._queue = socket.fromfd(listening.fileno(), listening.family, listening.type)
        self._queue.setblocking(False)
        self._accepted: deque[socket.socket] = deque()

    async def accept(self) -> trio.SocketStream:
        """The next connection, in the order in which they came. Takes a turn of the loop; a cancel loses none."""
        if self._accepted:
            await trio.lowlevel.checkpoint()
            self._take()
            return trio.SocketStream(trio.socket.from_stdlib_socket(self._accepted.popleft()))
        stream = await self._listener.accept()
        self._take()
        return stream

    def _take(self) -> None:
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        for _ in range(AT_ONCE):
            try:
                accepted, _ = self._queue.accept()
            except OSError:
                return  # that none is left, as a rule; what else it may be is said when none waits here any more
            self._accepted.append(accepted)
            # The kernel gives the lowest number that is free, so this one tells how many files are in use.
            if files != resource.RLIM_INFINITY and accepted.fileno() >= files - FD_RESERVE:
                return

    async def aclose(self) -> None:
        self._queue.close()
        while self._accepted:
            self._accepted.popleft().close()
        await self._listener.aclose()
