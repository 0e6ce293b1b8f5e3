"""One connection to NATS, from its opening to its death; it is never repaired.

Strategy: crash-only. `open_connection` opens one client (`nats_client`) in an asyncio loop of its own; whatever goes
wrong (end of file, a frozen server, an error line, a bug while parsing) marks the connection dead with a reason and
wakes everybody who waits for it, and whoever needs NATS opens another one. Nobody above this module knows which client
it is.

Everything here may be called from any Trio task: writing is a synchronous write to the transport, and waiting is a
`trio.Event` that the read loop sets. The read loop only appends to a deque; who takes, takes everything at once. The
deque is bounded by bytes, and what did not fit is counted: see `Inbox.lost`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any
from urllib.parse import urlsplit

import trio
import trio_asyncio

from sse_trio.nats_client import NatsClient, connect
from sse_trio.nats_protocol import (
    Message,
    NatsError,
    NoResponders,
    RequestTimeout,
    error_reason,
    is_subject,
    publish_command,
)

__all__ = ["Inbox", "Message", "NatsConnection", "NatsError", "NoResponders", "RequestTimeout", "open_connection"]

CONNECT_TIMEOUT = 5.0
"""Seconds for all of name resolution, TCP, TLS and the NATS handshake."""

CLOSE_TIMEOUT = 1.0
"""Seconds that closing may take before the socket is cut."""

PING_INTERVAL = 1.0
"""Seconds between pings; a server that is silent for three of them counts as frozen."""

MAX_PENDING = 256 << 20
"""Bytes that an inbox holds for a taker that does not come."""

WRITE_BUFFER = 1 << 20
"""Bytes that wait to be written before `publish` waits for the server to take them."""

TAKEN_AT_ONCE = 2000
"""Messages that one `take` returns, at most: what is done with them without a pause must not take long."""

MESSAGE_OVERHEAD = 300
"""Bytes that a message takes in memory beside its payload."""


class Inbox:
    """What arrives on one subscription, in order, until somebody takes it."""

    def __init__(self, connection: NatsConnection, sid: int, subject: str) -> None:
        self.subject = subject
        self.lost = 0
        """Messages that did not fit behind those that the last `take` returned; they are gone."""
        self._connection = connection
        self._sid = sid
        self._messages: list[Message] = []
        self._bytes = 0
        self._dropped = 0
        self._wake = trio.Event()

    def push(self, message: Message) -> None:
        """Called by the read loop; never waits, never raises."""
        size = len(message.payload) + MESSAGE_OVERHEAD
        if self._bytes + size > self._connection.max_pending:
            # Everything behind the first one that did not fit is lost, too: a hole has one place.
            self._dropped += 1
            self._bytes = self._connection.max_pending
            return
        self._bytes += size
        self._messages.append(message)
        self._wake.set()

    async def take(self) -> list[Message]:
        """All messages that are here (at least one, not more than `TAKEN_AT_ONCE`); waits for the first.

        Raises:
            NatsError: the connection is dead, and everything that had arrived was taken.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._messages:
            if self._connection.failure is not None:
                raise self._connection.failure
            self._wake = trio.Event()
            await self._wake.wait()
        if len(self._messages) > TAKEN_AT_ONCE:
            messages = self._messages[:TAKEN_AT_ONCE]
            del self._messages[:TAKEN_AT_ONCE]
            self.lost = 0  # what was lost was behind those that stay
            if not self._dropped:
                self._bytes -= sum(len(message.payload) + MESSAGE_OVERHEAD for message in messages)
        else:
            messages, self._messages = self._messages, []
            self.lost, self._dropped = self._dropped, 0
            self._bytes = 0
        return messages

    def wake(self) -> None:
        self._wake.set()

    def close(self) -> None:
        """Unsubscribe; what was not taken is dropped."""
        self._connection.unsubscribe(self._sid)


class _Answers:
    """Where the answers to one request go."""

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self.messages: list[Message] = []
        self.denied: NatsError | None = None
        self.wake = trio.Event()

    def push(self, message: Message) -> None:
        self.messages.append(message)
        self.wake.set()


