"""What the server needs, looked at one by one: each finding says how it is, and what to do about it."""

from __future__ import annotations

import json
import resource
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

import trio

from sse_trio.bulk_write import BulkWrite
from sse_trio.jetstream import JetStream
from sse_trio.limits import FD_RESERVE
from sse_trio.nats_connection import NatsConnection, open_connection
from sse_trio.nats_protocol import NatsError, NoResponders
from sse_trio.server import StartError, WrongBind, listening
from sse_trio.settings import Settings
from sse_trio.subjects import is_subset

__all__ = ["Finding", "examine"]

SUBJECTS = ("discoveries.insights", "discoveries.questions", "discoveries.connections")

WITHIN = 10.0
"""Seconds that NATS may take for everything that it is asked."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    verdict: Literal["ok", "warn", "FAIL"]
    subject: str
    detail: str


async def examine(settings: Settings, bind: str) -> list[Finding]:
    """Every finding. Takes at most `WITHIN` seconds for each NATS server.

    Raises:
        WrongBind: `bind` is no address. Nothing else that it finds is raised.
    """
    findings = [_port(bind), _open_files(settings), _writes(settings)]
    if settings.unknown:
        detail = f"there is no {', no '.join(settings.unknown)}; docs/operating.md lists them all"
        findings.append(Finding("warn", "settings", detail))
    for url in settings.nats_url:
        with trio.move_on_after(WITHIN) as scope:
            findings += await _nats(settings, url)
        if scope.cancelled_caught:
            place = urlsplit(url).netloc.rpartition("@")[2]
            findings.append(Finding("FAIL", "NATS", f"{place} did not answer within {WITHIN:g} s; see its log"))
    return findings


def _port(bind: str) -> Finding:
    try:
        with listening(bind):
            return Finding("ok", "port", f"{bind} is free")
    except WrongBind:
        raise
    except StartError as error:
        return Finding("FAIL", "port", f"{error}; or stop what listens there")


def _open_files(settings: Settings) -> Finding:
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = settings.max_connections
    allowed = max(1, limit - FD_RESERVE)
    if limit == resource.RLIM_INFINITY or 0 < wanted <= allowed:
        return Finding("ok", "open files", "SSE_MAX_CONNECTIONS fits into the limit")
    if wanted == 0:
        return Finding("ok", "open files", f"the limit of {limit} allows {allowed} streams")
    detail = f"the limit of {limit} allows {allowed} streams, SSE_MAX_CONNECTIONS is {wanted}"
    return Finding("warn", "open files", f"{detail}; raise it (ulimit -n, LimitNOFILE)")


def _writes(settings: Settings) -> Finding:
    if settings.direct_writes != "together":
        return Finding("ok", "writes", f"SSE_DIRECT_WRITES={settings.direct_writes}")
    if BulkWrite.works():
        return Finding("ok", "writes", "to a hundred clients with one system call")
    detail = "this system has no io_submit, or a sandbox forbids it"
    return Finding("warn", "writes", f"{detail}: clients are written to one by one, which is slower; allow it")


async def _nats(settings: Settings, url: str) -> list[Finding]:
    try:
        async with open_connection(url, creds=settings.nats_creds, ca=settings.nats_ca) as connection:
            found = [Finding("ok", "NATS", f"connected to {connection.server}")]
            found.append(await _may_subscribe(connection, settings.nats_subject))
            for subject in SUBJECTS:
                if not is_subset(subject, (settings.nats_subject,)):
                    detail = f"{subject} is outside of NATS_SUBJECT={settings.nats_subject}"
                    found.append(Finding("warn", "subjects", f"{detail}; what agents share there is not heard"))
            if settings.nats_durable != "off":
                found += await _jetstream(settings, connection)
            return found
    except NatsError as error:
        return [Finding("FAIL", "NATS", error.advice)]


async def _may_subscribe(connection: NatsConnection, subject: str) -> Finding:
    try:
        (await connection.subscribe(subject)).close()
    except NatsError as error:
        return Finding("FAIL", "permissions", f"{error.detail}; allow this user to subscribe to {subject}")
    return Finding("ok", "permissions", f"may subscribe to {subject}")


async def _jetstream(settings: Settings, connection: NatsConnection) -> list[Finding]:
    missing: Literal["warn", "FAIL"] = "FAIL" if settings.nats_durable == "require" else "warn"
    without = "without it clients resume only from the memory of one process"
    stream = JetStream(connection, settings.nats_stream, settings.nats_subject)
    try:
        if not await stream.is_available():
            if await _may_not_ask(connection):
                return [Finding(missing, "JetStream", f"not allowed for this user; allow $JS.API.>: {without}")]
            return [Finding(missing, "JetStream", f"off; start nats-server with -js: {without}")]
        return [Finding("ok", "JetStream", "available"), await _stream(settings, connection, stream)]
    except NatsError as error:
        return [Finding("FAIL", "JetStream", f"{error.detail}; allow this user $JS.API.>")]


async def _may_not_ask(connection: NatsConnection) -> bool:
    try:
        await connection.request("$JS.API.INFO", b"", within=WITHIN)
    except NoResponders:
        return False
    except NatsError as error:
        return error.reason == "permissions"
    return False  # there is JetStream, but not for this account


async def _stream(settings: Settings, connection: NatsConnection, stream: JetStream) -> Finding:
    name, subject = settings.nats_stream, settings.nats_subject
    info = await stream.info()
    if info is None:
        if others := await _collectors(connection, subject):
            detail = f"there is no {name}, and {others[0]} collects {subject} already"
            return Finding("FAIL", "stream", f"{detail}; set NATS_STREAM={others[0]}")
        return Finding("ok", "stream", f"{name} is not there yet; the server creates it at its start")
    if info.subjects and not is_subset(subject, info.subjects):
        some = info.collects(subject)
        detail = f"{name} collects {', '.join(info.subjects)}, {'not all' if some else 'nothing'} of {subject}"
        return Finding("warn" if some else "FAIL", "stream", f"{detail}; set NATS_STREAM or NATS_SUBJECT")
    if (trouble := await stream.trouble()) is not None:
        return Finding("FAIL", "stream", f"{trouble}; raise its limits")
    if not info.allow_direct:
        detail = f"{name} cannot be read directly, so that resuming is slow"
        return Finding("warn", "stream", f"{detail}; nats stream edit {name} --allow-direct")
    return Finding("ok", "stream", f"{name} holds {info.first} to {info.last}")


async def _collectors(connection: NatsConnection, subject: str) -> list[str]:
    """The streams that collect some of `subject`."""
    request = json.dumps({"subject": subject}).encode()
    answer = await connection.request("$JS.API.STREAM.NAMES", request, within=WITHIN)
    try:
        return [str(name) for name in json.loads(answer.payload).get("streams") or []]
    except (ValueError, AttributeError):
        return []
