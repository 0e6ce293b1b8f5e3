"""The server inside a Trio program of your own: one nursery, ended by a cancel, and nothing of it is left.

Try it, with a nats-server running:

    python examples/embed.py &
    curl -N 'http://127.0.0.1:3000/discoveries/stream?agent_id=me'

It serves for ten seconds, or for as many as you say. Every stream ends with a goodbye, because `stop` is set before
the nursery is cancelled; cancelling alone ends them at once, and leaves as little behind.
"""

import os
import sys

import trio

from sse_trio.application import create_app
from sse_trio.server import bind_socket, run_app
from sse_trio.settings import Settings


async def main(seconds: float) -> None:
    app = create_app(Settings(nats_url=(os.environ.get("NATS_URL", "nats://127.0.0.1:4222"),)))
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        url = await nursery.start(run_app, app, bind_socket(os.environ.get("BIND", "127.0.0.1:3000")), stop)
        print(f"serving {url} for {seconds:g} seconds", flush=True)
        await trio.sleep(seconds)  # your own program goes here
        stop.set()
    print("nothing is left:", trio.lowlevel.current_statistics().tasks_living, "tasks of trio's own and this one")


trio.run(main, float(sys.argv[1]) if len(sys.argv) > 1 else 10.0)
