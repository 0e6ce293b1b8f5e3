"""nats-py's client, made fit for one connection: its handshake and its parser, without its loops.

Strategy: nats-py knows how to greet a server, with TLS and with every kind of credentials, and how to take its lines
apart. What it does besides (reconnecting, flushing, watching, iterating, requesting) can each hang or fall silent, so
the methods that start these are overridden here, and whatever happens is reported to an owner. The overridden and the
private names of nats-py 2.16 are all in this module; a test fails when they change.
"""

from __future__ import annotations

import asyncio
import os
import re
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

import nats.errors
import trio
import trio_asyncio
from nats.aio.client import Client

from sse_trio.nats_protocol import Message, NatsError, error_reason

__all__ = ["NatsClient", "classify", "connect"]

READ_AT_ONCE = 1 << 16
"""Bytes that are taken apart before other tasks may run: one or two milliseconds of small messages."""


class Owner(Protocol):
    """Who is told what happens on the connection; its methods never wait and never raise."""

    activity: int
    """Counts reads: any byte from the server is a sign of life."""
    server_info: dict[str, Any]
    sinks: dict[int, Callable[[Message], None]]
    """Where the messages of each subscription go."""

    @property
    def failure(self) -> NatsError | None: ...
    def die(self, reason: str, detail: str) -> None: ...
    def process_error(self, text: str) -> None: ...


class NatsClient(Client):
    """nats-py's client with its loops replaced by ones that report to an owner and cannot die in silence."""

    def __init__(self, owner: Owner, *, require_tls: bool) -> None:
        super().__init__()
        self.owner = owner
        self.require_tls = require_tls
        self.pongs: list[trio.Event] = []
        """Who waits for a PONG, in order; they may stop to wait, but keep their places."""

    async def _select_next_server(self) -> None:
        # One server, one try; the original tries again and hides the cause.
        server = self._server_pool[0]
        await self._connect_to_server(server)
        self._current_server = server

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        if initial_connection and self.require_tls and not info.get("tls_required"):
            # nats-py would go on in plaintext and send the credentials.
            if not info.get("tls_available"):
                raise NatsError("tls", "the server offers no TLS, and tls:// asks for it; nothing was sent")
            info["tls_required"] = True
        self.owner.server_info.update(info)

    async def _read_loop(self) -> None:
        owner = self.owner
        transport: Any = self._transport
        try:
            while data := await transport.read(READ_AT_ONCE):
                owner.activity += 1
                await self._ps.parse(data)
                await asyncio.sleep(0)  # neither of the two waits while there is something
            owner.die("unreachable", "the server closed the connection")
        except OSError as error:
            owner.die("unreachable", f"the connection broke: {error}")
        except Exception as error:
            owner.die("protocol", f"what the server sent was not understood: {error!r}")

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        sink = self.owner.sinks.get(sid)
        if sink is not None:
            sink(Message(subject, reply, data, headers))

    async def _process_err(self, err_msg: str) -> None:
        self.owner.process_error(err_msg.strip("'"))

    async def _process_ping(self) -> None:
        self.send(b"PONG\r\n")

    async def _process_pong(self) -> None:
        if self.pongs:
            self.pongs.pop(0).set()

    def send(self, data: bytes) -> None:
        """Write at once, or leave it to the transport's buffer."""
        transport: Any = self._transport
        transport.write(data)

    def expect_end_of_tls(self) -> None:
        """Tell the protocol that it is inside TLS, which nats-py does not; else asyncio logs a warning at its end."""
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None and writer.get_extra_info("ssl_object") is not None:
            writer.transport.get_protocol()._over_ssl = True

    def buffered(self) -> int:
        """Bytes that the kernel has not taken yet."""
        writer = getattr(self._transport, "_io_writer", None)
        return int(writer.transport.get_write_buffer_size()) if writer is not None else 0

    def ping(self) -> trio.Event:
        """Ask for a PONG. The server answers in order: when it comes, everything written before was processed."""
        pong = trio.Event()
        self.pongs.append(pong)
        self.send(b"PING\r\n")
        return pong

    async def _ping_interval(self) -> None:
        owner = self.owner
        seen, silent = owner.activity, 0
        while owner.failure is None:
            await asyncio.sleep(self.options["ping_interval"])
            # Any byte is a sign of life: a PONG may stand behind many megabytes of messages.
            silent = 0 if owner.activity != seen else silent + 1
            seen = owner.activity
            if silent >= 3:
                owner.die("frozen", f"the server has been silent for {silent * self.options['ping_interval']:g} s")
            else:
                self.ping()

    async def _flusher(self) -> None:
        """Nothing is queued: everything is written at once."""

    async def abort(self) -> None:
        """Close the sockets without waiting for anything to be written; call under a deadline."""
        for task in (self._reading_task, self._ping_interval_task, self._flusher_task):
            if task is not None:
                task.cancel()
        transport: Any = self._transport
        if transport is None:
            return
        sockets = []
        for writer in (getattr(transport, "_io_writer", None), getattr(transport, "_bare_io_writer", None)):
            if writer is not None:
                writer.transport.abort()
                sockets.append(writer.transport.get_extra_info("socket"))
        # Waiting for the transport's own end would take for ever after a TLS handshake that failed.
        while True:
            await asyncio.sleep(0)
            if all(sock is None or sock.fileno() == -1 for sock in sockets):
                return


