"""Short forms of the scenarios that `python -m benchmarks.recovery` measures: whatever the machine, the books balance.

Real servers, a real nats-server, and a process of clients who compare every id with the one that must follow.
"""

from __future__ import annotations

from collections.abc import Awaitable
from pathlib import Path

import pytest
from support import fail_within

from benchmarks import crowd, recovery

WITHIN = 120.0
"""Seconds for one scenario on a busy machine; a few are enough."""


async def balanced(scenario: Awaitable[recovery.Outcome]) -> None:
    with fail_within(WITHIN, "the scenario is over"):
        outcome = await scenario
    assert outcome.faults == [], outcome
    assert outcome.figures


async def test_after_kill_9_of_the_only_server_every_client_has_every_event_once(tmp_path: Path) -> None:
    # More clients than one slice of a round serves: some come back in the middle of a round.
    await balanced(recovery.killed(tmp_path, clients=220, rate=200, seconds=0.5))


async def test_a_client_from_far_back_gets_everything_while_more_arrives(tmp_path: Path) -> None:
    await balanced(recovery.far_back(tmp_path, back=15_000, rate=300, live=5, seconds=0.5))


async def test_those_who_come_back_together_share_the_reading(tmp_path: Path) -> None:
    await balanced(recovery.together(tmp_path, clients=50, back=2000))


async def test_slow_and_stalled_readers_miss_nothing(tmp_path: Path) -> None:
    await balanced(recovery.slow(tmp_path, rate=1000, seconds=3, every=0.2, patience=2, clients=2))


async def test_a_client_that_hears_hardly_anything_has_a_fresh_cursor(tmp_path: Path) -> None:
    await balanced(recovery.rare(tmp_path, events=6000, one_in=3000, history=500, rate=2000))


HELLO = b"retry: 1000\nevent: connected\ndata: {}\nid: e-x-0\n\n"


def event(sequence: int, number: int | None = None) -> bytes:
    uri = b"discovery://agents/bench-%d-1/discoveries/x" % (sequence if number is None else number)
    return b'event: discovery\ndata: {"uri":"%b"}\nid: e-x-%d\n\n' % (uri, sequence)


@pytest.mark.parametrize(
    ("body", "delivered", "wrong"),
    [
        (event(1) + event(2) + event(3), 3, {}),
        (event(1) + event(2) + event(2) + event(3), 4, {"disordered": 1}),
        (event(1) + event(3), 2, {"lost": 1}),
        (event(1) + event(3) + event(2), 3, {"lost": 1, "disordered": 1}),
        (event(1) + event(2, number=7), 2, {"foreign": 1}),
        (event(1) + event(2, number=7) + event(4), 3, {"foreign": 1, "lost": 1}),
        (event(1) + b"event: gap\ndata: {}\nid: e-x-5\n\n" + event(6), 2, {"gaps": 1}),
        (event(1) + b"event: cursor\ndata: {}\nid: e-x-5\n\n" + event(6), 2, {"foreign": 1, "cursors": 1}),
    ],
)
@pytest.mark.parametrize("step", [1, 7, 1000])
def test_the_books_of_the_crowd_tell_what_is_wrong(
    body: bytes, delivered: int, wrong: dict[str, int], step: int
) -> None:
    heard = HELLO + b"\r\n: keep-alive\n\r\n" + body + b"event: disc"
    with crowd.Crowd(crowd.arguments(["--port", "1"])) as clients:
        (reader,) = clients.readers
        for at in range(0, len(heard), step):
            clients.heard(reader, heard[at : at + step])
    books = reader.books
    assert books.delivered == delivered
    assert {
        name: value
        for name in ("lost", "disordered", "foreign", "gaps", "cursors")
        if (value := getattr(books, name)) != 0
    } == wrong
