"""Addresses as HTTP writes them: Host, Origin, Forwarded, X-Forwarded-For; and what of them is this machine.

Pure functions over text that strangers send: for any input they answer or say None, and never raise. An
address is normalised once (`::ffff:10.0.0.1` is `10.0.0.1`), so that one peer has one name in limits and
logs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address

__all__ = [
    "Address",
    "forwarded_for",
    "forwarding_header",
    "is_loopback_host",
    "normalise",
    "parse_address",
    "split_host",
]

Address = IPv4Address | IPv6Address

DEFAULT_PORTS = {"http": 80, "https": 443}

_HOST = re.compile(
    r"(?P<name>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?\.?)(?::(?P<port>[0-9]{1,5}))?"
)

# One `name=value` of RFC 7239 section 4: the value is a token or a quoted string.
_PAIR = re.compile(r'\s*(?P<name>[!#$%&\'*+.^_`|~0-9A-Za-z-]+)=(?P<value>"(?:[^"\\]|\\.)*"|[^\s",;]*)\s*')

_FORWARDING = frozenset(
    {
        "forwarded",
        "via",
        "x-real-ip",
        "x-client-ip",
        "x-cluster-client-ip",
        "x-original-forwarded-for",
        "x-original-host",
        "true-client-ip",
        "cf-connecting-ip",
        "fastly-client-ip",
    }
)


@lru_cache(4096)
def parse_address(text: str) -> Address | None:
    """The address that `text` spells, with or without a port, or None (`unknown`, `_hidden`, a name,
    nonsense).
    """
    text = text.strip()
    if text.startswith("["):
        inside, bracket, tail = text[1:].partition("]")
        if not bracket or (tail and not re.fullmatch(r":[0-9_A-Za-z.-]+", tail)):
            return None
        text = inside
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text)
    except ValueError:
        return None
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def normalise(text: str) -> str:
    """One spelling for one address; what is no address (a socket's path) stays as it is."""
    address = parse_address(text)
    return text if address is None else str(address)


def forwarded_for(lines: Iterable[str]) -> list[str]:
    """The `for` of each hop in Forwarded header lines (RFC 7239), in order; "" for a hop without one.

    From where a line stops to follow the grammar, the rest of it counts as one hop that says nothing: an
    address that a sender tried to hide behind broken quoting must not become the right-most one.
    """
    hops: list[str] = []
    for line in lines:
        position, who, broken = 0, "", False
        while position <= len(line):
            pair = _PAIR.match(line, position)
            if pair is None:
                broken = bool(line[position:].strip())
                break
            if pair["name"].lower() == "for":
                value = pair["value"]
                who = re.sub(r"\\(.)", r"\1", value[1:-1]) if value.startswith('"') else value
            position = pair.end()
            separator = line[position : position + 1]
            if separator == ",":
                hops.append(who)
                who = ""
            elif separator not in (";", ""):
                broken = True
                break
            position += 1
        hops.append("" if broken else who)
    return hops


def forwarding_header(names: Iterable[str]) -> bool:
    """Whether one of these header names says that somebody passed this request on."""
    return any(name.lower() in _FORWARDING or name.lower().startswith("x-forwarded") for name in names)


def split_host(host: str) -> tuple[str, int | None] | None:
    """Lower-case name (IPv6 in brackets) and port of a Host header, or None where it is malformed."""
    found = _HOST.fullmatch(host.strip())
    if found is None:
        return None
    name, port = found["name"].lower().rstrip("."), found["port"]
    if name.startswith("["):
        address = parse_address(name)
        if address is None:
            return None
        name = f"[{address}]" if isinstance(address, IPv6Address) else str(address)
    if port is not None and int(port) > 65535:
        return None
    return name, None if port is None else int(port)


def is_loopback_host(host: str | None) -> bool:
    """Whether a Host header names this machine: localhost, a name under it, or a loopback address."""
    parts = split_host(host) if host else None
    if parts is None:
        return False
    name = parts[0]
    address = parse_address(name)
    if address is not None:
        return address.is_loopback
    return name == "localhost" or name.endswith(".localhost")
