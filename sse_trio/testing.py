"""The teardown harness: is everything gone, wherever the cancellation lands?

Strategy: a test that cancels code once proves one place. Here a *scenario* (any async function) runs
again and again; in the nth run it is struck at its nth *step* (cancelled, interrupted by an exception, or
delayed), until a run is over before its step has come. As soon as the scenario has ended, before anything else
can run, the harness looks for what it left: the caller's own check, tasks, async generators.

A step is a moment that differs from the one before: a task of the scenario has just parked or ended, or one
that was woken from outside (by the clock, the kernel, a stranger) is about to run. Trio picks the order of
runnable tasks at random; the harness seeds that choice, so that "step 17 with seed 2" is the same place
tomorrow, and tries several seeds. It needs nothing but trio, and works best under
`MockClock(autojump_threshold=0)`, where a scenario that hangs is found at once::

    async def scenario() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_one_client, hub)
            hub.publish(b"a frame")

    await cancel_at_every_step(scenario, check=lambda: assert_empty(hub))
"""

from __future__ import annotations

import random
import sys
import traceback
import warnings
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypedDict, Unpack

import trio
from trio.lowlevel import Task
from trio.testing import MockClock

__all__ = [
    "Options",
    "Report",
    "SchedulerMoved",
    "TeardownError",
    "act_at_every_step",
    "assert_nothing_left",
    "cancel_at_every_step",
    "cancel_part_at_every_step",
    "channel_is_closed",
    "delay_at_every_step",
    "living_tasks",
    "raise_at_every_step",
    "seeded",
]

Scenario = Callable[[], Awaitable[object]]
Check = Callable[[], object]


class Options(TypedDict, total=False):
    """What every function that runs a scenario takes besides."""

    seeds: Iterable[int] | None
    """One pass each; by default 0, 1, 2. None: one pass in trio's own order, without touching trio's
    insides."""
    limit: int
    """Fail when the scenario has more steps than this; by default 2000."""
    within: float
    """Seconds of trio's clock that a run may take, by default 60. One that takes longer has failed, and is
    taken apart by force: an exception is thrown at every await of it, shielded or not."""


class TeardownError(AssertionError):
    """A run of the scenario left something behind, failed, or did not end.

    The text names the step (from 1; 0 is the run that was left alone), the seed, what is wrong, and where the
    tasks of the scenario stood when it was struck. The check's or the scenario's own exception is the
    `__cause__`.
    """

    def __init__(self, text: str, step: int, seed: int | None) -> None:
        super().__init__(text)
        self.step = step
        self.seed = seed


class SchedulerMoved(RuntimeError):
    """This trio keeps what the harness reaches into elsewhere than the trio that it was written for.

    `seeds=None` does without, except for `raise_at_every_step` and for ending a run that hangs.
    """


@dataclass(frozen=True)
class Report:
    """What the harness did: `steps` in the longest run, `runs` in all, under these `seeds`."""

    steps: int
    runs: int
    seeds: tuple[int | None, ...]


async def cancel_at_every_step(scenario: Scenario, *, check: Check, **options: Unpack[Options]) -> Report:
    """Cancel the whole scenario at its 1st, 2nd, … nth step, each in a run of its own, until it runs through.

    After each run, and at once: `check()` passes, no task lives that did not live before, and no async
    generator is left suspended or to the garbage collector.

    Args:
        scenario: called without arguments, once per run. It MUST build what it uses, or leave it as it found
            it, and it MUST NOT depend on chance other than trio's and the module `random`'s (both follow the
            seed).
        check: raises AssertionError when something is left. Synchronous, so that nothing can tidy up in
            between.

    Raises:
        TeardownError: see there.
        SchedulerMoved: see there.
    """

    async def body(run: _Run) -> None:
        with run.scope:
            await scenario()

    return await _at_every_step(body, _Blow("cancelled", _cancel, early=True), check, options)


async def cancel_part_at_every_step(
    scenario: Callable[[trio.CancelScope], Awaitable[object]], *, check: Check, **options: Unpack[Options]
) -> Report:
    """Cancel a part of the scenario at every step of the whole; the rest must not notice.

    The scenario gets a cancel scope and enters it around the part, for example one client of several. What
    the others must have seen in the end it asserts itself. Everything else is as in `cancel_at_every_step`.

    Raises:
        ValueError: the scenario does not enter the scope, so that nothing was ever cancelled.
    """
    cancelled = False

    async def body(run: _Run) -> None:
        nonlocal cancelled
        await scenario(run.scope)
        cancelled = cancelled or run.scope.cancelled_caught

    report = await _at_every_step(body, _Blow("cancelled in part", _cancel, early=True), check, options)
    if not cancelled:
        raise ValueError("the scenario never entered the scope that it was given, so nothing was cancelled")
    return report


