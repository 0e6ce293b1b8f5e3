"""What the routes share: the services they answer from, how a request is read, and how a refusal looks (RFC 9457)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from quart import Response, request
from werkzeug.datastructures import MultiDict

from sse_trio.access import Access, Grant, forbidden
from sse_trio.audience import Filter
from sse_trio.broadcaster import Broadcaster
from sse_trio.discovery import DISCOVERY_TYPES
from sse_trio.metrics import Metrics
from sse_trio.nats_feed import NatsFeed
from sse_trio.publisher import Publisher
from sse_trio.reader import Reader
from sse_trio.settings import Settings
from sse_trio.sse import compact
from sse_trio.stream import Backlog
from sse_trio.subjects import MAX_TOKENS, is_pattern

__all__ = ["InvalidParameters", "Services", "filter_of", "grant_of_sender", "json_answer", "problem"]


@dataclass
class Services:
    """What the routes answer from: one of each for a process."""

    settings: Settings
    broadcaster: Broadcaster
    feed: NatsFeed
    publisher: Publisher
    access: Access
    metrics: Metrics
    reader: Reader
    instance: str
    backlog: Backlog | None = None
    draining: bool = False
    """Whether `/health` says no already, so that a balancer sends nobody new."""


def problem(
    status: int, detail: str, *, title: str | None = None, headers: dict[str, str] | None = None, **more: Any
) -> Response:
    """An error as `application/problem+json` (RFC 9457)."""
    body = {
        "type": "about:blank",
        "title": title or HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
    } | more
    answer = Response(compact(body), status, content_type="application/problem+json")
    answer.headers["Cache-Control"] = "no-store"
    answer.headers.update(headers or {})
    return answer


def json_answer(body: Any, status: int = 200) -> Response:
    answer = Response(compact(body), status, content_type="application/json")
    answer.headers["Cache-Control"] = "no-store"
    return answer


class InvalidParameters(Exception):
    """Query parameters that cannot be used; `errors` names each and says what it takes."""

    def __init__(self, errors: list[dict[str, str]]) -> None:
        super().__init__("; ".join(f"{error['field']}: {error['message']}" for error in errors))
        self.errors = errors


def filter_of(query: MultiDict[str, str], grant: Grant) -> Filter:
    """The filter that a query asks for, within what the grant lets it hear.

    Raises:
        InvalidParameters: a value is not of its parameter's form.
        Refused: 403, a `subject` pattern reaches beyond the grant.
    """
    errors: list[dict[str, str]] = []

    def wrong(field: str, message: str) -> None:
        errors.append({"field": field, "message": message})

    by_lower = {name.lower(): name for name in DISCOVERY_TYPES}
    types = query.getlist("type")
    if any(name.lower() not in by_lower for name in types):
        wrong("type", f"one of {', '.join(DISCOVERY_TYPES)}")
    for field in ("role", "agent"):
        if any(not value for value in query.getlist(field)):
            wrong(field, "a name, not empty")
    confidence = 0.0
    if "min_confidence" in query:
        try:
            confidence = float(query["min_confidence"])
        except ValueError:
            confidence = math.nan
        if not 0 <= confidence <= 1 or not query["min_confidence"].isascii():
            wrong("min_confidence", "a number from 0 to 1")
    subjects = query.getlist("subject")
    if not all(map(is_pattern, subjects)):
        wrong("subject", "a NATS subject: tokens joined by dots, * for one, > for the rest")
    elif sum(subject.count(".") + 1 for subject in subjects) > MAX_TOKENS:
        wrong("subject", f"fewer patterns: no more than {MAX_TOKENS} tokens in all")
    if query.get("detail", "full") != "full":
        wrong("detail", "full, or leave it out")
    if errors:
        raise InvalidParameters(errors)
    if not all(map(grant.may_ask_for, subjects)):
        raise forbidden("the token does not let you hear that subject")
    return Filter(
        types=frozenset(by_lower[name.lower()] for name in types),
        roles=frozenset(query.getlist("role")),
        agents=frozenset(query.getlist("agent")),
        min_confidence=confidence,
        subjects=tuple(sorted(set(subjects))),
        granted=grant.subjects,
        full="detail" in query,
    )


async def grant_of_sender(services: Services) -> Grant:
    """What the sender of the current request may do; `Refused` where that cannot be told or is nothing."""
    access = services.access
    host, origin, peer = request.headers.get("Host"), request.headers.get("Origin"), request.remote_addr
    return await access.authenticate(
        request.headers,
        method=request.method,
        secure=access.is_secure(peer, request.headers, request.scheme),
        local=access.is_local(peer, host, request.headers, origin),
    )
