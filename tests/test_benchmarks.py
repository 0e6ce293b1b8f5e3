"""The benchmark's instruments: a load client whose books are wrong would make every number of it worthless.

The first tests let a scripted server lose, double and swap events, and look whether the books say so; the others put
real servers under a small load, and look whether the books balance.
"""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from support import NatsServer, fail_within, run_server

from benchmarks.contenders import CONTENDERS
from benchmarks.needs import Tools, prepare
from benchmarks.report import document
from benchmarks.runs import Scenario, run
from benchmarks.turns import LongestTurn, longest, reset

WITHIN = 30.0


@pytest.fixture(scope="session")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Tools:
    return prepare(tmp_path_factory.mktemp("benchmark"), install=False)


async def drive(load: Path, *options: str | float) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the load client says when its clients are connected, and when it is done."""
    with fail_within(WITHIN, "the load client is done"):
        done = await trio.run_process([load, *map(str, options)], stdin=b"", capture_stdout=True)
    connected, books = map(json.loads, done.stdout.splitlines())
    return connected, books


def report(scenario: Scenario, sample: dict[str, Any]) -> str:
    """What is written about one run."""
    results = {
        "samples": [{"round": 0} | sample],
        "scenarios": {scenario.key: scenario.title},
        "machine": {"processor": "p", "cores": "2", "memory": "m", "kernel": "k"},
        "versions": {"python": "3"},
        "missing": {"nginx with nchan": "nchan is left out"},
        "started": "now",
        "seconds": 1,
        "rounds": 1,
    }
    return document(results)


def event(number: int) -> bytes:
    return b'event: discovery\ndata: {"uri":"discovery://agents/bench-%d-1/discoveries/x"}\nid: a-1\n\n' % number


class ScriptedServer:
    """Answers the request of client n with the n-th body, in chunks of `step` bytes, and keeps the stream open."""

    def __init__(self, bodies: list[bytes], step: int) -> None:
        self.bodies = bodies
        self.step = step

    async def serve(self, stream: trio.SocketStream) -> None:
        request = b""
        while b"\r\n\r\n" not in request:
            request += await stream.receive_some()
        body = self.bodies[int(request.split()[1].rpartition(b"-")[2])]
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        pieces = [body[at : at + self.step] for at in range(0, len(body), self.step)]
        await stream.send_all(head + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces))
        await stream.receive_some()


@pytest.mark.parametrize("step", [1, 7, 1000])
async def test_the_books_tell_lost_doubled_and_swapped_events_apart(tools: Tools, step: int) -> None:
    hello = b"retry: 3\nevent: connected\ndata: {}\n\n"
    gap = b'event: gap\ndata: {"reason":"overflow","missed":2}\nid: a-1\n\n'
    scripted = ScriptedServer(
        [
            hello + event(0) + event(1) + event(2) + event(3),
            hello + event(0) + event(2) + event(1) + event(1) + event(3),
            hello + event(0) + gap + event(3) + event(99) + b": keep-alive\n" + event(2)[:-1],
        ],
        step,
    )
    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, scripted.serve, 0, host="127.0.0.1"))
        port = listener.socket.getsockname()[1]
        connected, books = await drive(
            tools.load,
            *("--port", port, "--path", "/client-{n}", "--clients", 3, "--ready", "connected"),
            *("--rate", 40, "--seconds", 0.1, "--silence", 0.1),
        )
        nursery.cancel_scope.cancel("the load client has gone")
    assert connected["ready"] == 3
    assert connected["failures"] == {}
    expected = {"delivered": 10, "lost": 2, "doubled": 1, "out_of_order": 1, "foreign": 1, "gaps": 1, "missed": 2}
    assert {name: books[name] for name in expected} == expected
    assert (books["least"], books["most"], books["comments"]) == (2, 4, 1)


async def test_a_server_that_refuses_is_counted_by_kind(tools: Tools) -> None:
    async def refuse(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n")

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, refuse, 0, host="127.0.0.1"))
        port = listener.socket.getsockname()[1]
        connected, _ = await drive(tools.load, "--port", port, "--clients", 4, "--seconds", 0, "--silence", 0)
        nursery.cancel_scope.cancel("the load client has gone")
    assert connected["ready"] == 0
    assert connected["failures"] == {"status": 4}
    assert connected["last_bad_status"] == 503


@pytest.mark.parametrize("speak", [(), ("--http2",), ("--http2", "--streams", 5)], ids=str)
async def test_the_books_of_a_real_server_balance(
    tools: Tools, core_nats: NatsServer, tmp_path: Path, speak: tuple[str | int, ...]
) -> None:
    async with run_server(tmp_path, nats_url=core_nats.url) as server:
        connected, books = await drive(
            tools.load,
            *("--port", server.port, "--path", "/discoveries/stream?agent_id=load-{n}", *speak),
            *("--clients", 20, "--ready", "connected", "--source", "nats", "--source-port", core_nats.port),
            *("--rate", 200, "--seconds", 0.5, "--probe", "/health"),
        )
    assert connected["ready"] == 20
    assert books["sent"] == 100
    assert books["delivered"] == 2000
    assert [books[name] for name in ("lost", "doubled", "out_of_order", "foreign", "ended")] == [0] * 5
    assert books["probe_failed"] == 0
    assert books["latency_ms"]["count"] == 2000


async def test_a_turn_of_the_loop_that_takes_long_is_seen_from_another_process(tmp_path: Path) -> None:
    path = tmp_path / "turns"
    reset(path)
    instrument = LongestTurn(path)
    trio.lowlevel.add_instrument(instrument)
    await trio.lowlevel.checkpoint()
    before = longest(path)
    time.sleep(0.05)  # what is to be measured: a task that does not let others run
    assert longest(path) == before  # it is not over
    await trio.lowlevel.checkpoint()
    trio.lowlevel.remove_instrument(instrument)
    assert 0.05 <= longest(path) < WITHIN
    reset(path)
    assert longest(path) == 0


async def test_what_a_server_does_meanwhile_is_in_the_row(tools: Tools, tmp_path: Path) -> None:
    scenario = Scenario("burst", "a small burst", 5, 2_000, 0.5, ("sse-trio",), probe_ms=5)
    with fail_within(WITHIN, "the run is over"):
        sample = await trio.to_thread.run_sync(run, scenario, CONTENDERS["sse-trio"], tools, tmp_path / "run")
    assert sample["share"] == 1
    assert sample["probe_failed"] == 0
    assert 0 < sample["longest_turn_ms"] < WITHIN * 1e3
    assert "Longest turn of the event loop, from inside" in report(scenario, sample)


async def test_what_others_wait_while_a_crowd_connects_is_in_the_row(tools: Tools, tmp_path: Path) -> None:
    scenario = Scenario("reconnect", "a small crowd at once", 50, 0, 0, ("sse-trio",), at_once=0, probe_ms=5)
    with fail_within(WITHIN, "the run is over"):
        sample = await trio.to_thread.run_sync(run, scenario, CONTENDERS["sse-trio"], tools, tmp_path / "run")
    assert sample["ready"] == 50
    assert sample["probe_failed"] == 0
    assert 1 <= sample["probe_ms"]["count"] < sample["connect_seconds"] / 0.005 + 2, "asked until all were there"
    assert 0 < sample["longest_turn_ms"] < WITHIN * 1e3
    assert "`/health` meanwhile p99" in report(scenario, sample)


def test_a_probe_that_was_not_answered_is_told_and_reaches_no_aim() -> None:
    scenario = Scenario("burst", "a burst", 5, 2_000, 0.5, ("sse-trio",), probe_ms=5)
    sample = {"scenario": "burst", "contender": "sse-trio", "clients": 5, "share": 1.0}
    answered = {"probe_ms": {"count": 9, "p99": 3.0, "max": 4.0}}
    none = {"probe_ms": {"count": 0, "p99": 0.0, "max": 0.0}}
    text = report(scenario, sample | answered | {"probe_failed": 0})
    assert "`/health` meanwhile p99 3.00 ms, longest 4.00 ms, 0 failed." in text
    assert "| longest wait of `/health` ≤ 50 ms | 4.00 ms | reached |" in text
    assert "**missed**" in aim(report(scenario, sample | answered | {"probe_failed": 1}))
    text = report(scenario, sample | none | {"probe_failed": 2})
    assert "`/health` meanwhile all 2 failed." in text
    assert "**missed**" in aim(text)


def aim(text: str) -> str:
    (line,) = (line for line in text.splitlines() if "longest wait of `/health`" in line)
    return line


async def test_a_run_becomes_a_row_of_the_report(tools: Tools, tmp_path: Path) -> None:
    scenario = Scenario("fanout-20x50", "20 clients, 50 events/s", 20, 50, 0.5, ("floor",))
    with fail_within(WITHIN, "the run is over"):
        sample = await trio.to_thread.run_sync(run, scenario, CONTENDERS["floor"], tools, tmp_path / "run")
    assert sample["share"] == 1
    assert sample["wrong"] == 0
    text = report(scenario, sample)
    assert "| bare send() loop in C | all |" in text
    assert "Left out: nginx with nchan" in text
