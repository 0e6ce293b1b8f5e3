"""What JetStream says, understood or refused: a consumer's messages sorted, odd answers survived, streams described.

With a connection that answers from a script; what a real server says is in test_nats_feed.py and test_backlog.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, cast

import pytest
import trio
import trio.testing

from sse_trio.consumer import HEARTBEAT, Batch, Consumer, ConsumerBroken, StoredMessage
from sse_trio.jetstream import JetStream, JetStreamError, JetStreamUnavailable, base36
from sse_trio.nats_connection import Inbox, NatsConnection
from sse_trio.nats_protocol import Message, NatsError, NoResponders, RequestTimeout, error_reason


class Scripted:
    """A connection whose requests are answered by operation; an answer may be an error."""

    def __init__(self, **answers: object) -> None:
        self.server = "nats.example:4222"
        self.server_info: dict[str, Any] = {"version": "2.15.1"}
        self.failure: NatsError | None = None
        self.max_pending = 10_000
        self.answers = answers
        self.requests: list[tuple[str, Any]] = []
        self.published: list[str] = []

    def _answer(self, subject: str, payload: bytes) -> Any:
        operation = subject.removeprefix("$JS.API.")
        self.requests.append((operation, json.loads(payload) if payload else None))
        name = operation.replace(".S", "").replace(".", "_")
        answer = self.answers[name]
        if callable(answer):
            answer = answer(self.requests[-1][1])
        if isinstance(answer, list) and not subject.startswith("$JS.API.DIRECT"):
            answer = answer.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def request(self, subject: str, payload: bytes = b"", *, within: float = 5.0) -> Message:
        await trio.lowlevel.checkpoint()
        answer = self._answer(subject, payload)
        return Message(b"", b"", answer if isinstance(answer, bytes) else json.dumps(answer).encode(), None)

    async def request_many(self, subject: str, payload: bytes, *, until: Callable[[Message], bool]) -> list[Message]:
        await trio.lowlevel.checkpoint()
        answers = cast("list[Message]", self._answer(subject, payload))
        assert [until(message) for message in answers] == [False] * (len(answers) - 1) + [True]
        return list(answers)

    def publish_nowait(self, subject: str, payload: bytes = b"") -> None:
        self.published.append(subject)

    def unsubscribe(self, sid: int) -> None:
        pass


def stream_of(**answers: object) -> tuple[JetStream, Scripted]:
    connection = Scripted(**answers)
    return JetStream(cast("NatsConnection", connection), "S", "discoveries.>"), connection


def error(code: int, description: str = "no") -> dict[str, Any]:
    return {"error": {"code": 400, "err_code": code, "description": description}}


def info(**changes: Any) -> dict[str, Any]:
    config = {"subjects": ["discoveries.>"], "max_bytes": -1, "discard": "old", "allow_direct": True}
    state = {"first_seq": 0, "last_seq": 0, "bytes": 0}
    return {
        "created": "2026-11-24T16:40:12.96494741Z",
        "config": config | {name: value for name, value in changes.items() if name in config},
        "state": state | {name: value for name, value in changes.items() if name in state},
    }


# -- the consumer ------------------------------------------------------------------------------------------------------


def data(
    stream: int, consumer: int, pending: int = 0, payload: bytes = b"x", prefix: str = "", tail: str = ""
) -> Message:
    reply = f"$JS.ACK.{prefix}S.c.1.{stream}.{consumer}.1795538412968407057.{pending}{tail}"
    return Message(b"discoveries.x", reply.encode(), payload, None)


def control(status: str, reply: str = "", **fields: object) -> Message:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
    return Message(b"_INBOX.x", reply.encode(), b"", f"NATS/1.0 {status}\r\n{lines}\r\n".encode())


def consumer_with(*messages: Message) -> tuple[Consumer, Scripted]:
    connection = cast("NatsConnection", Scripted())
    inbox = Inbox(connection, 1, "_INBOX.x")
    for message in messages:
        inbox.push(message)
    return Consumer(connection, "c", inbox, 0), cast("Scripted", connection)


async def test_messages_come_with_the_sequence_and_the_rest_that_the_server_put_into_the_reply() -> None:
    consumer, _ = consumer_with(
        data(7, 1, 5, b"a"),
        data(9, 2, 4, b"b"),
        data(12, 3, 3, b"c", prefix="domain.account.", tail="._token"),
        data(13, 4, 2, b"d", prefix="domain.account."),
    )
    batch = await consumer.take()
    assert batch == Batch(
        [StoredMessage(n, "discoveries.x", p) for n, p in ((7, b"a"), (9, b"b"), (12, b"c"), (13, b"d"))],
        [5, 4, 3, 2],
        0,
    )


async def test_flow_control_is_answered_when_the_caller_is_done_with_what_came_before() -> None:
    consumer, connection = consumer_with(
        data(1, 1),
        control("100 FlowControl Request", reply="$JS.FC.S.c.1"),
        data(2, 2),
        control("100 Idle Heartbeat", Nats_Last_Consumer=2, Nats_Last_Stream=2, Nats_Consumer_Stalled="$JS.FC.S.c.2"),
    )
    batch = await consumer.take()
    assert [message.sequence for message in batch.messages] == [1, 2]
    assert batch.skipped_to == 0  # a stalled consumer does not know what follows
    assert connection.published == []
    consumer.inbox.push(data(3, 3))
    await consumer.take()
    assert connection.published == ["$JS.FC.S.c.1", "$JS.FC.S.c.2"]


async def test_a_heartbeat_tells_what_of_others_was_passed() -> None:
    consumer, _ = consumer_with(data(1, 1), control("100 Idle Heartbeat", Nats_Last_Consumer=1, Nats_Last_Stream=9))
    assert (await consumer.take()).skipped_to == 9
    consumer.inbox.push(control("100 Idle Heartbeat", Nats_Last_Consumer=1, Nats_Last_Stream=12))
    consumer.inbox.push(data(13, 2))
    assert (await consumer.take()).skipped_to == 0


@pytest.mark.parametrize(
    ("odd", "cause"),
    [
        (data(9, 3), "message 2 is missing, 3 came"),
        (data(1, 1), "message 2 is missing, 1 came"),
        (control("100 Idle Heartbeat", Nats_Last_Consumer=2, Nats_Last_Stream=2), "message 2 was sent, 1 came"),
        (control("409 Consumer Deleted"), "409 Consumer Deleted"),
        (control("100 Idle Heartbeat"), "message None was sent"),
        (Message(b"_INBOX.x", b"", b"a stranger's", None), "the server says: None"),
    ],
)
async def test_what_came_before_the_first_oddity_is_given_and_then_the_consumer_is_broken(
    odd: Message, cause: str
) -> None:
    consumer, _ = consumer_with(data(1, 1), odd, data(10, 4))
    assert [message.sequence for message in (await consumer.take()).messages] == [1]
    with pytest.raises(ConsumerBroken, match=cause) as caught:
        await consumer.take()
    assert not caught.value.silent


@pytest.mark.parametrize("reply", [b"$JS.ACK.", b"$JS.ACK.S.c.1.x.1.1.0", b"$JS.ACK.S.c.1.1.\xff.1.0"])
async def test_a_reply_subject_that_is_not_understood_breaks_the_consumer(reply: bytes) -> None:
    consumer, _ = consumer_with(Message(b"s", reply, b"", None))
    with pytest.raises(ConsumerBroken, match="odd"):
        await consumer.take()


async def test_silence_breaks_the_consumer(autojump_clock: trio.testing.MockClock) -> None:
    consumer, _ = consumer_with()
    with pytest.raises(ConsumerBroken) as caught:
        await consumer.take()
    assert caught.value.silent
    assert trio.current_time() == 3 * HEARTBEAT


async def test_messages_that_did_not_fit_break_the_consumer_behind_those_that_did() -> None:
    consumer, _ = consumer_with(*(data(number, number, payload=b"x" * 1000) for number in range(1, 11)))
    assert [message.sequence for message in (await consumer.take()).messages] == list(range(1, 8))
    with pytest.raises(ConsumerBroken, match="3 messages did not fit"):
        await consumer.take()


async def test_an_inbox_gives_a_long_queue_in_portions_and_says_what_was_lost_behind_it_at_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sse_trio.nats_connection.TAKEN_AT_ONCE", 4)
    consumer, connection = consumer_with()
    inbox = consumer.inbox
    connection.max_pending = 10 * 301
    for number in range(13):
        inbox.push(data(number, number, payload=b"%d" % (number % 10)))
    taken = []
    while not inbox.lost:
        taken.append([message.payload for message in await inbox.take()])
        inbox.push(data(99, 99))  # it stays full until what it held was taken
    assert [len(portion) for portion in taken] == [4, 4, 2]
    assert inbox.lost == 5
    inbox = consumer_with(*(data(number, number) for number in range(9)))[0].inbox
    await inbox.take()
    assert inbox._bytes == 5 * 301
    await inbox.take()
    await inbox.take()
    assert (inbox._bytes, inbox.lost) == (0, 0)


# -- the API -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "available"),
    [
        ({}, True),
        (error(10039), False),
        (error(10076), False),
        (NoResponders("no-responders", "nobody"), False),
        (NatsError("permissions", "may not"), False),
    ],
)
async def test_whether_there_is_jetstream_is_known_where_it_is_said(answer: object, available: bool) -> None:
    stream, _ = stream_of(INFO=answer)
    assert await stream.is_available() == available


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(error(10008, "temporarily unavailable"), "stream"), (RequestTimeout("timeout", "no answer"), "timeout")],
)
async def test_whether_there_is_jetstream_is_not_decided_by_a_failure(answer: object, reason: str) -> None:
    stream, _ = stream_of(INFO=answer)
    with pytest.raises(NatsError) as caught:
        await stream.is_available()
    assert caught.value.reason == reason


async def test_a_stream_that_is_missing_is_none_and_other_errors_are_errors() -> None:
    stream, connection = stream_of(STREAM_INFO=[error(10059), error(10008), NoResponders("no-responders", "x"), info()])
    assert await stream.info() is None
    with pytest.raises(JetStreamError) as refused:
        await stream.info()
    assert (refused.value.code, refused.value.reason) == (10008, "stream")
    with pytest.raises(JetStreamUnavailable):
        await stream.info()
    found = await stream.info()
    assert found is not None
    assert (found.epoch, found.first, found.last) == (base36(1795538412964947), 1, 0)
    assert connection.requests == [("STREAM.INFO.S", None)] * 4


@pytest.mark.parametrize(
    "odd", [b"", b"nonsense", b"[]", b"null", b"{}", b'{"created":"yesterday"}', b'{"config":{},"state":{}}']
)
async def test_an_answer_that_is_not_understood_ends_the_connection_and_not_the_process(odd: bytes) -> None:
    stream, _ = stream_of(STREAM_INFO=odd, STREAM_MSG_GET=odd, INFO=odd)
    for question in (stream.info, lambda: stream.next(1), lambda: stream.get(1)):
        with pytest.raises(NatsError) as caught:
            await question()
        assert caught.value.reason == "protocol"


async def test_a_stream_that_two_create_at_once_is_created_once() -> None:
    stream, connection = stream_of(STREAM_CREATE=error(10058), STREAM_INFO=info(last_seq=3, first_seq=1))
    assert (await stream.create(max_age=0, max_bytes=0, replicas=1)).last == 3
    sent = connection.requests[0][1]
    assert (sent["max_age"], sent["max_bytes"], sent["duplicate_window"]) == (0, -1, 120 * 10**9)
    stream, _ = stream_of(STREAM_CREATE=error(10065, "subjects overlap"))
    with pytest.raises(JetStreamError, match="overlap"):
        await stream.create(max_age=0, max_bytes=0, replicas=1)
    stream, _ = stream_of(STREAM_CREATE={}, STREAM_INFO=error(10059))
    with pytest.raises(NatsError, match="vanished"):
        await stream.create(max_age=0, max_bytes=0, replicas=1)


@pytest.mark.parametrize(
    ("stream_info", "account", "trouble"),
    [
        (info(), {}, None),
        (info(max_bytes=1000, bytes=999, discard="new"), {}, "stream S is full"),
        (info(max_bytes=1000, bytes=999, discard="old"), {}, None),
        (info(max_bytes=1000, bytes=500, discard="new"), {}, None),
        (info(), {"storage": 1000, "limits": {"max_storage": 1000}}, "account is full"),
        (info(), {"storage": 500, "limits": {"max_storage": 1000}}, None),
        (error(10059), {"storage": 500, "limits": {"max_storage": -1}}, None),
    ],
)
async def test_what_keeps_others_from_publishing_is_said(
    stream_info: Mapping[str, Any], account: Mapping[str, Any], trouble: str | None
) -> None:
    stream, _ = stream_of(STREAM_INFO=stream_info, INFO=account)
    said = await stream.trouble()
    assert (trouble is None and said is None) or (trouble is not None and said is not None and trouble in said)


@pytest.mark.parametrize(
    ("subjects", "pattern", "some"),
    [
        (["a.>"], "a.>", True),
        (["a.>"], "a", False),
        (["a.*"], "a.b.c", False),
        (["a.*.c"], "a.b.*", True),
        (["a.*.c"], "*.b.>", True),
        (["a.b"], "a.c", False),
        (["x", "a.b"], "a.*", True),
        (["x", "y"], "*.*", False),
        ([], "a.>", True),
    ],
)
async def test_whether_a_stream_collects_anything_of_a_subject(subjects: list[str], pattern: str, some: bool) -> None:
    stream, _ = stream_of(STREAM_INFO=info(subjects=subjects))
    found = await stream.info()
    assert found is not None
    assert found.collects(pattern) == some


async def test_a_direct_get_that_is_refused_is_an_error_and_an_odd_one_too() -> None:
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    stream, _ = stream_of(DIRECT_GET=[control("408 Bad Request")])
    with pytest.raises(NatsError, match="Bad Request"):
        await stream.read(1, 10)
    odd = Message(b"", b"", b"", b"NATS/1.0\r\nNats-Sequence: seven\r\n\r\n")
    stream, _ = stream_of(DIRECT_GET=[odd, control("204 EOB")])
    for question in (lambda: stream.read(1, 10), lambda: stream.first_at(moment)):
        with pytest.raises(NatsError) as caught:
            await question()
        assert caught.value.reason == "protocol"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("authorization violation", "auth"),
        ("user authentication expired", "auth"),
        ("secure connection - tls required", "tls"),
        ("stale connection", "frozen"),
        ("permissions violation for publish to x", "permissions"),
        ("maximum connections exceeded", "refused"),
        ("info message, json parse error", "protocol"),
    ],
)
def test_an_error_line_has_its_reason(line: str, reason: str) -> None:
    assert error_reason(line) == reason
