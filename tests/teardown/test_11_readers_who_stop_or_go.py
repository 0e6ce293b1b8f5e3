"""11. Every way in which a reader can stop or go, over real sockets, under the `hypercorn` command and under our own.

The guarantee: who takes nothing for `SSE_WRITE_TIMEOUT` seconds is cut off; who leaves is gone at once; who vanishes
without a word is gone within keep-alive plus write timeout. In each case the registry is empty afterwards, no
descriptor is left, and those who read have not waited.

The trap: Hypercorn's trio worker writes in a shield without a deadline (`hypercorn/trio/tcp_server.py:84-88`). Around
it no timeout fires and no cancel arrives; one peer that stops reading holds its task, its socket and the whole shutdown
until it chooses to leave. The pattern is `sse_trio/deadline.py`: the deadline goes below, into the stream.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import trio
from support import RawStream, eventually, fail_within
from teardown.house import (
    COMMANDS,
    IDLE,
    KEEPALIVE,
    SLACK,
    WRITE_TIMEOUT,
    House,
    Namespace,
    count_descriptors,
    house,
    is_full,
    listening,
    note,
    reset,
)

FLOOD = 300
"""Discoveries of 8 kB: far more than both kernels hold for a peer that does not read."""


@pytest.fixture(scope="module", params=COMMANDS)
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with house(tmp_path_factory.mktemp("house"), request.param) as made:
        yield made


async def read_all(stream: RawStream, count: int) -> float:
    """Read so many discoveries; when the last one was there."""
    await stream.take(count)
    return trio.current_time()


async def test_a_reader_that_stops_is_cut_off_after_the_write_timeout_and_nobody_waits_for_it(server: House) -> None:
    async with listening(server, "healthy") as healthy, listening(server, "stalled", rcvbuf=4096) as stalled:
        began = trio.current_time()
        done_at = 0.0

        async def read() -> None:
            nonlocal done_at
            done_at = await read_all(healthy, FLOOD)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await server.publish(FLOOD)
            await server.gone("stalled", WRITE_TIMEOUT + SLACK)
            gone_at = trio.current_time()
        note("stalled reader (zero window)", gone_at - began, WRITE_TIMEOUT, server.command)
        assert done_at < gone_at, "the healthy reader had everything long before"
        assert server.reason("stalled") == "stalled"
        await stalled.read_to_end()
        assert stalled.closed
        assert not stalled.ended, "it was cut off, not ended"
    await server.gone("healthy", SLACK)


async def test_a_reader_that_trickles_under_a_flood_is_cut_off_as_if_it_had_stopped(server: House) -> None:
    async with listening(server, "trickling", rcvbuf=4096) as stream:
        async with trio.open_nursery() as nursery:

            async def trickle() -> None:
                while True:
                    await stream.stream.receive_some(1)
                    await trio.sleep(1)  # this is the peer: a byte a second

            nursery.start_soon(trickle)
            began = trio.current_time()
            await server.publish(FLOOD)
            await server.gone("trickling", WRITE_TIMEOUT + SLACK)
            note(
                "trickling reader (1 byte/s under a flood)", trio.current_time() - began, WRITE_TIMEOUT, server.command
            )
            nursery.cancel_scope.cancel()
        assert server.reason("trickling") == "stalled"


async def test_a_reader_that_closes_is_gone_at_once(server: House) -> None:
    async with listening(server, "closing"):
        pass
    note("clean close (FIN)", await server.gone("closing", SLACK), 0, server.command)
    assert server.reason("closing") == "left"


async def test_a_reader_that_resets_is_gone_at_once(server: House) -> None:
    async with listening(server, "resetting") as stream:
        reset(stream)
        note("reset (RST)", await server.gone("resetting", SLACK), 0, server.command)


async def test_a_reader_that_closes_its_half_is_taken_to_have_left(server: House) -> None:
    async with listening(server, "half-closed") as stream:
        await stream.stream.send_eof()
        note("half-closed", await server.gone("half-closed", SLACK), 0, server.command)
        await stream.read_to_end()
        assert stream.closed


async def test_a_reader_that_closes_in_the_middle_of_a_frame_is_gone_at_once(server: House) -> None:
    async with listening(server, "mid-frame", rcvbuf=4096) as stream:
        await server.publish(FLOOD)
        await eventually(lambda: is_full(stream), "a frame is cut by the peer's window")
    note("close in mid-frame", await server.gone("mid-frame", SLACK), 0, server.command)


async def half_a_request(server: House) -> trio.SocketStream:
    stream = await trio.open_tcp_stream("127.0.0.1", server.port)
    await stream.send_all(b"GET /discoveries/stream?agent_id=mid-he")
    return stream


async def test_a_peer_that_stops_in_the_middle_of_its_request_is_closed_as_if_it_were_idle(server: House) -> None:
    bound = IDLE[server.command]
    began = trio.current_time()
    async with await half_a_request(server) as stream:
        with fail_within(bound + SLACK, "the server closes"):
            while await stream.receive_some():
                pass
    note("stops in mid-head", trio.current_time() - began, bound, server.command)


async def test_a_peer_that_resets_in_the_middle_of_its_request_is_gone_at_once(server: House) -> None:
    worker, before = await server.worker(), await server.settled()
    stream = await half_a_request(server)
    await eventually(lambda: count_descriptors(worker) > before, "it is accepted")
    began = trio.current_time()
    reset(stream)
    await eventually(lambda: count_descriptors(worker) <= before, "its descriptor is closed", SLACK)
    note("reset in mid-head", trio.current_time() - began, 0, server.command)


async def test_a_peer_that_sends_something_after_its_request_is_closed_at_the_next_keep_alive(server: House) -> None:
    """Hypercorn then reads no more, so that it would not see the peer leave."""
    async with listening(server, "early") as stream:
        await stream.stream.send_all(b"X")
        note("bytes after the GET", await server.gone("early", KEEPALIVE + SLACK), KEEPALIVE, server.command)
        assert server.reason("early") == "spoke early"


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with Namespace() as made:
        yield made


@pytest.fixture
async def far_away(namespace: Namespace, server: House) -> AsyncIterator[RawStream]:
    """A client at the end of the cable."""
    sock = trio.socket.from_stdlib_socket(namespace.socket())
    with fail_within(10, "the server is reached through the cable"):
        await sock.connect((namespace.server, server.port))
        stream = RawStream(trio.SocketStream(sock))
        head = "GET /discoveries/stream?agent_id=vanished&detail=full HTTP/1.1\r\nHost: server\r\n\r\n"
        await stream.stream.send_all(head.encode())
        await stream.next("connected")
    yield stream
    sock.close()


async def test_a_reader_that_vanishes_in_silence_is_gone_after_keep_alive_and_write_timeout(
    far_away: RawStream, namespace: Namespace, server: House
) -> None:
    """No FIN, no RST, no answer: what a phone in a tunnel looks like. Nobody publishes anything."""
    namespace.swallow()
    bound = KEEPALIVE + WRITE_TIMEOUT
    note("vanished, no traffic", await server.gone("vanished", bound + SLACK), bound, server.command)


async def test_a_reader_that_vanishes_under_traffic_is_gone_after_the_write_timeout(
    far_away: RawStream, namespace: Namespace, server: House
) -> None:
    namespace.swallow()
    await server.publish(FLOOD)
    note("vanished, under a flood", await server.gone("vanished", WRITE_TIMEOUT + SLACK), WRITE_TIMEOUT, server.command)
