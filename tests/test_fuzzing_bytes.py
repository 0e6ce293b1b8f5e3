"""Bytes that a machine makes up: what comes from NATS, and what is written and read as events.

Hypothesis makes them, and something slow and obvious says what must come out: tests/plain_discovery.py for payloads,
the standard's own text (`by_the_standard`) for events. All tests together take `FUZZ_SECONDS`, each a share of them, in
rounds of fifty inputs; the rounds are numbered from `FUZZ_SEED`, so that a run can be repeated. A short run stands in
the suite, `make fuzz` is the long one.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import hypothesis
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain_discovery import MAX_PAYLOAD, Plain, Refused, read
from support import NatsServer, RawStream, Server, a_discovery, eventually, listen, payload, run_server
from test_discovery import JSON, LIKELY, check_error, check_names
from test_sse import LINES, NAMES, by_the_standard

from sse_trio import sse
from sse_trio.discovery import Discovery, InvalidDiscovery, decode
from sse_trio.sse import Decoder, ServerSentEvent

SECONDS = float(os.environ.get("FUZZ_SECONDS", "12"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))

ROUND, ROUNDS = 50, 2
"""Inputs that are made from one seed; how many rounds there are, even where the time is short."""


def fuzz(share: float, inputs: st.SearchStrategy[Any], holds: Callable[[Any], object]) -> int:
    """Try `holds` with made-up inputs, for this share of the time; how many there were."""
    until = time.monotonic() + SECONDS * share
    count = seed = 0
    while seed < ROUNDS or time.monotonic() < until:

        @hypothesis.seed(SEED + seed)
        @settings(max_examples=ROUND, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(inputs)
        def one_round(made: Any) -> None:
            nonlocal count
            count += 1
            holds(made)

        one_round()
        seed += 1
    return count


# -- payloads --------------------------------------------------------------------------------------------------------

USUAL = st.fixed_dictionaries(
    {name: st.just(value) for name, value in a_discovery().items()}
    | {
        "agent_id": st.text(min_size=1, max_size=10) | st.sampled_from([".", "..", "...", "a/b"]),
        "content": st.text(max_size=30) | st.text("İẞΣ Aa/\u0301\U0001f600", min_size=18, max_size=23),
    }
)
"""Discoveries that are valid, nearly all."""

VALUES = [
    *b"NaN -Infinity 1e999 -1e999 1e-999 -0 -0.0 01 1. .5 +1 1E0 0x1 1.0000000000000000001".split(),
    *b'nul True \'a\' [1,] [,] {1:2} {,} [[] "\\x41" "\\u12" "\\u00e9\\/\\b"'.split(),
    *b'"\\ud83d\\ude00" "\\ud800" "\\uDC00\\ud800" {"\\ud800":1} "\\ud83d\\u0041"'.split(),
    *('"\\uD83D\U0001f600"'.encode(), b'"\t"', b'"\x7f"', b"", b"0." + b"3" * 5000, b"1" + b"0" * 400),
    *(sign + b"9" * digits for digits in (4300, 4301) for sign in (b"", b"-")),
    *(
        opening * levels + b"0" + closing * levels
        for levels in (99, 100)
        for opening, closing in [(b"[", b"]"), (b'{"a":', b"}")]
    ),
]
"""What may stand for a value, as JSON has it or not."""

PIECES = [
    *(bytes([byte]) for byte in b'{}[]:,"\\ \n\0\xff'),
    *(b"\xed\xa0\x80", b"\xef\xbb\xbf", b"//", "\u2028".encode(), "\U0001f600".encode()),
    *(b'"agent_id":"x",', b'"confidence":2,'),
]
"""What may stand anywhere."""


def one_of_these(texts: list[bytes]) -> st.SearchStrategy[bytes]:
    # By index: a strategy's description holds what it draws from, and some of these are long.
    return st.integers(0, len(texts) - 1).map(lambda index: texts[index])


TIMESTAMPS = st.from_regex(
    r"(0000|0001|1969|2000|2009|2100|9999)-(00|01|02|02|12|13)-(00|01|28|29|30|31|32)[TTt ](00|12|23|24):(00|30|59|60)"
    r":(00|59|60|60|61)(\.[0-9]{0,10})?(|Z|z|[-+](00|12|23|24):(00|30|59|60))",
    fullmatch=True,
)
"""Some are moments."""

ANYTHING: st.SearchStrategy[Any] = JSON | st.sampled_from([True, 0, 1, -1, 2, 0.5, -0.0, "", ".", "..", "INSIGHT", "ſ"])


@st.composite
def nearly_valid(draw: st.DrawFn) -> bytes:
    """A discovery with up to two values changed, left out or added, and perhaps one piece put in or over its text."""
    ascii_only = draw(st.booleans())

    def written(value: Any) -> bytes:
        return json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")

    fields = draw(USUAL | LIKELY)
    members = [(written(name), written(value)) for name, value in fields.items()]
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(members) - 1))
        name, _ = members[at]
        match draw(st.sampled_from(["value", "anything", "extra", "absent", "timestamp"])):
            case "value":
                members[at] = (name, draw(one_of_these(VALUES)))
            case "anything":
                members[at] = (name, written(draw(ANYTHING)))
            case "extra":
                members.insert(at, (draw(st.sampled_from([b'"extra"', name])), draw(one_of_these(VALUES))))
            case "absent" if len(members) > 1:
                del members[at]
            case _:
                members.append((b'"timestamp"', written(draw(TIMESTAMPS))))
    comma = draw(st.sampled_from([b",", b", ", b" ,\n\t\r"]))
    text = b"{" + comma.join(name + b":" + value for name, value in members) + b"}"
    if draw(st.integers(0, 3)) == 0:
        start = draw(st.integers(0, len(text)))
        stop = draw(st.sampled_from([start, start + 1, start + 4]))
        text = text[:start] + draw(one_of_these(PIECES) | st.binary(max_size=4)) + text[stop:]
    return text


def of_size(size: int) -> bytes:
    """A valid discovery of so many bytes."""
    return payload(extra="x" * (size - len(payload(extra=""))))


PAYLOADS = st.one_of(
    USUAL.map(lambda fields: json.dumps(fields).encode()),
    nearly_valid(),
    nearly_valid(),
    st.lists(one_of_these(PIECES + VALUES), max_size=12).map(b"".join),
    st.binary(max_size=200),
    st.integers(MAX_PAYLOAD - 2, MAX_PAYLOAD + 2).map(of_size),
)


def plainly(data: bytes) -> Plain | str:
    """What the plain reader makes of it: a discovery, or the reason why not."""
    try:
        return read(data)
    except Refused as refused:
        return str(refused)


def outcome_of(data: bytes) -> Discovery | str:
    """What ours makes of it, likewise."""
    try:
        return decode(data)
    except InvalidDiscovery as refused:
        check_error(refused)
        return refused.reason


def test_whatever_is_decoded_is_what_a_plain_reader_reads() -> None:
    outcomes: Counter[str] = Counter()

    def holds(data: bytes) -> None:
        plain, decoded = plainly(data), outcome_of(data)
        outcomes["a discovery" if isinstance(plain, Plain) else plain] += 1
        if isinstance(plain, str) or isinstance(decoded, str):
            assert decoded == plain, data[-300:]
        else:
            assert (decoded.uri, decoded.discovery_type) == (plain.uri, plain.kind)
            assert same(decoded.published(), plain.object)
            check_names(decoded)

    count = fuzz(0.3, PAYLOADS, holds)
    print(f"\n{count} payloads decoded: {dict(outcomes)}")
    assert outcomes.keys() >= {"a discovery", "json", "schema"}


def same(one: Any, other: Any) -> bool:
    """Equal, the types of numbers included: for Python 1, 1.0 and True are."""
    return repr(one) == repr(other)


async def test_whatever_is_published_is_heard_listed_or_counted_in_its_order(nats: NatsServer, tmp_path: Path) -> None:
    world = World(nats)
    async with AsyncExitStack() as stack:
        env = {"LOG_FORMAT": "json", "SSE_HISTORY": "100"}
        world.server = await stack.enter_async_context(run_server(tmp_path, nats_url=nats.url, env=env))
        await eventually(world.server.is_live, "the feed is live")
        world.client = await stack.enter_async_context(listen(world.server.port, query="&detail=full"))
        await world.client.next("connected")
        batches = st.lists(st.tuples(st.sampled_from(SUBJECTS), PAYLOADS), min_size=10, max_size=50)
        ask = trio.lowlevel.current_trio_token()

        def holds(batch: list[tuple[str, bytes]]) -> None:
            trio.from_thread.run(world.exchange, batch, trio_token=ask)

        count = await trio.to_thread.run_sync(fuzz, 0.4, batches, holds)
        print(f"\n{sum(world.outcomes.values())} payloads published in {count} batches: {dict(world.outcomes)}")
        assert await world.counted() == world.outcomes
        assert await world.server.is_live()
        assert "Traceback" not in world.server.output
        for line in world.server.output.splitlines():
            assert line.startswith("[20") or json.loads(line)["level"] in {"info", "warning"}, line


SUBJECTS = ["discoveries.insights", "discoveries.questions", "discoveries.a.b"]


class World:
    """A server with a client, and what was published so far."""

    server: Server
    client: RawStream

    def __init__(self, nats: NatsServer) -> None:
        self.nats = nats
        self.published = 0
        self.outcomes: Counter[str] = Counter()

    async def exchange(self, batch: Sequence[tuple[str, bytes]]) -> None:
        """Publish these and a marker; the client hears the valid ones, then the marker, and the listing has them."""
        first = self.published + 1
        marker = payload(content=f"marker {first}")
        messages = [*batch, (SUBJECTS[0], marker)]
        self.published += len(messages)
        expected: list[tuple[int, str, Plain]] = []
        for sequence, (subject, data) in enumerate(messages, first):
            plain = plainly(data)
            if isinstance(plain, Plain):
                expected.append((sequence, subject, plain))
            self.outcomes["published" if isinstance(plain, Plain) else plain] += 1
        await self.nats.publish(*messages)
        for sequence, _, plain in expected:
            event = await self.client.next()
            params = json.loads(event.data)["params"]
            assert (event.event, int(event.id.rpartition("-")[2])) == ("discovery", sequence)
            assert params["uri"] == plain.uri
            assert same(params["_meta"]["discovery"], plain.object)
        assert self.client.events[-1].id == event.id, "nothing comes behind the marker"
        status, page = await self.server.get(f"/discoveries?limit={len(expected)}")
        assert status == 200
        for listed, (sequence, subject, plain) in zip(page["discoveries"], reversed(expected), strict=True):
            assert (int(listed["id"].rpartition("-")[2]), listed["subject"]) == (sequence, subject)
            assert listed["uri"] == plain.uri
            assert same(listed["discovery"], plain.object)
        self.client.body = b""

    async def counted(self) -> Counter[str]:
        """The server's own figures, by outcome."""
        _, metrics = await self.server.get("/metrics")
        found = re.findall(r'^sse_trio_events_in_total\{outcome="(\w+)"\} (\S+)$', metrics.decode(), re.MULTILINE)
        return Counter({outcome: int(float(count)) for outcome, count in found})


