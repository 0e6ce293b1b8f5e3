"""The server as a process of our own: what it says, how it ends, and what is left of it. Nothing may be.

Each test starts the real command, with a directory for temporary files of its own, so that what is left can be seen.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
import trustme
from hypercorn.utils import LifespanFailureError
from support import BIN, WITHIN, NatsServer, Server, eventually, fail_within, free_port, listen, run_server

from sse_trio.application import create_app
from sse_trio.cli import causes
from sse_trio.nats_feed import FeedError
from sse_trio.server import (
    ECHO,
    StartError,
    bind_socket,
    listening,
    run_app,
    run_workers,
    shared_metrics,
    stop_on_signals,
    stop_signals,
)
from sse_trio.settings import Settings

NOWHERE = "nats://127.0.0.1:1"
"""Where no NATS is."""


@asynccontextmanager
async def serve(
    directory: Path, nats_url: str, *options: str, env: dict[str, str] | None = None, **more: Any
) -> AsyncIterator[Server]:
    """`sse-trio serve`, with its temporary files under `directory`."""
    port = free_port()
    command = (str(BIN / "sse-trio"), "serve", "--bind", f"127.0.0.1:{port}", *options)
    scratch = directory / "tmp"
    scratch.mkdir(exist_ok=True)
    environment = {"TMPDIR": str(scratch), "LOG_FORMAT": "json"} | (env or {})
    async with run_server(directory, nats_url=nats_url, command=command, port=port, env=environment, **more) as server:
        yield server
    assert list(scratch.iterdir()) == [], "no temporary file is left"


def children(pid: int) -> list[int]:
    """The processes that a process has started and that live."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def bound() -> Iterator[socket.socket]:
    """A listening socket."""
    with bind_socket("127.0.0.1:0") as opened:
        yield opened


# One process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_it_says_where_it_serves_and_ends_with_zero_when_it_is_asked_to(
    nats: NatsServer, tmp_path: Path, number: signal.Signals
) -> None:
    async with serve(tmp_path, nats.url) as server:
        assert f"sse-trio serves http://127.0.0.1:{server.port}\n" in server.output
        async with listen(server.port) as stream:
            await stream.next("connected")
            server.process.send_signal(number)
            assert (await stream.next("goodbye")).data == '{"reason":"shutdown"}'
            await stream.read_to_end()
            assert stream.ended
            assert await server.exited() == 0


async def test_health_says_no_for_the_drain_delay_while_everything_else_goes_on(
    nats: NatsServer, tmp_path: Path
) -> None:
    async with serve(tmp_path, nats.url, env={"SSE_DRAIN_DELAY": "300"}) as server:
        await eventually(server.is_live, "the feed is live")
        async with listen(server.port) as stream:
            await stream.next("connected")
            server.process.terminate()

            async def says_no() -> bool:
                status, body = await server.health()
                return status == 503 and body["reason"] == "draining"

            await eventually(says_no, "/health says that the server is draining")
            await nats.publish(("discoveries.x", b"{}"))
            async with listen(server.port) as late:
                await late.next("connected")
            assert "goodbye" not in [event.event for event in stream.events]
            await ask_again(server)  # then it does not wait for the five minutes
            await stream.next("goodbye")
        assert await server.exited() == 0


async def ask_again(server: Server) -> None:
    """Send one more signal, as late as one that is not an echo of the first."""
    earliest = trio.current_time() + 2 * ECHO
    await eventually(lambda: trio.current_time() > earliest, "time passes")
    server.process.terminate()


async def test_a_signal_during_start_up_ends_it_at_once(nats: NatsServer, tmp_path: Path) -> None:
    nats.freeze()
    async with serve(tmp_path, nats.url, wait=False) as server:
        await eventually(lambda: _can_connect(server.port), "the socket is there, though nobody answers yet")

        async def asked() -> bool:
            # Before the command is so far as to listen to signals, one would end it without a word. (SIGHUP is the
            # last that it begins to listen to, and nobody else does.)
            status = Path(f"/proc/{server.process.pid}/status").read_text()
            if int(status.partition("SigCgt:")[2].split()[0], 16) & 1 << (signal.SIGHUP - 1):
                server.process.terminate()
                return True
            return False

        await eventually(asked, "it listens to signals")
        assert await server.exited() == 0
        assert "serves" not in server.output


