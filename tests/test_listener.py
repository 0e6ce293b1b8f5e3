"""The listener against servers that follow a script: on real sockets, and in memory under a mock clock.

A scripted server answers its first request with its first script, the second with the second, and so on, and keeps
what each request said. Times are exact where the transport is in memory, since the clock jumps; over sockets the
scripts ask for a `retry:` of a millisecond, and nothing depends on how long things take.
"""

from __future__ import annotations

import gc
import random
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import httpx
import pytest
import trio
import trustme
from structlog.testing import capture_logs
from support import WITHIN, NatsServer, Server, a_discovery, eventually, fail_within, free_port, run_server
from trio.testing import MockClock

from sse_trio import listener, sse
from sse_trio.discovery import build
from sse_trio.listener import Interruption, ListenError, follow, listen
from sse_trio.publisher import open_publisher
from sse_trio.sse import ServerSentEvent

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


class Hold:
    """In a script: nothing more is sent, and the connection stays open until the peer leaves."""


class Left:
    """In a script: what follows is still there when the reader closes."""


Script = Sequence[bytes | type[Hold] | type[Left]]


def chunk(*frames: bytes) -> bytes:
    body = b"".join(frames)
    return b"%x\r\n%s\r\n" % (len(body), body)


def connected(id: str = "m-0", *, retry: int = 1, **more: Any) -> bytes:
    return sse.connected("me", "c", id=id, retry=retry, **more)


def discovery(number: int, **changes: Any) -> bytes:
    """The frame of a whole discovery, with the id m-{number}."""
    made = build(a_discovery(number, **changes))
    return sse.full_discovery(made.uri, f"m-{number}", made.published())


def name(event: ServerSentEvent | Interruption) -> str:
    """What came, in one word: the id of an event that has one, else its name; the reason of an interruption."""
    if isinstance(event, Interruption):
        return event.reason
    return event.id if event.event == "discovery" else event.event


@dataclass
class Request:
    path: str
    query: list[tuple[str, str]]
    headers: dict[str, str]


@dataclass
class ScriptedServer:
    """See the module's head."""

    scripts: list[Script]
    requests: list[Request] = field(default_factory=list)
    left: int = 0
    """How many peers have closed their connection before we did."""
    url: str = ""

    async def handle(self, stream: trio.abc.Stream) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            try:
                data = await stream.receive_some()
            except trio.BrokenResourceError:
                data = b""
            if not data:
                return  # a client that did not like our certificate
            head += data
        line, *fields = head.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
        target = urlsplit(line.split()[1])
        headers = {key.lower(): value.strip() for key, _, value in (f.partition(":") for f in fields)}
        self.requests.append(Request(target.path, parse_qsl(target.query, keep_blank_values=True), headers))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch, stream, nursery.cancel_scope)
            for piece in self.scripts.pop(0):
                if isinstance(piece, bytes):
                    await stream.send_all(piece)
                else:
                    await trio.sleep_forever()
            nursery.cancel_scope.cancel()
        with trio.move_on_after(WITHIN, shield=True):
            await trio.aclose_forcefully(stream)

    async def _watch(self, stream: trio.abc.Stream, scope: trio.CancelScope) -> None:
        try:
            await stream.receive_some()
        except trio.BrokenResourceError:
            pass
        self.left += 1
        scope.cancel()


@asynccontextmanager
async def scripted_server(
    *scripts: Script, port: int = 0, tls: ssl.SSLContext | None = None
) -> AsyncIterator[ScriptedServer]:
    server = ScriptedServer(list(scripts))
    async with trio.open_nursery() as nursery:
        if tls is None:
            listeners = await nursery.start(partial(trio.serve_tcp, server.handle, port, host="127.0.0.1"))
            place = listeners[0].socket.getsockname()
        else:
            secure = await nursery.start(partial(trio.serve_ssl_over_tcp, server.handle, 0, tls, host="127.0.0.1"))
            place = secure[0].transport_listener.socket.getsockname()
        server.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{place[1]}"
        yield server
        nursery.cancel_scope.cancel()


async def take(events: AsyncIterator[ServerSentEvent | Interruption], count: int) -> list[str]:
    """The next `count` things that come, in a word each."""
    with fail_within(WITHIN, f"{count} events"):
        return [name(await anext(events)) for _ in range(count)]


