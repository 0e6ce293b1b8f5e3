"""What the connection promises over HTTP/2, shown on a real Hypercorn: each stream is a connection of its own.

Hypercorn's HTTP/2 has no back-pressure of its own, ends connections that have served too many requests with their
streams still open, and cannot give up one stream. All of that is below the ASGI `send`, and is ours.
"""

from __future__ import annotations

from pathlib import Path

import h2.errors
import pytest
import structlog.testing
import trio
from serving import (
    FRAME,
    SLACK,
    TIMEOUT,
    Batch,
    Gate,
    certificate,
    h2_client,
    serving,
    was_reset,
)
from support import WITHIN, eventually, fail_within

from sse_trio.connection import Connection


@pytest.fixture(name="certificate", params=["tls", "prior knowledge"])
def a_certificate(request: pytest.FixtureRequest, tmp_path: Path) -> str | bool:
    """A certificate for localhost and its key; False for HTTP/2 without TLS."""
    return certificate(tmp_path) if request.param == "tls" else False


async def test_a_stream_arrives_frame_by_frame_and_ends(certificate: str) -> None:
    gate = Gate()

    async def script(connection: Connection) -> None:
        assert connection.http_version == "2"
        assert not connection.can_write_now
        assert not connection.write_now(Batch(FRAME))
        await connection.write(FRAME)
        await gate.go.wait()
        await connection.write(FRAME)
        await connection.finish()

    async with serving(script, tls=certificate) as server, h2_client(server) as client:
        number = await client.request("/stream")
        answer = client.answers[number]
        await client.until(lambda: answer.body == FRAME, "the first frame")
        assert answer.status == 200
        gate.go.set()
        await client.until(lambda: answer.ended, "the end")
        assert answer.body == FRAME * 2


async def test_a_head_request_gets_no_body(certificate: str) -> None:
    async def script(connection: Connection) -> None:
        await connection.write(FRAME)
        await connection.finish()

    async with serving(script, tls=certificate) as server, h2_client(server) as client:
        number = await client.request("/stream", method="HEAD")
        await client.until(lambda: client.answers[number].ended, "the end")
        assert client.answers[number].body == b""


async def test_a_stream_that_is_not_read_is_reset_alone(certificate: str) -> None:
    gate = Gate()
    healthy = Gate()

    async def script(connection: Connection) -> None:
        await (gate.stall if gate.connection is None else healthy.stand)(connection)

    async with serving(script, tls=certificate) as server, h2_client(server) as client:
        stalled = await client.request("/stream", stalled=True)
        with fail_within(WITHIN, "the first stream stands"):
            await gate.reached.wait()
        other = await client.request("/stream")
        await client.until(lambda: client.answers[other].body == FRAME, "the second stream stands")
        await gate.wait()
        assert TIMEOUT <= gate.ended_at - gate.began_at <= TIMEOUT * 1.25 + SLACK
        assert gate.connection is not None
        assert gate.connection.stalled
        await client.until(lambda: client.answers[stalled].reset is not None, "the stream is reset")
        assert client.answers[stalled].reset == h2.errors.ErrorCodes.CANCEL
        protocol = gate.connection._protocol  # type: ignore[attr-defined]
        await eventually(lambda: set(protocol.stream_buffers) == {other}, "its memory is free")
        assert set(protocol.streams) == {other}

        assert healthy.connection is not None
        assert not healthy.connection.stalled
        await healthy.connection.write(FRAME)
        await client.until(lambda: client.answers[other].body == FRAME * 2, "the second stream goes on")
        assert (await client.get("/plain")).body == b"plain"


async def test_what_is_held_for_a_stream_that_is_not_read_is_one_write(certificate: str) -> None:
    gate = Gate()
    async with serving(gate.stall, tls=certificate, timeout=WITHIN) as server, h2_client(server) as client:
        await client.request("/stream", stalled=True)
        with fail_within(WITHIN, "the stream stands"):
            await gate.reached.wait()
        protocol = gate.connection._protocol  # type: ignore[union-attr]
        await eventually(lambda: len(protocol.stream_buffers[1].buffer) > 0, "the window is used up")
        assert len(protocol.stream_buffers[1].buffer) <= len(FRAME * 10_000)
        assert gate.connection is not None
        gate.connection.abort()
        await gate.wait()


async def test_an_ordinary_answer_that_is_not_read_is_reset_alone(certificate: str) -> None:
    async with serving(tls=certificate) as server, h2_client(server) as client:
        stalled = await client.request("/huge", stalled=True)
        began = trio.current_time()
        await client.until(lambda: client.answers[stalled].reset is not None, "the stream is reset")
        assert TIMEOUT <= trio.current_time() - began <= TIMEOUT * 1.25 + SLACK
        assert (await client.get("/plain")).body == b"plain"


async def test_a_stream_that_is_read_slowly_is_not_reset(certificate: str) -> None:
    gate = Gate()
    payload = FRAME * 3000

    async def script(connection: Connection) -> None:
        gate.began_at = trio.current_time()
        await connection.write(payload)
        await connection.finish()
        gate.ended_at = trio.current_time()

    async with serving(script, tls=certificate) as server, h2_client(server, window=4096) as client:
        number = await client.request("/stream", stalled=True)
        answer = client.answers[number]
        with fail_within(WITHIN, "the slow stream ends"):
            while not answer.ended:
                await trio.sleep(0.1)  # what makes the reader slow
                if not answer.ended:
                    client.connection.increment_flow_control_window(4096, number)
                    await client.flush()
        assert answer.body == payload
        assert gate.ended_at - gate.began_at > 2 * TIMEOUT, "the reader was too fast to show anything"


