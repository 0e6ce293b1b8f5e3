"""The crash-only connection, against real servers and against ones that misbehave as no real one would.

Each way to fail has its reason, whoever waits is woken, nothing of the connection is left behind, and no credentials
go where they should not.
"""

from __future__ import annotations

import base64
import gc
import inspect
import io
import json
import re
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import nats.aio.client
import nats.protocol.parser
import nkeys  # type: ignore[import-untyped]
import pytest
import trio
import trio_asyncio
import trustme
from recorder import fake_server
from support import WITHIN, NatsServer, eventually, fail_within, nats_server

from sse_trio import nats_client
from sse_trio.nats_connection import (
    NatsConnection,
    NatsError,
    NoResponders,
    RequestTimeout,
    open_connection,
)
from sse_trio.nats_protocol import Message

SILENCE = 0.1
"""Ping interval where a test waits for a frozen server to be noticed."""

INFO = b'INFO {"server_id":"x","version":"2.15.1","max_payload":1048576,"headers":true}\r\n'


async def refusal(url: str, **options: Any) -> NatsError:
    """Why no connection can be made."""
    with fail_within(WITHIN, "the connection is refused"), pytest.raises(NatsError) as caught:
        async with open_connection(url, **options):
            pass
    return caught.value


async def take(connection_inbox: Any, count: int) -> list[Message]:
    messages: list[Message] = []
    with fail_within(WITHIN, f"{count} messages arrive"):
        while len(messages) < count:
            messages += await connection_inbox.take()
    return messages


# -- messages ----------------------------------------------------------------------------------------------------------


async def test_a_message_arrives_as_it_was_published(core_nats: NatsServer) -> None:
    async with open_connection(core_nats.url) as connection:
        inbox = await connection.subscribe("a.*")
        await connection.publish("a.b", b"\x00\r\n payload", headers={"X": "1", "Y": "two words: é"})
        (message,) = await take(inbox, 1)
    assert (message.subject, message.payload, message.reply) == ("a.b", b"\x00\r\n payload", b"")
    assert message.headers == {"X": "1", "Y": "two words: é"}
    assert message.status is None


async def test_a_subscription_is_active_when_subscribe_returns(core_nats: NatsServer) -> None:
    async with open_connection(core_nats.url) as publisher, open_connection(core_nats.url) as connection:
        for number in range(100):
            inbox = await connection.subscribe(f"a.{number}")
            await publisher.publish(f"a.{number}", b"%d" % number, confirm=True)
            assert [message.payload for message in await take(inbox, 1)] == [b"%d" % number]
            inbox.close()


async def test_nothing_arrives_any_more_after_unsubscribing(core_nats: NatsServer) -> None:
    async with open_connection(core_nats.url) as connection:
        closed, control = await connection.subscribe("a"), await connection.subscribe("a")
        closed.close()
        closed.close()
        await connection.publish("a", b"x", confirm=True)
        assert len(await take(control, 1)) == 1
        with trio.move_on_after(0.05) as scope:
            await closed.take()
        assert scope.cancelled_caught


async def test_everything_works_from_tasks_that_know_nothing_of_asyncio(core_nats: NatsServer) -> None:
    big = b"x" * 900_000
    heard: list[Message] = []

    async def use(connection: NatsConnection) -> None:
        inbox = await connection.subscribe("a.>")
        for _ in range(20):  # more than the kernel takes at once: the rest is written by the loop
            await connection.publish("a.big", big)
        heard.extend(await take(inbox, 20))
        with pytest.raises(NoResponders):
            await connection.request("nobody")

    # A system task inherits no context of ours, so in it there is no loop at all.
    done = trio.Event()

    async def system_task(connection: NatsConnection) -> None:
        try:
            await use(connection)
        finally:
            done.set()

    async with open_connection(core_nats.url) as connection:
        trio.lowlevel.spawn_system_task(system_task, connection)
        with fail_within(WITHIN, "the task is done"):
            await done.wait()
    assert [len(message.payload) for message in heard] == [900_000] * 20