# -- over sockets ----------------------------------------------------------------------------------------------------


async def test_a_stream_is_followed_over_the_servers_ends_and_resumes_where_it_was() -> None:
    async with (
        scripted_server(
            [HEAD, chunk(connected(), discovery(1)), chunk(discovery(2)), chunk(sse.goodbye("lifetime", 1)), END],
            [HEAD, chunk(connected(id="m-2", resumed=True)), chunk(discovery(3)), Hold],
        ) as server,
        follow(server.url, agent_id="me", types=["Anomaly"], full=True) as events,
    ):
        assert await take(events, 7) == ["connected", "m-1", "m-2", "goodbye", "ended", "connected", "m-3"]
        assert events.last_event_id == "m-3"
        assert events.connections == 2
    first, second = server.requests
    assert first.path == second.path == "/discoveries/stream"
    assert first.query == second.query == [("agent_id", "me"), ("type", "Anomaly"), ("detail", "full")]
    assert "last-event-id" not in first.headers
    assert second.headers["last-event-id"] == "m-2"
    assert first.headers["accept"] == "text/event-stream"


async def test_an_event_that_is_cut_is_not_handed_out_and_comes_with_the_next_connection() -> None:
    half = discovery(2)[:-1]
    async with (
        scripted_server(
            [HEAD, chunk(connected(), discovery(1), half)],
            [HEAD, chunk(connected(id="m-1"), discovery(2)), Hold],
        ) as server,
        follow(server.url, agent_id="me") as events,
    ):
        assert await take(events, 5) == ["connected", "m-1", "broken", "connected", "m-2"]
    assert server.requests[1].headers["last-event-id"] == "m-1"


async def test_a_frame_in_many_pieces_is_one_event() -> None:
    pieces = [chunk(discovery(1)[at : at + 1]) for at in range(len(discovery(1)))]
    async with (
        scripted_server([HEAD, chunk(connected()), *pieces, Hold]) as server,
        follow(server.url, agent_id="me") as events,
    ):
        assert await take(events, 2) == ["connected", "m-1"]


async def test_a_server_that_is_not_there_yet_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "DEFAULT_RETRY", 0.001)
    port = free_port()
    async with follow(f"http://127.0.0.1:{port}", agent_id="me") as events:
        assert await take(events, 2) == ["unreachable", "unreachable"]
        async with scripted_server([HEAD, chunk(connected()), Hold], port=port):
            with fail_within(WITHIN, "connected"):
                while name(await anext(events)) != "connected":
                    pass


async def test_a_silent_connection_is_given_up_and_replaced() -> None:
    async with (
        scripted_server(
            [HEAD, chunk(connected(), discovery(1)), Hold],
            [HEAD, chunk(connected(id="m-1")), Hold],
        ) as server,
        follow(server.url, agent_id="me", idle_timeout=1.0) as events,
    ):
        assert await take(events, 4) == ["connected", "m-1", "timeout", "connected"]
        assert server.left == 1


async def test_a_cursor_can_be_brought_along() -> None:
    async with (
        scripted_server([HEAD, chunk(connected("m-7", resumed=True)), Hold]) as server,
        follow(server.url, agent_id="me", last_event_id="m-7", token="t0k") as events,
    ):
        assert events.last_event_id == "m-7"
        assert await take(events, 1) == ["connected"]
    assert server.requests[0].headers["last-event-id"] == "m-7"
    assert server.requests[0].headers["authorization"] == "Bearer t0k"


async def test_to_leave_early_closes_the_connection_and_leaves_nothing_behind() -> None:
    async with scripted_server([HEAD, chunk(connected(), discovery(1), discovery(2)), Hold]) as server:
        before = trio.lowlevel.current_statistics().tasks_living
        async with follow(server.url, agent_id="me") as events:
            async for event in events:
                if name(event) == "m-1":
                    break
        await eventually(
            lambda: server.left == 1 and trio.lowlevel.current_statistics().tasks_living == before,
            "the server sees the close",
        )
        with pytest.raises(StopAsyncIteration):
            await anext(events)
        assert events.last_event_id == "m-1"
        del events
        gc.collect()  # a warning would be an error