async def _can_connect(port: int) -> bool:
    try:
        stream = await trio.open_tcp_stream("127.0.0.1", port)
    except OSError:
        return False
    await stream.aclose()
    return True


async def test_required_durability_that_cannot_be_had_is_one_line_and_the_exit_code_one(
    core_nats: NatsServer, tmp_path: Path
) -> None:
    async with serve(tmp_path, core_nats.url, env={"NATS_DURABLE": "require"}, wait=False) as server:
        assert await server.exited() == 1
        last = server.output.splitlines()[-1]
        assert last.startswith("sse-trio: NATS_DURABLE=require, and there is no JetStream")
        assert "Traceback" not in server.output


BUG = """
import sys, trio
from sse_trio import cli, nats_feed

async def run(self):
    self.first_attempt.set()
    await trio.sleep(0.2)
    raise RuntimeError("a bug in the feed")

nats_feed.NatsFeed.run = run
cli.main(sys.argv[1:])
"""


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_bug_in_the_feed_ends_it_with_one_and_the_bugs_own_traceback(tmp_path: Path, workers: str) -> None:
    # A worker is the same program, started by its name; the bug gets there as a module that Python loads at its start.
    (tmp_path / "buggy").mkdir()
    (tmp_path / "buggy" / "buggy.py").write_text(BUG.replace("cli.main(sys.argv[1:])\n", ""))
    program = "import buggy, sys\nfrom sse_trio.cli import main\nmain(sys.argv[1:])"
    if workers == "2":
        (tmp_path / "buggy" / "sitecustomize.py").write_text("import buggy\n")
    port = free_port()
    command = (sys.executable, "-c", program, "serve", "--bind", f"127.0.0.1:{port}", "--workers", workers)
    env = {"PYTHONPATH": str(tmp_path / "buggy"), "COVERAGE_PROCESS_CONFIG": "", "COVERAGE_PROCESS_START": ""}
    async with run_server(tmp_path, nats_url=NOWHERE, command=command, port=port, env=env, wait=False) as server:
        assert await server.exited() == 1
        assert 'raise RuntimeError("a bug in the feed")' in server.output
        assert ("a worker ended by itself" in server.output) == (workers == "2")


async def test_variables_that_are_no_settings_are_named_in_the_log_once(tmp_path: Path) -> None:
    wrong = {"SSE_BUFER": "10", "SSE_HISTROY": "0"}
    async with run_server(tmp_path, nats_url=NOWHERE, env=wrong) as server:
        (line,) = [line for line in server.output.splitlines() if "there are no such settings" in line]
        assert json.loads(line)["names"] == ["SSE_BUFER", "SSE_HISTROY"]


async def test_a_taken_port_is_one_line_that_names_it(tmp_path: Path, bound: socket.socket) -> None:
    port = bound.getsockname()[1]
    taken = f"127.0.0.1:{port}"
    done = await trio.run_process(
        [str(BIN / "sse-trio"), "serve", "--bind", taken], capture_stdout=True, capture_stderr=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, b"")
    said = f"cannot listen on {taken}: address already in use; choose another: --bind 127.0.0.1:{port + 1}"
    assert done.stderr.decode() == f"sse-trio: {said}\n"


async def test_with_a_certificate_it_serves_tls(nats: NatsServer, tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "chain.pem")
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    options = ("--certfile", str(tmp_path / "chain.pem"), "--keyfile", str(tmp_path / "key.pem"))
    async with serve(tmp_path, nats.url, *options, wait=False) as server, httpx.AsyncClient(verify=trust) as client:

        async def serves() -> bool:
            assert server.process.poll() is None, server.output
            return f"sse-trio serves https://127.0.0.1:{server.port}" in server.output

        await eventually(serves, "it says that it serves")
        answer = await client.get(f"https://localhost:{server.port}/livez")
        assert answer.status_code == 200


# In our own process


async def test_a_certificate_that_cannot_be_used_is_named(bound: socket.socket, tmp_path: Path) -> None:
    for name in ("chain.pem", "key.pem"):
        (tmp_path / name).write_text("not a certificate")
    with pytest.raises(StartError, match=r"^cannot use .*chain\.pem with .*key\.pem: "):
        await run_app(
            create_app(Settings()),
            bound,
            trio.Event(),
            certfile=str(tmp_path / "chain.pem"),
            keyfile=str(tmp_path / "key.pem"),
        )
    assert bound.fileno() == -1


