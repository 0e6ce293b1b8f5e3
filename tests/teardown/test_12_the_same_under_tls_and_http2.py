"""12. What is particular to TLS, and the same peers on one HTTP/2 stream beside healthy ones.

The guarantee: nothing of 11 depends on the wire. An HTTP/2 stream that is not read, or is read by the byte, is reset
alone: the others on its connection do not notice.

The trap: Hypercorn's HTTP/2 has no back-pressure to speak of (`StreamBuffer.pop(0)` in `hypercorn/protocol/h2.py`
releases the pause that `push` has just set): at zero window everything that is sent piles up in the server's memory.
And where one gives a connection up, one gives up every healthy stream that shares it.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import suppress

import h2.errors
import h2.exceptions
import pytest
import trio
from serving import H2Client, h2_client
from support import eventually
from teardown.house import (
    COMMANDS,
    FLOOD,
    KEEPALIVE,
    SOON,
    WRITE_TIMEOUT,
    House,
    Namespace,
    OtherEnd,
    flooded,
    house,
    listening,
    note,
    reset,
    wire,
)


@pytest.fixture(scope="module", params=COMMANDS)
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with house(tmp_path_factory.mktemp("house"), request.param, secure=True) as made:
        yield made


def path_for(agent_id: str) -> str:
    return f"/discoveries/stream?agent_id={agent_id}&detail=full"


async def test_a_reader_that_closes_with_a_close_notify_is_gone_at_once(server: House) -> None:
    async with listening(server, "closing") as stream, trio.open_nursery() as nursery:

        async def close() -> None:
            with suppress(trio.BrokenResourceError):  # the server need not answer it
                beneath, _ = await stream.stream.unwrap()  # type: ignore[attr-defined]
                await beneath.aclose()  # it is ours again, and nobody else closes it

        nursery.start_soon(close)
        note("TLS: close with close_notify", await server.gone("closing"), 0, server.kind)
        assert server.reason("closing") == "left"
        nursery.cancel_scope.cancel()


async def test_a_peer_that_leaves_in_the_middle_of_its_handshake_is_gone_at_once(server: House) -> None:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    hello = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        hello.do_handshake()
    async with await trio.open_tcp_stream("127.0.0.1", server.port) as stream:
        await stream.send_all(outgoing.read()[:100])
        is_open = await OtherEnd(stream).descriptor(server)
        assert is_open()
    began = trio.current_time()
    await eventually(lambda: not is_open(), "its descriptor is closed", SOON)
    note("TLS: close in mid-handshake", trio.current_time() - began, 0, server.kind)


async def beside(client: H2Client, agent_id: str, *, stalled: bool = False) -> int:
    """One more stream on that connection; its number."""
    number = await client.request(path_for(agent_id), stalled=stalled)
    await client.until(lambda: b"event: connected" in client.answers[number].body, f"{agent_id} is connected")
    return number


@pytest.mark.parametrize("kind", ["stalled", "trickling"])
async def test_a_stream_that_is_not_read_is_reset_alone_and_its_neighbours_hear_everything(
    kind: str, server: House
) -> None:
    async with h2_client(server.peers) as client:
        stalled = await beside(client, "stalled", stalled=True)
        healthy = [await beside(client, f"healthy-{number}") for number in range(3)]
        async with trio.open_nursery() as nursery:

            async def trickle() -> None:
                with suppress(h2.exceptions.ProtocolError):  # it was reset
                    while True:
                        client.connection.increment_flow_control_window(1, stalled)
                        await client.flush()
                        await trio.sleep(1)  # this is the peer: a byte a second

            if kind == "trickling":
                nursery.start_soon(trickle)
            note(
                f"HTTP/2: one {kind} stream beside three", await flooded(server, "stalled"), WRITE_TIMEOUT, server.kind
            )
            nursery.cancel_scope.cancel()
        assert server.reason("stalled") == "stalled"
        await client.until(lambda: client.answers[stalled].reset is not None, "the stream is reset")
        assert client.answers[stalled].reset == h2.errors.ErrorCodes.CANCEL
        neighbours = [client.answers[number] for number in healthy]
        await client.until(lambda: all(a.body.count(b"event: discovery") == FLOOD for a in neighbours), "all is heard")
        assert all(answer.reset is None for answer in neighbours)
        assert sorted(await server.clients()) == ["healthy-0", "healthy-1", "healthy-2"]


async def test_a_stream_that_its_peer_resets_is_gone_at_once_and_its_neighbour_stays(server: House) -> None:
    async with h2_client(server.peers) as client:
        leaving, staying = await beside(client, "leaving"), await beside(client, "staying")
        client.connection.reset_stream(leaving, h2.errors.ErrorCodes.CANCEL)
        await client.flush()
        note("HTTP/2: one stream is reset", await server.gone("leaving"), 0, server.kind)
        assert server.reason("leaving") == "left"
        await server.publish(1)
        await client.until(lambda: b"event: discovery" in client.answers[staying].body, "the other hears on")


async def test_a_connection_that_is_not_read_at_all_is_cut_off_with_all_its_streams(server: House) -> None:
    async with await server.peers.connect(rcvbuf=4096, alpn="h2") as stream:
        other_end = OtherEnd(stream)
        client = H2Client(stream, 65535)
        client.connection.initiate_connection()
        for agent in ("one", "two"):
            await client.request(path_for(agent))

        async def both() -> bool:
            return sorted(await server.clients()) == ["one", "two"]

        await eventually(both, "both are registered")
        seconds = await flooded(server, "one")
        await server.gone("two")
        note("HTTP/2: a connection that is not read", seconds, WRITE_TIMEOUT, server.kind)
        await other_end.freed()


async def test_a_connection_that_resets_takes_all_its_streams_along_at_once(server: House) -> None:
    async with h2_client(server.peers) as client:
        for agent in ("one", "two", "three"):
            await beside(client, agent)
        reset(client)
        for agent in ("one", "two", "three"):
            note("HTTP/2: the connection is reset", await server.gone(agent), 0, server.kind)
            assert server.reason(agent) == "left"


async def test_a_connection_that_closes_its_half_takes_all_its_streams_along_at_once(server: House) -> None:
    async with h2_client(server.peers) as client:
        for agent in ("one", "two"):
            await beside(client, agent)
        await wire(client).send_eof()
        for agent in ("one", "two"):
            note("HTTP/2: the connection is half-closed", await server.gone(agent), 0, server.kind)
            assert server.reason(agent) == "left"
        await eventually(lambda: client.closed, "the server closes its half, too")


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with Namespace() as made:
        yield made


async def test_a_connection_that_vanishes_in_silence_is_gone_after_keep_alive_and_write_timeout(
    namespace: Namespace, server: House
) -> None:
    async with h2_client(namespace.to(server)) as client:
        other_end = OtherEnd(client)
        for agent in ("one", "two"):
            await beside(client, agent)
        namespace.swallow()
        bound = KEEPALIVE + WRITE_TIMEOUT
        note("HTTP/2: vanished, no traffic", await server.gone("one", bound), bound, server.kind)
        await server.gone("two")
        await other_end.freed()


async def test_a_connection_that_vanishes_under_traffic_is_gone_after_the_write_timeout(
    namespace: Namespace, server: House
) -> None:
    async with h2_client(namespace.to(server)) as client, h2_client(server.peers) as other:
        other_end = OtherEnd(client)
        for agent in ("one", "two"):
            await beside(client, agent)
        staying = await beside(other, "staying")
        namespace.swallow()
        note("HTTP/2: vanished, under a flood", await flooded(server, "one"), WRITE_TIMEOUT, server.kind)
        await server.gone("two")
        await other_end.freed()
        heard = other.answers[staying]
        await other.until(lambda: heard.body.count(b"event: discovery") == FLOOD, "who stays hears everything")
