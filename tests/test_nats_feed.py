"""The feed, against real servers that are well: what it publishes, in which rounds, and from where on.

What happens when they are not well is in test_nats_faults.py.
"""

from __future__ import annotations

import inspect
import json
import re
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import structlog.testing
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recorder import Recorder, down, live, operator, running
from support import WITHIN, NatsServer, a_discovery, eventually, fail_within, nats_server, payload

from sse_trio import nats_feed
from sse_trio import rounds as rounds_module
from sse_trio.broadcaster import Broadcaster
from sse_trio.discovery import DISCOVERY_TYPES
from sse_trio.jetstream import StreamInfo, base36
from sse_trio.nats_connection import open_connection
from sse_trio.nats_feed import FeedError, NatsFeed
from sse_trio.rounds import FeedCounters, Rounds
from sse_trio.settings import Settings


def test_the_recorder_and_the_broadcaster_have_the_same_methods() -> None:
    for name, method in vars(rounds_module.Broadcaster).items():
        if inspect.isfunction(method) and not name.startswith("_"):
            for implementation in (Recorder, Broadcaster):
                theirs = inspect.signature(getattr(implementation, name)).parameters
                for parameter, wanted in inspect.signature(method).parameters.items():
                    assert theirs[parameter].kind == wanted.kind, f"{implementation.__name__}.{name}: {parameter}"


def test_numbers_in_base_36_are_short_and_plain() -> None:
    for number in (0, 1, 35, 36, 1_795_538_412_967_428):
        assert int(base36(number), 36) == number
        assert re.fullmatch("[0-9a-z]+", base36(number))


# -- rounds ------------------------------------------------------------------------------------------------------------


def rounds_of(limit: int = 1024, *, slices: int = 0) -> tuple[Rounds, Recorder]:
    recorder = Recorder(slices=slices)
    recorder.open_epoch("test", 0)
    return Rounds(recorder, FeedCounters(), limit), recorder


async def test_a_round_has_at_most_so_many_events_and_is_finished_before_the_next() -> None:
    rounds, recorder = rounds_of(limit=40, slices=3)
    await rounds.publish([(0, "s", payload(number)) for number in range(100)], 1.0, numbered=False)
    assert recorder.rounds == [40, 40, 20]
    assert recorder.numbers == list(range(100))
    assert recorder.sequences == list(range(1, 101))


async def test_a_round_of_large_discoveries_has_about_a_megabyte() -> None:
    rounds, recorder = rounds_of()
    large = payload(1, extra="x" * 60_000)
    await rounds.publish([(0, "s", large)] * 40, 1.0, numbered=False)
    assert recorder.rounds == [18, 18, 4]


async def test_others_run_often_while_a_hundred_thousand_messages_are_decoded() -> None:
    rounds, recorder = rounds_of(limit=100_000)
    decoded_between: list[int] = []
    done = False

    async def other() -> None:
        seen = 0
        while not done:
            decoded_between.append(rounds.counters.received - seen)
            seen = rounds.counters.received
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        message = (0, "s", b"not a discovery")
        with structlog.testing.capture_logs():
            await rounds.publish([message] * 99_000 + [(0, "s", payload(1))] * 1000, 1.0, numbered=False)
        done = True
    # The scheduler may let one task run twice before the other.
    assert max(decoded_between) <= 2 * rounds_module.DECODED_AT_ONCE
    assert len(recorder.events) == 1000


async def test_what_does_not_decode_has_no_number_of_ours_but_has_one_of_the_streams() -> None:
    mixed = [(7, "s", payload(1)), (8, "s", b"x"), (11, "s", payload(2)), (12, "s", b"x")]
    rounds, recorder = rounds_of()
    with structlog.testing.capture_logs():
        await rounds.publish(mixed, 1.0, numbered=False)
        assert (recorder.sequences, recorder.head) == ([1, 2], 2)
        rounds, recorder = rounds_of()
        await rounds.publish(mixed, 1.0, numbered=True)
        assert (recorder.sequences, recorder.head) == ([7, 11], 12)