async def test_bytes_that_are_no_text_in_a_subject_or_header_harm_nobody(core_nats: NatsServer) -> None:
    async with open_connection(core_nats.url) as connection:
        inbox = await connection.subscribe("a.>")
        async with await trio.open_tcp_stream("127.0.0.1", core_nats.port) as raw:
            head = b"NATS/1.0\r\nX: \xff\xfe\r\nno colon\r\n: \r\n\r\n"
            await raw.send_all(
                b'CONNECT {"verbose":false,"headers":true}\r\n'
                + b"PUB a.\xff\xfe 1\r\nx\r\n"
                + b"HPUB a.b %d %d\r\n%sy\r\n" % (len(head), len(head) + 1, head)
                + b"HPUB a.c 27 28\r\nNATS/1.0 503 no answer\r\n\r\n z\r\n"
            )
            first, second, third = await take(inbox, 3)
        assert first.subject == "a.\ufffd\ufffd"
        assert second.headers["X"] == "\ufffd\ufffd"
        assert (third.status, third.description) == (503, "no answer")
        await connection.flush()


@pytest.mark.parametrize(
    ("subject", "reply", "headers"),
    [
        ("", "", {}),
        ("a b", "", {}),
        ("a\r\nPUB b 0", "", {}),
        ("a\0b", "", {}),
        ("a", "b c", {}),
        ("a", "b\r\n", {}),
        ("a", "", {"X: y": "z"}),
        ("a", "", {"X\r\n": "z"}),
        ("a", "", {"": "z"}),
        ("a", "", {"é": "z"}),
        ("a", "", {"X": "z\r\nY: z"}),
        ("a", "", {"X": "z\n"}),
    ],
)
async def test_nothing_breaks_out_of_its_place_in_the_protocol(
    core_nats: NatsServer, subject: str, reply: str, headers: dict[str, str]
) -> None:
    async with open_connection(core_nats.url) as connection:
        with pytest.raises(ValueError, match=r"subject|header"):
            connection.publish_nowait(subject, b"", reply=reply, headers=headers)
        if not reply and not headers:
            with pytest.raises(ValueError, match="subject"):
                await connection.subscribe(subject)
        await connection.flush()


async def test_a_message_that_the_server_would_not_take_is_refused_before_it_costs_the_connection(
    core_nats: NatsServer,
) -> None:
    async with open_connection(core_nats.url) as connection:
        with pytest.raises(NatsError, match="at most 1048576") as caught:
            await connection.publish("a", b"x" * (1 << 20) + b"x")
        assert caught.value.reason == "refused"
        await connection.publish("a", b"x" * (1 << 20), confirm=True)


async def test_an_inbox_that_nobody_empties_loses_the_newest_and_says_how_many(core_nats: NatsServer) -> None:
    async with open_connection(core_nats.url, max_pending=10_000) as connection:
        inbox = await connection.subscribe("a")
        for number in range(20):
            await connection.publish("a", b"%04d" % number * 250)
        await connection.flush()
        kept = await inbox.take()
        assert [int(message.payload[:4]) for message in kept] == list(range(7))
        assert inbox.lost == 13
        await connection.publish("a", b"next", confirm=True)
        assert [message.payload for message in await inbox.take()] == [b"next"]
        assert inbox.lost == 0


class Prepared:
    """A transport on which everything has arrived already, so that to read from it never waits."""

    def __init__(self, everything: bytes) -> None:
        self.rest = io.BytesIO(everything)

    async def read(self, limit: int) -> bytes:
        return self.rest.read(limit)


class OwnerThatCounts:
    """An owner whose only subscription counts its messages."""

    def __init__(self) -> None:
        self.activity = 0
        self.server_info: dict[str, Any] = {}
        self.sinks: dict[int, Callable[[Message], None]] = {1: self.count}
        self.failure: NatsError | None = None
        self.received = 0
        self.deaths: list[str] = []

    def count(self, message: Message) -> None:
        self.received += 1

    def die(self, reason: str, detail: str) -> None:
        self.deaths.append(detail)

    def process_error(self, text: str) -> None:
        raise AssertionError(text)


