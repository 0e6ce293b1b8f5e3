"""A client of our own: follows a running server over HTTP, and resumes where it was.

    async with listen("http://127.0.0.1:3000", agent_id="analyst-7", types=["Anomaly"]) as discoveries:
        async for discovery in discoveries:
            ...

Strategy: whoever asks for the next event does the reading, so there is no task, no nursery and no queue, and
what the loop's body does holds the server back. A connection that ends, breaks, or is silent for too long is
replaced by one that sends the last event ID; waits are the server's `retry:`, longer after failures in a row.
Only what no new try would change (a refusal, a wrong address) is an error.

`follow` gives every event and every interruption, for `sse-trio tail` and the like; `listen` the discoveries
alone.
"""

from __future__ import annotations

import json
import math
import random
import secrets
import ssl
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, TypedDict, Unpack

import httpx
import structlog
import trio

from sse_trio.discovery import Discovery, decode
from sse_trio.sse import Decoder, ServerSentEvent, compact

__all__ = ["Follower", "Interruption", "ListenError", "Listener", "WrongAddress", "follow", "listen"]

PATH = "/discoveries/stream"

DEFAULT_RETRY, LONGEST_RETRY = 3.0, 60.0
"""Seconds until the next try: what browsers take where the server asks for nothing, and the most after
failures.
"""

CLOSE_TIMEOUT = 1.0
"""Seconds that closing a connection may take."""

MAX_PROBLEM = 65536
"""Bytes that are read of a refusal's body."""

PASSING = {408, 425, 429, 500, 502, 503, 504}
"""Statuses after which it makes sense to come back."""

Words = str | Iterable[str]

log = structlog.get_logger("sse_trio.listener")


class ListenError(Exception):
    """The stream cannot be had, and trying again would not change that. The text is one line.

    `status` is the answer's, None where there was none.
    """

    def __init__(self, detail: str, status: int | None = None) -> None:
        self.status = status
        super().__init__(_one_line(detail))


class WrongAddress(ListenError):
    """What is to be listened to is no http:// or https:// URL."""


@dataclass(frozen=True, slots=True)
class Interruption:
    """There is no connection now; the next event that is asked for is waited for on a new one."""

    reason: Literal["ended", "broken", "unreachable", "timeout", "refused"]
    """`ended` is the server's own, clean end; `refused` a status that will pass."""
    detail: str
    """One line."""
    delay: float
    """Seconds until the next try."""


def follow(
    url: str,
    *,
    agent_id: str,
    types: Words = (),
    roles: Words = (),
    agents: Words = (),
    subjects: Words = (),
    min_confidence: float | None = None,
    full: bool = False,
    last_event_id: str = "",
    token: str | None = None,
    idle_timeout: float = 90.0,
    patience: float = math.inf,
    client: httpx.AsyncClient | None = None,
) -> Follower:
    """Every event of the stream of the server at `url`, and every interruption, in order, for ever.

    The filters are the stream's; `full` asks for whole discoveries. `last_event_id` resumes. `token` goes
    into the `Authorization` header. A connection that is silent for `idle_timeout` seconds is given up (the
    server sends something every 30, by default); after `patience` seconds without any sign of life so is
    everything. `client` is for who needs proxies, certificates or transports of their own; it stays theirs to
    close.

    Use it as an async context manager, or call `aclose`, unless the loop runs to its end: to leave early
    without either leaks a socket until garbage collection.
    """
    parameters: list[tuple[str, str]] = [("agent_id", agent_id)]
    for name, words in (("type", types), ("role", roles), ("agent", agents), ("subject", subjects)):
        parameters += [(name, word) for word in ([words] if isinstance(words, str) else words)]
    if min_confidence is not None:
        parameters.append(("min_confidence", str(min_confidence)))
    if full:
        parameters.append(("detail", "full"))
    headers = {"Accept": "text/event-stream", "Accept-Encoding": "identity", "Cache-Control": "no-cache"}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    return Follower(
        _stream_url(url, parameters),
        headers,
        last_event_id=last_event_id,
        idle_timeout=idle_timeout,
        patience=patience,
        client=client,
    )


class Options(TypedDict, total=False):
    """The options of `follow` that `listen` takes as well."""

    types: Words
    roles: Words
    agents: Words
    subjects: Words
    min_confidence: float | None
    last_event_id: str
    token: str | None
    idle_timeout: float
    patience: float
    client: httpx.AsyncClient | None


def listen(url: str, *, agent_id: str | None = None, **options: Unpack[Options]) -> Listener:
    """The discoveries of all other agents, from the server at `url`, for ever.

    Those of `agent_id` itself are left out; without one the listener is nobody in particular. The options are
    those of `follow` but `full`. What the server could not give (a gap) is logged and counted, see
    `Listener`.

    Use it as an async context manager, as `follow`.
    """
    own = agent_id if agent_id is not None else f"listener-{secrets.token_hex(4)}"
    return Listener(follow(url, agent_id=own, full=True, **options), agent_id)


