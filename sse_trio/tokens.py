"""Tokens: from the text that somebody presents to a `Grant`, or to `InvalidToken`.

Strategy: the algorithm is pinned by the key, and the key by its kind: HS256 goes with the secret and nothing
else, the others with a key of the JWKS that was made for them, so neither `none` nor an RSA key used as a
secret has a way in. PyJWT checks signature, audience and issuer; times are checked here, against a clock
that is passed in. A claim that is absent grants nothing, a claim of the wrong type makes the token invalid:
nobody guesses what its issuer meant.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jwt
import structlog
import trio

from sse_trio.jwks import ALGORITHMS, KeySet
from sse_trio.settings import Settings, SettingsError
from sse_trio.subjects import is_pattern, is_subset, matches

__all__ = ["EVERYONE", "Grant", "InvalidToken", "KeysUnavailable", "Tokens"]

log = structlog.get_logger("sse_trio.tokens")

MAX_TOKEN = 8192
MAX_ENTRIES = 100
"""Entries in a claim that is a list."""

MAX_TEXT = 256
"""Characters in a text within a claim."""

LEEWAY = 10.0
"""Seconds that an issuer's clock may be ahead (`nbf`, `iat`). `exp` gets none: a stream ends there to the
second.
"""

_COMPACT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*")


class InvalidToken(Exception):
    """The token grants nothing; the text says no more than its holder may know."""


class KeysUnavailable(Exception):
    """The source of the keys has not answered yet, so that nothing can be said about any token."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What the holder of this grant may do. Times are wall-clock seconds; None for a list means "any"."""

    subject: str | None = None
    expires_at: float | None = None
    agent_ids: tuple[str, ...] | None = ()
    subjects: tuple[str, ...] | None = ()
    is_admin: bool = False
    may_share: bool = False

    def may_be(self, agent_id: str) -> bool:
        """Whether the holder may listen as this agent."""
        return self.agent_ids is None or any(_glob(pattern, agent_id) for pattern in self.agent_ids)

    def may_hear(self, subject: str) -> bool:
        """Whether a message on this subject may reach the holder, live, replayed or by its URI."""
        return self.subjects is None or any(matches(pattern, subject) for pattern in self.subjects)

    def may_ask_for(self, pattern: str) -> bool:
        """Whether everything that this pattern can match may reach the holder."""
        return self.subjects is None or is_subset(pattern, self.subjects)


EVERYONE = Grant(agent_ids=None, subjects=None)
"""What a request may do while authentication is off."""


def _glob(pattern: str, text: str) -> bool:
    """Whether `text` matches `pattern`, where `*` is any run of characters; linear in the text, whatever the
    pattern.
    """
    first, *rest = pattern.split("*")
    if not rest:
        return text == pattern
    *middle, last = rest
    if not text.startswith(first):
        return False
    position = len(first)
    for part in middle:
        found = text.find(part, position)
        if found < 0:
            return False
        position = found + len(part)
    return len(text) - position >= len(last) and text.endswith(last)


