"""What strangers do to a server on the open internet, done to the real one. docs/security.md is the table of it.

Every test leaves the server well: it still answers, it never said 500, and its log holds no traceback.
"""

from __future__ import annotations

import base64
import json
import os
import re
import resource
import socket
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import h2.config
import h2.connection
import h2.events
import jwt
import pytest
import trio
import trustme
from support import (
    BIN,
    WITHIN,
    NatsServer,
    Server,
    eventually,
    fail_within,
    free_port,
    listen,
    payload,
    request,
    run_server,
)

SECRET = "0123456789abcdef0123456789abcdef"
HOST = b"Host: 127.0.0.1\r\n"
POST = b"POST /discoveries HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n"
SECOND = b"GET /livez HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"
"""The request that a smuggler hides; its answer in a place where none belongs would show it."""

WEBSOCKET = (
    b"GET /discoveries/stream?agent_id=a HTTP/1.1\r\n" + HOST + b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


@asynccontextmanager
async def attacked(
    directory: Path, nats: NatsServer, *, options: tuple[str, ...] = (), env: dict[str, str] | None = None, **popen: Any
) -> AsyncIterator[Server]:
    """The real server; when the block ends it must still be well."""
    async with run_server(directory, nats_url=nats.url, options=options, env=env, **popen) as server:
        await eventually(server.is_live, "the feed is live")
        yield server
        await eventually(server.is_live, "the server is well after the attack")
        assert "Traceback" not in server.output
        assert " 500" not in server.output


async def exchange(port: int, *parts: bytes, pause: float = 0.0, within: float = WITHIN) -> bytes:
    """Everything that the server says to these bytes until it closes; with `pause`, so many seconds between parts."""
    answer = b""
    with fail_within(within, f"the server closes after {parts[0][:80]!r}"):
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            try:
                for part in parts:
                    await stream.send_all(part)
                    with trio.move_on_after(pause):
                        while pause and (data := await stream.receive_some()):
                            answer += data
                while data := await stream.receive_some():
                    answer += data
            except trio.BrokenResourceError:
                pass  # closed with our bytes unread
    return answer


def statuses(answer: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


SHAPES: list[tuple[str, bytes, list[int]]] = [
    ("both lengths", CHUNKED + b"Content-Length: 4\r\n\r\n0\r\n\r\n" + SECOND, [400]),
    ("both lengths again", POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SECOND, [400]),
    ("two lengths", POST + b"Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcde" + SECOND, [400]),
    ("a list of lengths", POST + b"Content-Length: 4, 5\r\n\r\nabcde" + SECOND, [400]),
    ("a negative length", POST + b"Content-Length: -1\r\n\r\n" + SECOND, [400]),
    ("a signed length", POST + b"Content-Length: +4\r\n\r\nabcd" + SECOND, [400]),
    ("a hexadecimal length", POST + b"Content-Length: 0x4\r\n\r\nabcd" + SECOND, [400]),
    ("a length beyond all bounds", POST + b"Content-Length: 99999999999999999999\r\n\r\nabcd" + SECOND, [413]),
    ("an unknown coding", POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + SECOND, [501]),
    ("identity", POST + b"Transfer-Encoding: identity\r\n\r\n" + SECOND, [501]),
    ("chunked, then another", POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" + SECOND, [501]),
    ("chunked twice", CHUNKED + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SECOND, [501]),
    ("a space before the colon", POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + SECOND, [400]),
    ("a tab before the coding", POST + b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n" + SECOND, [400]),
    ("chunks over HTTP/1.0", CHUNKED.replace(b"/1.1", b"/1.0") + b"\r\n0\r\n\r\n" + SECOND, [400]),
    ("a chunk size that is no number", CHUNKED + b"\r\nzz\r\nabc\r\n0\r\n\r\n" + SECOND, [400]),
    ("a negative chunk size", CHUNKED + b"\r\n-1\r\nabc\r\n0\r\n\r\n" + SECOND, [400]),
    ("a chunk size beyond all bounds", CHUNKED + b"\r\n" + b"f" * 30 + b"\r\nabc" + SECOND, [400]),
    ("a chunk longer than its size", CHUNKED + b"\r\n1\r\naXX0\r\n\r\n" + SECOND, [400]),
    ("an endless chunk extension", CHUNKED + b"\r\n1;" + b"a" * 70_000 + b"\r\n1\r\n0\r\n\r\n" + SECOND, [431]),
    ("endless trailers", CHUNKED + b"\r\n0\r\n" + b"a: b\r\n" * 20_000 + b"\r\n" + SECOND, [431]),
    ("a NUL in a header", b"GET /livez HTTP/1.1\r\n" + HOST + b"X: a\x00b\r\n\r\n" + SECOND, [400]),
    ("a CR in a header", b"GET /livez HTTP/1.1\r\n" + HOST + b"X: a\rSet-Cookie: b\r\n\r\n" + SECOND, [400]),
    ("no Host", b"GET /livez HTTP/1.1\r\n\r\n" + SECOND, [400]),
    ("two Hosts", b"GET /livez HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n" + SECOND, [400]),
    ("a space in the target", b"GET /live z HTTP/1.1\r\n" + HOST + b"\r\n" + SECOND, [400]),
    ("raw UTF-8 in the target", "GET /é HTTP/1.1\r\n".encode() + HOST + b"\r\n" + SECOND, [400]),
    ("a method of strange letters", b"\xc3\xa9 /livez HTTP/1.1\r\n" + HOST + b"\r\n" + SECOND, [400]),
    ("noise", b"\x00\xff" * 2000, [400]),
    ("TLS to a port without", bytes.fromhex("16030100") + b"\x50\x01" * 20, [400]),
    ("an endless request line", b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", [431]),
    ("a WebSocket", WEBSOCKET, [400]),
]  # fmt: skip


async def test_no_shape_of_a_request_hides_another_in_it(nats: NatsServer, tmp_path: Path) -> None:
    async with attacked(tmp_path, nats) as server:
        for name, data, expected in SHAPES:
            answer = await exchange(server.port, data)
            # What is larger than a buffer may be answered by a reset that overtakes the answer.
            assert statuses(answer) in ([expected, []] if len(data) > 60_000 else [expected]), (name, answer)
            assert b"alive" not in answer, name


async def test_giant_heads_are_cut_off(nats: NatsServer, tmp_path: Path) -> None:
    async with attacked(tmp_path, nats) as server:
        for head in (
            b"X: " + b"a" * 1_000_000 + b"\r\n",
            b"".join(b"X-%d: a\r\n" % number for number in range(50_000)),
            b"Cookie: " + b"sse_trio=a; " * 50_000 + b"\r\n",
            b"Authorization: Bearer " + b"a" * 100_000 + b"\r\n",
        ):
            answer = await exchange(server.port, b"GET /livez HTTP/1.1\r\n" + HOST + head + b"\r\n")
            assert statuses(answer) in ([431], [])


async def test_pipelined_requests_are_answered_one_by_one_and_in_order(nats: NatsServer, tmp_path: Path) -> None:
    async with attacked(tmp_path, nats) as server:
        many = b"".join(
            b"GET /nothing/%d HTTP/1.1\r\n" % n + HOST + b"\r\nGET /livez HTTP/1.1\r\n" + HOST + b"\r\n"
            for n in range(250)
        )
        answer = await exchange(server.port, many + SECOND)
        assert statuses(answer) == [404, 200] * 250 + [200]


async def test_slow_heads_and_silence_are_cut_off_and_others_are_served_meanwhile(
    nats: NatsServer, tmp_path: Path
) -> None:
    async with attacked(tmp_path, nats, options=("--keep-alive", "2")) as server:

        async def drip(*parts: bytes) -> None:
            assert await exchange(server.port, *parts, pause=0.2, within=15) == b""

        with fail_within(20, "every slow head is cut off"):
            async with trio.open_nursery() as nursery:
                for _ in range(50):
                    nursery.start_soon(drip, b"GET /livez HTTP/1.1\r\n", *[b"X-a: b\r\n"] * 100)
                    nursery.start_soon(drip, b"GET /livez HTTP/1.1\r\n" + HOST + b"X: ", *[b"b"] * 100)
                    nursery.start_soon(drip, b"GET /livez HTTP/1.1\r\n" + HOST)
                    nursery.start_soon(drip, b"")
                async with listen(server.port) as client:
                    await client.next("connected", within=5)
                    await nats.publish(("discoveries.insights", payload()))
                    await client.next("discovery", within=5)


async def test_handshakes_that_never_come_are_not_waited_for(nats: NatsServer, tmp_path: Path) -> None:
    chain, key = certificate(tmp_path)
    port = free_port()
    command = (str(BIN / "sse-trio"), "serve", "--bind", f"127.0.0.1:{port}", "--certfile", chain, "--keyfile", key)
    async with (
        run_server(tmp_path, nats_url=nats.url, command=command, port=port, wait=False) as server,
        trio.open_nursery() as nursery,
    ):

        async def wait_for_the_end(*said: bytes) -> None:
            assert await exchange(port, *said, within=25) == b""

        await eventually(lambda: "serves https" in server.output, "it serves TLS")
        for _ in range(50):
            nursery.start_soon(wait_for_the_end, b"")
            nursery.start_soon(wait_for_the_end, b"\x16\x03\x01")
    assert "Traceback" not in server.output


async def test_slow_bodies_are_cut_off(nats: NatsServer, tmp_path: Path) -> None:
    async with attacked(tmp_path, nats) as server:
        began = trio.current_time()
        head = POST + b"Content-Length: 1000\r\n\r\n"
        answers: list[bytes] = []

        async def drip(*parts: bytes) -> None:
            answers.append(await exchange(server.port, *parts, pause=0.5, within=30))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drip, head, *[b" "] * 60)
            nursery.start_soon(drip, head)
            nursery.start_soon(drip, CHUNKED + b"\r\n", *[b"1\r\n \r\n"] * 60)
        assert [statuses(answer) for answer in answers] == [[408]] * 3
        assert trio.current_time() - began > 5, "an honest sender has time"


async def test_senders_who_leave_in_the_middle_leave_nothing_in_the_log(nats: NatsServer, tmp_path: Path) -> None:
    async with attacked(tmp_path, nats) as server:
        before = open_files(server)
        for _ in range(20):
            for head in (
                b"GET /livez HTT",
                b"GET /livez HTTP/1.1\r\n" + HOST + b"\r\n",
                POST + b"Content-Length: 100\r\n\r\nab",
                CHUNKED + b"\r\n5\r\nab",
                b"GET /discoveries/stream?agent_id=a HTTP/1.1\r\n" + HOST + b"\r\n",
            ):
                stream = await trio.open_tcp_stream("127.0.0.1", server.port)
                await stream.send_all(head)
                await stream.aclose()
        await eventually(lambda: open_files(server) <= before, "their connections are closed")


async def test_a_body_that_nobody_asked_for_is_not_waited_for(nats: NatsServer, tmp_path: Path) -> None:
    async with attacked(tmp_path, nats) as server:
        for method, path, status in (("GET", "/livez", 200), ("DELETE", "/clients/x", 404), ("POST", "/livez", 405)):
            head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000\r\n\r\n"
            assert statuses(await exchange(server.port, head.encode())) == [status]


async def test_too_large_a_body_is_refused_with_or_without_a_length(nats: NatsServer, tmp_path: Path) -> None:
    async with attacked(tmp_path, nats) as server:
        large = b" " * 65_537
        answer = await exchange(server.port, POST + b"Content-Length: %d\r\n\r\n" % len(large) + large)
        assert statuses(answer) == [413]
        endless = b"10000\r\n" + b" " * 65_536 + b"\r\n"
        answer = await exchange(server.port, CHUNKED + b"Connection: close\r\n\r\n" + endless * 2 + b"0\r\n\r\n")
        assert statuses(answer) == [413]
        # Without an end: no more of it is kept than a discovery may have.
        pid = max(family(server.process.pid), key=memory)
        before = memory(pid)
        answer = await exchange(server.port, CHUNKED + b"\r\n", *[endless] * 2000)
        assert statuses(answer) in ([413], [])
        for path in (b"/livez", b"/discoveries/stream?agent_id=a"):
            head = b"GET " + path + b" HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"
            with trio.move_on_after(2):
                await exchange(server.port, head, *[endless] * 2000)
        assert memory(pid) - before < 32_000, "kilobytes"


def bombs() -> list[bytes]:
    """Bodies that are small and dear to read."""
    return [
        b"[" * 65_000,
        b'{"a":' * 13_000,
        b'{"confidence":' + b"9" * 60_000 + b"}",
        b'{"confidence":1e' + b"9" * 60_000 + b"}",
        b'{"agent_id":"' + b"\\ud800" * 10_000 + b'"}',
        b'{"timestamp":"' + b"2" * 60_000 + b'"}',
        b"\xff" * 60_000,
        b'"' * 60_000,
        b"",
        b"null",
        b"{}" * 10_000,
    ]


async def test_bodies_that_are_dear_to_read_are_refused_at_once(nats: NatsServer, tmp_path: Path) -> None:
    async with attacked(tmp_path, nats) as server:
        with fail_within(20, "every bomb is refused"):
            for body in bombs():
                status, _, answer = await request(
                    server.port, "POST", "/discoveries", headers={"Content-Type": "application/json"}, body=body
                )
                assert status == 400, (body[:40], answer)
        await nats.publish(*(("discoveries.insights", body) for body in bombs()))
        async with listen(server.port) as client:
            await client.next("connected")
            await nats.publish(("discoveries.insights", payload(7)))
            await client.next("discovery")


def connections(count: int, port: int) -> list[socket.socket]:
    """So many connections, being opened; nobody waits for them."""
    opened = []
    for _ in range(count):
        one = socket.socket()
        one.setblocking(False)
        one.connect_ex(("127.0.0.1", port))
        opened.append(one)
    return opened


async def test_running_out_of_files_is_survived_and_said_and_streams_go_on(nats: NatsServer, tmp_path: Path) -> None:
    def few_files() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))

    async with attacked(tmp_path, nats, preexec_fn=few_files) as server, listen(server.port) as client:
        await client.next("connected")
        flood = connections(400, server.port)
        try:
            await eventually(lambda: "Too many open files" in server.output, "it is said")
            await nats.publish(("discoveries.insights", payload(1)))
            await client.next("discovery", within=5)
            await eventually(server.is_live, "the idle are cut off, and others are served again")
            assert server.output.count("Too many open files") < 5, "and that is not said ten times a second"
        finally:
            for one in flood:
                one.close()


async def test_ten_thousand_half_open_connections_cost_little_and_are_gone_soon(
    nats: NatsServer, tmp_path: Path
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    count = min(10_000, hard - 1000)
    flood: list[socket.socket] = []
    try:
        async with (
            attacked(tmp_path, nats, options=("--backlog", "4096", "--keep-alive", "2")) as server,
            listen(server.port) as client,
        ):
            await client.next("connected")
            before = open_files(server)
            flood = connections(count, server.port)
            await eventually(lambda: open_files(server) > before + min(1000, count // 2), "they have arrived")
            await nats.publish(("discoveries.insights", payload(1)))
            await client.next("discovery", within=5)
            assert await server.is_live(), "others are served meanwhile"
            await eventually(lambda: open_files(server) < before + 50, "they are gone", within=2 * WITHIN)
    finally:
        for one in flood:
            one.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def open_files(server: Server) -> int:
    """Descriptors of the server's worker, the process of its tree that has the most."""
    return max(len(os.listdir(f"/proc/{pid}/fd")) for pid in family(server.process.pid))


def family(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(descendant for child in children for descendant in family(int(child)))]


async def test_streams_beyond_the_limit_are_refused_and_the_others_stay(nats: NatsServer, tmp_path: Path) -> None:
    limits = {"SSE_MAX_CONNECTIONS_PER_IP": "5"}
    async with attacked(tmp_path, nats, env=limits) as server, trio.open_nursery() as nursery:
        ended: list[str] = []

        async def try_to_listen(number: int) -> None:
            async with listen(server.port, f"agent-{number}") as client:
                first = await client.next()
                ended.append(first.event)
                if first.event == "connected":
                    await client.next("discovery")
                else:
                    assert client.status == 200, "a native EventSource survives it"
                    assert (client.decoder.retry or 0) >= 30_000
                    await client.read_to_end()

        for number in range(40):
            nursery.start_soon(try_to_listen, number)
        await eventually(lambda: len(ended) == 40, "everybody has an answer")
        assert ended.count("connected") == 5
        assert ended.count("goodbye") == 35
        status, _, _ = await request(server.port, "GET", "/discoveries/stream?agent_id=a")
        assert status == 503, "who is no EventSource is told plainly"
        await nats.publish(("discoveries.insights", payload()))


# -- who may listen --------------------------------------------------------------------------------------------------


def token(**claims: Any) -> str:
    return jwt.encode({"exp": 4_000_000_000} | claims, SECRET, "HS256")


def bearer(value: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {value}"}


TEAM_A = token(sub="a", agent_ids=["a-*"], subjects=["team.a.>"])
TEAM_B = token(sub="b", agent_ids=["b-*"], subjects=["team.b.>"])
WITH_TOKENS = {"SSE_JWT_SECRET": SECRET, "NATS_SUBJECT": "team.>"}


def unsigned(header: dict[str, Any], claims: dict[str, Any]) -> str:
    parts = (base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in (header, claims))
    return ".".join(parts) + "."


async def test_forged_tokens_open_nothing(nats: NatsServer, tmp_path: Path) -> None:
    everything = {"exp": 4_000_000_000, "agent_ids": ["*"], "subjects": [">"], "roles": ["admin"], "share": True}
    forged = {
        "no algorithm": unsigned({"alg": "none"}, everything),
        "another spelling of none": unsigned({"alg": "nOnE"}, everything),
        "the signature cut off": TEAM_A.rpartition(".")[0] + ".",
        "another secret": jwt.encode(everything, "x" * 32, "HS256"),
        "another algorithm": jwt.encode(everything, SECRET * 2, "HS512"),
        "expired": jwt.encode(everything | {"exp": 1}, SECRET, "HS256"),
        "from the future": jwt.encode(everything | {"nbf": 3_900_000_000}, SECRET, "HS256"),
        "for ever": jwt.encode({k: v for k, v in everything.items() if k != "exp"}, SECRET, "HS256"),
        "claims of the wrong type": jwt.encode(everything | {"agent_ids": "*"}, SECRET, "HS256"),
        "no token": "null",
        "too long": "a." * 4000 + "a",
    }
    async with attacked(tmp_path, nats, env=WITH_TOKENS) as server:
        for name, value in forged.items():
            for method, path in (
                ("GET", "/discoveries/stream?agent_id=a-1"),
                ("GET", "/discoveries"),
                ("GET", "/agents/a-1/discoveries/1-Insight-x"),
                ("GET", "/clients"),
                ("DELETE", "/clients/x"),
                ("POST", "/discoveries"),
            ):
                status, headers, body = await request(server.port, method, path, headers=bearer(value))
                assert status == 401, (name, method, path)
                assert headers["www-authenticate"].startswith("Bearer")
                assert value not in body.decode() + str(headers)
        assert not any(value in server.output for value in forged.values() if len(value) > 20)


async def test_a_token_in_the_query_is_none_and_reaches_no_log(nats: NatsServer, tmp_path: Path) -> None:
    env = WITH_TOKENS | {"LOG_LEVEL": "debug", "LOG_FORMAT": "json"}
    options = ("--access-logfile", "-", "--error-logfile", "-", "--log-level", "debug")
    async with attacked(tmp_path, nats, env=env, options=options) as server:
        for name in ("access_token", "token", "jwt", "authorization", "auth"):
            path = f"/discoveries/stream?agent_id=a-1&{name}={TEAM_A}"
            assert (await request(server.port, "GET", path))[0] == 401
        async with listen(server.port, "a-1", query=f"&access_token={TEAM_A}", headers=bearer(TEAM_A)) as client:
            await client.next("connected")
        cookie = {"Cookie": f"sse_trio={TEAM_A}"}
        async with listen(server.port, "a-1", query="&nobody=hidden-in-the-query", headers=cookie) as client:
            await client.next("connected")
        await request(server.port, "GET", f"/nothing/here?token={TEAM_A}")
        await eventually(lambda: server.output.count("client disconnected") == 2, "both have left")
        assert TEAM_A not in server.output
        assert TEAM_A.rpartition(".")[2] not in server.output
        assert "hidden-in-the-query" not in server.output


async def test_a_cookie_opens_a_stream_and_nothing_that_changes_anything(nats: NatsServer, tmp_path: Path) -> None:
    admin = token(agent_ids=["*"], subjects=["team.>"], roles=["admin"], share=True)
    cookie = {"Cookie": f"sse_trio={admin}", "Content-Type": "application/json"}
    async with (
        attacked(tmp_path, nats, env=WITH_TOKENS) as server,
        listen(server.port, "a-1", headers=cookie) as client,
    ):
        connected = json.loads((await client.next("connected")).data)
        path = f"/clients/{connected['client_id']}"
        assert (await request(server.port, "DELETE", path, headers=cookie))[0] == 401
        assert (await request(server.port, "POST", "/discoveries", headers=cookie, body=payload()))[0] == 401
        assert (await request(server.port, "DELETE", path, headers=bearer(admin)))[0] == 204
        assert json.loads((await client.next("goodbye")).data) == {"reason": "kicked"}


async def test_a_wildcard_is_never_wider_than_the_token(nats: NatsServer, tmp_path: Path) -> None:
    async with attacked(tmp_path, nats, env=WITH_TOKENS) as server:
        for pattern in (
            ">",
            "team.>",
            "team.*",
            "*.a.>",
            "team.b.>",
            "team.*.x",
            "*.*.*",
            "team.b.x",
            "team",
            "team.a",
        ):
            path = f"/discoveries/stream?agent_id=a-1&subject={pattern}"
            assert (await request(server.port, "GET", path, headers=bearer(TEAM_A)))[0] == 403, pattern
            both = f"{path}&subject=team.a.x"
            assert (await request(server.port, "GET", both, headers=bearer(TEAM_A)))[0] == 403, pattern
            listed = f"/discoveries?subject={pattern}"
            assert (await request(server.port, "GET", listed, headers=bearer(TEAM_A)))[0] == 403, pattern
        for agent_id in ("b-1", "a", "A-1", "xa-1"):
            path = f"/discoveries/stream?agent_id={agent_id}"
            assert (await request(server.port, "GET", path, headers=bearer(TEAM_A)))[0] == 403, agent_id


@pytest.mark.parametrize("history", ["10000", "0"], ids=["from memory", "from the stream"])
async def test_what_a_token_may_not_hear_is_not_delivered_not_replayed_not_listed_and_not_readable(
    nats: NatsServer, tmp_path: Path, history: str
) -> None:
    async with attacked(tmp_path, nats, env=WITH_TOKENS | {"SSE_HISTORY": history, "SSE_BUFFER": "2"}) as server:
        theirs, ours = payload(1, content="theirs", agent_id="b-9"), payload(2, content="ours", agent_id="a-9")
        async with listen(server.port, "a-1", headers=bearer(TEAM_A)) as client:
            connected = await client.next("connected")
            await nats.publish(("team.b.x", theirs), ("team.a.x", ours), ("team.b.x", theirs), ("team.a.y", ours))
            assert ["ours" in (await client.next("discovery")).data for _ in range(2)] == [True, True]
            assert b"theirs" not in client.body
        for query in ("", "&detail=full", "&subject=team.a.>", "&agent=b-9"):
            cursor = {"Last-Event-ID": connected.id}
            async with listen(server.port, "a-1", query=query, headers=bearer(TEAM_A) | cursor) as client:
                await client.next("connected")
                await nats.publish(("team.b.x", theirs), ("team.a.x", ours))
                if "agent=b-9" not in query:
                    await client.next("discovery")
                assert b"theirs" not in client.body, query
        status, _, body = await request(server.port, "GET", "/discoveries?limit=500", headers=bearer(TEAM_A))
        assert status == 200
        assert b"ours" in body
        assert b"theirs" not in body
        nobody = bearer(token(agent_ids=["*"]))
        _, _, body = await request(server.port, "GET", "/discoveries?limit=500", headers=nobody)
        assert json.loads(body)["discoveries"] == [], "a token that names no subjects hears nothing"
        _, _, body = await request(server.port, "GET", "/discoveries?limit=500", headers=bearer(TEAM_B))
        uri = next(found["uri"] for found in json.loads(body)["discoveries"])
        event_id = next(found["id"] for found in json.loads(body)["discoveries"])
        path = uri.removeprefix("discovery:/")
        for query in ("", f"?event_id={event_id}"):
            assert (await request(server.port, "GET", path + query, headers=bearer(TEAM_B)))[0] == 200
            assert (await request(server.port, "GET", path + query, headers=bearer(TEAM_A)))[0] == 404


async def test_a_stream_ends_when_its_token_does(nats: NatsServer, tmp_path: Path) -> None:
    async with attacked(tmp_path, nats, env=WITH_TOKENS) as server:
        short = token(exp=time.time() + 5, agent_ids=["*"], subjects=["team.>"])
        async with listen(server.port, "a-1", headers=bearer(short)) as client:
            await client.next("connected")
            assert json.loads((await client.next("goodbye")).data) == {"reason": "expired"}
            await client.read_to_end()
        assert (await request(server.port, "GET", "/discoveries", headers=bearer(short)))[0] == 401


# -- who may ask -----------------------------------------------------------------------------------------------------


async def test_a_rebound_name_gets_nothing(nats: NatsServer, tmp_path: Path) -> None:
    async with attacked(tmp_path, nats, env={"SSE_ALLOWED_HOSTS": "localhost,127.0.0.1"}) as server:
        for host in (
            "evil.example",
            "127.0.0.1.evil.example",
            "localhost.evil.example:3000",
            "evil.example:80",
            "[::1]",
        ):
            for path in ("/", "/discoveries/stream?agent_id=a", "/discoveries", "/clients", "/health", "/metrics"):
                status, _, body = await request(server.port, "GET", path, headers={"Host": host})
                assert status == 403, (host, path)
                assert host not in body.decode()
    async with attacked(tmp_path / "open", nats) as server:
        for host in ("evil.example", "127.0.0.1.evil.example"):
            headers = {"Host": host, "Content-Type": "application/json"}
            assert (await request(server.port, "GET", "/clients", headers=headers))[0] == 403
            status, _, _ = await request(server.port, "POST", "/discoveries", headers=headers, body=payload())
            assert status == 403


async def test_another_origin_subscribes_nothing_and_rules_nothing(nats: NatsServer, tmp_path: Path) -> None:
    evil = {"Origin": "https://evil.example"}
    named = {"SSE_ALLOWED_ORIGINS": "https://app.example"}
    stream = "/discoveries/stream?agent_id=a"
    async with attacked(tmp_path, nats, env=named) as server:
        for headers in (evil, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}):
            status, fields, _ = await request(server.port, "GET", stream, headers=headers)
            assert status == 403
            assert "access-control-allow-origin" not in fields
        preflight = evil | {"Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": "last-event-id"}
        _, fields, _ = await request(server.port, "OPTIONS", stream, headers=preflight)
        assert "access-control-allow-origin" not in fields
        _, fields, _ = await request(
            server.port, "OPTIONS", stream, headers=preflight | {"Origin": "https://app.example"}
        )
        assert fields["access-control-allow-origin"] == "https://app.example"
        assert fields["access-control-allow-credentials"] == "true"
        assert "origin" in fields["vary"].lower()
        assert "last-event-id" in fields["access-control-allow-headers"].lower()
        assert "client connected" not in server.output
    async with attacked(tmp_path / "open", nats) as server:
        json_type = {"Content-Type": "application/json"}
        for headers in (evil, {"Origin": "null"}, {"X-Forwarded-For": "6.6.6.6"}, {"Sec-Fetch-Site": "cross-site"}):
            assert (await request(server.port, "GET", "/clients", headers=headers))[0] == 403
            status, _, _ = await request(
                server.port, "POST", "/discoveries", headers=headers | json_type, body=payload()
            )
            assert status == 403
        for path, method in (("/clients", "GET"), ("/clients/x", "DELETE"), ("/discoveries", "POST")):
            preflight = evil | {"Access-Control-Request-Method": method}
            _, fields, _ = await request(server.port, "OPTIONS", path, headers=preflight)
            assert method not in fields.get("access-control-allow-methods", "") or (
                "access-control-allow-origin" not in fields
            )
        for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a"):
            headers = {"Content-Type": content_type}
            status, _, _ = await request(server.port, "POST", "/discoveries", headers=headers, body=payload())
            assert status == 415, "what a form can send without a preflight is no discovery"


# -- what comes in ---------------------------------------------------------------------------------------------------

EVIL = [
    "a\nevent: goodbye\ndata: {}\n\n",
    "a\r\rdata: evil\r\r",
    "a\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
    'a"}\n{"event": "forged", "level": "info"}',
    "a\x00b\x1b[31m\x7f\x85\u2028\u2029\ufeff",
    "<script>alert(1)</script>",
    "%0d%0aSet-Cookie:%20a=b",
    "../../etc/passwd",
    "${jndi:ldap://127.0.0.1/a}",
    "\U0001f600\u202e",
]


async def test_nothing_in_a_discovery_breaks_out_of_its_frame(nats: NatsServer, tmp_path: Path) -> None:
    async with attacked(tmp_path, nats) as server:
        async with listen(server.port, query="&detail=full") as client:
            await client.next("connected")
            for number, text in enumerate(EVIL):
                for changes in (
                    {"content": text},
                    {"agent_id": text},
                    {"agent_role": text},
                    {"related_to": text},
                    {text: text},
                    {"timestamp": f"2026-01-01T00:00:00Z{text}"},
                    {"discovery_type": text},
                ):
                    await nats.publish(("discoveries.insights", payload(number, **changes)))
                await nats.publish(("discoveries.insights", payload(number, content=f"marker {number}")))
                while f"marker {number}" not in (await client.next()).data:
                    pass
        assert {event.event for event in client.events} == {"connected", "discovery"}
        for event in client.events:
            json.loads(event.data)
            assert event.id.rsplit("-", 1)[1].isdigit()
        assert b"\r" not in client.body
        assert client.body.isascii()
        for frame in client.body.split(b"\n\n"):
            assert [line.partition(b":")[0] for line in frame.split(b"\n") if line] in (
                [b"retry", b"event", b"data", b"id"],
                [b"event", b"data", b"id"],
                [],
            ), frame


async def test_nothing_in_a_request_breaks_out_of_its_log_line_or_its_answer(nats: NatsServer, tmp_path: Path) -> None:
    env = {"LOG_FORMAT": "json", "LOG_LEVEL": "debug"}
    async with attacked(tmp_path, nats, env=env) as server:
        for text in EVIL:
            escaped = quote(text)
            for query in (
                f"agent_id={escaped}",
                f"agent_id=a&type={escaped}",
                f"agent_id=a&subject=.{escaped}",
                f"agent_id=a&min_confidence={escaped}",
                f"agent_id=a&detail={escaped}",
                f"agent_id=a&agent_id={escaped}",
            ):
                status, headers, body = await request(server.port, "GET", f"/discoveries/stream?{query}")
                assert status == 400, query
                assert headers["content-type"] == "application/problem+json"
                json.loads(body)
            for path in (
                f"/{escaped}",
                f"/agents/{escaped}/discoveries/{escaped}",
                f"/page/{escaped}",
                f"/clients/{escaped}",
            ):
                status, headers, body = await request(server.port, "GET", path)
                assert status in {404, 405}, path
                assert "set-cookie" not in headers
                json.loads(body)
            harmless = "".join(character for character in text if character not in "\r\n\0").encode("utf-8", "ignore")
            header_lines = {"Last-Event-ID": harmless.decode("latin-1"), "X-Request-Id": harmless.decode("latin-1")}
            header_lines["User-Agent"] = header_lines["Last-Event-ID"]
            head = "".join(f"{name}: {value}\r\n" for name, value in header_lines.items()).encode("latin-1", "replace")
            answer = await exchange(
                server.port, b"GET /nothing HTTP/1.1\r\nConnection: close\r\n" + HOST + head + b"\r\n"
            )
            assert statuses(answer) in ([404], [400])
            query = f"&role={escaped}&agent={escaped}&last_event_id={escaped}"
            async with listen(server.port, "a", query=query) as client:
                connected = json.loads((await client.next("connected")).data)
                assert set(connected) == {"agent_id", "client_id", "resumed"}
                assert (await client.next("gap")).data == '{"reason":"restart","missed":null}'
        await eventually(
            lambda: server.output.count("client disconnected") == len(EVIL), f"all have left\n{server.output}"
        )
        ours = [line for line in server.output.splitlines() if not line.startswith("[20")]  # Hypercorn's own lines
        for line in ours:
            assert set(json.loads(line)) >= {"event", "level", "timestamp"}, line
        assert not any(json.loads(line)["event"] == "forged" for line in ours)


# -- HTTP/2 ----------------------------------------------------------------------------------------------------------


@cache
def authority() -> trustme.CA:
    return trustme.CA()


def certificate(directory: Path) -> tuple[str, str]:
    """A certificate for localhost and its key, in files."""
    directory.mkdir(exist_ok=True)
    issued = authority().issue_cert("localhost")
    chain, key = directory / "cert.pem", directory / "key.pem"
    issued.private_key_pem.write_to_path(key)
    issued.cert_chain_pems[0].write_to_path(chain)
    return str(chain), str(key)


@asynccontextmanager
async def attacked_over_tls(directory: Path, nats: NatsServer) -> AsyncIterator[Server]:
    """The real server with a certificate, as it is reached by `http2`; it must be well at the end."""
    chain, key = certificate(directory)
    options = ("--certfile", chain, "--keyfile", key)
    async with run_server(directory, nats_url=nats.url, options=options, wait=False) as server:

        async def is_well() -> bool:
            try:
                async with http2(server) as (protocol, stream):
                    return await answers(protocol, stream, "/health") == 200
            except (OSError, trio.BrokenResourceError):
                return False

        await eventually(is_well, "the server answers over HTTP/2", within=2 * WITHIN)
        yield server
        await eventually(is_well, "the server is well after the attack")
        assert "Traceback" not in server.output


Http2 = tuple[h2.connection.H2Connection, "trio.SSLStream[trio.SocketStream]"]


@asynccontextmanager
async def http2(server: Server) -> AsyncIterator[Http2]:
    context = ssl.create_default_context()
    authority().configure_trust(context)
    context.set_alpn_protocols(["h2"])
    socket_stream = await trio.open_tcp_stream("127.0.0.1", server.port)
    try:
        stream = trio.SSLStream(socket_stream, context, server_hostname="localhost", https_compatible=True)
        await stream.do_handshake()
        protocol = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        protocol.initiate_connection()
        await stream.send_all(protocol.data_to_send())
        yield protocol, stream
    finally:
        socket_stream.socket.close()


def fields(path: str) -> list[tuple[str, str]]:
    return [(":method", "GET"), (":scheme", "https"), (":authority", "localhost"), (":path", path)]


async def answers(protocol: h2.connection.H2Connection, stream: trio.SSLStream[trio.SocketStream], path: str) -> int:
    """The status of one request, or 0 where the connection closes instead."""
    number = protocol.get_next_available_stream_id()
    protocol.send_headers(number, fields(path), end_stream=True)
    await stream.send_all(protocol.data_to_send())
    with fail_within(WITHIN, f"an answer to {path}"):
        while data := await stream.receive_some(65536):
            for event in protocol.receive_data(data):
                if isinstance(event, h2.events.ResponseReceived) and event.stream_id == number:
                    return int({str(name): str(value) for name, value in event.headers or []}[":status"])
            await stream.send_all(protocol.data_to_send())
    return 0


async def rest_of(stream: trio.SSLStream[trio.SocketStream]) -> bytes:
    """What the server says until it closes."""
    heard = b""
    with fail_within(WITHIN, "the server closes the connection"):
        try:
            while data := await stream.receive_some(65536):
                heard += data
        except trio.BrokenResourceError:
            pass
    return heard


def frame(kind: int, flags: int, number: int, body: bytes) -> bytes:
    """A frame of HTTP/2, right or wrong."""
    return len(body).to_bytes(3) + bytes([kind, flags]) + number.to_bytes(4) + body


async def test_streams_that_are_reset_as_fast_as_they_are_opened_leave_nothing(
    nats: NatsServer, tmp_path: Path
) -> None:
    async with attacked_over_tls(tmp_path, nats) as server:
        async with http2(server) as (protocol, stream):
            try:
                for _ in range(2000):
                    number = protocol.get_next_available_stream_id()
                    protocol.send_headers(number, fields("/discoveries/stream?agent_id=a"), end_stream=True)
                    protocol.reset_stream(number)
                    await stream.send_all(protocol.data_to_send())
            except trio.BrokenResourceError:
                pass  # the server may have had enough

        async def nobody_is_left() -> bool:
            return server.output.count("client connected") == server.output.count("client disconnected")

        await eventually(nobody_is_left, "every stream has ended")


@pytest.mark.parametrize(
    ("name", "attack"),
    [
        # A head that never ends (CVE-2024-27316 and its kin).
        ("continuation", frame(1, 0x1, 1, b"\x82") + frame(9, 0, 1, b"\x00\x01a\x01b" * 100) * 500),
        # An entry of the table that is small on the wire and large in memory, many times over.
        (
            "header bomb",
            frame(1, 0x1, 1, b"\x40\x01a\x7f\xe1\x1e" + b"b" * 4000) + frame(9, 0x4, 1, b"\xbe" * 16_000),
        ),
        ("too long a frame", frame(0, 0, 1, b"a" * 16_385)),
        ("data for no stream", frame(0, 0, 1, b"a")),
        ("an even stream", frame(1, 0x5, 2, b"\x82")),
        ("a zero window update", frame(8, 0, 0, bytes(4))),
        ("windows beyond all bounds", frame(8, 0, 0, b"\x7f\xff\xff\xff") * 2),
        ("settings of a strange length", frame(4, 0, 0, b"a" * 5)),
        ("broken compression", frame(1, 0x5, 1, b"\xff\xff\xff\xff\xff\xff")),
    ],
)
async def test_frames_that_no_client_sends_end_their_connection_only(
    nats: NatsServer, tmp_path: Path, name: str, attack: bytes
) -> None:
    async with attacked_over_tls(tmp_path, nats) as server, http2(server) as (protocol, listener):
        assert await answers(protocol, listener, "/discoveries/stream?agent_id=a") == 200
        async with http2(server) as (_, stream):
            try:
                await stream.send_all(attack)
            except trio.BrokenResourceError:
                pass  # closed before it was sent
            await rest_of(stream)
        assert await answers(protocol, listener, "/livez") == 200, name


async def test_pings_and_settings_without_end_are_answered_at_the_pace_that_their_sender_reads(
    nats: NatsServer, tmp_path: Path
) -> None:
    async with attacked_over_tls(tmp_path, nats) as server, http2(server) as (_, stream):
        pid = max(family(server.process.pid), key=memory)
        before = memory(pid)
        flood = frame(6, 0, 0, bytes(8)) * 500 + frame(4, 0, 0, b"") * 500
        with trio.move_on_after(10):
            try:
                for _ in range(2000):
                    await stream.send_all(flood)
            except trio.BrokenResourceError:
                pass  # cut off after the write timeout
        assert memory(pid) - before < 64_000, "kilobytes"


def memory(pid: int) -> int:
    """Resident kilobytes."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1])


def test_every_attack_in_the_documentation_has_its_test() -> None:
    tests = Path(__file__).parent
    table = (tests.parent / "docs" / "security.md").read_text().partition("<!-- attacks")[2].partition("\n\n**")[0]
    rows = re.findall(r"\| `(test_\w+)`(?: in `tests/(\w+\.py)`)? \|$", table, re.MULTILINE)
    assert len(rows) == len(re.findall(r"^\| (?!attack \||---)", table, re.MULTILINE))
    for name, file in rows:
        assert f"def {name}(" in (tests / (file or Path(__file__).name)).read_text(), name
    named = {name for name, file in rows if not file}
    ours = set(re.findall(r"^async def (test_\w+)", Path(__file__).read_text(), re.MULTILINE))
    assert ours == named