class _Closing(ABC):
    """An async iterator that is its own context manager."""

    @abstractmethod
    async def aclose(self) -> None: ...

    def __aiter__(self) -> Self:
        return self

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()


class Follower(_Closing):
    """See `follow`. For one task at a time.

    Cancellation: at any time. A cancelled wait gives up the connection; the next one resumes, and nothing is
    lost.
    """

    def __init__(
        self,
        url: httpx.URL,
        headers: dict[str, str],
        *,
        last_event_id: str,
        idle_timeout: float,
        patience: float,
        client: httpx.AsyncClient | None,
    ) -> None:
        self.last_event_id = last_event_id
        """The cursor to resume with later: that of the last event that was handed out."""
        self.connections = 0
        """How many have been live so far."""
        self._url = url
        self._headers = headers
        self._timeout = httpx.Timeout(10.0, read=idle_timeout)
        self._patience = patience
        self._client = client
        self._owns_client = client is None
        self._response: httpx.Response | None = None
        self._chunks: AsyncIterator[bytes] | None = None
        self._decoder = Decoder(last_event_id)
        self._retry: float | None = None
        self._failures = 0
        self._events: deque[ServerSentEvent] = deque()
        self._next_try = -math.inf
        self._last_sign: float | None = None
        self._ended = False

    async def __anext__(self) -> ServerSentEvent | Interruption:
        """The next event, or that there is an interruption.

        Raises:
            ListenError: the server refuses, or `patience` is over.
            StopAsyncIteration: after `aclose`, or when the server says that there is nothing (204).
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._last_sign is None:
            self._last_sign = trio.current_time()
        while not self._events:
            if self._ended:
                raise StopAsyncIteration
            lost = True
            try:
                interruption = await (self._connect() if self._chunks is None else self._read(self._chunks))
                lost = interruption is not None or self._ended
            finally:
                if lost:
                    with trio.move_on_after(CLOSE_TIMEOUT, shield=True):
                        await self._drop()
            if interruption is not None:
                return interruption
        event = self._events.popleft()
        self.last_event_id = event.id
        return event

    async def _connect(self) -> Interruption | None:
        await trio.sleep_until(self._next_try)
        if self._client is None:
            # A kept connection would be one that nobody closes.
            limits = httpx.Limits(max_keepalive_connections=0)
            self._client = httpx.AsyncClient(limits=limits, follow_redirects=True)
        cursor = self._decoder.last_event_id
        self._decoder = Decoder(cursor)
        headers = httpx.Headers(self._headers)
        if cursor:
            headers["Last-Event-ID"] = cursor
        try:
            request = self._client.build_request("GET", self._url, headers=headers, timeout=self._timeout)
            response = self._response = await self._client.send(request, stream=True)
        except (httpx.UnsupportedProtocol, httpx.TooManyRedirects, httpx.LocalProtocolError) as error:
            raise ListenError(f"{self._place}: {_words(error)}") from None
        except httpx.RequestError as error:
            if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in _causes(error)):
                raise ListenError(f"{self._place}: {_words(error)}") from None
            return self._interrupted("unreachable", error)
        if response.status_code == 204:
            self._ended = True
            return None
        if response.status_code != 200:
            return await self._refused(response)
        if response.headers.get("Content-Type", "").partition(";")[0].strip().lower() != "text/event-stream":
            raise ListenError(f"{self._place}: the answer is no event stream", 200)
        self._chunks = response.aiter_bytes()
        self.connections += 1
        self._last_sign = trio.current_time()
        return None

    async def _read(self, chunks: AsyncIterator[bytes]) -> Interruption | None:
        try:
            chunk = await anext(chunks, None)
        except httpx.RequestError as error:
            return self._interrupted("broken", error)
        if chunk is None:
            return self._interrupted("ended", "the server ended the stream")
        self._last_sign = trio.current_time()
        self._events += self._decoder.feed(chunk)
        if self._decoder.retry is not None:
            self._retry = self._decoder.retry / 1000
        if self._events:
            self._failures = 0
        return None

    async def _refused(self, response: httpx.Response) -> Interruption:
        """A status other than 200: an error of the caller's, or one that will pass."""
        body = b""
        try:
            self._chunks = response.aiter_bytes()
            with trio.move_on_after(CLOSE_TIMEOUT):
                while len(body) < MAX_PROBLEM and (chunk := await anext(self._chunks, None)) is not None:
                    body += chunk
        except httpx.RequestError:
            pass  # the status says enough
        status = response.status_code
        detail = f"{status} {_problem(body) or response.reason_phrase}"
        if status not in PASSING:
            raise ListenError(f"{self._place}: {detail}", status)
        after = response.headers.get("Retry-After", "")
        return self._interrupted("refused", detail, min(int(after[:6]), 3600) if after.isdecimal() else 0)

    def _interrupted(
        self, reason: Literal["ended", "broken", "unreachable", "refused"], cause: str | Exception, least: float = 0
    ) -> Interruption:
        text = _one_line(cause if isinstance(cause, str) else _words(cause))
        base = self._retry if self._retry is not None else DEFAULT_RETRY
        # The server's own wait is jittered already; ours must be, when all its clients find it away.
        longer = min(LONGEST_RETRY, max(base, 0.1) * 2.0 ** min(self._failures, 20)) * random.uniform(0.5, 1.0)
        delay = max(base, longer, least)
        self._failures += 1
        self._next_try = trio.current_time() + delay
        assert self._last_sign is not None, "set before the first try"
        if self._next_try > self._last_sign + self._patience:
            raise ListenError(f"{self._place}: no stream for {self._patience:g} s: {text}")
        named = "timeout" if isinstance(cause, httpx.TimeoutException) else reason
        return Interruption(named, text, delay)

    @property
    def _place(self) -> str:
        """The server, without what the URL may hold of credentials or parameters."""
        return f"{self._url.scheme}://{self._url.netloc.decode('ascii')}"

    async def _drop(self) -> None:
        """Give up the connection; the events that came over it are still handed out. Call under a deadline."""
        response, chunks = self._response, self._chunks
        self._response = self._chunks = None
        if response is None:
            return
        try:
            await response.aclose()
            # httpx nests generators without closing them. Each must come to its end, by an error if need be, or its
            # collection warns.
            while chunks is not None and await anext(chunks, None) is not None:
                pass
        except (httpx.HTTPError, httpx.StreamError):
            pass  # "this stream is closed": so it is

    async def aclose(self) -> None:
        """Close the connection; whoever asks for more gets the end. Takes at most `CLOSE_TIMEOUT` seconds."""
        self._ended = True
        self._events.clear()
        with trio.move_on_after(CLOSE_TIMEOUT, shield=True):
            await self._drop()
            if self._owns_client and self._client is not None:
                await self._client.aclose()