async def test_others_run_often_while_megabytes_are_taken_apart() -> None:
    message = b"MSG a 1 100\r\n" + b"x" * 100 + b"\r\n"
    owner = OwnerThatCounts()
    client = nats_client.NatsClient(owner, require_tls=False)
    client._transport = Prepared(message * 20_000)  # type: ignore[assignment]
    between: list[int] = []

    async def other() -> None:
        seen = 0
        while seen < 20_000:
            await trio.lowlevel.checkpoint()
            between.append(owner.received - seen)
            seen = owner.received

    async with trio_asyncio.open_loop(), trio.open_nursery() as nursery:
        nursery.start_soon(other)
        with fail_within(WITHIN, "everything is taken apart"):
            await trio_asyncio.aio_as_trio(client._read_loop)()
    assert owner.received == 20_000
    assert owner.deaths == ["the server closed the connection"]
    # One message may have begun in the portion before, and the scheduler may let one task run twice before the other.
    assert max(between) <= 2 * (nats_client.READ_AT_ONCE // len(message) + 1)


# -- requests ----------------------------------------------------------------------------------------------------------


async def test_a_request_is_answered_or_says_why_not(core_nats: NatsServer) -> None:
    async with open_connection(core_nats.url) as connection:
        service = await connection.subscribe("service")
        answers: list[bytes] = []

        async def ask() -> None:
            answers.append((await connection.request("service", b"?")).payload)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(ask)
            for number, question in enumerate(await take(service, 3)):
                connection.publish_nowait(question.reply.decode(), b"%d" % number)
        assert sorted(answers) == [b"0", b"1", b"2"]

        with pytest.raises(RequestTimeout) as timeout:
            await connection.request("service", within=0.05)
        assert timeout.value.reason == "timeout"
        with pytest.raises(NoResponders) as nobody:
            await connection.request("nobody.there")
        assert nobody.value.reason == "no-responders"
        (late,) = await take(service, 1)
        connection.publish_nowait(late.reply.decode(), b"too late")
        await connection.flush()


async def test_several_answers_are_collected_until_the_last(core_nats: NatsServer) -> None:
    async with open_connection(core_nats.url) as connection:
        service = await connection.subscribe("service")

        async def answer() -> None:
            (question,) = await take(service, 1)
            for number in range(5):
                await connection.publish(question.reply.decode(), b"%d" % number)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            answers = await connection.request_many("service", until=lambda message: message.payload == b"3")
        assert [message.payload for message in answers] == [b"0", b"1", b"2", b"3"]


async def test_waiting_may_be_cancelled_and_the_late_answer_harms_nobody(core_nats: NatsServer) -> None:
    # In nats-py a flush that was given up ends the read loop when its PONG comes.
    async with open_connection(core_nats.url) as connection:
        service = await connection.subscribe("service")
        for deadline in (0, 0.0001, 0.001):
            for wait in (connection.flush, lambda: connection.request("service"), lambda: connection.subscribe("x")):
                with trio.move_on_after(deadline):
                    await wait()
        await connection.flush()
        await connection.publish("service", b"still here")
        with fail_within(WITHIN, "the connection goes on"):
            while (await service.take())[-1].payload != b"still here":
                pass


# -- the end of a connection -------------------------------------------------------------------------------------------


async def test_a_killed_server_ends_every_wait_once_all_that_came_was_taken(core_nats: NatsServer) -> None:
    reasons: list[str] = []

    async def expect_failure(wait: Callable[[], Awaitable[object]]) -> None:
        with pytest.raises(NatsError) as caught:
            await wait()
        reasons.append(caught.value.reason)

    async with open_connection(core_nats.url) as connection:
        inbox, silent = await connection.subscribe("a"), await connection.subscribe("b")
        await connection.subscribe("service")
        await connection.publish("a", b"last words", confirm=True)
        with fail_within(WITHIN, "everybody is woken"):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(expect_failure, silent.take)
                nursery.start_soon(expect_failure, lambda: connection.request("service"))
                nursery.start_soon(connection.closed.wait)
                await trio.testing.wait_all_tasks_blocked()
                core_nats.kill()
            assert [message.payload for message in await inbox.take()] == [b"last words"]
            for wait in (
                inbox.take,
                connection.flush,
                lambda: connection.publish("a"),
                lambda: connection.subscribe("c"),
            ):
                await expect_failure(wait)
    assert set(reasons) == {"unreachable"}
    assert len(reasons) == 6
    assert connection.failure is not None
    assert f"127.0.0.1:{core_nats.port}" in connection.failure.detail


async def test_a_frozen_server_is_noticed_within_a_few_pings(core_nats: NatsServer) -> None:
    async with open_connection(core_nats.url, ping_interval=SILENCE) as connection:
        inbox = await connection.subscribe("a")
        core_nats.freeze()
        began = time.monotonic()
        with fail_within(WITHIN, "the silence is noticed"), pytest.raises(NatsError) as caught:
            await inbox.take()
        assert caught.value.reason == "frozen"
        assert time.monotonic() - began >= 3 * SILENCE
    core_nats.thaw()


async def test_a_server_that_is_merely_quiet_is_not_taken_for_frozen(core_nats: NatsServer) -> None:
    async with open_connection(core_nats.url, ping_interval=0.02) as connection:
        with trio.move_on_after(0.5):
            await connection.closed.wait()
        assert connection.failure is None


async def test_what_a_frozen_server_does_not_take_waits_in_bounded_memory_and_closing_is_quick(
    core_nats: NatsServer,
) -> None:
    with fail_within(WITHIN, "publishing ends"):
        async with open_connection(core_nats.url, ping_interval=SILENCE) as connection:
            core_nats.freeze()
            most = 0

            async def publish_without_end() -> None:
                nonlocal most
                while True:
                    await connection.publish("a", b"x" * 100_000)
                    assert connection._client is not None
                    most = max(most, connection._client.buffered())

            with pytest.raises(NatsError) as caught:
                await publish_without_end()
            assert caught.value.reason == "frozen"
            assert most <= (1 << 20) + 200_000
            left = time.monotonic()
    assert time.monotonic() - left < 5
    core_nats.thaw()


async def test_an_error_line_ends_the_connection_with_its_text(tmp_path: Path) -> None:
    config = tmp_path / "nats.conf"
    config.write_text("max_subscriptions: 2")
    async with (
        nats_server(tmp_path / "nats", jetstream=False, options=("-c", str(config))) as server,
        open_connection(server.url) as connection,
    ):
        await connection.subscribe("a")
        await connection.subscribe("b")
        with pytest.raises(NatsError) as caught:
            await connection.subscribe("c")
    assert caught.value.reason == "refused"
    assert "maximum subscriptions exceeded" in caught.value.detail


async def test_nonsense_from_the_server_ends_the_connection_instead_of_its_read_loop() -> None:
    async def serve(stream: trio.SocketStream) -> None:
        await stream.send_all(INFO)
        await stream.receive_some()
        await stream.send_all(b"PONG\r\n")
        await stream.receive_some()
        await stream.send_all(b"PONG\r\nHELO\r\n")
        await trio.sleep_forever()

    async with fake_server(serve) as url, open_connection(url) as connection:
        with fail_within(WITHIN, "the connection ends"):
            await connection.closed.wait()
        assert connection.failure is not None
        assert connection.failure.reason == "protocol"


async def test_an_exception_of_a_callback_costs_the_connection_and_nothing_else(core_nats: NatsServer) -> None:
    def fail() -> None:
        raise RuntimeError("a bug of the library")

    async def use() -> None:
        async with open_connection(core_nats.url) as connection:
            loop: Any = trio_asyncio.current_loop.get()
            loop.default_exception_handler = _raise_only(loop)
            loop.call_soon(fail)
            with fail_within(WITHIN, "the block is cancelled"):
                await connection.closed.wait()

    with pytest.raises(NatsError, match="a bug of the library") as caught:
        await use()
    assert caught.value.reason == "protocol"


def _raise_only(loop: Any) -> Any:
    """trio-asyncio's handler without its line in the log."""

    def handler(context: dict[str, Any]) -> None:
        async def propagate() -> None:
            await trio.lowlevel.checkpoint()
            raise context["exception"]

        loop._nursery.start_soon(propagate)

    return handler


async def test_the_exception_of_the_block_comes_out_as_it_is(core_nats: NatsServer) -> None:
    with pytest.raises(KeyError):
        async with open_connection(core_nats.url):
            raise KeyError("mine")
    with pytest.RaisesGroup(KeyError):
        async with open_connection(core_nats.url):
            raise ExceptionGroup("mine", [KeyError("mine")])


async def test_nothing_is_left_of_a_connection_wherever_it_is_cancelled(core_nats: NatsServer) -> None:
    async def live(reached: list[str]) -> None:
        async with open_connection(core_nats.url) as connection:
            reached.append("open")
            inbox = await connection.subscribe("a")
            await connection.publish("a", b"x" * 100_000, confirm=True)
            await inbox.take()
            reached.append("used")
            await inbox.take()

    async def steps() -> int:
        reached: list[str] = []
        for count in range(1, 1000):
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(live, reached)
                    for _ in range(count):
                        await trio.lowlevel.checkpoint()
                    scope.cancel()
            if "used" in reached:
                return count
        raise AssertionError(f"never got through: {reached[-3:]}")

    before = trio.lowlevel.current_statistics().tasks_living
    with fail_within(WITHIN, "all are cancelled"):
        await steps()
    assert trio.lowlevel.current_statistics().tasks_living == before
    gc.collect()  # a socket left open would warn, and warnings are errors


# -- no connection -----------------------------------------------------------------------------------------------------


async def test_nobody_listening_is_unreachable_and_said_at_once(core_nats: NatsServer) -> None:
    core_nats.kill()
    began = time.monotonic()
    error = await refusal(core_nats.url)
    assert error.reason == "unreachable"
    assert str(core_nats.port) in error.detail
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("scheme", ["ws", "wss", "http"])
async def test_another_protocol_is_refused_by_name(core_nats: NatsServer, scheme: str) -> None:
    error = await refusal(core_nats.url.replace("nats:", f"{scheme}:"))
    assert (error.reason, f"{scheme}://" in error.detail) == ("refused", True)


async def test_a_name_that_does_not_resolve_is_unreachable() -> None:
    assert (await refusal("nats://no-such-host.invalid:4222")).reason == "unreachable"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(111, "Connect call failed ('127.0.0.1', 4222)"), "connection refused"),
        (OSError("Multiple exceptions: [Errno 111] ('::1', 1), [Errno 111] ('127.0.0.1', 1)"), "connection refused"),
        (OSError("several: [Errno 111] here, [Errno 113] there"), "several: [Errno 111] here, [Errno 113] there"),
        (socket.gaierror(-2, "Name or service not known"), "Name or service not known"),
    ],
    ids=["refused", "refused by both addresses", "differently by each", "no such name"],
)
def test_why_a_server_is_unreachable_is_said_in_words(error: OSError, said: str) -> None:
    told = nats_client.classify("a:1", error)
    assert (told.reason, told.detail) == ("unreachable", f"a:1: {said}")


