"""14. A bug in one stream ends that stream; a bug in the feed or the broadcaster ends the process, with its own exception.

The guarantee: a server without a feed does not go on answering 200. Whoever supervises it sees a non-zero exit code and,
in the log, the exception that was raised.

The trap: a task in Quart-Trio's own nursery, or in Hypercorn's lifespan, that dies is a log line, and the server goes on
(`hypercorn/trio/lifespan.py:50-66`; `quart_trio/app.py:266-274`). The pattern is in `sse_trio/application.py`: the feed
runs in a nursery of ours, and its failure becomes the one error that Hypercorn does not swallow.

(With `-w 1` and more Hypercorn's master returns 0 whatever became of its workers; so `hypercorn` is run with `-w 0`.)
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from support import BIN, NatsServer, Server, eventually, free_port, listen, payload, run_server
from teardown.house import COMMANDS, note

BUGS = {
    "the feed": """
        from sse_trio.rounds import Rounds
        decode = Rounds._decode
        def wrong(self, subject, payload):
            if b"unlucky" in payload:
                raise ZeroDivisionError("a bug in the feed")
            return decode(self, subject, payload)
        Rounds._decode = wrong
    """,
    "the broadcaster": """
        from sse_trio.broadcaster import Broadcaster
        publish = Broadcaster.publish
        def wrong(self, events, *args, **options):
            if any("unlucky" in discovery.content for _, _, discovery in events):
                raise ZeroDivisionError("a bug in the broadcaster")
            publish(self, events, *args, **options)
        Broadcaster.publish = wrong
    """,
    "a stream": """
        from sse_trio.stream import EventStream
        park = EventStream._park
        async def wrong(self, client, *args):
            if client.agent_id == "unlucky":
                raise ZeroDivisionError("a bug in a stream")
            return await park(self, client, *args)
        EventStream._park = wrong
    """,
}


def command_with_bug(where: str, name: str, port: int, directory: Path) -> tuple[str, ...]:
    """A server with that bug in it."""
    lines = [line.removeprefix("        ") for line in BUGS[where].splitlines()]
    (directory / "buggy.py").write_text("\n".join(lines))
    if name == "hypercorn":
        (directory / "served.py").write_text("import buggy\nfrom sse_trio.app import app\n")
        return (str(BIN / "hypercorn"), "served:app", "--worker-class", "trio", "-w", "0", "-b", f"127.0.0.1:{port}")
    script = "import buggy; from sse_trio.cli import main; main()"
    return (sys.executable, "-c", script, "serve", "--bind", f"127.0.0.1:{port}")


@asynccontextmanager
async def server_with_bug(where: str, name: str, nats: NatsServer, directory: Path) -> AsyncIterator[Server]:
    port = free_port()
    async with run_server(
        directory,
        nats_url=nats.url,
        port=port,
        command=command_with_bug(where, name, port, directory),
        env={"PYTHONPATH": os.pathsep.join([str(directory), os.getcwd()])},
    ) as server:
        await eventually(server.is_live, "the feed is live")
        yield server


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("where", ["the feed", "the broadcaster"])
async def test_a_bug_in_it_ends_the_process_with_its_own_exception(
    where: str, name: str, core_nats: NatsServer, tmp_path: Path
) -> None:
    async with server_with_bug(where, name, core_nats, tmp_path) as server:
        async with listen(server.port) as stream:
            await stream.next("connected")
            began = trio.current_time()
            await core_nats.publish(("discoveries.insights", payload(content="unlucky")))
            code = await server.exited()
            note(f"a bug in {where}", trio.current_time() - began, 5, name)
            await stream.read_to_end()
        assert code not in {0, None}
        assert f"ZeroDivisionError: a bug in {where}" in server.output


@pytest.mark.parametrize("name", COMMANDS)
async def test_a_bug_in_one_stream_ends_that_one_and_nothing_else(
    name: str, core_nats: NatsServer, tmp_path: Path
) -> None:
    async with (
        server_with_bug("a stream", name, core_nats, tmp_path) as server,
        listen(server.port, "lucky") as lucky,
        listen(server.port, "unlucky") as unlucky,
    ):
        await lucky.next("connected")
        await unlucky.read_to_end()
        assert not unlucky.ended, "a stream that failed does not look as if it had ended"
        await core_nats.publish(("discoveries.insights", payload()))
        await lucky.next("discovery")
        assert server.process.poll() is None
        assert "a bug in a stream" in server.output
        _, answer = await server.get("/clients")
        assert [client["agent_id"] for client in answer["clients"]] == ["lucky"]
