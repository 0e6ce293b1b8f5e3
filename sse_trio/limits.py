"""How many streams at once: per process, per address, per subject of a token, and how many new ones a second.

Strategy: counting is a synchronous context manager around the stream, so that cancellation has nowhere to
land inside it: when no stream runs, every count is gone. New streams are refused, old ones never evicted
(evicting makes clients take turns in throwing each other out). The rate is a token bucket that holds as many
tokens as there may be streams: after a redeploy all of them may come back at once, and only who keeps coming
back meets it.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_network
from typing import Literal

from sse_trio.addresses import parse_address
from sse_trio.settings import Settings

__all__ = ["FD_RESERVE", "AtCapacity", "LimitStatistics", "Limits", "Refused", "effective_max_connections"]

FD_RESERVE = 128
"""File descriptors kept for what is no stream: NATS, listeners, logs, other requests, a moment of
accept().
"""

RATE_BURST = 10000
"""Streams that may come at once where their number has no limit."""

Limit = Literal["process", "address", "subject", "rate"]


class Refused(Exception):
    """This request is not served. Rendered as problem+json; `detail` is for its sender and repeats nothing
    of theirs.
    """

    def __init__(self, status: int, title: str, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(f"{status} {title}: {detail}")
        self.status = status
        self.title = title
        self.detail = detail
        self.headers = dict(headers or {})


class AtCapacity(Refused):
    """No further stream now. `limit` names the limit that is reached, for metrics."""

    def __init__(self, limit: Limit, detail: str, retry_after: int) -> None:
        super().__init__(503, "At capacity", detail, {"Retry-After": str(retry_after)})
        self.limit: Limit = limit


@dataclass(frozen=True, slots=True)
class LimitStatistics:
    """How many streams run, by how many addresses and subjects, and how many were refused, by limit."""

    connections: int
    addresses: int
    subjects: int
    refused: Mapping[Limit, int]


class Limits:
    """The counts of one process. `timer` gives monotonic seconds.

    `max_connections` is what the caller has found out with `effective_max_connections`; without it the
    settings' own.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        timer: Callable[[], float] = time.monotonic,
        max_connections: int | None = None,
    ) -> None:
        self.max_connections = settings.max_connections if max_connections is None else max_connections
        self.max_per_address = settings.max_connections_per_ip
        self.max_per_subject = settings.max_connections_per_subject
        self.rate = settings.connection_rate
        self._timer = timer
        self._connections = 0
        self._by_address: dict[str, int] = {}
        self._by_subject: dict[str, int] = {}
        self._refused: dict[Limit, int] = {"process": 0, "address": 0, "subject": 0, "rate": 0}
        self._burst = max(float(self.max_connections or RATE_BURST), self.rate)
        self._allowance = self._burst
        self._counted_at = timer()

    @contextmanager
    def admit(self, address: str, subject: str | None) -> Iterator[None]:
        """Count one stream while the block runs.

        Synchronous: there is no await between the check and the count, nor between the block's end and the
        release.

        Raises:
            AtCapacity: one limit is reached; the block does not run, and nothing was counted.
        """
        source = _bucket(address)
        self._check_limits(source, subject)
        self._connections += 1
        self._by_address[source] = self._by_address.get(source, 0) + 1
        if subject is not None:
            self._by_subject[subject] = self._by_subject.get(subject, 0) + 1
        try:
            yield
        finally:
            self._connections -= 1
            _release(self._by_address, source)
            if subject is not None:
                _release(self._by_subject, subject)

    def _check_limits(self, source: str, subject: str | None) -> None:
        if self.max_connections and self._connections >= self.max_connections:
            self._refuse("process", "this server has as many streams as it can serve", 30)
        if self.max_per_address and self._by_address.get(source, 0) >= self.max_per_address:
            self._refuse("address", "there are too many streams from this address", 30)
        of_subject = 0 if subject is None else self._by_subject.get(subject, 0)
        if self.max_per_subject and of_subject >= self.max_per_subject:
            self._refuse("subject", "there are too many streams with this token's subject", 30)
        if self.rate:
            now = self._timer()
            self._allowance = min(self._burst, self._allowance + max(0.0, now - self._counted_at) * self.rate)
            self._counted_at = now
            if self._allowance < 1:
                self._refuse("rate", "too many streams are being opened", 5)
            self._allowance -= 1

    def _refuse(self, limit: Limit, detail: str, retry_after: int) -> None:
        self._refused[limit] += 1
        raise AtCapacity(limit, detail, retry_after)

    def statistics(self) -> LimitStatistics:
        """A snapshot of the counts."""
        return LimitStatistics(self._connections, len(self._by_address), len(self._by_subject), dict(self._refused))


def _release(counts: dict[str, int], key: str) -> None:
    if counts[key] == 1:
        del counts[key]
    else:
        counts[key] -= 1


def _bucket(address: str) -> str:
    """What counts as one address: of IPv6 the /64, which is what one subscriber gets."""
    parsed = parse_address(address)
    if isinstance(parsed, IPv6Address):
        return str(ip_network((int(parsed) >> 64 << 64, 64)))
    return address if parsed is None else str(parsed)


def effective_max_connections(settings: Settings) -> tuple[int, str | None]:
    """How many streams this process may serve, and a warning where that is fewer than the settings ask for.

    Raises the soft limit of open files to the hard one first: a stream is a file, and a process that runs
    out of them can accept nobody, not even who asks for its health.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (OSError, ValueError):
            pass  # a hard limit above what the kernel allows any process: the soft one it is
    if soft == resource.RLIM_INFINITY:
        return settings.max_connections, None
    possible = max(1, soft - FD_RESERVE)
    wanted = settings.max_connections
    if wanted == 0:
        return possible, None
    if wanted <= possible:
        return wanted, None
    return possible, (
        f"SSE_MAX_CONNECTIONS is {wanted}, but {soft} open files allow {possible} streams; "
        "raise the limit of open files (ulimit -n, LimitNOFILE)"
    )