async def test_a_server_that_says_nothing_times_out() -> None:
    async def serve(_: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async with fake_server(serve) as url:
        error = await refusal(url, connect_timeout=0.2)
    assert error.reason == "timeout"


async def test_a_server_that_stops_in_the_middle_of_the_greeting_times_out() -> None:
    async def serve(stream: trio.SocketStream) -> None:
        await stream.send_all(INFO)
        await trio.sleep_forever()

    async with fake_server(serve) as url:
        assert (await refusal(url, connect_timeout=0.2)).reason == "timeout"


@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"INFO {nonsense\r\n", b"\r\n"])
async def test_something_that_is_no_nats_server_is_said_to_be_none(greeting: bytes) -> None:
    async with fake_server(lambda stream: stream.send_all(greeting)) as url:
        assert (await refusal(url)).reason == "protocol"


async def test_a_server_that_hangs_up_during_the_greeting_is_unreachable() -> None:
    async def serve(stream: trio.SocketStream) -> None:
        await stream.send_all(INFO)
        await stream.receive_some()
        await stream.aclose()

    async with fake_server(serve) as url:
        assert (await refusal(url)).reason == "unreachable"


# -- credentials -------------------------------------------------------------------------------------------------------


async def test_user_and_password_of_the_url_are_decoded_and_never_shown(tmp_path: Path) -> None:
    options = ("--user", "me@home", "--pass", "p:w/%20")
    async with nats_server(tmp_path / "nats", jetstream=False, options=options) as server:
        place = f"127.0.0.1:{server.port}"
        async with open_connection(f"nats://me%40home:p%3Aw%2F%2520@{place}") as connection:
            await connection.publish("a", b"", confirm=True)
            assert connection.server == place
        for url in (f"nats://me%40home:secret@{place}", f"nats://secret@{place}", f"nats://{place}"):
            error = await refusal(url)
            assert error.reason == "auth"
            assert "secret" not in str(error)


