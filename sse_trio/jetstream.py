"""One JetStream stream on one connection: finding or creating it, reading from it, and consuming it.

Strategy: the JetStream API is JSON over requests, so this is a thin layer over a connection. Nothing is tried twice
here: whoever asks decides whether to ask again, or to open another connection.

What a stream holds was published by others. A publisher may set any header, and any status line: only what the server
appends (the last field of a name) is believed.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from secrets import token_hex
from typing import Any

import trio

from sse_trio import consumer
from sse_trio.consumer import Consumer, StoredMessage
from sse_trio.nats_connection import NatsConnection
from sse_trio.nats_protocol import Message, NatsError, NoResponders

__all__ = ["JetStream", "JetStreamError", "JetStreamUnavailable", "StreamInfo", "base36"]

INACTIVE = 30.0
"""Seconds after which the server forgets a consumer whose subscriber has gone."""

API_TIMEOUT = 3.0
"""Seconds that the JetStream API has to answer."""

LOOKED_AT_ONCE = 100
"""Answers whose headers are looked at before other tasks may run."""

READ_BYTES = 2 << 20
"""Bytes that one read of the stream returns, at most (or a single message)."""

STREAM_NOT_FOUND = 10059
MESSAGE_NOT_FOUND = 10037
STREAM_NAME_IN_USE = 10058
NOT_ENABLED = frozenset({10039, 10076})
"""JetStream is off: for the account, for the server."""

_SECOND = 10**9
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class JetStreamError(NatsError):
    """The JetStream API said no; `code` is its error code."""

    def __init__(self, code: int, detail: str) -> None:
        super().__init__("stream", detail)
        self.code = code


class JetStreamUnavailable(NatsError):
    """Nobody answers for JetStream: it is off, or its cluster has no leader now."""


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """The stream as it is now."""

    epoch: str
    """Names this incarnation: the time of its creation in microseconds, in base 36."""
    first: int
    """The sequence of the oldest message; that of the next one where there is none. At least 1."""
    last: int
    """The sequence of the newest message, even if that is gone."""
    bytes: int
    max_bytes: int
    """-1: no limit."""
    discard_new: bool
    """Whether a full stream refuses new messages, instead of dropping old ones."""
    allow_direct: bool
    subjects: tuple[str, ...]
    """What it collects; nothing for a mirror."""

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> StreamInfo:
        config, state = answer["config"], answer["state"]
        created = datetime.fromisoformat(answer["created"])
        return cls(
            base36((created - _EPOCH) // timedelta(microseconds=1)),
            max(int(state["first_seq"]), 1),
            int(state["last_seq"]),
            int(state["bytes"]),
            int(config.get("max_bytes", -1)),
            config.get("discard") == "new",
            bool(config.get("allow_direct")),
            tuple(config.get("subjects") or ()),
        )

    def collects(self, pattern: str) -> bool:
        """Whether some message that `pattern` matches would come into the stream; True where that cannot be told."""
        return not self.subjects or any(_overlap(subject, pattern) for subject in self.subjects)


class JetStream:
    """The stream `name` on one connection, as far as `subject` (a pattern) goes. Lives no longer than the connection.

    Every method raises a `NatsError` when the connection or JetStream cannot answer.
    """

    def __init__(self, connection: NatsConnection, name: str, subject: str) -> None:
        self.connection = connection
        self.name = name
        self.subject = subject
        self.direct = True
        """Whether the stream may be read directly, from any replica."""
        self._batches = _version(connection.server_info) >= (2, 11)

    async def _api(self, operation: str, request: Mapping[str, Any] | None = None) -> dict[str, Any]:
        body = json.dumps(request).encode() if request is not None else b""
        try:
            message = await self.connection.request(f"$JS.API.{operation}", body, within=API_TIMEOUT)
        except NoResponders:
            raise JetStreamUnavailable("stream", f"{self.connection.server}: JetStream is not available") from None
        with self._understanding():
            answer: dict[str, Any] = json.loads(message.payload)
            if error := answer.get("error"):
                text = f"{self.connection.server}: JetStream: {error.get('description', 'refused')}"
                raise JetStreamError(int(error.get("err_code", 0)), text)
        return answer

    @contextmanager
    def _understanding(self) -> Iterator[None]:
        """What the server says may be other than we know it: that ends the connection, not the process."""
        try:
            yield
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise NatsError("protocol", f"{self.connection.server}: an answer of JetStream is odd: {error!r}") from None

    async def is_available(self) -> bool:
        """Whether this account has JetStream here. Raises where that cannot be known now."""
        try:
            await self._api("INFO")
        except JetStreamUnavailable:
            return False
        except JetStreamError as error:
            if error.code in NOT_ENABLED:
                return False
            raise
        except NatsError as error:
            if error.reason == "permissions":
                return False
            raise
        return True

    async def trouble(self) -> str | None:
        """What keeps others from publishing into the stream, as far as the server tells; None when nothing does."""
        info = await self.info()
        if info is not None and info.discard_new and 0 < info.max_bytes <= info.bytes * 1.01:
            return f"stream {self.name} is full: new discoveries are refused"
        account = await self._api("INFO")
        limit = int(account.get("limits", {}).get("max_storage", -1))
        if 0 < limit <= int(account.get("storage", 0)) * 1.01:
            return "the JetStream storage of the account is full: new discoveries are refused"
        return None

    # -- the stream --------------------------------------------------------------------------------------------------

    async def info(self) -> StreamInfo | None:
        """The stream, from its leader; None when there is no such stream."""
        try:
            answer = await self._api(f"STREAM.INFO.{self.name}")
        except JetStreamError as error:
            if error.code == STREAM_NOT_FOUND:
                return None
            raise
        with self._understanding():
            info = StreamInfo.of(answer)
        self.direct = self.direct and info.allow_direct
        return info

    async def create(self, *, max_age: float, max_bytes: int, replicas: int) -> StreamInfo:
        """Create the stream, or return the one that somebody else has created in the meantime."""
        window = min(120.0, max_age) if max_age else 120.0
        config = {
            "name": self.name,
            "subjects": [self.subject],
            "retention": "limits",
            "storage": "file",
            "discard": "old",
            "max_age": round(max_age * _SECOND),
            "max_bytes": max_bytes or -1,
            "num_replicas": replicas,
            "duplicate_window": round(window * _SECOND),
            "allow_direct": True,
        }
        refused: JetStreamError | None = None
        try:
            await self._api(f"STREAM.CREATE.{self.name}", config)
        except JetStreamError as error:
            refused = error
        if refused is not None and refused.code != STREAM_NAME_IN_USE:
            raise refused
        info = await self.info()
        if info is None:
            raise refused or NatsError("stream", f"{self.connection.server}: stream {self.name} has vanished")
        return info

    # -- reading what it holds ---------------------------------------------------------------------------------------

    async def read(self, sequence: int, limit: int) -> tuple[list[StoredMessage], bool]:
        """At most `limit` messages from `sequence` on, in order, and whether that was all the answering replica has.

        A replica may lag behind the leader: "all" is all that it knew. Fewer than `limit` come where they are large.
        """
        if not (self.direct and self._batches):
            return await self._read_singly(sequence, limit)
        request = {"seq": sequence, "batch": limit, "max_bytes": READ_BYTES, "next_by_subj": self.subject}
        answers = await self._direct(request)
        closing = answers.pop()
        if closing.status == 404:
            return [], True
        if closing.status != 204:
            raise NatsError("stream", f"{self.connection.server}: reading the stream: {closing.description}")
        messages = []
        previous = 0
        with self._understanding():
            for count, answer in enumerate(answers, 1):
                if count % LOOKED_AT_ONCE == 0:
                    await trio.lowlevel.checkpoint()
                fields = answer.headers
                if previous and fields.get("Nats-Last-Sequence") != str(previous):
                    raise NatsError("stream", f"{self.connection.server}: an answer of the stream has a hole")
                previous = int(fields["Nats-Sequence"])
                messages.append(StoredMessage(previous, fields["Nats-Subject"], answer.payload))
        return messages, closing.headers.get("Nats-Num-Pending") == "0"

    async def _read_singly(self, sequence: int, limit: int) -> tuple[list[StoredMessage], bool]:
        """As `read`, for streams that do not allow direct gets, and servers before 2.11."""
        messages: list[StoredMessage] = []
        while len(messages) < limit:
            message = await self.next(sequence)
            if message is None:
                return messages, True
            messages.append(message)
            sequence = message.sequence + 1
        return messages, False

    async def next(self, sequence: int) -> StoredMessage | None:
        """The first message at or after `sequence`, from the stream's leader: what it says is so."""
        return await self._get({"seq": max(sequence, 1), "next_by_subj": self.subject})

    async def get(self, sequence: int) -> StoredMessage | None:
        """The message with exactly this sequence, whatever its subject, from the stream's leader."""
        return await self._get({"seq": sequence})

    async def _get(self, request: Mapping[str, Any]) -> StoredMessage | None:
        found = await self._get_dated(request)
        return found[0] if found is not None else None

    async def _get_dated(self, request: Mapping[str, Any]) -> tuple[StoredMessage, datetime] | None:
        """A message and when it was stored."""
        try:
            answer = await self._api(f"STREAM.MSG.GET.{self.name}", request)
        except JetStreamError as error:
            if error.code == MESSAGE_NOT_FOUND:
                return None
            raise
        with self._understanding():
            message = answer["message"]
            payload = base64.b64decode(message.get("data", ""))
            stored = StoredMessage(int(message["seq"]), message["subject"], payload)
            return stored, datetime.fromisoformat(message["time"])

    async def first_at(self, moment: datetime) -> int | None:
        """The sequence of the first message that was stored at or after `moment` (aware); None when there is none."""
        if not (self.direct and self._batches):
            return await self._first_at_by_bisection(moment)
        request = {"start_time": moment.isoformat(), "batch": 1, "next_by_subj": self.subject}
        answers = await self._direct(request)
        with self._understanding():
            return int(answers[0].headers["Nats-Sequence"]) if len(answers) > 1 else None

    async def _first_at_by_bisection(self, moment: datetime) -> int | None:
        """As `first_at`, with about twenty requests."""
        info = await self.info()
        if info is None:
            return None
        low, high = info.first, info.last + 1  # everything before low is earlier; what is at high or later is not
        while low < high:
            middle = (low + high) // 2
            found = await self._get_dated({"seq": middle, "next_by_subj": self.subject})
            if found is not None and found[1] < moment:
                low = found[0].sequence + 1
            else:
                high = middle
        first = await self.next(low)
        return first.sequence if first is not None else None

    async def _direct(self, request: Mapping[str, Any]) -> list[Message]:
        """All answers to a batched direct get; the last is the closing status."""
        return await self.connection.request_many(
            f"$JS.API.DIRECT.GET.{self.name}", json.dumps(request).encode(), until=_closes
        )

    # -- consuming ---------------------------------------------------------------------------------------------------

    async def consume(self, start: int) -> Consumer:
        """A consumer whose first message is the first at or after `start`."""
        inbox = await self.connection.subscribe(self.connection.new_inbox())
        name = f"sse-trio-{token_hex(8)}"
        try:
            answer = await self._api(
                f"CONSUMER.CREATE.{self.name}.{name}",
                {
                    "stream_name": self.name,
                    "config": {
                        "name": name,
                        "deliver_subject": inbox.subject,
                        "filter_subject": self.subject,
                        "deliver_policy": "by_start_sequence",
                        "opt_start_seq": start,
                        "ack_policy": "none",
                        "max_deliver": 1,
                        "flow_control": True,
                        "idle_heartbeat": round(consumer.HEARTBEAT * _SECOND),
                        "mem_storage": True,
                        "num_replicas": 1,
                        "inactive_threshold": round(INACTIVE * _SECOND),
                    },
                },
            )
        except BaseException:
            inbox.close()
            raise
        with self._understanding():
            return Consumer(self.connection, name, inbox, int(answer["num_pending"]))

    def forget(self, old: Consumer) -> None:
        """Delete a consumer that is not needed any more. Not waited for: the server would do it itself in the end."""
        old.inbox.close()
        if self.connection.failure is None:
            self.connection.publish_nowait(f"$JS.API.CONSUMER.DELETE.{self.name}.{old.name}")


def _closes(message: Message) -> bool:
    """Whether this is the server's closing status, and no stored message with a status line of its publisher's."""
    return message.status is not None and not message.is_stored


def _overlap(one: str, other: str) -> bool:
    """Whether a subject exists that both patterns match."""
    ours, theirs = one.split("."), other.split(".")
    for our, their in zip(ours, theirs, strict=False):
        if ">" in (our, their):
            return True
        if "*" not in (our, their) and our != their:
            return False
    return len(ours) == len(theirs)


def _version(server_info: Mapping[str, Any]) -> tuple[int, ...]:
    numbers = str(server_info.get("version", "")).partition("-")[0].split(".")
    return tuple(int(number) for number in numbers if number.isdigit())


def base36(number: int) -> str:
    """A non-negative number in the digits 0-9a-z."""
    digits = ""
    while number >= 36:
        number, digit = divmod(number, 36)
        digits = _DIGITS[digit] + digits
    return _DIGITS[number] + digits


_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
