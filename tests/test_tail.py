"""`sse-trio tail`: what a terminal and a pipe get to see, whatever the server and those who share may say."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import jwt
import pytest
import trio
from support import BIN, WITHIN, NatsServer, a_discovery, eventually, free_port, payload, run_server

from sse_trio.listener import Interruption
from sse_trio.sse import ServerSentEvent
from sse_trio.tail import remark, render, render_json, tail

SUBJECT = "discoveries.insights"
QUICK = {"SSE_RETRY": "50", "SSE_DRAIN_WINDOW": "0"}


def plain(text: str, **_: Any) -> str:
    return text


def marked(text: str, *, fg: str = "", **_: Any) -> str:
    return f"<{fg}>{text}"


def event(name: str, data: Any, id: str = "m-1") -> ServerSentEvent:
    return ServerSentEvent(name, data if isinstance(data, str) else json.dumps(data), id)


def discovery(**changes: Any) -> ServerSentEvent:
    shared = a_discovery(1, **changes)
    return event("discovery", {"params": {"uri": "discovery://x", "_meta": {"discovery": shared}}})


class Said:
    """Everything that a process writes, as it comes."""

    def __init__(self) -> None:
        self.text = ""

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    async def says(self, what: str) -> None:
        try:
            await eventually(lambda: what in self.text, what)
        except AssertionError:
            raise AssertionError(f"not said within {WITHIN:g} s: {what!r}; but {self.text!r}") from None


class Tail:
    """A running `sse-trio tail`, and what it has said."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.out = Said()
        self.err = Said()

    async def exited(self) -> int:
        await eventually(lambda: self.process.poll() is not None, f"tail ends; {self.err.text}")
        return self.process.returncode


@asynccontextmanager
async def tailing(
    *options: str, terminal: bool = False, env: dict[str, str] | None = None, stdout: int | None = None
) -> AsyncIterator[Tail]:
    """The command, writing into a pipe or, with `terminal`, to a terminal."""
    ours, theirs = pty.openpty() if terminal else os.pipe()
    complaints, errors = os.pipe()
    process = subprocess.Popen(
        [str(BIN / "sse-trio"), "tail", *options],
        stdout=theirs if stdout is None else stdout,
        stderr=errors,
        env=os.environ | {"TERM": "xterm", "TZ": "UTC"} | (env or {}),
        start_new_session=True,
    )
    os.close(theirs)
    os.close(errors)
    command = Tail(process)
    with process:
        async with (
            trio.lowlevel.FdStream(ours) as out,
            trio.lowlevel.FdStream(complaints) as err,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(listen_to, out, command.out)
            nursery.start_soon(listen_to, err, command.err)
            try:
                yield command
            finally:
                process.kill()
            nursery.cancel_scope.cancel()


async def listen_to(stream: trio.lowlevel.FdStream, said: Said) -> None:
    # A terminal whose last writer has gone gives an error, where a pipe gives an end.
    try:
        while data := await stream.receive_some():
            said.text += data.decode(errors="replace").replace("\r\n", "\n")
    except trio.BrokenResourceError:
        pass


async def share(nats: NatsServer, *numbers: int, **changes: Any) -> None:
    await nats.publish(*((SUBJECT, payload(number, **changes)) for number in numbers))


# -- one line for an event ---------------------------------------------------------------------------------------------


@pytest.fixture
def utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()


@pytest.mark.usefixtures("utc")
def test_a_discovery_is_its_time_type_confidence_agent_and_content() -> None:
    line = render(discovery(timestamp="2009-02-14T02:31:30+03:00"), plain)
    assert line == "23:31:30 Anomaly     75% security-001  unusual login pattern 1"


@pytest.mark.usefixtures("utc")
@pytest.mark.parametrize("moment", ["0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59"])
def test_a_moment_that_this_clock_does_not_know_is_shown_as_it_came(moment: str) -> None:
    line = render(discovery(timestamp=moment), plain)
    assert line is not None
    assert line.startswith(moment[11:19])


def test_each_type_has_its_colour() -> None:
    kinds = ["Pattern", "Anomaly", "Connection", "Solution", "Question", "Insight"]
    lines = [render(discovery(discovery_type=kind.lower()), marked) or "" for kind in kinds]
    assert all(f">{kind}" in line for kind, line in zip(kinds, lines, strict=True))
    assert len({line.split(">")[1].rpartition("<")[2] for line in lines}) == len(kinds)


def test_a_gap_says_how_many_are_missing_and_why() -> None:
    assert render(event("gap", {"reason": "overflow", "missed": 3}), plain) == (
        "-- gap: 3 discoveries are missing here (overflow)"
    )
    unknown = render(event("gap", {"reason": "expired", "missed": None}), plain)
    assert unknown == "-- gap: an unknown number of discoveries are missing here (expired)"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"agent_id": "me"}, "connected as me"),
        ({"agent_id": "me", "resumed": True}, "connected as me, resumed"),
        ({"agent_id": "me", "resumed": False}, "connected as me, not resumed"),
        ({"agent_id": "me", "resumed": None}, "connected as me"),
    ],
)
def test_a_connection_says_whether_it_has_resumed(data: dict[str, Any], text: str) -> None:
    assert render(event("connected", data), plain) is None
    assert remark(event("connected", data)) == text


