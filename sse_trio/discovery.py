"""The Discovery: what an agent shares over NATS, read strictly, and the names it has outside.

Strategy: `decode` is the only way in. It takes any bytes, and either returns a Discovery, every name of which
(URI, id, subject) is safe to put into a frame, a URL or a log, or raises `InvalidDiscovery`. What is refused
is what would mean different things to different readers: more than 64 KiB, not UTF-8, lone surrogates, NaN
and Infinity, nesting that not every parser takes, wrong types. What is not known is kept: the payload stays
as it came.

Ten thousand of these live in history, so a Discovery holds what is needed often (what filters look at, and
the URI, made once) and its payload; the rest is parsed again when somebody asks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal, NoReturn, get_args
from urllib.parse import quote

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

__all__ = [
    "DISCOVERY_TYPES",
    "MAX_PAYLOAD",
    "Discovery",
    "DiscoveryType",
    "InvalidDiscovery",
    "build",
    "decode",
    "parse",
    "segment",
    "subject_for",
]

DiscoveryType = Literal["Pattern", "Anomaly", "Connection", "Solution", "Question", "Insight"]
Reason = Literal["oversized", "encoding", "json", "schema"]

DISCOVERY_TYPES: tuple[DiscoveryType, ...] = get_args(DiscoveryType)

MAX_PAYLOAD = 65536
"""Bytes that a payload may have."""

MAX_DEPTH = 100
"""Levels that JSON may nest: Python's parser and serialiser give up at different depths, which depend on the
caller.
"""

_MAX_MESSAGE = 1000
_CANONICAL: dict[str, DiscoveryType] = {name.lower(): name for name in DISCOVERY_TYPES}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# RFC 3339 section 5.6, and no more of ISO 8601 than that. The second 60 is taken out before datetime sees it.
_RFC3339 = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt]([01][0-9]|2[0-3]):[0-5][0-9]:([0-5][0-9]|60)(\.[0-9]+)?"
    r"([Zz]|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
)
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_UNRESERVED = re.compile(r"[A-Za-z0-9._~-]*")


class InvalidDiscovery(ValueError):
    """These bytes are no discovery.

    `reason` is what is counted; `errors` names each bad field of a JSON object with what it should be (the
    field is "" where the fault is not a field's). The text is one line of printable ASCII, bounded, and safe
    to log.
    """

    def __init__(self, reason: Reason, message: str, errors: list[dict[str, str]] | None = None) -> None:
        self.reason: Reason = reason
        self.errors = errors if errors is not None else [{"field": "", "message": _one_line(message)}]
        super().__init__(_one_line(f"{reason}: {message}"))


@dataclass(frozen=True, slots=True, eq=False)
class Discovery:
    """One discovery. Equal only to itself: two agents may well say the same thing."""

    agent_id: str
    agent_role: str
    discovery_type: DiscoveryType
    confidence: float
    timestamp: datetime
    """With its offset, to the microsecond."""
    related_to: str | None
    uri: str
    """Names it to MCP clients: `discovery://agents/{agent_id}/discoveries/{discovery_id}`."""
    payload: bytes
    """The JSON object, byte for byte as it was published."""

    @property
    def discovery_id(self) -> str:
        """The last segment of its URI: `{unix seconds}-{Type}-{slug}`, percent-encoded. Not unique."""
        return self.uri.rpartition("/")[2]

    @property
    def content(self) -> str:
        """What was discovered. Not kept beside the payload, so each access parses it."""
        content: str = self.published()["content"]
        return content

    def published(self) -> dict[str, Any]:
        """A new dict of the whole object as it was published, with keys that we do not know."""
        published: dict[str, Any] = json.loads(self.payload)
        return published


def decode(payload: bytes) -> Discovery:
    """The discovery in a message.

    Raises:
        InvalidDiscovery: whatever the bytes are, nothing else is raised.
    """
    fields = _validated(parse(payload))
    kind, timestamp = fields.discovery_type, fields.timestamp
    since = timestamp - _EPOCH
    # Floor: days and seconds of a timedelta do not know the microseconds, which are never negative.
    seconds = since.days * 86400 + since.seconds
    slug = segment(fields.content[:20].lower().replace(" ", "-"))
    uri = f"discovery://agents/{segment(fields.agent_id)}/discoveries/{seconds}-{kind}-{slug}"
    return Discovery(
        agent_id=fields.agent_id,
        agent_role=fields.agent_role,
        discovery_type=kind,
        confidence=fields.confidence,
        timestamp=timestamp,
        related_to=fields.related_to,
        uri=uri,
        payload=payload,
    )


def build(fields: Mapping[str, Any], *, now: datetime | None = None) -> Discovery:
    """A discovery to share, of the same fields as a published one; its payload is compact JSON.

    `timestamp` may be missing or None: then it is `now` (aware; default the present). It may also be an aware
    datetime. Keys that are not known are kept. Canonical is what others will read: the type's case, the order
    of keys.

    Raises:
        InvalidDiscovery: `errors` names every bad field.
    """
    given = dict(fields)
    moment = given.get("timestamp")
    if moment is None:
        moment = datetime.now(UTC) if now is None else now
    if isinstance(moment, datetime) and moment.tzinfo is not None:
        moment = moment.isoformat()
    given["timestamp"] = moment
    checked = _validated(given)
    known = {name: given.get(name) for name in _Fields.model_fields}
    try:
        payload = _compact(known | given | {"discovery_type": checked.discovery_type}).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidDiscovery("json", f"cannot be written as JSON: {error}") from None
    return decode(payload)


def subject_for(discovery: Discovery) -> str:
    """The NATS subject that it is shared on."""
    if discovery.discovery_type == "Question":
        return "discoveries.questions"
    if discovery.related_to is not None:
        return "discoveries.connections"
    return "discoveries.insights"


def segment(text: str) -> str:
    """One segment of a URI's path: everything but `A-Za-z0-9-._~` percent-encoded, as UTF-8."""
    return text if _UNRESERVED.fullmatch(text) else quote(text, safe="")


def parse(payload: bytes) -> dict[str, Any]:
    """The JSON object in these bytes, read as strictly as `decode` does, its fields not looked at.

    Raises:
        InvalidDiscovery: whatever the bytes are, nothing else is raised.
    """
    if len(payload) > MAX_PAYLOAD:
        raise InvalidDiscovery("oversized", f"{len(payload)} bytes, and {MAX_PAYLOAD} are allowed")
    try:
        value = _loads(payload.decode())
        if b"\\u" in payload and b"\\ud" in payload.lower():
            # The parser joins pairs of surrogates and lets single ones through; UTF-8 does not have those.
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise InvalidDiscovery("encoding", f"not UTF-8: {error.reason} at byte {error.start}") from None
    except UnicodeEncodeError:
        raise _lone_surrogate(value) from None
    except json.JSONDecodeError as error:
        raise InvalidDiscovery("json", f"not JSON: {error}") from None
    except _NotANumber as error:
        raise InvalidDiscovery("json", str(error)) from None
    except ValueError:
        raise InvalidDiscovery("json", "an integer has too many digits") from None
    except RecursionError:
        raise InvalidDiscovery("json", _TOO_DEEP) from None
    if not isinstance(value, dict):
        raise InvalidDiscovery("schema", "expected a JSON object")
    # No payload nests deeper than it has brackets, so nearly all are done here.
    if payload.count(b"{") + payload.count(b"[") > MAX_DEPTH and _deeper_than(value, MAX_DEPTH):
        raise InvalidDiscovery("json", _TOO_DEEP)
    return value


_TOO_DEEP = f"nested deeper than {MAX_DEPTH} levels"


def _lone_surrogate(value: Any) -> InvalidDiscovery:
    message = "a lone surrogate is no character"
    fields = value.items() if isinstance(value, dict) else ()
    named = [
        {"field": name, "message": message}
        for name, text in fields
        if name in _Fields.model_fields and isinstance(text, str) and _SURROGATE.search(text)
    ]
    where = f" ({', '.join(error['field'] for error in named)})" if named else ""
    return InvalidDiscovery("encoding", f"{message}{where}", named or None)


class _NotANumber(ValueError):
    """A number that JSON does not have, or that Python reads as infinity."""


def _constant(name: str) -> NoReturn:
    raise _NotANumber(f"{name} is no JSON number")


def _float(text: str) -> float:
    value = float(text)
    if value - value != 0.0:
        raise _NotANumber("a number is too large")
    return value


_compact = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode
_loads = json.JSONDecoder(parse_float=_float, parse_constant=_constant).decode


def _deeper_than(value: object, levels: int) -> bool:
    """Whether containers nest more than so many levels; goes level by level, so it needs no stack."""
    layer = [value]
    for _ in range(levels):
        layer = [
            inner
            for outer in layer
            for inner in (outer.values() if isinstance(outer, dict) else outer)  # type: ignore[attr-defined]
            if isinstance(inner, dict | list)
        ]
        if not layer:
            return False
    return True


def _not_reserved(agent_id: str) -> str:
    if agent_id in {"", ".", ".."}:
        raise ValueError("expected a string other than the empty one, '.' and '..'")
    return agent_id


def _canonical(name: str) -> DiscoveryType:
    kind = _CANONICAL.get(name.lower())
    if kind is None:
        raise ValueError(f"expected one of {', '.join(DISCOVERY_TYPES)}, in any case")
    return kind


def _moment(text: str) -> datetime:
    if match := _RFC3339.fullmatch(text):
        try:
            if match[2] == "60":  # a leap second is the one after :59, as POSIX counts
                plain = f"{text[:17]}59{text[19:]}"
                return datetime.fromisoformat(plain.upper()) + timedelta(seconds=1)
            return datetime.fromisoformat(text.upper())
        except (ValueError, OverflowError):
            pass  # the 30th of February, the year 0
    raise ValueError("expected a date and time with offset as in RFC 3339, such as 2009-02-13T23:31:30Z")


class _Fields(BaseModel):
    """What a discovery must have. Strict: a boolean is no number, a number no string."""

    model_config = ConfigDict(strict=True, extra="ignore")

    agent_id: Annotated[str, AfterValidator(_not_reserved)]
    agent_role: str
    discovery_type: Annotated[str, AfterValidator(_canonical)]
    content: str
    confidence: float = Field(ge=0, le=1, allow_inf_nan=False)
    timestamp: Annotated[str, AfterValidator(_moment)]
    related_to: str | None = None


_validate = _Fields.__pydantic_validator__.validate_python


def _validated(fields: dict[str, Any]) -> Any:
    """The fields with canonical values, as attributes."""
    try:
        return _validate(fields)
    except ValidationError as error:
        errors = [
            {
                "field": str(problem["loc"][0]) if problem["loc"] else "",
                "message": problem["msg"].removeprefix("Value error, "),
            }
            for problem in error.errors(include_url=False, include_context=False, include_input=False)
        ]
    raise InvalidDiscovery("schema", "; ".join(f"{e['field']}: {e['message']}" for e in errors), errors)


def _one_line(text: str) -> str:
    text = text if len(text) <= _MAX_MESSAGE else f"{text[:_MAX_MESSAGE]}..."
    return text if text.isascii() and text.isprintable() else ascii(text)[1:-1]
