# mypy: disable-error-code="import-not-found"
"""The contender from the asyncio world: sse-starlette on uvicorn with uvloop, fed by nats-py.

Strategy: what sse-starlette's documentation shows: a queue for each client, a generator that yields from it,
an `EventSourceResponse` around that. The JSON text is made once for all clients; sse-starlette makes the frame.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import nats
from nats.aio.msg import Msg
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

BUFFER = 1024  # events that one client may have queued: as many as sse-trio allows

Queue = asyncio.Queue[tuple[str, str]]
queues: set[Queue] = set()
count = 0


async def share(message: Msg) -> None:
    """Offer a discovery to every client; one that is behind by a whole buffer misses it."""
    global count
    count += 1
    agent = json.loads(message.data)["agent_id"]
    uri = f"discovery://agents/{agent}/discoveries/1234567890-Anomaly-unusual-login-patter"
    notification = {"jsonrpc": "2.0", "method": "notifications/resources/updated", "params": {"uri": uri}}
    item = (f"starlette-{count}", json.dumps(notification, separators=(",", ":")))
    for queue in queues:
        try:
            queue.put_nowait(item)
        except asyncio.QueueFull:
            pass


@asynccontextmanager
async def lifespan(_: Starlette) -> AsyncIterator[None]:
    connection = await nats.connect(f"nats://127.0.0.1:{os.environ['NATS_PORT']}")
    await connection.subscribe("discoveries.>", cb=share, pending_msgs_limit=-1, pending_bytes_limit=-1)
    await connection.flush()
    yield
    await connection.close()


async def stream(_: Request) -> EventSourceResponse:
    async def events() -> AsyncIterator[ServerSentEvent]:
        queue: Queue = asyncio.Queue(BUFFER)
        queues.add(queue)
        try:
            yield ServerSentEvent("{}", event="connected")
            while True:
                number, data = await queue.get()
                yield ServerSentEvent(data, event="discovery", id=number)
        finally:
            queues.discard(queue)

    return EventSourceResponse(events())


async def health(_: Request) -> PlainTextResponse:
    return PlainTextResponse("live")  # uvicorn answers nothing before the lifespan has subscribed


app = Starlette(routes=[Route("/discoveries/stream", stream), Route("/health", health)], lifespan=lifespan)
