"""10. Ordinary answers end as they should: a connection that is not to be kept is closed, an idle one after a while.

The guarantee: no request, however short, leaves a socket behind.

The trap: Quart-Trio cancels a request's tasks as soon as it hears `http.disconnect` (`quart_trio/asgi.py:39-40`), and
Hypercorn says that inside the last `send` of every answer, before it has closed or recycled the connection. Its own
tidying up is cancelled with the rest: `Connection: close` is not honoured, HTTP/1.0 proxies wait for ever, idle
connections are never closed, and each of them is a descriptor less. The pattern: the last message of a body runs in a
bounded shield.
"""

from __future__ import annotations

import inspect

import serving
import trio
from serving import get, h2_client
from support import eventually, fail_within
from teardown.house import IDLE, SOON, House, OtherEnd, late, note

from sse_trio.cli import serve
from sse_trio.server import KEEP_ALIVE, run_app


async def seconds_until_closed(server: House, request: bytes, within: float) -> float:
    """Send a request on a connection of its own, read the answer, and wait until the server closes."""
    stream = await server.peers.connect()
    try:
        await stream.send_all(request)
        heard = b""
        with fail_within(10, "it is answered"):
            while b"\r\n\r\n{" not in heard:
                heard += await stream.receive_some()
        began = trio.current_time()
        with fail_within(within, "the server closes"):
            while await stream.receive_some():
                pass
        return trio.current_time() - began
    finally:
        await trio.aclose_forcefully(stream)  # noqa: ASYNC102  # it cancels itself


async def test_a_connection_that_its_client_does_not_want_to_keep_is_closed(server: House) -> None:
    seconds = await seconds_until_closed(server, get("/health", close=True), SOON)
    note("Connection: close", seconds, 0, server.kind)


async def test_a_connection_of_http_1_0_is_closed(server: House) -> None:
    seconds = await seconds_until_closed(server, get("/health", version="1.0"), SOON)
    note("HTTP/1.0", seconds, 0, server.kind)


async def test_an_idle_connection_is_closed_after_a_while(server: House) -> None:
    async def of_http_1() -> None:
        seconds = await seconds_until_closed(server, get("/health"), late(IDLE))
        note("idle, HTTP/1.1", seconds, IDLE, server.kind)

    async def of_http_2() -> None:
        async with h2_client(server.peers) as client:
            assert (await client.get("/health")).status == 200
            began = trio.current_time()
            await eventually(lambda: client.closed, "the server closes", late(IDLE))
            note("idle, HTTP/2", trio.current_time() - began, IDLE, server.kind)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(of_http_1)
        nursery.start_soon(of_http_2)


async def test_a_connection_that_its_client_has_closed_is_closed_at_once(server: House) -> None:
    """Hypercorn waits for the end of the keep-alive time first, with the socket open."""
    async with await server.peers.connect() as stream:
        await stream.send_all(get("/health"))
        await serving.read_until(stream, b"\r\n\r\n{")
        is_open = await OtherEnd(stream).descriptor(server)
        assert is_open()
    began = trio.current_time()
    await eventually(lambda: not is_open(), "its descriptor is closed", SOON)
    note("kept, and closed by its client", trio.current_time() - began, 0, server.kind)


def test_our_own_command_keeps_an_idle_connection_for_half_a_minute_unless_it_is_told_otherwise() -> None:
    """Where everybody comes at once, Hypercorn's five seconds are too few; here all servers were told five."""
    (option,) = [one for one in serve.params if one.name == "keep_alive"]
    assert option.default == KEEP_ALIVE == 30
    assert inspect.signature(run_app).parameters["keep_alive"].default == KEEP_ALIVE
