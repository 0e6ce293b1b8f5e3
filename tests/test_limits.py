"""Limits: exact counts, exact virtual times, and a registry that is empty when nobody is there."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Generator
from contextlib import ExitStack

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import assert_no_checkpoints

from sse_trio.limits import RATE_BURST, AtCapacity, Limits, effective_max_connections
from sse_trio.settings import Settings


class Timer:
    """A monotonic clock that stands still until it is told to move."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def limits(timer: Timer | None = None, **variables: int | float) -> Limits:
    names = {
        "process": "SSE_MAX_CONNECTIONS",
        "address": "SSE_MAX_CONNECTIONS_PER_IP",
        "subject": "SSE_MAX_CONNECTIONS_PER_SUBJECT",
        "rate": "SSE_CONNECTION_RATE",
    }
    given = {names[name]: str(value) for name, value in variables.items()}
    return Limits(Settings.from_environment(given), timer=timer or Timer())


def refusal(counted: Limits, address: str = "192.0.2.1", subject: str | None = None) -> AtCapacity:
    with pytest.raises(AtCapacity) as refused, counted.admit(address, subject):
        raise AssertionError("the block of a refused stream runs")
    return refused.value


@pytest.mark.parametrize("limit", ["process", "address", "subject"])
def test_the_last_place_is_given_and_the_next_refused_and_a_free_place_given_again(limit: str) -> None:
    counted = limits(None, **{limit: 3})
    with ExitStack() as two, ExitStack() as one:
        for _ in range(2):
            two.enter_context(counted.admit("192.0.2.1", "a"))
        one.enter_context(counted.admit("192.0.2.1", "a"))
        refused = refusal(counted, subject="a")
        assert refused.limit == limit
        assert refused.status == 503
        assert int(refused.headers["Retry-After"]) > 0
        one.close()
        with counted.admit("192.0.2.1", "a"):
            assert refusal(counted, subject="a").limit == limit
    assert counted.statistics().refused[refused.limit] == 2


def test_who_is_refused_is_not_counted_and_does_not_take_the_place_of_another() -> None:
    counted = limits(address=1)
    with counted.admit("192.0.2.1", None):
        for _ in range(5):
            refusal(counted)
        assert counted.statistics().connections == 1
        with counted.admit("192.0.2.2", None):
            assert counted.statistics().addresses == 2


def test_each_address_and_each_subject_has_its_own_count() -> None:
    counted = limits(address=1, subject=1)
    with counted.admit("192.0.2.1", "a"), counted.admit("192.0.2.2", "b"), counted.admit("192.0.2.3", None):
        assert refusal(counted, "192.0.2.1", "c").limit == "address"
        assert refusal(counted, "192.0.2.4", "a").limit == "subject"
        with counted.admit("192.0.2.4", None):  # a token without a subject has no such limit
            pass


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.2", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("2001:db8::1", "2001:db8::ffff:ffff:ffff:ffff", True),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("2001:db8:0:2::1", "2001:db8:0:3::1", False),
        ("2001:DB8::1", "2001:db8::1", True),
        ("/run/a.sock", "/run/a.sock", True),
    ],
)
def test_one_subscriber_is_one_address_even_with_a_whole_ipv6_network(one: str, other: str, same: bool) -> None:
    counted = limits(address=1)
    with counted.admit(one, None):
        if same:
            refusal(counted, other)
        else:
            with counted.admit(other, None):
                pass


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_nothing_is_left_whatever_ends_the_stream(error: type[BaseException]) -> None:
    counted = limits()
    with pytest.raises(error), counted.admit("192.0.2.1", "a"):
        raise error
    assert counted.statistics() == limits().statistics()


async def test_nothing_is_left_when_a_stream_is_cancelled_and_counting_never_lets_another_task_in() -> None:
    counted = limits()
    with assert_no_checkpoints(), counted.admit("192.0.2.1", "a"):
        pass
    with trio.CancelScope() as scope:
        scope.cancel()
        with counted.admit("192.0.2.1", "a"):
            await trio.lowlevel.checkpoint()
    assert counted.statistics() == limits().statistics()


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), st.sampled_from([None, "x", "y"])), max_size=20))
def test_any_coming_and_going_stays_within_the_limits_and_ends_at_nothing(who: list[tuple[str, str | None]]) -> None:
    counted = limits(process=8, address=4, subject=3)

    def stream() -> Generator[None, None, None]:
        for address, subject in who:
            try:
                with counted.admit(address, subject):
                    yield
            except AtCapacity:
                yield

    streams = [stream() for _ in range(6)]
    for _ in range(30):
        for one in streams:
            next(one, None)
        now = counted.statistics()
        assert now.connections <= 8
        assert now.connections <= 4 * now.addresses
    for one in streams:
        one.close()
    now = counted.statistics()
    assert (now.connections, now.addresses, now.subjects) == (0, 0, 0)


