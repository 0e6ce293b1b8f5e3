"""Sharing a discovery over NATS: the small Python API for agents, and what `sse-trio share` uses.

    async with open_publisher("nats://127.0.0.1:4222", agent_id="security-001", agent_role="Security") as publisher:
        found = await publisher.share("Anomaly", "unusual login pattern", 0.9)
        await publisher.share_related("Question", "who else sees this?", 0.5, found)

Strategy: a supervisor keeps one crash-only connection open; every share takes the one that is there, or waits a bounded
time for the next. A share that returns is one that the server has: where a stream captures the subject it says so by
its acknowledgement, else a PONG says that everything before it was processed, refusals included. Each message carries
a `Nats-Msg-Id`, so that a stream takes it once however often it is sent: a share whose connection breaks is sent again
by itself where a stream would notice, and is an `uncertain` error where nobody would.
"""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from secrets import token_hex
from typing import Any

import trio

from sse_trio.discovery import Discovery, build, subject_for
from sse_trio.nats_connection import NatsConnection, open_connection
from sse_trio.nats_protocol import Message, NatsError, NoResponders, RequestTimeout

__all__ = ["PublishError", "Publisher", "open_publisher"]

WITHIN = 5.0
"""Seconds that a share may take, with all waiting for a connection."""

API_TIMEOUT = 2.0
"""Seconds that the JetStream API has to answer."""

FIRST_DELAY, LAST_DELAY = 0.05, 2.0
"""Seconds before the next try to connect: doubled each round, less a random part of up to a half."""

NO_STREAM_FOR = 10.0
"""Seconds for which it is believed that no stream captures a subject; one may be created at any time."""

HOPELESS = {"auth", "tls"}
"""Reasons that waiting for another try does not help with."""


class PublishError(NatsError):
    """A discovery was not shared, or nobody knows whether it was; `reason` and `detail` are those of a `NatsError`.

    Further reasons: `stream` (the stream that captures the subject does not take it).
    """

    def __init__(self, reason: str, detail: str, msg_id: str, *, uncertain: bool) -> None:
        super().__init__(reason, detail)
        self.msg_id = msg_id
        """To share it again with: a stream takes it only once."""
        self.uncertain = uncertain
        """Whether it may have arrived all the same."""


