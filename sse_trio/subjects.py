"""NATS subjects and the patterns over them: what matches, and which pattern is part of which.

A subject is tokens joined by dots. In a pattern the token `*` stands for exactly one token, and a last token
`>` for one or more; both are wildcards only when they are the whole token (`foo*` is a literal). Everything
here is pure and errs on the side of "no": `is_subset` is what authorization rests on, and may never allow
more than it was asked.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["MAX_TOKENS", "Patterns", "is_pattern", "is_subset", "matches"]

Node = dict[str | None, "Node"]

MAX_LENGTH = 256
"""Characters in a pattern; nats-server's own limit is the control line, far above any subject in use."""


MAX_TOKENS = 1000
"""Tokens in all the patterns that a client may ask for: a tree of them takes up to 310 bytes for each."""


def is_pattern(text: str) -> bool:
    """Whether `text` is a subject or a pattern that NATS would accept in a subscription."""
    if len(text) > MAX_LENGTH or any(c.isspace() or c < " " or c == "\x7f" for c in text):
        return False
    tokens = text.split(".")
    return all(tokens) and ">" not in tokens[:-1]


def matches(pattern: str, subject: str) -> bool:
    """Whether a message on `subject` would reach a subscription to `pattern`."""
    wanted, tokens = pattern.split("."), subject.split(".")
    if wanted[-1] == ">":
        wanted.pop()
        if len(tokens) <= len(wanted):
            return False
    elif len(tokens) != len(wanted):
        return False
    # `zip` may stop early: what is left over in `tokens` is the tail that `>` stands for.
    return all(want in ("*", token) for want, token in zip(wanted, tokens, strict=False))


class Patterns:
    """Patterns that are looked at together: how long that takes is for the subject to say, and not for their number.

    They are a tree of tokens, of which a subject goes down all branches that fit: two at most from any node.
    """

    __slots__ = ("_root",)

    def __init__(self, patterns: Iterable[str]) -> None:
        self._root: Node = {}
        for pattern in patterns:
            node = self._root
            for token in pattern.split("."):
                node = node.setdefault(token, {})
            node[None] = {}  # one ends here; None is no token

    def match(self, subject: str) -> bool:
        """Whether a message on `subject` would reach a subscription to one of them."""
        nodes = [self._root]
        for token in subject.split("."):
            fitting: list[Node] = []
            for node in nodes:
                if ">" in node:
                    return True
                if (exact := node.get(token)) is not None:
                    fitting.append(exact)
                if token != "*" and (any_token := node.get("*")) is not None:
                    fitting.append(any_token)
            if not fitting:
                return False
            nodes = fitting
        return any(None in node for node in nodes)


def _is_part(pattern: list[str], whole: list[str]) -> bool:
    """Whether every subject that `pattern` matches is matched by `whole`, too; both as tokens."""
    for index, allowed in enumerate(whole):
        if allowed == ">" and index == len(whole) - 1:
            return len(pattern) > index
        if index >= len(pattern):
            return False
        token = pattern[index]
        # A tail is wider than any single token, and `*` is wider than any literal.
        if token == ">" or (allowed != "*" and token != allowed):
            return False
    return len(pattern) == len(whole)


def is_subset(pattern: str, allowed: Iterable[str]) -> bool:
    """Whether one of `allowed` matches every subject that `pattern` can match.

    A pattern that only several of them together would cover (`a.>` by `a.*` and `a.*.>`) is refused: never
    too much, at the price of asking the issuer of a token to write the wider pattern. What is no valid
    pattern is part of nothing.
    """
    if not is_pattern(pattern):
        return False
    tokens = pattern.split(".")
    return any(is_pattern(whole) and _is_part(tokens, whole.split(".")) for whole in allowed)
