"""The routes of discoveries as resources: read one by its URI, list the latest, share one."""

from __future__ import annotations

import math
import re
from typing import Any
from urllib.parse import unquote

import quart.wrappers.base
import trio
from quart import Blueprint, Response, request
from werkzeug.exceptions import NotFound, RequestTimeout
from werkzeug.routing import BaseConverter

from sse_trio.access import Grant, forbidden
from sse_trio.audience import Filter
from sse_trio.discovery import MAX_PAYLOAD, InvalidDiscovery, build, parse, segment
from sse_trio.history import Frame
from sse_trio.nats_protocol import NatsError
from sse_trio.reader import NotInThisEpoch, SearchTooLong
from sse_trio.services import InvalidParameters, Services, filter_of, grant_of_sender, json_answer, problem

__all__ = ["add_resources"]

MAX_LIMIT = 500
SENDER_LEFT: tuple[type[Exception], ...] = tuple(
    error for error in (getattr(quart.wrappers.base, "ClientDisconnectedError", None),) if error is not None
)
"""What reading a body raises when its sender has left; Quart before 0.23 has no such error."""
MOMENT = re.compile(r"(-?[0-9]{1,12})-")


class Anything(BaseConverter):
    """Any rest of a path. The `path` converter stops at a line feed, which may well stand in an encoded segment."""

    regex = r"[\s\S]+"
    part_isolating = False


def add_resources(routes: Blueprint, services: Services) -> None:
    """Add the routes to `routes`, answering from `services`."""
    routes.record_once(lambda state: state.app.url_map.converters.update(anything=Anything))

    # Decoded slashes are no segments: without `merge_slashes=False` an agent "/b" would be redirected to "b".
    @routes.get("/agents/<anything:_>", merge_slashes=False)
    async def read(_: str) -> Response:
        """`/agents/{agent_id}/discoveries/{discovery_id}`, on the raw path: an encoded `/` stays in its segment."""
        grant = await grant_of_sender(services)
        agent_id, discovery_id = segments_of_path()
        moment = MOMENT.match(discovery_id)
        if moment is None:
            raise NotFound("no discovery has such an id")
        uri = f"discovery://agents/{segment(agent_id)}/discoveries/{segment(discovery_id)}"
        heard = Filter(granted=grant.subjects)
        try:
            found = await services.reader.find(uri, int(moment[1]), heard, request.args.get("event_id"))
        except SearchTooLong as error:
            return problem(503, str(error), headers={"Retry-After": "10"})
        if not found:
            raise NotFound("no such discovery, or none any more")
        answer = json_answer({"discoveries": [frame.discovery.published() for frame in found if frame.discovery]})
        answer.headers["Cache-Control"] = "private, no-cache"
        await answer.add_etag()
        return await answer.make_conditional(request)

    @routes.get("/discoveries")
    async def latest() -> Response:
        grant = await grant_of_sender(services)
        heard = filter_of(request.args, grant)
        try:
            limit = int(request.args.get("limit", "50"))
        except ValueError:
            limit = 0
        if not 1 <= limit <= MAX_LIMIT:
            raise InvalidParameters([{"field": "limit", "message": f"a number from 1 to {MAX_LIMIT}"}])
        try:
            page = await services.reader.latest(heard, limit, request.args.get("before"))
        except NotInThisEpoch as error:
            raise InvalidParameters([{"field": "before", "message": str(error)}]) from None
        except SearchTooLong as error:
            return problem(503, str(error), headers={"Retry-After": "10"})
        return json_answer({"discoveries": [listed(frame) for frame in page.frames], "next": page.next})

    @routes.post("/discoveries")
    async def share() -> Response:
        grant = await grant_of_sender(services)
        require_sharer(grant)
        if request.mimetype != "application/json":
            return problem(415, "this takes application/json", headers={"Accept-Post": "application/json"})
        if (request.content_length or 0) > MAX_PAYLOAD:
            return problem(413, f"a discovery has at most {MAX_PAYLOAD} bytes")
        body = await body_of_request(MAX_PAYLOAD)
        if body is None:
            return problem(413, f"a discovery has at most {MAX_PAYLOAD} bytes")
        try:
            discovery = build(parse(body))
        except InvalidDiscovery as error:
            if error.reason == "oversized":
                return problem(413, f"a discovery has at most {MAX_PAYLOAD} bytes")
            return problem(400, str(error), errors=error.errors)
        if not services.feed.status.live:
            return problem(503, "NATS cannot be reached now", headers={"Retry-After": "5"})
        try:
            await services.publisher.publish(discovery)
        except NatsError as error:
            return problem(503, f"NATS does not take it: {error.detail}", headers={"Retry-After": "5"})
        return json_answer({"uri": discovery.uri}, 202)

    def require_sharer(grant: Grant) -> None:
        if not grant.may_share:
            off = "this answers a local sender only"
            raise forbidden("the token does not let you share" if services.access.authenticates else off)


async def body_of_request(limit: int) -> bytes | None:
    """The request's body, or None as soon as it is longer than `limit`.

    Quart would wait for the end of it first, and Quart-Trio 0.13 keep everything until then.

    Raises:
        RequestTimeout: it took longer than BODY_TIMEOUT.
    """
    body = bytearray()
    with trio.move_on_after(request.body_timeout or math.inf) as scope:
        try:
            async for part in request.body:
                body += part
                if len(body) > limit:
                    return None
        except SENDER_LEFT:
            await trio.sleep_forever()  # until this request is cancelled, which is under way
    if scope.cancelled_caught:
        raise RequestTimeout
    return bytes(body)


def listed(frame: Frame) -> dict[str, Any]:
    """A discovery as `GET /discoveries` shows it."""
    assert frame.discovery is not None
    return {
        "id": frame.id,
        "uri": frame.discovery.uri,
        "subject": frame.subject,
        "discovery": frame.discovery.published(),
    }


def segments_of_path() -> tuple[str, str]:
    """Agent and discovery id of the raw path, decoded each by itself; `NotFound` for a path of another form."""
    raw = request.scope.get("raw_path") or request.path.encode()
    path = raw.decode("ascii", "replace").partition("?")[0].removeprefix(request.root_path)
    try:
        empty, agents, agent_id, discoveries, discovery_id = path.split("/")
        if (empty, agents, discoveries) != ("", "agents", "discoveries"):
            raise ValueError("another path")
        return unquote(agent_id, errors="strict"), unquote(discovery_id, errors="strict")
    except ValueError:  # UnicodeDecodeError too
        raise NotFound("no such path") from None
