"""Tokens: what each claim grants, and every forgery we know of. The clock is passed in; the keys are made
here.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from dataclasses import replace
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from sse_trio.settings import Settings, SettingsError
from sse_trio.tokens import EVERYONE, LEEWAY, Grant, InvalidToken, Tokens

NOW = 1_800_000_000.0
SECRET = "0123456789abcdef0123456789abcdef"
RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
ELLIPTIC = ec.generate_private_key(ec.SECP256R1())
EDWARDS = ed25519.Ed25519PrivateKey.generate()
CLAIMS: dict[str, Any] = {"exp": NOW + 60}


def public_jwk(key: Any, **members: Any) -> dict[str, Any]:
    """The JWK of this private key's public half."""
    algorithm: Any = {
        rsa.RSAPrivateKey: jwt.algorithms.RSAAlgorithm,
        ec.EllipticCurvePrivateKey: jwt.algorithms.ECAlgorithm,
    }
    for kind, reader in algorithm.items():
        if isinstance(key, kind):
            return reader.to_jwk(key.public_key(), as_dict=True) | members  # type: ignore[no-any-return]
    return jwt.algorithms.OKPAlgorithm.to_jwk(key.public_key(), as_dict=True) | members


def settings(**variables: str) -> Settings:
    return Settings.from_environment({"SSE_JWT_" + name: value for name, value in variables.items()})


def tokens(now: float = NOW, **variables: str) -> Tokens:
    return Tokens(settings(**(variables or {"SECRET": SECRET})), lambda: now)


def signed(claims: dict[str, Any], key: Any = SECRET, algorithm: str = "HS256", **header: Any) -> str:
    return jwt.encode(claims, key, algorithm, headers=header)


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def forged(header: bytes | dict[str, Any], payload: bytes | dict[str, Any], secret: bytes | None) -> str:
    """A token of any parts at all, with an HMAC-SHA256 over it, or with no signature."""
    parts = [json.dumps(part).encode() if isinstance(part, dict) else part for part in (header, payload)]
    text = ".".join(map(base64url, parts))
    mac = b"" if secret is None else hmac.digest(secret, text.encode(), hashlib.sha256)
    return f"{text}.{base64url(mac)}"


async def refused(checker: Tokens, token: str) -> str:
    with pytest.raises(InvalidToken) as refusal:
        await checker.check(token)
    assert token == "" or token not in str(refusal.value)
    return str(refusal.value)


async def test_every_claim_grants_what_it_says() -> None:
    claims = CLAIMS | {
        "sub": "team-7",
        "agent_ids": ["team-7-*", "boss"],
        "subjects": ["discoveries.insights"],
        "roles": ["reader", "admin"],
        "share": True,
    }
    assert await tokens().check(signed(claims)) == Grant(
        subject="team-7",
        expires_at=NOW + 60,
        agent_ids=("team-7-*", "boss"),
        subjects=("discoveries.insights",),
        is_admin=True,
        may_share=True,
    )


async def test_an_absent_claim_grants_nothing() -> None:
    grant = await tokens().check(signed(CLAIMS))
    assert grant == Grant(expires_at=NOW + 60)
    assert not grant.may_be("agent-1")
    assert not grant.may_hear("discoveries.insights")
    assert not grant.may_ask_for("discoveries.insights")
    assert not grant.is_admin
    assert not grant.may_share


def test_a_grant_that_nobody_filled_in_grants_nothing_and_everyone_may_listen_but_not_rule() -> None:
    assert not Grant().may_be("a")
    assert EVERYONE.may_be("a")
    assert EVERYONE.may_hear("a.b")
    assert EVERYONE.may_ask_for(">")
    assert not EVERYONE.is_admin
    assert not EVERYONE.may_share


@pytest.mark.parametrize(
    ("pattern", "agent_id", "expected"),
    [
        ("agent-1", "agent-1", True),
        ("agent-1", "agent-12", False),
        ("agent-1", "Agent-1", False),
        ("*", "anything", True),
        ("team-*", "team-", True),
        ("team-*", "team-7", True),
        ("team-*", "eteam-7", False),
        ("*-7", "team-7", True),
        ("*-7", "team-77", False),
        ("a*b", "ab", True),
        ("a*b", "a", False),
        ("aa*aa", "aaa", False),
        ("a*b*c", "a-b-b-c", True),
        ("a*b*c", "a-c-b", False),
        ("a.b", "axb", False),
        ("a?", "ab", False),
        ("[ab]", "a", False),
    ],
)
def test_an_agent_pattern_knows_the_star_and_nothing_else(pattern: str, agent_id: str, expected: bool) -> None:
    assert Grant(agent_ids=(pattern,)).may_be(agent_id) is expected


