"""What is counted is what happened, and the metrics say whom they speak for."""

from __future__ import annotations

import json
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families
from support import BIN, NatsServer, Server, eventually, free_port, listen, nats_server, payload, request, run_server

from sse_trio.access import Access
from sse_trio.broadcaster import Broadcaster
from sse_trio.metrics import Metrics
from sse_trio.nats_feed import NatsFeed
from sse_trio.settings import Settings

SUBJECT = "discoveries.insights"


async def metrics(server: Server) -> dict[str, float]:
    """Every sample by its name and labels."""
    status, headers, body = await request(server.port, "GET", "/metrics")
    assert (status, headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    return samples(body)


def samples(rendered: bytes) -> dict[str, float]:
    return {
        sample.name + "".join(f",{name}={value}" for name, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(rendered.decode())
        for sample in family.samples
    }


async def test_what_came_in_went_out_to_each_client(nats: NatsServer, tmp_path: Path) -> None:
    async with run_server(tmp_path, nats_url=nats.url) as server:
        async with listen(server.port, "a") as one, listen(server.port, "b") as two:
            await one.next("connected")
            await two.next("connected")
            await nats.publish(*(("discoveries.insights", payload(n)) for n in range(10)), ("discoveries.x", b"{"))
            await one.take(10)
            await two.take(10)
            counted = await metrics(server)
            assert counted["sse_trio_clients"] == 2
            assert counted["sse_trio_feed_live"] == 1
            assert counted["sse_trio_events_in_total,outcome=published"] == 10
            assert counted["sse_trio_events_in_total,outcome=json"] == 1
            assert counted["sse_trio_events_out_total"] == 20
            assert counted["sse_trio_delivery_seconds_count"] == 20
            assert counted["sse_trio_events_dropped_total"] == 0
            assert counted["sse_trio_bytes_out_total"] > 20 * 100
        await eventually(lambda: _gone(server), "both are gone")
        counted = await metrics(server)
        assert counted["sse_trio_disconnects_total,reason=left"] == 2
        assert counted["sse_trio_events_out_total"] == 20


async def _gone(server: Server) -> bool:
    return (await metrics(server))["sse_trio_clients"] == 0


def test_every_label_begins_at_zero_so_that_its_first_increase_is_seen() -> None:
    settings = Settings()
    broadcaster = Broadcaster(settings)
    feed = NatsFeed(settings, broadcaster)
    metrics = Metrics(broadcaster, feed, Access(settings), "here")
    first = samples(metrics.render())
    assert first["sse_trio_gaps_total,reason=expired"] == 0
    feed.counters.lost += 3
    feed.counters.invalid["schema"] += 2
    broadcaster.gaps.update(["restart"])
    broadcaster.disconnects.update(["stalled"])
    broadcaster.resumes.update(["stream"])
    second = samples(metrics.render())
    assert {name: value for name, value in second.items() if value != first[name]} == {
        "sse_trio_events_in_total,outcome=lost": 3,
        "sse_trio_events_in_total,outcome=schema": 2,
        "sse_trio_gaps_total,reason=restart": 1,
        "sse_trio_disconnects_total,reason=stalled": 1,
        "sse_trio_resumes_total,source=stream": 1,
    }


async def test_the_metrics_say_which_instance_they_speak_for(core_nats: NatsServer, tmp_path: Path) -> None:
    async with run_server(tmp_path, nats_url=core_nats.url) as server:
        instance = (await server.get("/clients"))[1]["instance"]
        assert (await metrics(server))[f"sse_trio_instance,instance={instance}"] == 1


async def clients(server: Server) -> dict[str, dict[str, int]]:
    """`GET /clients`, by agent."""
    return {client["agent_id"]: client for client in (await server.get("/clients"))[1]["clients"]}


def check_books(counted: dict[str, float]) -> None:
    """What passed the streams is what has become of it."""
    counters = ("out", "dropped", "filtered", "undelivered")
    parts = [counted[f"sse_trio_events_{name}_total"] for name in counters] + [counted["sse_trio_events_waiting"]]
    assert counted["sse_trio_events_offered_total"] == sum(parts), parts


async def all_books(server: Server, count: int) -> dict[str, dict[str, int]]:
    """What the log says of each stream that has ended, by agent, once `count` have."""

    def lines() -> list[dict[str, Any]]:
        return [json.loads(line) for line in server.output.splitlines() if '"client disconnected"' in line]

    await eventually(lambda: len(lines()) == count, f"{count} streams have ended")
    names = ("offered", "sent", "dropped", "filtered", "undelivered")
    return {line["agent_id"]: {name: line[name] for name in names} for line in lines()}


@pytest.mark.parametrize("durable", [True, False], ids=["jetstream", "core"])
async def test_in_a_real_run_the_books_balance_for_each_client_and_in_total(durable: bool, tmp_path: Path) -> None:
    """With JetStream a slow client reads on from memory and the stream; on core NATS, without memory, it loses some."""
    total, half = 2000, 1000

    async def publish(first: int, last: int) -> None:
        for start in range(first, last, 50):
            numbers = range(start, start + 50)
            await nats.publish(
                *((SUBJECT, payload(n, agent_id="odd" if n % 2 else "even", content="x" * 2000)) for n in numbers)
            )
            check_books(await metrics(server))

    async def visitor_gone() -> bool:
        return "visitor" not in await clients(server)

    async def done(name: str, count: int) -> bool:
        """Whether a client has been given, or told of, so many."""
        check_books(await metrics(server))
        client = (await clients(server))[name]
        return client["sent"] + client["dropped"] == count

    env = {"SSE_BUFFER": "128", "SSE_HISTORY": "100" if durable else "0", "SSE_WRITE_TIMEOUT": "60"}
    async with (
        nats_server(tmp_path / "nats", jetstream=durable) as nats,
        run_server(tmp_path, nats_url=nats.url, env=env | {"LOG_FORMAT": "json"}) as server,
    ):
        await eventually(server.is_live, "the feed is live")
        async with (
            listen(server.port, "all") as everything,
            listen(server.port, "odd", query="&agent=odd") as odd,
            listen(server.port, "none", query="&agent=nobody") as nothing,
            listen(server.port, "slow", query="&agent=odd&detail=full", rcvbuf=4096) as slow,
        ):
            for stream in (everything, odd, nothing, slow):
                await stream.next("connected")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(everything.take, total)
                nursery.start_soon(odd.take, total // 2)
                async with listen(server.port, "visitor", query="&detail=full", rcvbuf=4096) as visitor:
                    await visitor.next("connected")
                    await publish(0, half)
                await eventually(visitor_gone, "the visitor is gone")
                await publish(half, total)
            behind = (await clients(server))["slow"]
            assert 0 < behind["sent"] < total // 2, "it has not read anything"

            def missed() -> int:
                return sum(json.loads(told.data)["missed"] for told in slow.events if told.event == "gap")

            def heard() -> int:
                return sum(told.event == "discovery" for told in slow.events)

            await slow.read_until(lambda: heard() + missed() >= total // 2, "everything is heard or told missing")
            for name, count in (("all", total), ("odd", total // 2), ("slow", total // 2)):
                await eventually(partial(done, name, count), f"{name} has been served")
        each = await all_books(server, 5)
        visitor_books = each.pop("visitor")
        assert (
            visitor_books["offered"] == visitor_books["sent"] + visitor_books["dropped"] + visitor_books["undelivered"]
        )
        assert 0 < visitor_books["offered"] <= half
        assert visitor_books["undelivered"] > 0, "it left while it was being written to"
        assert each == {
            name: {"offered": total, "sent": out, "dropped": lost, "filtered": filtered, "undelivered": 0}
            for name, out, lost, filtered in (
                ("all", total, 0, 0),
                ("odd", total // 2, 0, total // 2),
                ("none", 0, 0, total),
                ("slow", heard(), missed(), total // 2),
            )
        }
        assert (missed() == 0) == durable
        counted = await metrics(server)
        check_books(counted)
        assert counted["sse_trio_events_in_total,outcome=published"] == total
        assert counted["sse_trio_events_waiting"] == 0
        for name in ("offered", "dropped", "filtered", "undelivered"):
            assert counted[f"sse_trio_events_{name}_total"] == visitor_books[name] + sum(b[name] for b in each.values())


async def test_with_several_workers_the_books_balance_for_all_of_them(nats: NatsServer, tmp_path: Path) -> None:
    port = free_port()
    command = (str(BIN / "sse-trio"), "serve", "--bind", f"127.0.0.1:{port}", "--workers", "2")
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(run_server(tmp_path, nats_url=nats.url, command=command, port=port))
        await eventually(lambda: server.output.count("sse-trio serves") == 2, "both workers serve")
        for number in range(8):
            query = "&agent=odd" if number % 2 else ""
            stream = await stack.enter_async_context(listen(server.port, f"a{number}", query=query))
            await stream.next("connected")
        await nats.publish(*((SUBJECT, payload(n, agent_id="odd" if n % 2 else "even")) for n in range(100)))

        async def all_are_served() -> bool:
            counted = await metrics(server)
            books = [counted[f"sse_trio_events_{name}_total"] for name in ("offered", "out", "filtered")]
            return books == [800, 600, 200]

        await eventually(all_are_served, "whichever worker answers counts what passed the streams of both")
        check_books(await metrics(server))
