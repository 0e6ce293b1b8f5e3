"""The keys that tokens are checked with: read from a JWKS file or URL, kept fresh, kept through an outage of
their source.

Strategy: one task (`KeySet.run`) is the only one that fetches; whoever meets an unknown key id asks it and
waits, and gets no more than one fetch per `ASK_INTERVAL` however many ask. What was fetched replaces the old
keys as a whole (a key that its issuer withdrew must stop working); what could not be fetched or read changes
nothing. A key works with one algorithm, which its kind decides, never the token: RSA is RS256, P-256 is
ES256, Edwards is EdDSA.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import httpx
import jwt
import structlog
import trio

from sse_trio.addresses import is_loopback_host
from sse_trio.settings import SettingsError

__all__ = ["ALGORITHMS", "Key", "KeySet", "KeySourceError", "parse_keys"]

log = structlog.get_logger("sse_trio.jwks")

ALGORITHMS = frozenset({"RS256", "ES256", "EdDSA"})

REFRESH_INTERVAL = 300.0
"""Seconds between fetches of a source that answers."""

ASK_INTERVAL = 10.0
"""Seconds between fetches of one that does not, and between those that an unknown key id may cause."""

FETCH_TIMEOUT = 5.0
MAX_BYTES = 256 * 1024
MAX_KEYS = 100


class KeySourceError(Exception):
    """The source could not be read, or what it said is no JWKS; the text is safe to log."""


@dataclass(frozen=True, slots=True)
class Key:
    """One public key: its id, the one algorithm that it verifies, and the key itself."""

    kid: str | None
    algorithm: str
    key: Any


def parse_keys(document: bytes) -> tuple[tuple[Key, ...], int]:
    """The usable keys of a JWKS document, and how many others it has.

    A key of another kind, for another use, with a private part, or too weak is left out, as RFC 7517 asks.

    Raises:
        KeySourceError: the document is no JWKS.
    """
    try:
        keys = json.loads(document)["keys"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise KeySourceError("it is not a JSON object with a list of keys") from None
    if not isinstance(keys, list) or len(keys) > MAX_KEYS:
        raise KeySourceError(f"its keys are not a list of at most {MAX_KEYS}")
    usable = tuple(key for key in map(_usable, keys) if key is not None)
    return usable, len(keys) - len(usable)


def _usable(data: object) -> Key | None:
    if not isinstance(data, dict):
        return None
    match data.get("kty"), data.get("crv"):
        case "RSA", _:
            algorithm = "RS256"
        case "EC", "P-256":
            algorithm = "ES256"
        case "OKP", "Ed25519":
            algorithm = "EdDSA"
        case _:
            return None
    operations = data.get("key_ops", ["verify"])
    if (
        data.get("alg", algorithm) != algorithm
        or data.get("use", "sig") != "sig"
        or not isinstance(operations, list)
        or "verify" not in operations
        or "d" in data
    ):
        return None
    kid = data.get("kid")
    if kid is not None and not isinstance(kid, str):
        return None
    try:
        key = jwt.PyJWK.from_dict(data, algorithm).key
    except Exception:  # whatever a malformed key makes the libraries say, it is a key that cannot be used
        return None
    if algorithm == "RS256" and key.key_size < 2048:
        return None
    return Key(kid, algorithm, key)


class KeySet:
    """The keys of one source. `keys` is None until they could be read for the first time.

    Raises:
        SettingsError: the source is a file that cannot be read or is no JWKS. A URL that does not answer is
        not an
            error at start: its tokens are refused with 503 until it does.
    """

    def __init__(self, source: str) -> None:
        self.keys: tuple[Key, ...] | None = None
        parts = urlsplit(source)
        self._url = source if parts.scheme in {"http", "https"} else None
        self._path = Path(unquote(parts.path) if parts.scheme == "file" else source)
        # What a log may show: a URL can carry a password or a key in its user info or query.
        self.name = f"{parts.scheme}://{parts.hostname}{parts.path}" if self._url else str(self._path)
        self._asked = trio.Event()
        self._fetched = trio.Event()
        self._last_fetch = float("-inf")
        self._unprotected = parts.scheme == "http" and not is_loopback_host(parts.netloc.rpartition("@")[2])
        self._ignored = 0
        self._failing = False
        self._running = False
        # A file system that hangs costs one thread, not one at every attempt.
        self._limiter = trio.CapacityLimiter(1)
        if self._url is None:
            try:
                self.keys, _ = parse_keys(self._read_file())
            except KeySourceError as error:
                raise SettingsError(f"SSE_JWT_JWKS: {self.name}: {error}") from None

    def find(self, kid: str | None, algorithm: str) -> Key | None:
        """The key that a token with this header is checked with.

        A token without a key id works only where there is no choice.
        """
        fitting = [key for key in self.keys or () if key.algorithm == algorithm and kid in (None, key.kid)]
        return fitting[0] if len(fitting) == 1 else None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the keys fresh, for ever; started after the first attempt, whether or not it succeeded.

        Errors: none of the source's leave here; an outage is logged once, and its end.
        """
        if self._unprotected:
            log.warning("keys come unprotected", source=self.name, hint="who is in between can make tokens: use https")
        self._running = True
        try:
            await self._refresh()
            task_status.started()
            while True:
                with trio.move_on_after(ASK_INTERVAL if self._failing else REFRESH_INTERVAL):
                    await self._asked.wait()
                await self._refresh()
        finally:
            self._running = False

    async def ask(self) -> bool:
        """Have the source read again, because of a key id that is not known; whether that happened.

        Waits for at most one fetch. Within `ASK_INTERVAL` of the last one, and while nobody fetches, the
        answer is False, at once.
        """
        if not self._running or trio.current_time() - self._last_fetch < ASK_INTERVAL:
            await trio.lowlevel.checkpoint()
            return False
        self._asked.set()
        await self._fetched.wait()
        return True

    async def _refresh(self) -> None:
        try:
            with trio.fail_after(FETCH_TIMEOUT):
                if self._url is None:
                    document = await trio.to_thread.run_sync(
                        self._read_file, abandon_on_cancel=True, limiter=self._limiter
                    )
                else:
                    document = await self._fetch(self._url)
            self.keys, ignored = parse_keys(document)
        except (KeySourceError, trio.TooSlowError) as error:
            if not self._failing:
                self._failing = True
                reason = str(error) or f"no answer within {FETCH_TIMEOUT:g} s"
                log.warning("keys unavailable", source=self.name, reason=reason, keys_kept=len(self.keys or ()))
        else:
            if self._failing:
                self._failing = False
                log.info("keys available", source=self.name, keys=len(self.keys))
            if ignored > self._ignored:
                log.warning("keys ignored", source=self.name, ignored=ignored, usable=len(self.keys))
            self._ignored = ignored
        self._last_fetch = trio.current_time()
        self._asked = trio.Event()
        fetched, self._fetched = self._fetched, trio.Event()
        fetched.set()

    def _read_file(self) -> bytes:
        try:
            with self._path.open("rb") as file:
                document = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise KeySourceError(f"it cannot be read: {error.strerror}") from None
        if len(document) > MAX_BYTES:
            raise KeySourceError(f"it is larger than {MAX_BYTES} bytes")
        return document

    async def _fetch(self, url: str) -> bytes:
        document = bytearray()
        accept = {"Accept": "application/jwk-set+json, application/json"}
        try:
            async with (
                httpx.AsyncClient(timeout=FETCH_TIMEOUT) as client,
                client.stream("GET", url, headers=accept) as answer,
            ):
                if answer.status_code != 200:
                    raise KeySourceError(f"it answered {answer.status_code}")
                # Left by cancellation, not by an exception of ours: that would abandon httpx's nested
                # generators.
                with trio.CancelScope() as enough:
                    async for chunk in answer.aiter_bytes():
                        document += chunk
                        if len(document) > MAX_BYTES:
                            enough.cancel()
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            # The error's own text may name the URL.
            raise KeySourceError(type(error).__name__) from None
        if len(document) > MAX_BYTES:
            raise KeySourceError(f"it is larger than {MAX_BYTES} bytes")
        return bytes(document)
