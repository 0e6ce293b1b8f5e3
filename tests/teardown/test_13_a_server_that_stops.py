"""13. A server that stops tells everybody when to come back, and has ended within five seconds, whatever they do.

The guarantee: on SIGTERM and SIGINT, for a reload and after `max_requests`, under `hypercorn` and `sse-trio serve`, each
client gets a `goodbye` with a `retry:` of its own, and its response its last chunk; who does not read is given two
seconds, and no more.

The trap: Hypercorn tells the application after the connections are gone, cuts them without a last chunk when its grace
period is over, and, with one stalled reader in a shield, does not even do that. And SIGTERM for a whole process group,
systemd's default, kills its workers without a word.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio
from support import BIN, WITHIN, NatsServer, Server, eventually, free_port, listen, payload, run_server
from teardown.house import COMMANDS, Crowd, command_of, crowd, is_full, note

BOUND = 5.0
"""Seconds, as the README says: two for who does not read, one in which Hypercorn gives up its connections, and the
process's own start and end."""

WINDOW = 4.0
BIND = "127.0.0.1"


def to_the_process(server: Server, number: int) -> None:
    server.process.send_signal(number)


def to_the_group(server: Server, number: int) -> None:
    os.killpg(server.process.pid, number)


def was_told(told: Crowd, reason: str = "shutdown") -> None:
    """Every healthy client was told when to come back, each something else, and its response ended properly."""
    retries = []
    for stream in told.healthy:
        assert stream.ended, f"no last chunk: {stream.body[-300:]!r}"
        assert stream.events[-1].event == "goodbye"
        assert f'"{reason}"' in stream.events[-1].data
        assert stream.decoder.retry is not None
        assert 1000 <= stream.decoder.retry <= 1000 + WINDOW * 1000
        retries.append(stream.decoder.retry)
    assert len(set(retries)) > len(retries) / 2, f"all at once: {retries}"


async def flood(nats: NatsServer, told: Crowd) -> None:
    """More than the kernels hold, until those who have stopped take no more, whichever worker they are at."""
    pieces = [("discoveries.insights", payload(n, content=f"{n} ".ljust(8000, "x"))) for n in range(100)]

    async def take_no_more() -> bool:
        await nats.publish(*pieces)
        return all(map(is_full, told.stalled))

    await eventually(take_no_more, "the stalled ones take no more")


@asynccontextmanager
async def started(
    command: list[str], port: int, nats: NatsServer, directory: Path, **env: str
) -> AsyncIterator[Server]:
    """A server whose write timeout is no help: who has stopped reading is waited for a minute, if anybody waits."""
    environment = {"SSE_DRAIN_WINDOW": str(WINDOW), "SSE_WRITE_TIMEOUT": "60", "NATS_DURABLE": "off"} | env
    run = run_server(
        directory, nats_url=nats.url, port=port, command=tuple(command), env=environment, start_new_session=True
    )
    async with run as server:
        await eventually(server.is_live, "the feed is live")
        yield server


async def stop_with(
    command: list[str],
    send: Callable[[Server, int], None],
    number: int,
    healthy: int,
    stalled: int,
    nats: NatsServer,
    directory: Path,
) -> tuple[float, int]:
    """Seconds until the server has ended, and its exit code."""
    port = int(command[command.index("--bind") + 1].rpartition(":")[2])
    async with started(command, port, nats, directory) as server:
        async with crowd(port, healthy, stalled) as told:
            await flood(nats, told)
            began = trio.current_time()
            send(server, number)
            code = await server.exited()
            seconds = trio.current_time() - began
        was_told(told)
    return seconds, code


WAYS = [
    ("hypercorn", (), to_the_process),
    ("hypercorn", (), to_the_group),
    ("hypercorn", ("--workers", "2"), to_the_group),
    ("sse-trio serve", (), to_the_process),
    ("sse-trio serve", (), to_the_group),
    ("sse-trio serve", ("--workers", "2"), to_the_group),
]


