"""The deadline below a connection: how long a peer is waited for, and that the stream is otherwise a plain
one.

Patience is tested on the mock clock, against a peer that is a number; the stream on real sockets, against
trio's own idea of what a stream is.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress

import pytest
import trio
import trio.testing
from support import WITHIN, eventually, fail_within

from sse_trio.deadline import SMALL, STOPPING, DeadlineStream, OutOfPatience, Patience


class Peer:
    """A peer that takes `rate` bytes per second of what it was sent, while the clock is between `reads`."""

    def __init__(self, sent: int, rate: float = 0.0, until: float = float("inf")) -> None:
        self.sent = sent
        self.rate = rate
        self.until = until
        self.began = trio.current_time()

    def left(self) -> int:
        read_for = min(trio.current_time() - self.began, self.until)
        return max(0, self.sent - int(read_for * self.rate))

    async def took_all(self) -> str:
        while self.left():
            await trio.sleep(0.05)
        return "done"


async def seconds_until_out_of_patience(patience: Patience, peer: Peer) -> float:
    began = trio.current_time()
    with pytest.raises(OutOfPatience):
        await patience.wait(peer.took_all, peer.left)
    return trio.current_time() - began


async def test_a_peer_that_takes_nothing_is_waited_for_exactly_the_timeout(
    autojump_clock: trio.testing.MockClock,
) -> None:
    patience = Patience(10.0, trio.Event())
    assert await seconds_until_out_of_patience(patience, Peer(100)) == pytest.approx(10.0)


async def test_a_slow_peer_is_waited_for_while_it_takes_something(autojump_clock: trio.testing.MockClock) -> None:
    patience = Patience(10.0, trio.Event())
    began = trio.current_time()
    assert await patience.wait(Peer(100, rate=0.5).took_all, Peer(100, rate=0.5).left) == "done"
    assert trio.current_time() - began == pytest.approx(200.0, abs=0.1)


async def test_the_timeout_counts_from_when_the_peer_last_took_something(
    autojump_clock: trio.testing.MockClock,
) -> None:
    patience = Patience(10.0, trio.Event())
    waited = await seconds_until_out_of_patience(patience, Peer(1000, rate=10.0, until=33.3))
    assert 43.2 <= waited <= 33.3 + 10.0 * 1.25


async def test_crumbs_are_no_progress_until_they_have_added_up(autojump_clock: trio.testing.MockClock) -> None:
    patience = Patience(10.0, trio.Event())
    crumbs = Peer(100_000, rate=100.0)
    began = trio.current_time()
    with pytest.raises(OutOfPatience):
        await patience.wait(crumbs.took_all, crumbs.left, least=1460)
    assert trio.current_time() - began == pytest.approx(10.0)
    slow = Peer(10_000, rate=200.0)
    assert await patience.wait(slow.took_all, slow.left, least=1460) == "done"
    assert trio.current_time() - began == pytest.approx(60.0, abs=0.1)


@pytest.mark.parametrize("timeout", [0.1, 1.0, 10.0, 3600.0])
async def test_a_peer_that_takes_nothing_is_gone_before_a_quarter_more_than_the_timeout(
    timeout: float, autojump_clock: trio.testing.MockClock
) -> None:
    peer = Peer(9, rate=40 / timeout, until=timeout / 8)
    waited = await seconds_until_out_of_patience(Patience(timeout, trio.Event()), peer)
    assert timeout <= waited <= timeout * (1.25 + 0.125)


async def test_a_server_that_is_stopping_waits_two_seconds_whatever_the_peer_takes(
    autojump_clock: trio.testing.MockClock,
) -> None:
    stopping = trio.Event()
    stopping.set()
    waited = await seconds_until_out_of_patience(Patience(10.0, stopping), Peer(1000, rate=10.0))
    assert waited == pytest.approx(STOPPING)


async def test_a_server_that_is_stopping_waits_two_seconds_in_all_and_not_for_each_write(
    autojump_clock: trio.testing.MockClock,
) -> None:
    stopping = trio.Event()
    stopping.set()
    patience = Patience(10.0, stopping)
    await patience.wait(Peer(15, rate=10.0).took_all, Peer(15, rate=10.0).left)
    waited = await seconds_until_out_of_patience(patience, Peer(1000, rate=10.0))
    assert waited == pytest.approx(STOPPING - 1.5, abs=0.1)


async def test_a_wait_under_way_is_cut_short_when_the_server_begins_to_stop(
    autojump_clock: trio.testing.MockClock,
) -> None:
    stopping = trio.Event()
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def stop() -> None:
            await trio.sleep(5.0)
            stopping.set()

        # Five of ten seconds are over without progress: that is more than a server that is stopping gives.
        assert 5.0 <= await seconds_until_out_of_patience(Patience(10.0, stopping), Peer(100)) <= 5.5


async def test_a_slow_peer_has_two_seconds_more_when_the_server_begins_to_stop(
    autojump_clock: trio.testing.MockClock,
) -> None:
    stopping = trio.Event()
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def stop() -> None:
            await trio.sleep(5.0)
            stopping.set()

        assert 7.0 <= await seconds_until_out_of_patience(Patience(10.0, stopping), Peer(1000, rate=10.0)) <= 7.5


async def test_a_cancelled_wait_is_cancelled(autojump_clock: trio.testing.MockClock) -> None:
    patience = Patience(10.0, trio.Event())
    with trio.move_on_after(3.0) as scope:
        await patience.wait(Peer(100).took_all, Peer(100).left)
    assert scope.cancelled_caught


# -- the stream, on real sockets -----------------------------------------------------------------------------


async def connected_pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    """Two ends of a TCP connection on this machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        left = await trio.open_tcp_stream(*listener.getsockname())
        accepted, _ = listener.accept()
    accepted.setblocking(False)
    return left, trio.SocketStream(trio.socket.from_stdlib_socket(accepted))