async def connect(
    client: NatsClient,
    server: str,
    url: str,
    creds: Path | None,
    ca: Path | None,
    name: str,
    connect_timeout: float,
    ping_interval: float,
) -> None:
    """Greet the server at `url`; afterwards the read loop runs.

    Raises:
        NatsError: it did not work out, whatever the cause.
    """
    parts = urlsplit(url)
    if parts.scheme not in {"nats", "tls"}:
        raise NatsError("refused", f"{server}: {parts.scheme}:// is not spoken, only nats:// and tls://")
    options: dict[str, Any] = {}
    if creds is not None:
        options |= _credentials(server, creds)
    if ca is not None:
        try:
            options["tls"] = ssl.create_default_context(cafile=str(ca))
        except (OSError, ssl.SSLError) as error:
            raise NatsError("tls", f"the CA file {ca} cannot be used: {error}") from None
    if parts.username is not None and parts.password is not None:
        options |= {"user": unquote(parts.username), "password": unquote(parts.password)}
    elif parts.username is not None:
        options["token"] = unquote(parts.username)
    place = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    try:
        with trio.fail_after(connect_timeout):
            await trio_asyncio.aio_as_trio(client.connect)(
                [place],
                name=name,
                error_cb=_ignore,
                allow_reconnect=False,
                connect_timeout=connect_timeout,
                ping_interval=ping_interval,
                **options,
            )
        client.expect_end_of_tls()
    except Exception as error:
        raise classify(server, error) from None


async def _ignore(error: Exception) -> None:
    """nats-py must have an error callback, and it must not raise; connect() raises the same error itself."""


def _credentials(server: str, creds: Path) -> dict[str, Any]:
    """nats-py's options for a credentials file (JWT and seed), or for a file with nothing but an nkey seed."""
    try:
        text = creds.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise NatsError("auth", f"{server}: the credentials file {creds} cannot be read: {error}") from None
    if "BEGIN NATS USER JWT" in text and "BEGIN USER NKEY SEED" in text:
        return {"user_credentials": str(creds)}
    if text.strip().startswith("SU") and len(text.split()) == 1:
        return {"nkeys_seed_str": text.strip()}
    raise NatsError("auth", f"{server}: the file {creds} holds neither NATS credentials nor an nkey seed")


def classify(server: str, error: Exception) -> NatsError:
    """Why a connection could not be made."""
    if isinstance(error, NatsError):
        return NatsError(error.reason, error.detail if server in error.detail else f"{server}: {error.detail}")
    text = str(error) or type(error).__name__
    match error:
        case ssl.SSLError():
            reason = "tls"
        case TimeoutError() | trio.TooSlowError() if not getattr(error, "errno", None):
            reason, text = "timeout", "no answer in time"
        case OSError():
            reason = "unreachable"
            # asyncio words a refusal, and several, its own way: with numbers, and the address once more.
            numbers = set(re.findall(r"\[Errno (\d+)\]", text))
            if len(numbers) == 1:
                text = os.strerror(int(numbers.pop())).lower()
            text = re.sub(r"^\[Errno -\d+\] ", "", text)  # of a name that is not found
        case nats.errors.Error():
            text = text.removeprefix("nats: ").strip("'")
            reason = error_reason(text.lower())
        case _:
            # What remains is nkeys refusing a seed, and the parser refusing a greeting.
            reason = "auth" if "nkeys" in type(error).__module__ else "protocol"
    return NatsError(reason, f"{server}: {text}")