@pytest.mark.parametrize(("name", "options", "send"), WAYS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_on_a_signal_everybody_is_told_and_the_server_ends_in_time(
    name: str,
    options: tuple[str, ...],
    send: Callable[[Server, int], None],
    number: signal.Signals,
    core_nats: NatsServer,
    tmp_path: Path,
) -> None:
    command = command_of(name, f"{BIND}:{free_port()}", options)
    seconds, code = await stop_with(command, send, number, 20, 4, core_nats, tmp_path)
    whom = "the process" if send is to_the_process else "the group"
    note(f"{number.name} to {whom}, 20 streams and 4 stalled", seconds, BOUND, " ".join((name, *options)))
    assert code == 0


@pytest.mark.parametrize("name", COMMANDS)
async def test_with_a_thousand_streams_of_which_fifty_have_stopped_reading_it_is_the_same(
    name: str, core_nats: NatsServer, tmp_path: Path
) -> None:
    command = command_of(name, f"{BIND}:{free_port()}")
    seconds, code = await stop_with(command, to_the_group, signal.SIGTERM, 950, 50, core_nats, tmp_path)
    note("SIGTERM to the group, 950 streams and 50 stalled", seconds, BOUND, name)
    assert code == 0


PLAIN = """
import trio
from quart_trio import QuartTrio

app = QuartTrio(__name__)

@app.get("/livez")
async def livez():
    return "yes"

@app.get("/discoveries/stream")
async def stream():
    async def events():
        yield b"event: connected\\ndata: {}\\n\\n"
        while True:
            yield b"event: discovery\\ndata: " + b"x" * 8000 + b"\\n\\n"
            await trio.sleep(0.001)

    response = await app.make_response((events(), {"Content-Type": "text/event-stream"}))
    response.timeout = None
    return response
"""
"""Server-Sent Events as one would write them with Quart-Trio."""


async def test_without_all_this_one_reader_who_has_stopped_keeps_a_server_alive_until_that_one_leaves(
    core_nats: NatsServer, tmp_path: Path
) -> None:
    """What the others are worth: a plain Quart-Trio application does not pass them."""
    (tmp_path / "plain.py").write_text(PLAIN)
    port = free_port()
    command = (str(BIN / "hypercorn"), "plain:app", "--worker-class", "trio", "--bind", f"{BIND}:{port}")
    # Not waited for with a request: to `Connection: close` it does not listen either (10).
    run = run_server(
        tmp_path,
        nats_url=core_nats.url,
        port=port,
        command=(*command, "--graceful-timeout", "1"),
        env={"PYTHONPATH": str(tmp_path)},
        wait=False,
    )
    async with run as server:
        await eventually(lambda: "Running on" in server.output, "it serves")
        async with listen(port, rcvbuf=4096) as stalled:
            await stalled.next("connected")
            await eventually(lambda: is_full(stalled), "it takes no more")
            server.process.terminate()
            with trio.move_on_after(BOUND) as scope:
                await server.exited()
            assert scope.cancelled_caught, "it has ended: Hypercorn has learned to"
        await server.exited()


async def worker_of(server: Server) -> Path:
    """The process that serves, in /proc."""
    _, answer = await server.get("/clients")
    return Path("/proc", answer["instance"].rsplit("-", 2)[1])


async def has_gone(worker: Path, began: float) -> float:
    """Wait until that worker has ended; the seconds since `began`."""
    await eventually(lambda: not worker.exists(), "the worker has ended")
    return trio.current_time() - began


async def next_one_serves(server: Server, worker: Path) -> None:
    async def another() -> bool:
        try:
            return await worker_of(server) != worker
        except OSError:
            return False  # between two workers

    await eventually(another, "the next worker serves", 2 * WITHIN)


async def test_a_reload_tells_everybody_and_the_next_worker_serves(core_nats: NatsServer, tmp_path: Path) -> None:
    module = tmp_path / "reloaded.py"
    module.write_text("from sse_trio.app import app\n")
    port = free_port()
    command = [str(BIN / "hypercorn"), "reloaded:app", "--worker-class", "trio", "-b", f"{BIND}:{port}", "--reload"]
    path = os.pathsep.join([str(tmp_path), os.getcwd()])
    async with started(command, port, core_nats, tmp_path, PYTHONPATH=path) as server:
        worker = await worker_of(server)
        async with crowd(port, 10, 2) as told:
            await flood(core_nats, told)
            began = trio.current_time()
            os.utime(module)
            seconds = await has_gone(worker, began)
        note("--reload, 10 streams and 2 stalled (Hypercorn looks once a second)", seconds, 1 + BOUND, "hypercorn")
        was_told(told)
        await next_one_serves(server, worker)


async def test_after_max_requests_everybody_is_told_and_the_next_worker_serves(
    core_nats: NatsServer, tmp_path: Path
) -> None:
    port = free_port()
    command = command_of("hypercorn", f"{BIND}:{port}", ("--max-requests", "40"))
    async with started(command, port, core_nats, tmp_path) as server:
        worker = await worker_of(server)
        async with crowd(port, 10, 2) as told:
            await flood(core_nats, told)

            async def keep_asking() -> None:
                while True:
                    with suppress(OSError):  # between two workers
                        await server.get("/livez")

            async with trio.open_nursery() as nursery:
                nursery.start_soon(keep_asking)
                await eventually(lambda: told.healthy[0].ended, "the worker has served its requests")
                began = trio.current_time()
                nursery.cancel_scope.cancel()
            seconds = await has_gone(worker, began)
        note("max_requests, 10 streams and 2 stalled, from the first goodbye", seconds, BOUND, "hypercorn")
        was_told(told)
        await next_one_serves(server, worker)


async def test_before_it_drains_health_says_no_for_as_long_as_it_was_told_to(
    core_nats: NatsServer, tmp_path: Path
) -> None:
    delay = 2.0
    port = free_port()
    async with run_server(
        tmp_path,
        nats_url=core_nats.url,
        port=port,
        command=tuple(command_of("sse-trio serve", f"{BIND}:{port}")),
        env={"SSE_DRAIN_DELAY": str(delay), "SSE_DRAIN_WINDOW": str(WINDOW)},
    ) as server:
        await eventually(server.is_live, "the feed is live")
        async with crowd(port, 5) as told:
            began = trio.current_time()
            server.process.send_signal(signal.SIGTERM)

            async def says_no() -> bool:
                return (await server.health())[0] == 503

            await eventually(says_no, "/health says no")
            async with listen(port, "late") as late:
                await late.next("connected")  # a balancer has not looked yet: who comes is served
                await late.read_to_end()
                assert late.events[-1].event == "goodbye"
            assert await server.exited() == 0
        seconds = trio.current_time() - began
        assert seconds >= delay
        note(f"SIGTERM with SSE_DRAIN_DELAY={delay:g}", seconds, delay + BOUND, "sse-trio serve")
        was_told(told)


async def test_lifetimes_end_cleanly_and_spread(core_nats: NatsServer, tmp_path: Path) -> None:
    lifetime = 5.0
    port = free_port()
    ends: list[float] = []
    async with run_server(
        tmp_path, nats_url=core_nats.url, port=port, env={"SSE_MAX_LIFETIME": str(lifetime), "LOG_FORMAT": "json"}
    ):

        async def live(number: int) -> None:
            async with listen(port, f"agent-{number}") as stream:
                await stream.next("connected")
                began = trio.current_time()
                await stream.read_to_end()
                ends.append(trio.current_time() - began)
                assert stream.ended
                assert stream.events[-1].data == '{"reason":"lifetime"}'

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(live, number)
    note("SSE_MAX_LIFETIME=5, the first of 20 streams", min(ends), lifetime)
    note("SSE_MAX_LIFETIME=5, the last of 20 streams", max(ends), lifetime)
    assert min(ends) >= 0.8 * lifetime - 0.5
    assert max(ends) - min(ends) > 0.1 * lifetime, "they are spread"
