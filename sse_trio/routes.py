"""The HTTP surface, boring on purpose: read the request, ask `access`, answer from what the others know.

Every refusal is one `problem` (RFC 9457). What the filter's parameters may be stands in `services.filter_of`; the
stream itself is `stream.EventStream`; discoveries as resources are in `resources`.
"""

from __future__ import annotations

import re
import secrets
import time
from functools import cache, partial
from http import HTTPStatus
from importlib.resources import files
from mimetypes import guess_type

import structlog
from quart import Blueprint, Response, request
from quart.typing import ResponseReturnValue
from werkzeug.exceptions import HTTPException

from sse_trio.access import Refused, forbidden
from sse_trio.history import event_id
from sse_trio.metrics import CONTENT_TYPE
from sse_trio.openapi import openapi_document
from sse_trio.resources import add_resources
from sse_trio.services import InvalidParameters, Services, filter_of, grant_of_sender, json_answer, problem
from sse_trio.stream import EventStream

__all__ = ["create_blueprint"]

log = structlog.get_logger("sse_trio.routes")

AGENT_ID = re.compile(r"[A-Za-z0-9._~-]{1,128}")
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
CURSOR_LENGTH = 256

PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


@cache
def page_files() -> dict[str, bytes]:
    """The live page's files, by name."""
    folder = files("sse_trio") / "page"
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file() and file.name[-3:] != ".py"}


