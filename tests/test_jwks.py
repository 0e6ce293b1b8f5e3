"""The JWKS: which keys count, and how they are kept fresh through whatever their source does.

The sources are real: a file, and an HTTP server on a port of its own. Intervals pass on the mock clock.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import jwt
import pytest
import trio
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from test_tokens import CLAIMS, EDWARDS, ELLIPTIC, NOW, RSA, forged, public_jwk, settings, signed
from trio.testing import MockClock

from sse_trio.jwks import (
    ASK_INTERVAL,
    FETCH_TIMEOUT,
    MAX_BYTES,
    REFRESH_INTERVAL,
    KeySet,
    KeySourceError,
    parse_keys,
)
from sse_trio.settings import SettingsError
from sse_trio.tokens import Grant, InvalidToken, KeysUnavailable, Tokens

PATIENCE = 30.0
"""Real seconds that a test waits for something; the mock clock stands still meanwhile."""


async def soon(condition: Callable[[], Any], what: str) -> None:
    """Let the other tasks run until the condition holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE:g} s: {what}"
        await trio.lowlevel.checkpoint()


def document(*keys: dict[str, Any]) -> bytes:
    return json.dumps({"keys": keys}).encode()


@dataclass
class Source:
    """An HTTP server that says what the test wants it to say; "silent" means that it never answers."""

    url: str
    body: bytes = b""
    status: int = 200
    silent: bool = False
    closed: bool = False
    requests: list[bytes] = field(default_factory=list)

    def asked_more_than(self, times: int) -> bool:
        return len(self.requests) > times

    async def serve(self, stream: trio.SocketStream) -> None:
        async with stream:
            if self.closed:
                return
            try:
                self.requests.append(await stream.receive_some())
                if self.silent:
                    await stream.receive_some()
                    return
                head = f"HTTP/1.1 {self.status} X\r\nContent-Length: {len(self.body)}\r\n\r\n"
                await stream.send_all(head.encode() + self.body)
            except trio.BrokenResourceError:
                pass  # the client has had enough


@asynccontextmanager
async def source(*keys: dict[str, Any]) -> AsyncIterator[Source]:
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]
        served = Source(f"http://user:hidden@127.0.0.1:{port}/keys?key=hidden", document(*keys))
        await nursery.start(trio.serve_listeners, served.serve, listeners)
        yield served
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def running(keys: KeySet) -> AsyncIterator[KeySet]:
    async with trio.open_nursery() as nursery:
        await nursery.start(keys.run)
        yield keys
        nursery.cancel_scope.cancel()


RSA_KEY = public_jwk(RSA, kid="rsa-1")
ELLIPTIC_KEY = public_jwk(ELLIPTIC, kid="ec-1")
EDWARDS_KEY = public_jwk(EDWARDS, kid="ed-1")


def checker(path: Path, *keys: dict[str, Any], **variables: str) -> Tokens:
    file = path / "keys.json"
    file.write_bytes(document(*keys))
    return Tokens(settings(JWKS=str(file), **variables), lambda: NOW)


@pytest.mark.parametrize(
    ("key", "algorithm", "kid"),
    [(RSA, "RS256", "rsa-1"), (ELLIPTIC, "ES256", "ec-1"), (EDWARDS, "EdDSA", "ed-1")],
)
async def test_a_token_is_checked_with_the_key_that_it_names(
    tmp_path: Path, key: Any, algorithm: str, kid: str
) -> None:
    tokens = checker(tmp_path, RSA_KEY, ELLIPTIC_KEY, EDWARDS_KEY)
    assert await tokens.check(signed(CLAIMS, key, algorithm, kid=kid)) == Grant(expires_at=NOW + 60)


