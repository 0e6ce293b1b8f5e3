"""Each example does what its head says, against a real nats-server and, where it needs one, a real server."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from chromium import open_window, run_chromium
from support import NatsServer, Server, a_discovery, eventually, free_port, listen, payload, run_server

from sse_trio.discovery import build

EXAMPLES = Path(__file__).parent.parent / "examples"
SUBJECT = "discoveries.insights"


class Example:
    """An example that runs, and what it has printed."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log

    @property
    def output(self) -> str:
        return self.log.read_text()

    async def prints(self, what: str) -> None:
        await eventually(lambda: what in self.output or self.process.poll() is not None, f"it prints {what!r}")
        await eventually(lambda: what in self.output, f"it prints {what!r} before it ends; {self.output}", 0.1)

    async def exited(self) -> int:
        await eventually(lambda: self.process.poll() is not None, f"it ends; {self.output}")
        return self.process.returncode


@asynccontextmanager
async def example(directory: Path, name: str, *arguments: str, **environment: str) -> AsyncIterator[Example]:
    """The example as a process, killed with the block."""
    log = directory / f"{name}-{'-'.join(arguments) or 'alone'}.log".replace("/", "_")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(EXAMPLES / name), *arguments],
            env=os.environ | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    with process:
        try:
            yield Example(process, log)
        finally:
            process.kill()


async def listening(server: Server, agent_id: str) -> None:
    """Wait until somebody of this name is connected."""

    async def is_there() -> bool:
        clients = (await server.get("/clients"))[1]["clients"]
        return agent_id in {client["agent_id"] for client in clients}

    await eventually(is_there, f"{agent_id} listens")


def test_every_example_has_its_test() -> None:
    tests = Path(__file__).read_text()
    assert [path.name for path in EXAMPLES.glob("*.py") if f'"{path.name}"' not in tests] == []


async def test_the_server_serves_with_three_agents_and_ends_with_a_goodbye(nats: NatsServer, tmp_path: Path) -> None:
    port = free_port()
    async with example(tmp_path, "server.py", NATS_URL=nats.url, BIND=f"127.0.0.1:{port}") as server:
        await server.prints(f"the live page: http://127.0.0.1:{port}/")
        async with listen(port) as client:
            for _ in range(2):
                await client.next("discovery")
            server.process.send_signal(signal.SIGINT)
            await client.next("goodbye")
            await client.read_to_end()
            assert client.ended
        assert await server.exited() == 0


async def test_the_publisher_is_heard_in_order(nats: NatsServer, tmp_path: Path) -> None:
    async with run_server(tmp_path, nats_url=nats.url) as server, listen(server.port, query="&detail=full") as client:
        await client.next("connected")
        async with example(tmp_path, "publisher.py", NATS_URL=nats.url) as publisher:
            assert await publisher.exited() == 0
        assert publisher.output == "".join(f"shared: I can count to {number}\n" for number in range(1, 6))
        heard = await client.take(5)
        assert [f"I can count to {number}" in event.data for number, event in enumerate(heard, 1)] == [True] * 5


async def test_the_listener_hears_the_other_and_not_itself(nats: NatsServer, tmp_path: Path) -> None:
    async with run_server(tmp_path, nats_url=nats.url) as server:
        place = {"NATS_URL": nats.url, "SERVER": server.url}
        async with example(tmp_path, "listener.py", "ada", **place) as ada:
            await listening(server, "ada")
            async with example(tmp_path, "listener.py", "grace", **place):
                await ada.prints("grace: grace asks: is anybody there?\ngrace: grace is\n")
            assert "ada: " not in ada.output


async def test_the_embedded_server_says_goodbye_and_leaves_nothing(nats: NatsServer, tmp_path: Path) -> None:
    port = free_port()
    async with example(tmp_path, "embed.py", "5", NATS_URL=nats.url, BIND=f"127.0.0.1:{port}") as program:
        await program.prints(f"serving http://127.0.0.1:{port} for 5 seconds")
        async with listen(port) as client:
            await client.next("connected")
            await nats.publish((SUBJECT, payload()))
            assert build(a_discovery()).uri in (await client.next("discovery")).data
            await client.next("goodbye")
            await client.read_to_end()
            assert client.ended
        assert await program.exited() == 0
        assert re.search(r"nothing is left: \d tasks", program.output)


async def test_the_slow_reader_is_told_what_it_has_missed(core_nats: NatsServer, tmp_path: Path) -> None:
    env = {"SSE_BUFFER": "10", "SSE_HISTORY": "0", "NATS_DURABLE": "off"}
    async with (
        run_server(tmp_path, nats_url=core_nats.url, env=env) as server,
        example(tmp_path, "slow_reader.py", server.url, "0.002") as reader,
        trio.open_nursery() as nursery,
    ):
        await listening(server, "slow")

        async def share() -> None:
            while True:
                await core_nats.publish(*[(SUBJECT, payload(content="x" * 1000))] * 1000)

        nursery.start_soon(share)
        await reader.prints('a gap: {"reason":"overflow","missed":')
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("restarted", [False, True], ids=["once", "over a restart"])
async def test_the_page_shows_ten_discoveries_in_order_in_a_browser(
    restarted: bool, nats: NatsServer, tmp_path: Path
) -> None:
    port = free_port()
    quick = {"SSE_RETRY": "100", "SSE_DRAIN_WINDOW": "0"}
    page_url = f"{(EXAMPLES / 'client.html').as_uri()}?server=http://127.0.0.1:{port}"
    expected = [build(a_discovery(number)).uri for number in range(10)]
    with run_chromium() as chromium:
        async with open_window(chromium) as window:
            async with run_server(tmp_path, nats_url=nats.url, port=port, env=quick):
                tab = await window.open(page_url)
                await tab.shows("#state:text-matches('connected as')")
                first = 5 if restarted else 10
                await nats.publish(*((SUBJECT, payload(number)) for number in range(first)))
                await tab.shows("#heard li", first)
            if restarted:
                await nats.publish(*((SUBJECT, payload(number)) for number in range(5, 9)))
                async with run_server(tmp_path, nats_url=nats.url, port=port, env=quick):
                    await tab.shows("#state:text-matches('connected as')")
                    await nats.publish((SUBJECT, payload(9)))
                    await tab.shows("#heard li", 10)
            assert (await tab.texts("#heard li"))[::-1] == expected
            assert await tab.texts("#heard li.gap") == []