class Tokens:
    """Checks tokens against the secret, the JWKS, or both. `clock` gives wall-clock seconds.

    Raises:
        SettingsError: the secret or the JWKS file cannot be used.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._audience = settings.jwt_audience
        self._issuer = settings.jwt_issuer
        self.keys = KeySet(settings.jwt_jwks) if settings.jwt_jwks else None
        self._secret: bytes | None = None
        self._short = False
        if settings.jwt_secret is not None:
            secret = settings.jwt_secret.get_secret_value().encode()
            if b"-----BEGIN " in secret:
                raise SettingsError("SSE_JWT_SECRET: this is a key in PEM form; put public keys into SSE_JWT_JWKS")
            # HMAC fills a short key up with zero bytes anyway; done here, the library need not warn at each
            # token.
            self._short = len(secret) < 32
            self._secret = secret.ljust(32, b"\0")

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Say what an operator should know, and keep the JWKS fresh, for ever; returns where there is none."""
        if self._short:
            log.warning("secret is short", hint="HS256 wants 32 random bytes (RFC 7518, 3.2)")
        if self.keys is not None:
            await self.keys.run(task_status=task_status)
        else:
            task_status.started()
            await trio.lowlevel.checkpoint()

    async def check(self, token: str) -> Grant:
        """The grant that the token's claims describe.

        Waits (bounded) for the JWKS to be read again where the token names a key that is not known yet.

        Raises:
            InvalidToken: anything at all is wrong with it.
            KeysUnavailable: there are no keys yet to check it with.
        """
        await trio.lowlevel.checkpoint()
        if len(token) > MAX_TOKEN or not _COMPACT.fullmatch(token):
            raise InvalidToken("the token is not valid")
        try:
            header = jwt.get_unverified_header(token)
        except Exception:  # see _verify
            raise InvalidToken("the token is not valid") from None
        algorithm, kid = header.get("alg"), header.get("kid")
        if not isinstance(algorithm, str) or not isinstance(kid, str | None) or "crit" in header or "b64" in header:
            raise InvalidToken("the token is not valid")
        if algorithm == "HS256" and self._secret is not None:
            return self._grant(self._verify(token, self._secret, algorithm))
        if algorithm not in ALGORITHMS or self.keys is None:
            raise InvalidToken("the token is not valid")
        key = self.keys.find(kid, algorithm)
        if key is None and await self.keys.ask():
            key = self.keys.find(kid, algorithm)
        if self.keys.keys is None:
            raise KeysUnavailable
        if key is None:
            raise InvalidToken("the token is not valid")
        return self._grant(self._verify(token, key.key, key.algorithm))

    def _verify(self, token: str, key: Any, algorithm: str) -> dict[str, Any]:
        """The token's claims, once signature, audience and issuer are known to be right."""
        try:
            return jwt.decode(
                token,
                key,
                algorithms=[algorithm],
                audience=self._audience,
                issuer=self._issuer,
                options={
                    "require": ["exp"],
                    "verify_aud": self._audience is not None,
                    "verify_iss": self._issuer is not None,
                    "verify_exp": False,
                    "verify_nbf": False,
                    "verify_iat": False,
                },
            )
        except Exception:
            # Not only PyJWT's own errors: hostile JSON makes it raise OverflowError, RecursionError and
            # others. Whatever it is, the token could not be verified.
            raise InvalidToken("the token is not valid") from None

    def _grant(self, claims: Mapping[str, Any]) -> Grant:
        now = self._clock()
        expires_at = _time(claims, "exp")
        if expires_at is None or now >= expires_at:
            raise InvalidToken("the token has expired")
        for name in ("nbf", "iat"):
            start = _time(claims, name)
            if start is not None and start > now + LEEWAY:
                raise InvalidToken("the token is not valid yet")
        subject = claims.get("sub")
        if not isinstance(subject, str | None) or len(subject or "") > MAX_TEXT:
            raise InvalidToken("the claim sub is not a short text")
        subjects = _texts(claims, "subjects")
        if not all(map(is_pattern, subjects)):
            raise InvalidToken("the claim subjects holds what is no NATS subject")
        share = claims.get("share", False)
        if not isinstance(share, bool):
            raise InvalidToken("the claim share is not true or false")
        return Grant(
            subject=subject,
            expires_at=expires_at,
            agent_ids=_texts(claims, "agent_ids"),
            subjects=subjects,
            is_admin="admin" in _texts(claims, "roles"),
            may_share=share,
        )


def _time(claims: Mapping[str, Any], name: str) -> float | None:
    if name not in claims:
        return None
    value = claims[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e12 or math.isnan(value):
        raise InvalidToken(f"the claim {name} is not a time in seconds")
    return float(value)


def _texts(claims: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = claims.get(name, [])
    if (
        not isinstance(value, list)
        or len(value) > MAX_ENTRIES
        or not all(isinstance(entry, str) and 0 < len(entry) <= MAX_TEXT for entry in value)
    ):
        raise InvalidToken(f"the claim {name} is not a list of short texts")
    return tuple(value)
