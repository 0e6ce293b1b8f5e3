"""The teardown harness itself: the right hub passes, and each wrong one is rejected for its own mistake.

A harness that cannot catch a leak proves nothing, so most of this file is mutants: `Hub` done wrong in one way each.
They are small on purpose: read the mistake in the class, and what the harness says about it in the test.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from types import ModuleType

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from sse_trio import testing
from sse_trio.testing import (
    SchedulerMoved,
    TeardownError,
    act_at_every_step,
    assert_nothing_left,
    cancel_at_every_step,
    cancel_part_at_every_step,
    channel_is_closed,
    delay_at_every_step,
    living_tasks,
    raise_at_every_step,
)

KEEP_ALIVE = 30.0
Receive = trio.MemoryReceiveChannel[int]


class Hub:
    """The right one: who listens is a set, and membership is a synchronous `with` block."""

    def __init__(self) -> None:
        self.clients: set[trio.MemorySendChannel[int]] = set()
        self.opened: list[trio.MemoryReceiveChannel[int]] = []
        self.heard: list[int] = []

    def open_channel(self) -> tuple[trio.MemorySendChannel[int], Receive]:
        send, receive = trio.open_memory_channel[int](8)
        self.opened.append(receive)
        return send, receive

    @contextmanager
    def subscription(self) -> Iterator[Receive]:
        send, receive = self.open_channel()
        with send, receive:
            self.clients.add(send)
            try:
                yield receive
            finally:
                self.clients.discard(send)

    @asynccontextmanager
    async def subscribe(self) -> AsyncIterator[Receive]:
        # The mutants need somewhere to await; here there is nothing to wait for.
        with self.subscription() as receive:
            yield receive

    async def next_frame(self, receive: Receive) -> int | None:
        """The next frame; None when a keep-alive is due instead."""
        with trio.move_on_after(KEEP_ALIVE) as scope:
            frame = await receive.receive()
        return None if scope.cancelled_caught else frame

    async def serve(self, frames: int) -> None:
        """One client, from its arrival until it has heard so many frames."""
        async with self.subscribe() as receive:
            while len(self.heard) < frames:
                frame = await self.next_frame(receive)
                if frame is not None:
                    self.heard.append(frame)

    async def publish(self, frame: int) -> None:
        for client in tuple(self.clients):
            with suppress(trio.WouldBlock):
                client.send_nowait(frame)

    def check(self) -> None:
        assert not self.clients, f"{len(self.clients)} clients are still registered"
        assert all(channel_is_closed(one.statistics()) for one in self.opened), "a channel is still open"
        # Each run starts with a hub like new.
        self.opened.clear()
        self.heard.clear()


class SlowGoodbye(Hub):
    """An async `finally` without a shield: once cancelled, its first await raises and the rest never happens."""

    @asynccontextmanager
    async def subscribe(self) -> AsyncIterator[Receive]:
        send, receive = self.open_channel()
        with send, receive:
            self.clients.add(send)
            try:
                yield receive
            finally:
                await trio.lowlevel.checkpoint()  # noqa: ASYNC102
                self.clients.discard(send)


class RegisteredTooEarly(Hub):
    """An await between registering and the `try`: cancelled there, nobody unregisters."""

    @asynccontextmanager
    async def subscribe(self) -> AsyncIterator[Receive]:
        send, receive = self.open_channel()
        with send, receive:
            self.clients.add(send)
            await trio.lowlevel.checkpoint()
            try:
                yield receive
            finally:
                self.clients.discard(send)


class NoFinally(Hub):
    """Unregisters on the way that the author thought of."""

    @asynccontextmanager
    async def subscribe(self) -> AsyncIterator[Receive]:
        send, receive = self.open_channel()
        with send, receive:
            self.clients.add(send)
            yield receive
            self.clients.discard(send)


class RegisteredOutside(Hub):
    """Registers in the handler, unregisters in the generator that makes the body: which may never be started."""

    async def serve(self, frames: int) -> None:
        send, receive = self.open_channel()
        self.clients.add(send)
        await trio.lowlevel.checkpoint()  # the response's head is written here
        try:
            with send, receive:
                while len(self.heard) < frames:
                    self.heard.append(await receive.receive())
        finally:
            self.clients.discard(send)


class OnlyExceptException(Hub):
    """Cleans up for errors only: `Cancelled` is a BaseException and passes by."""

    @asynccontextmanager
    async def subscribe(self) -> AsyncIterator[Receive]:
        send, receive = self.open_channel()
        with send, receive:
            self.clients.add(send)
            try:
                yield receive
            except Exception:
                self.clients.discard(send)
                raise
            else:
                self.clients.discard(send)


class ForgottenChannel(Hub):
    """Unregisters, and lets the channel go without closing it. Trio does not say a word."""

    @asynccontextmanager
    async def subscribe(self) -> AsyncIterator[Receive]:
        send, receive = self.open_channel()
        self.clients.add(send)
        try:
            yield receive
        finally:
            self.clients.discard(send)


class Sweeper(Hub):
    """Nobody unregisters; a detached task does it an hour later, as in the original broadcaster."""

    @asynccontextmanager
    async def subscribe(self) -> AsyncIterator[Receive]:
        send, receive = self.open_channel()

        async def sweep_later() -> None:
            await trio.sleep(3600)
            self.clients.discard(send)

        with send, receive:
            self.clients.add(send)
            trio.lowlevel.spawn_system_task(sweep_later)
            yield receive


class BeltAndBraces(Hub):
    """Unregisters properly, and starts a sweeper besides, "to be safe": one task per client, for an hour."""

    @asynccontextmanager
    async def subscribe(self) -> AsyncIterator[Receive]:
        with self.subscription() as receive:
            trio.lowlevel.spawn_system_task(trio.sleep, 3600, name="sweeper")
            yield receive


class Unbounded(Hub):
    """A shield without a deadline around a wait for the peer: whoever does not answer is waited for for ever."""

    async def next_frame(self, receive: Receive) -> int | None:
        with trio.CancelScope(shield=True):
            frame = await receive.receive()
        return frame


class CancelCalled(Hub):
    """Asks `cancel_called` where it means `cancelled_caught`: drops the frame that came just before the deadline."""

    async def next_frame(self, receive: Receive) -> int | None:
        with trio.move_on_after(KEEP_ALIVE) as scope:
            frame = await receive.receive()
        return None if scope.cancel_called else frame


class AbandonedGenerator(Hub):
    """Leaves a `finally` in an async generator to the garbage collector."""

    async def frames(self) -> AsyncIterator[int]:
        with self.subscription() as receive:
            while True:
                yield await receive.receive()  # noqa: ASYNC119

    async def serve(self, frames: int) -> None:
        async for frame in self.frames():
            self.heard.append(frame)
            if len(self.heard) == frames:
                break


class GoodbyeFirst(Hub):
    """Closes the client's end, says goodbye in a bounded shield, then unregisters: publishing meanwhile fails."""

    @asynccontextmanager
    async def subscribe(self) -> AsyncIterator[Receive]:
        send, receive = self.open_channel()
        self.clients.add(send)
        try:
            with receive:
                yield receive
        finally:
            with trio.move_on_after(5, shield=True):
                await trio.sleep(1)  # the goodbye is written here
            self.clients.discard(send)
            send.close()