# -- events ----------------------------------------------------------------------------------------------------------


def ways(wire: bytes, cuts: list[int]) -> list[list[bytes]]:
    """Ways in which bytes may arrive: at once, one by one, in each two pieces, and in some pieces."""
    places = sorted({min(cut, len(wire)) for cut in cuts} | {0, len(wire)})
    return [
        [wire],
        [wire[at : at + 1] for at in range(len(wire))],
        [wire[a:b] for a, b in pairwise(places)],
        *([wire[:at], wire[at:]] for at in range(1, len(wire))),
    ]


def test_any_bytes_are_read_as_the_standard_says_however_they_are_cut() -> None:
    decodings = 0

    def holds(made: tuple[bytes, list[int]]) -> None:
        nonlocal decodings
        expected = by_the_standard(made[0])
        for pieces in ways(*made):
            decodings += 1
            decoder = Decoder()
            events = [event for piece in pieces for event in decoder.feed(piece)]
            assert (events, decoder.last_event_id, decoder.retry) == expected

    wires = LINES | st.binary(max_size=100)
    count = fuzz(0.15, st.tuples(wires, st.lists(st.integers(0, 300))), holds)
    print(f"\n{count} streams read in {decodings} ways")


TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.text("\r\n\0 :dataidevnt\u2028\x85\ufeff")
CURSORS = st.integers(0, 2**64).map(lambda number: f"m8x2k-{number}")