def with_deadline(stream: trio.SocketStream, timeout: float = WITHIN) -> DeadlineStream:
    return DeadlineStream(stream, timeout, trio.Event())


async def fill(stream: DeadlineStream) -> None:
    """Send until the kernel takes no more; it takes a while on a loaded machine to say so for good."""
    quiet = 0
    while quiet < 5:
        quiet = 0 if stream.send_now(b"x" * 65536) else quiet + 1
        await trio.sleep(0.01)


async def read_to_end(stream: trio.SocketStream) -> bytes:
    """The last bytes that the stream brings."""
    heard = b""
    while data := await stream.receive_some(1 << 20):
        heard = data
    return heard


async def test_it_is_a_stream_as_trio_understands_streams() -> None:
    async def make() -> tuple[DeadlineStream, DeadlineStream]:
        left, right = await connected_pair()
        return with_deadline(left), with_deadline(right)

    async def make_clogged() -> tuple[DeadlineStream, DeadlineStream]:
        left, right = await make()
        await fill(left)
        await fill(right)
        return left, right

    with fail_within(2 * WITHIN, "trio's stream checks"):
        await trio.testing.check_half_closeable_stream(make, make_clogged)


async def test_a_send_to_a_peer_that_does_not_read_fails_after_the_timeout_and_resets_it() -> None:
    left, right = await connected_pair()
    stream = with_deadline(left, timeout=0.5)
    async with stream, right:
        await fill(stream)
        began = trio.current_time()
        with fail_within(WITHIN, "the send fails"), pytest.raises(OutOfPatience):
            await stream.send_all(b"x" * 65536)
        assert trio.current_time() - began >= 0.5
        assert stream.stalled
        assert stream.socket.fileno() == -1
        with pytest.raises(trio.ClosedResourceError):
            stream.send_now(b"x")
        # An RST, and nothing of what the kernel still held.
        with pytest.raises(trio.BrokenResourceError), fail_within(WITHIN, "the peer learns of it"):
            await read_to_end(right)


