"""Writing to many sockets at once: the same as writing to each, shown on real ones."""

from __future__ import annotations

import errno
import os
import platform
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sse_trio import bulk_write
from sse_trio.bulk_write import MOST, BulkWrite

LARGE = b"x" * (1 << 20)
"""More than a socket has room for."""

SUBMIT = bulk_write._Queue.submit

Pair = tuple[socket.socket, socket.socket]
MakePair = Callable[[], Pair]


@pytest.fixture
def pair() -> Iterator[MakePair]:
    """Makes connections: our end, which does not block, and the peer's."""
    with ExitStack() as stack, socket.create_server(("127.0.0.1", 0)) as listener:

        def make() -> Pair:
            theirs = stack.enter_context(socket.create_connection(listener.getsockname(), timeout=10))
            ours = stack.enter_context(listener.accept()[0])
            ours.setblocking(False)
            return ours, theirs

        yield make


@pytest.fixture(params=["together", "one by one"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to the same result: the kernel takes the list, or refuses each at the door."""
    assert BulkWrite.works()
    if request.param == "one by one":
        monkeypatch.setattr(bulk_write._Queue, "submit", lambda queue, writes, count: 0)


def writing_to(*sockets: socket.socket) -> BulkWrite:
    bulk = BulkWrite()
    for one in sockets:
        bulk.add(one.fileno())
    return bulk


def fill(ours: socket.socket) -> int:
    """Write until there is no room; how much that was."""
    written = 0
    try:
        while True:
            written += ours.send(LARGE)
    except BlockingIOError:
        return written


def test_all_get_the_same_bytes(pair: MakePair) -> None:
    pairs = [pair() for _ in range(MOST)]
    bulk = writing_to(*(ours for ours, _ in pairs))
    assert bulk.write(b"first,") == []
    assert bulk.write(b"second") == []
    assert {theirs.recv(100) for _, theirs in pairs} == {b"first,second"}


def test_who_has_no_room_takes_nothing_and_who_has_little_takes_a_part(pair: MakePair) -> None:
    (full, _), (empty, reader), (cut, slow) = pair(), pair(), pair()
    fill(full)
    bulk = writing_to(full, empty, cut)
    short = dict(bulk.write(LARGE * 8))
    assert short[0] == -errno.EAGAIN
    assert 0 < short[1] < len(LARGE * 8)
    assert 0 < short[2] < len(LARGE * 8)
    for index, peer in ((1, reader), (2, slow)):
        left = short[index]
        while left:
            left -= len(peer.recv(left))


def test_a_peer_that_is_gone_is_told_from_the_others(pair: MakePair) -> None:
    (first, reader), (gone, left), (last, other) = pair(), pair(), pair()
    left.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    left.close()
    bulk = writing_to(first, gone, last)
    assert bulk.write(b"hello") in ([(1, -errno.ECONNRESET)], [(1, -errno.EPIPE)])
    assert bulk.write(b" again") == [(1, -errno.EPIPE)]
    assert (reader.recv(100), other.recv(100)) == (b"hello again", b"hello again")


def test_a_descriptor_that_is_not_open_keeps_nobody_from_being_written_to(pair: MakePair) -> None:
    (first, reader), (closed, _), (last, other) = pair(), pair(), pair()
    bulk = writing_to(closed, first, closed, last, closed)
    closed.close()
    assert bulk.write(b"hello") == [(0, -errno.EBADF), (2, -errno.EBADF), (4, -errno.EBADF)]
    assert (reader.recv(100), other.recv(100)) == (b"hello", b"hello")


def test_who_was_removed_is_not_written_to_and_the_last_one_has_its_place(pair: MakePair) -> None:
    pairs = [pair() for _ in range(3)]
    bulk = writing_to(*(ours for ours, _ in pairs))
    bulk.remove(0)
    fill(pairs[2][0])
    assert bulk.write(b"hello") == [(0, -errno.EAGAIN)]
    assert pairs[1][1].recv(100) == b"hello"
    bulk.remove(1)
    bulk.remove(0)
    assert len(bulk) == 0
    pairs[0][1].setblocking(False)
    with pytest.raises(BlockingIOError):
        pairs[0][1].recv(100)


@given(st.lists(st.integers(min_value=0, max_value=9), max_size=30))
def test_however_it_is_changed_it_is_a_list_whose_last_one_moves(choices: list[int]) -> None:
    bulk, model, opened = BulkWrite(), list[int](), list[int]()
    for choice in choices:
        if model and choice < 5:
            index = choice % len(model)
            bulk.remove(index)
            model[index] = model[-1]
            model.pop()
        else:
            opened.append(os.open("/dev/null", os.O_RDONLY))  # a write to it fails, and says which it is
            bulk.add(opened[-1])
            model.append(opened[-1])
    try:
        assert len(bulk) == len(model)
        if model:
            assert [index for index, _ in bulk.write(b"x")] == list(range(len(model)))
            assert [word >> 32 for word in bulk._writes[2::8]] == model
    finally:
        for descriptor in opened:
            os.close(descriptor)


def test_more_than_fit_are_refused(pair: MakePair) -> None:
    ours, _ = pair()
    bulk = writing_to(*([ours] * MOST))
    with pytest.raises(ValueError, match="128"):
        bulk.add(ours.fileno())


FORKS = """
import os, socket
from sse_trio.bulk_write import BulkWrite, _queue
ours, theirs = socket.socketpair()
ours.setblocking(False)
bulk = BulkWrite()
assert bulk.works()
bulk.add(ours.fileno())
assert bulk.write(b"the parent, ") == []
queue = _queue()
if os.fork() == 0:
    assert bulk.works()
    assert _queue() is not queue
    assert bulk.write(b"the child") == []
    os._exit(0)
assert os.wait()[1] == 0
print(theirs.recv(100).decode())
"""


def test_a_process_that_forks_has_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, check=True)
    assert done.stdout == "the parent, the child\n"


@pytest.mark.parametrize(
    "lacking", ["another system", "another machine", "no io_setup", "no io_submit", "no io_getevents"]
)
def test_where_it_is_not_to_be_had_it_is_a_loop(lacking: str, monkeypatch: pytest.MonkeyPatch, pair: MakePair) -> None:
    monkeypatch.setattr(bulk_write, "_own", threading.local())
    calls = list(bulk_write._CALLS[platform.machine()])
    if lacking == "another system":
        monkeypatch.setattr("sys.platform", "darwin")
    elif lacking == "another machine":
        monkeypatch.setattr(platform, "machine", lambda: "vax")
    else:
        calls[["no io_setup", "no io_submit", "no io_getevents"].index(lacking)] = (
            1 << 20
        )  # as where it is filtered out
        monkeypatch.setitem(bulk_write._CALLS, platform.machine(), tuple(calls))
        monkeypatch.setattr(bulk_write._Queue, "submit", SUBMIT)
    assert not BulkWrite.works()
    (ours, theirs), (other, reader) = pair(), pair()
    assert writing_to(ours, other).write(b"hello") == []
    assert (theirs.recv(100), reader.recv(100)) == (b"hello", b"hello")


def test_each_thread_has_its_own(pair: MakePair, request: pytest.FixtureRequest) -> None:
    all_are_here = threading.Barrier(4)

    def write(bulk: BulkWrite) -> object:
        all_are_here.wait(10)
        for _ in range(1000):
            assert bulk.write(b"hello") == []
        return bulk_write._queue()

    pairs = [pair() for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        queues = list(threads.map(write, [writing_to(ours) for ours, _ in pairs]))
    assert len(set(queues)) == (4 if request.node.callspec.params["way"] == "together" else 1)
    for _, theirs in pairs:
        left = 5000
        while left:
            left -= len(theirs.recv(left))