async def raise_at_every_step(
    scenario: Scenario, exception: Callable[[], Exception], *, check: Check, **options: Unpack[Options]
) -> Report:
    """Let the await at which a task has just parked raise `exception()`, at every step, shielded or not.

    The await ends as it would for cancellation (what it waits for is neither lost nor half done), but with
    this exception, which the scenario may handle or let out, alone or in a group. Any other that it lets out
    is a failure. Everything else is as in `cancel_at_every_step`.
    """
    injected: list[Exception] = []

    def strike(run: _Run, task: Task) -> None:
        injected.append(exception())
        _interrupt(task, injected[-1])

    async def body(run: _Run) -> None:
        try:
            await scenario()
        except Exception as error:
            if any(all(leaf is not one for one in injected) for leaf in _leaves(error)):
                raise

    _insides()
    blow = _Blow("interrupted by an exception", strike, _is_interruptible)
    return await _at_every_step(body, blow, check, options)


async def act_at_every_step(
    scenario: Scenario, action: Callable[[], object], *, check: Check, **options: Unpack[Options]
) -> Report:
    """Call `action()` at every step: the peer hangs up, the server drains, somebody publishes.

    It is synchronous, runs between two turns of the scheduler, and must not raise. What follows from it the scenario
    asserts itself. Everything else is as in `cancel_at_every_step`.
    """

    def strike(run: _Run, task: Task) -> None:
        action()

    async def body(run: _Run) -> None:
        await scenario()

    return await _at_every_step(body, _Blow("struck", strike), check, options)


async def delay_at_every_step(
    scenario: Scenario, seconds: float, *, check: Check, **options: Unpack[Options]
) -> Report:
    """Let `seconds` pass at every step, as on a busy machine: deadlines expire where nobody expects it.

    Finds what takes a deadline that has passed for a wait that was in vain (`cancel_called`). Everything else is as
    in `cancel_at_every_step`.

    Raises:
        TypeError: the clock is not a `trio.testing.MockClock`, so that time cannot be made to pass.
    """
    clock = trio.lowlevel.current_clock()
    if not isinstance(clock, MockClock):
        raise TypeError("time can be made to pass under trio.testing.MockClock only")

    async def body(run: _Run) -> None:
        await scenario()

    blow = _Blow(f"delayed by {seconds:g} s", lambda run, task: clock.jump(seconds))
    return await _at_every_step(body, blow, check, options)


def channel_is_closed(statistics: trio.MemoryChannelStatistics) -> bool:
    """Whether both ends of a memory channel are closed, it holds nothing and nobody waits at it.

    Trio says nothing about a channel that was forgotten, not even when it is collected: so ask.
    """
    return not (
        statistics.open_send_channels
        or statistics.open_receive_channels
        or statistics.tasks_waiting_send
        or statistics.tasks_waiting_receive
        or statistics.current_buffer_used
    )


def living_tasks() -> frozenset[Task]:
    """Every task of this trio run, for `assert_nothing_left`."""
    found: set[Task] = set()
    root = trio.lowlevel.current_root_task()
    pending = [root] if root is not None else []
    while pending:
        task = pending.pop()
        found.add(task)
        for nursery in task.child_nurseries:
            pending.extend(nursery.child_tasks)
    return frozenset(found)


def assert_nothing_left(before: frozenset[Task]) -> None:
    """No task lives that is not in `before`, an earlier `living_tasks()`.

    Raises:
        AssertionError: names each such task and shows the await at which it stands.
    """
    left = living_tasks() - before
    if left:
        raise AssertionError(f"still running:\n{_where(_stands(left))}")


@dataclass(frozen=True)
class _Blow:
    """What happens at the nth step, and which steps it can happen at."""

    verb: str
    strike: Callable[[_Run, Task], None]
    possible: Callable[[Task], bool] = lambda task: True
    early: bool = False  # also before the scenario has begun