async def test_a_token_stands_alone_in_the_url(tmp_path: Path) -> None:
    async with nats_server(tmp_path / "nats", jetstream=False, options=("--auth", "s3cret!")) as server:
        async with open_connection(f"nats://s3cret%21@127.0.0.1:{server.port}") as connection:
            await connection.flush()
        assert (await refusal(f"nats://wrong@127.0.0.1:{server.port}")).reason == "auth"


def key(prefix: int, number: int) -> nkeys.KeyPair:
    return nkeys.from_seed(bytearray(nkeys.encode_seed(bytes([number] * 32), prefix)))


def token(issuer: nkeys.KeyPair, subject: nkeys.KeyPair, kind: str, expires_in: float | None = None) -> str:
    """A NATS JWT: ed25519 over base64url, version 2 of the claims."""

    def encode(value: bytes) -> str:
        return base64.urlsafe_b64encode(value).rstrip(b"=").decode()

    claims: dict[str, Any] = {
        "jti": kind,
        "iat": int(time.time()),
        "iss": issuer.public_key.decode(),
        "sub": subject.public_key.decode(),
        "name": kind,
        "nats": {"type": kind, "version": 2},
    }
    if kind == "account":
        claims["nats"]["limits"] = {"subs": -1, "conn": -1, "leaf": -1, "data": -1, "payload": -1}
    if kind == "user":
        claims["nats"] |= {"subs": -1, "data": -1, "payload": -1}
    if expires_in is not None:
        claims["exp"] = int(time.time() + expires_in)
    signed = (
        f"{encode(json.dumps({'typ': 'JWT', 'alg': 'ed25519-nkey'}).encode())}.{encode(json.dumps(claims).encode())}"
    )
    return f"{signed}.{encode(issuer.sign(signed.encode()))}"


