"""Sharing over real nats-servers: what arrives, and what a share says when it cannot.

A share that returns is one that the server has. Each fault has its own test with a server that is killed, frozen,
restarted, full, or has permissions; each ends in time, with a reason, and says whether the discovery may have arrived.
"""

from __future__ import annotations

import gc
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from support import WITHIN, NatsServer, a_discovery, eventually, fail_within, free_port, nats_server

from sse_trio.discovery import InvalidDiscovery, build
from sse_trio.jetstream import JetStream
from sse_trio.nats_connection import Inbox, NatsConnection, open_connection
from sse_trio.nats_protocol import Message
from sse_trio.publisher import Publisher, PublishError, open_publisher

open_agent = partial(open_publisher, agent_id="a1", agent_role="Analysis", within=WITHIN)
"""A publisher with patience: how long things take on a busy machine is not what is tested."""


async def take(inbox: Inbox, count: int) -> list[Message]:
    messages: list[Message] = []
    with fail_within(WITHIN, f"{count} messages arrive"):
        while len(messages) < count:
            messages += await inbox.take()
    return messages


async def make_stream(connection: NatsConnection, **config: Any) -> JetStream:
    request = {"name": "DISCOVERIES", "subjects": ["discoveries.>"], "storage": "file", "allow_direct": True} | config
    answer = await connection.request("$JS.API.STREAM.CREATE.DISCOVERIES", json.dumps(request).encode())
    assert "error" not in json.loads(answer.payload)
    return JetStream(connection, "DISCOVERIES", "discoveries.>")


async def stored(stream: JetStream) -> list[dict[str, Any]]:
    messages, _ = await stream.read(1, 1000)
    return [json.loads(message.payload) for message in messages]


async def fails(publisher: Publisher, **fields: Any) -> PublishError:
    """Why this share does not work."""
    with fail_within(WITHIN, "the share fails"), pytest.raises(PublishError) as caught:
        await publisher.share("Insight", "x", 0.5, **fields)
    return caught.value


async def test_a_share_arrives_on_its_subject_with_its_own_id(core_nats: NatsServer) -> None:
    async with open_connection(core_nats.url) as connection, open_agent(core_nats.url) as publisher:
        inbox = await connection.subscribe("discoveries.>")
        before = datetime.now(UTC)
        one = await publisher.share("anomaly", "unusual login pattern", 0.9)
        two = await publisher.share("Question", "who else?", 1, agent_id="a/2", agent_role="Other", note=[1])
        three = await publisher.share_related("Solution", "patch it", 0, one, timestamp="2009-02-13T23:31:30Z")
        four = await publisher.share_related("Question", "and this?", 0.5, "somewhere else", msg_id="mine")
        messages = await take(inbox, 4)
    assert [message.subject for message in messages] == [
        "discoveries.insights",
        "discoveries.questions",
        "discoveries.connections",
        "discoveries.questions",
    ]
    assert [message.payload for message in messages] == [found.payload for found in (one, two, three, four)]
    ids = [message.headers["Nats-Msg-Id"] for message in messages]
    assert len(set(ids)) == 4
    assert ids[3] == "mine"
    assert (one.agent_id, one.agent_role, one.discovery_type) == ("a1", "Analysis", "Anomaly")
    assert before <= one.timestamp <= datetime.now(UTC)
    assert (two.agent_id, two.agent_role, two.published()["note"]) == ("a/2", "Other", [1])
    assert three.related_to == one.uri
    assert three.uri == "discovery://agents/a1/discoveries/1234567890-Solution-patch-it"
    assert four.related_to == "somewhere else"


async def test_a_discovery_that_is_made_already_is_published_byte_for_byte(core_nats: NatsServer) -> None:
    discovery = build(a_discovery(7))
    async with open_connection(core_nats.url) as connection, open_publisher(core_nats.url) as publisher:
        inbox = await connection.subscribe("discoveries.>")
        await publisher.publish(discovery)
        (message,) = await take(inbox, 1)
    assert message.payload == discovery.payload