async def test_a_cancelled_wait_gives_up_the_connection_and_the_next_one_resumes() -> None:
    async with (
        scripted_server(
            [HEAD, chunk(connected(), discovery(1)), Hold],
            [HEAD, chunk(connected(id="m-1"), discovery(2)), Hold],
        ) as server,
        follow(server.url, agent_id="me") as events,
    ):
        assert await take(events, 2) == ["connected", "m-1"]
        with trio.move_on_after(0.05) as scope:
            await anext(events)
        assert scope.cancelled_caught
        assert await take(events, 2) == ["connected", "m-2"]
    assert server.requests[1].headers["last-event-id"] == "m-1"
    gc.collect()


async def test_a_redirect_is_followed() -> None:
    async with scripted_server([HEAD, chunk(connected()), Hold]) as target:
        moved = b"HTTP/1.1 307 Moved\r\nLocation: %s/elsewhere\r\nContent-Length: 0\r\n\r\n" % target.url.encode()
        async with scripted_server([moved]) as server, follow(server.url, agent_id="me") as events:
            assert await take(events, 1) == ["connected"]
    assert target.requests[0].path == "/elsewhere"


async def test_a_certificate_that_nobody_vouches_for_is_an_error_and_with_its_authority_it_is_not() -> None:
    authority = trustme.CA()
    theirs = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(theirs)
    ours = ssl.create_default_context()
    authority.configure_trust(ours)
    async with scripted_server([HEAD, chunk(connected()), Hold], tls=theirs) as server:
        async with follow(server.url, agent_id="me") as events:
            with pytest.raises(ListenError, match="certificate verify failed"), fail_within(WITHIN, "an error"):
                await anext(events)
        async with httpx.AsyncClient(verify=ours) as client:
            async with follow(server.url, agent_id="me", client=client) as events:
                assert await take(events, 1) == ["connected"]
            assert not client.is_closed, "it stays the caller's"
    gc.collect()


async def test_the_listener_gives_the_discoveries_of_others() -> None:
    async with (
        scripted_server(
            [
                HEAD,
                chunk(connected(), discovery(1, agent_id="me"), discovery(2, agent_id="you", related_to="x")),
                chunk(sse.cursor("m-5"), discovery(6, agent_id="they", note={"kept": "é"})),
                END,
            ],
            [HEAD, chunk(connected(id="m-6"), discovery(7, agent_id="you")), Hold],
        ) as server,
        listen(server.url, agent_id="me", min_confidence=0.5, agents="you") as discoveries,
    ):
        heard = []
        with fail_within(WITHIN, "three discoveries"):
            async for found in discoveries:
                heard.append(found)
                if len(heard) == 3:
                    break
        assert discoveries.last_event_id == "m-7"
    assert [found.agent_id for found in heard] == ["you", "they", "you"]
    assert heard[0].uri == "discovery://agents/you/discoveries/1234567890-Anomaly-unusual-login-patter"
    assert heard[0].related_to == "x"
    assert heard[1].published()["note"] == {"kept": "é"}
    assert server.requests[0].query == [
        ("agent_id", "me"),
        ("agent", "you"),
        ("min_confidence", "0.5"),
        ("detail", "full"),
    ]


async def test_a_listener_without_a_name_hears_everybody_and_has_a_name_of_its_own() -> None:
    async with (
        scripted_server([HEAD, chunk(connected(), discovery(1)), Hold]) as server,
        listen(server.url) as discoveries,
    ):
        with fail_within(WITHIN, "a discovery"):
            assert (await anext(discoveries)).agent_id == "security-001"
    (_, agent_id), *_ = server.requests[0].query
    assert agent_id.startswith("listener-")


async def test_what_the_listener_missed_is_counted_and_logged() -> None:
    script: Script = [HEAD, chunk(connected(), sse.gap("overflow", 3, "m-3"), sse.gap("restart", None, "m-4")), Hold]
    script = [*script[:-1], chunk(discovery(5)), Hold]
    async with scripted_server(script) as server, listen(server.url) as discoveries:
        with capture_logs() as logs, fail_within(WITHIN, "a discovery"):
            await anext(discoveries)
        assert (discoveries.gaps, discoveries.missed) == (2, 3)
    assert [(line["event"], line["reason"], line["missed"]) for line in logs] == [
        ("discoveries_missed", "overflow", 3),
        ("discoveries_missed", "restart", None),
    ]


