"""Other people's clients: curl, httpx-sse and Node's `eventsource` hear what ours do, and resume as they were made to.

Each hears ten discoveries in order, under the ids of the stream, loses its server, and goes on with the next one after
its last event. (A browser's own EventSource is tried with the live page and with examples/client.html.)
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import httpx_sse
import provision
import trio
from support import WITHIN, NatsServer, Server, eventually, free_port, payload, run_server

from sse_trio.discovery import decode
from sse_trio.sse import Decoder

SUBJECT = "discoveries.insights"
QUICK = {"SSE_RETRY": "100", "SSE_DRAIN_WINDOW": "0"}

NODE_CLIENT = """
import { EventSource } from "eventsource";
const source = new EventSource(process.argv[2]);
for (const name of ["connected", "discovery", "gap", "goodbye"])
  source.addEventListener(name, (event) =>
    console.log(JSON.stringify({ event: name, data: event.data, id: event.lastEventId })));
"""


@dataclass
class Heard:
    """What a client has heard: (event, data, id) each."""

    events: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def discoveries(self) -> list[tuple[str, str]]:
        """The URI and the id of each discovery."""
        return [(json.loads(data)["params"]["uri"], id) for name, data, id in self.events if name == "discovery"]

    async def hears(self, count: int) -> None:
        await eventually(lambda: len(self.discoveries) >= count, f"{count} discoveries")

    def connections(self) -> list[dict[str, Any]]:
        return [json.loads(data) for name, data, _ in self.events if name == "connected"]


async def share(nats: NatsServer, numbers: range) -> None:
    await nats.publish(*((SUBJECT, payload(number)) for number in numbers))


def expected(epoch: str, numbers: range) -> list[tuple[str, str]]:
    """What is heard of discoveries that are alone in their stream: number n has the sequence n."""
    return [(decode(payload(number)).uri, f"{epoch}-{number}") for number in numbers]


async def epoch_of(server: Server) -> str:
    return str((await server.health())[1]["epoch"])


@asynccontextmanager
async def client(*command: str | Path) -> AsyncIterator[trio.lowlevel.FdStream]:
    """A program that hears the stream, and what it writes; it is killed with the block."""
    ours, theirs = os.pipe()
    async with trio.lowlevel.FdStream(ours) as output:
        with subprocess.Popen([*map(str, command)], stdout=theirs) as process:
            os.close(theirs)
            try:
                yield output
            finally:
                process.kill()


# -- curl --------------------------------------------------------------------------------------------------------------


async def curl(url: str, heard: Heard, *options: str) -> None:
    """What curl prints, read as the standard says."""
    decoder = Decoder()
    async with client("curl", "--no-buffer", "--silent", "--show-error", *options, url) as output:
        async for data in output:
            heard.events += [(event.event, event.data, event.id) for event in decoder.feed(bytes(data))]


async def test_curl_hears_ten_discoveries_and_goes_on_with_its_last_id(nats: NatsServer, tmp_path: Path) -> None:
    port = free_port()
    heard = Heard()
    async with run_server(tmp_path, nats_url=nats.url, port=port) as server, trio.open_nursery() as nursery:
        nursery.start_soon(curl, f"{server.url}/discoveries/stream?agent_id=curl", heard)
        await eventually(heard.connections, "curl is connected")
        await share(nats, range(1, 11))
        await heard.hears(10)
        epoch = await epoch_of(server)
        nursery.cancel_scope.cancel()
    assert heard.discoveries == expected(epoch, range(1, 11))
    last = heard.discoveries[-1][1]
    await share(nats, range(11, 14))
    async with run_server(tmp_path, nats_url=nats.url, port=port) as server, trio.open_nursery() as nursery:
        url = f"{server.url}/discoveries/stream?agent_id=curl"
        with_header, with_query = Heard(), Heard()
        nursery.start_soon(curl, url, with_header, "--header", f"Last-Event-ID: {last}")
        nursery.start_soon(curl, f"{url}&last_event_id={last}", with_query)
        for resumed in (with_header, with_query):
            await resumed.hears(3)
            assert resumed.connections()[0]["resumed"] is True
            assert resumed.discoveries == expected(epoch, range(11, 14))
        nursery.cancel_scope.cancel()


async def test_curl_asks_for_the_head_and_gets_the_prompt_back(nats: NatsServer, tmp_path: Path) -> None:
    async with run_server(tmp_path, nats_url=nats.url) as server:
        url = f"{server.url}/discoveries/stream?agent_id=curl"
        done = await trio.run_process(["curl", "--silent", "--head", url], capture_stdout=True)
    assert b"content-type: text/event-stream" in done.stdout.lower()


# -- httpx-sse ---------------------------------------------------------------------------------------------------------


async def httpx_client(url: str, heard: Heard, last_event_id: str = "") -> None:
    headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
    async with (
        httpx.AsyncClient(timeout=WITHIN) as http,
        httpx_sse.aconnect_sse(http, "GET", url, headers=headers) as source,
    ):
        async for event in source.aiter_sse():
            heard.events.append((event.event, event.data, event.id))


async def test_httpx_sse_on_trio_hears_ten_discoveries_and_goes_on_with_its_last_id(
    nats: NatsServer, tmp_path: Path
) -> None:
    port = free_port()
    heard = Heard()
    async with trio.open_nursery() as nursery:
        async with run_server(tmp_path, nats_url=nats.url, port=port, env=QUICK) as server:
            url = f"{server.url}/discoveries/stream?agent_id=httpx"
            nursery.start_soon(httpx_client, url, heard)
            await eventually(heard.connections, "httpx is connected")
            await share(nats, range(1, 11))
            await heard.hears(10)
            epoch = await epoch_of(server)
        await eventually(lambda: heard.events[-1][0] == "goodbye", "the goodbye")
    assert heard.discoveries == expected(epoch, range(1, 11))
    await share(nats, range(11, 14))
    async with run_server(tmp_path, nats_url=nats.url, port=port) as server, trio.open_nursery() as nursery:
        nursery.start_soon(httpx_client, url, heard, heard.events[-1][2])
        await heard.hears(13)
        nursery.cancel_scope.cancel()
    assert heard.discoveries == expected(epoch, range(1, 14))
    assert [connection.get("resumed") for connection in heard.connections()] == [None, True]
    assert "gap" not in {name for name, _, _ in heard.events}


# -- Node --------------------------------------------------------------------------------------------------------------


async def node(script: Path, url: str, heard: Heard) -> None:
    """What a script prints: a JSON object on each line."""
    program = provision.node()
    assert program is not None, "make tools gets Node"
    rest = b""
    async with client(program, script, url) as output:
        async for data in output:
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                event = json.loads(line)
                heard.events.append((event["event"], event["data"], event["id"]))


async def test_nodes_eventsource_hears_ten_discoveries_and_comes_back_by_itself_after_a_restart(
    nats: NatsServer, tmp_path: Path
) -> None:
    assert (provision.node_modules() / "eventsource").exists(), "make tools gets the package"
    # A script finds its packages beside itself.
    script = tmp_path / "client.mjs"
    script.write_text(NODE_CLIENT)
    (tmp_path / "node_modules").symlink_to(provision.node_modules())
    port = free_port()
    heard = Heard()
    async with trio.open_nursery() as nursery:
        async with run_server(tmp_path, nats_url=nats.url, port=port, env=QUICK) as server:
            nursery.start_soon(node, script, f"{server.url}/discoveries/stream?agent_id=node", heard)
            await eventually(heard.connections, "Node is connected")
            await share(nats, range(1, 11))
            await heard.hears(10)
            epoch = await epoch_of(server)
        await eventually(lambda: heard.events[-1][0] == "goodbye", "the goodbye")
        await share(nats, range(11, 14))
        async with run_server(tmp_path, nats_url=nats.url, port=port, env=QUICK):
            await heard.hears(13)
        nursery.cancel_scope.cancel()
    assert heard.discoveries == expected(epoch, range(1, 14))
    assert [connection.get("resumed") for connection in heard.connections()] == [None, True]
    assert "gap" not in {name for name, _, _ in heard.events}
