"""11. Every way in which a reader can stop or go, over real sockets: under `hypercorn` and our own command, plain and TLS.

The guarantee: who takes nothing for `SSE_WRITE_TIMEOUT` seconds is cut off; who leaves is gone at once; who vanishes
without a word is gone within keep-alive plus write timeout. In each case the registry is empty afterwards, no
descriptor is left, the kernel holds nothing any more, and those who read have not waited.

The trap: Hypercorn's trio worker writes in a shield without a deadline (`hypercorn/trio/tcp_server.py:84-88`). Around
it no timeout fires and no cancel arrives; one peer that stops reading holds its task, its socket and the whole shutdown
until it chooses to leave. The pattern is `sse_trio/deadline.py`: the deadline goes below, into the stream; under TLS below
the encryption, whose closing writes, too.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import trio
from serving import read_until
from support import eventually, fail_within
from teardown.house import (
    FLOOD,
    IDLE,
    KEEPALIVE,
    SOON,
    WRITE_TIMEOUT,
    House,
    Namespace,
    OtherEnd,
    flooded,
    is_full,
    late,
    listening,
    note,
    reset,
    wire,
)


async def test_a_reader_that_stops_is_cut_off_after_the_write_timeout_and_nobody_waits_for_it(server: House) -> None:
    async with listening(server, "stalled", rcvbuf=4096) as stalled, trio.open_nursery() as nursery:
        other_end = OtherEnd(stalled)
        held = trio.Event()

        async def look() -> None:
            await eventually(lambda: (other_end.unsent or 0) > 10_000, "the kernel holds what the peer does not read")
            held.set()

        nursery.start_soon(look)
        seconds = await flooded(server, "stalled")
        note("stalled reader (zero window)", seconds, WRITE_TIMEOUT, server.kind)
        assert held.is_set()
        assert other_end.unsent is None, "and holds nothing any more"
        assert server.reason("stalled") == "stalled"
        await stalled.read_to_end()
        assert stalled.closed
        assert not stalled.ended, "it was cut off, not ended"


async def test_a_reader_that_trickles_under_a_flood_is_cut_off_as_if_it_had_stopped(server: House) -> None:
    async with listening(server, "trickling", rcvbuf=4096) as stream:
        other_end = OtherEnd(stream)
        async with trio.open_nursery() as nursery:

            async def trickle() -> None:
                while True:
                    await wire(stream).receive_some(1)
                    await trio.sleep(1)  # this is the peer: a byte a second

            nursery.start_soon(trickle)
            note(
                "trickling reader (1 byte/s under a flood)",
                await flooded(server, "trickling"),
                WRITE_TIMEOUT,
                server.kind,
            )
            nursery.cancel_scope.cancel()
        assert other_end.unsent is None
        assert server.reason("trickling") == "stalled"


async def test_a_reader_that_closes_is_gone_at_once(server: House) -> None:
    """Under TLS without a close_notify; 12 has the one with."""
    async with listening(server, "closing") as stream:
        await stream.stream.aclose()
        note("clean close (FIN)", await server.gone("closing"), 0, server.kind)
        assert server.reason("closing") == "left"


async def test_a_reader_that_resets_is_gone_at_once(server: House) -> None:
    async with listening(server, "resetting") as stream:
        reset(stream)
        note("reset (RST)", await server.gone("resetting"), 0, server.kind)
        assert server.reason("resetting") == "left", "nothing had to be written first"


async def test_a_reader_that_closes_its_half_is_taken_to_have_left(server: House) -> None:
    async with listening(server, "half-closed") as stream:
        await wire(stream).send_eof()
        note("half-closed", await server.gone("half-closed"), 0, server.kind)
        assert server.reason("half-closed") == "left", "nothing had to be written first"
        await stream.read_to_end()
        assert stream.closed


async def test_a_reader_that_closes_in_the_middle_of_a_frame_is_gone_at_once(server: House) -> None:
    async with listening(server, "mid-frame", rcvbuf=4096) as stream:
        await server.publish(FLOOD)
        await eventually(lambda: is_full(stream), "a frame is cut by the peer's window")
        await trio.aclose_forcefully(stream.stream)
        note("close in mid-frame", await server.gone("mid-frame"), 0, server.kind)


HALF_A_REQUEST = b"GET /discoveries/stream?agent_id=mid-he"


async def test_a_peer_that_stops_in_the_middle_of_its_request_is_closed_as_if_it_were_idle(server: House) -> None:
    began = trio.current_time()
    async with await server.peers.connect() as stream:
        await stream.send_all(HALF_A_REQUEST)
        with fail_within(late(IDLE), "the server closes"):
            while await stream.receive_some():
                pass
    note("stops in mid-head", trio.current_time() - began, IDLE, server.kind)


async def test_a_peer_that_resets_in_the_middle_of_its_request_is_gone_at_once(server: House) -> None:
    async with await server.peers.connect() as stream:
        await stream.send_all(HALF_A_REQUEST)
        is_open = await OtherEnd(stream).descriptor(server)
        assert is_open()
        began = trio.current_time()
        reset(stream)
        await eventually(lambda: not is_open(), "its descriptor is closed", SOON)
        note("reset in mid-head", trio.current_time() - began, 0, server.kind)


async def test_a_peer_that_sends_something_after_its_request_is_closed_at_the_next_keep_alive(server: House) -> None:
    """Hypercorn then reads no more, so that it would not see the peer leave."""
    async with listening(server, "healthy") as healthy, listening(server, "early") as stream:
        await stream.stream.send_all(b"X")
        note("bytes after the GET", await server.gone("early", KEEPALIVE), KEEPALIVE, server.kind)
        assert server.reason("early") == "spoke early"
        await read_until(healthy.stream, b": keep-alive\n")
        assert await server.clients() == ["healthy"]


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with Namespace() as made:
        yield made


async def test_a_reader_that_vanishes_in_silence_is_gone_after_keep_alive_and_write_timeout(
    namespace: Namespace, server: House
) -> None:
    """No FIN, no RST, no answer: what a phone in a tunnel looks like. Nobody publishes anything."""
    async with listening(server, "vanished", through=namespace.to(server)) as stream:
        other_end = OtherEnd(stream)
        namespace.swallow()
        bound = KEEPALIVE + WRITE_TIMEOUT
        note("vanished, no traffic", await server.gone("vanished", bound), bound, server.kind)
        assert other_end.unsent is None


async def test_a_reader_that_vanishes_under_traffic_is_gone_after_the_write_timeout(
    namespace: Namespace, server: House
) -> None:
    async with listening(server, "vanished", through=namespace.to(server)) as stream:
        other_end = OtherEnd(stream)
        namespace.swallow()
        note("vanished, under a flood", await flooded(server, "vanished"), WRITE_TIMEOUT, server.kind)
        assert other_end.unsent is None