def test_the_servers_goodbye_is_a_remark_and_a_moved_cursor_is_nothing() -> None:
    assert remark(event("goodbye", {"reason": "shutdown"})) == "the server says goodbye (shutdown)"
    assert render(event("cursor", {}), plain) is None
    assert remark(event("cursor", {})) is None


def test_json_is_one_ascii_line_for_each_event() -> None:
    line = render_json(event("gap", {"reason": "ü\u2028", "missed": 3}, "m-7"))
    assert line.isascii()
    assert json.loads(line) == {"event": "gap", "id": "m-7", "data": {"reason": "ü\u2028", "missed": 3}}


# -- strangers ---------------------------------------------------------------------------------------------------------

HOSTILE = "\x1b]0;owned\x07\x1b[2J\r\n\x9b31m\u202eback\x7f\x00\ud800"


def test_nothing_that_was_shared_commands_the_terminal() -> None:
    line = render(discovery(content=HOSTILE[:-1], agent_id=HOSTILE[:-1], agent_role=HOSTILE[:-1]), plain)
    assert line is not None
    assert line.isprintable()
    assert "owned" in line


WRONG = [
    "",
    "{",
    "[]",
    "null",
    "3",
    "NaN",
    '"\\ud800"',
    "[" * 100_000,
    HOSTILE,
    {"params": 3},
    {"params": {"_meta": []}},
]


@pytest.mark.parametrize("data", WRONG, ids=range(len(WRONG)))
@pytest.mark.parametrize("name", ["discovery", "gap", "connected", "goodbye", "cursor", "message", HOSTILE])
def test_a_server_that_says_anything_is_shown_on_one_line_and_ends_nothing(name: str, data: Any) -> None:
    told = event(name, data)
    assert (render(told, plain) or "").isprintable()
    line = render_json(told)
    assert line.isascii()
    assert line.isprintable()
    assert set(json.loads(line)) == {"event", "id", "data"}


@pytest.mark.parametrize(
    "field", ["agent_id", "agent_role", "discovery_type", "content", "confidence", "timestamp", "related_to"]
)
@pytest.mark.parametrize("value", [None, [], {}, HOSTILE, 3, "x"], ids=repr)
def test_a_discovery_with_any_field_wrong_is_shown_on_one_line(field: str, value: Any) -> None:
    line = render(discovery(**{field: value}), plain)
    assert line
    assert line.isprintable()


async def test_what_happens_to_the_connection_goes_to_standard_error_and_is_cleaned_too(
    capsys: pytest.CaptureFixture[str],
) -> None:
    told: list[ServerSentEvent | Interruption] = [
        event("connected", {"agent_id": HOSTILE}),
        discovery(),
        Interruption("broken", HOSTILE, 2.5),
        event("goodbye", {"reason": HOSTILE}),
        event("cursor", {}),
    ]
    out = io.StringIO()
    await tail(follower(told), out, as_json=False)
    said = capsys.readouterr().err
    assert len(out.getvalue().splitlines()) == 1
    assert said.isprintable() or all(line.isprintable() for line in said.splitlines())
    assert [line.split()[1] for line in said.splitlines()] == ["connected", "broken:", "the"]
    assert "back in 2.5 s" in said


def follower(told: Sequence[ServerSentEvent | Interruption]) -> Any:
    async def give() -> AsyncIterator[ServerSentEvent | Interruption]:
        for one in told:
            yield one

    return give()


async def test_a_terminal_that_knows_only_ascii_gets_the_rest_escaped() -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    await tail(follower([discovery(content="über 🙂")]), out, as_json=False)
    assert raw.getvalue().endswith(b"  \\xfcber \\U0001f642\n")


# -- the command -------------------------------------------------------------------------------------------------------


async def test_it_follows_a_server_through_its_restart_and_misses_nothing(nats: NatsServer, tmp_path: Path) -> None:
    port = free_port()
    async with tailing(f"http://127.0.0.1:{port}") as command:
        await command.err.says("-- unreachable: ")
        async with run_server(tmp_path, nats_url=nats.url, port=port, env=QUICK):
            await command.err.says("-- connected as tail\n")
            await share(nats, 1, 2)
            await command.out.says("pattern 2\n")
        await command.err.says("-- the server says goodbye (shutdown)\n")
        await command.err.says("-- ended: ")
        await share(nats, 3)
        async with run_server(tmp_path, nats_url=nats.url, port=port, env=QUICK):
            await command.err.says("-- connected as tail, resumed\n")
            await share(nats, 4)
            await command.out.says("pattern 4\n")
        assert [line[-1] for line in command.out.lines] == ["1", "2", "3", "4"]
        assert "\x1b" not in command.out.text
        command.process.send_signal(signal.SIGINT)
        assert await command.exited() == 0
        assert "Traceback" not in command.err.text


