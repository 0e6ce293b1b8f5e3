"""What a discovery is, once more: slow, obvious, and by other means than the code under test.

A reader of JSON character by character (RFC 8259), a calendar of arithmetic (no datetime), escapes byte by byte (no
urllib), and the fields one after the other (no pydantic): so that a fuzzer can ask two that know nothing of each other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

MAX_PAYLOAD = 65536
MAX_DEPTH = 100
MAX_DIGITS = 4300
"""Of an integer: Python's limit, and so a part of what is refused."""

TYPES = ["Pattern", "Anomaly", "Connection", "Solution", "Question", "Insight"]
WHITE = " \t\n\r"
ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
UNRESERVED = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~"


class Refused(Exception):
    """It is no discovery; the reason is one of oversized, encoding, json, schema."""


@dataclass
class Plain:
    """A discovery as its readers see it."""

    object: dict[str, Any]
    kind: str
    uri: str


def read(payload: bytes) -> Plain:
    """The discovery in these bytes; `Refused` with the reason for what is none."""
    if len(payload) > MAX_PAYLOAD:
        raise Refused("oversized")
    try:
        text = payload.decode("utf-8", "strict")
    except UnicodeDecodeError:
        raise Refused("encoding") from None
    value = Reader(text).document()
    if any("\ud800" <= character <= "\udfff" for said in strings(value) for character in said):
        raise Refused("encoding")
    if not isinstance(value, dict):
        raise Refused("schema")
    if depth(value) > MAX_DEPTH:
        raise Refused("json")
    return of_object(value)


def parts(value: Any) -> list[Any]:
    """What a value is made of."""
    return [*value, *value.values()] if isinstance(value, dict) else list(value) if isinstance(value, list) else []


def strings(value: Any) -> list[str]:
    """All strings in a value, keys included."""
    return [value] if isinstance(value, str) else [said for part in parts(value) for said in strings(part)]


def depth(value: Any) -> int:
    """How many levels of objects and lists it has."""
    return 1 + max(map(depth, parts(value)), default=0) if isinstance(value, dict | list) else 0