def create_blueprint(services: Services) -> Blueprint:
    """The routes, answering from `services`."""
    routes = Blueprint("sse_trio", __name__)
    settings, broadcaster, access = services.settings, services.broadcaster, services.access

    # -- around every request ----------------------------------------------------------------------------------------

    def is_private() -> bool:
        """Whether CORS never applies here: what only an administrator or a local sender may ask."""
        return request.path.startswith("/clients") or (request.method == "POST" and request.path == "/discoveries")

    @routes.before_app_request
    async def check_sender() -> ResponseReturnValue | None:
        host, origin = request.headers.get("Host"), request.headers.get("Origin")
        access.check_framing(request.headers)
        access.check_host(host)
        if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
            asked = request.headers["Access-Control-Request-Method"].upper()
            private = is_private() or (asked == "POST" and request.path == "/discoveries")
            answer = Response("", 204)
            if not private or access.authenticates:
                methods = ("GET", "HEAD", "POST", "DELETE") if access.authenticates else ("GET", "HEAD")
                answer.headers.update(access.preflight_headers(origin, methods))
            return answer
        access.check_origin(
            origin,
            host,
            request.scheme,
            request.method,
            site=request.headers.get("Sec-Fetch-Site"),
            mode=request.headers.get("Sec-Fetch-Mode"),
        )
        return None

    @routes.after_app_request
    async def add_headers(answer: Response) -> Response:
        answer.headers.setdefault("X-Content-Type-Options", "nosniff")
        readable = not is_private() or access.authenticates
        if request.method != "OPTIONS" and readable:
            answer.headers.update(access.cors_headers(request.headers.get("Origin")))
        open_to_all = readable and "*" in settings.allowed_origins
        answer.headers.setdefault("Cross-Origin-Resource-Policy", "cross-origin" if open_to_all else "same-origin")
        return answer

    @routes.app_errorhandler(Refused)
    async def on_refused(error: Refused) -> Response:
        return problem(error.status, error.detail, title=error.title, headers=error.headers)

    @routes.app_errorhandler(InvalidParameters)
    async def on_invalid_parameters(error: InvalidParameters) -> Response:
        return problem(400, str(error), errors=error.errors)

    @routes.app_errorhandler(HTTPException)
    async def on_http_exception(error: HTTPException) -> Response:
        status = error.code or 500
        headers = {name: value for name, value in error.get_headers() if name in {"Allow", "Retry-After", "Location"}}
        return problem(status, error.description or HTTPStatus(status).phrase, headers=headers)

    @routes.app_errorhandler(Exception)
    async def on_bug(error: Exception) -> Response:
        log.exception("a request failed", path=request.path, exc_info=error)
        return problem(500, "this is a bug of the server; its log says more")

    async def require_admin() -> None:
        if not (await grant_of_sender(services)).is_admin:
            detail = "this is for administrators" if access.authenticates else "this answers a local sender only"
            raise forbidden(detail)

    # -- the stream --------------------------------------------------------------------------------------------------

    @routes.get("/discoveries/stream")
    async def stream() -> Response:
        grant = await grant_of_sender(services)
        agent_ids = request.args.getlist("agent_id")
        if len(agent_ids) != 1 or not AGENT_ID.fullmatch(agent_ids[0]):
            raise InvalidParameters(
                [
                    {
                        "field": "agent_id",
                        "message": "required, once: 1 to 128 characters of A-Z a-z 0-9 . _ ~ -",
                    }
                ]
            )
        agent_id = agent_ids[0]
        if not grant.may_be(agent_id):
            raise forbidden("the token does not let you be that agent")
        filter = filter_of(request.args, grant)
        accepted = request.accept_mimetypes
        if request.headers.get("Accept") and not accepted["text/event-stream"]:
            return problem(406, "this answers text/event-stream")
        if request.method == "HEAD":
            return head_of_stream()
        address = client_address()
        return EventStream(
            broadcaster,
            settings,
            agent_id=agent_id,
            filter=filter,
            cursor=cursor_of_request(),
            backlog=services.backlog,
            admit=partial(access.admit, address, grant.subject),
            wants_events=any(value == "text/event-stream" for value, _ in accepted),
            address=address,
            expires_in=None if grant.expires_at is None else max(0.0, grant.expires_at - time.time()),
            request_id=request_id(),
        )

    def head_of_stream() -> Response:
        answer = Response("", 200, content_type="text/event-stream")
        answer.headers["Cache-Control"] = "no-cache, no-transform"
        answer.headers["X-Accel-Buffering"] = "no"
        del answer.headers["Content-Length"]
        return answer

    def cursor_of_request() -> str | None:
        """The header wins over the parameter; an empty one is none; one too long cannot be ours."""
        cursor = request.headers.get("Last-Event-ID") or request.args.get("last_event_id") or None
        return cursor[:CURSOR_LENGTH] if cursor else None

    def client_address() -> str:
        return access.client_address(request.remote_addr or "", request.headers)

    def request_id() -> str:
        given = request.headers.get("X-Request-Id", "")
        return given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)

    add_resources(routes, services)

    # -- who is listening, and how it goes ---------------------------------------------------------------------------

    @routes.get("/clients")
    async def clients() -> Response:
        await require_admin()
        epoch = broadcaster.epoch
        for client in broadcaster.clients.values():
            client.settle()
        listed = [
            {
                "client_id": client.id,
                "agent_id": client.agent_id,
                "connected_at": client.connected_at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
                "address": client.address,
                "filter": client.filter.describe(),
                "queued": client.queued,
                "sent": client.sent,
                "dropped": client.dropped,
                "last_event_id": event_id(epoch, client.told) if epoch and client.told >= 0 else None,
            }
            for client in broadcaster.clients.values()
        ]
        return json_answer({"instance": services.instance, "clients": listed})

    @routes.delete("/clients/<client_id>")
    async def kick(client_id: str) -> Response:
        await require_admin()
        client = broadcaster.clients.get(client_id)
        if client is None:
            return problem(404, "no such client in this process")
        client.end("kicked")
        return Response("", 204)

    @routes.get("/health")
    async def health() -> Response:
        status = services.feed.status
        known = {
            "instance": services.instance,
            "mode": status.mode,
            "server": status.server,
            "clients": len(broadcaster.clients),
            "epoch": broadcaster.epoch,
            "head": broadcaster.head_id,
            "reconnects": status.reconnects,
        }
        if services.draining or broadcaster.stopping is not None:
            reason, detail = "draining", "the server is shutting down"
        elif not status.live:
            reason, detail = status.reason or "starting", status.detail
        else:
            return json_answer({"status": "healthy"} | known)
        return json_answer({"status": "unhealthy", "reason": reason, "detail": detail} | known, 503)

    @routes.get("/livez")
    async def livez() -> Response:
        return json_answer({"status": "alive"})

    @routes.get("/metrics")
    async def metrics() -> Response:
        return Response(services.metrics.render(), content_type=CONTENT_TYPE)

    @routes.get("/openapi.json")
    async def openapi() -> Response:
        return json_answer(openapi_document())

    @routes.get("/docs")
    async def docs() -> Response:
        return page_file("docs.html")

    # -- the live page -----------------------------------------------------------------------------------------------

    @routes.get("/")
    async def page() -> Response:
        return page_file("index.html")

    @routes.get("/page/<name>")
    async def page_asset(name: str) -> Response:
        return page_file(name)

    def page_file(name: str) -> Response:
        body = page_files().get(name)
        if body is None:
            return problem(404, "no such file")
        answer = Response(body, content_type=guess_type(name)[0] or "application/octet-stream")
        if (answer.mimetype or "").startswith("text/"):
            answer.headers["Content-Type"] = f"{answer.mimetype}; charset=utf-8"
        answer.headers.update(PAGE_HEADERS)
        return answer

    return routes
