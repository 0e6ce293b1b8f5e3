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
from collections.abc import Callable
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


async def flood(nats: NatsServer) -> None:
    """More than the kernels hold for who does not read."""
    await nats.publish(*(("discoveries.insights", payload(n, content=f"{n} ".ljust(8000, "x"))) for n in range(100)))


async def stop_with(
    name: str,
    send: Callable[[Server, int], None],
    number: int,
    healthy: int,
    stalled: int,
    nats: NatsServer,
    directory: Path,
) -> tuple[float, int]:
    """Seconds until the server has ended, and its exit code."""
    port = free_port()
    async with run_server(
        directory,
        nats_url=nats.url,
        port=port,
        command=tuple(command_of(name, f"{BIND}:{port}")),
        env={"SSE_DRAIN_WINDOW": str(WINDOW), "SSE_WRITE_TIMEOUT": "60", "NATS_DURABLE": "off"},
        start_new_session=True,
    ) as server:
        await eventually(server.is_live, "the feed is live")
        async with crowd(port, healthy, stalled) as told:
            await flood(nats)
            await eventually(lambda: all(map(is_full, told.stalled)), "the stalled ones take no more")
            began = trio.current_time()
            send(server, number)
            code = await server.exited()
            seconds = trio.current_time() - began
        was_told(told)
    return seconds, code


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("send", [to_the_process, to_the_group])
async def test_on_a_signal_everybody_is_told_and_the_server_ends_in_time(
    name: str, number: signal.Signals, send: Callable[[Server, int], None], core_nats: NatsServer, tmp_path: Path
) -> None:
    seconds, code = await stop_with(name, send, number, 20, 4, core_nats, tmp_path)
    whom = "the process" if send is to_the_process else "the group"
    note(f"{number.name} to {whom}, 20 streams and 4 stalled", seconds, BOUND, name)
    assert code == 0


@pytest.mark.parametrize("name", COMMANDS)
async def test_with_a_thousand_streams_of_which_fifty_have_stopped_reading_it_is_the_same(
    name: str, core_nats: NatsServer, tmp_path: Path
) -> None:
    seconds, code = await stop_with(name, to_the_group, signal.SIGTERM, 950, 50, core_nats, tmp_path)
    note("SIGTERM to the group, 950 streams and 50 stalled", seconds, BOUND, name)
    assert code == 0


async def test_a_reload_tells_everybody_and_the_next_worker_serves(core_nats: NatsServer, tmp_path: Path) -> None:
    module = tmp_path / "reloaded.py"
    module.write_text("from sse_trio.app import app\n")
    port = free_port()
    async with run_server(
        tmp_path,
        nats_url=core_nats.url,
        port=port,
        command=(str(BIN / "hypercorn"), "reloaded:app", "--worker-class", "trio", "-b", f"{BIND}:{port}", "--reload"),
        env={"SSE_DRAIN_WINDOW": str(WINDOW), "PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()])},
    ) as server:
        _, before = await server.get("/clients")
        async with crowd(port, 10) as told:
            began = trio.current_time()
            os.utime(module)
        note(
            "--reload, 10 streams (Hypercorn looks once a second)", trio.current_time() - began, 1 + BOUND, "hypercorn"
        )
        was_told(told)

        async def another_serves() -> bool:
            try:
                _, after = await server.get("/clients")
            except OSError:
                return False
            return bool(after["instance"] != before["instance"])

        await eventually(another_serves, "the next worker serves", 2 * WITHIN)


async def test_after_max_requests_everybody_is_told(core_nats: NatsServer, tmp_path: Path) -> None:
    port = free_port()
    async with run_server(
        tmp_path,
        nats_url=core_nats.url,
        port=port,
        command=tuple(command_of("hypercorn", f"{BIND}:{port}", ("--max-requests", "30"))),
        env={"SSE_DRAIN_WINDOW": str(WINDOW)},
    ) as server:
        async with crowd(port, 10) as told:

            async def has_ended() -> bool:
                if told.healthy[0].ended:
                    return True
                try:
                    await server.get("/livez")
                except OSError:
                    pass  # between two workers
                return False

            await eventually(has_ended, "the worker has served its requests")
            began = trio.current_time()
        note(
            "max_requests, 10 streams: from the first goodbye to the last",
            trio.current_time() - began,
            BOUND,
            "hypercorn",
        )
        was_told(told)


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
