"""The garbage collector keeps out of the way of ten thousand streams, and still comes round to what they leave."""

from __future__ import annotations

import gc
import resource
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from sse_trio import collector as collector_module
from sse_trio.broadcaster import Broadcaster
from sse_trio.collector import DEPARTURES, TRIM_INTERVAL, Collector
from sse_trio.settings import Settings


class Cycle:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    gc.unfreeze()


async def test_it_gives_the_collector_back_as_it_was(autojump_clock: MockClock) -> None:
    before = gc.get_threshold()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Collector(Broadcaster(Settings())).run)
        await wait_all_tasks_blocked()
        assert gc.get_threshold() != before
        assert gc.get_freeze_count() > 0
        nursery.cancel_scope.cancel()
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0


async def test_young_cycles_are_freed_at_each_look() -> None:
    collector = Collector(Broadcaster(Settings()))
    collector.collect()
    left = weakref.ref(Cycle())
    collector.collect()
    assert left() is None


async def test_what_died_out_of_sight_is_freed_after_enough_departures() -> None:
    broadcaster = Broadcaster(Settings())
    collector = Collector(broadcaster)
    cycle = Cycle()
    collector.collect()
    left = weakref.ref(cycle)
    del cycle
    collector.collect()
    assert left() is not None
    broadcaster.connects += DEPARTURES
    collector.collect()
    assert left() is None
    assert collector.full == 1
    collector.collect()
    assert collector.full == 1


def resident() -> int:
    """Bytes of memory that this process occupies."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def test_what_is_free_between_what_is_used_goes_back_to_the_system_when_streams_have_ended(
    mock_clock: MockClock,
) -> None:
    broadcaster = Broadcaster(Settings())
    collector = Collector(broadcaster)
    for _ in range(2):
        buffers = [bytes(60_000) for _ in range(2000)]
        used = buffers[::20]
        del buffers
        before = resident()
        collector.collect()
        assert resident() > before - 10_000_000, "nobody has left"
        broadcaster.connects += 1
        collector.collect()
        assert resident() < before - 50_000_000
        assert len(used) == 100
        mock_clock.jump(TRIM_INTERVAL)


async def test_free_memory_is_given_back_once_in_a_while(
    mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    trimmed: list[int] = []
    monkeypatch.setattr(collector_module, "trim", trimmed.append)
    broadcaster = Broadcaster(Settings())
    collector = Collector(broadcaster)
    for _ in range(3):
        broadcaster.connects += 1
        collector.collect()
    assert len(trimmed) == 1
    mock_clock.jump(TRIM_INTERVAL)
    for _ in range(3):
        collector.collect()
    assert len(trimmed) == 2
    mock_clock.jump(TRIM_INTERVAL)
    collector.collect()
    assert len(trimmed) == 2, "nobody has left since"