async def test_on_a_terminal_it_uses_colours_unless_it_is_asked_not_to(nats: NatsServer, tmp_path: Path) -> None:
    async with (
        run_server(tmp_path, nats_url=nats.url) as server,
        tailing(server.url, terminal=True) as coloured,
        tailing(server.url, terminal=True, env={"NO_COLOR": "1"}) as plain,
    ):
        for command in (coloured, plain):
            await command.err.says("connected as")
        await share(nats, 1, content="hostile \x1b[2J\x1b]0;title\x07 content")
        for command in (coloured, plain):
            await command.out.says("content\n")
        assert "\x1b[31mAnomaly" in coloured.out.text
        assert "\x1b[2J" not in coloured.out.text
        assert "\x1b" not in plain.out.text


async def test_for_a_pipe_each_event_is_a_json_object_and_the_last_id_resumes(nats: NatsServer, tmp_path: Path) -> None:
    async with run_server(tmp_path, nats_url=nats.url) as server:
        async with tailing(server.url, "--json", "--agent-id", "me") as command:
            await command.out.says('"connected"')
            await share(nats, 1, 2, 3)
            await command.out.says("pattern 3")
            first = [json.loads(line) for line in command.out.lines]
        assert [line["event"] for line in first] == ["connected", "discovery", "discovery", "discovery"]
        assert first[1]["data"]["params"]["_meta"]["discovery"]["content"] == "unusual login pattern 1"
        async with tailing(server.url, "--json", "--last-event-id", first[1]["id"]) as command:
            await command.out.says("pattern 3")
            again = [json.loads(line) for line in command.out.lines]
        assert again[0]["data"]["resumed"] is True
        assert again[1:] == first[2:]


async def test_its_filters_are_the_streams(nats: NatsServer, tmp_path: Path) -> None:
    options = ["--type", "question", "--agent", "a", "--role", "R", "--min-confidence", "0.5", "--subject", SUBJECT]
    wanted: dict[str, object] = {"discovery_type": "Question", "agent_id": "a", "agent_role": "R", "confidence": 0.5}
    async with run_server(tmp_path, nats_url=nats.url) as server, tailing(server.url, *options) as command:
        await command.err.says("connected")
        await share(nats, 0, **wanted | {"discovery_type": "Insight"})
        await share(nats, 1, **wanted | {"agent_id": "b"})
        await share(nats, 2, **wanted | {"agent_role": "S"})
        await share(nats, 3, **wanted | {"confidence": 0.4})
        await share(nats, 4, **wanted)
        await nats.publish(("discoveries.questions", payload(9, **wanted)))
        await share(nats, 5, **wanted)
        await command.out.says("pattern 5\n")
        assert [line[-1] for line in command.out.lines] == ["4", "5"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--agent-id", "a b"], "agent_id"),
        (["--subject", "a..b"], "subject"),
    ],
)
async def test_what_the_server_refuses_is_one_line_that_names_it(
    options: list[str], complaint: str, nats: NatsServer, tmp_path: Path
) -> None:
    async with run_server(tmp_path, nats_url=nats.url) as server, tailing(server.url, *options) as command:
        assert await command.exited() == 1
        await command.err.says("400")
        assert len(command.err.lines) == 1
        assert command.err.text.startswith("sse-trio: ")
        assert complaint in command.err.text


@pytest.mark.parametrize("url", ["ftp://127.0.0.1", "127.0.0.1:3000", "http://", "http://[::1", ""])
async def test_what_is_no_url_is_one_line(url: str) -> None:
    async with tailing(url) as command:
        assert await command.exited() == 2
        await command.err.says("\n")
        assert len(command.err.lines) == 1
        assert command.err.text.startswith("sse-trio: ")


async def test_a_reader_who_has_gone_ends_it_without_a_word(nats: NatsServer, tmp_path: Path) -> None:
    ours, theirs = os.pipe()
    async with run_server(tmp_path, nats_url=nats.url) as server, tailing(server.url, stdout=theirs) as command:
        os.close(theirs)
        await command.err.says("connected")
        os.close(ours)
        await share(nats, 1)
        assert await command.exited() == 0
        assert command.err.lines == ["-- connected as tail"]


async def test_a_token_goes_along_from_the_option_or_from_the_environment(nats: NatsServer, tmp_path: Path) -> None:
    secret = "a secret of thirty-two characters"
    token = jwt.encode({"agent_ids": ["tail"], "subjects": [">"], "exp": time.time() + 3600}, secret, "HS256")
    async with run_server(tmp_path, nats_url=nats.url, env={"SSE_JWT_SECRET": secret}) as server:
        async with tailing(server.url) as command:
            assert await command.exited() == 1
            await command.err.says("401")
        for options, env in (["--token", token], {}), ([], {"SSE_TRIO_TOKEN": token}):
            async with tailing(server.url, *options, env=env) as command:
                await command.err.says("connected")