async def test_a_failed_start_up_tells_its_cause_and_closes_the_socket(
    core_nats: NatsServer, bound: socket.socket
) -> None:
    app = create_app(Settings(nats_url=(core_nats.url,), nats_durable="require"))
    with (
        fail_within(WITHIN, "start-up fails"),
        pytest.RaisesGroup(LifespanFailureError, flatten_subgroups=True) as caught,
    ):
        await run_app(app, bound, trio.Event())
    assert [type(cause) for cause in causes(caught.value)] == [FeedError]
    assert bound.fileno() == -1


async def test_cancelling_it_leaves_no_task_and_no_socket(nats: NatsServer, bound: socket.socket) -> None:
    app = create_app(Settings(nats_url=(nats.url,)))
    port = bound.getsockname()[1]
    before = trio.lowlevel.current_statistics().tasks_living
    with fail_within(WITHIN, "it has been cancelled"):
        async with trio.open_nursery() as nursery:
            url = await nursery.start(run_app, app, bound, trio.Event())
            assert url == f"http://127.0.0.1:{port}"
            async with listen(port) as stream:
                await stream.next("connected")
                nursery.cancel_scope.cancel()
    assert trio.lowlevel.current_statistics().tasks_living == before
    assert not await _can_connect(port)


async def test_a_second_signal_cuts_the_delay_short(autojump_clock: trio.testing.MockClock) -> None:
    app = create_app(Settings())
    async with stop_on_signals(app, delay=30) as stop:
        signal.raise_signal(signal.SIGTERM)
        await trio.sleep(ECHO + 1)
        assert app.services.draining
        assert not stop.is_set()
        signal.raise_signal(signal.SIGINT)
        await stop.wait()
        assert trio.current_time() == ECHO + 1


async def test_a_signal_that_comes_twice_at_once_counts_once(autojump_clock: trio.testing.MockClock) -> None:
    async with stop_on_signals(create_app(Settings()), delay=30) as stop:
        signal.raise_signal(signal.SIGTERM)
        await trio.sleep(ECHO / 2)
        signal.raise_signal(signal.SIGTERM)
        await stop.wait()
        assert trio.current_time() == 30
        # And what comes later does not end the process before it has cleaned up.
        signal.raise_signal(signal.SIGTERM)
        await trio.testing.wait_all_tasks_blocked()


def test_a_closed_terminal_ends_it_unless_nohup_was_asked_for() -> None:
    assert signal.SIGHUP in stop_signals()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in stop_signals()
    finally:
        signal.signal(signal.SIGHUP, before)


# Where it listens


@pytest.mark.parametrize("bind", ["127.0.0.1:0", "0", ":0", "[::1]:0", "localhost:0"])
def test_an_address_can_be_said_in_the_usual_ways(bind: str) -> None:
    with bind_socket(bind) as opened:
        host, port = opened.getsockname()[:2]
        assert host in {"127.0.0.1", "::1"}
        assert port > 0


