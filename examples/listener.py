"""An agent in Trio that shares what it finds and hears what the others find.

Try it with `sse-trio serve` and a nats-server running, in two terminals, under two names:

    python examples/listener.py ada
    python examples/listener.py grace
"""

import os
import sys

import trio

from sse_trio.listener import listen
from sse_trio.publisher import open_publisher


async def main(name: str) -> None:
    server = os.environ.get("SERVER", "http://127.0.0.1:3000")
    async with trio.open_nursery() as nursery:

        async def share() -> None:
            async with open_publisher(
                os.environ.get("NATS_URL", "nats://127.0.0.1:4222"), agent_id=name, agent_role="Example"
            ) as publisher:
                found = await publisher.share("Question", f"{name} asks: is anybody there?", 0.5)
                await publisher.share_related("Insight", f"{name} is", 0.9, found)

        async with listen(server, agent_id=name) as discoveries:
            nursery.start_soon(share)
            async for discovery in discoveries:
                print(f"{discovery.agent_id}: {discovery.content}", flush=True)


trio.run(main, sys.argv[1] if len(sys.argv) > 1 else "ada")
