"""The connection of one request: what a response may do with its peer.

Strategy: Quart routes, and a `ConnectionResponse` is handed the connection in place of a body to iterate over. What
stands here is the contract, and what of it an ASGI server gives of which nothing is known. Under Hypercorn there is
more: `hypercorn_connection` has the subclasses, and `asgi` chooses.

What always holds:
* A connection has one writer at a time. What could not be written is its `rest`; nothing is written before it.
* `write` has taken its payload when it is called, cancelled or not: nothing is ever cut with something behind it.
* No write lasts for ever: a peer that takes nothing for the timeout is cut off.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Any, Protocol, cast

import trio
from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, ASGISendEvent
from quart_trio.wrappers import TrioResponse

from sse_trio.deadline import Stopping

__all__ = ["Connection", "ConnectionResponse", "Headers", "PeerGone", "Respond", "Worker", "Writable"]

Headers = Iterable[tuple[bytes, bytes]]
Respond = Callable[["Connection"], Awaitable[None]]


class Writable(Protocol):
    """Bytes for many clients: whole frames, and room for the chunk around them, made by the first that needs
    it."""

    payload: bytes
    chunk: bytes | None


class PeerGone(trio.BrokenResourceError):
    """The peer has left, or was cut off because it took nothing. A response may let it out: it then just ends."""


class Connection:
    """One request's connection, to an ASGI server of which nothing is known. Subclasses know Hypercorn's."""

    __slots__ = (
        "_rest",
        "_scope",
        "_send",
        "http_version",
        "is_tls",
        "method",
        "peer",
        "stalled",
        "stopping",
        "timeout",
    )

    def __init__(self, scope: Any, send: ASGISendCallable, timeout: float, stopping: Stopping) -> None:
        self._send = send
        self._rest: bytes | memoryview | None = None
        self._scope: trio.CancelScope | None = None
        self.method: str = scope["method"]
        self.http_version: str = scope["http_version"]
        self.is_tls: bool = scope["scheme"] == "https"
        client = scope.get("client")
        self.peer: tuple[str, int | None] | None = None if client is None else (client[0], client[1])
        self.timeout = timeout
        self.stopping = stopping
        self.stalled = False
        """Whether the peer was cut off because it took nothing for the timeout."""

    # -- ASGI ------------------------------------------------------------------------------------------------

    async def send(self, message: ASGISendEvent) -> None:
        """The ASGI `send` for responses that are not ours. To a peer that is gone it sends into the void."""
        with suppress(PeerGone):
            await self._guarded(message)

    async def start(self, status: int, headers: Headers) -> None:
        """Send the head of the response. It may wait for the first `write`, `write_rest` or `finish`, and go with it.

        Raises:
            PeerGone: the peer is gone.
        """
        message = {"type": "http.response.start", "status": status, "headers": list(headers)}
        await self._guarded(cast("ASGISendEvent", message))

    async def finish(self) -> None:
        """Write what is left, and end the body. The server then keeps, or closes, the connection.

        Raises:
            PeerGone: the peer is gone, or was cut off because it took nothing.
        """
        await self.write_rest()
        await self._guarded({"type": "http.response.body", "body": b"", "more_body": False})

    async def _guarded(self, message: ASGISendEvent) -> None:
        """Send so that a cancel cannot cut it in the middle, and a deadline can."""
        with trio.move_on_after(self.timeout, shield=True) as scope:
            await self._send(message)
        if scope.cancelled_caught:
            self.stalled = True
            raise PeerGone("the server has not taken a message in time")

    async def run(self, respond: Respond, receive: ASGIReceiveCallable) -> None:
        """Run a response of ours; it is cancelled when the peer leaves."""
        async with trio.open_nursery() as nursery:
            self._scope = nursery.cancel_scope
            nursery.start_soon(self._watch, receive)
            await respond(self)
            self._scope.cancel()

    async def _watch(self, receive: ASGIReceiveCallable) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass  # a body that nobody asked for
        assert self._scope is not None
        self._scope.cancel()

    # -- bodies ----------------------------------------------------------------------------------------------

    async def write(self, payload: bytes) -> None:
        """Write `payload`, after what is left of earlier ones. Waits for the peer, while that makes progress.

        Cancelled, what was not written is the rest, for the next `write`, `write_rest` or `finish`.

        Raises:
            PeerGone: the peer is gone, or was cut off because it took nothing.
        """
        if payload:
            self._rest = payload if self._rest is None else b"".join((self._rest, payload))
        await self.write_rest()

    async def write_rest(self) -> None:
        """Write what is left. As `write`."""
        await trio.lowlevel.checkpoint()
        if self._rest is not None:
            await self._guarded({"type": "http.response.body", "body": bytes(self._rest), "more_body": True})
            self._rest = None

    @property
    def has_rest(self) -> bool:
        """Whether something must be written before anything else."""
        return self._rest is not None

    @property
    def can_write_now(self) -> bool:
        """Whether `write_now` may be used at all on this connection, now."""
        return False

    def write_now(self, batch: Writable) -> bool:
        """Write without waiting. True: all of it is written, or its end is the rest; False: nothing was
        taken.

        Only while no other task writes, and after the head.

        Raises:
            PeerGone: the peer is gone.
        """
        return False

    # -- a socket that is lent: others write to it, many at once ----------------------------------------------

    def lend(self, closing: Callable[[], None]) -> int | None:
        """The descriptor of the socket below, while `can_write_now`; None where there is none to lend.

        Others may then write `framed` batches to it, whole or cut, and must say so before anything else is written:
        `wrote`, `wrote_part`. `closing` is called before it is closed.
        """
        return None

    def reclaim(self) -> None:
        """It is lent no more."""

    def framed(self, batch: Writable) -> bytes:
        """The batch as it goes into a socket that is lent."""
        raise NotImplementedError

    def wrote(self, size: int) -> None:
        """Others have written so many bytes to the socket, in whole batches."""
        raise NotImplementedError

    def wrote_part(self, batch: Writable, size: int) -> None:
        """Others have written the first `size` bytes of a framed batch, and what follows is the rest."""
        raise NotImplementedError

    def look(self) -> None:
        """See whether what was written arrives.

        Raises:
            PeerGone: it has not for the timeout, and the peer was cut off.
        """
        raise NotImplementedError

    def unwatch(self) -> None:
        """Have the kernel not give up on the peer by itself: more is on its way than it need have room for."""
        raise NotImplementedError

    # -- the peer --------------------------------------------------------------------------------------------

    @property
    def spoke_early(self) -> bool:
        """Whether the peer sent something after its request: Hypercorn then reads no more, and cannot see it
        leave."""
        return False

    def abort(self) -> None:
        """Cut the peer off, at once, and cancel the response."""
        if self._scope is not None:
            self._scope.cancel()

    def unsent(self) -> int | None:
        """Bytes that the kernel holds because the peer has not taken them; None where that is not known."""
        return None

    def release(self) -> None:
        """The request is over, however it ended: leave nothing waiting for it."""


class ConnectionResponse(TrioResponse):
    """A response whose body is its own affair: everything up to the head is Quart's, then `respond` is
    called."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.timeout = None
        self.headers.pop("Content-Length", None)

    async def respond(self, connection: Connection) -> None:
        """Write the response, from its head to its end. Cancelled when the peer leaves."""
        raise NotImplementedError


class Worker:
    """The server process behind a connection: whether it is stopping, and the way to make it stop."""

    def __init__(self, context: Any) -> None:
        self.context = context
        self.stopping: Stopping = context.terminated

    async def stop(self) -> None:
        """Have the worker stop: it accepts nothing more and waits, within its grace period, for its
        connections."""
        await self.context.terminate.set()