def credentials(jwt: str, user: nkeys.KeyPair) -> str:
    return (
        f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{user.seed.decode()}\n------END USER NKEY SEED------\n"
    )


async def test_a_credentials_file_opens_a_server_in_operator_mode_until_it_expires(tmp_path: Path) -> None:
    operator, account = key(nkeys.PREFIX_BYTE_OPERATOR, 1), key(nkeys.PREFIX_BYTE_ACCOUNT, 2)
    user, stranger = key(nkeys.PREFIX_BYTE_USER, 3), key(nkeys.PREFIX_BYTE_USER, 4)
    config = tmp_path / "nats.conf"
    config.write_text(
        f"operator: {token(operator, operator, 'operator')}\nresolver: MEMORY\n"
        f"resolver_preload: {{ {account.public_key.decode()}: {token(operator, account, 'account')} }}\n"
    )
    good, expiring, forged = tmp_path / "good.creds", tmp_path / "expiring.creds", tmp_path / "forged.creds"
    good.write_text(credentials(token(account, user, "user"), user))
    forged.write_text(credentials(token(stranger, user, "user"), user))
    async with nats_server(tmp_path / "nats", jetstream=False, options=("-c", str(config))) as server:
        async with open_connection(server.url, creds=good) as connection:
            await connection.publish("a", b"", confirm=True)
        assert (await refusal(server.url, creds=forged)).reason == "auth"
        assert (await refusal(server.url)).reason == "auth"
        expiring.write_text(credentials(token(account, user, "user", expires_in=2), user))
        async with open_connection(server.url, creds=expiring) as connection:
            with fail_within(WITHIN, "the credentials expire"):
                await connection.closed.wait()
            assert connection.failure is not None
            assert connection.failure.reason == "auth"
            assert "expired" in connection.failure.detail