class _Run(trio.abc.Instrument):
    """One run: counts the steps of the tasks below `root`, and strikes at the nth."""

    def __init__(self, nth: int, blow: _Blow) -> None:
        self.nth = nth
        self.blow = blow
        self.scope = trio.CancelScope()
        self.steps = 0
        self.struck: str | None = None  # what had just happened then
        self.stood: list[Stand] = []  # where the tasks stood then
        self.error: Exception | None = None  # the blow itself failed
        self.tasks: set[Task] = set()
        self.woken: set[Task] = set()
        self.inside = False  # one of our tasks has its turn

    @contextmanager
    def counting(self) -> Iterator[None]:
        """The current task is the scenario's root from here to the end of the block."""
        root = trio.lowlevel.current_task()
        self.tasks.add(root)
        self.inside = True
        trio.lowlevel.add_instrument(self)
        try:
            if self.blow.early:
                self._step(root, "it was about to begin")
            yield
        finally:
            trio.lowlevel.remove_instrument(self)

    def task_spawned(self, task: Task) -> None:
        if task.parent_nursery is not None and task.parent_nursery.parent_task in self.tasks:
            self.tasks.add(task)

    def task_scheduled(self, task: Task) -> None:
        if not self.inside and task in self.tasks:
            self.woken.add(task)

    def before_task_step(self, task: Task) -> None:
        if task in self.tasks:
            if task in self.woken:
                self.woken.discard(task)
                self._step(task, f"task {task.name} had been woken and was about to run")
            self.inside = True

    def after_task_step(self, task: Task) -> None:
        self.inside = False
        if task in self.tasks:
            self._step(task, f"task {task.name} had just parked")

    def task_exited(self, task: Task) -> None:
        if task in self.tasks:
            self.tasks.discard(task)
            self._step(task, f"task {task.name} had just ended")

    def _step(self, task: Task, what: str) -> None:
        if self.struck is None and self.blow.possible(task):
            self.steps += 1
            if self.steps == self.nth:
                self.struck, self.stood = what, _stands(self.tasks)
                try:
                    self.blow.strike(self, task)
                except Exception as error:
                    self.error = error  # trio would only log it


async def _at_every_step(
    body: Callable[[_Run], Awaitable[object]], blow: _Blow, check: Check, options: Options
) -> Report:
    seeds: Iterable[int | None] | None = options.get("seeds", range(3))
    chosen = (None,) if seeds is None else tuple(seeds)
    if not chosen:
        raise ValueError("no seeds were given; seeds=None runs without any")
    limit, within = options.get("limit", 2000), options.get("within", 60.0)
    longest = runs = 0
    for seed in chosen:
        for nth in range(1, limit + 2):
            run = _Run(nth, blow)
            runs += 1
            problem = await _one_run(run, body, check, seed, within)
            if problem is not None:
                raise _failure(problem, run, seed) from problem.__cause__ or problem
            if run.struck is None:
                longest = max(longest, run.steps)
                break
        else:
            raise TeardownError(f"the scenario has more than {limit} steps", limit, seed)
    return Report(longest, runs, chosen)


async def _one_run(
    run: _Run, body: Callable[[_Run], Awaitable[object]], check: Check, seed: int | None, within: float
) -> Exception | None:
    """What was wrong with this run, if anything."""
    problem: Exception | None = None
    over = trio.Event()

    async def scenario() -> None:
        nonlocal problem
        before = living_tasks()
        with _watched_async_generators() as abandoned:
            try:
                try:
                    with run.counting():
                        await body(run)
                finally:
                    if run.error is not None:
                        raise run.error
                # No await from here on: what is there now was left by the scenario.
                complaints = []
                for look in (check, lambda: assert_nothing_left(before), abandoned):
                    try:
                        look()
                    except AssertionError as error:
                        complaints.append(error)
                if complaints:
                    text = "\n".join(str(one) or "the check failed" for one in complaints)
                    raise AssertionError(text) from complaints[0]
            except Exception as error:
                problem = error
        over.set()

    with seeded(seed):
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(scenario, name="the scenario itself")
                with trio.move_on_after(within):
                    await over.wait()
                if not over.is_set():
                    problem = AssertionError(f"it had not ended after {within:g} s:\n{_where(_stands(run.tasks))}")
                    await _take_apart(run, problem)
        except BaseExceptionGroup as group:
            if problem is None or group.split((Exception, _Evicted))[1] is not None:
                raise
    return problem


class _Evicted(BaseException):
    """Thrown into the tasks of a run that does not end."""


async def _take_apart(run: _Run, problem: Exception) -> None:
    """Throw an exception at every await of the run until none of its tasks is left."""
    try:
        _insides()
    except SchedulerMoved:
        # The nursery cannot end now. At least it is said why.
        print(f"sse_trio.testing cannot end this run with this trio: {problem}", file=sys.stderr)
        raise
    while alive := run.tasks & living_tasks():
        for task in alive:
            if _is_interruptible(task):
                _interrupt(task, _Evicted())
        await trio.lowlevel.cancel_shielded_checkpoint()


