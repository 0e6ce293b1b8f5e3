"""NATS goes away in every way, and the feed says so, comes back by itself, and accounts for what it has missed.

Real servers that the test kills, freezes and starts again; streams that are deleted, replaced, purged, full; a cluster
whose leader dies. The books must balance: what was published was heard once and in order, or there is a gap.
"""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import structlog.testing
import trio
import trio.lowlevel
from recorder import Recorder, down, fake_server, live, operator, running
from support import WITHIN, NatsServer, eventually, fail_within, free_port, nats_server, payload

from sse_trio import consumer, nats_feed
from sse_trio.jetstream import JetStream
from sse_trio.nats_connection import NatsError, open_connection


@pytest.fixture
def quick_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """A consumer that is gone is noticed in half a second."""
    monkeypatch.setattr(consumer, "HEARTBEAT", 0.15)


@pytest.fixture
def quick_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen server is noticed in half a second."""
    quick = partial(open_connection, ping_interval=0.15, connect_timeout=0.5)
    monkeypatch.setattr(nats_feed, "open_connection", quick)


class Publisher:
    """Publishes numbered discoveries, each until the stream says that it has it: those are the ones that count."""

    def __init__(self, *urls: str) -> None:
        self.urls = urls
        self.stored = 0
        """The last number that the stream has."""
        self.running = True

    async def run(self, pause: float = 0.002) -> None:
        turn = 0
        while self.running:
            turn += 1
            try:
                async with open_connection(self.urls[turn % len(self.urls)], connect_timeout=1) as connection:
                    while self.running:
                        number = self.stored + 1
                        # The id makes a repeated one a duplicate, whether or not the first came through.
                        await connection.request(
                            "discoveries.insights",
                            payload(number),
                            headers={"Nats-Msg-Id": str(number)},
                            within=1,
                        )
                        self.stored = number
                        await trio.sleep(pause)
            except NatsError:
                await trio.sleep(0.02)

    async def reaches(self, number: int) -> None:
        await eventually(lambda: self.stored >= number, f"{number} discoveries are published; {self.stored} are")

    async def balances(self, recorder: Recorder) -> None:
        """Everything published was heard once, in order, without a gap."""
        self.running = False
        await trio.lowlevel.checkpoint()
        await eventually(lambda: recorder.events and recorder.numbers[-1] >= self.stored, "everything is heard")
        assert recorder.numbers == list(range(1, recorder.numbers[-1] + 1))
        assert recorder.gaps == []


# -- core NATS ---------------------------------------------------------------------------------------------------------


async def test_a_server_that_is_not_there_at_start_is_said_once_and_found_when_it_comes(core_nats: NatsServer) -> None:
    core_nats.kill()
    with structlog.testing.capture_logs() as lines:
        async with running(core_nats) as (feed, recorder):
            await feed.first_attempt.wait()
            assert (feed.status.live, feed.status.reason, feed.status.mode) == (False, "unreachable", None)
            assert str(core_nats.port) in feed.status.detail
            await eventually(lambda: feed.counters.attempts > 4, "several tries")
            await core_nats.start()
            await live(feed)
            assert recorder.gaps == []
            assert feed.status.reconnects == 0
    assert [line["event"] for line in lines] == ["feed down", "feed live"]
    assert lines[0]["reason"] == "unreachable"
    assert lines[0]["detail"].endswith(f":{core_nats.port}: connection refused")
    assert lines[0]["next"] == "it is tried again; NATS_URL names another"


async def test_a_killed_server_leaves_a_gap_when_it_is_back_and_the_numbers_go_on(core_nats: NatsServer) -> None:
    with structlog.testing.capture_logs() as lines:
        async with running(core_nats) as (feed, recorder):
            await live(feed)
            epoch = recorder.epoch
            await core_nats.publish(("discoveries.x", payload(1)))
            await recorder.hears(1)
            for outage in (1, 2):
                core_nats.kill()
                await down(feed, "unreachable")
                since = feed.status.since
                await eventually(lambda: feed.counters.attempts > 4, "several tries")
                assert feed.status.since == since
                await core_nats.start()
                await live(feed)
                assert feed.status.reconnects == feed.counters.reconnects == outage
            await core_nats.publish(("discoveries.x", payload(2)))
            await recorder.hears(2)
            assert recorder.epoch == epoch
            assert recorder.gaps == [("upstream", 2), ("upstream", 3)]
            assert recorder.sequences == [1, 4]
    assert [line["event"] for line in lines] == ["feed live", *["feed down", "feed live"] * 2]


@pytest.mark.usefixtures("quick_pings")
async def test_a_frozen_server_is_an_outage_and_ends_when_it_thaws(core_nats: NatsServer) -> None:
    async with running(core_nats) as (feed, recorder):
        await live(feed)
        core_nats.freeze()
        await eventually(lambda: feed.status.reason == "frozen", "the silence is noticed")
        await eventually(lambda: feed.status.reason == "timeout", "no new connection is answered")
        core_nats.thaw()
        await live(feed)
        assert recorder.gaps == [("upstream", 1)]


async def test_rejected_credentials_are_said_without_them_and_tried_again(tmp_path: Path) -> None:
    async with nats_server(tmp_path / "nats", jetstream=False, options=("--user", "me", "--pass", "other")) as server:
        with structlog.testing.capture_logs() as lines:
            async with running(f"nats://me:s3cret@127.0.0.1:{server.port}") as (feed, _):
                await down(feed, "auth")
                assert "s3cret" not in feed.status.detail
                await eventually(lambda: feed.counters.attempts > 3, "several tries")
                server.kill()
                server.options = ("--user", "me", "--pass", "s3cret")
                await server.start()
                await live(feed)
    assert [line.get("reason") for line in lines if line["event"] == "feed down"][:1] == ["auth"]
    assert "s3cret" not in repr(lines)


async def test_a_server_that_hangs_up_at_once_is_asked_less_and_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nats_feed, "LAST_DELAY", 0.8)
    connections: list[float] = []

    async def serve(stream: trio.SocketStream) -> None:
        connections.append(trio.current_time())
        await stream.send_all(b'INFO {"version":"2.15.1","max_payload":1048576,"headers":true}\r\n')
        pings = 0
        async for data in stream:
            pings += data.count(b"PING\r\n")
            await stream.send_all(b"PONG\r\n" * data.count(b"PING\r\n"))
            if pings > 2:  # the greeting's, the first flush, the subscription
                return

    async with fake_server(serve) as url, running(url, nats_durable="off") as (feed, recorder):
        await eventually(lambda: len(connections) >= 7, "seven connections")
        assert len(recorder.gaps) >= 5
        pauses = [later - sooner for sooner, later in pairwise(connections)]
        assert min(pauses[4:]) >= 0.4
        assert feed.status.reason == "unreachable" or feed.status.live


async def test_a_subject_that_may_not_be_subscribed_is_said_to_be_the_cause(tmp_path: Path) -> None:
    config = tmp_path / "nats.conf"
    config.write_text('authorization: { users: [ {user: a, password: b, permissions: {subscribe: ["other"]}} ] }')
    async with (
        nats_server(tmp_path / "nats", jetstream=False, options=("-c", str(config))) as server,
        running(f"nats://a:b@127.0.0.1:{server.port}", nats_durable="off") as (feed, _),
    ):
        await down(feed, "permissions")
        assert "discoveries.>" in feed.status.detail


async def test_a_server_without_tls_is_refused_where_tls_is_asked_for(core_nats: NatsServer) -> None:
    async with running(core_nats.url.replace("nats://", "tls://")) as (feed, _):
        await down(feed, "tls")


async def test_several_servers_are_tried_in_turn(tmp_path: Path) -> None:
    async with (
        nats_server(tmp_path / "1", jetstream=False) as one,
        nats_server(tmp_path / "2", jetstream=False) as two,
        running(f"{one.url},{two.url}") as (feed, recorder),
    ):
        await live(feed)
        assert feed.status.server == f"127.0.0.1:{one.port}"
        one.kill()
        await eventually(lambda: feed.status.server == f"127.0.0.1:{two.port}", "the other one serves")
        await one.start()
        two.kill()
        await eventually(lambda: feed.status.server == f"127.0.0.1:{one.port}", "the first one serves again")
        assert recorder.gaps == [("upstream", 1), ("upstream", 2)]


async def test_the_books_balance_over_outages_on_core_nats(core_nats: NatsServer) -> None:
    async with running(core_nats) as (feed, recorder):
        await live(feed)
        number = 0
        for _ in range(3):
            for _ in range(50):
                number += 1
                await core_nats.publish(("discoveries.x", payload(number)))
            core_nats.kill()
            number += 10  # nobody is there to publish these to
            await down(feed, "unreachable")
            await core_nats.start()
            await live(feed)
        await core_nats.publish(("discoveries.x", payload(number + 1)))
        await recorder.hears(number + 1)
        assert recorder.holes() == recorder.gap_places()
        assert len(recorder.gaps) == 3


# -- JetStream: servers ------------------------------------------------------------------------------------------------


async def test_nothing_is_lost_when_the_server_is_killed_and_started_at_a_steady_rate(nats: NatsServer) -> None:
    publisher = Publisher(nats.url)
    async with running(nats) as (feed, recorder):
        await live(feed)
        epoch = recorder.epoch
        async with trio.open_nursery() as nursery:
            nursery.start_soon(publisher.run)
            for outage in (1, 2, 3):
                await publisher.reaches(publisher.stored + 100)
                nats.kill()
                await down(feed, "unreachable")
                await nats.start()
                await live(feed)
                assert feed.status.reconnects == outage
            await publisher.reaches(publisher.stored + 100)
            await publisher.balances(recorder)
        assert recorder.epochs == [(epoch, 0)]


@pytest.mark.usefixtures("quick_pings")
async def test_nothing_is_lost_when_the_server_is_frozen(nats: NatsServer) -> None:
    publisher = Publisher(nats.url)
    async with running(nats) as (feed, recorder):
        await live(feed)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(publisher.run)
            await publisher.reaches(100)
            nats.freeze()
            await eventually(lambda: not feed.status.live, "the silence is noticed")
            nats.thaw()
            await live(feed)
            await publisher.reaches(publisher.stored + 100)
            await publisher.balances(recorder)


async def test_a_durable_feed_never_falls_back_to_core_nats(nats: NatsServer) -> None:
    async with running(nats) as (feed, recorder), operator(nats) as others:
        await live(feed)
        await others.share(1)
        await recorder.hears(1)
        nats.kill()
        nats.jetstream = False
        await nats.start()
        await down(feed, "stream")
        assert "JetStream is not available" in feed.status.detail
        assert feed.status.mode == "jetstream"
        nats.kill()
        nats.jetstream = True
        await nats.start()
        await live(feed)
        async with operator(nats) as again:
            await again.share(2)
        await recorder.hears(2)
        assert recorder.numbers == [1, 2]
        assert recorder.gaps == []


# -- JetStream: consumers and streams ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick_heartbeats")
async def test_a_deleted_consumer_is_noticed_and_replaced_without_a_loss(nats: NatsServer) -> None:
    async with running(nats) as (feed, recorder), operator(nats) as others:
        await live(feed)
        await others.share(1)
        await recorder.hears(1)
        assert feed.consumer is not None
        await others.api(f"CONSUMER.DELETE.DISCOVERIES.{feed.consumer.name}")
        await others.share(2)
        await recorder.hears(2)
        assert recorder.sequences == [1, 2]
        assert feed.counters.consumer_restarts == 1
        await live(feed)
        await others.share(3)
        await recorder.hears(3)
        assert len((await others.api("CONSUMER.LIST.DISCOVERIES", {}))["consumers"]) == 1


@pytest.mark.usefixtures("quick_heartbeats")
async def test_a_message_that_never_came_is_noticed_and_read_again(nats: NatsServer) -> None:
    async with running(nats) as (feed, recorder), operator(nats) as others:
        await live(feed)
        await others.share(1)
        await recorder.hears(1)
        assert feed.consumer is not None
        inbox = feed.consumer.inbox
        push, passed = inbox.push, 0

        def lose_one(message: object) -> None:
            nonlocal passed
            passed += 1
            if passed != 2:
                push(message)  # type: ignore[arg-type]

        feed.consumer.inbox._connection.sinks[inbox._sid] = lose_one
        await others.share(*range(2, 12))
        await recorder.hears(11)
        assert recorder.numbers == list(range(1, 12))
        assert feed.counters.consumer_restarts == 1


@pytest.mark.usefixtures("quick_heartbeats")
async def test_a_last_message_that_never_came_shows_in_the_heartbeat(nats: NatsServer) -> None:
    async with running(nats) as (feed, recorder), operator(nats) as others:
        await live(feed)
        assert feed.consumer is not None
        inbox = feed.consumer.inbox
        push = inbox.push
        feed.consumer.inbox._connection.sinks[inbox._sid] = lambda message: None if message.payload else push(message)
        await others.share(1)
        await recorder.hears(1)
        assert feed.counters.consumer_restarts == 1


@pytest.mark.usefixtures("quick_heartbeats")
async def test_a_deleted_stream_is_created_again_as_another_one(nats: NatsServer) -> None:
    async with running(nats) as (feed, recorder), operator(nats) as others:
        await live(feed)
        await others.share(1, 2, 3)
        await recorder.hears(3)
        epoch = recorder.epoch
        await others.api("STREAM.DELETE.DISCOVERIES")
        await eventually(lambda: recorder.epoch != epoch, "another stream")
        await live(feed)
        await others.share(4)
        await recorder.hears(4)
        assert recorder.sequences == [1, 2, 3, 1]
        assert recorder.epochs == [(epoch, 0), (recorder.epoch, 0)]


@pytest.mark.usefixtures("quick_heartbeats")
async def test_a_stream_that_somebody_replaced_is_heard_from_its_beginning(nats: NatsServer) -> None:
    async with running(nats) as (feed, recorder), operator(nats) as others:
        await live(feed)
        await others.share(1, 2, 3)
        await recorder.hears(3)
        epoch = recorder.epoch
        await others.api("STREAM.DELETE.DISCOVERIES")
        await others.create_stream(first_seq=100)
        await others.share(4, 5)
        await recorder.hears(5)
        assert recorder.epochs == [(epoch, 0), (recorder.epoch, 99)]
        assert recorder.sequences == [1, 2, 3, 100, 101]
        page = await feed.read(99)
        assert [frame.id for frame in page.frames] == [f"{recorder.epoch}-100", f"{recorder.epoch}-101"]


async def test_a_stream_that_is_replaced_while_the_consumer_is_made_is_noticed(
    nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The consumer would wait for the old stream's next number in the new one: in silence, and with heartbeats.
    consume = JetStream.consume
    async with operator(nats) as others:
        await others.create_stream()
        await others.share(*range(1, 101))
        replaced: list[int] = []

        async def too_late(self: JetStream, start: int) -> consumer.Consumer:
            if not replaced:
                replaced.append(start)
                await others.api("STREAM.DELETE.DISCOVERIES")
                await others.create_stream()
            return await consume(self, start)

        monkeypatch.setattr(JetStream, "consume", too_late)
        async with running(nats) as (feed, recorder):
            await live(feed)
            await others.share(1, 2)
            await recorder.hears(2)
            assert recorder.sequences == [1, 2]
            assert replaced == [1]


async def test_a_consumer_of_a_replica_that_lags_has_still_to_give_what_the_leader_has(
    nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It says that nothing is waiting for it, while the leader says where the stream ends. Who resumed in between from a
    # place before that end was taken to be there, and what came then was not for it any more.
    caught_up = trio.Event()

    class Lagging(consumer.Consumer):
        async def take(self) -> consumer.Batch:
            await caught_up.wait()
            return await super().take()

    consume = JetStream.consume

    async def behind(self: JetStream, start: int) -> consumer.Consumer:
        made = await consume(self, start)
        return Lagging(made.connection, made.name, made.inbox, 0)

    monkeypatch.setattr(JetStream, "consume", behind)
    async with operator(nats) as others:
        await others.create_stream()
        await others.share(*range(1, 11))
        async with running(nats, history=5) as (feed, recorder):
            await live(feed)
            assert recorder.head == 5, "the head is where the consumer is"
            caught_up.set()
            await recorder.hears(10)
            assert recorder.sequences == [6, 7, 8, 9, 10]


async def test_a_purge_takes_nothing_from_a_feed_that_was_up_to_date(nats: NatsServer) -> None:
    async with running(nats) as (feed, recorder), operator(nats) as others:
        await live(feed)
        await others.share(1, 2, 3)
        await recorder.hears(3)
        await others.api("STREAM.PURGE.DISCOVERIES")
        await others.share(4)
        await recorder.hears(4)
        nats.kill()
        await down(feed, "unreachable")
        await nats.start()
        await live(feed)
        assert recorder.sequences == [1, 2, 3, 4]
        assert recorder.gaps == []


async def test_what_retention_takes_while_the_feed_is_away_is_a_gap(nats: NatsServer) -> None:
    async with operator(nats) as others:
        await others.create_stream(max_msgs=10)
        async with running(nats) as (feed, recorder):
            await live(feed)
            await others.share(1, 2, 3)
            await recorder.hears(3)
        # The same feed, away for a while.
        await others.share(*range(4, 51))
        async with running(nats, recorder, feed=feed):
            await recorder.hears(50)
        assert recorder.numbers == [1, 2, 3, *range(41, 51)]
        assert recorder.gaps == [("expired", 40)]


async def test_what_retention_takes_under_a_feed_that_is_too_slow_is_a_gap_at_its_place(nats: NatsServer) -> None:
    async with operator(nats) as others:
        await others.create_stream(max_bytes=3 << 20)
        async with running(nats) as (feed, recorder):
            await live(feed)
            await others.share(1)
            await recorder.hears(1)
            recorder.blocked = True
            await others.share(*range(2, 1001), extra="x" * 30_000)
            recorder.blocked = False
            await recorder.hears(1000)
            assert recorder.gaps
            assert recorder.holes() == recorder.gap_places()
            assert {reason for reason, _ in recorder.gaps} == {"expired"}


async def test_deleted_messages_and_other_subjects_are_no_gap(nats: NatsServer) -> None:
    async with operator(nats) as others:
        await others.create_stream(subjects=["discoveries.>", "orders.*"])
        for number in range(1, 101):
            await others.share(number)
            await others.store("orders.1", b"")
        await others.api("STREAM.MSG.DELETE.DISCOVERIES", {"seq": 21})
        async with running(nats) as (feed, recorder):
            await live(feed)
            assert recorder.numbers == [*range(1, 11), *range(12, 101)]
            assert recorder.gaps == []


async def test_a_stream_that_lost_its_end_begins_anew_from_where_it_is(
    nats: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats_feed, "ROLLBACK_PATIENCE", 0.3)
    async with running(nats) as (feed, recorder):
        await live(feed)
        async with operator(nats) as others:
            await others.share(1, 2, 3)
        await recorder.hears(3)
        nats.kill()
        shutil.copytree(nats.directory / "store", tmp_path / "copy")
        await nats.start()
        await live(feed)
        async with operator(nats) as others:
            await others.share(4, 5, 6)
        await recorder.hears(6)
        nats.kill()
        shutil.rmtree(nats.directory / "store")
        shutil.move(tmp_path / "copy", nats.directory / "store")
        await nats.start()
        await eventually(lambda: len(recorder.epochs) == 2, "the loss is noticed")
        await live(feed)
        async with operator(nats) as others:
            await others.share(7)
        await recorder.hears(7)
        assert recorder.epochs == [(recorder.epoch, 0), (recorder.epoch, 3)]
        assert recorder.sequences == [1, 2, 3, 4, 5, 6, 4]
        assert [frame.sequence for frame in (await feed.read(0)).frames] == [1, 2, 3, 4]


async def test_a_stream_that_refuses_new_messages_is_said_to_be_full(
    nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats_feed, "WATCH_INTERVAL", 0.05)
    async with operator(nats) as others:
        await others.create_stream(max_bytes=20_000, discard="new")
        with structlog.testing.capture_logs() as lines:
            async with running(nats) as (feed, _):
                await live(feed)
                await others.share(*range(1, 201))
                await eventually(lambda: "full" in feed.status.detail, f"it is said: {feed.status}")
                assert feed.status.live
                await others.api("STREAM.PURGE.DISCOVERIES")
                await eventually(lambda: not feed.status.detail, "it is taken back")
    assert [line["event"] for line in lines].count("stream full") == 1


async def test_a_stream_that_cannot_be_made_is_said_and_made_when_it_can(nats: NatsServer) -> None:
    async with operator(nats) as others:
        await others.create_stream(name="OTHER", subjects=["discoveries.*"])
        async with running(nats) as (feed, recorder):
            await down(feed, "stream")
            assert "overlap" in feed.status.detail
            await others.api("STREAM.DELETE.OTHER")
            await live(feed)
            await others.share(1)
            await recorder.hears(1)


# -- a cluster ---------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def cluster(directory: Path) -> AsyncIterator[dict[str, NatsServer]]:
    """Three servers with JetStream, by name."""
    ports = [free_port() for _ in range(3)]
    routes = ",".join(f"nats://127.0.0.1:{port}" for port in ports)
    servers: dict[str, NatsServer] = {}
    for number, port in enumerate(ports):
        name = f"n{number}"
        servers[name] = NatsServer(
            directory / name,
            options=("-n", name, "--cluster_name", "c", "--cluster", f"nats://127.0.0.1:{port}", "--routes", routes),
        )
    try:
        for server in servers.values():
            await server.start()
        yield servers
    finally:
        for server in servers.values():
            server.kill()


async def leader_of(servers: dict[str, NatsServer]) -> str:
    """The name of the stream's leader, as soon as one of the servers knows it."""

    async def ask() -> str:
        for server in servers.values():
            if server.process is not None:
                try:
                    async with operator(server) as others:
                        answer = await others.api("STREAM.INFO.DISCOVERIES")
                        return str(answer["cluster"].get("leader", ""))
                except (NatsError, AssertionError):
                    continue
        return ""

    found = await eventually(ask, "the stream has a leader")
    return str(found)


async def test_nothing_is_lost_when_the_streams_leader_dies_in_a_cluster_of_three(tmp_path: Path) -> None:
    async with cluster(tmp_path) as servers:
        urls = [server.url for server in servers.values()]
        publisher = Publisher(*urls)
        async with running(",".join(urls), nats_stream_replicas=3) as (feed, recorder):
            await live(feed, within=2 * WITHIN)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(publisher.run)
                await publisher.reaches(100)
                name = await leader_of(servers)
                servers[name].kill()
                await publisher.reaches(publisher.stored + 100)
                await servers[name].start()
                await publisher.reaches(publisher.stored + 50)
                with fail_within(2 * WITHIN, "everything is heard"):
                    await publisher.balances(recorder)
            assert feed.status.live
            assert len(recorder.epochs) == 1
            assert feed.broadcaster.head >= publisher.stored