@pytest.mark.parametrize(
    ("bind", "reason"),
    [
        ("localhost", "expected host:port, for example 127.0.0.1:3000"),
        ("127.0.0.1:70000", "expected host:port"),
        ("127.0.0.1:-1", "expected host:port"),
        ("192.0.2.1:80", "cannot assign"),
        ("fd://x", "expected host:port"),
        ("fd://9999", "bad file descriptor"),
        ("unix:/nowhere/at/all", "no such file"),
        ("", "expected host:port"),
    ],
)
def test_an_address_that_cannot_be_had_is_named_with_the_reason(bind: str, reason: str) -> None:
    with pytest.raises(StartError) as caught:
        bind_socket(bind)
    assert str(caught.value).startswith(f"cannot listen on {bind}: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_unix_socket_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with listening(f"unix:{path}"):
        assert path.is_socket()
    assert not path.exists()


def test_a_unix_socket_that_a_killed_server_left_is_no_obstacle_but_another_file_is(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    bind_socket(f"unix:{path}").close()
    assert path.is_socket()
    with listening(f"unix:{path}"):
        pass
    path.write_text("precious")
    with pytest.raises(StartError), listening(f"unix:{path}"):
        pass
    assert path.read_text() == "precious"


async def test_a_unix_socket_serves(nats: NatsServer, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    stop = trio.Event()
    with listening(f"unix:{path}") as opened, fail_within(WITHIN, "it serves and ends"):
        async with trio.open_nursery() as nursery:
            url = await nursery.start(run_app, create_app(Settings(nats_url=(nats.url,))), opened, stop)
            assert url == f"unix:{path}"
            stream = await trio.open_unix_socket(path)
            async with stream:
                await stream.send_all(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert (await stream.receive_some()).startswith(b"HTTP/1.1 200")
            stop.set()


# Several workers


async def test_several_workers_share_a_socket_and_their_counts_and_end_together(
    nats: NatsServer, tmp_path: Path
) -> None:
    async with serve(tmp_path, nats.url, "--workers", "2") as server:
        await eventually(lambda: server.output.count("sse-trio serves") == 2, "both workers serve")
        workers = children(server.process.pid)
        assert len(workers) == 2
        async with trio.open_nursery() as nursery:
            streams = []

            async def hear_the_goodbye(*, task_status: trio.TaskStatus[None]) -> None:
                async with listen(server.port) as stream:
                    await stream.next("connected")
                    task_status.started()
                    streams.append(await stream.next("goodbye"))

            for _ in range(8):
                await nursery.start(hear_the_goodbye)

            async def counts_all() -> bool:
                return b"\nsse_trio_clients 8.0\n" in (await server.get("/metrics"))[1]

            await eventually(counts_all, "whichever worker answers counts the streams of both")
            server.process.terminate()
        assert len(streams) == 8
        assert await server.exited() == 0
        assert not any(is_alive(worker) for worker in workers)


def test_workers_count_where_they_are_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    with shared_metrics() as (environment, locks):
        assert environment["PROMETHEUS_MULTIPROC_DIR"] == str(tmp_path)
        assert locks == []
    assert tmp_path.exists()


async def test_when_one_worker_dies_the_others_drain_and_the_exit_code_says_so(
    nats: NatsServer, tmp_path: Path
) -> None:
    async with serve(tmp_path, nats.url, "--workers", "2") as server:
        await eventually(lambda: server.output.count("sse-trio serves") == 2, "both workers serve")
        first, second = children(server.process.pid)
        os.kill(first, signal.SIGKILL)
        assert await server.exited() == 1
        assert "a worker ended by itself" in server.output
        assert not is_alive(second)


async def test_workers_drain_when_the_process_that_started_them_is_killed(nats: NatsServer, tmp_path: Path) -> None:
    scratch = tmp_path / "tmp"
    async with serve(tmp_path, nats.url, "--workers", "2") as server:
        await eventually(lambda: server.output.count("sse-trio serves") == 2, "both workers serve")
        workers = children(server.process.pid)
        async with listen(server.port) as stream:
            await stream.next("connected")
            server.process.kill()
            assert (await stream.next("goodbye")).data == '{"reason":"shutdown"}'
        await eventually(lambda: not any(is_alive(worker) for worker in workers), "the workers end")
        assert [path.name.startswith("sse-trio-metrics-") for path in scratch.iterdir()] == [True]
        # The next one clears up behind it.
        async with serve(tmp_path, nats.url, "--workers", "2") as after:
            after.process.terminate()
            assert await after.exited() == 0


async def test_a_second_signal_cuts_the_workers_delay_short_too(nats: NatsServer, tmp_path: Path) -> None:
    async with serve(tmp_path, nats.url, "--workers", "2", env={"SSE_DRAIN_DELAY": "300"}) as server:
        await eventually(lambda: server.output.count("sse-trio serves") == 2, "both workers serve")
        server.process.terminate()
        await eventually(lambda: server.output.count("draining soon") == 2, "both workers say that they drain")
        await ask_again(server)
        assert await server.exited() == 0


async def test_a_worker_that_does_not_end_in_time_is_killed(
    nats: NatsServer, bound: socket.socket, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NATS_URL", nats.url)
    codes = []
    with fail_within(2 * WITHIN, "the frozen worker is gone"):
        async with trio.open_nursery() as nursery:

            async def run() -> None:
                codes.append(await run_workers(1, bound, [], 0.5))

            nursery.start_soon(run)
            said = ""

            async def serves() -> bool:
                nonlocal said
                said += capfd.readouterr().err
                return "sse-trio serves" in said

            await eventually(serves, "the worker serves")
            [worker] = children(os.getpid())[-1:]
            os.kill(worker, signal.SIGSTOP)
            signal.raise_signal(signal.SIGTERM)
    assert codes == [1]
    assert not is_alive(worker)
