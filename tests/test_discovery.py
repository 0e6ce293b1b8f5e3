"""Discoveries: what is read, what is refused and in which words, and the names that each one gets.

Nothing here is fed by hand alone: Hypothesis throws arbitrary bytes and arbitrary JSON at `decode`, and
whatever comes through must make a URI that parses back and a frame that a strict reader sees as one event.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import a_discovery, payload

from sse_trio import sse
from sse_trio.discovery import (
    DISCOVERY_TYPES,
    MAX_PAYLOAD,
    Discovery,
    InvalidDiscovery,
    build,
    decode,
    parse,
    segment,
    subject_for,
)


def refused(data: bytes) -> InvalidDiscovery:
    with pytest.raises(InvalidDiscovery) as caught:
        decode(data)
    return caught.value


def test_a_discovery_is_read_as_it_was_published() -> None:
    data = payload(7, agent_id="a 1", confidence=1, related_to="x/y", extra={"kept": [1, None]})
    discovery = decode(data)
    assert discovery.agent_id == "a 1"
    assert discovery.agent_role == "Security"
    assert discovery.discovery_type == "Anomaly"
    assert discovery.content == "unusual login pattern 7"
    assert discovery.confidence == 1.0
    assert discovery.timestamp == datetime(2009, 2, 13, 23, 31, 30, tzinfo=UTC)
    assert discovery.related_to == "x/y"
    assert discovery.payload is data
    assert discovery.published() == json.loads(data)
    assert discovery.published()["extra"] == {"kept": [1, None]}


def test_the_uri_of_the_contract() -> None:
    discovery = decode(payload(content="Unusual Login Pattern from nowhere"))
    expected = "discovery://agents/security-001/discoveries/1234567890-Anomaly-unusual-login-patter"
    assert discovery.uri == expected
    assert discovery.discovery_id == "1234567890-Anomaly-unusual-login-patter"


# content: the last segment of the URI, after the time and the type
SLUGS = {
    "": "",
    "short": "short",
    "A  b\tc": "a--b%09c",
    "0123456789012345678😀x": "0123456789012345678%F0%9F%98%80",
    "01234567890123456789😀": "01234567890123456789",
    "a\r\nid: 9\r\n\r\ndata: x": "a%0D%0Aid%3A-9%0D%0A%0D%0Adata%3A-x",
    'say "no"\0': "say-%22no%22%00",
    "a/b?c#d%2Fe": "a%2Fb%3Fc%23d%252fe",
    "~._-*!'()": "~._-%2A%21%27%28%29",
    "Ä\u00a0Ö\u3000Ü": "%C3%A4%C2%A0%C3%B6%E3%80%80%C3%BC",
    # Lower case comes after the cut, so a slug may be longer than 20 code points: İ becomes i and a dot
    # above.
    "İ" * 21: "i%CC%87" * 20,
    "..": "..",
    "\u2028\x85\x7f": "%E2%80%A8%C2%85%7F",
}


@pytest.mark.parametrize("content", SLUGS)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_a_slug_is_twenty_code_points_lowered_hyphened_and_encoded(content: str, ascii_only: bool) -> None:
    data = json.dumps(a_discovery(content=content), ensure_ascii=ascii_only).encode()
    assert decode(data).discovery_id == f"1234567890-Anomaly-{SLUGS[content]}"


AGENTS = {
    "plain-1_a.b~c": "plain-1_a.b~c",
    "a/b": "a%2Fb",
    "a%2Fb": "a%252Fb",
    "a b+c": "a%20b%2Bc",
    "...": "...",
    "Ärger": "%C3%84rger",
    "\r\n\r\ndata: x": "%0D%0A%0D%0Adata%3A%20x",
    " ": "%20",
    "\0": "%00",
}


@pytest.mark.parametrize("agent_id", AGENTS)
def test_an_agent_id_is_one_encoded_segment(agent_id: str) -> None:
    uri = decode(payload(agent_id=agent_id)).uri
    assert uri.split("/") == [
        "discovery:",
        "",
        "agents",
        AGENTS[agent_id],
        "discoveries",
        "1234567890-Anomaly-unusual-login-patter",
    ]
    assert segment(agent_id) == AGENTS[agent_id]


@pytest.mark.parametrize("kind", DISCOVERY_TYPES)
def test_a_type_in_any_case_gets_its_canonical_one(kind: str) -> None:
    for written in (kind, kind.lower(), kind.upper(), kind.swapcase()):
        discovery = decode(payload(discovery_type=written))
        assert discovery.discovery_type == kind
        assert f"-{kind}-" in discovery.uri
        assert discovery.published()["discovery_type"] == written


# timestamp: (the seconds in the id, the moment)
MOMENTS: dict[str, tuple[int, datetime]] = {
    "2009-02-13T23:31:30Z": (1234567890, datetime(2009, 2, 13, 23, 31, 30, tzinfo=UTC)),
    "2009-02-13t23:31:30z": (1234567890, datetime(2009, 2, 13, 23, 31, 30, tzinfo=UTC)),
    "2009-02-14T01:31:30+02:00": (1234567890, datetime(2009, 2, 13, 23, 31, 30, tzinfo=UTC)),
    "2009-02-13T23:31:30-00:00": (1234567890, datetime(2009, 2, 13, 23, 31, 30, tzinfo=UTC)),
    "2009-02-14T23:30:30.5+23:59": (1234567890, datetime(2009, 2, 13, 23, 31, 30, 500000, tzinfo=UTC)),
    "2009-02-13T23:31:30.9Z": (1234567890, datetime(2009, 2, 13, 23, 31, 30, 900000, tzinfo=UTC)),
    "2009-02-13T23:31:30.123456789123Z": (
        1234567890,
        datetime(2009, 2, 13, 23, 31, 30, 123456, tzinfo=UTC),
    ),
    "1969-12-31T23:59:59.5Z": (-1, datetime(1969, 12, 31, 23, 59, 59, 500000, tzinfo=UTC)),
    "1970-01-01T00:00:00Z": (0, datetime(1970, 1, 1, tzinfo=UTC)),
    "2016-12-31T23:59:60Z": (1483228800, datetime(2017, 1, 1, tzinfo=UTC)),
    "2016-12-31T18:59:60.25-05:00": (1483228800, datetime(2017, 1, 1, 0, 0, 0, 250000, tzinfo=UTC)),
    "2024-02-29T00:00:00Z": (1709164800, datetime(2024, 2, 29, tzinfo=UTC)),
    "9999-12-31T23:59:59.999999Z": (253402300799, datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)),
    "0001-01-01T00:00:00Z": (-62135596800, datetime(1, 1, 1, tzinfo=UTC)),
}


@pytest.mark.parametrize("timestamp", MOMENTS)
def test_a_timestamp_of_rfc_3339_is_read(timestamp: str) -> None:
    seconds, moment = MOMENTS[timestamp]
    discovery = decode(payload(timestamp=timestamp))
    assert discovery.timestamp == moment
    assert discovery.discovery_id.startswith(f"{seconds}-Anomaly-")


def test_moments_that_are_out_of_reach_in_utc_have_their_seconds_all_the_same() -> None:
    assert decode(payload(timestamp="0001-01-01T00:00:00+23:59")).discovery_id.startswith("-62135683140-")
    assert decode(payload(timestamp="9999-12-31T23:59:59-23:59")).discovery_id.startswith("253402387139-")


@pytest.mark.parametrize(
    "timestamp",
    [
        "",
        "2009-02-13",
        "2009-02-13T23:31:30",
        "2009-02-13T23:31Z",
        "2009-02-13 23:31:30Z",
        "2009-02-13T23:31:30+0200",
        "2009-02-13T23:31:30+02",
        "2009-02-13T23:31:30+24:00",
        "2009-02-13T23:31:30+02:60",
        "2009-02-13T24:00:00Z",
        "2009-02-13T23:60:00Z",
        "2009-02-13T23:31:61Z",
        "2009-02-13T23:31:30.Z",
        "2009-02-13T23:31:30,5Z",
        "2009-02-30T23:31:30Z",
        "2023-02-29T00:00:00Z",
        "2009-13-01T23:31:30Z",
        "0000-01-01T00:00:00Z",
        "9999-12-31T23:59:60Z",
        "2009-W07-5T23:31:30Z",
        "20090213T233130Z",
        " 2009-02-13T23:31:30Z",
        "2009-02-13T23:31:30Z\n",
        "٢٠٠٩-02-13T23:31:30Z",
        "1234567890",
        "yesterday",
    ],
)
def test_a_timestamp_that_rfc_3339_does_not_have_is_refused(timestamp: str) -> None:
    error = refused(payload(timestamp=timestamp))
    assert error.reason == "schema"
    assert [problem["field"] for problem in error.errors] == ["timestamp"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("agent_id", ""),
        ("agent_id", "."),
        ("agent_id", ".."),
        ("agent_id", 7),
        ("agent_id", None),
        ("agent_role", None),
        ("agent_role", ["Security"]),
        ("discovery_type", "Hunch"),
        ("discovery_type", ""),
        ("discovery_type", "Pattern "),
        ("discovery_type", None),
        ("discovery_type", 1),
        ("content", None),
        ("content", 3),
        ("content", {}),
        ("confidence", True),
        ("confidence", False),
        ("confidence", "0.5"),
        ("confidence", None),
        ("confidence", -0.1),
        ("confidence", 1.0000001),
        ("confidence", 2),
        ("confidence", 10**400),
        ("confidence", [0.5]),
        ("timestamp", None),
        ("timestamp", 1234567890),
        ("related_to", 5),
        ("related_to", False),
        ("related_to", []),
    ],
)
def test_a_wrong_value_is_refused_and_its_field_named(field: str, value: Any) -> None:
    error = refused(payload(**{field: value}))
    assert error.reason == "schema"
    assert [problem["field"] for problem in error.errors] == [field]
    assert str(error).startswith(f"schema: {field}: ")


@pytest.mark.parametrize("field", ["agent_id", "agent_role", "discovery_type", "content", "confidence", "timestamp"])
def test_a_missing_key_is_refused_and_named(field: str) -> None:
    fields = a_discovery()
    del fields[field]
    error = refused(json.dumps(fields).encode())
    assert error.reason == "schema"
    assert error.errors == [{"field": field, "message": "Field required"}]


def test_every_bad_field_is_named_at_once() -> None:
    error = refused(b'{"agent_id":"..","discovery_type":"x","content":1,"confidence":2,"timestamp":"","related_to":1}')
    assert [problem["field"] for problem in error.errors] == [
        "agent_id",
        "agent_role",
        "discovery_type",
        "content",
        "confidence",
        "timestamp",
        "related_to",
    ]


@pytest.mark.parametrize("role", ["", " ", "a\nb", "😀"])
def test_role_and_content_are_any_strings(role: str) -> None:
    discovery = decode(payload(agent_role=role, content=role))
    assert (discovery.agent_role, discovery.content) == (role, role)


@pytest.mark.parametrize("confidence", [0, 1, 0.0, 1.0, 0.5, 1e-300, -0.0])
def test_a_confidence_is_a_number_from_zero_to_one(confidence: float) -> None:
    assert decode(payload(confidence=confidence)).confidence == confidence


def test_related_to_may_be_absent_null_or_a_string() -> None:
    fields = a_discovery()
    del fields["related_to"]
    assert decode(json.dumps(fields).encode()).related_to is None
    assert decode(payload(related_to=None)).related_to is None
    assert decode(payload(related_to="")).related_to == ""


def with_value(text: bytes) -> bytes:
    """A discovery with an unknown key whose value is this raw JSON."""
    return payload()[:-1] + b',"extra":' + text + b"}"


MALFORMED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "json"),
    "white space": (b" \n", "json"),
    "half": (payload()[:-1], "json"),
    "two": (payload() + payload(), "json"),
    "single quotes": (b"{'agent_id': 1}", "json"),
    "a raw line feed in a string": (payload().replace(b"login", b"log\nin"), "json"),
    "a raw NUL in a string": (payload().replace(b"login", b"log\0in"), "json"),
    "NUL behind it": (payload() + b"\0", "json"),
    "a byte order mark": (b"\xef\xbb\xbf" + payload(), "json"),
    "NaN": (payload().replace(b"0.75", b"NaN"), "json"),
    "Infinity": (payload().replace(b"0.75", b"Infinity"), "json"),
    "-Infinity": (payload().replace(b"0.75", b"-Infinity"), "json"),
    "a float that overflows": (payload().replace(b"0.75", b"1e999"), "json"),
    "NaN in an unknown key": (with_value(b"[NaN]"), "json"),
    "a float that overflows in an unknown key": (with_value(b"-1e999"), "json"),
    "an integer of 5,000 digits": (with_value(b"1" * 5000), "json"),
    "nested 101 levels": (with_value(b"[" * 100 + b"]" * 100), "json"),
    "nested 101 levels of objects": (with_value(b'{"a":' * 100 + b"1" + b"}" * 100), "json"),
    "nested 30,000 levels": (with_value(b"[" * 30000 + b"]" * 30000), "json"),
    "nothing but brackets": (b"[" * MAX_PAYLOAD, "json"),
    "not UTF-8": (payload().replace(b"login", b"log\xffin"), "encoding"),
    "UTF-16": (payload().decode().encode("utf-16"), "encoding"),
    "Latin-1": (json.dumps(a_discovery(content="ä"), ensure_ascii=False).encode("latin-1"), "encoding"),
    "an overlong encoding": (payload().replace(b"login", b"log\xc0\xafin"), "encoding"),
    "a surrogate in UTF-8": (payload().replace(b"login", b"log\xed\xa0\x80in"), "encoding"),
    "a lone surrogate": (payload().replace(b"login", b"log\\ud800in"), "encoding"),
    "a lone surrogate in capitals": (payload().replace(b"login", b"log\\uDC00in"), "encoding"),
    "surrogates the wrong way round": (payload().replace(b"login", b"\\ude00\\ud83d"), "encoding"),
    "a lone surrogate in an unknown key": (with_value(b'{"\\udfff":1}'), "encoding"),
    "null": (b"null", "schema"),
    "a number": (b"1", "schema"),
    "a string": (b'"x"', "schema"),
    "a list": (b"[" + payload() + b"]", "schema"),
    "an empty object": (b"{}", "schema"),
    "oversized": (with_value(b'"' + b"x" * MAX_PAYLOAD + b'"'), "oversized"),
    "2 MB": (b"\xff" * 2_000_000, "oversized"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_payload_is_refused_for_its_reason(name: str) -> None:
    data, reason = MALFORMED[name]
    error = refused(data)
    assert error.reason == reason
    assert str(error).startswith(f"{reason}: ")
    assert all(problem.keys() == {"field", "message"} for problem in error.errors)
    assert error.errors


def test_a_payload_of_exactly_the_limit_is_read() -> None:
    data = with_value(b'"' + b"x" * (MAX_PAYLOAD - len(with_value(b'""'))) + b'"')
    assert len(data) == MAX_PAYLOAD
    assert decode(data).payload is data
    assert refused(data + b" ").reason == "oversized"


def test_nesting_up_to_the_limit_and_many_brackets_side_by_side_are_read() -> None:
    decode(with_value(b"[" * 99 + b"]" * 99))
    decode(with_value(b"[" + b"[],{}," * 5000 + b"[]]"))
    decode(payload(content="[" * 5000))


def test_a_lone_surrogate_is_blamed_on_its_field() -> None:
    error = refused(payload(content="a\ud800", agent_role="\udfff", note="\ud801"))
    assert [problem["field"] for problem in error.errors] == ["agent_role", "content"]
    assert str(error) == "encoding: a lone surrogate is no character (agent_role, content)"
    assert refused(b'["\\ud800"]').errors == [{"field": "", "message": "a lone surrogate is no character"}]


def test_pairs_of_surrogates_and_escaped_backslashes_are_read() -> None:
    assert decode(payload(content="😀")).content == "😀"
    assert b"\\ud83d\\ude00" in payload(content="😀")
    assert decode(payload(content="\\ud800")).content == "\\ud800"


def check_error(error: InvalidDiscovery) -> None:
    text = str(error)
    assert text.isascii()
    assert text.isprintable()
    assert len(text) < 2000
    assert error.reason in {"oversized", "encoding", "json", "schema"}
    assert error.errors


def check_names(discovery: Discovery) -> None:
    """What a strict reader sees of it is one event with one URI, which parses back to its agent."""
    frame = sse.discovery(discovery.uri, "m8x2k-42")
    events = sse.Decoder().feed(frame + sse.KEEP_ALIVE)
    assert [(event.event, event.id) for event in events] == [("discovery", "m8x2k-42")]
    assert json.loads(events[0].data)["params"] == {"uri": discovery.uri}
    assert frame.isascii()
    assert frame.count(b"\n") == 4
    assert b"\r" not in frame

    full = sse.full_discovery(discovery.uri, "m8x2k-42", discovery.published())
    events = sse.Decoder().feed(full)
    assert [(event.event, event.id) for event in events] == [("discovery", "m8x2k-42")]
    assert json.loads(events[0].data)["params"]["_meta"]["discovery"] == json.loads(discovery.payload)
    assert full.count(b"\n") == 4

    parts = urlsplit(discovery.uri)
    assert (parts.scheme, parts.netloc, parts.query, parts.fragment) == ("discovery", "agents", "", "")
    empty, agent, word, name = parts.path.split("/")
    assert (empty, word) == ("", "discoveries")
    assert unquote(agent, errors="strict") == discovery.agent_id
    assert name == discovery.discovery_id
    assert agent not in {"", ".", ".."}
    assert f"-{discovery.discovery_type}-" in name
    assert subject_for(discovery) in {
        "discoveries.questions",
        "discoveries.connections",
        "discoveries.insights",
    }


def check(data: bytes) -> None:
    try:
        discovery = decode(data)
    except InvalidDiscovery as error:
        check_error(error)
    else:
        check_names(discovery)


ANY_TEXT = st.text(st.characters())  # lone surrogates and control characters included
GOOD_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(ANY_TEXT, inner),
    max_leaves=10,
)
TIMES = st.datetimes(timezones=st.builds(lambda m: timezone(timedelta(minutes=m)), st.integers(-1439, 1439)))
LIKELY: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "agent_id": ANY_TEXT | st.sampled_from(["..", "a/b", "%2F"]),
        "agent_role": ANY_TEXT,
        "discovery_type": st.sampled_from([*DISCOVERY_TYPES, "insight", "QUESTION"]),
        "content": ANY_TEXT,
        "confidence": st.floats(0, 1) | st.integers(0, 1),
        "timestamp": TIMES.map(lambda moment: moment.isoformat()),
    },
    optional={"related_to": st.none() | ANY_TEXT, "extra": JSON},
)


@settings(deadline=None)
@given(st.binary())
def test_any_bytes_are_a_discovery_or_a_refusal(data: bytes) -> None:
    check(data)


@settings(deadline=None)
@given(JSON | st.dictionaries(st.sampled_from(sorted(a_discovery())), JSON), st.booleans())
def test_any_json_is_a_discovery_or_a_refusal(value: Any, ascii_only: bool) -> None:
    check(json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass"))


@settings(deadline=None)
@given(LIKELY, st.dictionaries(st.sampled_from(sorted(a_discovery())), JSON, max_size=2), st.booleans())
def test_anything_like_a_discovery_is_one_or_a_refusal(
    fields: dict[str, Any], changes: dict[str, Any], ascii_only: bool
) -> None:
    check(json.dumps(fields | changes, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass"))


@settings(deadline=None)
@given(LIKELY, st.data())
def test_a_damaged_discovery_is_one_or_a_refusal(fields: dict[str, Any], data: st.DataObject) -> None:
    whole = json.dumps(fields).encode()
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, min(len(whole), start + 5)))
    check(whole[:start] + data.draw(st.binary(max_size=5)) + whole[stop:])


@settings(deadline=None)
@given(
    agent_id=st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda a: a not in {".", ".."}),
    content=st.text(st.characters(exclude_categories=["Cs"])),
    moment=TIMES,
)
@example(agent_id="a", content="x" * 19 + "İ", moment=datetime(9999, 12, 31, 23, 59, 59, 999999, UTC))
def test_every_proper_discovery_is_read(agent_id: str, content: str, moment: datetime) -> None:
    discovery = decode(payload(agent_id=agent_id, content=content, timestamp=moment.isoformat()))
    check_names(discovery)
    seconds = (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(seconds=1)
    slug = content[:20].lower().replace(" ", "-")
    assert unquote(discovery.discovery_id) == f"{seconds}-Anomaly-{slug}"


@pytest.mark.parametrize(
    ("kind", "related_to", "subject"),
    [
        ("Question", None, "discoveries.questions"),
        ("question", "x", "discoveries.questions"),
        ("Insight", "x", "discoveries.connections"),
        ("Insight", "", "discoveries.connections"),
        ("Connection", None, "discoveries.insights"),
        ("Insight", None, "discoveries.insights"),
    ],
)
def test_the_subject_to_share_on(kind: str, related_to: str | None, subject: str) -> None:
    assert subject_for(decode(payload(discovery_type=kind, related_to=related_to))) == subject


SHARED: Mapping[str, Any] = {
    "content": "found it",
    "agent_id": "a1",
    "agent_role": "Analysis",
    "discovery_type": "insight",
    "confidence": 1,
    "note": {"kept": True},
}
NOW = datetime(2009, 2, 13, 23, 31, 30, 250000, tzinfo=UTC)


def test_what_is_built_is_canonical_json_with_its_unknown_keys() -> None:
    discovery = build(SHARED, now=NOW)
    assert discovery.payload == (
        b'{"agent_id":"a1","agent_role":"Analysis","discovery_type":"Insight","content":"found it",'
        b'"confidence":1,"timestamp":"2009-02-13T23:31:30.250000+00:00","related_to":null,"note":{"kept":true}}'
    )
    assert discovery.uri == "discovery://agents/a1/discoveries/1234567890-Insight-found-it"


@pytest.mark.parametrize("timestamp", [NOW, NOW.isoformat(), NOW.astimezone(timezone(timedelta(hours=5)))])
def test_a_given_timestamp_is_taken(timestamp: datetime | str) -> None:
    discovery = build({**SHARED, "timestamp": timestamp}, now=datetime(2020, 1, 1, tzinfo=UTC))
    assert discovery.timestamp == NOW


def test_a_discovery_built_without_a_time_is_of_now() -> None:
    before = datetime.now(UTC)
    assert before <= build({**SHARED, "timestamp": None}).timestamp <= datetime.now(UTC)


def test_building_leaves_the_fields_as_they_were() -> None:
    fields = dict(SHARED)
    build(fields)
    assert fields == SHARED


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"agent_id": ".."}, ["agent_id"]),
        ({"confidence": float("nan"), "content": None}, ["content", "confidence"]),
        ({"confidence": float("inf")}, ["confidence"]),
        ({"confidence": True}, ["confidence"]),
        ({"timestamp": datetime(2009, 2, 13)}, ["timestamp"]),  # no offset
        ({"timestamp": 5}, ["timestamp"]),
        ({"discovery_type": "Hunch", "related_to": 3}, ["discovery_type", "related_to"]),
        ({"note": {1, 2}}, [""]),
        ({"note": float("nan")}, [""]),
        ({"content": "\ud800"}, ["content"]),
        ({"note": "\ud800"}, [""]),
        ({"note": "x" * MAX_PAYLOAD}, [""]),
    ],
)
def test_what_cannot_be_shared_is_refused_and_named(changes: dict[str, Any], fields: list[str]) -> None:
    with pytest.raises(InvalidDiscovery) as caught:
        build({**SHARED, **changes})
    assert [problem["field"] for problem in caught.value.errors] == fields
    check_error(caught.value)


def test_a_structure_that_holds_itself_is_refused() -> None:
    note: list[Any] = []
    note.append(note)
    with pytest.raises(InvalidDiscovery, match="cannot be written as JSON"):
        build({**SHARED, "note": note})


@settings(deadline=None)
@given(LIKELY)
def test_what_builds_reads_back_the_same(fields: dict[str, Any]) -> None:
    try:
        discovery = build(fields)
    except InvalidDiscovery as error:
        check_error(error)
        return
    again = decode(discovery.payload)
    assert again.uri == discovery.uri
    assert again.published() == {"related_to": None} | fields | {"discovery_type": discovery.discovery_type}
    check_names(discovery)


def test_an_object_can_be_read_without_a_look_at_its_fields() -> None:
    assert parse(b'{"content": "x", "confidence": 7}') == {"content": "x", "confidence": 7}
    with pytest.raises(InvalidDiscovery, match="expected a JSON object"):
        parse(b"[]")


def test_two_equal_discoveries_are_two() -> None:
    one, two = decode(payload()), decode(payload())
    assert one != two
    assert len({one, two}) == 2


def test_a_discovery_in_history_costs_little_beside_its_payload() -> None:
    content = "😀" + "x" * 60_000
    discovery = decode(json.dumps(a_discovery(content=content), ensure_ascii=False).encode())
    parts = (getattr(discovery, name) for name in discovery.__slots__ if name != "payload")
    assert sys.getsizeof(discovery) + sum(map(sys.getsizeof, parts)) < 1000
    assert not hasattr(discovery, "__dict__")
