"""The command line: help that teaches, errors in one line, exit codes that a script can use.

What serve and demo do as processes is in test_server.py and test_demo.py; tail and doctor have their own tests too.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import trio
from click.testing import CliRunner
from hypercorn.utils import LifespanFailureError
from support import BIN, WITHIN, NatsServer, a_discovery, eventually, fail_within, listen, run_server

import sse_trio
from sse_trio.cli import causes, demo_environment, main, own_name, told_in_one_line
from sse_trio.discovery import build
from sse_trio.nats_feed import FeedError
from sse_trio.nats_protocol import NatsError
from sse_trio.settings import Settings, SettingsError

NOWHERE = "nats://127.0.0.1:1"
COMMANDS = ["serve", "demo", "share", "tail", "doctor"]


async def run(
    *arguments: str, env: Mapping[str, str] | None = None, stdin: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    """The real command, to its end."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SSE_", "NATS_", "LOG_"))}
    with fail_within(WITHIN, f"sse-trio {' '.join(arguments)} ends"):
        return await trio.run_process(
            [str(BIN / "sse-trio"), *arguments],
            env=environment | dict(env or {}),
            stdin=stdin,
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
    raise AssertionError


# Help


def test_the_help_names_every_command_the_first_steps_and_the_exit_codes() -> None:
    shown = CliRunner().invoke(main, ["--help"])
    assert shown.exit_code == 0
    assert set(main.commands) == set(COMMANDS)
    for said in [*COMMANDS, "sse-trio demo", "NATS_URL", "Exit codes"]:
        assert said in shown.output


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_each_command_teaches_by_example(command: str) -> None:
    shown = CliRunner().invoke(main, [command, "-h"])
    assert shown.exit_code == 0
    assert "Examples:\n" in shown.output
    assert (
        f"\n    sse-trio {command}" in shown.output or f" sse-trio {command}" in shown.output.partition("Examples:")[2]
    )
    assert "Exit codes: 0 " in shown.output
    assert max(len(line) for line in shown.output.splitlines()) <= 100


@pytest.mark.parametrize("command", COMMANDS)
def test_every_example_in_the_help_is_a_command_that_exists(command: str) -> None:
    shown = CliRunner().invoke(main, [command, "-h"]).output.partition("Examples:")[2].partition("Options:")[0]
    for arguments in re.findall(r"sse-trio (.*)", shown.replace("\\\n", " ")):
        name, *options = arguments.split()
        known = {option for parameter in main.commands[name].params for option in parameter.opts}
        assert {option for option in options if option.startswith("--")} <= known


def test_it_says_its_version() -> None:
    assert CliRunner().invoke(main, ["--version"]).output == f"sse-trio, version {sse_trio.__version__}\n"


def test_it_runs_as_a_module_too() -> None:
    shown = subprocess.run([sys.executable, "-m", "sse_trio", "--version"], capture_output=True, text=True, check=True)
    assert sse_trio.__version__ in shown.stdout


# Misuse


async def test_wrong_settings_are_one_line_for_each_variable_and_the_exit_code_two() -> None:
    wrong = {"SSE_BUFFER": "many", "NATS_URL": "http://user:secret@example.org", "LOG_LEVEL": "loud"}
    for command in (["serve"], ["share", "x"], ["doctor"]):
        done = await run(*command, env=wrong)
        assert done.returncode == 2
        first, *lines = done.stderr.decode().splitlines()
        assert first == "sse-trio: wrong settings"
        assert sorted(line.partition(":")[0] for line in lines) == sorted(wrong)
        assert b"secret" not in done.stderr
        assert done.stdout == b""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve", "--certfile", __file__], "--certfile and --keyfile belong together"),
        (["serve", "--workers", "0"], "--workers"),
        (["share", "x", "--confidence", "2"], "--confidence"),
        (["share", "x", "--type", "Rumour"], "--type"),
        (["share"], "CONTENT"),
        (["tail", "--min-confidence", "x"], "--min-confidence"),
        (["tail", "--type", "Rumour"], "--type"),
        (["tail", "ftp://x"], "'ftp://x' is no http:// or https:// URL"),
        (["tail", "127.0.0.1:3000"], "did you mean http://127.0.0.1:3000?"),
        (["demo", "--bind", "foo"], "expected host:port, for example 127.0.0.1:3000"),
        (["serve", "--bind", "foo:bar"], "expected host:port"),
        (["serve", "--bind", ":99999"], "expected host:port"),
        (["doctor", "--bind", "foo:bar"], "expected host:port"),
        (["fly"], "fly"),
    ],
)
def test_what_cannot_be_meant_is_named_with_the_exit_code_two(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2
    assert said in done.output


# share


async def test_share_prints_the_uri_that_the_stream_then_tells(nats: NatsServer, tmp_path: Path) -> None:
    async with run_server(tmp_path, nats_url=nats.url) as server, listen(server.port) as stream:
        await eventually(server.is_live, "the feed is live")
        await stream.next("connected")
        options = ["--agent", "ops-1", "--role", "Operations", "--type", "anomaly", "--confidence", "0.8"]
        first = await run("share", "disk full", *options, env={"NATS_URL": nats.url})
        assert (first.returncode, first.stderr) == (0, b"")
        uri = first.stdout.decode().rstrip("\n")
        assert uri.startswith("discovery://agents/ops-1/discoveries/")
        assert uri.endswith("-Anomaly-disk-full")
        assert uri in (await stream.next("discovery")).data

        # Content from standard input, related to the first.
        second = await run("share", "-", "--related-to", uri, env={"NATS_URL": nats.url}, stdin="läuft voll\n".encode())
        assert second.stdout.decode().rstrip("\n") in (await stream.next("discovery")).data
        status, latest = await server.get("/discoveries")
        assert status == 200
        newest, oldest = latest["discoveries"]
        assert newest["subject"] == "discoveries.connections"
        assert newest["discovery"]["content"] == "läuft voll"
        assert newest["discovery"]["related_to"] == uri
        assert oldest["discovery"]["agent_role"] == "Operations"


@pytest.mark.parametrize(
    ("arguments", "stdin", "said"),
    [
        ([""], b"", "CONTENT is empty"),
        (["-"], b" \n", "CONTENT is empty"),
        (["x", "--related-to", "nope"], b"", "--related-to nope: expected discovery://"),
        (["x", "--agent", ""], b"", "agent_id"),
        (["x", "--agent", ".."], b"", "agent_id"),
        (["-"], b"x" * 70_000, "oversized: more than the 65536 bytes allowed"),
        (["-"], "é".encode() * 40_000, "65536"),
        (["-"], b"\xff\xfe", "not UTF-8"),
    ],
)
async def test_share_refuses_what_is_no_discovery_with_the_exit_code_two(
    nats: NatsServer, arguments: list[str], stdin: bytes, said: str
) -> None:
    done = await run("share", *arguments, env={"NATS_URL": nats.url}, stdin=stdin)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr.decode()


async def test_share_without_nats_is_one_line_and_the_exit_code_one() -> None:
    done = await run("share", "x", env={"NATS_URL": NOWHERE})
    assert done.returncode == 1
    advice = "start it (nats-server -js), or set NATS_URL"
    said = f"sse-trio: cannot reach NATS at 127.0.0.1:1 (connection refused): {advice}\n"
    assert done.stderr.decode() == said
    assert done.stdout == b""


async def test_share_that_is_interrupted_has_not_succeeded(nats: NatsServer) -> None:
    nats.freeze()
    process = subprocess.Popen(
        [str(BIN / "sse-trio"), "share", "x"], env=os.environ | {"NATS_URL": nats.url}, stderr=subprocess.PIPE
    )
    try:
        peers = Path(f"/proc/{process.pid}/net/tcp")

        def has_connected() -> bool:
            return f":{nats.port:04X} 01 " in peers.read_text()

        await eventually(has_connected, "it waits for NATS")
        process.send_signal(signal.SIGINT)
        await eventually(lambda: process.poll() is not None, "it ends")
        assert process.returncode == 130
        assert process.stderr is not None
        assert process.stderr.read() == b""
    finally:
        process.kill()
        process.communicate()


# tail and doctor, as commands


async def test_tail_ends_with_one_line_where_the_server_refuses(nats: NatsServer, tmp_path: Path) -> None:
    async with run_server(tmp_path, nats_url=nats.url) as server:
        done = await run("tail", server.url, "--subject", "a..b")
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1
        assert b"subject" in done.stderr


async def test_doctors_exit_code_tells_whether_something_is_wrong(nats: NatsServer) -> None:
    well = await run("doctor", "--bind", "127.0.0.1:0", env={"NATS_URL": nats.url})
    assert well.returncode == 0
    assert b"FAIL" not in well.stdout
    ill = await run("doctor", "--bind", "127.0.0.1:0", env={"NATS_URL": NOWHERE})
    assert ill.returncode == 1
    assert ill.stdout.count(b"FAIL") == 1


# What happened, in one line


def failed(stage: str, cause: Exception) -> LifespanFailureError:
    error = LifespanFailureError(stage, str(cause))
    error.__cause__ = ExceptionGroup("the application's nursery", [cause])
    return error


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (NatsError("auth", "no"), 1, "auth: no"),
        (ExceptionGroup("", [ExceptionGroup("", [NatsError("tls", "no")])]), 1, "tls: no"),
        (ExceptionGroup("", [failed("startup", FeedError("there is no JetStream"))]), 1, "there is no JetStream"),
        (failed("startup", SettingsError("SSE_JWT_JWKS: nobody there")), 2, "SSE_JWT_JWKS: nobody there"),
    ],
)
def test_what_a_person_can_mend_is_told_in_one_line_however_deep_it_is(
    error: Exception, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, told_in_one_line():
        raise error
    assert ended.value.code == code
    assert capsys.readouterr().err == f"sse-trio: {said}\n"


def test_an_invalid_discovery_is_misuse(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, told_in_one_line():
        build(a_discovery(confidence=7))
    assert ended.value.code == 2
    assert "confidence" in capsys.readouterr().err


@pytest.mark.parametrize(
    "bug", [RuntimeError("bug"), ExceptionGroup("", [NatsError("auth", "no"), RuntimeError("bug")])]
)
def test_a_bug_keeps_its_traceback(bug: Exception) -> None:
    with pytest.raises(type(bug)) as raised, told_in_one_line():
        raise bug
    assert raised.value is bug


def test_a_failure_without_a_cause_stands_for_itself() -> None:
    error = LifespanFailureError("startup", "x")
    assert list(causes(error)) == [error]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), BaseExceptionGroup("", [KeyboardInterrupt(), ValueError()])])
