"""Accepting connections when thousands come at once, as after a redeploy: all are taken in, and begin one by one.

Trio's listener takes one connection out of the kernel's queue in a turn of the event loop, and so at the pace at which
they are served. Meanwhile the rest waits in the kernel. That holds few (at most `net.core.somaxconn`, 4,096 on Linux),
drops what comes beyond, and forgets after some seconds peers that believe to be connected: what they send is answered
with a reset. Here many are taken in a turn, and one is handed out, so that no more begin in a turn than did before.
"""

from __future__ import annotations

import resource
import socket
from collections import deque

import trio

from sse_trio.limits import FD_RESERVE

__all__ = ["AT_ONCE", "MOST_WAITING", "EagerListener"]

AT_ONCE = 32
"""Connections that are taken out of the kernel's queue in a turn of the event loop: half a millisecond. Enough to empty
it soon; few enough that workers who share a queue share a crowd."""

MOST_WAITING = 10_000
"""Connections that wait here; more stay in the kernel."""


class EagerListener(trio.abc.Listener[trio.SocketStream]):
    """A `trio.SocketListener` that holds accepted connections until they are asked for. Owns `listening`.

    The oldest and the newest are handed out in turn, so who asks for `/health` in the midst of a crowd is not the last of
    it. Those that wait do not take of the last `FD_RESERVE` files, which who is served may need. When this is closed they
    are closed, as the kernel does with a queue that nobody listens to. Errors are those of `trio.SocketListener`; they
    are raised when nobody waits here.
    """

    def __init__(self, listening: trio.socket.SocketType) -> None:
        self._listener = trio.SocketListener(listening)
        self._queue = socket.fromfd(listening.fileno(), listening.family, listening.type)
        self._queue.setblocking(False)
        self._waiting: deque[socket.socket] = deque()
        self._newest_next = False
        self._files_are_few = False
        """Since the last time that nobody waited."""

    async def accept(self) -> trio.SocketStream:
        """A connection. Always takes a turn of the loop, and where many wait, only one; a cancel loses none."""
        if self._waiting:
            await trio.lowlevel.checkpoint()
        if not self._waiting:
            self._files_are_few = False
            stream = await self._listener.accept()
            self._take()
            return stream
        self._take()
        accepted = self._waiting.pop() if self._newest_next else self._waiting.popleft()
        self._newest_next = not self._newest_next
        return trio.SocketStream(trio.socket.from_stdlib_socket(accepted))

    def _take(self) -> None:
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        for _ in range(min(AT_ONCE, MOST_WAITING - len(self._waiting))):
            if self._files_are_few:
                return
            try:
                accepted, _ = self._queue.accept()
            except OSError:
                return  # that none is left, as a rule; what else it may be is said when nobody waits here any more
            self._waiting.append(accepted)
            # The kernel gives the lowest number that is free: all below it are in use.
            self._files_are_few = files != resource.RLIM_INFINITY and accepted.fileno() >= files - FD_RESERVE

    async def aclose(self) -> None:
        self._queue.close()
        while self._waiting:
            self._waiting.popleft().close()
        await self._listener.aclose()