async def has_client(server: Server) -> bool:
    _, answer = await server.get("/clients")
    return len(answer["clients"]) == 1


async def test_what_is_shared_is_heard_once_and_in_order_over_a_restart_of_the_real_server(
    nats: NatsServer, tmp_path: Path
) -> None:
    port = free_port()
    heard: list[str] = []

    async def hear(*, task_status: trio.TaskStatus[None]) -> None:
        async with listen(f"http://127.0.0.1:{port}", agent_id="me") as discoveries:
            task_status.started()
            while True:
                heard.append((await anext(discoveries)).content)

    def all_heard() -> bool:
        return len(heard) == len(shared)

    shared: list[str] = []
    settings = {"SSE_RETRY": "50", "SSE_DRAIN_WINDOW": "0"}
    async with (
        open_publisher(nats.url, agent_id="you", agent_role="x", within=WITHIN) as publisher,
        trio.open_nursery() as nursery,
    ):
        for run in range(2):
            async with run_server(tmp_path, nats_url=nats.url, port=port, env=settings) as server:
                await eventually(server.is_live, "the feed is live")
                if run == 0:
                    await nursery.start(hear)
                    await eventually(partial(has_client, server), "the listener is connected")
                    await publisher.share("Insight", "mine", 0.5, agent_id="me")
                for number in range(10):
                    shared.append(f"{run} {number}")
                    await publisher.share("Insight", shared[-1], 0.5)
                await eventually(all_heard, "everything is heard")
            for number in range(5):
                shared.append(f"{run} while away {number}")
                await publisher.share("Insight", shared[-1], 0.5)
        nursery.cancel_scope.cancel()
    assert heard == shared[: len(heard)]
    assert len(heard) == 25


# -- in memory, with exact times -------------------------------------------------------------------------------------


class Body(httpx.AsyncByteStream):
    """A response's body that follows a script."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        buffered = False
        for piece in self.script:
            buffered = buffered or piece is Left
            if self.closed and not buffered:
                raise httpx.ReadError("closed")
            if isinstance(piece, bytes):
                yield piece
            elif piece is Hold:
                await trio.sleep_forever()

    async def aclose(self) -> None:
        self.closed = True


STREAM = {"Content-Type": "text/event-stream; charset=utf-8"}


class Memory:
    """A transport that answers each request with the next of its answers; keeps the requests and their times."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []
        self.times: list[float] = []
        self.client = httpx.AsyncClient(transport=httpx.MockTransport(self.answer))

    async def answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        self.times.append(trio.current_time())
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def stream(*script: bytes | type[Hold] | type[Left]) -> httpx.Response:
    return httpx.Response(200, headers=STREAM, stream=Body(script))


def refusal(status: int, *, content: bytes = b"", headers: dict[str, str] | None = None) -> httpx.Response:
    return httpx.Response(status, headers=headers, stream=Body([content]))


DOWN = httpx.ConnectError("connection refused")


