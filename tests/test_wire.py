"""The bytes on the wire: the real `hypercorn` command, a real nats-server, a real socket.

A client of the original broadcaster must work here unchanged, so these tests compare bytes, not meanings.
"""

from __future__ import annotations

import json
import re
import resource
from pathlib import Path

import pytest
import trio
from support import NatsServer, eventually, listen, payload, request, run_server

UUID4 = rb"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"

CONNECTED = re.compile(
    rb"retry: (\d+)\nevent: connected\n"
    rb'data: \{"agent_id":"agent-123","client_id":"' + UUID4 + rb'"\}\n'
    rb"id: (?P<epoch>[A-Za-z0-9.]+)-(\d+)\n\n"
)

DISCOVERY = (
    b'event: discovery\ndata: {"jsonrpc":"2.0","method":"notifications/resources/updated","params":{"uri":'
    b'"discovery://agents/security-001/discoveries/1234567890-Anomaly-unusual-login-patter"}}\nid: %s-%d\n\n'
)


async def test_connected_and_discovery_to_the_byte(nats: NatsServer, tmp_path: Path) -> None:
    async with run_server(tmp_path, nats_url=nats.url) as server, listen(server.port, "agent-123") as client:
        await client.next("connected")
        matched = CONNECTED.fullmatch(client.body)
        assert matched is not None, client.body
        assert 1500 <= int(matched[1]) <= 4500
        epoch, head = matched["epoch"], int(matched[3])
        for _ in range(2):
            await nats.publish(("discoveries.insights", payload()))
            await client.next("discovery")
        assert client.body == matched[0] + DISCOVERY % (epoch, head + 1) + DISCOVERY % (epoch, head + 2)
        assert client.dechunker.chunks == [
            matched[0],
            DISCOVERY % (epoch, head + 1),
            DISCOVERY % (epoch, head + 2),
        ], "each write carries whole frames"


async def test_the_head_of_a_stream(nats: NatsServer, tmp_path: Path) -> None:
    async with run_server(tmp_path, nats_url=nats.url) as server, listen(server.port) as client:
        await client.next("connected")
        assert client.status == 200
        assert client.headers["content-type"] == "text/event-stream"
        assert client.headers["cache-control"] == "no-cache, no-transform"
        assert client.headers["x-accel-buffering"] == "no"
        assert client.headers["access-control-allow-origin"] == "*"
        assert client.headers["transfer-encoding"] == "chunked"


async def test_a_keep_alive_is_a_comment_and_one_line_feed(nats: NatsServer, tmp_path: Path) -> None:
    async with (
        run_server(tmp_path, nats_url=nats.url, env={"SSE_KEEPALIVE_INTERVAL": "0.2"}) as server,
        listen(server.port) as client,
    ):
        await client.read_until(lambda: client.body.endswith(b"\n\n: keep-alive\n"), "a keep-alive")
        assert client.dechunker.chunks[-1] == b": keep-alive\n"


async def test_head_answers_the_head_and_subscribes_nothing(nats: NatsServer, tmp_path: Path) -> None:
    async with run_server(tmp_path, nats_url=nats.url) as server:
        status, headers, body = await request(server.port, "HEAD", "/discoveries/stream?agent_id=a")
        assert (status, headers["content-type"], body) == (200, "text/event-stream", b"")
        assert (await server.get("/clients"))[1]["clients"] == []


async def test_http_1_0_gets_no_chunks(nats: NatsServer, tmp_path: Path) -> None:
    async with run_server(tmp_path, nats_url=nats.url) as server, listen(server.port, version="1.0") as client:
        await client.next("connected")
        assert "transfer-encoding" not in client.headers
        await nats.publish(("discoveries.insights", payload()))
        await client.next("discovery")


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("", "agent_id"),
        ("agent_id=", "agent_id"),
        ("agent_id=a%20b", "agent_id"),
        ("agent_id=" + "a" * 129, "agent_id"),
        ("agent_id=a&type=Rumour", "type"),
        ("agent_id=a&min_confidence=2", "min_confidence"),
        ("agent_id=a&min_confidence=nan", "min_confidence"),
        ("agent_id=a&subject=a..b", "subject"),
        pytest.param("agent_id=a" + "&subject=a.b.c.d.e" * 201, "subject", id="too many patterns"),
        ("agent_id=a&detail=some", "detail"),
    ],
)
async def test_a_wrong_parameter_is_named(core_nats: NatsServer, tmp_path: Path, query: str, field: str) -> None:
    async with run_server(tmp_path, nats_url=core_nats.url) as server:
        status, headers, body = await request(server.port, "GET", f"/discoveries/stream?{query}")
        answer = json.loads(body)
        assert (status, headers["content-type"]) == (400, "application/problem+json")
        assert answer["status"] == 400
        assert [error["field"] for error in answer["errors"]] == [field]