@pytest.mark.parametrize(
    "token",
    [
        pytest.param(signed(CLAIMS, RSA, "RS256", kid="ec-1"), id="another key's id"),
        pytest.param(signed(CLAIMS, RSA, "RS256", kid="unknown"), id="an unknown id"),
        pytest.param(signed(CLAIMS, RSA, "RS512", kid="rsa-1"), id="another algorithm for the same key"),
        pytest.param(signed(CLAIMS, RSA, "PS256", kid="rsa-1"), id="another padding for the same key"),
        pytest.param(
            signed(CLAIMS, rsa.generate_private_key(65537, 2048), "RS256", kid="rsa-1"),
            id="signed by somebody else",
        ),
        pytest.param(
            signed(CLAIMS, ec.generate_private_key(ec.SECP256R1()), "ES256", kid="ec-1"),
            id="by somebody else, too",
        ),
        pytest.param(signed(CLAIMS, algorithm="HS256", kid="rsa-1"), id="an HMAC although there is no secret"),
        pytest.param(forged({"alg": "none", "kid": "rsa-1"}, CLAIMS, None), id="no signature"),
        pytest.param(forged({"alg": "RS256", "kid": "rsa-1"}, CLAIMS, None), id="an empty signature"),
        pytest.param(forged({"alg": "ES256", "kid": "ec-1"}, CLAIMS, None), id="an empty signature, too"),
    ],
)
async def test_a_forged_token_is_refused(tmp_path: Path, token: str) -> None:
    with pytest.raises(InvalidToken, match=r"^the token is not valid$"):
        await checker(tmp_path, RSA_KEY, ELLIPTIC_KEY).check(token)


@pytest.mark.parametrize("also_a_secret", [False, True])
async def test_a_public_key_is_never_a_secret(tmp_path: Path, also_a_secret: bool) -> None:
    variables = {"SECRET": "0123456789abcdef0123456789abcdef"} if also_a_secret else {}
    tokens = checker(tmp_path, RSA_KEY, **variables)
    public = RSA.public_key()
    for secret in (
        public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        public.public_bytes(Encoding.PEM, PublicFormat.PKCS1),
        public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        json.dumps(RSA_KEY).encode(),
        RSA_KEY["n"].encode(),
    ):
        for algorithm in ("HS256", "RS256"):
            with pytest.raises(InvalidToken):
                await tokens.check(forged({"alg": algorithm, "kid": "rsa-1"}, CLAIMS, secret))


async def test_secret_and_keys_work_side_by_side(tmp_path: Path) -> None:
    tokens = checker(tmp_path, RSA_KEY, SECRET="0123456789abcdef0123456789abcdef")
    assert (await tokens.check(signed(CLAIMS))).expires_at == NOW + 60
    assert (await tokens.check(signed(CLAIMS, RSA, "RS256", kid="rsa-1"))).expires_at == NOW + 60


async def test_a_token_without_a_key_id_works_only_where_there_is_no_choice(tmp_path: Path) -> None:
    assert (await checker(tmp_path, RSA_KEY, ELLIPTIC_KEY).check(signed(CLAIMS, RSA, "RS256"))).expires_at == NOW + 60
    other = public_jwk(rsa.generate_private_key(65537, 2048), kid="rsa-2")
    with pytest.raises(InvalidToken):
        await checker(tmp_path, RSA_KEY, other).check(signed(CLAIMS, RSA, "RS256"))


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(RSA_KEY | {"use": "enc"}, id="for encryption"),
        pytest.param(RSA_KEY | {"key_ops": ["encrypt"]}, id="for another operation"),
        pytest.param(RSA_KEY | {"key_ops": "verify"}, id="operations of the wrong type"),
        pytest.param(RSA_KEY | {"alg": "RS512"}, id="for another algorithm"),
        pytest.param(RSA_KEY | {"alg": "HS256"}, id="for an HMAC"),
        pytest.param(RSA_KEY | {"kid": 7}, id="an id of the wrong type"),
        pytest.param(RSA_KEY | {"n": "!!!"}, id="broken numbers"),
        pytest.param(RSA_KEY | {"n": None}, id="missing numbers"),
        pytest.param(
            json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(RSA)) | {"kid": "rsa-1"}, id="with its private part"
        ),
        pytest.param(public_jwk(rsa.generate_private_key(65537, 1024), kid="rsa-1"), id="1024 bits"),
        pytest.param(public_jwk(ec.generate_private_key(ec.SECP384R1()), kid="ec-1"), id="another curve"),
        pytest.param({"kty": "oct", "k": "c2VjcmV0", "kid": "oct-1", "alg": "HS256"}, id="a shared secret"),
        pytest.param({"kty": "unheard-of"}, id="another kind"),
        pytest.param({}, id="nothing"),
        pytest.param("text", id="no object"),
    ],
)
def test_a_key_that_is_not_for_this_is_left_out_and_the_others_stay(key: Any) -> None:
    usable, ignored = parse_keys(document(key, EDWARDS_KEY))
    assert [key.kid for key in usable] == ["ed-1"]
    assert ignored == 1


