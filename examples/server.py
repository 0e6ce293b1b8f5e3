"""A server with three sample agents in one program, against a NATS that runs.

Try it, with a nats-server running, then open examples/client.html in a browser:

    python examples/server.py

NATS_URL names another nats-server, BIND another address. `sse-trio demo` is this with a nats-server of its own.
"""

import os
import signal
from collections.abc import Mapping
from typing import Any

import trio

from sse_trio.application import create_app
from sse_trio.publisher import open_publisher
from sse_trio.sample_agents import sample_agents
from sse_trio.server import bind_socket, run_app
from sse_trio.settings import Settings

NATS_URL = os.environ.get("NATS_URL", "nats://127.0.0.1:4222")


async def main() -> None:
    app = create_app(Settings(nats_url=(NATS_URL,)))
    bound = bind_socket(os.environ.get("BIND", "127.0.0.1:3000"))
    stop = trio.Event()
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery, open_publisher(NATS_URL) as publisher:
            url = await nursery.start(run_app, app, bound, stop)
            print(f"the live page: {url}/", flush=True)

            async def share(fields: Mapping[str, Any]) -> str:
                return (await publisher.share(**fields)).uri

            async with trio.open_nursery() as agents:
                agents.start_soon(sample_agents, share)
                async for _ in signals:
                    break
                agents.cancel_scope.cancel()
            stop.set()


trio.run(main)
