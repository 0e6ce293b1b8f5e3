"""A crowd that comes at once: taken out of the kernel's queue, and begun one by one. On real sockets.

Most of it is shown with a few connections, of which all are taken out in a turn (PART = 1), and not a 64th.
"""

from __future__ import annotations

import errno
import os
import resource
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from serving import Gate, certificate, serving
from support import fail_within

from sse_trio import accepting
from sse_trio.accepting import AT_ONCE, PART, EagerListener
from sse_trio.limits import FD_RESERVE

WITHIN = 5.0  # seconds

SetPart = Callable[[int], None]


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

    def waiting(self) -> int:
        """How many have been taken out of the kernel, and not been handed out."""
        return len(self.listener._waiting)

    async def accept(self) -> trio.SocketStream:
        with fail_within(WITHIN, "a connection"):
            return await self.listener.accept()

    async def accept_closed(self) -> None:
        with pytest.raises(trio.ClosedResourceError):
            await self.accept()

    async def next(self) -> object:
        """The address of the peer that is handed out next; its connection is closed."""
        async with await self.accept() as stream:
            peer: object = stream.socket.getpeername()
            return peer


async def cancelled(door: Door) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await door.listener.accept()
    assert scope.cancelled_caught


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
def part(monkeypatch: pytest.MonkeyPatch) -> SetPart:
    """Sets PART, which is 1 at first."""

    def set_part(part: int) -> None:
        monkeypatch.setattr(accepting, "PART", part)

    set_part(1)
    return set_part


@pytest.fixture
async def door(part: SetPart) -> AsyncIterator[Door]:
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


async def test_everyone_is_handed_out_once(door: Door, part: SetPart) -> None:
    part(PART)
    peers = door.knock(3 * PART)
    assert {await door.next() for _ in peers} == set(names(peers))
    late = door.knock(1)
    assert [await door.next()] == names(late), "and after the crowd it is as before"


async def test_in_a_crowd_the_kernels_queue_and_those_that_wait_go_in_turn(door: Door, part: SetPart) -> None:
    """Who has just come, to ask for `/health` perhaps, is not behind all of a crowd; nor does the crowd stand still."""
    first, *crowd = names(door.knock(5))
    assert await door.next() == first
    part(PART)
    late = names(door.knock(3))
    assert [await door.next() for _ in range(7)] == [late[0], crowd[0], late[1], crowd[1], late[2], crowd[2], crowd[3]]


async def test_of_a_long_queue_a_part_is_taken_out_in_each_turn(door: Door, part: SetPart) -> None:
    part(PART)
    door.knock(1 + 2 * PART + 5)
    await door.next()
    assert door.waiting() == 2
    await door.next()  # from the kernel
    assert door.waiting() == 2 + 2
    await door.next()
    assert door.waiting() == 2 + 2 - 1 + 2
    assert door.left_in_the_kernel() == 2 * PART - 2, "less than two parts, so the next would be one"


async def test_a_short_queue_is_left_to_the_worker_that_comes_first(door: Door, part: SetPart) -> None:
    part(PART)
    peers = door.knock(PART)
    for _ in peers:
        await door.next()
        assert door.waiting() == 0


async def test_one_turn_of_the_loop_takes_a_bounded_number(door: Door) -> None:
    door.knock(1 + AT_ONCE + 5)
    await door.next()
    assert door.left_in_the_kernel() == 5


async def test_so_many_wait_at_most(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accepting, "MOST_WAITING", 7)
    peers = door.knock(20)
    handed_out = [await door.next()]
    assert len(peers) - len(handed_out) - door.left_in_the_kernel() == 7


async def test_one_is_handed_out_in_a_turn_of_the_loop(door: Door, counter: Counter) -> None:
    """So ten thousand do not begin together, while others wait for the end of that turn."""
    peers = door.knock(10)
    await door.next()
    for handed_out in range(1, len(peers)):
        before = counter.turns
        (await door.accept()).socket.close()
        assert counter.turns == before + 1, handed_out


async def test_a_cancelled_accept_loses_nobody(door: Door) -> None:
    peers = door.knock(3)
    await cancelled(door)
    assert await door.next() == names(peers)[0], "cancelled before any was taken out"
    await cancelled(door)
    assert [await door.next() for _ in peers[1:]] == names(peers)[1:3], "and after"


async def test_where_no_file_is_left_those_that_were_taken_come_first_and_then_the_error(door: Door) -> None:
    peers = door.knock(AT_ONCE + 3)
    await door.next()
    with more_files(0):
        handed_out = [await door.accept() for _ in range(AT_ONCE)]
        with pytest.raises(OSError, match="Too many open files") as caught:
            await door.accept()
    assert caught.value.errno == errno.EMFILE, "which trio's serve_listeners says, and waits"
    for stream in handed_out:
        stream.socket.close()
    assert [await door.next() for _ in range(2)] == names(peers)[AT_ONCE + 1 :], "who waited in the kernel is not lost"


async def test_those_who_wait_leave_the_last_files_to_who_is_served(door: Door) -> None:
    """Also when each that is handed out keeps its file, and the kernel has more."""
    door.knock(60)
    served: list[trio.SocketStream] = []
    with more_files(FD_RESERVE + 20):
        while door.waiting() or not served:
            served.append(await door.accept())
            assert len(served) + door.waiting() <= 21, "20, and the one that shows that they are few"
        served.append(await door.accept())
        assert door.waiting() == 1, "from then on one, as without all this"
    for stream in served:
        stream.socket.close()


async def test_closing_it_closes_those_that_wait(door: Door) -> None:
    _, *others = door.knock(4)
    await door.next()
    await door.listener.aclose()
    for peer in others:
        assert peer.recv(1) == b"", "it has heard the end"
    await door.accept_closed()


async def test_closing_it_ends_an_accept(door: Door) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(door.accept_closed)
        await trio.testing.wait_all_tasks_blocked()
        await door.listener.aclose()


@pytest.mark.parametrize("_", range(10))
async def test_closing_it_ends_an_accept_that_has_a_crowd_before_it(door: Door, _: int) -> None:
    """The two begin in one turn of the loop, in either order: an accept is in its turn then, or has not begun."""
    door.knock(3)
    await door.next()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(door.accept_closed)
        nursery.start_soon(door.listener.aclose)


async def test_it_may_listen_on_a_unix_socket(tmp_path: Path) -> None:
    with ExitStack() as opened:
        listening = opened.enter_context(socket.socket(socket.AF_UNIX))
        listening.bind(str(tmp_path / "socket"))
        listening.listen(10)
        async with EagerListener(trio.socket.from_stdlib_socket(listening)) as listener:
            for _ in range(3):
                opened.enter_context(socket.socket(socket.AF_UNIX)).connect(str(tmp_path / "socket"))
            for _ in range(3):
                with fail_within(WITHIN, "a connection"):
                    (await listener.accept()).socket.close()


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
@pytest.mark.usefixtures("part")
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
