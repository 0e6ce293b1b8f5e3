"""A notification names a resource, and the resource can be read: now, on another instance, after a restart."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from support import NatsServer, Server, a_discovery, eventually, listen, payload, request, run_server

from sse_trio.history import parse_event_id

TYPES = ["Pattern", "Anomaly", "Connection", "Solution", "Question", "Insight"]


def path_of(uri: str) -> str:
    return "/" + uri.removeprefix("discovery://")


def uri_of(event: Any) -> str:
    uri: str = json.loads(event.data)["params"]["uri"]
    return uri


@asynccontextmanager
async def serving(nats: NatsServer, tmp_path: Path, **env: str) -> AsyncIterator[Server]:
    async with run_server(tmp_path, nats_url=nats.url, env=env) as server:
        await eventually(server.is_live, "the feed is live")
        yield server


async def test_the_uri_of_a_notification_reads_back_what_was_published(nats: NatsServer, tmp_path: Path) -> None:
    async with serving(nats, tmp_path) as server, listen(server.port) as client:
        await client.next("connected")
        await nats.publish(("discoveries.insights", payload(7, extra={"kept": True})))
        event = await client.next("discovery")
        status, body = await server.get(path_of(uri_of(event)))
        assert (status, body) == (200, {"discoveries": [a_discovery(7, extra={"kept": True})]})


async def test_two_discoveries_with_one_id_both_come_back_and_event_id_picks_one(
    nats: NatsServer, tmp_path: Path
) -> None:
    async with serving(nats, tmp_path) as server, listen(server.port) as client:
        await client.next("connected")
        same = "the first twenty code points are equal: "
        await nats.publish(*(("discoveries.insights", payload(content=same + tail)) for tail in ("one", "two")))
        first, second = await client.take(2)
        assert uri_of(first) == uri_of(second)
        _, both = await server.get(path_of(uri_of(first)))
        assert [found["content"][-3:] for found in both["discoveries"]] == ["one", "two"]
        _, one = await server.get(f"{path_of(uri_of(first))}?event_id={second.id}")
        assert [found["content"][-3:] for found in one["discoveries"]] == ["two"]


@pytest.mark.parametrize("agent_id", ["a/b", "a b", "a%2Fb", "…", "a?b#c", "%", "a;b=c", "A.B~c"])
async def test_an_agent_of_any_name_has_its_resource(nats: NatsServer, tmp_path: Path, agent_id: str) -> None:
    async with serving(nats, tmp_path) as server, listen(server.port) as client:
        await client.next("connected")
        await nats.publish(("discoveries.insights", payload(agent_id=agent_id, content="…?/%2F& x\n\0\U0001f600")))
        uri = uri_of(await client.next("discovery"))
        status, body = await server.get(path_of(uri))
        assert status == 200
        assert body["discoveries"][0]["agent_id"] == agent_id
        if "/" in agent_id:
            status, _ = await server.get(path_of(uri).replace("%2F", "/", 1))
            assert status == 404, "an encoded slash stays inside its segment"


async def test_what_is_not_there_is_404(nats: NatsServer, tmp_path: Path) -> None:
    async with serving(nats, tmp_path) as server:
        for path in (
            "/agents/nobody/discoveries/1234567890-Anomaly-x",
            "/agents/nobody/discoveries/rumour",
            "/agents/nobody",
            "/agents/a/b/discoveries/1-Anomaly-x",
            "/agents/%FF/discoveries/1-Anomaly-x",
            "/agents/a/discoveries/99999999999999999999-Anomaly-x",
        ):
            status, body = await server.get(path)
            assert (status, body["status"]) == (404, 404), path


async def test_a_resource_has_an_etag(nats: NatsServer, tmp_path: Path) -> None:
    async with serving(nats, tmp_path) as server, listen(server.port) as client:
        await client.next("connected")
        await nats.publish(("discoveries.insights", payload()))
        path = path_of(uri_of(await client.next("discovery")))
        status, headers, _ = await request(server.port, "GET", path)
        assert status == 200
        status, again, body = await request(server.port, "GET", path, headers={"If-None-Match": headers["etag"]})
        assert (status, body, again["etag"]) == (304, b"", headers["etag"])


async def test_without_event_id_the_stream_is_searched_from_an_hour_before(nats: NatsServer, tmp_path: Path) -> None:
    few = {"SSE_HISTORY": "5", "SSE_BUFFER": "5"}
    async with serving(nats, tmp_path, **few) as server, listen(server.port) as client:
        await client.next("connected")
        await nats.publish(*(("discoveries.insights", payload(n)) for n in range(50)))
        first = (await client.take(50))[0]
        status, body = await server.get(path_of(uri_of(first)))
        assert status == 200
        # All fifty have the first twenty code points in common; what memory still holds comes first.
        assert body["discoveries"][-1]["content"].endswith("49")


async def test_the_latest_are_listed_newest_first_and_paged_back_by_cursor(nats: NatsServer, tmp_path: Path) -> None:
    few = {"SSE_HISTORY": "20", "SSE_BUFFER": "20"}
    async with serving(nats, tmp_path, **few) as server, listen(server.port) as client:
        await client.next("connected")
        await nats.publish(*(("discoveries.insights", payload(n)) for n in range(100)))
        await client.take(100)
        seen = []
        query = "limit=30"
        while True:
            status, page = await server.get(f"/discoveries?{query}")
            assert status == 200
            seen += page["discoveries"]
            if page["next"] is None:
                break
            query = f"limit=30&before={page['next']}"
        assert [found["discovery"]["content"].split()[-1] for found in seen] == [str(n) for n in range(99, -1, -1)]
        assert list(seen[0]) == ["id", "uri", "subject", "discovery"]
        assert parse_event_id(seen[0]["id"]) is not None


async def test_a_list_has_the_filters_of_the_stream(nats: NatsServer, tmp_path: Path) -> None:
    async with serving(nats, tmp_path) as server, listen(server.port) as client:
        await client.next("connected")
        for number, kind in enumerate(TYPES):
            found = payload(number, discovery_type=kind, confidence=number / 10)
            await nats.publish((f"discoveries.{kind.lower()}", found))
        await client.take(6)
        for query, expected in (
            ("type=anomaly&type=Insight", ["Insight", "Anomaly"]),
            ("min_confidence=0.4", ["Insight", "Question"]),
            ("subject=discoveries.solution", ["Solution"]),
            ("agent=nobody", []),
            ("role=Security&limit=1", ["Insight"]),
        ):
            _, page = await server.get(f"/discoveries?{query}")
            assert [found["discovery"]["discovery_type"] for found in page["discoveries"]] == expected, query


@pytest.mark.parametrize(
    ("query", "field"), [("limit=0", "limit"), ("limit=501", "limit"), ("limit=x", "limit"), ("before=x-1", "before")]
)
async def test_a_wrong_parameter_of_the_list_is_named(
    core_nats: NatsServer, tmp_path: Path, query: str, field: str
) -> None:
    async with serving(core_nats, tmp_path) as server:
        status, body = await server.get(f"/discoveries?{query}")
        assert (status, [error["field"] for error in body["errors"]]) == (400, [field])


# -- sharing over HTTP -------------------------------------------------------------------------------------------------


async def post(server: Server, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    fields = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    status, _, answer = await request(server.port, "POST", "/discoveries", headers=fields, body=body)
    return status, json.loads(answer)


@pytest.mark.parametrize("kind", ["jetstream", "core"])
async def test_what_is_posted_is_heard(nats: NatsServer, tmp_path: Path, kind: str) -> None:
    durable = "off" if kind == "core" else "auto"
    async with serving(nats, tmp_path, NATS_DURABLE=durable) as server, listen(server.port) as client:
        await client.next("connected")
        shared = a_discovery(1)
        del shared["timestamp"]
        status, answer = await post(server, json.dumps(shared).encode())
        assert status == 202
        event = await client.next("discovery")
        assert uri_of(event) == answer["uri"]


async def test_every_bad_field_is_named(core_nats: NatsServer, tmp_path: Path) -> None:
    async with serving(core_nats, tmp_path) as server:
        wrong = {"agent_id": "", "discovery_type": "Rumour", "content": 7, "confidence": True}
        status, answer = await post(server, json.dumps(wrong).encode())
        assert status == 400
        assert {error["field"] for error in answer["errors"]} == {
            "agent_id",
            "agent_role",
            "discovery_type",
            "content",
            "confidence",
        }
        assert all(error["message"] for error in answer["errors"])


async def test_what_cannot_be_shared_is_refused_for_what_it_is(core_nats: NatsServer, tmp_path: Path) -> None:
    async with serving(core_nats, tmp_path) as server:
        assert (await post(server, payload(content="x" * 65536)))[0] == 413
        assert (await post(server, payload(), Content_Type="text/plain"))[0] == 415
        assert (await post(server, b"{"))[0] == 400
        assert (await post(server, b"\xff"))[0] == 400
        for headers in ({"Host": "example.org"}, {"X-Forwarded-For": "192.0.2.1"}, {"Origin": "https://example.org"}):
            assert (await post(server, payload(), **headers))[0] == 403


async def test_without_nats_nothing_is_shared(core_nats: NatsServer, tmp_path: Path) -> None:
    async with serving(core_nats, tmp_path) as server:
        core_nats.kill()
        await eventually(lambda: _is_down(server), "/health says that NATS is gone")
        status, answer = await post(server, payload())
        assert (status, answer["status"]) == (503, 503)


async def _is_down(server: Server) -> bool:
    return (await server.health())[0] == 503