def test_a_pattern_of_many_stars_costs_no_time() -> None:
    assert not Grant(agent_ids=("*a" * 100 + "b",)).may_be("a" * 128)


def test_a_wildcard_must_be_part_of_what_is_granted() -> None:
    grant = Grant(subjects=("discoveries.questions", "team.7.>"))
    assert grant.may_ask_for("team.7.*")
    assert not grant.may_ask_for("team.*")
    assert not grant.may_ask_for("discoveries.>")
    assert not grant.may_ask_for(">")
    assert grant.may_hear("team.7.a.b")
    assert not grant.may_hear("team.8.a")


@pytest.mark.parametrize(
    ("claims", "when"),
    [
        ({"exp": NOW + 0.5}, "valid to the last moment"),
        ({"exp": int(NOW) + 1}, "whole seconds"),
        ({"exp": NOW + 60, "nbf": NOW + LEEWAY}, "a clock that is a little ahead"),
        ({"exp": NOW + 60, "iat": NOW + LEEWAY}, "a clock that is a little ahead"),
        ({"exp": NOW + 60, "aud": "anybody", "iss": "anybody"}, "audience and issuer are checked where set"),
    ],
)
async def test_a_token_is_good_at_the_edge_of_its_time(claims: dict[str, Any], when: str) -> None:
    grant = await tokens().check(signed(claims))
    assert grant.expires_at == claims["exp"], when


@pytest.mark.parametrize(
    ("claims", "says"),
    [
        ({"exp": NOW}, "expired"),
        ({"exp": NOW - 1}, "expired"),
        ({"exp": 0}, "expired"),
        ({}, "not valid"),
        ({"exp": NOW + 60, "nbf": NOW + LEEWAY + 1}, "not valid yet"),
        ({"exp": NOW + 60, "iat": NOW + LEEWAY + 1}, "not valid yet"),
    ],
)
async def test_a_token_outside_its_time_is_refused(claims: dict[str, Any], says: str) -> None:
    assert says in await refused(tokens(), signed(claims))


@pytest.mark.parametrize(
    "claims",
    [
        {"exp": str(NOW + 60)},
        {"exp": True},
        {"exp": None},
        {"exp": [NOW + 60]},
        {"exp": -1},
        {"exp": 10**400},
        {"nbf": "0"},
        {"nbf": None},
        {"iat": {}},
        {"iat": False},
        {"sub": 7},
        {"sub": None},
        {"sub": ["a"]},
        {"sub": "x" * 257},
        {"jti": 7},
        {"agent_ids": "agent-1"},
        {"agent_ids": None},
        {"agent_ids": {"agent-1": True}},
        {"agent_ids": [1]},
        {"agent_ids": [""]},
        {"agent_ids": ["x" * 257]},
        {"agent_ids": ["x"] * 101},
        {"subjects": "discoveries.>"},
        {"subjects": ["discoveries..a"]},
        {"subjects": ["discoveries.>.a"]},
        {"subjects": ["a b"]},
        {"subjects": [["discoveries.>"]]},
        {"roles": "admin"},
        {"roles": {"admin": True}},
        {"roles": [True]},
        {"share": 1},
        {"share": "true"},
        {"share": None},
    ],
    ids=lambda claims: json.dumps(claims)[:40],
)
async def test_a_claim_of_the_wrong_type_makes_the_token_invalid(claims: dict[str, Any]) -> None:
    # Made by hand: the library that signs would refuse some of them itself.
    token = forged({"alg": "HS256"}, CLAIMS | claims, SECRET.encode())
    await refused(tokens(), token)


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 5000])
async def test_a_time_that_is_no_number_is_refused_and_not_an_error(number: bytes) -> None:
    await refused(tokens(), forged({"alg": "HS256"}, b'{"exp":' + number + b"}", SECRET.encode()))


async def test_audience_and_issuer_are_checked_where_set() -> None:
    checker = tokens(SECRET=SECRET, AUDIENCE="sse-trio", ISSUER="https://issuer.example")
    right = CLAIMS | {"aud": "sse-trio", "iss": "https://issuer.example"}
    assert (await checker.check(signed(right))).expires_at == NOW + 60
    assert (await checker.check(signed(right | {"aud": ["other", "sse-trio"]}))).expires_at == NOW + 60
    wrong: list[dict[str, Any]] = [
        {"aud": "other"},
        {"aud": ["sse-trio-2"]},
        {"aud": []},
        {"aud": "sse-trio "},
        {"aud": {"sse-trio": 1}},
        {"iss": "https://issuer.example/"},
        {"iss": ["https://issuer.example"]},
        {"iss": 7},
    ]
    for changes in wrong:
        await refused(checker, forged({"alg": "HS256"}, right | changes, SECRET.encode()))
    for missing in ("aud", "iss"):
        await refused(checker, signed({name: value for name, value in right.items() if name != missing}))


