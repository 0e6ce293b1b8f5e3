"""An ordered consumer of a stream: what it gives is complete and in order, or it says that it is not.

Strategy: an ephemeral push consumer in the server's memory, whose numbering shows every hole, whose heartbeats show
every silence, and whose flow control is answered when what came before it has been dealt with: that is the
back-pressure. It repairs nothing. When anything is odd it raises `ConsumerBroken`, and its owner makes another one that
begins where this one stood, at the price of one request.

A publisher may set any header and any status line. What is data and what is control is told by the reply subject, which
only the server can make up.
"""

from __future__ import annotations

from typing import NamedTuple

import trio

from sse_trio.nats_connection import Inbox, NatsConnection
from sse_trio.nats_protocol import Message

__all__ = ["HEARTBEAT", "Batch", "Consumer", "ConsumerBroken", "StoredMessage"]

HEARTBEAT = 1.0
"""Seconds of silence after which the server sends a heartbeat; three of them missed, and the consumer is dead."""


class ConsumerBroken(Exception):
    """This consumer's messages are no longer complete; the text says how that shows. Make another one."""

    def __init__(self, cause: str, *, silent: bool = False) -> None:
        super().__init__(cause)
        self.silent = silent
        """Whether nothing at all came for too long, so that events may be waiting."""


class StoredMessage(NamedTuple):
    """A message of the stream."""

    sequence: int
    subject: str
    payload: bytes


class Batch(NamedTuple):
    """What a consumer has given since it was last asked."""

    messages: list[StoredMessage]
    pending: list[int]
    """For each message, how many followed it in the stream when the server sent it."""
    skipped_to: int
    """Nothing else of ours is in the stream up to this sequence; 0 where that is not known."""


class Consumer:
    """An ordered consumer: its messages are complete and in order, or it raises `ConsumerBroken`."""

    def __init__(self, connection: NatsConnection, name: str, inbox: Inbox, backlog: int) -> None:
        self.connection = connection
        self.name = name
        self.inbox = inbox
        self.backlog = backlog
        """How many messages were waiting when it was created."""
        self._delivered = 0
        self._flow_control: list[str] = []
        self._broken: str | None = None

    async def take(self) -> Batch:
        """Everything that has arrived; waits for something. By asking, the caller says that it is done with the last.

        Raises:
            ConsumerBroken: messages are missing, or the server has been silent for too long.
            NatsError: the connection is dead.
        """
        for reply in self._flow_control:
            self.connection.publish_nowait(reply)
        self._flow_control.clear()
        if self._broken is not None:
            raise ConsumerBroken(self._broken)
        with trio.move_on_after(3 * HEARTBEAT) as scope:
            arrived = await self.inbox.take()
        if scope.cancelled_caught:
            raise ConsumerBroken(f"no heartbeat for {3 * HEARTBEAT:g} s", silent=True)
        if self.inbox.lost:
            self._broken = f"{self.inbox.lost} messages did not fit into memory"
        try:
            return self._sort(arrived)
        except (ValueError, LookupError) as error:
            raise ConsumerBroken(f"a message of it is odd: {error!r}") from None

    def _sort(self, arrived: list[Message]) -> Batch:
        """Take messages and control apart, up to the first sign that something is missing."""
        messages: list[StoredMessage] = []
        pending: list[int] = []
        skipped_to = 0
        for message in arrived:
            if message.reply.startswith(b"$JS.ACK."):
                # $JS.ACK.[domain.account.]stream.consumer.delivered.STREAM-SEQ.CONSUMER-SEQ.time.PENDING[.token]
                tokens = message.reply.split(b".")
                offset = 0 if len(tokens) == 9 else 2
                consumer_sequence = int(tokens[6 + offset])
                if consumer_sequence != self._delivered + 1:
                    self._broken = f"message {self._delivered + 1} is missing, {consumer_sequence} came"
                    break
                self._delivered = consumer_sequence
                messages.append(StoredMessage(int(tokens[5 + offset]), message.subject, message.payload))
                pending.append(int(tokens[8 + offset]))
                skipped_to = 0
            elif message.status == 100:
                if message.reply:
                    self._flow_control.append(message.reply.decode())
                    continue
                fields = message.headers
                if stalled := fields.get("Nats-Consumer-Stalled"):
                    self._flow_control.append(stalled)
                if fields.get("Nats-Last-Consumer") != str(self._delivered):
                    self._broken = f"message {fields.get('Nats-Last-Consumer')} was sent, {self._delivered} came"
                    break
                if not stalled:
                    skipped_to = int(fields.get("Nats-Last-Stream", "0"))
            else:
                self._broken = f"the server says: {message.status} {message.description}"
                break
        return Batch(messages, pending, skipped_to)
