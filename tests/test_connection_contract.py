"""What streams rely on in a connection, shown on the one in memory and on the one below a real Hypercorn alike.

Other tests watch streams on a `MemoryConnection` under the mock clock. What they show holds for the real connection as
far as both keep this list.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol

import pytest
import trio
from memory_connection import MemoryConnection
from serving import FRAME, TIMEOUT, Batch, Script, body_of, get, read_to_end, read_until, serving
from support import WITHIN, fail_within
from trio.testing import assert_no_checkpoints

from sse_trio.connection import Connection

WINDOW = 1 << 20
LARGE = FRAME * 200_000
"""More than either peer has room for."""


class Peer(Protocol):
    async def read_to_end(self) -> bytes:
        """The whole body."""
        ...

    async def leave(self) -> None:
        """Go, once the first frame has come."""
        ...


class PeerInMemory:
    def __init__(self, connection: MemoryConnection) -> None:
        self.connection = connection

    async def read_to_end(self) -> bytes:
        with fail_within(WITHIN, "the body ends"):
            while not self.connection.ended or self.connection.in_flight:
                self.connection.read()
                await trio.lowlevel.checkpoint()
        return self.connection.body

    async def leave(self) -> None:
        with fail_within(WITHIN, "the first frame comes"):
            while FRAME not in self.connection.in_flight:
                await trio.lowlevel.checkpoint()
        self.connection.hang_up()


class PeerOfHypercorn:
    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream

    async def read_to_end(self) -> bytes:
        return body_of(await read_to_end(self.stream))[0]

    async def leave(self) -> None:
        await read_until(self.stream, FRAME)
        await self.stream.aclose()


@asynccontextmanager
async def in_memory(script: Script, timeout: float = WITHIN) -> AsyncIterator[Peer]:
    connection = MemoryConnection(WINDOW, timeout=timeout)
    async with trio.open_nursery() as nursery:
        await connection.start(200, [])
        nursery.start_soon(script, connection)
        yield PeerInMemory(connection)


@asynccontextmanager
async def below_hypercorn(script: Script, timeout: float = WITHIN) -> AsyncIterator[Peer]:
    async with serving(script, timeout=timeout) as server, await server.connect(rcvbuf=4096) as stream:
        await stream.send_all(get("/stream", close=True))
        yield PeerOfHypercorn(stream)


Serve = Callable[..., AbstractAsyncContextManager[Peer]]


@pytest.fixture(params=[in_memory, below_hypercorn], ids=["in memory", "below Hypercorn"])
def serve(request: pytest.FixtureRequest) -> Any:
    return request.param


class Told:
    """What a script has seen: its assertions fail the test, wherever it runs."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.taken: list[bytes] = []

    async def wait(self) -> None:
        with fail_within(WITHIN, "the script comes to its end"):
            await self.done.wait()


async def test_what_is_written_arrives_in_order_and_finish_ends_it(serve: Serve) -> None:
    async def script(connection: Connection) -> None:
        await connection.write(FRAME)
        await connection.write(b"")
        await connection.write(b"a")
        await connection.write(LARGE)
        assert not connection.has_rest
        await connection.finish()

    async with serve(script) as peer:
        assert await peer.read_to_end() == FRAME + b"a" + LARGE


async def test_a_cancelled_write_leaves_a_rest_that_goes_before_anything_else(serve: Serve) -> None:
    told = Told()

    async def script(connection: Connection) -> None:
        with trio.move_on_after(0.1) as scope:
            await connection.write(LARGE)
        assert scope.cancelled_caught
        assert connection.has_rest
        assert not connection.can_write_now
        with trio.CancelScope() as scope:
            scope.cancel()
            await connection.write(b"taken when it was called, ")
        assert scope.cancelled_caught
        told.done.set()
        await connection.write(b"and followed by this")
        await connection.finish()

    async with serve(script) as peer:
        await told.wait()
        assert await peer.read_to_end() == LARGE + b"taken when it was called, " + b"and followed by this"


async def test_write_now_takes_all_or_keeps_a_rest_or_takes_nothing_and_never_waits(serve: Serve) -> None:
    told = Told()

    async def script(connection: Connection) -> None:
        for number in range(100_000):
            batch = Batch(b"%06d" % number + FRAME * 100)
            with assert_no_checkpoints():
                if not connection.write_now(batch):
                    assert not connection.has_rest
                    break
            told.taken.append(batch.payload)
            if connection.has_rest:
                break
        told.done.set()
        assert connection.can_write_now != connection.has_rest
        await connection.write_rest()
        assert (connection.has_rest, connection.can_write_now) == (False, True)
        await connection.finish()

    async with serve(script) as peer:
        await told.wait()
        assert 1 < len(told.taken) < 100_000
        assert await peer.read_to_end() == b"".join(told.taken)


async def test_a_peer_that_takes_nothing_for_the_timeout_is_said_to_be_stalled(serve: Serve) -> None:
    told = Told()

    async def script(connection: Connection) -> None:
        began = trio.current_time()
        with pytest.raises(trio.BrokenResourceError):
            await connection.write(LARGE)
        assert connection.stalled
        assert trio.current_time() - began >= TIMEOUT
        told.done.set()

    async with serve(script, timeout=TIMEOUT):
        await told.wait()


@pytest.mark.parametrize("now", [False, True], ids=["write", "write_now"])
async def test_a_peer_that_left_is_said_to_be_gone_and_not_stalled(serve: Serve, now: bool) -> None:
    told = Told()

    async def write_on(connection: Connection) -> None:
        while True:
            if now:
                connection.write_now(Batch(FRAME))
                await trio.lowlevel.checkpoint()
            else:
                await connection.write(FRAME)

    async def script(connection: Connection) -> None:
        await connection.write(FRAME)
        # Shielded: that the peer has left may also be heard by Hypercorn's reader, which cancels the response.
        with trio.move_on_after(WITHIN, shield=True), pytest.raises(trio.BrokenResourceError):
            await write_on(connection)
        assert not connection.stalled
        told.done.set()

    async with serve(script) as peer:
        await peer.leave()
        await told.wait()
