"""12. The same peers under TLS, and on one HTTP/2 stream beside healthy ones.

The guarantee: nothing of 11 depends on the wire. Under TLS the deadline lies below the encryption (whose closing
writes, too), and an HTTP/2 stream that is not read is reset alone: the others on its connection do not notice.

The trap: Hypercorn's HTTP/2 has no back-pressure to speak of (`StreamBuffer.pop(0)` in `hypercorn/protocol/h2.py`
releases the pause that `push` has just set): at zero window everything that is sent piles up in the server's memory.
And where one gives a connection up, one gives up every healthy stream that shares it.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator

import h2.errors
import pytest
import serving
import trio
from serving import H2Client, h2_client
from support import WITHIN, eventually, fail_within
from teardown.house import COMMANDS, KEEPALIVE, SLACK, WRITE_TIMEOUT, House, house, note, reset

FLOOD = 300


@pytest.fixture(scope="module", params=COMMANDS)
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with house(tmp_path_factory.mktemp("house"), request.param, secure=True) as made:
        yield made


def path_for(agent_id: str) -> str:
    return f"/discoveries/stream?agent_id={agent_id}&detail=full"


async def connect(server: House, agent_id: str, rcvbuf: int | None = None) -> trio.SSLStream[trio.SocketStream]:
    """A client over HTTP/1.1 and TLS that has been told that it is connected."""
    stream: trio.SSLStream[trio.SocketStream] = await serving.Server(server.port, tls=True).connect(rcvbuf=rcvbuf)
    await stream.send_all(serving.get(path_for(agent_id)))
    await serving.read_until(stream, b"event: connected")
    return stream


async def test_under_tls_a_reader_that_stops_is_cut_off_after_the_write_timeout(server: House) -> None:
    stream = await connect(server, "stalled", rcvbuf=4096)
    began = trio.current_time()
    await server.publish(FLOOD)
    await server.gone("stalled", WRITE_TIMEOUT + SLACK)
    note("TLS: stalled reader", trio.current_time() - began, WRITE_TIMEOUT, server.command)
    assert server.reason("stalled") == "stalled"
    await trio.aclose_forcefully(stream)


async def test_under_tls_a_reader_that_resets_is_gone_at_once(server: House) -> None:
    stream = await connect(server, "resetting")
    reset(stream.transport_stream)
    note("TLS: reset", await server.gone("resetting", SLACK), 0, server.command)


async def test_under_tls_a_reader_that_closes_without_a_close_notify_is_gone_at_once(server: House) -> None:
    stream = await connect(server, "closing")
    stream.transport_stream.socket.close()
    note("TLS: close without close_notify", await server.gone("closing", SLACK), 0, server.command)


async def test_under_tls_a_reader_that_closes_its_half_is_taken_to_have_left(server: House) -> None:
    stream = await connect(server, "half-closed")
    await stream.transport_stream.send_eof()
    note("TLS: half-closed", await server.gone("half-closed", SLACK), 0, server.command)
    await trio.aclose_forcefully(stream)


async def test_a_peer_that_begins_a_handshake_and_no_more_is_closed(server: House) -> None:
    """Hypercorn's `ssl_handshake_timeout` is 60 s: this one leaves before."""
    stream = await trio.open_tcp_stream("127.0.0.1", server.port)
    context = ssl.create_default_context()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    hello = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        hello.do_handshake()
    await stream.send_all(outgoing.read()[:100])
    await stream.aclose()


async def beside(client: H2Client, agent_id: str, *, stalled: bool = False) -> int:
    """One more stream on that connection; its number."""
    number = await client.request(path_for(agent_id), stalled=stalled)
    await client.until(lambda: b"event: connected" in client.answers[number].body, f"{agent_id} is connected")
    return number


async def test_a_stream_that_is_not_read_is_reset_alone_and_its_neighbours_hear_everything(server: House) -> None:
    async with h2_client(serving.Server(server.port, tls=True)) as client:
        stalled = await beside(client, "stalled", stalled=True)
        healthy = [await beside(client, f"healthy-{number}") for number in range(3)]
        began = trio.current_time()
        await server.publish(FLOOD)
        await server.gone("stalled", WRITE_TIMEOUT + SLACK)
        note("HTTP/2: one stalled stream beside three", trio.current_time() - began, WRITE_TIMEOUT, server.command)
        await client.until(lambda: client.answers[stalled].reset is not None, "the stream is reset")
        assert client.answers[stalled].reset == h2.errors.ErrorCodes.CANCEL
        neighbours = [client.answers[number] for number in healthy]
        await client.until(lambda: all(a.body.count(b"event: discovery") == FLOOD for a in neighbours), "all is heard")
        assert all(answer.reset is None for answer in neighbours)
        assert sorted(await server.clients()) == ["healthy-0", "healthy-1", "healthy-2"]


async def test_a_stream_that_its_peer_resets_is_gone_at_once_and_its_neighbour_stays(server: House) -> None:
    async with h2_client(serving.Server(server.port, tls=True)) as client:
        leaving, staying = await beside(client, "leaving"), await beside(client, "staying")
        client.connection.reset_stream(leaving, h2.errors.ErrorCodes.CANCEL)
        await client.flush()
        note("HTTP/2: one stream is reset", await server.gone("leaving", SLACK), 0, server.command)
        await server.publish(1)
        await client.until(lambda: b"event: discovery" in client.answers[staying].body, "the other hears on")


async def test_a_connection_that_is_not_read_at_all_is_cut_off_with_all_its_streams(server: House) -> None:
    stream = await serving.Server(server.port, tls=True).connect(rcvbuf=4096, alpn="h2")
    client = H2Client(stream, 65535)
    client.connection.initiate_connection()
    for agent in ("one", "two"):
        await client.request(path_for(agent))

    async def both() -> bool:
        return sorted(await server.clients()) == ["one", "two"]

    await eventually(both, "both are registered")
    began = trio.current_time()
    await server.publish(FLOOD)
    await server.gone("one", WRITE_TIMEOUT + SLACK)
    await server.gone("two", SLACK)
    note("HTTP/2: a connection that is not read", trio.current_time() - began, WRITE_TIMEOUT, server.command)
    await trio.aclose_forcefully(stream)


async def test_a_connection_that_resets_takes_all_its_streams_along_at_once(server: House) -> None:
    async with h2_client(serving.Server(server.port, tls=True)) as client:
        for agent in ("one", "two", "three"):
            await beside(client, agent)
        reset(client.stream.transport_stream)
        for agent in ("one", "two", "three"):
            note("HTTP/2: the connection is reset", await server.gone(agent, SLACK), 0, server.command)


async def test_a_healthy_reader_under_tls_is_kept_alive_and_not_cut_off(server: House) -> None:
    stream = await connect(server, "healthy")
    heard = b""
    with fail_within(WITHIN, "three keep-alives are heard"):
        while heard.count(b": keep-alive") < 3:
            heard += await stream.receive_some()
    assert await server.clients() == ["healthy"]
    await trio.aclose_forcefully(stream)
    await server.gone("healthy", KEEPALIVE + SLACK)