class OnlyCancelled(Hub):
    """Cleans up for cancellation and for the good end, not for errors."""

    @asynccontextmanager
    async def subscribe(self) -> AsyncIterator[Receive]:
        send, receive = self.open_channel()
        with send, receive:
            self.clients.add(send)
            try:
                yield receive
            except trio.Cancelled:
                self.clients.discard(send)
                raise
            self.clients.discard(send)


def one_client(hub: Hub, frames: int = 2) -> Callable[[], Awaitable[None]]:
    """A client listens while frames are published."""

    async def scenario() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hub.serve, frames)
            while not hub.clients:
                await trio.sleep(1)
            for number in range(frames):
                await hub.publish(number)
                await trio.sleep(1)

    return scenario


def one_client_that_hears_all(hub: Hub) -> Callable[[], Awaitable[None]]:
    """Frames are published while a client listens, and each is heard."""

    async def scenario() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hub.serve, 2)
            while not hub.clients:
                await trio.sleep(1)
            for number in range(2):
                await hub.publish(number)
                await trio.testing.wait_all_tasks_blocked()
            assert hub.heard == [0, 1], f"heard {hub.heard} of [0, 1]"

    return scenario


def one_of_two_leaves(hub: Hub) -> Callable[[trio.CancelScope], Awaitable[None]]:
    """Two clients listen, one of them may be cancelled; the other hears everything."""

    async def scenario(leaving: trio.CancelScope) -> None:
        heard: list[int] = []

        async def leaver() -> None:
            with leaving:
                async with hub.subscribe() as receive:
                    for _ in range(2):
                        await receive.receive()

        async def stayer() -> None:
            async with hub.subscribe() as receive:
                while len(heard) < 3:
                    heard.append(await receive.receive())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(leaver)
            nursery.start_soon(stayer)
            await trio.testing.wait_all_tasks_blocked()
            for number in range(3):
                await hub.publish(number)
                await trio.lowlevel.checkpoint()
        assert heard == [0, 1, 2], f"the one who stayed heard {heard}"

    return scenario