async def test_invalid_discoveries_are_counted_by_reason_and_logged_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rounds, recorder = rounds_of()
    wrong = {
        "oversized": payload(1, extra="x" * 65536),
        "encoding": b'{"agent_id": "\xff"}',
        "json": b"{",
        "schema": payload(1, confidence=7),
    }
    with structlog.testing.capture_logs() as lines:
        for data in wrong.values():
            await rounds.publish([(0, "a.b\r\nforged", data)] * 50, 1.0, numbered=False)
    assert rounds.counters.invalid == dict.fromkeys(wrong, 50)
    assert (rounds.counters.received, rounds.counters.decoded) == (200, 0)
    assert recorder.events == []
    assert [(line["reason"], line["subject"], line["suppressed"]) for line in lines] == [
        (reason, "a.b\\r\\nforged", 0) for reason in wrong
    ]
    monkeypatch.setattr("sse_trio.rounds.LOG_INTERVAL", 0.0)
    rounds._invalid._next.clear()
    with structlog.testing.capture_logs() as lines:
        await rounds.publish([(0, "s", b"{")], 1.0, numbered=False)
    assert [line["suppressed"] for line in lines] == [49]


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=8,
)
nearly = st.fixed_dictionaries(
    {},
    optional={
        "agent_id": st.text() | anything,
        "agent_role": st.text() | anything,
        "discovery_type": st.sampled_from(DISCOVERY_TYPES) | anything,
        "content": st.text() | anything,
        "confidence": st.floats(0, 1) | anything,
        "timestamp": st.just("2009-02-13T23:31:30Z") | anything,
        "related_to": anything,
        "unknown": anything,
    },
)
payloads = st.binary() | nearly.map(lambda fields: json.dumps(a_discovery() | fields).encode(errors="replace"))


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.lists(st.tuples(st.text(min_size=1), payloads), max_size=20))
def test_no_payload_ends_the_feed(messages: list[tuple[str, bytes]]) -> None:
    rounds, recorder = rounds_of()
    with structlog.testing.capture_logs():
        trio.run(partial(rounds.publish, numbered=False), [(0, *message) for message in messages], 1.0)
    counters = rounds.counters
    assert counters.received == len(messages) == counters.decoded + counters.invalid.total()
    assert recorder.sequences == list(range(1, counters.decoded + 1))
    assert [event[2].payload for event in recorder.events] == [
        data for _, data in messages if data in {event[2].payload for event in recorder.events}
    ]


# -- core NATS ---------------------------------------------------------------------------------------------------------


async def test_on_core_nats_the_feed_numbers_what_it_hears_from_the_moment_it_is_live(core_nats: NatsServer) -> None:
    async with running(core_nats) as (feed, recorder):
        await feed.first_attempt.wait()
        status = feed.status
        assert (status.live, status.reason, status.mode) == (True, None, "core")
        assert (status.server, status.reconnects) == (f"127.0.0.1:{core_nats.port}", 0)
        assert status.since <= datetime.now(UTC)
        await core_nats.publish(*[("discoveries.a.b", payload(number)) for number in range(3)], ("other", payload(9)))
        await recorder.hears(2)
        assert recorder.numbers == [0, 1, 2]
        assert recorder.sequences == [1, 2, 3]
        assert {subject for _, subject, _ in recorder.events} == {"discoveries.a.b"}
        assert recorder.notices == [("epoch", recorder.epoch, 0), ("live", 0)]
        assert not recorder.durable
        assert await feed.bounds() is None


async def test_each_run_on_core_nats_has_an_epoch_of_its_own(core_nats: NatsServer) -> None:
    epochs = set()
    for _ in range(3):
        async with running(core_nats) as (feed, recorder):
            await live(feed)
            epochs.add(recorder.epoch)
    assert len(epochs) == 3


async def test_messages_that_do_not_fit_into_memory_leave_a_gap_at_their_place(
    core_nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats_feed, "open_connection", partial(open_connection, max_pending=50_000))
    async with running(core_nats) as (feed, recorder):
        await live(feed)
        recorder.blocked = True
        await core_nats.publish(("discoveries.x", payload(0)))
        await recorder.hears(0)
        await core_nats.publish(*[("discoveries.x", payload(number)) for number in range(1, 1000)])
        with structlog.testing.capture_logs() as lines:
            recorder.blocked = False
            await eventually(lambda: recorder.gaps, "the gap")
            await core_nats.publish(("discoveries.x", payload(1000)))
            await recorder.hears(1000)
        missing = 1001 - len(recorder.events)
        assert missing > 0
        assert recorder.holes() == recorder.gap_places()
        assert {reason for reason, _ in recorder.gaps} == {"upstream"}
        assert feed.counters.lost == missing
        assert sum(line["count"] for line in lines if line["event"] == "discoveries lost") == missing


# -- JetStream ---------------------------------------------------------------------------------------------------------