def _failure(problem: Exception, run: _Run, seed: int | None) -> TeardownError:
    order = "in trio's own order" if seed is None else f"with seed {seed}"
    what = str(problem) if isinstance(problem, AssertionError) else f"the scenario raised {problem!r}"
    if run.struck is None:
        return TeardownError(f"left alone, {order}: {what}", 0, seed)
    place = f"{run.blow.verb} at step {run.steps} {order}, when {run.struck}"
    text = f"{place}: {what}\nits tasks stood at:\n{_where(run.stood) or '  (none was left)'}"
    return TeardownError(text, run.steps, seed)


Stand = tuple[str, traceback.StackSummary]
"""A task's name, and the awaits at which it stood."""


def _stands(tasks: Iterable[Task]) -> list[Stand]:
    """Where tasks stand now; cheap until somebody wants to read it."""
    return [(task.name, traceback.StackSummary.extract(task.iter_await_frames(), lookup_lines=False)) for task in tasks]


def _where(stands: Iterable[Stand]) -> str:
    """A traceback for each; of trio's own frames only the last."""
    lines = []
    for name, frames in sorted(stands, key=lambda stand: stand[0]):
        own = [frame for frame in frames if "/trio/_" not in frame.filename and frame.filename != __file__]
        last = [frame for frame in frames if "/trio/_" in frame.filename][-1:]
        lines += [f"  task {name}\n", *traceback.StackSummary.from_list([*own, *last]).format()]
    return "".join(lines).rstrip()


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from _leaves(part)
    else:
        yield error


@contextmanager
def _watched_async_generators() -> Iterator[Callable[[], None]]:
    """Gives a function that names the async generators begun in the block that neither ended nor were
    closed."""
    outer = sys.get_asyncgen_hooks()
    begun: list[weakref.ref[AsyncGenerator[Any, Any]]] = []
    collected: list[str] = []

    def name(generator: AsyncGenerator[Any, Any]) -> str:
        return str(getattr(generator, "__qualname__", generator))

    def firstiter(generator: AsyncGenerator[Any, Any]) -> None:
        begun.append(weakref.ref(generator))
        if outer.firstiter is not None:
            outer.firstiter(generator)

    def finalizer(generator: AsyncGenerator[Any, Any]) -> None:
        collected.append(name(generator))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # trio's; the harness says it itself
            if outer.finalizer is not None:
                outer.finalizer(generator)

    def look() -> None:
        alive = [generator for reference in begun if (generator := reference()) is not None]
        names = collected + [name(one) for one in alive if getattr(one, "ag_frame", None) is not None]
        if names:
            raise AssertionError(f"an async generator was left to the garbage collector: {', '.join(names)}")

    sys.set_asyncgen_hooks(firstiter=firstiter, finalizer=finalizer)
    try:
        yield look
    finally:
        sys.set_asyncgen_hooks(*outer)


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Trio's order of tasks and the module `random` follow the seed in the block; both are as before afterwards.

    None leaves everything to chance.

    Raises:
        SchedulerMoved: see there.
    """
    if seed is None:
        yield
        return
    scheduler = _insides()
    sorts, order, chance = (
        scheduler._ALLOW_DETERMINISTIC_SCHEDULING,
        scheduler._r.getstate(),
        random.getstate(),
    )
    # Trio then sorts what is runnable before it shuffles it: the order does not depend on addresses in
    # memory.
    scheduler._ALLOW_DETERMINISTIC_SCHEDULING = True
    scheduler._r.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        scheduler._ALLOW_DETERMINISTIC_SCHEDULING = sorts
        scheduler._r.setstate(order)
        random.setstate(chance)


def _cancel(run: _Run, task: Task) -> None:
    run.scope.cancel("the harness cancels the scenario at this step")


def _is_interruptible(task: Any) -> bool:
    """Whether the task is parked at an await that cancellation could end."""
    return task._abort_func is not None


def _interrupt(task: Any, error: BaseException) -> None:
    def raise_it() -> NoReturn:
        raise error

    task._attempt_abort(raise_it)


def _insides() -> Any:
    """Trio's module with the scheduler, after a look whether it has what is needed of it."""
    scheduler = sys.modules.get("trio._core._run")
    if (
        not isinstance(getattr(scheduler, "_r", None), random.Random)
        or not isinstance(getattr(scheduler, "_ALLOW_DETERMINISTIC_SCHEDULING", None), bool)
        or not hasattr(Task, "_attempt_abort")
        or not hasattr(Task, "_abort_func")
    ):
        raise SchedulerMoved(
            f"trio {trio.__version__} keeps the random numbers of its scheduler, or what interrupts a task, "
            "elsewhere than in trio._core._run; seeds=None does without them"
        )
    return scheduler
