"""The soak in its short form, and its instruments: a check that could not fail would prove nothing.

`make soak` is the long one.
"""

from __future__ import annotations

import os
import random
import signal
from typing import Any

import pytest
import trio
from recorder import fake_server
from soak import Sample, soak, verdicts
from soak_crowd import Crowd, Hearing, Shared
from support import WITHIN, eventually, fail_within, unless_terminated

from sse_trio import sse


async def test_after_clients_have_come_and_gone_all_is_accounted_for_and_the_server_is_as_it_was() -> None:
    assert await soak(12, seed=6, clients=100, rate=100, life=4, history=300, warm=100)


async def test_sigterm_ends_a_run_after_what_it_started_is_gone() -> None:
    left: list[str] = []

    async def run() -> bool:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            await trio.sleep_forever()
        finally:
            left.append("what it started")

    with fail_within(WITHIN, "the run ends"):
        assert not await unless_terminated(run)
    assert left == ["what it started"]


async def test_a_run_that_ends_by_itself_says_what_it_says() -> None:
    async def run() -> bool:
        await trio.lowlevel.checkpoint()
        return True

    assert await unless_terminated(run)


def sample(number: int, **changes: float) -> Sample:
    usual: dict[str, Any] = {"rss": 100.0, "files": 120, "tasks": 220, "threads": 1, "cpu": 1.0}
    return Sample(seconds=number, clients=100, published=1, sent=1, **(usual | changes))


def test_what_wavers_is_flat_and_what_grows_is_not() -> None:
    wavering = [sample(n, rss=100 + n % 7, files=120 + n % 3, tasks=220 - n % 5) for n in range(100)]
    assert all(flat for _, _, _, flat in verdicts(wavering))
    for name in ("rss", "files", "tasks", "threads"):
        growing = [sample(n, **{name: getattr(sample(0), name) * (1 + n / 1000)}) for n in range(100)]
        assert [found for found, _, _, flat in verdicts(growing) if not flat] == [name]


def connected(id: str, **resumed: bool) -> bytes:
    return sse.connected("soak-1", "c", retry=1, id=id, **resumed)


def frame(number: int, epoch: str = "e") -> bytes:
    return Shared(number).frame(epoch, full=False)


# name: (what a client hears when five were published, what is wrong with it)
HEARD: dict[str, tuple[list[bytes], str]] = {
    "all": ([connected("e-0"), *map(frame, range(1, 6))], ""),
    "all from where it came": ([connected("e-3"), frame(4), sse.KEEP_ALIVE, frame(5)], ""),
    "all and a cursor": ([connected("e-0"), *map(frame, range(1, 6)), sse.cursor("e-5")], ""),
    "one less": ([connected("e-0"), frame(1), frame(3), frame(4), frame(5)], "hears b'event: discovery"),
    "one twice": ([connected("e-0"), frame(1), frame(1)], "hears b'event: discovery"),
    "two the wrong way round": ([connected("e-0"), frame(2), frame(1)], "hears b'event: discovery"),
    "one that was not published": ([connected("e-5"), frame(6)], "hears b'event: discovery"),
    "another byte": ([connected("e-0"), frame(1).replace(b"number", b"numbes")], "hears b'event: discovery"),
    "a cursor that skips": ([connected("e-0"), frame(1), sse.cursor("e-3")], "a cursor that skips something"),
    "a cursor beyond": ([connected("e-0"), sse.cursor("e-6")], "is told the id 'e-6'"),
    "another epoch": ([connected("f-0")], "is told the id 'f-0'"),
    "a gap": ([connected("e-0"), sse.gap("overflow", 1, "e-1")], "hears b'event: gap"),
    "a goodbye": ([connected("e-0"), sse.goodbye("shutdown", 1)], "hears b'retry: 1"),
    "half a frame": ([connected("e-0"), frame(1)[:-1]], "hears half a frame"),
    "the end": ([connected("e-0"), frame(1), b""], "is cut off: the last chunk"),
    "nothing first": ([frame(1)], "hears b'event: discovery"),
}


@pytest.mark.parametrize("name", HEARD)
async def test_a_client_notices_whatever_differs_from_what_was_published(name: str) -> None:
    frames, wrong = HEARD[name]

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            request = b""
            while b"\r\n\r\n" not in request:
                request += await stream.receive_some()
            chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in frames)
            await stream.send_all(b"HTTP/1.1 200 \r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)
            await stream.receive_some()

    async with fake_server(serve) as url, trio.open_nursery() as nursery:
        crowd = Crowd(int(url.rpartition(":")[2]), "e", 1, 1000, random.Random(1))
        crowd.hearings = [Hearing(100, "", lambda _: True)]
        for _ in range(5):
            crowd.publish()
        nursery.start_soon(crowd.run)
        await eventually(lambda: crowd.faults or (crowd.here and crowd.unfinished == 0), "it has heard all, or a fault")
        assert wrong in "".join(crowd.faults)
        assert bool(crowd.faults) == bool(wrong)
        nursery.cancel_scope.cancel()