async def test_several_tasks_share_one_publisher(core_nats: NatsServer) -> None:
    async with open_connection(core_nats.url) as connection, open_agent(core_nats.url) as publisher:
        inbox = await connection.subscribe("discoveries.>")

        async def agent(number: int) -> None:
            for count in range(20):
                await publisher.share("Insight", f"{count}", 0.5, agent_id=f"agent-{number}")

        with fail_within(WITHIN, "all agents are done"):
            async with trio.open_nursery() as nursery:
                for number in range(20):
                    nursery.start_soon(agent, number)
        heard = [json.loads(message.payload) for message in await take(inbox, 400)]
    for number in range(20):
        own = [found["content"] for found in heard if found["agent_id"] == f"agent-{number}"]
        assert own == [str(count) for count in range(20)]


async def test_where_a_stream_captures_the_subject_a_share_is_stored_when_it_returns(nats: NatsServer) -> None:
    async with open_connection(nats.url) as connection, open_agent(nats.url) as publisher:
        stream = await make_stream(connection)
        for number in range(10):
            await publisher.share("Insight", str(number), 0.5)
            assert [found["content"] for found in await stored(stream)] == [str(n) for n in range(number + 1)]


async def test_the_same_id_is_shared_once(nats: NatsServer) -> None:
    async with open_connection(nats.url) as connection, open_agent(nats.url) as publisher:
        stream = await make_stream(connection)
        for _ in range(3):
            await publisher.share("Insight", "once", 0.5, msg_id="the same")
        assert [found["content"] for found in await stored(stream)] == ["once"]


@asynccontextmanager
async def scripted_jetstream(
    server: NatsServer, api: list[bytes], stream: list[bytes]
) -> AsyncIterator[NatsConnection]:
    """On a server without JetStream, somebody who plays it: answers each question and each share with these."""
    async with open_connection(server.url) as connection, trio.open_nursery() as nursery:
        for subject, answers in (("$JS.API.STREAM.NAMES", api), ("discoveries.>", stream)):
            nursery.start_soon(answer_all, connection, await connection.subscribe(subject), answers)
        yield connection
        nursery.cancel_scope.cancel()


async def answer_all(connection: NatsConnection, inbox: Inbox, answers: list[bytes]) -> None:
    while True:
        for message in await inbox.take():
            for answer in answers if message.reply else []:
                connection.publish_nowait(message.reply.decode(), answer)


YES = b'{"total":1,"streams":["S"]}'


async def test_who_answers_on_the_subject_is_not_taken_for_the_stream(core_nats: NatsServer) -> None:
    junk = [b"", b"thanks", b"[]", b'{"stream":"x"}', b"\xff", b"[" * 100_000]
    async with (
        scripted_jetstream(core_nats, [YES], [*junk, b'{"stream":"S","seq":1}']),
        open_agent(core_nats.url) as publisher,
    ):
        with fail_within(WITHIN, "the share is acknowledged"):
            await publisher.share("Insight", "x", 0.5)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            b'{"error":{"code":503,"err_code":10077,"description":"maximum messages exceeded"}}',
            "maximum messages exceeded",
        ),
        (b'{"error":{}}', "{}"),
        (b'{"error":"no\\n"}', "no"),
    ],
)
async def test_a_refusal_of_any_form_is_one(core_nats: NatsServer, answer: bytes, said: str) -> None:
    async with scripted_jetstream(core_nats, [YES], [answer]), open_agent(core_nats.url) as publisher:
        error = await fails(publisher)
    assert (error.reason, error.uncertain) == ("stream", False)
    assert error.detail.endswith(f": {said}")


@pytest.mark.parametrize("answer", [b"", b"[]", b'{"streams":null}', b'{"error":{"code":503}}', b'{"streams":[]}'])
async def test_where_no_stream_is_named_nobody_is_waited_for(core_nats: NatsServer, answer: bytes) -> None:
    async with scripted_jetstream(core_nats, [answer], []), open_agent(core_nats.url) as publisher:
        with fail_within(WITHIN, "the share is confirmed"):
            await publisher.share("Insight", "x", 0.5)