def test_an_interrupt_is_no_error_wherever_it_was_raised(error: BaseException) -> None:
    with pytest.raises(SystemExit) as ended, told_in_one_line():
        raise error
    assert ended.value.code == 130
    with pytest.raises(SystemExit) as ended, told_in_one_line(interrupted=0):
        raise error
    assert ended.value.code == 0


# The demo's settings


def test_the_demo_answers_loopback_names_and_never_to_another_nats() -> None:
    environment = {"NATS_URL": "nats://production", "NATS_SUBJECT": "x.>", "NATS_CREDS": "/x", "SSE_BUFFER": "7"}
    settings = Settings.from_environment(demo_environment(environment))
    assert settings.allowed_hosts == ("localhost", "127.0.0.1", "[::1]")
    assert settings.log_level == "warning"
    assert settings.buffer == 7
    assert (settings.nats_subject, settings.nats_creds) == ("discoveries.>", None)
    assert settings.nats_stream_max_bytes == 64 << 20


@pytest.mark.parametrize(
    ("program", "on_path", "said"),
    [
        (".venv/bin/sse-trio", None, ".venv/bin/sse-trio"),
        (".venv/bin/sse-trio", "/usr/bin/sse-trio", "sse-trio"),
        ("/a b/sse-trio", None, "'/a b/sse-trio'"),
        ("/x/sse_trio/__main__.py", None, f"{shlex.quote(sys.executable)} -m sse_trio"),
    ],
)
def test_it_calls_itself_as_one_can_call_it_from_here(
    program: str, on_path: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [program])
    monkeypatch.setattr(shutil, "which", lambda name: on_path)
    assert own_name() == said


def test_the_demos_hosts_and_its_log_can_be_said_otherwise() -> None:
    environment = {"SSE_ALLOWED_HOSTS": "demo.example.org", "LOG_LEVEL": "debug", "SSE_BUFFER": " "}
    settings = Settings.from_environment(demo_environment(environment))
    assert settings.allowed_hosts == ("demo.example.org",)
    assert settings.log_level == "debug"
