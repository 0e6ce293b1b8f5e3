"""One HTTP request as the application sees it: Quart's handling of it, on a connection of ours.

Strategy: Quart does what it always does, up to the point where it would send a `ConnectionResponse`. That one is kept
until Quart has returned: nothing of the request, its context and its tasks is then left while the response runs, which
may be for hours. All other responses are Quart's, sent through the same connection, so every route has its deadlines.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, cast
from urllib.parse import urlsplit

import structlog
import trio
from hypercorn.typing import ASGIReceiveCallable, ASGIReceiveEvent, ASGISendCallable, ASGISendEvent
from quart_trio.asgi import TrioASGIHTTPConnection

from sse_trio.connection import Connection, ConnectionResponse, PeerGone, Worker
from sse_trio.hypercorn_connection import connection_below

__all__ = ["ASGIConnection", "RefusedWebSocket"]

log = structlog.get_logger("sse_trio.connection")


class ASGIConnection(TrioASGIHTTPConnection):
    """One HTTP request; set as `app.asgi_http_class`, so that every request of every route goes through here.

    The write timeout is the app's `config["SSE_WRITE_TIMEOUT"]`, in seconds. The first time in a server, the app's
    `server_found(worker)` is called, where it has one.
    """

    _connection: Connection
    _ours: ConnectionResponse | None = None
    _left = False

    async def __call__(self, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        self._connection = connection = _connection(self.app, self.scope, send)
        try:
            if _is_path(self.scope["path"]):
                await super().__call__(_bounded(receive, self.app.config["MAX_CONTENT_LENGTH"]), connection.send)
            else:
                await _refuse(connection)
            response, self._ours = self._ours, None
            if response is not None and not self._left:
                await connection.run(response.respond, receive)
        except* PeerGone:
            pass  # which ends any response, and is no failure of it
        finally:
            connection.release()

    async def handle_messages(self, *args: Any) -> None:
        await super().handle_messages(*args)
        self._left = True  # it returns when the peer has left, and else is cancelled

    async def _send_response(self, send: ASGISendCallable, response: Any) -> None:
        if isinstance(response, ConnectionResponse):
            self._ours = response
        else:
            await super()._send_response(send, response)


class _Seen:
    """What an app has seen of its servers, kept in its `extensions`."""

    def __init__(self) -> None:
        self.context: Any = None
        self.unknown = False
        self.never = trio.Event()


class RefusedWebSocket:
    """There are no WebSockets here; set as `app.asgi_websocket_class`."""

    def __init__(self, app: Any, scope: Any) -> None:
        pass

    async def __call__(self, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        head = {"type": "websocket.http.response.start", "status": 400, "headers": [(b"content-length", b"0")]}
        body = {"type": "websocket.http.response.body", "body": b"", "more_body": False}
        # Hypercorn fails when it has refused the peer already, whose handshake was broken.
        with suppress(Exception):
            await send(cast("ASGISendEvent", head))
            await send(cast("ASGISendEvent", body))


def _connection(app: Any, scope: Any, send: ASGISendCallable) -> Connection:
    """The connection below `send`. The first time in a server, the app hears of the `Worker`:
    `app.server_found`."""
    timeout = float(app.config.get("SSE_WRITE_TIMEOUT", 10.0))
    seen: _Seen = app.extensions.setdefault("sse_trio.connection", _Seen())
    found = connection_below(send, scope, timeout)
    if found is None:
        if not seen.unknown:
            seen.unknown = True
            log.warning("unknown server: no write deadline, no abort, no word when it stops", send=repr(send)[:200])
        return Connection(scope, send, timeout, seen.never)
    connection, context = found
    if seen.context is not context:
        seen.context = context
        if (server_found := getattr(app, "server_found", None)) is not None:
            server_found(Worker(context))
    return connection


def _is_path(target: str) -> bool:
    """Whether Quart can make a path of a request's target; it fails on others with an exception of its own."""
    if target.startswith("/"):
        return True
    try:
        return bool(target) and urlsplit(target) is not None
    except ValueError:
        return False


async def _refuse(connection: Connection) -> None:
    body = b'{"type":"about:blank","title":"Bad Request","status":400,"detail":"the request target is not a path"}'
    headers = [(b"content-type", b"application/problem+json"), (b"content-length", b"%d" % len(body))]
    await connection.start(400, headers)
    await connection.write(body)
    await connection.finish()


def _bounded(receive: ASGIReceiveCallable, limit: int | None) -> ASGIReceiveCallable:
    """`receive` with at most one byte more of body than Quart takes, so that it refuses what it need not hold.

    Quart looks at the length of a body that has not said it only when all of it is there.
    """
    if limit is None:
        return receive
    room = limit + 1

    async def bounded() -> ASGIReceiveEvent:
        nonlocal room
        message = await receive()
        if message["type"] == "http.request":
            message["body"] = message["body"][:room]
            room -= len(message["body"])
        return message

    return cast("ASGIReceiveCallable", bounded)
