"""What the connection promises over HTTP/1.0, HTTP/1.1 and TLS, shown on a real Hypercorn over real sockets."""

from __future__ import annotations

import math
import socket
import struct
from pathlib import Path

import pytest
import structlog.testing
import trio
from quart import Response
from quart_trio import QuartTrio
from serving import (
    FRAME,
    SLACK,
    TIMEOUT,
    Batch,
    Gate,
    Scripted,
    body_of,
    certificate,
    get,
    read_to_end,
    read_until,
    serving,
    was_reset,
    write_on,
)
from support import WITHIN, eventually, fail_within

from sse_trio import hypercorn_connection
from sse_trio.asgi import ASGIConnection, _bounded
from sse_trio.connection import Connection, ConnectionResponse, PeerGone
from sse_trio.deadline import DeadlineStream
from sse_trio.hypercorn_connection import chunk


@pytest.fixture(name="certificate")
def a_certificate(tmp_path: Path) -> str:
    """A certificate for localhost, and its key."""
    return certificate(tmp_path)


# -- the body's framing --------------------------------------------------------------------------------------


async def test_a_stream_over_http_1_1_is_written_in_chunks_and_ends_with_the_last_one() -> None:
    async def script(connection: Connection) -> None:
        assert (connection.method, connection.http_version, connection.is_tls) == ("GET", "1.1", False)
        assert connection.peer is not None
        assert connection.peer[0] == "127.0.0.1"
        assert connection.can_write_now
        await connection.write(FRAME)
        batch = Batch(FRAME * 2)
        assert connection.write_now(batch)
        assert batch.chunk == chunk(FRAME * 2)
        assert connection.write_now(Batch(b"ignored: the chunk is made already", chunk(FRAME * 3)))
        await connection.write(b"")
        assert not connection.has_rest
        await connection.finish()
        assert not connection.can_write_now

    async with serving(script) as server, await server.connect() as peer:
        await peer.send_all(get("/stream", close=True))
        _, dechunker = body_of(await read_to_end(peer))
        assert dechunker.chunks == [FRAME, FRAME * 2, FRAME * 3]
        assert dechunker.ended
        assert dechunker.buffer == b""


async def test_the_head_goes_out_with_the_first_frames() -> None:
    gate = Gate()

    class Direct(ConnectionResponse):
        async def respond(self, connection: Connection) -> None:
            await connection.start(200, [(b"content-type", b"text/event-stream")])
            assert connection.has_rest
            assert [connection.can_write_now] == [False]  # a comparison that the type checker does not follow
            await connection.write(FRAME)
            assert connection.can_write_now
            await gate.go.wait()
            await connection.finish()

    async with serving(response=Direct) as server, await server.connect() as peer:
        await peer.send_all(get("/stream"))
        with fail_within(WITHIN, "the first packet"):
            first = await peer.receive_some()
        assert first.startswith(b"HTTP/1.1 200")
        assert body_of(first)[0] == FRAME
        gate.go.set()
        await read_until(peer, b"0\r\n\r\n")


async def test_the_connection_serves_the_next_request_after_a_stream_has_ended() -> None:
    async def script(connection: Connection) -> None:
        await connection.write(FRAME)
        await connection.finish()

    async with serving(script) as server, await server.connect() as peer:
        for _ in range(3):
            await peer.send_all(get("/stream"))
            answer = await read_until(peer, b"\r\n0\r\n\r\n")
            assert body_of(answer)[0] == FRAME
        await peer.send_all(get("/plain", close=True))
        assert (await read_to_end(peer)).endswith(b"\r\n\r\nplain")


async def test_a_client_of_http_1_0_gets_no_chunks() -> None:
    async def script(connection: Connection) -> None:
        assert not connection.can_write_now
        await connection.write(FRAME)
        await connection.write(FRAME)
        await connection.finish()

    async with serving(script) as server, await server.connect() as peer:
        await peer.send_all(get("/stream", version="1.0"))
        head, _, body = (await read_to_end(peer)).partition(b"\r\n\r\n")
        assert b"chunked" not in head.lower()
        assert body == FRAME * 2


