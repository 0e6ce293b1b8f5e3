"""What the URI of every notification reads back: exactly the discovery that was published, elsewhere and later.

Strategy: random discoveries go through a real NATS to two real servers, one whose memory holds them all and one whose
memory holds next to none. What a client heard at one is read at the other, all of it, over a few connections that are
kept; then both servers are started again, and all of it is read again. Exactly means: the same JSON, in the same order
of keys, with numbers of the same kind.

A thousand stand in the suite. `READ_BACK=10000 pytest -s tests/test_read_back.py` is the long run, `READ_BACK_SEED=…`
takes others.
"""

from __future__ import annotations

import json
import os
import random
import string
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import trio
from support import NatsServer, Server, eventually, fail_within, free_port, listen, run_server

from sse_trio.discovery import DISCOVERY_TYPES
from sse_trio.sse import ServerSentEvent

NUMBER = int(os.environ.get("READ_BACK", "1000"))
SEED = int(os.environ.get("READ_BACK_SEED", "7"))

ROUND = 500
"""Discoveries that are published at once: no more than a listener's queue and the stream's ingress take."""

FEW = 10
"""Events that the forgetful server keeps in memory."""

CLOCKS = {"right": timedelta(), "a day fast": timedelta(days=1), "a day slow": timedelta(days=-1)}