async def test_a_file_with_an_nkey_seed_alone_is_enough_for_a_server_that_knows_the_key(tmp_path: Path) -> None:
    user, stranger = key(nkeys.PREFIX_BYTE_USER, 5), key(nkeys.PREFIX_BYTE_USER, 6)
    config = tmp_path / "nats.conf"
    config.write_text(f"authorization: {{ users: [ {{ nkey: {user.public_key.decode()} }} ] }}")
    seed, other = tmp_path / "user.nk", tmp_path / "other.nk"
    seed.write_text(user.seed.decode() + "\n")
    other.write_text(stranger.seed.decode())
    async with nats_server(tmp_path / "nats", jetstream=False, options=("-c", str(config))) as server:
        async with open_connection(server.url, creds=seed) as connection:
            await connection.publish("a", b"", confirm=True)
        assert (await refusal(server.url, creds=other)).reason == "auth"


@pytest.mark.parametrize(
    "content", [None, b"", b"nonsense", b"\xff", b"SUnonsense", b"BEGIN NATS USER JWT\nBEGIN USER NKEY SEED\n"]
)
async def test_a_credentials_file_that_cannot_be_used_is_said_to_be_the_cause(
    tmp_path: Path, content: bytes | None
) -> None:
    creds = tmp_path / "my.creds"
    if content is not None:
        creds.write_bytes(content)
    async with nats_server(tmp_path / "nats", jetstream=False, options=("--auth", "x")) as server:
        error = await refusal(server.url, creds=creds)
    assert error.reason == "auth"
    assert "\n" not in error.detail


# -- TLS ---------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def tls_server(
    directory: Path, authority: trustme.CA, name: str = "127.0.0.1", extra: str = ""
) -> AsyncIterator[NatsServer]:
    directory.mkdir(exist_ok=True)
    certificate, private_key = directory / "server.pem", directory / "server.key"
    issued = authority.issue_cert(name)
    issued.cert_chain_pems[0].write_to_path(certificate)
    issued.private_key_pem.write_to_path(private_key)
    config = directory / "nats.conf"
    config.write_text(f'tls {{ cert_file: "{certificate}", key_file: "{private_key}" }}\n{extra}')
    async with nats_server(directory / "nats", jetstream=False, options=("-c", str(config))) as server:
        yield server


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def ca(authority: trustme.CA, tmp_path: Path) -> Path:
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(path)
    return path


async def use_tls(url: str, ca: Path) -> None:
    big = b"x" * 500_000
    async with open_connection(url, ca=ca) as connection:
        inbox = await connection.subscribe("a")
        for _ in range(4):
            await connection.publish("a", big)
        assert [message.payload for message in await take(inbox, 4)] == [big] * 4
        assert connection._client is not None
        transport: Any = connection._client._transport
        assert transport._io_writer.get_extra_info("ssl_object") is not None


@pytest.mark.parametrize("scheme", ["tls", "nats"])
async def test_a_server_with_tls_is_spoken_to_in_tls(
    tmp_path: Path, authority: trustme.CA, ca: Path, scheme: str
) -> None:
    async with tls_server(tmp_path / "tls", authority) as server:
        await use_tls(f"{scheme}://127.0.0.1:{server.port}", ca)


async def test_tls_is_used_where_the_server_only_offers_it(tmp_path: Path, authority: trustme.CA, ca: Path) -> None:
    async with tls_server(tmp_path / "tls", authority, extra="allow_non_tls: true") as server:
        await use_tls(f"tls://127.0.0.1:{server.port}", ca)