async def test_a_hub_whose_subscription_is_a_with_block_passes_at_every_step(autojump_clock: MockClock) -> None:
    hub = Hub()
    report = await cancel_at_every_step(one_client(hub), check=hub.check)
    assert report.steps > 10
    assert report.runs > 3 * 10
    assert report.seeds == (0, 1, 2)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (SlowGoodbye, "1 clients are still registered"),
        (RegisteredTooEarly, "1 clients are still registered"),
        (NoFinally, "1 clients are still registered"),
        (RegisteredOutside, "1 clients are still registered"),
        (OnlyExceptException, "1 clients are still registered"),
        (ForgottenChannel, "a channel is still open"),
        (Sweeper, "1 clients are still registered"),
        (BeltAndBraces, "still running:\n  task sweeper"),
        (Unbounded, "it had not ended after 60 s"),
        (AbandonedGenerator, "an async generator was left to the garbage collector: AbandonedGenerator.frames"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
async def test_a_hub_that_leaks_is_rejected(wrong: type[Hub], complaint: str, autojump_clock: MockClock) -> None:
    hub = wrong()
    with pytest.raises(TeardownError) as caught:
        await cancel_at_every_step(one_client(hub), check=hub.check)
    assert complaint in str(caught.value)


async def test_a_failure_names_the_step_and_the_seed_and_shows_where_each_task_stood(
    autojump_clock: MockClock,
) -> None:
    hub = AbandonedGenerator()
    with pytest.raises(TeardownError) as caught:
        await cancel_at_every_step(one_client(hub), check=hub.check, seeds=[7])
    error = caught.value
    assert error.seed == 7
    assert error.step > 0
    text = str(error)
    assert text.startswith(f"cancelled at step {error.step} with seed 7, when task ")
    assert "1 clients are still registered" in text
    assert "task test_testing.AbandonedGenerator.serve" in text
    assert "yield await receive.receive()" in text, "the line of the await is shown"
    assert isinstance(error.__cause__, AssertionError)


async def test_the_same_seed_fails_at_the_same_place_every_time(autojump_clock: MockClock) -> None:
    texts = set()
    for _ in range(5):
        hub = RegisteredTooEarly()
        with pytest.raises(TeardownError) as caught:
            await cancel_at_every_step(one_client(hub), check=hub.check, seeds=[3])
        texts.add(re.sub("0x[0-9a-f]+", "(address)", str(caught.value)))
    assert len(texts) == 1


async def test_different_seeds_try_different_orders_of_tasks(autojump_clock: MockClock) -> None:
    orders = set()

    async def scenario() -> None:
        arrived: list[int] = []

        async def arrive(number: int) -> None:
            arrived.append(number)

        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(arrive, number)
        orders.add(tuple(arrived))

    await cancel_at_every_step(scenario, check=lambda: None, seeds=range(8))
    complete = {order for order in orders if len(order) == 6}
    assert len(complete) > 2


async def test_the_chance_of_the_code_under_test_follows_the_seed_too(autojump_clock: MockClock) -> None:
    drawn: dict[float, int] = {}

    async def scenario() -> None:
        await trio.lowlevel.checkpoint()
        number = random.random()
        drawn[number] = drawn.get(number, 0) + 1
        await trio.lowlevel.checkpoint()

    await cancel_at_every_step(scenario, check=lambda: None, seeds=[1])
    assert len(drawn) == 1


def test_chance_is_as_before_afterwards_even_when_the_block_fails() -> None:
    insides = testing._insides()

    def state() -> object:
        return insides._r.getstate(), insides._ALLOW_DETERMINISTIC_SCHEDULING, random.getstate()

    before = state()
    seeded = testing.seeded(5)
    seeded.__enter__()
    assert state() != before
    seeded.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert state() == before


async def test_the_hooks_for_async_generators_are_as_before_afterwards(autojump_clock: MockClock) -> None:
    before = sys.get_asyncgen_hooks()
    hub = AbandonedGenerator()
    with pytest.raises(TeardownError):
        await cancel_at_every_step(one_client(hub), check=hub.check)
    assert sys.get_asyncgen_hooks() == before


async def test_one_client_may_leave_at_any_step_and_the_publisher_and_the_others_do_not_notice(
    autojump_clock: MockClock,
) -> None:
    hub = Hub()
    report = await cancel_part_at_every_step(one_of_two_leaves(hub), check=hub.check)
    assert report.steps > 10


async def test_a_client_whose_leaving_breaks_the_publisher_is_rejected(autojump_clock: MockClock) -> None:
    hub = GoodbyeFirst()
    await cancel_at_every_step(one_client(hub), check=hub.check)  # all is well as long as all go together
    with pytest.raises(TeardownError, match=r"cancelled in part at step .*the scenario raised .*BrokenResource"):
        await cancel_part_at_every_step(one_of_two_leaves(hub), check=hub.check)


async def test_a_scope_that_the_scenario_never_enters_is_refused(autojump_clock: MockClock) -> None:
    async def scenario(leaving: trio.CancelScope) -> None:
        await trio.sleep(1)

    with pytest.raises(ValueError, match="never entered the scope"):
        await cancel_part_at_every_step(scenario, check=lambda: None)


async def test_an_exception_at_any_await_leaves_nothing_of_the_right_hub(autojump_clock: MockClock) -> None:
    hub = Hub()
    report = await raise_at_every_step(one_client(hub), lambda: OSError("injected"), check=hub.check)
    assert report.steps > 3


async def test_a_hub_that_cleans_up_for_cancellation_only_is_rejected(autojump_clock: MockClock) -> None:
    hub = OnlyCancelled()
    await cancel_at_every_step(one_client(hub), check=hub.check)
    with pytest.raises(TeardownError, match=r"interrupted by an exception at step .*1 clients are still"):
        await raise_at_every_step(one_client(hub), lambda: OSError("injected"), check=hub.check)


async def test_another_exception_than_the_injected_one_is_a_failure(autojump_clock: MockClock) -> None:
    async def scenario() -> None:
        try:
            await trio.sleep(1)
        except OSError:
            raise KeyError("in the clean-up") from None

    with pytest.raises(TeardownError, match="the scenario raised KeyError") as caught:
        await raise_at_every_step(scenario, lambda: OSError("injected"), check=lambda: None)
    assert isinstance(caught.value.__cause__, KeyError)


async def test_something_may_happen_at_every_step_and_the_scenario_says_what_must_follow(
    autojump_clock: MockClock,
) -> None:
    hub = Hub()

    def say_goodbye() -> None:
        for client in hub.clients:
            client.close()

    async def scenario() -> None:
        async with hub.subscribe() as receive:
            with suppress(trio.EndOfChannel), trio.move_on_after(5):
                await receive.receive()

    report = await act_at_every_step(scenario, say_goodbye, check=hub.check)
    assert report.steps >= 2


async def test_an_action_that_fails_is_a_failure(autojump_clock: MockClock) -> None:
    async def scenario() -> None:
        await trio.lowlevel.checkpoint()

    def fail() -> None:
        raise KeyError("in the action")

    with pytest.raises(TeardownError, match=r"struck at step 1 .*KeyError"):
        await act_at_every_step(scenario, fail, check=lambda: None)


async def test_a_deadline_that_passes_at_any_step_costs_the_right_hub_no_frame(
    autojump_clock: MockClock,
) -> None:
    hub = Hub()
    await delay_at_every_step(one_client_that_hears_all(hub), KEEP_ALIVE, check=hub.check)


async def test_a_hub_that_asks_cancel_called_loses_the_frame_that_came_just_in_time(
    autojump_clock: MockClock,
) -> None:
    hub = CancelCalled()
    await cancel_at_every_step(one_client_that_hears_all(hub), check=hub.check)  # cancellation does not show it
    with pytest.raises(TeardownError, match=r"delayed by 30 s at step .*\n?.*heard"):
        await delay_at_every_step(one_client_that_hears_all(hub), KEEP_ALIVE, check=hub.check)


async def test_time_cannot_be_made_to_pass_under_a_real_clock() -> None:
    with pytest.raises(TypeError, match="MockClock"):
        await delay_at_every_step(trio.lowlevel.checkpoint, 1, check=lambda: None)


async def test_a_run_that_hangs_in_a_shield_is_taken_apart_and_shown(autojump_clock: MockClock) -> None:
    async def scenario() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep, 5)
            try:
                await trio.sleep(1)
            finally:
                with trio.CancelScope(shield=True):
                    await trio.sleep_forever()

    before = living_tasks()
    with pytest.raises(TeardownError) as caught:
        await cancel_at_every_step(scenario, check=lambda: None, within=10)
    text = str(caught.value)
    assert "it had not ended after 10 s" in text
    assert "await trio.sleep_forever()" in text
    assert_nothing_left(before)