@pytest.mark.parametrize("secure", [False, True])
async def test_head_gets_no_body(certificate: str, secure: bool) -> None:
    async def script(connection: Connection) -> None:
        assert not connection.can_write_now
        await connection.write(FRAME)
        await connection.finish()

    async with serving(script, tls=secure and certificate) as server, await server.connect() as peer:
        await peer.send_all(get("/stream", method="HEAD", close=True))
        head, _, body = (await read_to_end(peer)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        assert body == b""


async def test_a_stream_under_tls_is_written_in_chunks_too(certificate: str) -> None:
    async def script(connection: Connection) -> None:
        assert connection.is_tls
        assert not connection.can_write_now
        await connection.write(FRAME)
        await connection.write(FRAME * 2)
        await connection.finish()

    async with serving(script, tls=certificate) as server, await server.connect() as peer:
        await peer.send_all(get("/stream", close=True))
        body, dechunker = body_of(await read_to_end(peer))
        assert body == FRAME * 3
        assert dechunker.ended


async def test_a_write_cancelled_in_mid_chunk_leaves_the_rest_to_be_written_first() -> None:
    payloads = [FRAME * 200_000, b"event: goodbye\ndata: {}\n\n"]
    cut = trio.Event()

    async def script(connection: Connection) -> None:
        with trio.move_on_after(0.1) as scope:
            await connection.write(payloads[0])
        assert scope.cancelled_caught
        assert connection.has_rest
        assert not connection.can_write_now
        with trio.CancelScope() as scope:
            scope.cancel()
            await connection.write(payloads[1])
        assert scope.cancelled_caught
        cut.set()
        await connection.finish()

    async with serving(script, timeout=WITHIN) as server, await server.connect(rcvbuf=4096) as peer:
        await peer.send_all(get("/stream", close=True))
        with fail_within(WITHIN, "the write is cut"):
            await cut.wait()
        _, dechunker = body_of(await read_to_end(peer))
        assert dechunker.chunks == payloads
        assert dechunker.ended


async def test_a_chunk_that_the_kernel_cuts_is_kept_and_written_before_anything_else() -> None:
    batches = [Batch(b"%06d" % number + FRAME * 100) for number in range(2000)]
    taken: list[bytes] = []
    cut = trio.Event()

    async def script(connection: Connection) -> None:
        for batch in batches:
            if not connection.write_now(batch):
                break
            taken.append(batch.payload)
            if connection.has_rest:
                break
        cut.set()
        assert not connection.can_write_now or not connection.has_rest
        await connection.write_rest()
        assert not connection.has_rest
        await connection.write(b"last")
        taken.append(b"last")
        await connection.finish()

    async with serving(script, timeout=WITHIN) as server, await server.connect(rcvbuf=4096) as peer:
        await peer.send_all(get("/stream", close=True))
        with fail_within(WITHIN, "the kernel takes no more"):
            await cut.wait()
        assert 1 < len(taken) < len(batches)
        _, dechunker = body_of(await read_to_end(peer))
        assert dechunker.chunks == taken
        assert dechunker.ended


async def test_a_rest_is_a_view_of_the_chunk_that_all_share() -> None:
    gate = Gate()
    batch = Batch(FRAME * 300_000)

    async def script(connection: Connection) -> None:
        assert connection.write_now(batch)
        rest = connection._rest
        assert isinstance(rest, memoryview)
        assert rest.obj is batch.chunk
        gate.ended.set()

    async with serving(script) as server, await server.connect(rcvbuf=4096) as peer:
        await peer.send_all(get("/stream"))
        await gate.wait()


async def test_nothing_is_taken_while_the_kernel_is_full() -> None:
    gate = Gate()

    async def script(connection: Connection) -> None:
        small = Batch(FRAME)
        for _ in range(1 << 20):
            if not connection.write_now(small) or connection.has_rest:
                break
        with trio.move_on_after(0.05):
            await connection.write_rest()
        if not connection.has_rest:
            assert not connection.write_now(small)
            assert not connection.has_rest
        gate.ended.set()

    async with serving(script) as server, await server.connect(rcvbuf=4096) as peer:
        await peer.send_all(get("/stream"))
        await gate.wait()


# -- peers that do not read ----------------------------------------------------------------------------------


@pytest.mark.parametrize("secure", [False, True])
async def test_a_stream_to_a_peer_that_stops_reading_is_cut_off_after_the_timeout(
    certificate: str, secure: bool
) -> None:
    gate = Gate()
    async with serving(gate.stall, tls=secure and certificate) as server, await server.connect(rcvbuf=4096) as peer:
        await peer.send_all(get("/stream"))
        await gate.wait()
        assert isinstance(gate.error, trio.BrokenResourceError)
        assert gate.connection is not None
        assert gate.connection.stalled
        # What a peer's kernel holds is taken at once, so its silence began when the first write did, or
        # little later.
        assert TIMEOUT <= gate.ended_at - gate.began_at <= TIMEOUT * 1.25 + SLACK
        await eventually(lambda: was_reset(peer), "the peer gets an RST")
        await peer.aclose() if not secure else await trio.aclose_forcefully(peer)


@pytest.mark.parametrize("secure", [False, True])
async def test_an_ordinary_answer_to_a_peer_that_stops_reading_is_cut_off_after_the_timeout(
    certificate: str, secure: bool
) -> None:
    async with serving(tls=secure and certificate) as server, await server.connect(rcvbuf=4096) as peer:
        began = trio.current_time()
        await peer.send_all(get("/huge"))
        await eventually(lambda: was_reset(peer), "the peer gets an RST")
        assert TIMEOUT <= trio.current_time() - began <= TIMEOUT * 1.25 + SLACK
        await trio.aclose_forcefully(peer)


async def test_a_slow_reader_that_goes_on_reading_is_not_cut_off() -> None:
    gate = Gate()
    payload = FRAME * 3000

    async def script(connection: Connection) -> None:
        gate.began_at = trio.current_time()
        await connection.write(payload)
        gate.ended_at = trio.current_time()
        await connection.finish()

    async with serving(script) as server, await server.connect(rcvbuf=4096) as peer:
        await peer.send_all(get("/stream", close=True))
        heard = b""
        with fail_within(WITHIN, "the slow reader reads to the end"):
            while data := await peer.receive_some(2048):
                heard += data
                await trio.sleep(0.1)  # what makes the reader slow
        body, dechunker = body_of(heard)
        assert body == payload
        assert dechunker.ended
        assert gate.ended_at - gate.began_at > 2 * TIMEOUT, "the reader was too fast to show anything"


@pytest.mark.parametrize("secure", [False, True])
async def test_a_shutdown_is_not_held_up_by_a_peer_that_stopped_reading(certificate: str, secure: bool) -> None:
    gate = Gate()
    async with (
        serving(gate.stall, tls=secure and certificate, timeout=60.0, graceful=0.5) as server,
        await server.connect(rcvbuf=4096) as peer,
    ):
        await peer.send_all(get("/stream"))
        with fail_within(WITHIN, "the stream begins"):
            await gate.reached.wait()
        assert gate.connection is not None
        assert not gate.connection.stopping.is_set()
        server.stop.set()
        began = trio.current_time()
        with fail_within(WITHIN, "the server stops"):
            await server.stopped.wait()
        assert trio.current_time() - began <= 2.5 + SLACK
        assert gate.connection.stopping.is_set()
        await trio.aclose_forcefully(peer)


async def test_abort_resets_the_peer_at_once() -> None:
    gate = Gate()

    async def script(connection: Connection) -> None:
        await connection.write(FRAME)
        await gate.go.wait()
        connection.abort()
        assert not connection.can_write_now
        assert connection.unsent() is None
        with trio.CancelScope(shield=True):
            with pytest.raises(trio.BrokenResourceError):
                await connection.write(FRAME)
            with pytest.raises(trio.BrokenResourceError):
                await connection.finish()
        gate.connection = connection
        try:
            await trio.sleep_forever()
        finally:
            gate.ended.set()

    async with serving(script) as server, await server.connect() as peer:
        await peer.send_all(get("/stream"))
        await read_until(peer, FRAME)
        gate.go.set()
        await gate.wait()
        with pytest.raises(trio.BrokenResourceError), fail_within(WITHIN, "the peer learns of it"):
            await peer.receive_some()


async def test_a_descriptor_that_was_given_to_another_connection_is_not_written_to() -> None:
    gate = Gate()

    async def script(connection: Connection) -> None:
        assert connection.can_write_now
        connection._transport.socket.close()  # type: ignore[attr-defined]
        left, right = socket.socketpair()
        with left, right, pytest.raises(trio.BrokenResourceError):
            connection.write_now(Batch(FRAME))
        gate.ended.set()

    async with serving(script) as server, await server.connect() as peer:
        await peer.send_all(get("/stream"))
        await gate.wait()


# -- peers that leave ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["close", "half-close", "reset"])
@pytest.mark.parametrize("secure", [False, True])
async def test_a_peer_that_leaves_ends_its_stream(certificate: str, secure: bool, how: str) -> None:
    gate = Gate()
    async with serving(gate.stand, tls=secure and certificate) as server:
        peer = await server.connect()
        await peer.send_all(get("/stream"))
        await read_until(peer, FRAME)
        inner = peer.transport_stream if secure else peer
        if how == "reset":
            inner.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if how == "half-close":
            await inner.send_eof()
        else:
            await inner.aclose()
        await gate.wait()
        await trio.aclose_forcefully(peer)


async def test_a_write_to_a_peer_that_has_left_says_so() -> None:
    gate = Gate()

    async def script(connection: Connection) -> None:
        await connection.write(FRAME)
        with pytest.raises(trio.BrokenResourceError), trio.move_on_after(WITHIN, shield=True):
            await write_on(connection)
        assert not connection.stalled
        gate.ended.set()

    async with serving(script) as server:
        peer = await server.connect()
        await peer.send_all(get("/stream"))
        await read_until(peer, FRAME)
        await peer.aclose()
        await gate.wait()


async def test_a_response_may_let_out_that_the_peer_has_left() -> None:
    gate = Gate()

    async def script(connection: Connection) -> None:
        try:
            await connection.write(FRAME)
            with trio.move_on_after(WITHIN, shield=True):
                await write_on(connection)
        finally:
            gate.ended.set()

    async with serving(script) as server:  # which fails when an error was logged
        peer = await server.connect()
        await peer.send_all(get("/stream"))
        await read_until(peer, FRAME)
        await peer.aclose()
        await gate.wait()


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_peer_that_is_gone_before_the_head_ends_its_response_and_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    tried = trio.Event()

    async def broken(self: DeadlineStream, data: bytes) -> int:
        tried.set()
        raise trio.BrokenResourceError("the peer is gone")

    async def script(connection: Connection) -> None:
        await connection.write(FRAME)

    monkeypatch.setattr(DeadlineStream, "send_some", broken)
    async with serving(script) as server, await server.connect() as peer:  # which fails when an error was logged
        await peer.send_all(get("/stream", version=version))
        with fail_within(WITHIN, "the head is written"):
            await tried.wait()


async def test_a_head_that_is_not_taken_in_time_cuts_its_peer_off_and_nothing_follows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    followed = False

    async def stuck(self: DeadlineStream, data: bytes) -> int:
        await trio.sleep_forever()
        raise AssertionError("it sleeps")

    async def script(connection: Connection) -> None:
        nonlocal followed
        followed = True

    monkeypatch.setattr(DeadlineStream, "send_some", stuck)
    monkeypatch.setattr(hypercorn_connection, "BACKSTOP", 0.01)
    async with serving(script) as server, await server.connect() as peer:
        await peer.send_all(get("/stream", version="1.0"))
        with fail_within(WITHIN, "the peer is cut off"):
            try:
                assert await peer.receive_some() == b""
            except trio.BrokenResourceError:
                pass
        assert not followed


async def test_a_peer_that_was_found_stalled_by_the_publisher_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()

    async def script(connection: Connection) -> None:
        await connection.write(FRAME)
        transport = connection._transport  # type: ignore[attr-defined]
        monkeypatch.setattr(DeadlineStream, "unsent", lambda self: 1)  # nothing arrives, and has not for long
        transport._acked, transport._moved_at, transport._look_at = transport._written, -math.inf, -math.inf
        with pytest.raises(PeerGone):
            connection.write_now(Batch(FRAME))
        assert connection.stalled
        gate.ended.set()

    async with serving(script) as server, await server.connect() as peer:
        await peer.send_all(get("/stream"))
        await gate.wait()


async def test_a_peer_that_speaks_after_its_request_is_noticed() -> None:
    gate = Gate()
    async with serving(gate.stand) as server, await server.connect() as peer:
        await peer.send_all(get("/stream"))
        await read_until(peer, FRAME)
        assert gate.connection is not None
        assert not gate.connection.spoke_early
        await peer.send_all(b"G")
        await eventually(lambda: gate.connection is not None and gate.connection.spoke_early, "it was heard")
        gate.connection.abort()


@pytest.mark.parametrize("path", ["/stream", "/huge"])
async def test_a_peer_that_spoke_early_and_was_cut_off_leaves_nothing_behind(path: str) -> None:
    gate = Gate()
    async with serving(gate.stall) as server, await server.connect(rcvbuf=4096) as peer:
        # Hypercorn's reader waits for the end of an answer that will have none.
        await peer.send_all(get(path) + get("/plain"))
        await eventually(lambda: was_reset(peer), "the peer gets an RST")
        server.stop.set()
        began = trio.current_time()
        with fail_within(WITHIN, "the server stops"):
            await server.stopped.wait()
        assert trio.current_time() - began <= SLACK


async def test_a_stream_that_is_left_unfinished_for_a_peer_that_spoke_early_leaves_nothing_behind() -> None:
    gate = Gate()

    async def script(connection: Connection) -> None:
        await connection.write(FRAME)
        await gate.go.wait()
        assert connection.spoke_early

    async with serving(script) as server, await server.connect() as peer:
        await peer.send_all(get("/stream") + b"G")
        await read_until(peer, FRAME)
        gate.go.set()
        with pytest.raises(trio.BrokenResourceError):
            await read_to_end(peer)
        server.stop.set()
        began = trio.current_time()
        with fail_within(WITHIN, "the server stops"):
            await server.stopped.wait()
        assert trio.current_time() - began <= SLACK


async def test_a_streams_own_failure_ends_that_stream_and_nothing_else() -> None:
    gate = Gate()

    async def script(connection: Connection) -> None:
        await connection.write(FRAME)
        if connection is not gate.connection and gate.connection is not None:
            raise RuntimeError("a bug")
        await gate.stand(connection)

    async with serving(script) as server, await server.connect() as healthy, await server.connect() as peer:
        await healthy.send_all(get("/stream"))
        await read_until(healthy, FRAME * 1)
        with fail_within(WITHIN, "the healthy stream stands"):
            await gate.reached.wait()
        await peer.send_all(get("/stream"))
        _, dechunker = body_of(await read_to_end(peer))
        assert not dechunker.ended, "a stream that failed does not look as if it had ended"
        await eventually(lambda: server.errors.texts, "the failure is logged")
        assert "a bug" in server.errors.texts.pop()
        assert gate.connection is not None
        assert gate.connection.write_now(Batch(b"still here"))
        await read_until(healthy, b"still here")


# -- connections that end ------------------------------------------------------------------------------------


@pytest.mark.parametrize("request_", [get("/plain", close=True), get("/plain", version="1.0")], ids=["close", "1.0"])
@pytest.mark.parametrize("secure", [False, True])
async def test_a_connection_that_is_not_to_be_kept_is_closed_after_the_answer(
    certificate: str, secure: bool, request_: bytes
) -> None:
    async with serving(tls=secure and certificate) as server, await server.connect() as peer:
        await peer.send_all(request_)
        assert (await read_to_end(peer)).endswith(b"\r\n\r\nplain")


@pytest.mark.parametrize("secure", [False, True])
async def test_an_idle_connection_is_closed_after_the_keep_alive_timeout(certificate: str, secure: bool) -> None:
    tls = secure and certificate
    async with serving(tls=tls, keep_alive_timeout=0.5) as server, await server.connect() as peer:
        await peer.send_all(get("/plain"))
        await read_until(peer, b"plain")
        began = trio.current_time()
        await read_to_end(peer)
        assert 0.4 <= trio.current_time() - began <= 0.5 + SLACK


async def test_an_idle_connection_does_not_hold_up_a_shutdown() -> None:
    async with serving(graceful=20.0) as server, await server.connect() as peer:
        await peer.send_all(get("/plain"))
        await read_until(peer, b"plain")
        server.stop.set()
        began = trio.current_time()
        with fail_within(WITHIN, "the server stops"):
            await server.stopped.wait()
        assert trio.current_time() - began <= SLACK


# -- requests that are none ------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [b"?x", b"http://[::1"])
async def test_a_target_that_is_no_path_is_refused(target: bytes) -> None:
    async with serving() as server, await server.connect() as peer:
        await peer.send_all(b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = await read_to_end(peer)
        assert answer.startswith(b"HTTP/1.1 400")
        assert answer.endswith(b'"detail":"the request target is not a path"}')


async def test_a_target_in_absolute_form_is_a_path() -> None:
    async with serving() as server, await server.connect() as peer:
        await peer.send_all(get("http://localhost/plain", close=True))
        assert (await read_to_end(peer)).endswith(b"\r\n\r\nplain")


HANDSHAKE = (
    b"GET /plain HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n\r\n"
)


async def test_a_websocket_is_refused() -> None:
    async with serving() as server, await server.connect() as peer:
        await peer.send_all(HANDSHAKE)
        assert (await read_to_end(peer)).startswith(b"HTTP/1.1 400")


async def test_bytes_that_make_hypercorn_fail_end_their_connection_and_nothing_else() -> None:
    gate = Gate()
    with structlog.testing.capture_logs() as logs:
        async with serving(gate.stand) as server, await server.connect() as healthy, await server.connect() as peer:
            await healthy.send_all(get("/stream"))
            await read_until(healthy, FRAME)
            await peer.send_all(HANDSHAKE + b"no frame at all")
            assert (await read_to_end(peer)).startswith(b"HTTP/1.1 400")
            assert gate.connection is not None
            await gate.connection.write(b"still here")
            await read_until(healthy, b"still here")
    assert [entry["event"] for entry in logs] == ["a connection failed in Hypercorn"]


async def test_a_body_without_a_length_that_is_too_large_is_refused() -> None:
    async with serving(max_content_length=1000) as server:
        head = b"POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
        for size, answer in ((100, b"200 \r\n"), (101, b"413 \r\n")):
            async with await server.connect() as peer:
                await peer.send_all(head + chunk(b"x" * size) * 10 + b"0\r\n\r\n")
                assert answer in await read_to_end(peer)


async def test_of_a_body_that_is_too_large_one_byte_more_than_is_allowed_is_held() -> None:
    parts = [600, 600, 600, 0]

    async def receive() -> dict[str, object]:
        await trio.lowlevel.checkpoint()
        return {"type": "http.request", "body": b"x" * parts.pop(0), "more_body": bool(parts)}

    bounded = _bounded(receive, 1000)  # type: ignore[arg-type]
    held = [await bounded() for _ in range(4)]
    assert [len(message["body"]) for message in held] == [600, 401, 0, 0]  # type: ignore[typeddict-item]
    assert [message["more_body"] for message in held] == [True, True, True, False]  # type: ignore[typeddict-item]


async def test_what_a_peer_sends_to_a_stream_as_its_body_is_not_kept() -> None:
    gate = Gate()
    async with serving(gate.stand) as server, await server.connect() as peer:
        head = b"GET /stream HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        await peer.send_all(head)
        await read_until(peer, FRAME)
        with fail_within(WITHIN, "the server reads on"):
            for _ in range(100):
                await peer.send_all(chunk(b"x" * 65536))
        await peer.aclose()
        await gate.wait()


# -- the server ----------------------------------------------------------------------------------------------


async def test_the_app_hears_of_its_worker_once_and_can_stop_it() -> None:
    async with serving() as server:
        for _ in range(3):
            async with await server.connect() as peer:
                await peer.send_all(get("/plain", close=True))
                await read_to_end(peer)
        (worker,) = server.workers
        assert not worker.stopping.is_set()
        await worker.stop()
        with fail_within(WITHIN, "the worker stops"):
            await worker.stopping.wait()
            await server.stopped.wait()


async def test_under_an_unknown_server_streams_are_plain_asgi_and_that_is_said_once() -> None:
    app = QuartTrio(__name__)
    app.asgi_http_class = ASGIConnection

    async def script(connection: Connection) -> None:
        assert not connection.can_write_now
        assert not connection.write_now(Batch(FRAME))
        assert not connection.stopping.is_set()
        assert not connection.spoke_early
        assert connection.unsent() is None
        await connection.write(FRAME)
        await connection.finish()
        connection.abort()

    @app.get("/stream")
    async def stream() -> Response:
        return Scripted(script)

    client = app.test_client()
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            response = await client.get("/stream")
            assert response.status_code == 200
            assert await response.get_data(as_text=False) == FRAME
    assert [entry["log_level"] for entry in logs if "unknown server" in entry["event"]] == ["warning"]