@st.composite
def frames(draw: st.DrawFn) -> tuple[bytes, ServerSentEvent | None, str | None]:
    """A frame of ours, what a reader makes of it, and the id that it sets."""
    kind = draw(st.sampled_from(["encode", "full", "connected", "gap", "cursor", "goodbye", "keep-alive"]))
    if kind == "keep-alive":
        return sse.KEEP_ALIVE, None, None
    if kind == "encode":
        name, data, id = draw(NAMES), draw(TEXT), draw(st.none() | NAMES)
        wire = sse.encode(name, data, id=id, retry=draw(st.none() | st.integers(0, 10**9)))
        return wire, ServerSentEvent(name or "message", re.sub("\r\n|\r", "\n", data), ""), id
    if kind == "goodbye":
        return sse.goodbye("lifetime", 5), ServerSentEvent("goodbye", '{"reason":"lifetime"}', ""), None
    id = draw(CURSORS)
    if kind == "gap":
        missed = draw(st.none() | st.integers(0))
        data = f'{{"reason":"expired","missed":{"null" if missed is None else missed}}}'
        return sse.gap("expired", missed, id), ServerSentEvent("gap", data, ""), id
    if kind == "cursor":
        return sse.cursor(id), ServerSentEvent("cursor", "{}", ""), id
    if kind == "connected":
        agent, retry = draw(TEXT), draw(st.integers(0, 10**9))
        data = json.dumps({"agent_id": agent, "client_id": "c", "resumed": None}, separators=(",", ":"))
        return sse.connected(agent, "c", retry=retry, id=id, resumed=None), ServerSentEvent("connected", data, ""), id
    said = draw(st.dictionaries(TEXT, TEXT | st.integers() | st.none(), max_size=4))
    params = {"uri": "discovery://x", "_meta": {"discovery": said}}
    notification = {"jsonrpc": "2.0", "method": "notifications/resources/updated", "params": params}
    data = json.dumps(notification, separators=(",", ":"))
    return sse.full_discovery("discovery://x", id, said), ServerSentEvent("discovery", data, ""), id


def test_what_is_written_is_read_however_it_is_cut() -> None:
    decodings = 0

    def holds(made: tuple[list[tuple[bytes, ServerSentEvent | None, str | None]], list[int]]) -> None:
        nonlocal decodings
        written, cuts = made
        expected, cursor = [], "before"
        for _, event, id in written:
            cursor = cursor if id is None else id
            if event is not None:
                expected.append(ServerSentEvent(event.event, event.data, cursor))
        for pieces in ways(b"".join(wire for wire, _, _ in written), cuts):
            decodings += 1
            decoder = Decoder("before")
            assert [event for piece in pieces for event in decoder.feed(piece)] == expected
            assert decoder.last_event_id == cursor

    count = fuzz(0.15, st.tuples(st.lists(frames(), max_size=6), st.lists(st.integers(0, 500))), holds)
    print(f"\n{count} streams written and read in {decodings} ways")
