"""`sse-trio doctor`: each verdict, on real nats-servers that lack the thing in question."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from support import BIN, WITHIN, NatsServer, free_port, nats_server

from sse_trio import doctor
from sse_trio.bulk_write import BulkWrite
from sse_trio.doctor import Finding, examine
from sse_trio.nats_connection import open_connection
from sse_trio.settings import Settings


async def about(subject: str, nats: NatsServer | str, **settings: Any) -> list[Finding]:
    """What is found of `subject`, on a free port."""
    url = nats if isinstance(nats, str) else nats.url
    findings = await examine(Settings(nats_url=(url,), **settings), f"127.0.0.1:{free_port()}")
    return [finding for finding in findings if finding.subject == subject]


async def the_one_about(subject: str, nats: NatsServer | str, **settings: Any) -> Finding:
    (finding,) = await about(subject, nats, **settings)
    return finding


def config(directory: Path, text: str) -> tuple[str, ...]:
    path = directory / "nats.conf"
    path.write_text(text)
    return ("-c", str(path))


async def create_stream(nats: NatsServer, name: str = "DISCOVERIES", **changes: Any) -> None:
    wanted = {"name": name, "subjects": ["discoveries.>"], "storage": "file", "allow_direct": True} | changes
    async with open_connection(nats.url) as connection:
        request = json.dumps(wanted).encode()
        answer = await connection.request(f"$JS.API.STREAM.CREATE.{name}", request, within=WITHIN)
        assert "error" not in json.loads(answer.payload)


# -- on this machine ---------------------------------------------------------------------------------------------------


async def test_a_free_port_is_fine_and_still_free_afterwards() -> None:
    bind = f"127.0.0.1:{free_port()}"
    for _ in range(2):
        (finding, *_) = await examine(Settings(nats_url=(f"127.0.0.1:{free_port()}",)), bind)
        assert finding == Finding("ok", "port", f"{bind} is free")


async def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        (finding, *_) = await examine(Settings(nats_url=(f"127.0.0.1:{free_port()}",)), bind)
    assert (finding.verdict, finding.subject) == ("FAIL", "port")
    assert bind in finding.detail
    assert "in use" in finding.detail
    assert "--bind" in finding.detail


async def test_looking_at_a_unix_socket_leaves_no_file(tmp_path: Path) -> None:
    bind = f"unix:{tmp_path / 'socket'}"
    (finding, *_) = await examine(Settings(nats_url=(f"127.0.0.1:{free_port()}",)), bind)
    assert finding.verdict == "ok"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("limit", "wanted", "verdict", "detail"),
    [
        (1 << 20, 10000, "ok", "fits"),
        (resource.RLIM_INFINITY, 10000, "ok", "fits"),
        (resource.RLIM_INFINITY, 0, "ok", "fits"),
        (1024, 896, "ok", "fits"),
        (1024, 897, "warn", "the limit of 1024 allows 896 streams, SSE_MAX_CONNECTIONS is 897"),
        (1024, 0, "ok", "the limit of 1024 allows 896 streams"),
        (64, 10, "warn", "allows 1 streams"),
    ],
)
async def test_the_open_files_are_compared_with_the_streams_that_are_wanted(
    limit: int, wanted: int, verdict: str, detail: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, limit))
    finding = await the_one_about("open files", f"nats://127.0.0.1:{free_port()}", max_connections=wanted)
    assert finding.verdict == verdict
    assert detail in finding.detail


@pytest.mark.parametrize(
    ("mode", "works", "verdict", "detail"),
    [
        ("together", True, "ok", "to a hundred clients with one system call"),
        ("together", False, "warn", "no io_submit, or a sandbox forbids it"),
        ("single", False, "ok", "SSE_DIRECT_WRITES=single"),
        ("off", True, "ok", "SSE_DIRECT_WRITES=off"),
    ],
)
async def test_a_system_on_which_clients_must_be_written_to_one_by_one_is_told_of(
    mode: str, works: bool, verdict: str, detail: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BulkWrite, "works", lambda: works)
    finding = await the_one_about("writes", f"nats://127.0.0.1:{free_port()}", direct_writes=mode)
    assert finding.verdict == verdict
    assert detail in finding.detail


# -- NATS --------------------------------------------------------------------------------------------------------------


async def test_with_everything_there_everything_is_fine(nats: NatsServer) -> None:
    findings = await examine(Settings(nats_url=(nats.url,)), f"127.0.0.1:{free_port()}")
    assert [(finding.verdict, finding.subject) for finding in findings] == [
        ("ok", "port"),
        ("ok", "open files"),
        ("ok", "writes"),
        ("ok", "NATS"),
        ("ok", "permissions"),
        ("ok", "JetStream"),
        ("ok", "stream"),
    ]
    assert "not there yet" in findings[-1].detail


async def test_a_variable_that_is_no_setting_is_named() -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    settings = Settings.from_environment({"NATS_URL": nowhere, "SSE_BUFER": "10", "SSE_HISTROY": "0"})
    (told,) = [found for found in await examine(settings, "127.0.0.1:0") if found.subject == "settings"]
    assert (told.verdict, told.detail) == (
        "warn",
        "there is no SSE_BUFER, no SSE_HISTROY; docs/operating.md lists them all",
    )


async def test_each_server_of_the_list_is_looked_at(nats: NatsServer, core_nats: NatsServer) -> None:
    urls = (nats.url, core_nats.url, f"nats://127.0.0.1:{free_port()}")
    findings = await examine(Settings(nats_url=urls), f"127.0.0.1:{free_port()}")
    assert [finding.verdict for finding in findings if finding.subject == "NATS"] == ["ok", "ok", "FAIL"]


async def test_a_server_that_is_not_there_is_to_be_started() -> None:
    url = f"nats://me:s3cret@127.0.0.1:{free_port()}"
    finding = await the_one_about("NATS", url)
    assert finding.verdict == "FAIL"
    assert "start it (nats-server -js), or set NATS_URL" in finding.detail
    assert "(connection refused)" in finding.detail
    assert "s3cret" not in finding.detail


async def test_wrong_credentials_are_said_to_be_that_and_are_not_shown(tmp_path: Path) -> None:
    async with nats_server(tmp_path, options=("--user", "me", "--pass", "right")) as nats:
        finding = await the_one_about("NATS", nats.url.replace("://", "://me:s3cret@"))
    assert finding.verdict == "FAIL"
    assert "check the user info in NATS_URL" in finding.detail
    assert "s3cret" not in finding.detail


async def test_a_server_without_tls_is_said_to_be_that(nats: NatsServer) -> None:
    finding = await the_one_about("NATS", nats.url.replace("nats://", "tls://"))
    assert finding.verdict == "FAIL"
    assert "check tls:// in NATS_URL" in finding.detail


async def test_a_server_that_is_frozen_is_given_up(nats: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "WITHIN", 0.2)
    nats.freeze()
    finding = await the_one_about("NATS", nats.url.replace("://", "://me:s3cret@"))
    assert finding.verdict == "FAIL"
    assert f"127.0.0.1:{nats.port} did not answer within 0.2 s" in finding.detail
    assert "s3cret" not in finding.detail


async def test_one_who_may_not_subscribe_is_told_what_to_allow(tmp_path: Path) -> None:
    users = 'authorization: { users: [ {user: a, password: b, permissions: {subscribe: ["_INBOX.>"]}} ] }'
    async with nats_server(tmp_path, options=config(tmp_path, users)) as nats:
        finding = await the_one_about("permissions", nats.url.replace("://", "://a:b@"))
    assert finding.verdict == "FAIL"
    assert "allow this user to subscribe to discoveries.>" in finding.detail


async def test_a_subject_that_leaves_out_what_agents_share_is_a_warning(nats: NatsServer) -> None:
    findings = await about("subjects", nats, nats_subject="discoveries.questions")
    assert [finding.verdict for finding in findings] == ["warn", "warn"]
    assert "discoveries.insights is outside" in findings[0].detail


# -- JetStream ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("durable", "verdict"), [("auto", "warn"), ("require", "FAIL")])
async def test_without_jetstream_it_says_how_to_get_it(core_nats: NatsServer, durable: str, verdict: str) -> None:
    finding = await the_one_about("JetStream", core_nats, nats_durable=durable)
    assert finding.verdict == verdict
    assert "start nats-server with -js" in finding.detail


async def test_where_jetstream_is_not_wanted_nobody_looks_for_it(core_nats: NatsServer) -> None:
    assert await about("JetStream", core_nats, nats_durable="off") == []


async def test_an_account_without_jetstream_has_none(tmp_path: Path) -> None:
    accounts = "accounts: { A: { users: [ {user: a, password: b} ] }, B: { jetstream: enabled } }"
    async with nats_server(tmp_path, options=config(tmp_path, accounts)) as nats:
        finding = await the_one_about("JetStream", nats.url.replace("://", "://a:b@"))
    assert finding.verdict == "warn"


@pytest.mark.parametrize(
    ("denied", "verdict", "detail"),
    [
        ("$JS.API.>", "warn", "not allowed for this user; allow $JS.API.>"),
        ("$JS.API.STREAM.>", "FAIL", "allow this user $JS.API.>"),
    ],
)
async def test_one_who_may_not_use_jetstream_is_told_what_to_allow(
    tmp_path: Path, denied: str, verdict: str, detail: str
) -> None:
    users = f'authorization: {{ users: [ {{user: a, password: b, permissions: {{publish: {{deny: "{denied}"}}}}}} ] }}'
    async with nats_server(tmp_path, options=config(tmp_path, users)) as nats:
        finding = await the_one_about("JetStream", nats.url.replace("://", "://a:b@"))
    assert finding.verdict == verdict
    assert detail in finding.detail


async def test_a_stream_that_is_there_says_what_it_holds(nats: NatsServer) -> None:
    await create_stream(nats)
    await nats.publish(*[("discoveries.insights", b"{}")] * 3)
    finding = await the_one_about("stream", nats)
    assert finding == Finding("ok", "stream", "DISCOVERIES holds 1 to 3")


async def test_a_stream_that_cannot_be_read_directly_is_slow(nats: NatsServer) -> None:
    await create_stream(nats, allow_direct=False)
    finding = await the_one_about("stream", nats)
    assert finding.verdict == "warn"
    assert "nats stream edit DISCOVERIES --allow-direct" in finding.detail


@pytest.mark.parametrize(
    ("subjects", "verdict", "detail"),
    [
        (["other.>"], "FAIL", "collects other.>, nothing of discoveries.>"),
        (["discoveries.insights"], "warn", "collects discoveries.insights, not all of discoveries.>"),
    ],
)
async def test_a_stream_that_collects_something_else_is_named(
    nats: NatsServer, subjects: list[str], verdict: str, detail: str
) -> None:
    await create_stream(nats, subjects=subjects)
    finding = await the_one_about("stream", nats)
    assert finding.verdict == verdict
    assert detail in finding.detail


async def test_another_stream_that_collects_the_subject_is_proposed(nats: NatsServer) -> None:
    await create_stream(nats, "OLD", subjects=["discoveries.*"])
    finding = await the_one_about("stream", nats)
    assert finding.verdict == "FAIL"
    assert "set NATS_STREAM=OLD" in finding.detail


async def test_a_stream_that_is_full_is_said_to_be_that(nats: NatsServer) -> None:
    await create_stream(nats, max_bytes=100_000, discard="new")
    await nats.publish(*[("discoveries.insights", b"x" * 500)] * 300)
    finding = await the_one_about("stream", nats)
    assert finding.verdict == "FAIL"
    assert "full: new discoveries are refused; raise its limits" in finding.detail


# -- the command -------------------------------------------------------------------------------------------------------


def run_doctor(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SSE_", "NATS_", "LOG_"))}
    return subprocess.run(
        [str(BIN / "sse-trio"), "doctor", *options], env=clean | environment, capture_output=True, text=True, timeout=60
    )


async def test_the_command_exits_with_0_when_nothing_is_wrong_and_with_1_when_something_is(nats: NatsServer) -> None:
    bind = f"127.0.0.1:{free_port()}"
    for url, code in ((nats.url, 0), (f"nats://127.0.0.1:{free_port()}", 1)):
        done = await trio.to_thread.run_sync(partial(run_doctor, "--bind", bind, NATS_URL=url))
        assert done.returncode == code
        assert done.stderr == ""
        assert all(line[:6] in {"ok    ", "warn  ", "FAIL  "} for line in done.stdout.splitlines())
        assert ("FAIL" in done.stdout) is (code == 1)


def test_a_wrong_setting_is_named_before_anything_is_looked_at() -> None:
    done = run_doctor(SSE_BUFFER="none")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "SSE_BUFFER" in done.stderr
    assert "Traceback" not in done.stderr
