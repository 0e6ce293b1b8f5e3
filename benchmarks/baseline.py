"""The baseline: one generator and one memory channel for each client, as Quart's documentation suggests it.

Strategy: the handler opens a memory channel and returns a generator that yields one event at a time; the feed
offers each event to every channel and drops it where a client is behind. It encodes an event once, has no
filters and no resume: what it costs is what the pattern costs. It reads NATS in thirty lines of Trio, so that no
client library of NATS is measured.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import trio
from quart import Response, make_response
from quart_trio import QuartTrio

BUFFER = 1024  # events that one client may have queued: as many as sse-trio allows

app = QuartTrio(__name__)
clients: set[trio.MemorySendChannel[str]] = set()
feed_is_live = trio.Event()


async def messages(port: int) -> AsyncGenerator[bytes, None]:
    """The payloads of everything published below `discoveries.`; ends when nats-server goes."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    buffer = b""
    async with stream:
        await stream.send_all(b'CONNECT {"verbose":false,"pedantic":false}\r\nSUB discoveries.> 1\r\nPING\r\n')
        async for data in stream:
            buffer += data
            while True:
                line, newline, rest = buffer.partition(b"\r\n")
                if not newline:
                    break
                if line.startswith(b"MSG "):
                    length = int(line.rpartition(b" ")[2])
                    if len(rest) < length + 2:
                        break
                    yield rest[:length]  # noqa: ASYNC119  # its reader closes it with aclosing
                    rest = rest[length + 2 :]
                elif line == b"PING":
                    await stream.send_all(b"PONG\r\n")
                elif line == b"PONG":
                    feed_is_live.set()
                buffer = rest


async def feed() -> None:
    async with aclosing(messages(int(os.environ["NATS_PORT"]))) as payloads:
        number = 0
        async for payload in payloads:
            number += 1
            discovery = json.loads(payload)
            uri = f"discovery://agents/{discovery['agent_id']}/discoveries/1234567890-Anomaly-unusual-login-patter"
            notification = {
                "jsonrpc": "2.0",
                "method": "notifications/resources/updated",
                "params": {"uri": uri},
            }
            text = json.dumps(notification, separators=(",", ":"))
            event = f"event: discovery\ndata: {text}\nid: baseline-{number}\n\n"
            for client in clients:
                try:
                    client.send_nowait(event)
                except trio.WouldBlock:
                    pass  # this client is behind by a whole buffer: it misses this one


@app.before_serving
async def start() -> None:
    app.nursery.start_soon(feed)


@app.get("/discoveries/stream")
async def stream() -> Response:
    sender, receiver = trio.open_memory_channel[str](BUFFER)

    async def events() -> AsyncIterator[str]:
        clients.add(sender)
        try:
            yield "event: connected\ndata: {}\n\n"
            async for event in receiver:
                yield event
        finally:
            clients.discard(sender)

    headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
    response = await make_response(events(), 200, headers)
    assert isinstance(response, Response)
    response.timeout = None
    return response


@app.get("/health")
async def health() -> tuple[str, int]:
    return ("live", 200) if feed_is_live.is_set() else ("waiting for NATS", 503)