class Publisher:
    """Shares discoveries while `run` runs. Several tasks may share one.

    `agent_id` and `agent_role` are what shares say that do not say it themselves.
    """

    def __init__(
        self,
        urls: Iterable[str],
        *,
        creds: Path | None = None,
        ca: Path | None = None,
        agent_id: str | None = None,
        agent_role: str | None = None,
        within: float = WITHIN,
    ) -> None:
        self.agent_id = agent_id
        self.agent_role = agent_role
        self.within = within
        self._urls = tuple(urls)
        self._creds = creds
        self._ca = ca
        self._connection: NatsConnection | None = None
        self._failure = NatsError("unreachable", "not connected yet")
        self._failed_rounds = 0
        """How many times in a row all servers were tried in vain."""
        self._ended = False
        self._change = trio.Event()
        self._no_stream_until: dict[str, float] = {}
        self._captured: set[str] = set()

    async def run(self) -> None:
        """Keep a connection open, whatever becomes of the servers, until cancelled. It may be run again."""
        self._ended = False
        try:
            while True:
                self._failed_rounds = 0 if await self._try_all() else self._failed_rounds + 1
                self._changed()
                longest = min(LAST_DELAY, FIRST_DELAY * 2.0 ** min(self._failed_rounds, 20))
                await trio.sleep(longest * random.uniform(0.5, 1.0))
        finally:
            self._ended = True
            self._changed()

    async def _try_all(self) -> bool:
        """Try each server, stay with each that can be had until its connection dies; False when there was none."""
        connected = False
        for url in self._urls:
            try:
                async with open_connection(url, creds=self._creds, ca=self._ca, name="sse-trio share") as connection:
                    self._failed_rounds = 0
                    self._no_stream_until.clear()
                    self._captured.clear()
                    self._connection = connection
                    self._changed()
                    connected = True
                    await connection.closed.wait()
                    raise connection.failure or NatsError("closed", "closed by us")
            except NatsError as error:
                self._failure = error
            finally:
                self._connection = None
        return connected

    async def share(
        self,
        discovery_type: str,
        content: str,
        confidence: float,
        *,
        related_to: str | Discovery | None = None,
        agent_id: str | None = None,
        agent_role: str | None = None,
        timestamp: datetime | str | None = None,
        msg_id: str | None = None,
        **more: Any,
    ) -> Discovery:
        """Share a discovery with everybody who listens; returns it, with its URI, when the server has it.

        `related_to` names another discovery (a Discovery is named by its URI). `timestamp` is now where none is given.
        `more` are further keys of the JSON object. With the `msg_id` of an earlier try it is shared once.

        Raises:
            InvalidDiscovery: the fields make none; its `errors` name them.
            PublishError: NATS did not take it within `within` seconds.

        Cancellation: at any time; the discovery may have been shared.
        """
        discovery = build(
            {
                "agent_id": agent_id if agent_id is not None else self.agent_id,
                "agent_role": agent_role if agent_role is not None else self.agent_role,
                "discovery_type": discovery_type,
                "content": content,
                "confidence": confidence,
                "timestamp": timestamp,
                "related_to": related_to.uri if isinstance(related_to, Discovery) else related_to,
            }
            | more
        )
        await self.publish(discovery, msg_id=msg_id)
        return discovery

    async def share_related(
        self, discovery_type: str, content: str, confidence: float, related_to: str | Discovery, **options: Any
    ) -> Discovery:
        """Share a discovery that builds on another; else as `share`."""
        return await self.share(discovery_type, content, confidence, related_to=related_to, **options)

    async def publish(self, discovery: Discovery, *, msg_id: str | None = None) -> None:
        """Share a discovery that is made already; returns when the server has it. Raises and cancels as `share`."""
        attempt = _Attempt(msg_id if msg_id is not None else token_hex(16))
        with trio.move_on_after(self.within):
            while True:
                connection = await self._connected(attempt)
                try:
                    await self._publish(connection, discovery, attempt)
                    return
                except NatsError as error:
                    # It is sent again where that cannot double it: nothing was written yet, or a stream takes it once.
                    if connection.failure is None or (attempt.written and not attempt.captured):
                        raise attempt.failed(error) from None
        # Only the deadline leads here.
        cause = self._failure if self._connection is None else NatsError("timeout", "the server does not answer")
        raise attempt.failed(NatsError(cause.reason, f"not within {self.within:g} s: {cause.detail}"))

    async def ready(self) -> None:
        """Wait for a connection.

        Raises:
            PublishError: no server could be connected to.
        """
        await self._connected(_Attempt(""), patient=False)

    async def _connected(self, attempt: _Attempt, *, patient: bool = True) -> NatsConnection:
        while self._connection is None or self._connection.failure is not None:
            if self._ended:
                raise attempt.failed(NatsError("closed", "this publisher is closed"))
            if self._failed_rounds and (not patient or self._failure.reason in HOPELESS):
                raise attempt.failed(self._failure)
            await self._change.wait()
        return self._connection

    async def _publish(self, connection: NatsConnection, discovery: Discovery, attempt: _Attempt) -> None:
        subject = subject_for(discovery)
        attempt.captured = await self._is_captured(connection, subject)
        headers = {"Nats-Msg-Id": attempt.msg_id}
        attempt.written = attempt.written or connection.failure is None
        if not attempt.captured:
            await connection.publish(subject, discovery.payload, headers=headers, confirm=True)
            return
        answered = False
        try:
            *_, ack = await connection.request_many(
                subject, discovery.payload, until=_is_acknowledgement, within=self.within, headers=headers
            )
            answered = True
        except NoResponders:
            raise NatsError("stream", f"{connection.server}: no stream takes {subject} any more") from None
        finally:
            if not answered:  # it may be gone: the next share asks
                self._captured.discard(subject)
        if "error" in (answer := _object(ack.payload)):
            raise NatsError("stream", f"{connection.server}: {_description(answer)}")

    async def _is_captured(self, connection: NatsConnection, subject: str) -> bool:
        """Whether a stream stores what is published on `subject`, as far as we may ask."""
        if subject in self._captured:
            return True
        if trio.current_time() < self._no_stream_until.get(subject, 0):
            return False
        request = json.dumps({"subject": subject}).encode()
        try:
            message = await connection.request("$JS.API.STREAM.NAMES", request, within=API_TIMEOUT)
            answer = _object(message.payload)
        except NoResponders:
            answer = {}  # no JetStream
        except NatsError as error:
            if isinstance(error, RequestTimeout) or error.reason != "permissions":
                raise
            answer = {}  # who may not ask gets no acknowledgement either
        if answer.get("streams"):
            self._captured.add(subject)
            return True
        self._no_stream_until[subject] = trio.current_time() + NO_STREAM_FOR
        return False

    def _changed(self) -> None:
        self._change.set()
        self._change = trio.Event()


class _Attempt:
    """How far a share has come."""

    def __init__(self, msg_id: str) -> None:
        self.msg_id = msg_id
        self.written = False
        self.captured = False

    def failed(self, error: NatsError) -> PublishError:
        uncertain = self.written and error.reason not in {"permissions", "refused", "stream"}
        return PublishError(error.reason, error.detail, self.msg_id, uncertain=uncertain)


@asynccontextmanager
async def open_publisher(
    url: str | Iterable[str] = "nats://127.0.0.1:4222",
    *,
    agent_id: str | None = None,
    agent_role: str | None = None,
    creds: Path | None = None,
    ca: Path | None = None,
    within: float = WITHIN,
) -> AsyncIterator[Publisher]:
    """A connected publisher for one block; it reconnects by itself. Exceptions of the block come out as they are.

    `url` is one server or several, separated by commas or as an iterable. `agent_id` and `agent_role` are the
    sharer's, where a share does not say them itself. `within` bounds each share, in seconds. Works in any Trio
    program.

    Raises:
        PublishError: no server could be connected to.

    Cancellation: at any time; closing takes at most a second.
    """
    urls = [part.strip() for part in url.split(",")] if isinstance(url, str) else url
    publisher = Publisher(urls, creds=creds, ca=ca, agent_id=agent_id, agent_role=agent_role, within=within)
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(publisher.run)
        # A nursery would wrap what the block raises; it is carried around it.
        try:
            await publisher.ready()
            yield publisher
        except Exception as error:
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


def _object(payload: bytes) -> dict[str, Any]:
    """The JSON object in these bytes, {} where there is none."""
    try:
        value = json.loads(payload)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _is_acknowledgement(message: Message) -> bool:
    """Whether this is a stream's answer, and not one of somebody who listens on the subject."""
    answer = _object(message.payload)
    return "error" in answer or ("stream" in answer and "seq" in answer)


def _description(answer: dict[str, Any]) -> str:
    error = answer["error"]
    return str(error.get("description", error) if isinstance(error, dict) else error)
