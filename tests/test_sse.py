"""SSE frames and their reader: tables run in both directions, and properties over arbitrary text and bytes.

The vectors are named after the web platform tests (eventsource/format-*) whose rule each one holds. Every
vector goes through the decoder whole, byte by byte, and cut in two at every place; a second reader, written
straight from the standard's text, must agree with ours on whatever bytes Hypothesis thinks of.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sse_trio import sse
from sse_trio.sse import Decoder, ServerSentEvent

LONG = b"x" * 2049
Events = list[tuple[str, str, str]]

# name: (bytes, events as (name, data, last event ID), what Decoder.last_event_id and .retry are in the end)
VECTORS: dict[str, tuple[bytes, Events, str, int | None]] = {
    "bom": (
        b"\xef\xbb\xbfdata:1\n\n\xef\xbb\xbfdata:2\n\ndata:3\n\n",
        [("message", "1", ""), ("message", "3", "")],
        "",
        None,
    ),
    "bom-2": (
        b"\xef\xbb\xbf\xef\xbb\xbfdata:1\n\ndata:2\n\ndata:3\n\n",
        [("message", "2", ""), ("message", "3", "")],
        "",
        None,
    ),
    "bom alone before an empty line": (b"\xef\xbb\xbf\n\ndata:1\n\n", [("message", "1", "")], "", None),
    "comments": (
        b"data:1\r:\0\n:\r\ndata:2\n:" + LONG + b"\rdata:3\n:data:fail\r:" + LONG + b"\ndata:4\n\n",
        [("message", "1\n2\n3\n4", "")],
        "",
        None,
    ),
    "data-before-final-empty-line": (
        b"retry:1000\ndata:test1\n\nid:test\ndata:test2\n",
        [("message", "test1", "")],
        "",
        1000,
    ),
    "field-data": (
        b"data:\n\ndata\ndata\n\ndata:test\n\n",
        [("message", "", ""), ("message", "\n", ""), ("message", "test", "")],
        "",
        None,
    ),
    "field-event": (
        b"event:test\ndata:x\n\ndata:x\n\n",
        [("test", "x", ""), ("message", "x", "")],
        "",
        None,
    ),
    "field-event-empty": (b"event: \ndata:data\n\n", [("message", "data", "")], "", None),
    "field-event without data dispatches nothing and is forgotten": (
        b"event:test\n\ndata:x\n\n",
        [("message", "x", "")],
        "",
        None,
    ),
    "field-id": (
        b"data:1\nid:1\n\ndata:2\n\n",
        [("message", "1", "1"), ("message", "2", "1")],
        "1",
        None,
    ),
    "field-id-2": (
        b"id:1\ndata:1\n\ndata:2\nid:2\n\nid\ndata:3\n\ndata:4\n\n",
        [("message", "1", "1"), ("message", "2", "2"), ("message", "3", ""), ("message", "4", "")],
        "",
        None,
    ),
    "field-id-3": ("id:…\ndata:x\n\n".encode(), [("message", "x", "…")], "…", None),
    "field-id-null": (
        b"id:1\ndata:a\n\nid:\0\ndata:b\n\nid:2\x003\ndata:c\n\n",
        [("message", "a", "1"), ("message", "b", "1"), ("message", "c", "1")],
        "1",
        None,
    ),
    "field-id without data commits the cursor": (b"id:7\n\n", [], "7", None),
    "field-parsing": (
        b"data:\0\ndata:  2\rData:1\ndata\0:2\ndata:1\r\0data:4\nda-ta:3\rdata_5\ndata:3\r"
        b"data:\r\n data:32\ndata:4\n\n",
        [("message", "\0\n 2\n1\n3\n\n4", "")],
        "",
        None,
    ),
    "field-retry": (b"retry:03000\ndata:x\n\n", [("message", "x", "")], "", 3000),
    "field-retry-bogus": (
        b"retry:3000\nretry:1000x\nretry:-1\nretry:+1\nretry:1.5\nretry: 1 \ndata:x\n\n",
        [("message", "x", "")],
        "",
        3000,
    ),
    "field-retry in digits that are not ASCII": (
        "retry:٣\nretry:²\ndata:x\n\n".encode(),
        [("message", "x", "")],
        "",
        None,
    ),
    "field-retry-empty": (b"retry\nretry:\ndata:test\n\n", [("message", "test", "")], "", None),
    "field-retry at once, before any dispatch": (b"retry:5\n", [], "", 5),
    "field-unknown": (
        b"data:test\n data\ndata\nfoobar:xxx\njustsometext\n:thisisacommentyay\ndata:test\n\n",
        [("message", "test\n\ntest", "")],
        "",
        None,
    ),
    "leading-space": (
        b"data:\ttest\rdata: \ndata:test\ndata:  x\n\n",
        [("message", "\ttest\n\ntest\n x", "")],
        "",
        None,
    ),
    "newlines": (b"data:test\r\ndata\ndata:test\r\n\r\n\r", [("message", "test\n\ntest", "")], "", None),
    "newlines: CR CR is an empty line": (
        b"data:1\r\rdata:2\r\r\ndata:3\n\r",
        [("message", "1", ""), ("message", "2", ""), ("message", "3", "")],
        "",
        None,
    ),
    "newlines: no others": (
        "data:a\u2028b\u2029c\x85d\x0be\x0cf\n\n".encode(),
        [("message", "a\u2028b\u2029c\x85d\x0be\x0cf", "")],
        "",
        None,
    ),
    "null-character": (b"data:\0\n\n\n\n", [("message", "\0", "")], "", None),
    "utf-8": ("data:ok…\n\n".encode(), [("message", "ok…", "")], "", None),
    "utf-8, malformed": (
        b"data:\xff\xe2\x80\nevent:\xed\xa0\x80\ndata:\xf0\x9f\x98\x80\n\n",
        [("���", "��\n😀", "")],
        "",
        None,
    ),
    "a stream of nothing": (b"", [], "", None),
}


def events_of(decoder: Decoder, pieces: Sequence[bytes]) -> list[ServerSentEvent]:
    return [event for piece in pieces for event in decoder.feed(piece)]


@pytest.mark.parametrize("name", VECTORS)
def test_a_vector_decodes_whole_byte_by_byte_and_in_every_two_pieces(name: str) -> None:
    wire, expected, last_event_id, retry = VECTORS[name]
    ways = [[wire], [wire[at : at + 1] for at in range(len(wire))]]
    ways += [[wire[:at], b"", wire[at:]] for at in range(len(wire))]
    for pieces in ways:
        decoder = Decoder()
        assert events_of(decoder, pieces) == [ServerSentEvent(*event) for event in expected]
        assert (decoder.last_event_id, decoder.retry) == (last_event_id, retry)


@pytest.mark.parametrize("name", VECTORS)
def test_what_a_vector_decodes_to_encodes_and_decodes_to_the_same(name: str) -> None:
    _, expected, _, retry = VECTORS[name]
    wire = b"".join(sse.encode(name, data, id=cursor, retry=retry) for name, data, cursor in expected)
    decoder = Decoder()
    assert decoder.feed(wire) == [ServerSentEvent(*event) for event in expected]
    if expected:
        assert decoder.retry == retry


def by_the_standard(wire: bytes) -> tuple[list[ServerSentEvent], str, int | None]:
    """The interpretation of a stream, line for line as WHATWG HTML 9.2.6 says it, slow and obvious."""
    text = wire.decode("utf-8", "replace")
    text = text.removeprefix("\ufeff")
    lines = re.split("\r\n|\n|\r", text)[:-1]
    events, retry, last_event_id = [], None, ""
    data_buffer = event_type_buffer = last_event_id_buffer = ""
    for line in lines:
        if line == "":
            last_event_id = last_event_id_buffer
            if data_buffer == "":
                event_type_buffer = ""
                continue
            data_buffer = data_buffer.removesuffix("\n")
            events.append(ServerSentEvent(event_type_buffer or "message", data_buffer, last_event_id))
            data_buffer = event_type_buffer = ""
        elif line.startswith(":"):
            continue
        else:
            name, value = line, ""
            if ":" in line:
                name, value = line.split(":", 1)
                value = value.removeprefix(" ")
            if name == "event":
                event_type_buffer = value
            elif name == "data":
                data_buffer += value + "\n"
            elif name == "id" and "\0" not in value:
                last_event_id_buffer = value
            elif name == "retry" and re.fullmatch("[0-9]+", value):
                retry = int(value)
    return events, last_event_id, retry


LINES = st.lists(
    st.sampled_from(
        [b"data", b"event", b"id", b"retry", b":", b" ", b"1", b"\0", b"\r", b"\n", b"\r\n", b"\n\n"] * 2
        + ["\ufeff".encode(), b"\xe2\x80", "😀".encode(), b"\xff", "\u2028".encode()]
    ),
    max_size=60,
).map(b"".join)


@settings(deadline=None)
@given(wire=st.one_of(LINES, st.binary()), cuts=st.lists(st.integers(0, 300)))
def test_any_bytes_in_any_pieces_decode_as_the_standard_says(wire: bytes, cuts: list[int]) -> None:
    places = sorted({min(cut, len(wire)) for cut in cuts} | {0, len(wire)})
    decoder = Decoder()
    events = events_of(decoder, [wire[a:b] for a, b in pairwise(places)])
    assert (events, decoder.last_event_id, decoder.retry) == by_the_standard(wire)


def test_a_decoder_that_was_given_a_cursor_keeps_it_until_the_stream_sets_another() -> None:
    decoder = Decoder("m8x2k-7")
    assert decoder.feed(b"data:1\n\n") == [ServerSentEvent("message", "1", "m8x2k-7")]
    assert decoder.feed(b"data:2\nid:m8x2k-8\n\n") == [ServerSentEvent("message", "2", "m8x2k-8")]
    assert decoder.last_event_id == "m8x2k-8"


def test_a_retry_of_more_digits_than_python_converts_is_a_very_long_wait() -> None:
    decoder = Decoder()
    decoder.feed(b"retry: " + b"0" * 6000 + b"7" * 6000 + b"\n")
    assert decoder.retry == 77777777777777777777


def test_the_decoder_takes_a_long_line_in_single_bytes_without_going_over_it_again_and_again() -> None:
    decoder = Decoder()
    for _ in range(300_000):
        decoder.feed(b"x")
    decoder.feed(b"\ndata:done\n\n")
    assert decoder.feed(b"data:1\n\n") == [ServerSentEvent("message", "1", "")]


CLIENT_ID = "550e8400-e29b-41d4-a716-446655440000"
URI = "discovery://agents/security-001/discoveries/1234567890-Anomaly-unusual-login-patter"

FRAMES: dict[str, tuple[Callable[[], bytes], bytes]] = {
    "connected without a cursor": (
        lambda: sse.connected("agent-123", CLIENT_ID, retry=3127, id="m8x2k-41"),
        b"retry: 3127\nevent: connected\n"
        b'data: {"agent_id":"agent-123","client_id":"550e8400-e29b-41d4-a716-446655440000"}\n'
        b"id: m8x2k-41\n\n",
    ),
    "connected before the feed has been live": (
        lambda: sse.connected("agent-123", CLIENT_ID, retry=0, id=None, resumed=None),
        b"retry: 0\nevent: connected\n"
        b'data: {"agent_id":"agent-123","client_id":"550e8400-e29b-41d4-a716-446655440000",'
        b'"resumed":null}\n\n',
    ),
    "connected with a cursor": (
        lambda: sse.connected("a", "c", retry=1, id="m8x2k-41", resumed=True),
        b'retry: 1\nevent: connected\ndata: {"agent_id":"a","client_id":"c","resumed":true}\nid: m8x2k-41\n\n',
    ),
    "connected with a cursor of another epoch": (
        lambda: sse.connected("a", "c", retry=1, id="m8x2k-41", resumed=False),
        b'retry: 1\nevent: connected\ndata: {"agent_id":"a","client_id":"c","resumed":false}\nid: m8x2k-41\n\n',
    ),
    "discovery": (
        lambda: sse.discovery(URI, "m8x2k-42"),
        b'event: discovery\ndata: {"jsonrpc":"2.0","method":"notifications/resources/updated","params":'
        b'{"uri":"discovery://agents/security-001/discoveries/1234567890-Anomaly-unusual-login-patter"}}\n'
        b"id: m8x2k-42\n\n",
    ),
    "discovery in full": (
        lambda: sse.full_discovery(URI, "m8x2k-42", {"content": "a\r\nid: 9\u2028é"}),
        b'event: discovery\ndata: {"jsonrpc":"2.0","method":"notifications/resources/updated","params":'
        b'{"uri":"discovery://agents/security-001/discoveries/1234567890-Anomaly-unusual-login-patter",'
        b'"_meta":{"discovery":{"content":"a\\r\\nid: 9\\u2028\\u00e9"}}}}\nid: m8x2k-42\n\n',
    ),
    "gap with a number": (
        lambda: sse.gap("overflow", 12, "m8x2k-50"),
        b'event: gap\ndata: {"reason":"overflow","missed":12}\nid: m8x2k-50\n\n',
    ),
    "gap without a number": (
        lambda: sse.gap("restart", None, "m8x2k-50"),
        b'event: gap\ndata: {"reason":"restart","missed":null}\nid: m8x2k-50\n\n',
    ),
    "cursor": (lambda: sse.cursor("m8x2k-60"), b"event: cursor\ndata: {}\nid: m8x2k-60\n\n"),
    "goodbye": (
        lambda: sse.goodbye("shutdown", 1480),
        b'retry: 1480\nevent: goodbye\ndata: {"reason":"shutdown"}\n\n',
    ),
    "all lines, data of several": (
        lambda: sse.encode("note", "one\r\ntwo\rthree\n", id="m-1", retry=9),
        b"retry: 9\nevent: note\ndata: one\ndata: two\ndata: three\ndata: \nid: m-1\n\n",
    ),
    "no name": (lambda: sse.encode("", ""), b"data: \n\n"),
    "keep-alive": (lambda: sse.KEEP_ALIVE, b": keep-alive\n"),
}


@pytest.mark.parametrize("name", FRAMES)
def test_a_frame_has_exactly_the_bytes_of_the_contract(name: str) -> None:
    make, expected = FRAMES[name]
    assert make() == expected


def test_a_keep_alive_between_frames_is_seen_by_no_reader() -> None:
    wire = sse.cursor("m-1") + sse.KEEP_ALIVE + sse.KEEP_ALIVE + sse.discovery(URI, "m-2")
    assert [(event.event, event.id) for event in Decoder().feed(wire)] == [
        ("cursor", "m-1"),
        ("discovery", "m-2"),
    ]


NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\0"))


@settings(deadline=None)
@given(
    event=NAMES,
    data=st.one_of(st.text(st.characters(exclude_categories=["Cs"])), st.text("\r\n\0 :dataidevnt\u2028\x85\ufeff")),
    cursor=st.none() | NAMES,
    retry=st.none() | st.integers(0, 10**9),
)
def test_what_is_encoded_decodes_to_exactly_one_event_with_the_same_values(
    event: str, data: str, cursor: str | None, retry: int | None
) -> None:
    wire = sse.encode(event, data, id=cursor, retry=retry)
    decoder = Decoder("before")
    seen = decoder.feed(wire + b"data: next\n\n")
    expected = "before" if cursor is None else cursor
    assert seen == [
        ServerSentEvent(event or "message", re.sub("\r\n|\r", "\n", data), expected),
        ServerSentEvent("message", "next", expected),
    ]
    assert decoder.retry == retry


@pytest.mark.parametrize("breaker", ["\r", "\n", "\0", "a\nid: 9", "a\r\n\r\ndata: forged"])
def test_a_name_or_an_id_that_would_end_its_line_is_refused(breaker: str) -> None:
    with pytest.raises(ValueError, match="no CR, LF or NUL"):
        sse.encode(breaker, "x")
    with pytest.raises(ValueError, match="no CR, LF or NUL"):
        sse.encode("x", "x", id=breaker)


def test_a_negative_retry_and_a_lone_surrogate_are_refused() -> None:
    with pytest.raises(ValueError, match="not negative"):
        sse.encode("x", "x", retry=-1)
    with pytest.raises(UnicodeEncodeError):
        sse.encode("x", "\ud800")


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_compact_json_is_one_ascii_line_that_reads_back_the_same(value: Any) -> None:
    line = sse.compact(value)
    assert line.isascii()
    assert line.isprintable()
    assert json.loads(line) == value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_compact_json_has_no_numbers_that_json_has_not(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        sse.compact({"confidence": value})