def test_everybody_may_come_back_at_once_after_a_redeploy() -> None:
    counted = limits(process=10_000, rate=1)
    with ExitStack() as streams:
        for number in range(10_000):
            streams.enter_context(counted.admit(f"10.0.{number >> 8}.{number & 255}", None))
    assert not any(counted.statistics().refused.values())


def test_only_who_keeps_coming_back_meets_the_rate_and_exactly_so() -> None:
    timer = Timer()
    counted = limits(timer, process=100, rate=4)
    for _ in range(100):
        with counted.admit("192.0.2.1", None):
            pass
    assert refusal(counted).limit == "rate"
    timer.now += 0.249
    refusal(counted)
    timer.now += 0.001
    with counted.admit("192.0.2.1", None):
        pass
    refusal(counted)
    timer.now += 1
    for _ in range(4):
        with counted.admit("192.0.2.1", None):
            pass
    refusal(counted)
    timer.now += 1e6  # however long nobody comes, no more is saved up than there may be streams
    for _ in range(100):
        with counted.admit("192.0.2.1", None):
            pass
    refusal(counted)


def test_who_is_refused_for_another_reason_does_not_use_up_the_rate() -> None:
    counted = limits(process=2, address=1, rate=1)
    with counted.admit("192.0.2.1", None):
        for _ in range(100):
            refusal(counted)
        with counted.admit("192.0.2.2", None):
            pass


def test_a_clock_that_goes_back_takes_nothing_away() -> None:
    timer = Timer()
    counted = limits(timer, process=1, rate=1)
    timer.now -= 500
    with counted.admit("192.0.2.1", None):
        pass


def test_a_server_without_a_limit_has_a_bucket_all_the_same() -> None:
    counted = limits(process=0, rate=1)
    for _ in range(RATE_BURST):
        with counted.admit("192.0.2.1", None):
            pass
    assert refusal(counted).limit == "rate"


def test_a_small_server_has_a_second_s_worth_of_new_streams_in_hand() -> None:
    counted = limits(process=1, rate=50)
    for _ in range(50):
        with counted.admit("192.0.2.1", None):
            pass
    assert refusal(counted).limit == "rate"


def test_zero_means_no_limit() -> None:
    counted = limits(process=0, address=0, subject=0, rate=0)
    with ExitStack() as streams:
        for _ in range(RATE_BURST + 1):
            streams.enter_context(counted.admit("192.0.2.1", "a"))


def in_a_process_with(soft: int, hard: int, wanted: int) -> list[str]:
    """What a process whose limits of open files are these says: streams, warning, and its soft limit
    afterwards.
    """
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
from sse_trio.limits import effective_max_connections
from sse_trio.settings import Settings
number, warning = effective_max_connections(Settings.from_environment({{"SSE_MAX_CONNECTIONS": "{wanted}"}}))
print(number, resource.getrlimit(resource.RLIMIT_NOFILE)[0], warning, sep="|")
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return answer.stdout.strip().split("|")


def test_the_limit_of_open_files_is_raised_and_its_end_is_said() -> None:
    assert in_a_process_with(256, 4096, 1000) == ["1000", "4096", "None"]
    number, soft, warning = in_a_process_with(256, 1024, 10000)
    assert (number, soft) == ("896", "1024")
    assert warning.startswith("SSE_MAX_CONNECTIONS is 10000, but 1024 open files allow 896 streams")
    assert in_a_process_with(256, 1024, 896) == ["896", "1024", "None"]
    assert in_a_process_with(256, 1024, 0) == ["896", "1024", "None"]
    assert in_a_process_with(64, 64, 10)[0] == "1", "a process that can serve hardly anybody still serves one"


def test_a_hard_limit_that_the_kernel_does_not_grant_is_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert effective_max_connections(Settings.from_environment({}))[0] == 896
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert effective_max_connections(Settings.from_environment({})) == (10000, None)