def test_a_key_may_say_what_it_is_for() -> None:
    keys, _ = parse_keys(document(RSA_KEY | {"use": "sig", "key_ops": ["verify"], "alg": "RS256"}))
    assert [key.algorithm for key in keys] == ["RS256"]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"7",
        b"null",
        b"{}",
        b'{"keys":{}}',
        b'{"keys":null}',
        b"<html>",
        b"\xff",
        b"[" * 100_000,
        document(*[{}] * 101),
    ],
    ids=range(11),
)
def test_what_is_no_key_set_is_refused(text: bytes) -> None:
    with pytest.raises(KeySourceError):
        parse_keys(text)


def test_a_file_that_cannot_be_used_is_an_error_at_start(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"SSE_JWT_JWKS: .*missing.json: it cannot be read: No such file"):
        KeySet(str(tmp_path / "missing.json"))
    (tmp_path / "broken.json").write_text("[]")
    with pytest.raises(SettingsError, match=r"SSE_JWT_JWKS: .*broken.json: it is not a JSON object"):
        KeySet(f"file://{tmp_path}/broken.json")
    (tmp_path / "huge.json").write_bytes(b" " * (MAX_BYTES + 1))
    with pytest.raises(SettingsError, match=r"larger than"):
        KeySet(str(tmp_path / "huge.json"))


@pytest.mark.parametrize(
    ("source", "warned"),
    [
        ("http://issuer.example/keys", True),
        ("http://user:hidden@issuer.example:80/keys?a=hidden", True),
        ("https://issuer.example/keys", False),
        ("http://127.0.0.1:9/keys", False),
        ("http://user:hidden@localhost/keys", False),
    ],
)
async def test_keys_from_afar_without_tls_are_warned_of(
    source: str, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = KeySet(source)
    assert not capsys.readouterr().out, "what is logged before logging is set up goes anywhere"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keys.run)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    said = capsys.readouterr().out
    assert ("keys come unprotected" in said) is warned
    assert "hidden" not in said


async def test_keys_that_are_left_out_are_said_once(
    tmp_path: Path, mock_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys.json"
    file.write_bytes(document(RSA_KEY, {}))
    async with running(KeySet(str(file))) as keys:
        file.write_bytes(document(ELLIPTIC_KEY, {}))
        mock_clock.jump(REFRESH_INTERVAL)
        await soon(lambda: keys.find("ec-1", "ES256"), "it is read again")
    assert capsys.readouterr().out.count("keys ignored") == 1


async def test_a_file_is_read_again_and_a_broken_one_changes_nothing(
    tmp_path: Path, mock_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys.json"
    file.write_bytes(document(RSA_KEY))
    async with running(KeySet(str(file))) as keys:
        file.write_bytes(document(ELLIPTIC_KEY))
        mock_clock.jump(REFRESH_INTERVAL)
        await soon(lambda: keys.find("ec-1", "ES256"), "the new key is there")
        assert keys.find("rsa-1", "RS256") is None, "what was withdrawn stops working"
        file.write_bytes(b"half a fi")
        mock_clock.jump(REFRESH_INTERVAL)
        await soon(lambda: "keys unavailable" in capsys.readouterr().out, "the outage is logged")
        assert keys.find("ec-1", "ES256")


async def test_keys_are_fetched_from_a_url_and_kept_through_an_outage_that_is_logged_once(
    mock_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    async with source(RSA_KEY) as server, running(KeySet(server.url)) as keys:
        assert keys.find("rsa-1", "RS256"), "started means: asked once"
        server.status = 500
        for interval in (REFRESH_INTERVAL, ASK_INTERVAL, ASK_INTERVAL):
            asked = len(server.requests)
            mock_clock.jump(interval)
            await soon(partial(server.asked_more_than, asked), "it is asked again")
            await trio.testing.wait_all_tasks_blocked()
            assert keys.find("rsa-1", "RS256")
        server.status, server.body = 200, document(ELLIPTIC_KEY)
        mock_clock.jump(ASK_INTERVAL)
        await soon(lambda: keys.find("ec-1", "ES256"), "the source is back")
        assert keys.find("rsa-1", "RS256") is None
    said = capsys.readouterr().out
    assert said.count("keys unavailable") == 1
    assert said.count("keys available") == 1
    assert "it answered 500" in said
    assert "hidden" not in said


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"status": 302}, "it answered 302"),
        ({"body": b"<html>"}, "it is not a JSON object"),
        ({"body": b" " * (MAX_BYTES + 1)}, "it is larger than"),
        ({"closed": True}, "Error"),
    ],
    ids=["elsewhere", "no keys", "endless", "hanging up"],
)
async def test_a_source_that_says_something_else_changes_nothing(
    mock_clock: MockClock, capsys: pytest.CaptureFixture[str], change: dict[str, Any], reason: str
) -> None:
    async with source(RSA_KEY) as server, running(KeySet(server.url)) as keys:
        for name, value in change.items():
            setattr(server, name, value)
        mock_clock.jump(REFRESH_INTERVAL)
        said = StringIO()
        await soon(
            lambda: said.write(capsys.readouterr().out) >= 0 and "keys unavailable" in said.getvalue(), "it is logged"
        )
        assert reason in said.getvalue()
        assert "hidden" not in said.getvalue()
        assert keys.find("rsa-1", "RS256")


