"""What is said between a NATS client and its server: messages, errors, and the lines that we write. All of it pure.

Strategy: a message stays as it came, and is looked into when somebody asks, since most are looked at once or never.
What goes out is checked here: no subject, header name or value can break out of its place in the protocol.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["Message", "NatsError", "NoResponders", "RequestTimeout", "error_reason", "is_subject", "publish_command"]


class NatsError(Exception):
    """NATS cannot be used; `reason` is one word to count and compare, `detail` one line without credentials.

    Reasons: `unreachable`, `timeout`, `frozen`, `tls`, `auth`, `permissions`, `refused`, `protocol`, `closed`.
    """

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = " ".join(detail.split()) or reason
        super().__init__(f"{self.reason}: {self.detail}")

    @property
    def advice(self) -> str:
        """A line for whoever set NATS up: what is wrong, and what can be done about it."""
        place, colon, why = self.detail.partition(": ")
        if self.reason == "unreachable" and colon and " " not in place:
            return f"cannot reach NATS at {place} ({why}): start it (nats-server -js), or set NATS_URL"
        remedy = {
            "auth": "check the user info in NATS_URL, or NATS_CREDS",
            "tls": "check tls:// in NATS_URL, and NATS_CA",
        }.get(self.reason, "see its log")
        return f"{self.detail}; {remedy}"


class NoResponders(NatsError):
    """Nobody listens on the subject of a request (for a JetStream request: there is no JetStream)."""


class RequestTimeout(NatsError):
    """No answer came in time; the connection itself is fine."""


class Message(NamedTuple):
    """One message, as it came: nothing is decoded before somebody asks."""

    raw_subject: bytes
    reply: bytes
    payload: bytes
    head: bytes | None
    """The header block with its `NATS/1.0` line."""

    @property
    def subject(self) -> str:
        # A subject may hold any bytes; what is not UTF-8 gets replacement characters.
        return self.raw_subject.decode("utf-8", "replace")

    @property
    def status(self) -> int | None:
        """The inline status code (`NATS/1.0 404 …`); None for an ordinary message."""
        if self.head is None:
            return None
        code = self.head[8:12].strip()
        return int(code) if code.isdigit() else None

    @property
    def is_stored(self) -> bool:
        """Whether a stream gave this, having added where it has it. Its status line, if any, is the publisher's."""
        return self.head is not None and b"\r\nNats-Sequence:" in self.head

    @property
    def description(self) -> str:
        """The text behind the status code."""
        line = (self.head or b"").partition(b"\r\n")[0]
        return line[12:].strip().decode("utf-8", "replace")

    @property
    def headers(self) -> dict[str, str]:
        """Header fields; of several with one name the last."""
        fields = {}
        for line in (self.head or b"").split(b"\r\n")[1:]:
            name, colon, value = line.partition(b":")
            if colon:
                fields[name.strip().decode("utf-8", "replace")] = value.strip().decode("utf-8", "replace")
        return fields


def error_reason(text: str) -> str:
    """The reason of a `NatsError` for what a server says in an error line (lower case)."""
    if "authoriz" in text or "authentic" in text or "credentials" in text:
        return "auth"
    if "permission" in text:
        return "permissions"
    if "secure connection" in text or "tls" in text:
        return "tls"
    if "stale" in text:
        return "frozen"
    if "info message" in text or "empty response" in text:
        return "protocol"
    return "refused"


def is_subject(text: str) -> bool:
    return bool(text) and not any(c <= " " or c == "\x7f" for c in text)


def header_block(headers: Mapping[str, str]) -> bytes:
    lines = ["NATS/1.0"]
    for name, value in headers.items():
        if not name or any(c <= " " or c >= "\x7f" or c == ":" for c in name):
            raise ValueError(f"{name!r} is no header name")
        if any(c in "\r\n\0" for c in value):
            raise ValueError(f"the value of header {name} has a line break")
        lines.append(f"{name}: {value}")
    return "\r\n".join([*lines, "", ""]).encode()


def publish_command(
    subject: str, payload: bytes, *, reply: str = "", headers: Mapping[str, str] | None = None, limit: int
) -> bytes:
    """The bytes that publish one message of at most `limit` bytes.

    Raises:
        ValueError: the subject or a header would break the protocol.
        NatsError: the message is too large for the server (`refused`).
    """
    if not is_subject(subject) or (reply and not is_subject(reply)):
        raise ValueError(f"{subject!r} is no subject to publish to")
    target = f"{subject} {reply}" if reply else subject
    head = header_block(headers) if headers else b""
    total = len(head) + len(payload)
    if total > limit:
        raise NatsError("refused", f"the message has {total} bytes, and the server takes at most {limit}")
    line = f"HPUB {target} {len(head)} {total}\r\n" if head else f"PUB {target} {total}\r\n"
    return b"".join((line.encode(), head, payload, b"\r\n"))