class Reader:
    """One JSON text, read from its first character to its last."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def document(self) -> Any:
        self.space()
        value = self.value()
        self.space()
        if self.at != len(self.text):
            raise Refused("json")
        return value

    def here(self) -> str:
        return self.text[self.at] if self.at < len(self.text) else ""

    def take(self, expected: str) -> None:
        if self.text[self.at : self.at + len(expected)] != expected:
            raise Refused("json")
        self.at += len(expected)

    def space(self) -> None:
        while self.here() and self.here() in WHITE:
            self.at += 1

    def value(self) -> Any:
        match self.here():
            case "{":
                return self.members()
            case "[":
                return self.elements()
            case '"':
                return self.string()
            case "t":
                self.take("true")
                return True
            case "f":
                self.take("false")
                return False
            case "n":
                self.take("null")
                return None
            case _:
                return self.number()

    def members(self) -> dict[str, Any]:
        members: dict[str, Any] = {}
        self.take("{")
        self.space()
        if self.here() == "}":
            self.at += 1
            return members
        while True:
            self.space()
            if self.here() != '"':
                raise Refused("json")
            name = self.string()
            self.space()
            self.take(":")
            self.space()
            members[name] = self.value()  # of two with one name the last counts
            self.space()
            if self.here() == "}":
                self.at += 1
                return members
            self.take(",")

    def elements(self) -> list[Any]:
        elements: list[Any] = []
        self.take("[")
        self.space()
        if self.here() == "]":
            self.at += 1
            return elements
        while True:
            self.space()
            elements.append(self.value())
            self.space()
            if self.here() == "]":
                self.at += 1
                return elements
            self.take(",")

    def string(self) -> str:
        self.take('"')
        said = ""
        while (character := self.here()) != '"':
            if character == "" or character < " ":
                raise Refused("json")
            if character != "\\":
                said += character
                self.at += 1
                continue
            self.at += 1
            letter = self.here()
            if letter == "u":
                self.at += 1
                said += self.escaped()
            elif letter and letter in ESCAPES:
                self.at += 1
                said += ESCAPES[letter]
            else:
                raise Refused("json")
        self.at += 1
        return said

    def escaped(self) -> str:
        """What stands behind a backslash and u; two halves of a character are one, if they stand together."""
        unit = self.four_digits()
        if 0xD800 <= unit <= 0xDBFF and self.text[self.at : self.at + 2] == "\\u":
            before = self.at
            self.at += 2
            low = self.four_digits()
            if 0xDC00 <= low <= 0xDFFF:
                return chr(0x10000 + (unit - 0xD800) * 0x400 + (low - 0xDC00))
            self.at = before
        return chr(unit)

    def four_digits(self) -> int:
        digits = self.text[self.at : self.at + 4]
        if not re.fullmatch("[0-9A-Fa-f]{4}", digits):
            raise Refused("json")
        self.at += 4
        return int(digits, 16)

    def number(self) -> int | float:
        found = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?").match(self.text, self.at)
        if found is None:
            raise Refused("json")
        self.at = found.end()
        if found[1] is None and found[2] is None:
            if len(found[0].lstrip("-")) > MAX_DIGITS:
                raise Refused("json")
            return int(found[0])
        value = float(found[0])
        if value in (float("inf"), float("-inf")):
            raise Refused("json")
        return value


def of_object(value: dict[str, Any]) -> Plain:
    """What the fields of a JSON object make."""

    def text(name: str) -> str:
        if not isinstance(value.get(name), str):
            raise Refused("schema")
        return str(value[name])

    agent, content = text("agent_id"), text("content")
    text("agent_role")
    if agent in {"", ".", ".."}:
        raise Refused("schema")
    if value.get("related_to") is not None:
        text("related_to")
    kinds = [kind for kind in TYPES if same_but_for_case(kind, text("discovery_type"))]
    confidence = value.get("confidence")
    if not kinds or isinstance(confidence, bool) or not isinstance(confidence, int | float) or not 0 <= confidence <= 1:
        raise Refused("schema")
    seconds = unix_seconds(text("timestamp"))
    slug = escape(content[:20].lower().replace(" ", "-"))
    return Plain(value, kinds[0], f"discovery://agents/{escape(agent)}/discoveries/{seconds}-{kinds[0]}-{slug}")


def same_but_for_case(kind: str, said: str) -> bool:
    """In ASCII: no other letter has a letter of these names as its lower case."""
    return "".join(chr(ord(letter) + 32) if "A" <= letter <= "Z" else letter for letter in said) == kind.lower()


def escape(text: str) -> str:
    return "".join(chr(byte) if chr(byte) in UNRESERVED else f"%{byte:02X}" for byte in text.encode("utf-8"))


def unix_seconds(timestamp: str) -> int:
    """The whole seconds of an RFC 3339 timestamp; a leap second is the one after it, as POSIX counts."""
    found = re.fullmatch(
        r"([0-9]{4})-([0-9]{2})-([0-9]{2})[Tt]([0-9]{2}):([0-9]{2}):([0-9]{2})(?:\.[0-9]+)?"
        r"(?:[Zz]|([-+])([0-9]{2}):([0-9]{2}))",
        timestamp,
    )
    if found is None:
        raise Refused("schema")
    year, month, day, hour, minute, second = (int(found[n]) for n in range(1, 7))
    away_hours, away_minutes = int(found[8] or 0), int(found[9] or 0)
    is_leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    days = [31, 29 if is_leap else 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]
    if not (
        year >= 1
        and 1 <= month <= 12
        and 1 <= day <= days[month - 1]
        and hour <= 23
        and minute <= 59
        and second <= 60
        and away_hours <= 23
        and away_minutes <= 59
    ):
        raise Refused("schema")
    if (year, month, day, hour, minute, second) == (9999, 12, 31, 23, 59, 60):
        raise Refused("schema")  # there is no moment after it that could be named
    past = year - 1
    total = past * 365 + past // 4 - past // 100 + past // 400 + sum(days[: month - 1]) + day - 1 - 719162
    away = (away_hours * 60 + away_minutes) * (-1 if found[7] == "-" else 1)
    return ((total * 24 + hour) * 60 + minute - away) * 60 + second
