"""What the server needs, looked at one by one: each finding says how it is, and what to do about it."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from typing import Literal

import trio

from sse_trio.jetstream import JetStream
from sse_trio.limits import FD_RESERVE
from sse_trio.nats_connection import NatsConnection, open_connection
from sse_trio.nats_protocol import NatsError
from sse_trio.server import StartError, bind_socket
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
    """Every finding; never raises because of what it finds."""
    findings = [_port(bind), _open_files(settings)]
    for url in settings.nats_url:
        with trio.move_on_after(WITHIN) as scope:
            findings += await _nats(settings, url)
        if scope.cancelled_caught:
            findings.append(Finding("FAIL", "NATS", f"a server did not answer within {WITHIN:g} s"))
    return findings


def _port(bind: str) -> Finding:
    try:
        bind_socket(bind).close()
    except StartError as error:
        return Finding("FAIL", "port", f"{error}; stop what listens there, or choose another with --bind")
    return Finding("ok", "port", f"{bind} is free")


def _open_files(settings: Settings) -> Finding:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = settings.max_connections
    if hard == resource.RLIM_INFINITY or wanted + FD_RESERVE <= hard:
        return Finding("ok", "open files", f"{wanted or 'all'} streams fit into the limit")
    return Finding(
        "warn",
        "open files",
        f"the limit of {hard} allows {max(1, hard - FD_RESERVE)} streams, SSE_MAX_CONNECTIONS is {wanted}: "
        "raise it (ulimit -n, LimitNOFILE)",
    )


async def _nats(settings: Settings, url: str) -> list[Finding]:
    try:
        async with open_connection(url, creds=settings.nats_creds, ca=settings.nats_ca) as connection:
            found = [Finding("ok", "NATS", f"connected to {connection.server}")]
            found.append(await _may_subscribe(connection, settings.nats_subject))
            for subject in SUBJECTS:
                if not is_subset(subject, (settings.nats_subject,)):
                    detail = (
                        f"{subject} is outside NATS_SUBJECT={settings.nats_subject}: what is shared there is not heard"
                    )
                    found.append(Finding("warn", "subjects", detail))
            if settings.nats_durable != "off":
                found += await _jetstream(settings, connection)
            return found
    except NatsError as error:
        advice = {
            "unreachable": "start it, or set NATS_URL",
            "auth": "check the user info in NATS_URL, or NATS_CREDS",
            "tls": "check tls:// in NATS_URL, and NATS_CA",
        }.get(error.reason, "see the server's log")
        return [Finding("FAIL", "NATS", f"{error.detail}; {advice}")]


async def _may_subscribe(connection: NatsConnection, subject: str) -> Finding:
    try:
        (await connection.subscribe(subject)).close()
    except NatsError as error:
        return Finding("FAIL", "permissions", f"{error.detail}; allow this user to subscribe to {subject}")
    return Finding("ok", "permissions", f"may subscribe to {subject}")


async def _jetstream(settings: Settings, connection: NatsConnection) -> list[Finding]:
    required = settings.nats_durable == "require"
    stream = JetStream(connection, settings.nats_stream, settings.nats_subject)
    try:
        if not await stream.is_available():
            detail = "off: clients can resume only from the memory of one process; start nats-server with -js"
            return [Finding("FAIL" if required else "warn", "JetStream", detail)]
        found = [Finding("ok", "JetStream", "available")]
        info = await stream.info()
    except NatsError as error:
        return [Finding("FAIL", "JetStream", f"{error.detail}; allow this user $JS.API.>")]
    name = settings.nats_stream
    if info is None:
        return [*found, Finding("ok", "stream", f"{name} is not there yet: the server creates it at its start")]
    if not is_subset(settings.nats_subject, info.subjects) and info.subjects:
        detail = f"{name} does not collect all of {settings.nats_subject}, only {', '.join(info.subjects)}"
        found.append(Finding("FAIL", "stream", f"{detail}; set NATS_STREAM or NATS_SUBJECT"))
    elif not info.allow_direct:
        detail = f"{name} has no direct access: resuming reads it slowly; nats stream edit {name} --allow-direct"
        found.append(Finding("warn", "stream", detail))
    else:
        found.append(Finding("ok", "stream", f"{name} holds {info.first} to {info.last}"))
    return found