async def test_what_is_not_here_and_not_acceptable(core_nats: NatsServer, tmp_path: Path) -> None:
    async with run_server(tmp_path, nats_url=core_nats.url) as server:
        for method, path, headers, expected in (
            ("GET", "/nothing", {}, 404),
            ("PUT", "/health", {}, 405),
            ("GET", "/discoveries/stream?agent_id=a", {"Accept": "application/json"}, 406),
            ("DELETE", "/clients/nobody", {}, 404),
        ):
            status, fields, body = await request(server.port, method, path, headers=headers)
            assert (status, fields["content-type"]) == (expected, "application/problem+json"), path
            assert json.loads(body)["status"] == expected


async def test_clients_lists_who_is_here_and_kicks_them(nats: NatsServer, tmp_path: Path) -> None:
    async with run_server(tmp_path, nats_url=nats.url) as server:
        async with listen(server.port, "agent-7", query="&type=Question&role=Security") as client:
            connected = await client.next("connected")
            _, answer = await server.get("/clients")
            (listed,) = answer["clients"]
            assert list(listed) == [
                "client_id",
                "agent_id",
                "connected_at",
                "address",
                "filter",
                "queued",
                "sent",
                "dropped",
                "last_event_id",
            ]
            assert listed["agent_id"] == "agent-7"
            assert listed["client_id"] == json.loads(connected.data)["client_id"]
            assert listed["filter"] == {"type": ["Question"], "role": ["Security"]}
            status, _, _ = await request(server.port, "DELETE", f"/clients/{listed['client_id']}")
            assert status == 204
            assert (await client.next("goodbye")).data == '{"reason":"kicked"}'
            await client.read_to_end()
            assert client.ended
        await eventually(lambda: _nobody(server), "the registry is empty")


async def _nobody(server: object) -> bool:
    return not (await server.get("/clients"))[1]["clients"]  # type: ignore[attr-defined]


async def test_clients_answers_only_to_this_machine(core_nats: NatsServer, tmp_path: Path) -> None:
    async with run_server(tmp_path, nats_url=core_nats.url) as server:
        for headers in (
            {"Host": "example.org"},
            {"X-Forwarded-For": "192.0.2.1"},
            {"Origin": "https://example.org"},
        ):
            status, fields, _ = await request(server.port, "GET", "/clients", headers=headers)
            assert status == 403
            assert "access-control-allow-origin" not in fields


async def test_a_discovery_above_64_kib_is_refused_and_counted(core_nats: NatsServer, tmp_path: Path) -> None:
    large, largest = payload(content="x" * 65536), payload()
    largest = payload(content="x" * (65536 - len(largest) + len("unusual login pattern 0")))
    assert len(largest) == 65536
    async with run_server(tmp_path, nats_url=core_nats.url) as server, listen(server.port) as client:
        await client.next("connected")
        await core_nats.publish(("discoveries.a", large), ("discoveries.a", largest), ("discoveries.a", b"{}"))
        first = await client.next()
        assert first.event == "discovery"
        assert "xxxx" in first.data
        await eventually(lambda: '"oversized"' in server.output, "the refusal is logged")
        _, _, metrics = await request(server.port, "GET", "/metrics")
        assert b'outcome="oversized"} 1.0' in metrics, metrics


async def test_a_low_limit_of_open_files_is_said_and_refused_in_time(core_nats: NatsServer, tmp_path: Path) -> None:
    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (150, 150))

    async with run_server(tmp_path, nats_url=core_nats.url, preexec_fn=lower) as server:
        assert "SSE_MAX_CONNECTIONS is 10000, but 150 open files allow 22 streams" in server.output
        async with trio.open_nursery() as nursery:
            heard: list[str] = []

            async def connect() -> None:
                async with listen(server.port) as client:
                    heard.append((await client.next()).event)
                    await trio.sleep_forever()

            for _ in range(30):
                nursery.start_soon(connect)
            await eventually(lambda: len(heard) == 30, "everybody is answered")
            assert (heard.count("connected"), heard.count("goodbye")) == (22, 8)
            assert (await server.health())[0] == 200
            nursery.cancel_scope.cancel()