async def test_a_connection_that_is_not_read_at_all_is_cut_off(certificate: str) -> None:
    gate = Gate()
    async with serving(gate.stall, tls=certificate) as server:
        stream = await server.connect(rcvbuf=4096, alpn="h2")
        from serving import H2Client

        client = H2Client(stream, (1 << 31) - 1)
        client.connection.initiate_connection()
        client.connection.increment_flow_control_window(1 << 30)
        await client.flush()
        await client.request("/stream")
        await gate.wait()
        await eventually(lambda: was_reset(stream), "the peer gets an RST")
        await trio.aclose_forcefully(stream)


async def test_abort_resets_one_stream(certificate: str) -> None:
    gate = Gate()
    async with serving(gate.stand, tls=certificate) as server, h2_client(server) as client:
        number = await client.request("/stream")
        await client.until(lambda: client.answers[number].body == FRAME, "the stream stands")
        assert gate.connection is not None
        gate.connection.abort()
        await gate.wait()
        await client.until(lambda: client.answers[number].reset is not None, "the stream is reset")
        assert (await client.get("/plain")).body == b"plain"


async def test_a_stream_that_the_peer_resets_ends(certificate: str) -> None:
    gate = Gate()
    async with serving(gate.stand, tls=certificate) as server, h2_client(server) as client:
        number = await client.request("/stream")
        await client.until(lambda: client.answers[number].body == FRAME, "the stream stands")
        client.connection.reset_stream(number)
        await client.flush()
        await gate.wait()
        assert (await client.get("/plain")).body == b"plain"


async def test_a_stream_lives_on_past_the_limit_of_requests_on_its_connection(certificate: str) -> None:
    gate = Gate()
    async with serving(gate.stand, tls=certificate, keep_alive_max_requests=5) as server, h2_client(server) as client:
        number = await client.request("/stream")
        await client.until(lambda: client.answers[number].body == FRAME, "the stream stands")
        for _ in range(20):
            assert (await client.get("/plain")).body == b"plain"
        assert not client.goodbye
        assert gate.connection is not None
        await gate.connection.write(FRAME)
        await client.until(lambda: client.answers[number].body == FRAME * 2, "the stream goes on")


async def test_more_streams_than_hypercorn_allows_by_default_fit_on_one_connection(certificate: str) -> None:
    async def script(connection: Connection) -> None:
        await connection.write(FRAME)
        await trio.sleep_forever()

    async with serving(script, tls=certificate) as server, h2_client(server) as client:
        numbers = [await client.request("/stream")]
        await client.until(lambda: (client.limit or 0) > 250, "the server raises its limit")
        numbers += [await client.request("/stream") for _ in range(249)]
        await client.until(lambda: all(client.answers[number].body == FRAME for number in numbers), "all stand")


async def test_a_body_that_comes_after_its_answer_is_ignored(certificate: str) -> None:
    gate = Gate()
    async with serving(gate.stand, tls=certificate) as server, h2_client(server) as client:
        stream = await client.request("/stream")
        await client.until(lambda: client.answers[stream].body == FRAME, "the stream stands")
        early = await client.request("/plain", method="POST", body=True)
        await client.until(lambda: client.answers[early].ended, "the answer that does not wait for the body")
        assert client.answers[early].status == 405
        client.connection.send_data(early, b"x" * 10_000)
        client.connection.send_data(early, b"x", end_stream=True)
        await client.flush()
        assert (await client.get("/plain")).body == b"plain"
        assert gate.connection is not None
        await gate.connection.write(FRAME)
        await client.until(lambda: client.answers[stream].body == FRAME * 2, "the stream goes on")


async def test_a_request_that_makes_hypercorn_fail_ends_its_connection_and_nothing_else(certificate: str) -> None:
    gate = Gate()
    with structlog.testing.capture_logs() as logs:
        async with serving(gate.stand, tls=certificate) as server, h2_client(server) as healthy:
            stream = await healthy.request("/stream")
            await healthy.until(lambda: healthy.answers[stream].body == FRAME, "the stream stands")
            async with h2_client(server) as client:
                await client.request("/\u00ff")
                await eventually(lambda: client.closed, "the server closes the connection")
            assert gate.connection is not None
            await gate.connection.write(FRAME)
            await healthy.until(lambda: healthy.answers[stream].body == FRAME * 2, "the stream goes on")
    assert [entry["event"] for entry in logs] == ["a connection failed in Hypercorn"]


async def test_an_idle_connection_is_closed_after_the_keep_alive_timeout(certificate: str) -> None:
    async with serving(tls=certificate, keep_alive_timeout=0.5) as server, h2_client(server) as client:
        assert (await client.get("/plain")).body == b"plain"
        began = trio.current_time()
        await eventually(lambda: client.closed, "the server closes the idle connection")
        assert 0.4 <= trio.current_time() - began <= 0.5 + SLACK


async def test_a_shutdown_is_not_held_up_by_a_stream_that_is_not_read(certificate: str) -> None:
    gate = Gate()
    async with (
        serving(gate.stall, tls=certificate, timeout=60.0, graceful=20.0) as server,
        h2_client(server) as client,
    ):
        await client.request("/stream", stalled=True)
        with fail_within(WITHIN, "the stream begins"):
            await gate.reached.wait()
        server.stop.set()
        began = trio.current_time()
        await gate.wait()
        assert trio.current_time() - began <= 2.5 + SLACK
        with fail_within(WITHIN, "the server stops"):
            await server.stopped.wait()
        assert trio.current_time() - began <= 2.5 + SLACK