async def test_a_source_that_never_answers_is_given_up_after_exactly_the_timeout(
    mock_clock: MockClock,
) -> None:
    async with source(RSA_KEY) as server, trio.open_nursery() as nursery:
        server.silent = True
        keys = KeySet(server.url)
        began = trio.current_time()
        started: list[float] = []

        async def start() -> None:
            await nursery.start(keys.run)
            started.append(trio.current_time() - began)

        nursery.start_soon(start)
        await soon(lambda: server.requests, "the source is asked")
        mock_clock.jump(FETCH_TIMEOUT)
        await soon(lambda: started, "the start goes on without it")
        assert started == [FETCH_TIMEOUT]
        assert keys.keys is None
        nursery.cancel_scope.cancel()


async def test_tokens_wait_for_a_source_that_was_down_at_the_start(mock_clock: MockClock) -> None:
    async with source(RSA_KEY) as server:
        server.closed = True
        tokens = Tokens(settings(JWKS=server.url), lambda: NOW)
        assert tokens.keys is not None
        token = signed(CLAIMS, RSA, "RS256", kid="rsa-1")
        async with running(tokens.keys):
            with pytest.raises(KeysUnavailable):
                await tokens.check(token)
            with pytest.raises(InvalidToken):
                await tokens.check("not even a token")
            server.closed = False
            mock_clock.jump(ASK_INTERVAL)
            assert (await tokens.check(token)).expires_at == NOW + 60, "the first to ask again gets an answer"


async def test_a_new_key_works_at_once_and_unknown_ones_cause_one_fetch_in_ten_seconds(
    mock_clock: MockClock,
) -> None:
    async with source(RSA_KEY) as server:
        tokens = Tokens(settings(JWKS=server.url), lambda: NOW)
        assert tokens.keys is not None
        async with running(tokens.keys):
            assert len(server.requests) == 1
            server.body = document(RSA_KEY, ELLIPTIC_KEY)
            rotated = signed(CLAIMS, ELLIPTIC, "ES256", kid="ec-1")
            with pytest.raises(InvalidToken):
                await tokens.check(rotated)  # the last fetch was just now
            assert len(server.requests) == 1
            mock_clock.jump(ASK_INTERVAL)
            async with trio.open_nursery() as nursery:
                for _ in range(50):
                    nursery.start_soon(tokens.check, rotated)
            assert len(server.requests) == 2
            for number in range(50):
                with pytest.raises(InvalidToken):
                    await tokens.check(signed(CLAIMS, RSA, "RS256", kid=f"made-up-{number}"))
            assert len(server.requests) == 2


async def test_who_asks_while_nobody_fetches_is_not_kept_waiting(mock_clock: MockClock) -> None:
    began = trio.current_time()
    assert not await KeySet("http://127.0.0.1:9/").ask()
    assert trio.current_time() == began


async def test_a_file_system_that_hangs_is_an_outage_that_costs_one_thread(
    tmp_path: Path, mock_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys.json"
    file.write_bytes(document(RSA_KEY))
    keys = KeySet(str(file))
    file.unlink()
    os.mkfifo(file)  # whoever opens it hangs until somebody writes
    before = threading.active_count()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keys.run)
        for _ in range(3):
            await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(FETCH_TIMEOUT)
            await trio.testing.wait_all_tasks_blocked()
            assert keys.find("rsa-1", "RS256")
            mock_clock.jump(ASK_INTERVAL)
        assert "no answer within 5 s" in capsys.readouterr().out
        assert threading.active_count() <= before + 1
        nursery.cancel_scope.cancel()
    file.open("wb").close()
