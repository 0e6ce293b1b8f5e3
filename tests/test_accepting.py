"""A crowd that comes at once: taken out of the kernel's queue, and begun one by one. On real sockets."""

from __future__ import annotations

import errno
import os
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from serving import Gate, certificate, serving
from support import fail_within

from sse_trio.accepting import AT_ONCE, EagerListener
from sse_trio.limits import FD_RESERVE

WITHIN = 5.0  # seconds


class Door:
    """A listener, and what the kernel holds for it."""

    def __init__(self, listening: socket.socket, peers: ExitStack) -> None:
        self.listener = EagerListener(trio.socket.from_stdlib_socket(listening))
        self._address = listening.getsockname()
        self._kernels = socket.fromfd(listening.fileno(), listening.family, listening.type)
        self._peers = peers
        peers.callback(self._kernels.close)

    def knock(self, count: int) -> list[socket.socket]:
        """So many peers, connected; nobody has accepted them yet."""
        return [
            self._peers.enter_context(socket.create_connection(self._address, timeout=WITHIN)) for _ in range(count)
        ]

    def left_in_the_kernel(self) -> int:
        """How many still wait there. They are accepted by this, and closed."""
        count = 0
        while True:
            try:
                self._kernels.accept()[0].close()
            except BlockingIOError:
                return count
            count += 1

    async def next(self) -> object:
        """The address of the next peer that is handed out."""
        with fail_within(WITHIN, "a connection"):
            async with await self.listener.accept() as stream:
                peer: object = stream.socket.getpeername()
                return peer


class Counter(trio.abc.Instrument):
    """Counts turns of the event loop, and the connections that trio's `serve_listeners` has begun."""

    def __init__(self) -> None:
        self.turns = 0
        self.begun = 0

    def after_io_wait(self, timeout: float) -> None:
        self.turns += 1

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        self.begun += "_run_handler" in task.name


@pytest.fixture
async def counter() -> AsyncIterator[Counter]:
    one = Counter()
    trio.lowlevel.add_instrument(one)
    yield one
    trio.lowlevel.remove_instrument(one)


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    with ExitStack() as peers:
        listening = socket.create_server(("127.0.0.1", 0), backlog=1000)
        listening.setblocking(False)
        one = Door(listening, peers)
        async with one.listener:
            yield one


def names(peers: list[socket.socket]) -> list[object]:
    return [peer.getsockname() for peer in peers]


@contextmanager
def more_files(count: int) -> Iterator[None]:
    """This process may open so many beyond those that it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_whoever_knocks_is_handed_out_in_order_each_once(door: Door) -> None:
    peers = door.knock(3 * AT_ONCE + 1)

    assert [await door.next() for _ in peers] == names(peers)
    late = door.knock(1)
    assert [await door.next()] == names(late), "and after the crowd it is as before"


async def test_with_the_first_of_a_crowd_the_others_have_left_the_kernels_queue(door: Door) -> None:
    door.knock(1 + AT_ONCE)
    await door.next()
    assert door.left_in_the_kernel() == 0


async def test_one_turn_of_the_loop_takes_a_bounded_number(door: Door) -> None:
    door.knock(1 + AT_ONCE + 5)
    await door.next()
    assert door.left_in_the_kernel() == 5


async def test_one_is_handed_out_in_a_turn_of_the_loop(door: Door, counter: Counter) -> None:
    """So ten thousand do not begin together, while others wait for the end of that turn."""
    peers = door.knock(10)
    await door.next()
    for handed_out in range(1, len(peers)):
        before = counter.turns
        (await door.listener.accept()).socket.close()
        assert counter.turns == before + 1, handed_out


async def test_a_cancelled_accept_loses_nobody(door: Door) -> None:
    peers = door.knock(3)
    for _ in range(2):
        with trio.CancelScope() as scope:
            scope.cancel()
            await door.listener.accept()
        assert scope.cancelled_caught
    assert await door.next() == names(peers)[0], "cancelled before any was taken out"
    with trio.CancelScope() as scope:
        scope.cancel()
        await door.listener.accept()
    assert scope.cancelled_caught
    assert [await door.next() for _ in peers[1:]] == names(peers)[1:], "and after"


async def test_where_no_file_is_left_those_that_were_taken_come_first_and_then_the_error(door: Door) -> None:
    peers = door.knock(AT_ONCE + 3)
    assert await door.next() == names(peers)[0]
    with more_files(0):
        handed_out = [await door.listener.accept() for _ in range(AT_ONCE)]
        with pytest.raises(OSError, match="Too many open files") as caught:
            await door.listener.accept()
    assert caught.value.errno == errno.EMFILE, "which trio's serve_listeners says, and waits"
    assert [stream.socket.getpeername() for stream in handed_out] == names(peers)[1 : AT_ONCE + 1]
    for stream in handed_out:
        stream.socket.close()
    assert [await door.next() for _ in range(2)] == names(peers)[AT_ONCE + 1 :], "who waited in the kernel is not lost"


async def test_those_who_wait_leave_the_last_files_to_who_is_served(door: Door) -> None:
    peers = door.knock(20)
    with more_files(FD_RESERVE + 5):
        handed_out = [await door.next()]
        assert door.left_in_the_kernel() == 14, "five wait here"
        handed_out += [await door.next() for _ in range(5)]
    assert handed_out == names(peers)[:6]


async def test_closing_it_closes_those_that_were_not_handed_out(door: Door) -> None:
    files = len(os.listdir("/proc/self/fd"))
    peers = door.knock(4)
    await door.next()
    await door.listener.aclose()
    for peer in peers[1:]:
        assert peer.recv(1) == b"", "it has heard the end"
        peer.close()
    with pytest.raises(trio.ClosedResourceError):
        await door.listener.accept()
    peers[0].close()
    assert len(os.listdir("/proc/self/fd")) == files - 2, "the listening socket, and our copy of it"


async def test_closing_wakes_who_accepts(door: Door) -> None:
    async with trio.open_nursery() as nursery:

        async def accept() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await door.listener.accept()

        nursery.start_soon(accept)
        await trio.testing.wait_all_tasks_blocked()
        await door.listener.aclose()


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
async def test_hypercorn_accepts_that_way(tls: bool, tmp_path: Path, counter: Counter) -> None:
    """Whichever command has started it: it is Hypercorn's own worker that takes this listener."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        bind = [f"fd://{os.dup(listening.fileno())}"]
        async with serving(Gate().stand, tls=certificate(tmp_path) if tls else False, bind=bind):
            with ExitStack() as peers:
                for _ in range(20):
                    peers.enter_context(socket.create_connection(listening.getsockname(), timeout=WITHIN))
                with fail_within(WITHIN, "the first begins"):
                    while counter.begun == 0:
                        await trio.lowlevel.checkpoint()
                assert counter.begun <= 2, "one in a turn"
                with pytest.raises(BlockingIOError):
                    listening.accept()
                with fail_within(WITHIN, "all begin"):
                    while counter.begun < 20:
                        await trio.lowlevel.checkpoint()