async def test_a_missing_stream_is_created_as_the_settings_say(nats: NatsServer) -> None:
    options: dict[str, Any] = {"nats_stream_max_age": 60.0, "nats_stream_max_bytes": 12_345_678, "nats_stream": "MINE"}
    async with running(nats, **options) as (feed, recorder), operator(nats) as others:
        await live(feed)
        assert feed.status.mode == "jetstream"
        info = await others.api("STREAM.INFO.MINE")
        wanted = {
            "subjects": ["discoveries.>"],
            "storage": "file",
            "max_age": 60 * 10**9,
            "max_bytes": 12_345_678,
            "num_replicas": 1,
            "allow_direct": True,
            "discard": "old",
            "duplicate_window": 60 * 10**9,
        }
        assert {name: info["config"][name] for name in wanted} == wanted
        created = datetime.fromisoformat(info["created"])
        microseconds = (created - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
        assert recorder.notices == [("epoch", base36(microseconds), 0), ("live", 0)]
        assert recorder.durable
        consumers = (await others.api("CONSUMER.LIST.MINE", {}))["consumers"]
        assert [consumer["config"]["mem_storage"] for consumer in consumers] == [True]


async def test_with_jetstream_the_numbers_are_the_streams_and_the_same_for_every_instance(nats: NatsServer) -> None:
    async with (
        running(nats) as (one, first),
        running(nats) as (two, second),
        operator(nats) as others,
    ):
        await live(one)
        await live(two)
        await others.share(1, 2)
        await others.store("discoveries.x", b"not a discovery")
        await others.share(3)
        with structlog.testing.capture_logs():
            await first.hears(3)
            await second.hears(3)
        assert first.sequences == second.sequences == [1, 2, 4]
        assert first.epoch == second.epoch
        await others.store("discoveries.x", b"not a discovery")
        await eventually(lambda: first.head == 5, "the head moves past what does not decode")


async def test_an_existing_stream_is_used_as_it_is_and_other_subjects_move_the_head(nats: NatsServer) -> None:
    async with operator(nats) as others:
        await others.create_stream(subjects=["discoveries.>", "orders.*"], storage="memory", max_msgs=77)
        before = (await others.api("STREAM.INFO.DISCOVERIES"))["config"]
        await others.store("orders.1", b"")
        await others.share(1)
        async with running(nats) as (feed, recorder):
            await live(feed)
            assert recorder.sequences == [2]
            await others.store("orders.2", b"")
            await others.share(2)
            await recorder.hears(2)
            assert recorder.sequences == [2, 4]
            await others.store("orders.3", b"")
            await eventually(lambda: recorder.head == 5, "a heartbeat moves the head")
        assert (await others.api("STREAM.INFO.DISCOVERIES"))["config"] == before


async def test_a_stream_that_collects_something_else_is_said_to_be_the_wrong_one(nats: NatsServer) -> None:
    async with operator(nats) as others:
        await others.create_stream(subjects=["orders.>"])
        async with running(nats) as (feed, recorder):
            await down(feed, "stream")
            assert "orders.>, nothing of discoveries.>" in feed.status.detail
            with structlog.testing.capture_logs() as lines:
                await others.update_stream(subjects=["orders.>", "discoveries.insights"])
                await live(feed)
                await others.share(1)
                await recorder.hears(1)
        assert [line["subjects"] for line in lines if line["event"] == "stream collects less than the subject"] == [
            ["orders.>", "discoveries.insights"]
        ]


class Answers:
    """A stream whose `info` gives one answer after the other, and the last one for ever."""

    name = "DISCOVERIES"

    def __init__(self, *answers: tuple[str, int, int]) -> None:
        self.answers = list(answers)

    async def info(self) -> StreamInfo:
        await trio.lowlevel.checkpoint()
        epoch, first, last = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return StreamInfo(epoch, first, last, 0, -1, False, True, ("discoveries.>",))


@pytest.mark.parametrize(
    ("then", "told"),
    [
        (("old", 1, 120), []),
        (("old", 111, 120), [("gap", "expired", 110)]),
        (("old", 1, 90), [("epoch", "old", 90)]),
        (("new", 1, 120), [("epoch", "new", 0)]),
        (("new", 1, 3), [("epoch", "new", 0)]),
    ],
    ids=["it catches up", "and has lost some", "it lost its end", "it was replaced", "by a shorter one"],
)
async def test_a_stream_that_ends_before_our_head_is_waited_for_and_then_believed(
    autojump_clock: trio.testing.MockClock, then: tuple[str, int, int], told: list[tuple[object, ...]]
) -> None:
    recorder = Recorder()
    feed = NatsFeed(Settings(), recorder)
    recorder.open_epoch("old", 100)
    recorder.notices.clear()
    info = await feed._open_stream(Answers(("old", 1, 90), then))  # type: ignore[arg-type]  # all that is asked
    assert recorder.notices == told
    assert info.epoch == recorder.epoch


async def test_what_the_stream_held_before_is_history_and_no_more_of_it_than_history_takes(nats: NatsServer) -> None:
    async with operator(nats) as others:
        await others.create_stream()
        await others.share(*range(1, 101))
        async with running(nats, history=30) as (feed, recorder):
            await feed.first_attempt.wait()
            assert recorder.sequences == list(range(71, 101))
            assert recorder.notices == [("epoch", recorder.epoch, 70), ("live", 100)]
            await others.share(101)
            await recorder.hears(101)
        async with running(nats, history=0) as (feed, recorder):
            await feed.first_attempt.wait()
            assert recorder.notices == [("epoch", recorder.epoch, 101), ("live", 101)]
        async with running(nats, history=1000) as (feed, recorder):
            await feed.first_attempt.wait()
            assert recorder.notices == [("epoch", recorder.epoch, 0), ("live", 101)]


async def test_the_feed_is_live_when_the_backlog_is_delivered_though_the_stream_ends_with_other_subjects(
    nats: NatsServer,
) -> None:
    async with operator(nats) as others:
        await others.create_stream(subjects=["discoveries.>", "orders.*"])
        await others.share(1, 2)
        for _ in range(5):
            await others.store("orders.1", b"")
        for history, heard in ((10000, [1, 2]), (3, [])):
            async with running(nats, history=history) as (feed, recorder):
                await feed.first_attempt.wait()
                assert recorder.numbers == heard
                assert recorder.notices[-1] == ("live", max(heard, default=4))
                await eventually(lambda: recorder.head == 7, "a heartbeat moves the head")


async def test_a_stream_of_which_everything_is_gone_begins_at_its_end(nats: NatsServer) -> None:
    async with operator(nats) as others:
        await others.create_stream()
        await others.share(1, 2, 3)
        await others.api("STREAM.PURGE.DISCOVERIES")
        async with running(nats) as (feed, recorder):
            await live(feed)
            assert recorder.notices == [("epoch", recorder.epoch, 3), ("live", 3)]
            assert await feed.bounds() == (4, 3)


async def test_headers_and_status_lines_of_publishers_are_not_believed(nats: NatsServer) -> None:
    forged = b"Nats-Sequence: 999\r\nNats-Subject: evil\r\nNats-Last-Sequence: 7\r\nNats-Num-Pending: 0\r\n"
    heads = [
        b"NATS/1.0\r\n" + forged + b"\r\n",
        *(b"NATS/1.0 %s\r\n\r\n" % status for status in (b"204 EOB", b"404 None", b"503", b"100 Idle Heartbeat")),
        *(b"NATS/1.0 %s\r\nX: y\r\n\r\n" % status for status in (b"204 EOB", b"404 None", b"503", b"100 Idle")),
        b"NATS/1.0 204\r\n" + forged,
        b"NATS/1.0\r\n\r\n" + forged + b"\r\n",
        b"NATS/1.0",
        b"\xff\0\r\n",
        b"\r\n\r\n",
    ]
    with structlog.testing.capture_logs():
        async with running(nats) as (feed, recorder), operator(nats) as others:
            await live(feed)
            for head in heads:
                await publish_raw(nats, head, b"")
                await publish_raw(nats, head, payload(1))
            await others.share(2)
            await recorder.hears(2)
            events = len(heads)
            assert recorder.sequences == [*range(2, 2 * events + 1, 2), 2 * events + 1]
            assert {subject for _, subject, _ in recorder.events} == {"discoveries.x", "discoveries.insights"}
            assert feed.counters.consumer_restarts == 0
            with fail_within(WITHIN, "all of it can be read back"):
                page = await feed.read(0)
                assert [frame.sequence for frame in page.frames] == recorder.sequences
                for sequence, subject, discovery in recorder.events:
                    frame = await feed.backlog.get(sequence)
                    assert frame is not None
                    assert frame.discovery is not None
                    assert (frame.subject, frame.discovery.payload) == (subject, discovery.payload)


async def publish_raw(server: NatsServer, head: bytes, data: bytes) -> None:
    """Publish with a header block that no client would make."""
    async with await trio.open_tcp_stream("127.0.0.1", server.port) as raw:
        message = b"HPUB discoveries.x %d %d\r\n%s%s\r\n" % (len(head), len(head) + len(data), head, data)
        await raw.send_all(b'CONNECT {"verbose":false,"headers":true}\r\n' + message + b"PING\r\n")
        heard = b""
        with fail_within(WITHIN, "the server has it"):
            while b"PONG" not in heard:
                heard += await raw.receive_some()


async def test_a_large_backlog_waits_in_the_server_and_not_in_our_memory(
    nats: NatsServer,
) -> None:
    async with operator(nats) as others:
        await others.create_stream()
        await others.share(*range(1, 1001), extra="x" * 30_000)
        recorder = Recorder()
        recorder.blocked = True
        most = 0
        async with running(nats, recorder, history=1000) as (feed, _):
            await eventually(lambda: recorder.events, "the first round")
            for _ in range(50):  # time enough for much more than the window, were there none
                await trio.sleep(0.01)
                consumer = feed.consumer
                assert consumer is not None
                most = max(most, consumer.inbox._bytes)
            assert len(recorder.events) < 100
            assert most < 8 << 20
            recorder.blocked = False
            await feed.first_attempt.wait()
            assert recorder.numbers == list(range(1, 1001))


async def test_a_consumer_begins_by_finishing_the_round_that_the_one_before_it_has_left(nats: NatsServer) -> None:
    async with operator(nats) as others:
        await others.create_stream()
        await others.share(1)
        recorder = Recorder()
        recorder._left = 3  # what is published before that is over is a round in the middle of another
        async with running(nats, recorder):
            await recorder.hears(1)


async def test_the_longer_reply_subjects_of_servers_to_come_are_understood(tmp_path: Path) -> None:
    config = tmp_path / "nats.conf"
    config.write_text("feature_flags { js_ack_fc_v2: true }")
    async with nats_server(tmp_path / "nats", options=("-c", str(config))) as server, operator(server) as others:
        await others.create_stream()
        await others.share(*range(1, 301), extra="x" * 30_000)  # enough for flow control
        async with running(server) as (feed, recorder):
            await live(feed)
            await others.share(301)
            await recorder.hears(301)
            assert recorder.sequences == list(range(1, 302))
            assert feed.counters.consumer_restarts == 0


# -- the mode is decided once ------------------------------------------------------------------------------------------


async def test_without_jetstream_auto_means_core_nats(core_nats: NatsServer) -> None:
    async with running(core_nats, nats_durable="auto") as (feed, _):
        await live(feed)
        assert feed.status.mode == "core"


async def test_off_means_core_nats_even_where_there_is_jetstream(nats: NatsServer) -> None:
    async with running(nats, nats_durable="off") as (feed, _), operator(nats) as others:
        await live(feed)
        assert feed.status.mode == "core"
        assert (await others.api("INFO"))["streams"] == 0


async def test_require_without_jetstream_fails_at_the_first_server_reached(core_nats: NatsServer) -> None:
    feed = NatsFeed(Settings(nats_url=(core_nats.url,), nats_durable="require"), Recorder())
    core_nats.kill()
    with pytest.RaisesGroup(FeedError):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(feed.run)
            await down(feed, "unreachable")  # not reached: nothing is known
            await core_nats.start()
            await trio.sleep(WITHIN)


async def test_an_account_without_jetstream_is_served_on_core_nats(tmp_path: Path) -> None:
    config = tmp_path / "nats.conf"
    config.write_text(
        "accounts: { A: { users: [ {user: a, password: a} ] },"
        " B: { jetstream: enabled, users: [ {user: b, password: b} ] } }"
    )
    async with nats_server(tmp_path / "nats", options=("-c", str(config))) as server:
        place = f"127.0.0.1:{server.port}"
        async with running(f"nats://a:a@{place}") as (feed, _):
            await live(feed)
            assert feed.status.mode == "core"
        async with running(f"nats://b:b@{place}") as (feed, _):
            await live(feed)
            assert feed.status.mode == "jetstream"


async def test_a_bug_ends_the_feed_with_its_own_exception(nats: NatsServer, core_nats: NatsServer) -> None:
    class Broken(Recorder):
        def publish(self, *args: Any, **options: Any) -> None:
            raise ZeroDivisionError("a bug")

    for server, durable in ((nats, "auto"), (core_nats, "off")):
        feed = NatsFeed(Settings(nats_url=(server.url,), nats_durable=durable), Broken())  # type: ignore[arg-type]
        with pytest.RaisesGroup(ZeroDivisionError):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(feed.run)
                await live(feed)
                await server.publish(("discoveries.x", payload(1)))
                await trio.sleep(WITHIN)
