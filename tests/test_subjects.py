"""NATS patterns: tables, and Hypothesis against brute force over every subject of a small world."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sse_trio.subjects import Patterns, is_pattern, is_subset, matches

# `c` is in no pattern: it stands for every token that a pattern does not name. One token more than any
# pattern has stands for every longer subject.
SUBJECTS = [".".join(tokens) for length in range(1, 5) for tokens in itertools.product("abc", repeat=length)]
patterns = st.lists(st.sampled_from(["a", "b", "*", ">"]), min_size=1, max_size=3).map(".".join).filter(is_pattern)


def by_regex(pattern: str, subject: str) -> bool:
    """Another way to say what a pattern matches."""
    parts = [{"*": r"[^.]+", ">": r".+"}.get(token, re.escape(token)) for token in pattern.split(".")]
    return re.fullmatch(r"\.".join(parts), subject) is not None


@pytest.mark.parametrize(
    ("pattern", "subject", "expected"),
    [
        ("discoveries.insights", "discoveries.insights", True),
        ("discoveries.insights", "discoveries.insight", False),
        ("discoveries.insights", "discoveries", False),
        ("discoveries.*", "discoveries.insights", True),
        ("discoveries.*", "discoveries", False),
        ("discoveries.*", "discoveries.a.b", False),
        ("*.insights", "discoveries.insights", True),
        ("discoveries.>", "discoveries", False),
        ("discoveries.>", "discoveries.a", True),
        ("discoveries.>", "discoveries.a.b.c", True),
        ("discoveries.*.>", "discoveries.a", False),
        ("discoveries.*.>", "discoveries.a.b", True),
        (">", "a", True),
        (">", "a.b", True),
        ("*", "a.b", False),
        ("disc*", "discoveries", False),
        ("disc*", "disc*", True),
        ("a>", "ab", False),
        ("Discoveries.a", "discoveries.a", False),
        ("discoveries.in", "discoveries.insights", False),
    ],
)
def test_a_pattern_matches_what_nats_would_deliver(pattern: str, subject: str, expected: bool) -> None:
    assert matches(pattern, subject) is expected
    assert Patterns([pattern]).match(subject) is expected


@given(st.lists(patterns, max_size=6), st.sampled_from([*SUBJECTS, "*", "a.*", "*.*.b"]))
def test_patterns_together_match_what_one_of_them_does(several: list[str], subject: str) -> None:
    assert Patterns(several).match(subject) is any(matches(pattern, subject) for pattern in several)


@given(patterns, st.sampled_from(SUBJECTS))
def test_matching_agrees_with_another_implementation(pattern: str, subject: str) -> None:
    assert matches(pattern, subject) is by_regex(pattern, subject)


@pytest.mark.parametrize(
    ("pattern", "allowed", "expected"),
    [
        ("discoveries.>", ["discoveries.>"], True),
        ("discoveries.insights", ["discoveries.>"], True),
        ("discoveries.*", ["discoveries.>"], True),
        (">", ["discoveries.>"], False),
        ("*", ["discoveries.>"], False),
        ("*.insights", ["discoveries.*"], False),
        ("discoveries.>", ["discoveries.*"], False),
        ("discoveries.>", ["discoveries.insights"], False),
        ("discoveries.*", ["discoveries.insights"], False),
        ("discoveries", ["discoveries.>"], False),
        ("discoveries.*.>", ["discoveries.>"], True),
        ("discoveries.>", ["discoveries.*.>"], False),
        ("discoveries.a", ["other.>", "discoveries.a"], True),
        ("discoveries.a", [], False),
        ("discoveries.a.", ["discoveries.>"], False),
        ("discoveries..a", ["discoveries.>"], False),
        ("discoveries.>.a", ["discoveries.>"], False),
        ("", [">"], False),
        ("a", [""], False),
        ("a.b", [">.b"], False),
        ("a b", [">"], False),
        ("a.\x00", [">"], False),
        ("a.\r\nPUB x 0", [">"], False),
        ("a." * 200 + "a", [">"], False),
    ],
)
def test_a_pattern_is_part_of_what_is_allowed_or_refused(pattern: str, allowed: list[str], expected: bool) -> None:
    assert is_subset(pattern, allowed) is expected


def test_a_pattern_has_at_most_256_characters() -> None:
    assert is_pattern("a" * 256)
    assert not is_pattern("a" * 257)


@given(patterns, patterns)
def test_being_part_of_one_pattern_is_exact(pattern: str, whole: str) -> None:
    everything_is_matched = all(matches(whole, subject) for subject in SUBJECTS if matches(pattern, subject))
    assert is_subset(pattern, [whole]) is everything_is_matched


@given(patterns, st.lists(patterns, max_size=4))
def test_being_part_of_several_patterns_never_allows_too_much(pattern: str, allowed: list[str]) -> None:
    assume(is_subset(pattern, allowed))
    for subject in SUBJECTS:
        if matches(pattern, subject):
            assert any(matches(whole, subject) for whole in allowed), subject


@given(st.text(max_size=20), st.text(max_size=20))
def test_no_text_makes_it_raise(pattern: str, other: str) -> None:
    assert matches(pattern, other) in {True, False}
    assert is_subset(pattern, [other]) in {True, False}
    if is_subset(pattern, [other]):
        assert is_pattern(pattern)
        assert is_pattern(other)
