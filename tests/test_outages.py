"""NATS goes away in every way it can: the server stays up, says so, and comes back by itself.

The real `hypercorn` command with a real nats-server that each test kills, freezes or changes under it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import NatsServer, Server, eventually, free_port, listen, nats_server, payload, run_server

CORE = {"NATS_DURABLE": "off"}


async def is_unhealthy(server: Server) -> bool:
    status, body = await server.health()
    return status == 503 and body["status"] == "unhealthy"


def lines_about(server: Server, event: str) -> int:
    return sum(event in line for line in server.output.splitlines())


async def test_without_nats_the_server_starts_and_says_why_it_is_not_ready(tmp_path: Path) -> None:
    async with run_server(tmp_path, nats_url=f"nats://127.0.0.1:{free_port()}") as server:
        status, body = await server.health()
        assert (status, body["status"], body["reason"]) == (503, "unhealthy", "unreachable")
        assert body["detail"]
        assert (await server.get("/livez"))[0] == 200


async def test_a_client_that_was_there_before_nats_hears_everything_from_the_moment_it_is(tmp_path: Path) -> None:
    nats = NatsServer(tmp_path / "nats")
    async with run_server(tmp_path, nats_url=nats.url) as server, listen(server.port) as client:
        connected = await client.next("connected")
        assert connected.id == ""
        try:
            await nats.start()
            await eventually(server.is_live, "the feed is live")
            await nats.publish(("discoveries.insights", payload()))
            await client.next("discovery")
            assert "gap" not in [event.event for event in client.events]
        finally:
            nats.kill()


async def test_killed_and_started_again_the_feed_comes_back_and_clients_get_a_gap(
    core_nats: NatsServer, tmp_path: Path
) -> None:
    async with run_server(tmp_path, nats_url=core_nats.url, env=CORE) as server, listen(server.port) as client:
        await client.next("connected")
        await core_nats.publish(("discoveries.insights", payload(1)))
        before = await client.next("discovery")
        core_nats.kill()
        await eventually(lambda: is_unhealthy(server), "/health says that NATS is gone")
        await core_nats.start()
        await eventually(server.is_live, "the feed is live again")
        gap = await client.next()
        assert gap.event == "gap"
        assert json.loads(gap.data) == {"reason": "upstream", "missed": None}
        await core_nats.publish(("discoveries.insights", payload(2)))
        after = await client.next()
        assert after.event == "discovery"
        numbers = [int(event.id.rpartition("-")[2]) for event in (before, gap, after)]
        assert numbers == sorted(set(numbers))
        assert not client.closed


async def test_an_outage_is_logged_once_and_not_once_a_second(core_nats: NatsServer, tmp_path: Path) -> None:
    async with run_server(tmp_path, nats_url=core_nats.url, env=CORE) as server:
        await eventually(server.is_live, "the feed is live")
        core_nats.kill()
        await eventually(lambda: is_unhealthy(server), "/health says that NATS is gone")
        tried = _attempts(await server.get("/metrics"))
        # Several tries in vain: each of them would have had its line.
        await eventually(lambda: _tried_more(server, tried + 4), "several tries")
        outage = [line for line in server.output.splitlines() if "feed down" in line]
        assert 1 <= len(outage) <= 2, outage  # that it was lost, and that it cannot be reached


def _attempts(answer: tuple[int, bytes]) -> float:
    (line,) = [line for line in answer[1].splitlines() if line.startswith(b"sse_trio_feed_attempts_total")]
    return float(line.split()[1])


async def _tried_more(server: Server, tries: float) -> bool:
    return _attempts(await server.get("/metrics")) >= tries


async def test_a_frozen_nats_is_noticed_and_the_feed_comes_back(core_nats: NatsServer, tmp_path: Path) -> None:
    async with run_server(tmp_path, nats_url=core_nats.url, env=CORE) as server, listen(server.port) as client:
        await client.next("connected")
        await eventually(server.is_live, "the feed is live")
        core_nats.freeze()
        await eventually(lambda: is_unhealthy(server), "/health says that NATS does not answer")
        core_nats.thaw()
        await eventually(server.is_live, "the feed is live again")
        gap = await client.next("gap")
        assert json.loads(gap.data)["reason"] == "upstream"
        await core_nats.publish(("discoveries.insights", payload()))
        await client.next("discovery")


async def test_rejected_credentials_are_said_without_them(tmp_path: Path) -> None:
    async with nats_server(tmp_path / "nats", jetstream=False, options=("--user", "me", "--pass", "right")) as nats:
        url = nats.url.replace("//", "//me:wrong-secret@")
        async with run_server(tmp_path, nats_url=url) as server:
            status, body = await server.health()
            assert (status, body["reason"]) == (503, "auth")
            assert "wrong-secret" not in server.output + json.dumps(body)


async def test_with_jetstream_nothing_is_missed_over_a_restart(nats: NatsServer, tmp_path: Path) -> None:
    async with run_server(tmp_path, nats_url=nats.url) as server, listen(server.port) as client:
        await client.next("connected")
        await nats.publish(*(("discoveries.insights", payload(n)) for n in range(5)))
        await client.take(5)
        nats.kill()
        await nats.start()
        await nats.publish(*(("discoveries.insights", payload(n)) for n in range(5, 10)))
        heard = await client.take(5)
        assert [int(event.id.rpartition("-")[2]) for event in heard] == [6, 7, 8, 9, 10]
        assert "gap" not in [event.event for event in client.events]


async def test_jetstream_that_is_required_and_missing_ends_the_start(core_nats: NatsServer, tmp_path: Path) -> None:
    async with run_server(tmp_path, nats_url=core_nats.url, env={"NATS_DURABLE": "require"}, wait=False) as server:
        await server.exited()
        assert "JetStream" in server.output


@pytest.mark.parametrize(
    ("variable", "value"),
    [("SSE_BUFFER", "none"), ("NATS_DURABLE", "maybe"), ("NATS_URL", "http://x"), ("SSE_OVERFLOW", "panic")],
)
async def test_a_wrong_setting_ends_the_start_and_is_named(tmp_path: Path, variable: str, value: str) -> None:
    url = f"nats://127.0.0.1:{free_port()}"
    async with run_server(tmp_path, nats_url=url, env={variable: value}, wait=False) as server:
        await server.exited()
        assert f"{variable}: " in server.output
