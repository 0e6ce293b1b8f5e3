"""The document describes the server that runs: it is valid, and what it says about events is what comes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate
from support import NatsServer, listen, payload, run_server

from sse_trio.application import create_app
from sse_trio.openapi import EVENTS, openapi_document
from sse_trio.settings import Settings


def validator_of(name: str) -> Draft202012Validator:
    document = openapi_document()
    return Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": document["components"]})


def as_item(event: Any, retry: int | None = None) -> dict[str, Any]:
    item = {"event": event.event, "data": event.data}
    if event.id:
        item["id"] = event.id
    return item | ({"retry": retry} if retry is not None else {})


def test_it_is_valid_openapi() -> None:
    validate(openapi_document())


def test_it_describes_every_route_that_there_is() -> None:
    described = {(path, method) for path, item in openapi_document()["paths"].items() for method in item}
    served = set()
    for rule in create_app(Settings()).url_map.iter_rules():
        path = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)
        served |= {(path, method.lower()) for method in rule.methods or () if method not in {"HEAD", "OPTIONS"}}
    pages = {("/", "get"), ("/docs", "get"), ("/openapi.json", "get"), ("/page/{name}", "get")}
    raw = {("/agents/{_}", "get"): ("/agents/{agent_id}/discoveries/{discovery_id}", "get")}
    assert {raw.get(route, route) for route in served - pages} == described


async def test_the_events_that_come_are_the_events_that_it_describes(nats: NatsServer, tmp_path: Path) -> None:
    async with run_server(tmp_path, nats_url=nats.url) as server:
        async with listen(server.port, query="&detail=full", headers={"Last-Event-ID": "other-1"}) as client:
            connected = await client.next("connected")
            await nats.publish(("discoveries.insights", payload(extra={"a": [1, None]})))
            gap = await client.next("gap")
            discovery = await client.next("discovery")
            server.process.terminate()
            goodbye = await client.next("goodbye")
        for event, name, retry in (
            (connected, "ConnectedEvent", 3000),
            (gap, "GapEvent", None),
            (discovery, "DiscoveryEvent", None),
            (goodbye, "GoodbyeEvent", 1000),
        ):
            item = as_item(event, retry)
            validator_of("Event").validate(item)
            content = EVENTS[name]["properties"]["data"]["contentSchema"]
            schema = {"allOf": [content], "components": openapi_document()["components"]}
            Draft202012Validator(schema).validate(json.loads(event.data))


@pytest.mark.parametrize("name", list(EVENTS))
def test_an_event_of_another_name_is_none_of_them(name: str) -> None:
    validator = validator_of(name)
    assert not validator.is_valid({"event": "rumour", "data": "{}", "retry": 1})


async def test_the_answers_are_what_it_describes(nats: NatsServer, tmp_path: Path) -> None:
    async with run_server(tmp_path, nats_url=nats.url) as server, listen(server.port) as client:
        await client.next("connected")
        await nats.publish(("discoveries.insights", payload()))
        await client.next("discovery")
        for path in ("/discoveries", "/clients", "/health", "/livez"):
            status, body = await server.get(path)
            assert status == 200
            schema = openapi_document()["paths"][path]["get"]["responses"]["200"]["content"]["application/json"][
                "schema"
            ]
            Draft202012Validator(schema | {"components": openapi_document()["components"]}).validate(body)
        status, body = await server.get("/openapi.json")
        assert (status, body) == (200, openapi_document())