class Listener(_Closing):
    """See `listen`. For one task at a time; cancellation as with `Follower`."""

    def __init__(self, follower: Follower, agent_id: str | None) -> None:
        self.gaps = 0
        """How many times the server has said that discoveries are missing."""
        self.missed = 0
        """How many are, where it knew."""
        self._follower = follower
        self._agent_id = agent_id

    @property
    def last_event_id(self) -> str:
        """The cursor to resume with later."""
        return self._follower.last_event_id

    async def __anext__(self) -> Discovery:
        """The next discovery of another agent; raises as `Follower.__anext__` does."""
        while True:
            event = await anext(self._follower)
            if isinstance(event, Interruption):
                continue
            if event.event == "gap":
                self._count(event)
            elif event.event == "discovery":
                discovery = _discovery(event)
                if discovery.agent_id != self._agent_id:
                    return discovery

    def _count(self, event: ServerSentEvent) -> None:
        gap = _json(event)
        missed = gap.get("missed")
        self.gaps += 1
        self.missed += missed if isinstance(missed, int) else 0
        log.warning("discoveries_missed", reason=str(gap.get("reason")), missed=missed)

    async def aclose(self) -> None:
        """Close the connection."""
        await self._follower.aclose()


def _stream_url(url: str, parameters: list[tuple[str, str]]) -> httpx.URL:
    shown = url.partition("?")[0]
    hint = "" if "://" in shown or not shown else f": did you mean http://{shown}?"
    try:
        place = httpx.URL(url)
        if place.scheme not in {"http", "https"} or not place.host:
            raise WrongAddress(f"{shown!r} is no http:// or https:// URL{hint}")
        path = place.path.rstrip("/")
        path = path if path.endswith(PATH) else f"{path}{PATH}"
        return place.copy_with(path=path, params=httpx.QueryParams([*place.params.multi_items(), *parameters]))
    except httpx.InvalidURL as error:
        raise WrongAddress(f"that is no URL: {error}{hint}") from None


def _json(event: ServerSentEvent) -> dict[str, Any]:
    try:
        value = json.loads(event.data)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ListenError(f"the server sent a {event.event!a} event whose data is no JSON object")
    return value


def _discovery(event: ServerSentEvent) -> Discovery:
    try:
        return decode(compact(_json(event)["params"]["_meta"]["discovery"]).encode())
    except (KeyError, TypeError, ValueError, RecursionError):
        raise ListenError("the server sends no whole discoveries: is it sse-trio?") from None


def _problem(body: bytes) -> str:
    """What a refusal says of itself (RFC 9457), "" where it says nothing."""
    try:
        problem = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    detail = (problem.get("detail") or problem.get("title")) if isinstance(problem, dict) else None
    return detail if isinstance(detail, str) else ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _words(error: Exception) -> str:
    """What an error says, or what lies behind it where it says nothing."""
    return next(filter(None, map(str, _causes(error))), type(error).__name__)


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text[:1000])