async def test_a_killed_server_with_tls_ends_the_connection_too_and_without_noise(
    tmp_path: Path, authority: trustme.CA, ca: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with tls_server(tmp_path / "tls", authority) as server:
        async with open_connection(f"tls://127.0.0.1:{server.port}", ca=ca) as connection:
            server.kill()
            with fail_within(WITHIN, "the end is noticed"):
                await connection.closed.wait()
        assert connection.failure is not None
        assert connection.failure.reason == "unreachable"
    assert caplog.records == []


async def test_a_certificate_of_an_unknown_authority_is_refused(tmp_path: Path, authority: trustme.CA) -> None:
    async with tls_server(tmp_path / "tls", authority) as server:
        error = await refusal(f"tls://127.0.0.1:{server.port}")
    assert error.reason == "tls"
    assert "certificate" in error.detail


async def test_a_certificate_for_another_name_is_refused(tmp_path: Path, authority: trustme.CA, ca: Path) -> None:
    async with tls_server(tmp_path / "tls", authority, name="nats.example.org") as server:
        error = await refusal(f"tls://127.0.0.1:{server.port}", ca=ca)
    assert error.reason == "tls"


@pytest.mark.parametrize("content", [None, b"", b"nonsense"])
async def test_a_ca_file_that_cannot_be_used_is_said_to_be_the_cause(
    core_nats: NatsServer, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "broken.pem"
    if content is not None:
        path.write_bytes(content)
    error = await refusal(core_nats.url, ca=path)
    assert (error.reason, str(path) in error.detail) == ("tls", True)


async def test_tls_is_never_given_up_and_no_credentials_are_sent_without_it() -> None:
    heard = b""

    async def serve(stream: trio.SocketStream) -> None:
        nonlocal heard
        await stream.send_all(INFO.replace(b"{", b'{"auth_required":true,', 1))
        async for data in stream:
            heard += data

    async with fake_server(serve) as url:
        error = await refusal(url.replace("nats://", "tls://me:secret@"))
        assert error.reason == "tls"
        assert "no TLS" in error.detail
        assert "secret" not in str(error)
        assert heard == b""
        # The same server, asked for no TLS, hears them: so the test would see it.
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: refusal(url.replace("nats://", "nats://me:secret@"), connect_timeout=5))
            await eventually(lambda: b"secret" in heard, "the credentials arrive without TLS")
            nursery.cancel_scope.cancel()


async def test_a_real_server_without_tls_is_refused_as_well(core_nats: NatsServer) -> None:
    assert (await refusal(core_nats.url.replace("nats://", "tls://"))).reason == "tls"


# -- permissions -------------------------------------------------------------------------------------------------------


async def test_what_is_not_allowed_is_said_to_whom_it_concerns_and_costs_nobody_the_connection(tmp_path: Path) -> None:
    config = tmp_path / "nats.conf"
    config.write_text(
        'authorization: { users: [ { user: me, password: pw, permissions: { publish: ["Yes.>", "asked"],'
        ' subscribe: ["Yes.>", "_INBOX.>"] } } ] }'
    )
    async with (
        nats_server(tmp_path / "nats", jetstream=False, options=("-c", str(config))) as server,
        open_connection(f"nats://me:pw@127.0.0.1:{server.port}") as connection,
    ):
        inbox = await connection.subscribe("Yes.>")
        for forbidden in (
            lambda: connection.subscribe("No.>"),
            lambda: connection.publish("No.Where", b"", confirm=True),
            lambda: connection.request("No.Where"),
        ):
            with fail_within(WITHIN, "the refusal arrives"), pytest.raises(NatsError) as caught:
                await forbidden()
            assert caught.value.reason == "permissions"
        await connection.publish("No.Where", b"", confirm=False)
        await connection.publish("Yes.Here", b"allowed", confirm=True)
        assert [message.payload for message in await take(inbox, 1)] == [b"allowed"]


# -- what we lean on ---------------------------------------------------------------------------------------------------


def test_nats_py_still_has_the_insides_that_are_replaced() -> None:
    """Names and signatures that `nats_client` overrides or reads; when one moves, that module must be read again."""
    original = nats.aio.client.Client
    for name, ours in vars(nats_client.NatsClient).items():
        if inspect.iscoroutinefunction(ours) and name != "abort":
            theirs = getattr(original, name)
            assert list(inspect.signature(theirs).parameters) == list(inspect.signature(ours).parameters), name
    started = inspect.getsource(original._process_connect_init)
    assert re.findall(r"create_task\(self\.(\w+)\(\)\)", started) == ["_read_loop", "_ping_interval", "_flusher"]
    called = re.findall(r"self\.nc\.(\w+)", inspect.getsource(nats.protocol.parser.Parser))
    assert set(called) == {"_process_msg", "_process_err", "_process_ping", "_process_pong", "_process_info"}
    client = original()
    assert all(hasattr(client, name) for name in ("_transport", "_ps", "_server_pool", "_current_server", "options"))