async def test_a_hang_inside_a_hang_is_taken_apart_too(autojump_clock: MockClock) -> None:
    async def scenario() -> None:
        with trio.CancelScope(shield=True):
            try:
                await trio.sleep_forever()
            finally:
                await trio.sleep_forever()  # noqa: ASYNC102

    with pytest.raises(TeardownError, match="it had not ended"):
        await cancel_at_every_step(scenario, check=lambda: None)


async def test_an_error_of_the_scenario_is_reported_with_its_cause(autojump_clock: MockClock) -> None:
    async def scenario() -> None:
        await trio.sleep(1)
        raise KeyError("never mind teardown")

    with pytest.raises(TeardownError, match="the scenario raised KeyError") as caught:
        await cancel_at_every_step(scenario, check=lambda: None)
    assert isinstance(caught.value.__cause__, KeyError)
    assert caught.value.step == 0, "it fails when it is left alone"
    assert str(caught.value).startswith("left alone, with seed 0: ")


async def test_a_scenario_with_more_steps_than_the_limit_is_refused(autojump_clock: MockClock) -> None:
    async def scenario() -> None:
        for _ in range(10):
            await trio.lowlevel.checkpoint()

    assert (await cancel_at_every_step(scenario, check=lambda: None)).steps < 15
    with pytest.raises(TeardownError, match="more than 5 steps"):
        await cancel_at_every_step(scenario, check=lambda: None, limit=5)


