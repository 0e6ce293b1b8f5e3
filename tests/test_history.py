"""What memory holds: an interval of sequences, bounded by number and by bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import payload

from sse_trio.discovery import decode
from sse_trio.history import Frame, History, event_id, parse_event_id


def frame(sequence: int, **changes: object) -> Frame:
    return Frame.of("e", sequence, "discoveries.insights", decode(payload(sequence, **changes)))


def history_of(*sequences: int, max_events: int = 100, max_bytes: int = 1 << 30, head: int = 0) -> History:
    history = History(max_events, max_bytes)
    history.open("e", head)
    for sequence in sequences:
        history.append(frame(sequence))
    return history


def test_what_follows_a_place_is_read_in_order_and_bounded() -> None:
    history = history_of(3, 5, 9)
    assert [f.sequence for f in history.after(0, 10)] == [3, 5, 9]
    assert [f.sequence for f in history.after(3, 10)] == [5, 9]
    assert [f.sequence for f in history.after(4, 1)] == [5]
    assert history.after(9, 10) == []


def test_the_floor_is_the_last_sequence_that_was_evicted() -> None:
    history = history_of(3, 5, 9, max_events=2)
    assert (history.floor, history.head, len(history)) == (3, 9, 2)


def test_the_bound_in_bytes_evicts_too() -> None:
    one = frame(1).size
    history = history_of(1, 2, 3, max_bytes=2 * one + one // 2)
    assert (history.floor, len(history)) == (1, 2)
    assert history.bytes <= 2 * one + one // 2


def test_without_room_nothing_is_kept_and_the_head_still_moves() -> None:
    history = history_of(1, 2, max_events=0)
    assert (history.floor, history.head, len(history)) == (2, 2, 0)
    assert history.after(2, 10) == []


def test_messages_without_a_frame_move_the_head_but_never_back() -> None:
    history = history_of(1)
    history.advance(7)
    history.advance(5)
    assert history.head == 7


def test_opening_an_epoch_forgets_the_old_one() -> None:
    history = history_of(1, 2, 3)
    history.open("f", 41)
    assert (history.epoch, history.head, history.floor, len(history), history.bytes) == ("f", 41, 41, 0, 0)


def test_a_frame_is_found_by_its_sequence() -> None:
    history = history_of(3, 5)
    found = history.get(5)
    assert found is not None
    assert found.id == "e-5"
    assert history.get(4) is None


def test_frames_are_read_backwards_for_listing() -> None:
    history = history_of(3, 5, 9, max_events=2)
    assert [f.sequence for f in history.before(9)] == [5]
    assert [f.sequence for f in history.before(100)] == [9, 5]


def test_a_notice_is_a_gap_for_everybody() -> None:
    notice = Frame.notice("e", 4, "upstream")
    assert notice.notification == b'event: gap\ndata: {"reason":"upstream","missed":null}\nid: e-4\n\n'
    assert notice.full == notice.notification


def test_the_whole_discovery_is_encoded_once() -> None:
    told = frame(1, extra=[1, 2])
    assert b'"_meta":{"discovery":{"agent_id"' in told.full
    assert told.full is told.full


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("m8x2k-41", ("m8x2k", 41)),
        ("a-b-7", ("a-b", 7)),
        ("", None),
        ("41", None),
        ("-41", None),
        ("m8x2k-", None),
        ("m8x2k-x", None),
        ("m8x2k-٤", None),
        ("m8x2k-" + "9" * 30, None),
    ],
)
def test_an_event_id_is_an_epoch_and_a_number(text: str, parsed: tuple[str, int] | None) -> None:
    assert parse_event_id(text) == parsed
    if parsed is not None:
        assert event_id(*parsed) == text


@given(
    gaps=st.lists(st.integers(1, 5), min_size=1, max_size=1500),
    max_events=st.integers(0, 700),
    place=st.integers(0, 8000),
)
def test_memory_is_exactly_the_newest_frames(gaps: list[int], max_events: int, place: int) -> None:
    history = History(max_events, 1 << 30)
    history.open("e", 0)
    shared = decode(payload())
    sequences = []
    sequence = 0
    for gap in gaps:
        sequence += gap
        sequences.append(sequence)
        history.append(Frame.of("e", sequence, "s", shared))
    kept = sequences[-max_events:] if max_events else []
    assert [f.sequence for f in history] == kept
    assert history.floor == (sequences[-len(kept) - 1] if len(kept) < len(sequences) else 0)
    assert [f.sequence for f in history.after(place, 50)] == [s for s in kept if s > place][:50]