@pytest.fixture
def no_luck(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every random part is as long as it can be."""
    monkeypatch.setattr(random, "uniform", lambda low, high: high)


async def test_the_servers_retry_is_honoured_to_the_millisecond(autojump_clock: MockClock) -> None:
    memory = Memory(stream(connected(retry=1500)), stream(sse.goodbye("shutdown", 4250)), stream(Hold))
    async with memory.client, follow("http://a", agent_id="me", client=memory.client) as events:
        assert await take(events, 4) == ["connected", "ended", "goodbye", "ended"]
        with trio.move_on_after(10):
            await anext(events)
    assert memory.times == [0.0, 1.5, 5.75]


async def test_failures_in_a_row_make_the_waits_longer_up_to_a_minute(autojump_clock: MockClock, no_luck: None) -> None:
    memory = Memory(*[DOWN] * 8, stream(connected(retry=2000), b""), DOWN, stream(Hold))
    async with memory.client, follow("http://a", agent_id="me", client=memory.client) as events:
        delays: list[float] = []
        with fail_within(10_000, "everything"):
            while len(delays) < 10:
                event = await anext(events)
                if isinstance(event, Interruption):
                    delays.append(event.delay)
    assert delays == [3, 6, 12, 24, 48, 60, 60, 60, 2, 4]


async def test_waits_after_failures_are_random_but_never_shorter_than_what_was_asked_for(
    autojump_clock: MockClock,
) -> None:
    memory = Memory(stream(connected(retry=1000)), *[DOWN] * 30, stream(Hold))
    async with memory.client, follow("http://a", agent_id="me", client=memory.client) as events:
        await take(events, 2)
        delays = []
        for _ in range(30):
            event = await anext(events)
            assert isinstance(event, Interruption)
            delays.append(event.delay)
    assert all(1 <= delay <= 60 for delay in delays)
    assert all(delay >= 30 for delay in delays[10:])
    assert len(set(delays)) > 20


async def test_a_retry_of_nothing_is_no_licence_to_hammer_a_server_that_is_down(
    autojump_clock: MockClock, no_luck: None
) -> None:
    memory = Memory(stream(connected(retry=0)), *[DOWN] * 3, stream(Hold))
    async with memory.client, follow("http://a", agent_id="me", client=memory.client) as events:
        assert await take(events, 2) == ["connected", "ended"]
        delays = [event.delay for event in [await anext(events) for _ in range(3)] if isinstance(event, Interruption)]
    assert delays == [0.2, 0.4, 0.8]


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
@pytest.mark.parametrize(("after", "delay"), [("17", 17), ("1000000", 3600), ("soon", 3), ("-5", 3), ("", 3)])
async def test_a_status_that_will_pass_is_waited_out(
    autojump_clock: MockClock, no_luck: None, status: int, after: str, delay: float
) -> None:
    memory = Memory(
        refusal(status, content=b'{"detail":"come back"}', headers={"Retry-After": after}), stream(connected(), Hold)
    )
    async with memory.client, follow("http://a", agent_id="me", client=memory.client) as events:
        assert await anext(events) == Interruption("refused", f"{status} come back", delay)
        assert name(await anext(events)) == "connected"
    assert memory.times == [0, delay]


REFUSALS: list[tuple[int, bytes, str]] = [
    (400, b'{"title":"Bad Request","detail":"agent_id: 1 to 128 characters"}', "400 agent_id: 1 to 128 characters"),
    (401, b'{"title":"Unauthorized"}', "401 Unauthorized"),
    (403, b'{"detail":"not\\r\\nhere\\u0007"}', "403 not  here "),
    (404, b"<html>", "404 Not Found"),
    (406, b"[" * 100_000, "406 Not Acceptable"),
    (410, b'["x"]', "410 Gone"),
    (500 + 5, b'{"detail":7}', "505 HTTP Version Not Supported"),
]


@pytest.mark.parametrize(("status", "body", "said"), REFUSALS)
async def test_a_status_that_will_not_pass_is_an_error_with_the_servers_words(
    autojump_clock: MockClock, status: int, body: bytes, said: str
) -> None:
    memory = Memory(refusal(status, content=body))
    async with memory.client, follow("http://me:hush@a:81/?x=hush", agent_id="me", client=memory.client) as events:
        with pytest.raises(ListenError) as caught:
            await anext(events)
    assert caught.value.status == status
    assert str(caught.value) == f"http://a:81: {said}"


async def test_a_refusal_whose_words_never_end_is_an_error_in_time(autojump_clock: MockClock) -> None:
    memory = Memory(httpx.Response(404, stream=Body([b"<html>", Hold])))
    async with memory.client, follow("http://a", agent_id="me", client=memory.client) as events:
        with pytest.raises(ListenError, match="404 Not Found"):
            await anext(events)
    assert trio.current_time() <= 2


async def test_a_refusal_whose_words_break_off_is_an_error_all_the_same(autojump_clock: MockClock) -> None:
    body = Body([b"<html>", b"x"])
    body.closed = True
    memory = Memory(httpx.Response(404, stream=body))
    async with memory.client, follow("http://a", agent_id="me", client=memory.client) as events:
        with pytest.raises(ListenError, match="404 Not Found"):
            await anext(events)


async def test_what_was_read_ahead_does_not_outlive_a_close(autojump_clock: MockClock) -> None:
    memory = Memory(stream(connected(), Left, discovery(1), discovery(2)))
    async with memory.client, follow("http://a", agent_id="me", client=memory.client) as events:
        assert await take(events, 1) == ["connected"]
    assert [event async for event in events] == []
    del events, memory
    gc.collect()  # a warning would be an error


@pytest.mark.parametrize("kind", ["text/html", "", "text/event-streams", "application/json"])
async def test_what_is_no_event_stream_is_an_error(autojump_clock: MockClock, kind: str) -> None:
    memory = Memory(httpx.Response(200, headers={"Content-Type": kind}, stream=Body([b"x", Hold])))
    async with memory.client, follow("http://a", agent_id="me", client=memory.client) as events:
        with pytest.raises(ListenError, match="no event stream"):
            await anext(events)


async def test_a_server_that_says_there_is_nothing_ends_the_iteration(autojump_clock: MockClock) -> None:
    memory = Memory(stream(connected()), refusal(204))
    async with memory.client, follow("http://a", agent_id="me", client=memory.client) as events:
        assert [name(event) async for event in events] == ["connected", "ended"]


async def test_after_its_patience_a_follower_gives_up(autojump_clock: MockClock, no_luck: None) -> None:
    memory = Memory(stream(connected(retry=1000)), *[DOWN] * 20)
    async with memory.client, follow("http://a", agent_id="me", client=memory.client, patience=20) as events:
        with pytest.raises(ListenError, match=r"http://a: no stream for 20 s: connection refused"):
            async for _ in events:
                pass
    assert memory.times == [0, 1, 3, 7, 15]


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("http://a", "http://a/discoveries/stream?agent_id=me"),
        ("http://a/", "http://a/discoveries/stream?agent_id=me"),
        ("http://a:81/prefix/", "http://a:81/prefix/discoveries/stream?agent_id=me"),
        ("https://a/discoveries/stream", "https://a/discoveries/stream?agent_id=me"),
        ("http://a/?via=b", "http://a/discoveries/stream?via=b&agent_id=me"),
    ],
)
async def test_the_address_of_a_server_becomes_that_of_its_stream(
    autojump_clock: MockClock, url: str, asked: str
) -> None:
    memory = Memory(stream(connected(), Hold))
    async with memory.client, follow(url, agent_id="me", client=memory.client) as events:
        await anext(events)
    assert str(memory.requests[0].url) == asked


async def test_every_filter_is_a_parameter(autojump_clock: MockClock) -> None:
    memory = Memory(stream(connected(), Hold))
    async with (
        memory.client,
        follow(
            "http://a",
            agent_id="me",
            types=("Anomaly", "Question"),
            roles="Security & more",
            agents=iter(["a/b"]),
            subjects=["discoveries.*"],
            min_confidence=0,
            full=True,
            client=memory.client,
        ) as events,
    ):
        await anext(events)
    assert memory.requests[0].url.params.multi_items() == [
        ("agent_id", "me"),
        ("type", "Anomaly"),
        ("type", "Question"),
        ("role", "Security & more"),
        ("agent", "a/b"),
        ("subject", "discoveries.*"),
        ("min_confidence", "0"),
        ("detail", "full"),
    ]


@pytest.mark.parametrize("url", ["ftp://a", "127.0.0.1:3000", "http://", "", "http://a:port", "http://a\0b"])
def test_what_is_no_address_is_refused_at_once(url: str) -> None:
    with pytest.raises(ListenError, match=r"no .*URL"):
        follow(url, agent_id="me")


@pytest.mark.parametrize(
    "data", ["", "null", "[]", "{}", '{"params":{"uri":"x"}}', '{"params":[]}', '{"params":{"_meta":{"discovery":{}}}}']
)
async def test_a_server_that_sends_no_whole_discoveries_is_not_one_to_listen_to(
    autojump_clock: MockClock, data: str
) -> None:
    memory = Memory(stream(sse.encode("discovery", data), Hold))
    async with memory.client, listen("http://a", client=memory.client) as discoveries:
        with pytest.raises(ListenError, match=r"no whole discoveries|no JSON object"):
            await anext(discoveries)


async def test_a_token_that_cannot_be_sent_is_an_error(autojump_clock: MockClock) -> None:
    async with scripted_server() as server, follow(server.url, agent_id="me", token="a\nb") as events:
        with pytest.raises(ListenError):
            await anext(events)
