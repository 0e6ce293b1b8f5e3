"""What is counted is what happened, and the metrics say whom they speak for."""

from __future__ import annotations

from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from support import NatsServer, Server, eventually, listen, payload, request, run_server


async def metrics(server: Server) -> dict[str, float]:
    """Every sample by its name and labels."""
    status, headers, body = await request(server.port, "GET", "/metrics")
    assert (status, headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    return {
        sample.name + "".join(f",{name}={value}" for name, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(body.decode())
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


async def test_the_metrics_say_which_instance_they_speak_for(core_nats: NatsServer, tmp_path: Path) -> None:
    async with run_server(tmp_path, nats_url=core_nats.url) as server:
        instance = (await server.get("/clients"))[1]["instance"]
        assert (await metrics(server))[f"sse_trio_instance,instance={instance}"] == 1
