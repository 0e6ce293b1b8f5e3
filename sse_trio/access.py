"""Who may do what, and how many at once.

Strategy: every question that must be answered before a request is served has one method here, which answers
or raises `Refused`; routes ask and render. Nothing here writes to a socket, and no refusal repeats what a
stranger sent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from ipaddress import IPv6Address
from typing import Protocol

import trio
from werkzeug.http import parse_cookie

from sse_trio.addresses import (
    DEFAULT_PORTS,
    Address,
    forwarded_for,
    forwarding_header,
    is_loopback_host,
    normalise,
    parse_address,
    split_host,
)
from sse_trio.limits import AtCapacity, Limits, LimitStatistics, Refused, effective_max_connections
from sse_trio.settings import Settings
from sse_trio.subjects import is_pattern, is_subset, matches
from sse_trio.tokens import EVERYONE, Grant, InvalidToken, KeysUnavailable, Tokens

__all__ = [
    "Access",
    "AtCapacity",
    "Grant",
    "HeaderFields",
    "LimitStatistics",
    "Refused",
    "effective_max_connections",
    "forbidden",
    "is_pattern",
    "is_subset",
    "matches",
]

SECURE_COOKIE = "__Secure-sse_trio"
PLAIN_COOKIE = "sse_trio"

PREFLIGHT_MAX_AGE = 600


class HeaderFields(Protocol):
    """What is needed of a request's header fields; Quart's `request.headers` is one."""

    def get(self, key: str, /) -> str | None: ...

    def getlist(self, key: str, /) -> list[str]: ...

    def keys(self) -> Iterable[str]: ...


def unauthorized(detail: str, error: str | None = None) -> Refused:
    """401 as RFC 6750 section 3 wants it: no error code where no token was presented."""
    challenge = 'Bearer realm="sse-trio"'
    if error is not None:
        challenge += f', error="{error}", error_description="{detail}"'
    return Refused(401, "Unauthorized", detail, {"WWW-Authenticate": challenge})


def forbidden(detail: str) -> Refused:
    """403 for one whom we know, and who may not do this."""
    challenge = 'Bearer realm="sse-trio", error="insufficient_scope"'
    return Refused(403, "Forbidden", detail, {"WWW-Authenticate": challenge})


class Access:
    """One process's rules. `clock` gives wall-clock seconds (for `exp`), `timer` monotonic ones (for the
    rate).

    `max_connections` is what the caller has found out with `effective_max_connections`; without it the
    settings' own.

    Raises:
        SettingsError: the secret or the JWKS file cannot be used.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        clock: Callable[[], float] = time.time,
        timer: Callable[[], float] = time.monotonic,
        max_connections: int | None = None,
    ) -> None:
        self._settings = settings
        self._limits = Limits(settings, timer=timer, max_connections=max_connections)
        self.authenticates = settings.jwt_secret is not None or settings.jwt_jwks is not None
        self._tokens = Tokens(settings, clock) if self.authenticates else None
        self._hosts = None if "*" in settings.allowed_hosts else [_allowed_host(h) for h in settings.allowed_hosts]

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Say what an operator should know, and keep the JWKS fresh, for ever; returns where there is none."""
        if self._tokens is not None:
            await self._tokens.run(task_status=task_status)
        else:
            task_status.started()
            await trio.lowlevel.checkpoint()

    # Who may ask: framing, Host, Origin, CORS

    def check_framing(self, headers: HeaderFields) -> None:
        """Raise `Refused` (400) for a request with two lengths, and have its connection closed.

        Whoever stands in between may have read the other length, and taken the rest for a request (RFC 9112, 6.1).
        """
        if headers.get("Transfer-Encoding") is not None and headers.get("Content-Length") is not None:
            detail = "both Transfer-Encoding and Content-Length"
            raise Refused(400, "Bad request", detail, {"Connection": "close"})

    def check_host(self, host: str | None) -> None:
        """Raise `Refused` (403) for a Host that is not on the list, which is how a rebound name shows."""
        if self._hosts is None:
            return
        parts = split_host(host) if host else None
        if parts is None or not any(
            (name == parts[0] or (name.startswith("*.") and parts[0].endswith(name[1:]))) and port in (None, parts[1])
            for name, port in self._hosts
        ):
            raise Refused(403, "Forbidden", "this server does not answer to that Host")

    def check_origin(
        self,
        origin: str | None,
        host: str | None,
        scheme: str,
        method: str = "GET",
        *,
        site: str | None = None,
        mode: str | None = None,
    ) -> None:
        """Raise `Refused` (403) for an Origin that is present, not ours, and not allowed.

        `site` and `mode` are Sec-Fetch-Site and Sec-Fetch-Mode: a browser tells there what it keeps from
        Origin, as with an `<img>` on another site. Links to a page stay possible: a GET that navigates is
        let through.
        """
        if "*" in self._settings.allowed_origins:
            return
        if origin is None:
            navigates = mode == "navigate" and method in {"GET", "HEAD"}
            if site not in {"cross-site", "same-site"} or navigates:
                return
        elif origin.lower() in self._settings.allowed_origins or _is_same_origin(origin, host, scheme):
            return
        raise Refused(403, "Forbidden", "requests from this Origin are not allowed")

    def cors_headers(self, origin: str | None) -> dict[str, str]:
        """What an answer carries so that an allowed Origin may read it; credentials only for one that is
        named.
        """
        headers = {"Vary": "Origin"}
        if origin is not None and origin != "*" and origin.lower() in self._settings.allowed_origins:
            headers |= {"Access-Control-Allow-Origin": origin, "Access-Control-Allow-Credentials": "true"}
        elif "*" in self._settings.allowed_origins:
            headers["Access-Control-Allow-Origin"] = "*"
        return headers

    def preflight_headers(self, origin: str | None, methods: Iterable[str] = ("GET", "HEAD")) -> dict[str, str]:
        """The answer to a preflight; without an allowed Origin it allows nothing."""
        headers = self.cors_headers(origin)
        if "Access-Control-Allow-Origin" in headers:
            headers |= {
                "Access-Control-Allow-Methods": ", ".join(methods),
                "Access-Control-Allow-Headers": "Authorization, Cache-Control, Content-Type, Last-Event-ID",
                "Access-Control-Max-Age": str(PREFLIGHT_MAX_AGE),
            }
        return headers

    # Who it is

    async def authenticate(self, headers: HeaderFields, *, method: str, secure: bool, local: bool = False) -> Grant:
        """What the sender of this request may do.

        A token comes as `Authorization: Bearer`, or, for GET, as a cookie; the header wins, and a bad token
        there is not rescued by a good cookie. A token anywhere else, as in the query, is none. `secure`: the
        client speaks TLS (to us or to a proxy); then the cookie without the `__Secure-` prefix, which
        anybody on the path could have set, does not count. While authentication is off, everybody may
        listen, and a `local` sender may do everything.

        Raises:
            Refused: 400, 401, or 503 while the keys' source has not answered yet.
        """
        if self._tokens is None:
            await trio.lowlevel.checkpoint()
            return replace(EVERYONE, is_admin=local, may_share=local)
        token = self._presented(headers, method, secure)
        try:
            return await self._tokens.check(token)
        except InvalidToken as error:
            raise unauthorized(str(error), "invalid_token") from None
        except KeysUnavailable:
            raise Refused(
                503,
                "Service unavailable",
                "the keys that tokens are checked with are not here yet",
                {"Retry-After": "10"},
            ) from None

    def _presented(self, headers: HeaderFields, method: str, secure: bool) -> str:
        fields = headers.getlist("Authorization")
        if len(fields) > 1:
            raise Refused(400, "Bad request", "more than one Authorization header")
        if fields:
            scheme, _, token = fields[0].strip().partition(" ")
            if scheme.lower() == "bearer":
                return token.strip()
        elif method == "GET":
            cookies = parse_cookie("; ".join(headers.getlist("Cookie")))
            token = cookies.get(SECURE_COOKIE) or ("" if secure else cookies.get(PLAIN_COOKIE, ""))
            if token:
                return token
        raise unauthorized("a token is needed")

    def is_local(self, peer: str | None, host: str | None, headers: HeaderFields, origin: str | None = None) -> bool:
        """Whether somebody on this machine asks directly: loopback peer and Host, nobody in between, no
        other origin.

        A proxy on this machine looks just like that unless it adds a forwarding header, as docs/proxies.md makes
        each do.
        """
        address = parse_address(peer) if peer else None
        if address is None or not address.is_loopback:
            return False
        if not is_loopback_host(host) or forwarding_header(headers.keys()):
            return False
        if headers.get("Sec-Fetch-Site") not in {None, "same-origin", "none"}:
            return False
        return origin is None or _is_same_origin(origin, host, "http") or _is_same_origin(origin, host, "https")

    def client_address(self, peer: str, headers: HeaderFields) -> str:
        """The address of the client itself: the right-most one that is not of a trusted proxy.

        Only what a trusted proxy hands us is read. Where X-Forwarded-For and Forwarded are both there and
        name different clients, one of them came from the client, and there is no telling which: then the
        proxy's own address counts.
        """
        address = parse_address(peer)
        if address is None or not self._is_trusted(address):
            return normalise(peer)
        lists = []
        if lines := headers.getlist("X-Forwarded-For"):
            lists.append([hop for line in lines for hop in line.split(",")])
        if lines := headers.getlist("Forwarded"):
            lists.append(forwarded_for(lines))
        found = {self._rightmost_stranger(address, hops) for hops in lists}
        return str(found.pop() if len(found) == 1 else address)

    def _rightmost_stranger(self, peer: Address, hops: list[str]) -> Address:
        nearest = peer
        for hop in reversed(hops):
            address = parse_address(hop)
            if address is None:
                break  # what this hop hides, nobody further left can be believed about
            nearest = address
            if not self._is_trusted(address):
                break
        return nearest

    def is_secure(self, peer: str | None, headers: HeaderFields, scheme: str) -> bool:
        """Whether the client speaks TLS, to us or, as a trusted proxy tells, to it."""
        if scheme == "https":
            return True
        address = parse_address(peer) if peer else None
        if address is None or not self._is_trusted(address):
            return False
        told = (headers.get("X-Forwarded-Proto") or "").rpartition(",")[2].strip().lower()
        last_hop = (headers.get("Forwarded") or "").rpartition(",")[2].replace('"', "").lower()
        return told == "https" or "proto=https" in last_hop

    def _is_trusted(self, address: Address) -> bool:
        return any(address in network for network in self._settings.trusted_proxies)

    # How many

    def admit(self, address: str, subject: str | None) -> AbstractContextManager[None]:
        """Count one stream while the block runs; entering it may raise `AtCapacity`. See `Limits.admit`."""
        return self._limits.admit(address, subject)

    def statistics(self) -> LimitStatistics:
        """How many streams are counted now, and how many were refused."""
        return self._limits.statistics()


def _allowed_host(entry: str) -> tuple[str, int | None]:
    """An entry of SSE_ALLOWED_HOSTS: name or address, or `*.name`; with a port it allows only that one."""
    if (address := parse_address(entry)) is not None and entry.count(":") != 1 and not entry.startswith("["):
        return (f"[{address}]" if isinstance(address, IPv6Address) else str(address)), None
    wild = "*." if entry.startswith("*.") else ""
    parts = split_host(entry.removeprefix("*."))
    if parts is None:
        return entry, None
    return wild + parts[0], parts[1]


def _is_same_origin(origin: str, host: str | None, scheme: str) -> bool:
    """Whether this Origin is the one that the request was sent to.

    An https Origin with our own host name is ours even where we see http: TLS ends at a proxy then.
    """
    origin_scheme, _, authority = origin.lower().partition("://")
    if origin_scheme != "https" and origin_scheme != scheme:
        return False
    default = DEFAULT_PORTS.get(origin_scheme)
    theirs, ours = split_host(authority), split_host(host) if host else None
    if theirs is None or ours is None:
        return False
    return (theirs[0], theirs[1] or default) == (ours[0], ours[1] or default)