async def test_no_seeds_at_all_are_refused(autojump_clock: MockClock) -> None:
    with pytest.raises(ValueError, match="seeds=None"):
        await cancel_at_every_step(trio.lowlevel.checkpoint, check=lambda: None, seeds=[])


async def test_whoever_runs_the_harness_can_cancel_it(autojump_clock: MockClock) -> None:
    before = living_tasks()

    async def scenario() -> None:
        await trio.sleep(100)

    with trio.move_on_after(5) as scope:
        await cancel_at_every_step(scenario, check=lambda: None, within=1000)
    assert scope.cancelled_caught
    assert_nothing_left(before)


async def test_it_works_under_a_real_clock() -> None:
    hub = Hub()

    async def scenario() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hub.serve, 1)
            while not hub.clients:
                await trio.lowlevel.checkpoint()
            await hub.publish(0)

    await cancel_at_every_step(scenario, check=hub.check, within=30)


async def test_a_trio_whose_insides_have_moved_is_named_and_seedless_runs_still_work(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    hub = Hub()
    leaky = SlowGoodbye()
    monkeypatch.setitem(sys.modules, "trio._core._run", ModuleType("trio._core._run"))
    with pytest.raises(SchedulerMoved, match=rf"trio {trio.__version__} keeps .* seeds=None does without"):
        await cancel_at_every_step(one_client(hub), check=hub.check)
    with pytest.raises(SchedulerMoved):
        await raise_at_every_step(one_client(hub), OSError, check=hub.check)
    report = await cancel_at_every_step(one_client(hub), check=hub.check, seeds=None)
    assert report.seeds == (None,)
    with pytest.raises(TeardownError, match="in trio's own order"):
        await cancel_at_every_step(one_client(leaky), check=leaky.check, seeds=None)


async def test_a_channel_counts_as_closed_when_both_ends_are_and_nothing_is_left_in_it() -> None:
    send, receive = trio.open_memory_channel[int](2)
    assert not channel_is_closed(send.statistics())
    send.send_nowait(1)
    send.close()
    assert not channel_is_closed(receive.statistics())
    receive.close()
    assert channel_is_closed(receive.statistics())


async def test_what_is_left_is_named_with_the_await_at_which_it_stands(autojump_clock: MockClock) -> None:
    async def forgotten() -> None:
        await trio.sleep_forever()

    before = living_tasks()
    assert_nothing_left(before)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(forgotten)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(AssertionError) as caught:
            assert_nothing_left(before)
        nursery.cancel_scope.cancel()
    assert "forgotten" in str(caught.value)
    assert "await trio.sleep_forever()" in str(caught.value)
    assert_nothing_left(before)