SEARCHED = max(NUMBER // 100, 1)
"""Without `event_id` a question to the stream is a search through everything since an hour before the time in the id:
of those, every so many-th is asked. Of memory all are."""

REQUEST_WITHIN = 60.0


@dataclass
class Published:
    """A discovery as it was published, and by what clock."""

    fields: dict[str, Any]
    clock: str
    uri: str = ""
    event_id: str = ""

    @property
    def path(self) -> str:
        """What a client makes of the URI in its notification."""
        return self.uri.replace("discovery://", "/")


def random_text(draw: random.Random, longest: int) -> str:
    """Characters of all kinds: what a URI, a path or a header would trip over, and all of Unicode."""
    alphabet = draw.choice([string.ascii_letters + " ", string.printable + "\0", "/%?#&;=+.~ ", "", ""])
    return "".join(
        draw.choice(alphabet) if alphabet else random_character(draw) for _ in range(draw.randrange(longest + 1))
    )


def random_character(draw: random.Random) -> str:
    character = chr(draw.randrange(draw.choice([0x250, 0x3000, 0x110000])))
    return "\N{REPLACEMENT CHARACTER}" if "\ud800" <= character <= "\udfff" else character


def random_time(draw: random.Random, clock: str) -> str:
    """RFC 3339 in one of its spellings. A clock that is right may be up to an hour fast: 50 minutes here, as the test
    itself takes its time."""
    moment = datetime.now(UTC) + CLOCKS[clock] + timedelta(seconds=draw.uniform(-600, 3000))
    text = moment.astimezone(timezone(timedelta(minutes=draw.choice([0, 0, 330, -570])))).isoformat(
        timespec=draw.choice(["seconds", "milliseconds", "microseconds"])
    )
    return draw.choice([text, text.replace("+00:00", "Z"), text.replace("T", "t").replace("+00:00", "z")])


def random_discoveries(draw: random.Random, number: int) -> list[Published]:
    """All types and clocks; one in ten has the id of an earlier one, and goes on in another way (or in the same)."""
    agents = [name for _ in range(200) if (name := random_text(draw, 20)) not in {"", ".", ".."}]
    found: list[Published] = []
    for index in range(number):
        clock = draw.choice(list(CLOCKS))
        kind = draw.choice(DISCOVERY_TYPES)
        fields = {
            "agent_id": draw.choice(agents),
            "agent_role": random_text(draw, 10),
            "discovery_type": draw.choice([kind, kind, kind.lower(), kind.upper()]),
            "content": random_text(draw, draw.choice([10, 60, 2000])),
            "confidence": draw.choice([0, 1, 0.5, draw.random()]),
            "timestamp": random_time(draw, clock),
            "related_to": draw.choice([None, "discovery://agents/a/discoveries/1-Insight-x", random_text(draw, 9)]),
        }
        if draw.random() < 0.1:
            del fields["related_to"]
        if draw.random() < 0.1:
            fields["évidence"] = {"n": [draw.randrange(10**9), draw.random(), None], "text": random_text(draw, 20)}
        # Not among the last: of those with one id, memory would have some and not the others, and memory comes first.
        if found and index < number - FEW and draw.random() < 0.1:
            earlier = draw.choice(found)
            clock = earlier.clock
            same = {name: earlier.fields[name] for name in ("agent_id", "discovery_type", "timestamp")}
            tail = draw.choice([earlier.fields["content"][20:], random_text(draw, 30)])
            start = earlier.fields["content"][:20]
            fields |= same | {"content": start + tail if len(start) == 20 else start}
        found.append(Published(fields, clock))
    return found


async def share(nats: NatsServer, discoveries: Sequence[Published], draw: random.Random) -> None:
    """Publish them, in whatever spelling of JSON."""
    await nats.publish(
        *(
            (
                draw.choice(["discoveries.insights", "discoveries.questions", "discoveries.a.b"]),
                json.dumps(
                    found.fields, ensure_ascii=draw.random() < 0.5, indent=draw.choice([None, None, 1])
                ).encode(),
            )
            for found in discoveries
        )
    )


class Questions:
    """One connection that is kept from question to question, and replaced when the server has had enough of it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.stream: trio.SocketStream | None = None

    async def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of one GET."""
        with fail_within(REQUEST_WITHIN, f"GET {path} is answered"):
            if self.stream is None:
                self.stream = await trio.open_tcp_stream("127.0.0.1", self.port)
            await self.stream.send_all(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode("ascii"))
            answer = b""
            while b"\r\n\r\n" not in answer:
                answer += await self._some(path)
            head, _, body = answer.partition(b"\r\n\r\n")
            status, *lines = head.decode("latin-1").lower().split("\r\n")
            fields = dict(line.split(": ", 1) for line in lines)
            while len(body) < int(fields["content-length"]):
                body += await self._some(path)
        if fields.get("connection") == "close":
            self.close()
        return int(status.split()[1]), body

    async def _some(self, path: str) -> bytes:
        assert self.stream is not None
        data = await self.stream.receive_some()
        assert data, f"the server closed the connection instead of answering {path}"
        return bytes(data)

    def close(self) -> None:
        if self.stream is not None:
            self.stream.socket.close()
            self.stream = None


async def ask_all(server: Server, questions: Iterable[tuple[str, list[dict[str, Any]]]], at_once: int = 16) -> int:
    """Ask for each path, and compare what comes back; how many they were."""
    waiting = iter(questions)
    asked = 0

    async def ask() -> None:
        nonlocal asked
        connection = Questions(server.port)
        try:
            for path, expected in waiting:
                status, body = await connection.get(path)
                asked += 1
                assert status == 200, (path, status, body, expected)
                assert json.dumps(json.loads(body)) == json.dumps({"discoveries": expected}), path
        finally:
            connection.close()

    async with trio.open_nursery() as nursery:
        for _ in range(at_once):
            nursery.start_soon(ask)
    return asked


async def test_every_uri_reads_back_exactly_what_was_published_elsewhere_and_after_a_restart(
    nats: NatsServer, tmp_path: Path
) -> None:
    draw = random.Random(SEED)
    published = random_discoveries(draw, NUMBER)
    alike: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    remembers = {"SSE_HISTORY": str(NUMBER)}
    forgets = {"SSE_HISTORY": str(FEW), "SSE_BUFFER": str(FEW)}
    ports = free_port(), free_port()

    async def start(stack: AsyncExitStack) -> list[Server]:
        servers = [
            await stack.enter_async_context(run_server(tmp_path, nats_url=nats.url, env=env, port=port))
            for port, env in zip(ports, (remembers, forgets), strict=True)
        ]
        for server in servers:
            await eventually(server.is_live, "the feed is live")
        return servers

    def by_event_id() -> Iterator[tuple[str, list[dict[str, Any]]]]:
        return ((f"{found.path}?event_id={found.event_id}", [found.fields]) for found in published)

    def by_time(step: int = 1) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        return ((found.path, alike[found.uri]) for found in [p for p in published if p.clock == "right"][::step])

    async def read_back(memory: Server, stream: Server) -> None:
        began = trio.current_time()
        asked = {}

        async def of_memory() -> None:
            asked["memory, event_id"] = await ask_all(memory, by_event_id())
            asked["memory, right clock"] = await ask_all(memory, by_time())

        async def of_stream() -> None:
            asked["stream, event_id"] = await ask_all(stream, by_event_id())
            asked["stream, right clock"] = await ask_all(stream, by_time(SEARCHED), at_once=4)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(of_memory)
            nursery.start_soon(of_stream)
        print(f"\nread back in {trio.current_time() - began:.1f} s: {asked}", end="")
        assert asked["memory, event_id"] == asked["stream, event_id"] == NUMBER
        assert asked["stream, right clock"] > 0

    async with AsyncExitStack() as stack:
        memory, stream = await start(stack)
        async with listen(memory.port, "one") as one, listen(stream.port, "two") as two:
            for client in (one, two):
                await client.next("connected")
            heard: tuple[list[ServerSentEvent], list[ServerSentEvent]] = ([], [])
            for at in range(0, NUMBER, ROUND):
                part = published[at : at + ROUND]
                await share(nats, part, draw)
                for client, events in zip((one, two), heard, strict=True):
                    events += await client.take(len(part))
        # Each is read at the instance that its notification did not come from; that says the same everywhere.
        assert [(event.id, event.data) for event in heard[0]] == [(event.id, event.data) for event in heard[1]]
        for found, event in zip(published, heard[0], strict=True):
            found.uri, found.event_id = json.loads(event.data)["params"]["uri"], event.id
            alike[found.uri].append(found.fields)
        shared_ids = sum(len(found) for found in alike.values() if len(found) > 1)
        print(f"\n{NUMBER} discoveries, {len(alike)} URIs, {shared_ids} that share one", end="")
        assert shared_ids > NUMBER // 20
        await read_back(memory, stream)
    async with AsyncExitStack() as stack:
        await read_back(*await start(stack))