@pytest.mark.parametrize(
    "token",
    [
        "",
        ".",
        "..",
        "a.b",
        "a.b.c",
        "a.b.c.d",
        "é.b.c",
        signed(CLAIMS) + "=",
        signed(CLAIMS) + " ",
        signed(CLAIMS) + "\n",
        signed(CLAIMS)[:-1],
        signed(CLAIMS)[:-4] + "AAAA",
        signed(CLAIMS).replace(".", "..", 1),
        "x" * 9000,
        f"{base64url(b'[' * 3000)}.e30.AAAA",
        f"{base64url(b'[]')}.e30.AAAA",
        f"{base64url(b'not json')}.e30.AAAA",
        f"{base64url(bytes([0xFF, 0xFE]))}.e30.AAAA",
    ],
    ids=range(18),
)
async def test_what_is_no_token_is_refused(token: str) -> None:
    await refused(tokens(), token)


@pytest.mark.parametrize(
    "header",
    [
        {"alg": "none"},
        {"alg": "None"},
        {"alg": "NONE", "typ": "JWT"},
        {"alg": ""},
        {"alg": None},
        {"alg": ["HS256"]},
        {"alg": 256},
        {},
        {"alg": "hs256"},
        {"alg": "HS384"},
        {"alg": "HS512"},
        {"alg": "RS256"},
        {"alg": "HS256", "kid": 7},
        {"alg": "HS256", "kid": ["a"]},
        {"alg": "HS256", "crit": ["exp"]},
        {"alg": "HS256", "crit": []},
        {"alg": "HS256", "b64": False},
        {"alg": "HS256", "b64": False, "crit": ["b64"]},
    ],
    ids=json.dumps,
)
@pytest.mark.parametrize("secret", [SECRET.encode(), b"", None])
async def test_only_the_pinned_algorithm_is_accepted(header: dict[str, Any], secret: bytes | None) -> None:
    await refused(tokens(), forged(header, CLAIMS, secret))


async def test_a_signature_by_another_secret_or_none_is_refused() -> None:
    for secret in (b"", b"wrong", SECRET.encode()[:-1], None):
        await refused(tokens(), forged({"alg": "HS256"}, CLAIMS, secret))
    assert (await tokens().check(forged({"alg": "HS256"}, CLAIMS, SECRET.encode()))).expires_at == NOW + 60


async def test_an_address_of_keys_in_the_header_is_not_looked_at() -> None:
    for header in (
        {"jku": "http://127.0.0.1:9/keys"},
        {"x5u": "http://127.0.0.1:9/keys"},
        {"jwk": {"kty": "oct", "k": base64url(b"attacker")}},
        {"kid": "../../../../dev/null"},
        {"kid": "'; select '"},
    ):
        await refused(tokens(), forged({"alg": "HS256"} | header, CLAIMS, b"attacker"))


async def test_a_short_secret_is_warned_of_once_logging_is_set_up(capsys: pytest.CaptureFixture[str]) -> None:
    short = tokens(SECRET="secret")
    assert not capsys.readouterr().out
    await short.run()
    said = capsys.readouterr().out
    assert "secret is short" in said
    assert "'secret'" not in said
    await tokens().run()
    assert not capsys.readouterr().out


async def test_a_token_signed_with_a_short_secret_is_checked_without_noise() -> None:
    token = forged({"alg": "HS256"}, CLAIMS, b"secret")
    assert (await tokens(SECRET="secret").check(token)).expires_at == NOW + 60


def test_a_public_key_as_the_secret_is_an_error_at_start() -> None:
    pem = RSA.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    with pytest.raises(SettingsError, match=r"SSE_JWT_SECRET: .*SSE_JWT_JWKS"):
        tokens(SECRET=pem)


@given(st.binary(max_size=40), st.binary(max_size=60))
def test_no_header_and_no_payload_make_it_fail_in_another_way(header: bytes, payload: bytes) -> None:
    async def check() -> None:
        for parts in ((header, payload), (b'{"alg":"HS256"}', payload)):
            try:
                await tokens().check(forged(*parts, SECRET.encode()))
            except InvalidToken:
                pass

    import trio

    trio.run(check)


def test_a_grant_cannot_be_changed() -> None:
    grant = Grant()
    with pytest.raises(AttributeError):
        grant.is_admin = True  # type: ignore[misc]
    assert replace(grant, is_admin=True).is_admin
