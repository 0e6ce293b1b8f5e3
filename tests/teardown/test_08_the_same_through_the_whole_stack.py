"""8. The same at every step of the whole stack: Hypercorn's connection, h11 or h2, Quart-Trio, our routes, the stream.

The guarantee: what holds for the stream alone holds for a request as a server serves it, from the first byte of the
connection to its last. Hypercorn's own `finally` awaits (`hypercorn/trio/tcp_server.py`, `_close`), so a connection
that is cancelled is closed by trio's `serve_listeners`, which owns its socket; `handler` here does what that does.

A pair of sockets takes the network's place, so the clock is the real one. Steps are then less repeatable than in 1 to
7, where all time is pretended; what must hold after each of them is the same.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState, LifespanState
from serving import H2Client, get
from support import fail_within
from test_broadcaster import event

from sse_trio.application import App
from sse_trio.settings import Settings
from sse_trio.testing import act_at_every_step, cancel_at_every_step

PATH = "/discoveries/stream?agent_id=agent"

Talk = Callable[["Stack", trio.SocketStream], Awaitable[None]]


class Closed(Exception):
    """The server has closed the connection before the talk was over."""


async def read_until(stream: trio.SocketStream, what: bytes) -> None:
    heard = b""
    while what not in heard:
        data = await stream.receive_some(1 << 16)
        if not data:
            raise Closed
        heard += data


class Stack:
    """An application whose feed is played by the test, and one connection to it at a time."""

    def __init__(self, talk: Talk) -> None:
        self.talk = talk
        self.app = App(Settings(write_timeout=5))
        self.app.broadcaster.open_epoch("e", 0)
        self.app.broadcaster.go_live()
        self.config = Config()
        self.config.errorlog = None
        self.config.keep_alive_timeout = 0.05
        self.sockets: list[trio.socket.SocketType] = []

    def publish(self) -> None:
        broadcaster = self.app.broadcaster
        broadcaster.publish([event(broadcaster.head + 1)])
        while broadcaster.deliver():
            pass

    async def handler(self, stream: trio.SocketStream) -> None:
        """What trio's `serve_listeners` runs for each connection."""
        state = ConnectionState(LifespanState({}))
        try:
            await TCPServer(ASGIWrapper(self.app), self.config, WorkerContext(None), state, stream).run()  # type: ignore[arg-type]
        finally:
            await trio.aclose_forcefully(stream)  # noqa: ASYNC102  # it cancels itself

    async def scenario(self) -> None:
        """One connection, from its first byte to its last."""
        self.sockets = list(trio.socket.socketpair())
        near, far = (trio.SocketStream(one) for one in self.sockets)
        self.app.broadcaster.stopping = None
        with self.sockets[0], self.sockets[1]:
            async with trio.open_nursery() as nursery:
                self.app.nursery = nursery
                async with trio.open_nursery() as connection:
                    connection.start_soon(self.handler, near)
                    try:
                        with fail_within(10, "the talk ends"):
                            await self.talk(self, far)
                    except (trio.BrokenResourceError, trio.ClosedResourceError, Closed):
                        pass  # whoever strikes may end the connection under the talk
                    far.socket.close()
                nursery.cancel_scope.cancel()

    def check(self) -> None:
        broadcaster = self.app.broadcaster
        assert not broadcaster.clients
        assert not broadcaster._audiences
        assert sum(broadcaster.disconnects.values()) == broadcaster.connects
        assert self.app.services.access.statistics().connections == 0
        assert all(one.fileno() == -1 for one in self.sockets), "a socket is open"


async def over_http_1(stack: Stack, stream: trio.SocketStream) -> None:
    await stream.send_all(get(PATH))
    await read_until(stream, b"event: connected")
    stack.publish()
    await read_until(stream, b"event: discovery")


async def over_http_1_and_again(stack: Stack, stream: trio.SocketStream) -> None:
    """The server ends the stream, and serves an ordinary request on the same connection."""
    await stream.send_all(get(PATH))
    await read_until(stream, b"event: connected")
    for client in stack.app.broadcaster.clients.values():
        client.end("kicked")
    await read_until(stream, b"\r\n0\r\n\r\n")
    await stream.send_all(get("/livez", close=True))
    await read_until(stream, b"200")


async def over_http_2(stack: Stack, stream: trio.SocketStream) -> None:
    client = H2Client(stream, 65535)
    client.connection.initiate_connection()
    await client.flush()
    number = await client.request(PATH)
    answer = client.answers[number]

    async def hear(what: bytes) -> None:
        while what not in answer.body:
            data = await stream.receive_some(1 << 16)
            if not data:
                raise Closed
            for heard in client.connection.receive_data(data):
                client.heard(heard)
            await client.flush()

    await hear(b"event: connected")
    stack.publish()
    await hear(b"event: discovery")


TALKS = pytest.mark.parametrize("talk", [over_http_1, over_http_1_and_again, over_http_2])


@TALKS
async def test_a_connection_that_is_cancelled_at_any_step_leaves_nothing(talk: Talk) -> None:
    stack = Stack(talk)
    report = await cancel_at_every_step(stack.scenario, check=stack.check, seeds=[0, 1], within=30)
    assert report.steps > 20


@TALKS
async def test_a_peer_that_closes_at_any_step_leaves_nothing(talk: Talk) -> None:
    stack = Stack(talk)

    def leave() -> None:
        with suppress(OSError):  # it has left already
            stack.sockets[1].shutdown(socket.SHUT_RDWR)

    await act_at_every_step(stack.scenario, leave, check=stack.check, seeds=[0, 1], within=30)


@TALKS
async def test_a_drain_at_any_step_leaves_nothing(talk: Talk) -> None:
    stack = Stack(talk)
    await act_at_every_step(stack.scenario, stack.app.drain, check=stack.check, seeds=[0], within=30)