class NatsConnection:
    """An open connection. Once `closed` is set, every call raises `failure`."""

    def __init__(self, server: str, *, max_pending: int = MAX_PENDING) -> None:
        self.server = server
        """`host:port` that we connected to."""
        self.server_info: dict[str, Any] = {}
        self.max_pending = max_pending
        self.failure: NatsError | None = None
        self.closed = trio.Event()
        self.sinks: dict[int, Callable[[Message], None]] = {}
        self.activity = 0
        self._client: NatsClient | None = None
        self._inboxes: dict[int, Inbox] = {}
        self._unanswered: list[trio.Event] = []
        """Who waited for a PONG when the connection died."""
        self._sid = 0
        self._answers: dict[bytes, _Answers] = {}
        self._answer_prefix: bytes | None = None
        self._answers_ready = trio.Lock()
        self._denied_publish: dict[str, int] = {}
        self._denied_subscribe: dict[str, int] = {}

    # -- death -------------------------------------------------------------------------------------------------------

    def die(self, reason: str, detail: str) -> None:
        """Mark the connection dead and wake everybody who waits; the first cause counts."""
        if self.failure is not None:
            return
        self.failure = NatsError(reason, f"{self.server}: {detail}")
        self.closed.set()
        for inbox in self._inboxes.values():
            inbox.wake()
        for answers in self._answers.values():
            answers.wake.set()
        if self._client is not None:
            self._unanswered, self._client.pongs = self._client.pongs, []
            for pong in self._unanswered:
                pong.set()

    def process_error(self, text: str) -> None:
        """An error line of the server (nats-py gives it in lower case). Only a denied subject is survived."""
        if "permissions violation" not in text:
            self.die(error_reason(text), f"the server says: {text}")
            return
        subject = text.partition('"')[2].partition('"')[0]
        denied = self._denied_subscribe if "subscription" in text else self._denied_publish
        denied[subject] = denied.get(subject, 0) + 1
        if denied is self._denied_publish:
            for answers in self._answers.values():
                if answers.subject.lower() == subject:
                    answers.denied = NatsError("permissions", f"{self.server}: {text}")
                    answers.wake.set()

    @property
    def _live(self) -> NatsClient:
        if self.failure is not None:
            raise self.failure
        assert self._client is not None, "connections come from open_connection"
        return self._client

    # -- publishing --------------------------------------------------------------------------------------------------

    def publish_nowait(
        self, subject: str, payload: bytes = b"", *, reply: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        """Write one message, without waiting for anything; `publish` minds the buffer.

        Raises:
            ValueError: the subject or a header would break the protocol.
            NatsError: the connection is dead, or the message is larger than the server takes.
        """
        limit = int(self.server_info.get("max_payload", 1 << 20))
        self._live.send(publish_command(subject, payload, reply=reply, headers=headers, limit=limit))

    async def publish(
        self,
        subject: str,
        payload: bytes = b"",
        *,
        headers: Mapping[str, str] | None = None,
        confirm: bool = False,
    ) -> None:
        """Publish one message; with `confirm` it returns when the server has processed it.

        Raises:
            NatsError: the connection is dead; with `confirm` also: the subject is not allowed (`permissions`).
        """
        before = self._denied_publish.get(subject.lower(), 0)
        self.publish_nowait(subject, payload, headers=headers)
        if confirm or self._live.buffered() > WRITE_BUFFER:
            await self.flush()
        else:
            await trio.lowlevel.checkpoint()
        if confirm and self._denied_publish.get(subject.lower(), 0) > before:
            raise NatsError("permissions", f"{self.server}: may not publish to {subject}")

    async def flush(self) -> None:
        """Wait until the server has processed everything that was written before.

        Raises:
            NatsError: the connection died first. (It does: a silent server is declared frozen.)
        """
        pong = self._live.ping()
        await pong.wait()
        if self.failure is not None and pong in self._unanswered:
            raise self.failure

    # -- subscribing -------------------------------------------------------------------------------------------------

    async def subscribe(self, subject: str) -> Inbox:
        """Subscribe, and return when the server has the subscription: what is published from now on arrives.

        Raises:
            NatsError: the connection is dead, or the subject is not allowed (`permissions`).
        """
        inbox = Inbox(self, self._next_sid(), subject)
        self._inboxes[inbox._sid] = inbox
        try:
            await self._subscribe(inbox._sid, subject, inbox.push)
        except BaseException:
            inbox.close()
            raise
        return inbox

    async def _subscribe(self, sid: int, subject: str, sink: Callable[[Message], None]) -> None:
        before = self._denied_subscribe.get(subject.lower(), 0)
        if not is_subject(subject):
            raise ValueError(f"{subject!r} is no subject to subscribe to")
        self._live.send(f"SUB {subject} {sid}\r\n".encode())
        self.sinks[sid] = sink
        await self.flush()
        if self._denied_subscribe.get(subject.lower(), 0) > before:
            raise NatsError("permissions", f"{self.server}: may not subscribe to {subject}")

    def unsubscribe(self, sid: int) -> None:
        self._inboxes.pop(sid, None)
        if self.sinks.pop(sid, None) is not None and self.failure is None:
            self._live.send(b"UNSUB %d\r\n" % sid)

    def _next_sid(self) -> int:
        self._sid += 1
        return self._sid

    def new_inbox(self) -> str:
        """A subject that nobody else uses."""
        return f"_INBOX.{token_hex(12)}"

    # -- requests ----------------------------------------------------------------------------------------------------

    async def request(
        self, subject: str, payload: bytes = b"", *, within: float = 5.0, headers: Mapping[str, str] | None = None
    ) -> Message:
        """The first answer to a request.

        Raises:
            NoResponders: nobody listens there.
            RequestTimeout: no answer within `within` seconds.
            NatsError: the connection died, or the subject is not allowed (`permissions`).
        """
        return (await self.request_many(subject, payload, until=_always, within=within, headers=headers))[0]

    async def request_many(
        self,
        subject: str,
        payload: bytes = b"",
        *,
        until: Callable[[Message], bool],
        within: float = 5.0,
        headers: Mapping[str, str] | None = None,
    ) -> list[Message]:
        """All answers to a request up to and with the first for which `until` is true.

        `within` is for each wait, from the last answer that came. Raises as `request` does.
        """
        prefix = self._answer_prefix or await self._open_answers()
        token = token_hex(8).encode()
        answers = self._answers[token] = _Answers(subject)
        try:
            self.publish_nowait(subject, payload, reply=(prefix + token).decode(), headers=headers)
            heard = 0
            while True:
                with trio.move_on_after(within) as scope:
                    await answers.wake.wait()
                if self.failure is not None:
                    raise self.failure
                if answers.denied is not None:
                    raise answers.denied
                answers.wake = trio.Event()
                for message in answers.messages[heard:]:
                    heard += 1
                    # Of a stored message, which says what it likes, the server tells the sequence.
                    if message.status == 503 and not message.payload and not message.is_stored:
                        raise NoResponders("no-responders", f"{self.server}: nobody answers on {subject}")
                    if until(message):
                        return answers.messages[:heard]
                if scope.cancelled_caught:
                    raise RequestTimeout("timeout", f"{self.server}: no answer on {subject} within {within:g} s")
        finally:
            del self._answers[token]

    async def _open_answers(self) -> bytes:
        """Subscribe once for all answers; the last token of the subject says whose they are."""
        async with self._answers_ready:
            if self._answer_prefix is None:
                prefix = f"{self.new_inbox()}."
                sid = self._next_sid()
                try:
                    await self._subscribe(sid, f"{prefix}*", self._answered)
                except BaseException:
                    self.unsubscribe(sid)
                    raise
                self._answer_prefix = prefix.encode()
            return self._answer_prefix

    def _answered(self, message: Message) -> None:
        answers = self._answers.get(message.raw_subject.rpartition(b".")[2])
        if answers is not None:
            answers.push(message)

    def __repr__(self) -> str:
        return f"<NatsConnection {self.server} {self.failure or 'open'}>"


@asynccontextmanager
async def open_connection(
    url: str,
    *,
    creds: Path | None = None,
    ca: Path | None = None,
    name: str = "sse-trio",
    connect_timeout: float = CONNECT_TIMEOUT,
    ping_interval: float = PING_INTERVAL,
    max_pending: int = MAX_PENDING,
) -> AsyncIterator[NatsConnection]:
    """A connection to the server at `url` (`nats://` or `tls://`, user info as user:password or token) for one block.

    The block is not cancelled when the connection dies: its calls raise. Exceptions of the block come out as they are.

    Raises:
        NatsError: no connection could be made; the reason says why.

    Cancellation: at any time; closing takes at most `CLOSE_TIMEOUT` seconds, and nothing of the connection is left.
    """
    parts = urlsplit(url)
    server = f"{parts.hostname}:{parts.port or 4222}"
    connection = NatsConnection(server, max_pending=max_pending)
    client = NatsClient(connection, require_tls=parts.scheme == "tls")
    failure: Exception | None = None
    try:
        async with trio_asyncio.open_loop():
            # The loop's nurseries would wrap what the block raises; it is carried around them.
            try:
                await connect(client, server, url, creds, ca, name, connect_timeout, ping_interval)
                connection._client = client
                await connection.flush()
                yield connection
            except Exception as error:
                failure = error
            finally:
                connection.die("closed", "closed by us")
                with trio.move_on_after(CLOSE_TIMEOUT, shield=True):
                    await trio_asyncio.aio_as_trio(client.abort)()
    except ExceptionGroup as group:
        # An asyncio callback raised. One loop per connection: the connection is lost, and nothing else.
        if failure is None:
            failure = NatsError("protocol", f"{server}: the client failed: {group.exceptions[0]!r}")
    if failure is not None:
        raise failure


def _always(_: Message) -> bool:
    return True