async def test_a_jetstream_that_does_not_answer_is_an_error_in_time(
    core_nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sse_trio.publisher.API_TIMEOUT", 0.1)
    async with scripted_jetstream(core_nats, [], []), open_agent(core_nats.url) as publisher:
        error = await fails(publisher)
    assert (error.reason, error.uncertain) == ("timeout", False)


@pytest.mark.parametrize("refusing", ["full", "too large"])
async def test_what_the_stream_refuses_is_an_error_in_its_words(nats: NatsServer, refusing: str) -> None:
    config = {"max_msgs": 1, "discard": "new"} if refusing == "full" else {"max_msg_size": 500}
    async with open_connection(nats.url) as connection, open_agent(nats.url) as publisher:
        await make_stream(connection, **config)
        await publisher.share("Insight", "fits", 0.5)
        error = await fails(publisher, note="x" * 500)
    assert (error.reason, error.uncertain) == ("stream", False)
    assert "maximum messages" in error.detail or "message size exceeds" in error.detail


async def test_a_stream_that_is_gone_is_an_error_once_and_then_there_is_none(nats: NatsServer) -> None:
    async with open_connection(nats.url) as connection, open_agent(nats.url) as publisher:
        await make_stream(connection)
        await publisher.share("Insight", "x", 0.5)
        await connection.request("$JS.API.STREAM.DELETE.DISCOVERIES")
        error = await fails(publisher)
        assert (error.reason, error.uncertain) == ("stream", False)
        await publisher.share("Insight", "x", 0.5)


async def test_a_stream_that_is_gone_while_others_listen_is_an_error_in_time(nats: NatsServer) -> None:
    async with (
        open_connection(nats.url) as connection,
        open_publisher(nats.url, agent_id="a1", agent_role="x", within=1) as publisher,
    ):
        await make_stream(connection)
        await connection.subscribe("discoveries.>")
        await publisher.share("Insight", "x", 0.5)
        await connection.request("$JS.API.STREAM.DELETE.DISCOVERIES")
        error = await fails(publisher)
        assert (error.reason, error.uncertain) == ("timeout", True)
        await publisher.share("Insight", "x", 0.5)


async def test_a_stream_that_comes_later_is_noticed(nats: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sse_trio.publisher.NO_STREAM_FOR", 0.0)
    async with open_connection(nats.url) as connection, open_agent(nats.url) as publisher:
        await publisher.share("Insight", "lost", 0.5)
        stream = await make_stream(connection, max_msgs=1, discard="new")
        await publisher.share("Insight", "kept", 0.5)
        assert (await fails(publisher)).reason == "stream"
        assert [found["content"] for found in await stored(stream)] == ["kept"]


async def test_nobody_there_is_an_error_at_once() -> None:
    with fail_within(WITHIN, "the open fails"), pytest.raises(PublishError) as caught:
        async with open_publisher(f"nats://127.0.0.1:{free_port()}"):
            raise AssertionError("not reached")
    assert caught.value.reason == "unreachable"
    assert not caught.value.uncertain


async def test_a_publisher_that_is_run_again_waits_for_a_server_again() -> None:
    publisher = Publisher([f"nats://127.0.0.1:{free_port()}"], agent_id="a1", agent_role="Analysis", within=0.2)
    for _ in range(2):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(publisher.run)
            await trio.testing.wait_all_tasks_blocked()
            assert (await fails(publisher)).reason == "unreachable"
            nursery.cancel_scope.cancel()


async def test_of_several_servers_one_is_enough(core_nats: NatsServer) -> None:
    async with open_agent(f"nats://127.0.0.1:{free_port()}, {core_nats.url}") as publisher:
        await publisher.share("Insight", "x", 0.5)
    async with open_agent([core_nats.url]) as publisher:
        await publisher.share("Insight", "x", 0.5)


async def test_wrong_credentials_are_an_error_at_once_and_are_not_repeated(tmp_path: Path) -> None:
    async with nats_server(tmp_path, options=("--user", "me", "--pass", "right")) as server:
        place = server.url.removeprefix("nats://")
        with fail_within(WITHIN, "the open fails"), pytest.raises(PublishError) as caught:
            async with open_publisher(f"nats://me:wrong@{place}"):
                raise AssertionError("not reached")
        assert caught.value.reason == "auth"
        assert "wrong" not in str(caught.value)
        async with open_agent(f"nats://me:right@{place}") as publisher:
            await publisher.share("Insight", "x", 0.5)


PERMISSIONS = """
authorization { users = [
  { user: all, password: x }
  { user: some, password: x, permissions: { publish: ["discoveries.questions", "$JS.API.>"] } }
  { user: no_api, password: x, permissions: { publish: ["discoveries.>"] } }
  { user: no_inbox, password: x, permissions: { publish: ["discoveries.>", "$JS.API.>"], subscribe: [] } }
  { user: deaf, password: x, permissions: { publish: ["discoveries.>", "$JS.API.>"], subscribe: ["other"] } }
] }
"""


async def test_a_subject_that_is_not_allowed_is_an_error_and_the_others_still_work(tmp_path: Path) -> None:
    (tmp_path / "nats.conf").write_text(PERMISSIONS)
    async with nats_server(tmp_path / "nats", options=("-c", str(tmp_path / "nats.conf"))) as server:
        place = server.url.removeprefix("nats://")
        for captured in (False, True):
            if captured:
                async with open_connection(f"nats://all:x@{place}") as connection:
                    await make_stream(connection)
            async with open_agent(f"nats://some:x@{place}") as publisher:
                error = await fails(publisher)
                assert (error.reason, error.uncertain) == ("permissions", False)
                assert "discoveries.insights" in error.detail
                await publisher.share("Question", "x", 0.5)
                assert (await fails(publisher)).reason == "permissions"


@pytest.mark.parametrize("user", ["no_api", "deaf"])
async def test_who_may_only_publish_can_share(tmp_path: Path, user: str) -> None:
    (tmp_path / "nats.conf").write_text(PERMISSIONS)
    async with nats_server(tmp_path / "nats", options=("-c", str(tmp_path / "nats.conf"))) as server:
        place = server.url.removeprefix("nats://")
        async with open_connection(f"nats://all:x@{place}") as connection:
            stream = await make_stream(connection)
            async with open_agent(f"nats://{user}:x@{place}") as publisher:
                with fail_within(WITHIN, "two shares"):
                    await publisher.share("Insight", "one", 0.5)
                    await publisher.share("Insight", "two", 0.5)

            async def both_are_stored() -> bool:
                return [found["content"] for found in await stored(stream)] == ["one", "two"]

            # The server has them when a share returns; that the stream does, nobody may tell these users.
            await eventually(both_are_stored, "both are stored")


async def test_what_the_server_finds_too_large_is_an_error_and_the_next_works(tmp_path: Path) -> None:
    (tmp_path / "nats.conf").write_text("max_payload: 1024")
    async with (
        nats_server(tmp_path / "nats", options=("-c", str(tmp_path / "nats.conf"))) as server,
        open_agent(server.url) as publisher,
    ):
        error = await fails(publisher, note="x" * 1024)
        assert (error.reason, error.uncertain) == ("refused", False)
        await publisher.share("Insight", "x", 0.5)


async def test_what_is_no_discovery_is_never_sent(core_nats: NatsServer) -> None:
    async with open_connection(core_nats.url) as connection, open_publisher(core_nats.url) as publisher:
        inbox = await connection.subscribe("discoveries.>")
        with pytest.raises(InvalidDiscovery) as caught:
            await publisher.share("Hunch", "x", 2)
        assert [error["field"] for error in caught.value.errors] == [
            "agent_id",
            "agent_role",
            "discovery_type",
            "confidence",
        ]
        with pytest.raises(ValueError, match="line break"):
            await publisher.share("Insight", "x", 0, agent_id="a", agent_role="r", msg_id="a\r\nb: c")
        await publisher.share("Insight", "good", 0, agent_id="a", agent_role="r")
        assert [json.loads(message.payload)["content"] for message in await take(inbox, 1)] == ["good"]


async def test_a_publisher_outlives_its_server(core_nats: NatsServer) -> None:
    async with open_agent(core_nats.url) as publisher:
        for _ in range(3):
            await publisher.share("Insight", "x", 0.5)
            await core_nats.restart()
        core_nats.kill()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(publisher.share, "Insight", "waits for the server", 0.5))
            await core_nats.start()


async def test_a_server_that_stays_away_is_an_error_in_time(core_nats: NatsServer) -> None:
    async with open_publisher(core_nats.url, agent_id="a1", agent_role="x", within=0.5) as publisher:
        core_nats.kill()
        for _ in range(2):
            error = await fails(publisher)
            assert (error.reason, error.uncertain) == ("unreachable", False)
            assert error.detail.startswith("not within 0.5 s: ")


@pytest.mark.parametrize("jetstream", [False, True])
async def test_a_frozen_server_is_an_error_in_time_and_nobody_knows_whether_it_arrived(
    tmp_path: Path, jetstream: bool
) -> None:
    async with (
        nats_server(tmp_path, jetstream=jetstream) as server,
        open_publisher(server.url, agent_id="a1", agent_role="x", within=0.5) as publisher,
    ):
        if jetstream:
            async with open_connection(server.url) as connection:
                await make_stream(connection)
        await publisher.publish(build(a_discovery()))
        server.freeze()
        error = await fails(publisher)
        assert (error.reason, error.uncertain) == ("timeout", True)
        server.thaw()
        await publisher.publish(build(a_discovery()), msg_id=error.msg_id)


async def frozen_share(publisher: Publisher, server: NatsServer, nursery: trio.Nursery, outcome: list[object]) -> None:
    """Start a share that the frozen server does not answer; returns when it is written."""

    async def share() -> None:
        try:
            outcome.append(await publisher.share("Insight", "in doubt", 0.5))
        except PublishError as error:
            outcome.append(error)

    await publisher.share("Insight", "sure", 0.5)
    server.freeze()
    nursery.start_soon(share)
    await trio.testing.wait_all_tasks_blocked()


async def test_a_connection_that_breaks_on_core_nats_leaves_a_share_in_doubt(core_nats: NatsServer) -> None:
    outcome: list[object] = []
    with fail_within(WITHIN, "the share ends"):
        async with open_agent(core_nats.url) as publisher, trio.open_nursery() as nursery:
            await frozen_share(publisher, core_nats, nursery, outcome)
            core_nats.kill()
    (error,) = outcome
    assert isinstance(error, PublishError)
    assert error.uncertain
    assert error.msg_id


async def test_a_connection_that_breaks_over_a_stream_is_nothing_to_worry_about(nats: NatsServer) -> None:
    outcome: list[object] = []
    with fail_within(2 * WITHIN, "the share ends"):
        async with open_agent(nats.url) as publisher:
            async with open_connection(nats.url) as connection:
                await make_stream(connection)
            async with trio.open_nursery() as nursery:
                await frozen_share(publisher, nats, nursery, outcome)
                await nats.restart()
        async with open_connection(nats.url) as connection:
            found = await stored(JetStream(connection, "DISCOVERIES", "discoveries.>"))
    assert not isinstance(outcome[0], PublishError)
    assert [discovery["content"] for discovery in found] == ["sure", "in doubt"]


async def test_what_the_block_raises_comes_out_as_it_is(core_nats: NatsServer) -> None:
    with pytest.raises(KeyError, match="mine"):
        async with open_publisher(core_nats.url):
            raise KeyError("mine")


async def test_after_its_block_a_publisher_is_closed_and_nothing_is_left(core_nats: NatsServer) -> None:
    before = trio.lowlevel.current_statistics().tasks_living
    async with open_agent(core_nats.url) as publisher:
        await publisher.share("Insight", "x", 0.5)
    assert trio.lowlevel.current_statistics().tasks_living == before
    error = await fails(publisher)
    assert (error.reason, error.uncertain) == ("closed", False)
    with trio.move_on_after(0.02) as scope:
        async with open_agent(core_nats.url) as publisher:
            while True:
                await publisher.share("Insight", "x", 0.5)
    assert scope.cancelled_caught
    del publisher
    gc.collect()  # a warning would be an error