async def test_what_the_kernel_holds_for_a_peer_is_bounded_and_known() -> None:
    left, right = await connected_pair()
    stream = with_deadline(left, timeout=0.5)
    async with stream, right:
        stream.bound_kernel()
        right.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await fill(stream)
        held = stream.unsent()
        assert held is not None
        assert 0 < held < 1 << 20
        await right.receive_some(1 << 20)
        await eventually(lambda: (stream.unsent() or 0) < held, "the kernel says that the peer has read")
    assert stream.unsent() is None


async def test_the_kernel_gives_up_by_itself_on_what_every_living_peer_has_room_for(
    mock_clock: trio.testing.MockClock,
) -> None:
    def kernel_timeout() -> object:
        return left.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)

    left, right = await connected_pair()
    stream = with_deadline(left, timeout=10.0)
    async with stream, right:
        stream.send_now(b"a keep-alive")
        assert kernel_timeout() == 10_000
        # A peer that reads slowly has its window closed for long, and the kernel takes that for its death.
        stream.send_now(b"x" * SMALL)
        assert kernel_timeout() == 0
        right.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        while stream.unsent():
            await right.receive_some(1 << 20)
        mock_clock.jump(3.0)
        stream.send_now(b"a keep-alive")
        assert kernel_timeout() == 10_000


@pytest.mark.parametrize("interval", [1.0, 30.0])
async def test_a_peer_that_has_vanished_is_found_by_a_later_write(
    interval: float, mock_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, right = await connected_pair()
    stream = with_deadline(left, timeout=10.0)
    async with stream, right:
        arrived = 1000
        monkeypatch.setattr(DeadlineStream, "unsent", lambda stream: stream._written - min(stream._written, arrived))

        def write_a_hundred_times() -> None:
            for _ in range(100):
                stream.send_now(b"x" * 10)
                mock_clock.jump(interval)

        write_a_hundred_times()
        vanished_at = trio.current_time()
        with pytest.raises(OutOfPatience):
            write_a_hundred_times()
        assert 10.0 <= trio.current_time() - vanished_at <= max(15.0 + interval, 2 * interval)
        assert stream.stalled


async def test_what_was_on_its_way_before_it_came_is_not_held_against_the_peer() -> None:
    ours, theirs = await connected_pair()
    async with ours, theirs:
        with suppress(BlockingIOError):
            while True:
                os.write(ours.socket.fileno(), b"x" * 65536)
        stream = with_deadline(ours)
        assert (stream.unsent() or 0) > 0
        assert stream.send_now(b"y") == 0, "no room, and no reason to give up"
        assert not stream.stalled


async def test_a_closed_descriptor_is_never_written_to_under_its_number() -> None:
    left, right = await connected_pair()
    stream = with_deadline(left)
    number = stream.socket.fileno()
    async with right:
        stream.abort()
        other, other_end = await connected_pair()
        async with other, other_end:
            numbers = {other.socket.fileno(), other_end.socket.fileno()}
            assert number in numbers, "the kernel gives the lowest free number"
            with pytest.raises(trio.ClosedResourceError):
                stream.send_now(b"for somebody else")
            for end in (other, other_end):
                with trio.move_on_after(0.05) as scope:
                    await end.receive_some()
                assert scope.cancelled_caught


async def test_a_send_that_is_cancelled_has_sent_nothing_more() -> None:
    left, right = await connected_pair()
    stream = with_deadline(left)
    async with stream, right:
        await fill(stream)
        with trio.move_on_after(0.05) as scope:
            await stream.send_some(b"never")
        assert scope.cancelled_caught
        left.socket.shutdown(socket.SHUT_WR)
        with fail_within(WITHIN, "the peer reads to the end"):
            assert (await read_to_end(right)).endswith(b"x")
