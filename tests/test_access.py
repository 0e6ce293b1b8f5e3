"""Access: one table for each question that is answered before a request is served."""

from __future__ import annotations

from typing import Any

import pytest
from test_tokens import CLAIMS, NOW, RSA, SECRET, signed
from werkzeug.datastructures import Headers

from sse_trio.access import Access, Grant, HeaderFields, Refused, forbidden
from sse_trio.settings import Settings
from sse_trio.tokens import EVERYONE

OURS = "https://app.example"


def access(**variables: str) -> Access:
    names = {name if name.startswith("SSE_") else f"SSE_{name}": value for name, value in variables.items()}
    return Access(Settings.from_environment(names), clock=lambda: NOW)


def headers(*lines: tuple[str, str], **fields: str) -> HeaderFields:
    return Headers([*((name.replace("_", "-"), value) for name, value in fields.items()), *lines])


def status_of(action: Any) -> int:
    """200, or what the refusal says."""
    try:
        action()
    except Refused as refused:
        return refused.status
    return 200


def test_a_request_with_two_lengths_is_refused_and_its_connection_closed() -> None:
    access().check_framing(headers(Content_Length="4"))
    access().check_framing(headers(Transfer_Encoding="chunked"))
    with pytest.raises(Refused) as refused:
        access().check_framing(headers(Transfer_Encoding="chunked", Content_Length="4"))
    assert refused.value.status == 400
    assert refused.value.headers == {"Connection": "close"}


@pytest.mark.parametrize(
    ("allowed", "host", "status"),
    [
        ("*", "anything.example:1", 200),
        ("*", None, 200),
        ("app.example", "app.example", 200),
        ("app.example", "APP.example.", 200),
        ("app.example", "app.example:8443", 200),
        ("app.example:8443", "app.example:8443", 200),
        ("app.example:8443", "app.example", 403),
        ("app.example:8443", "app.example:8444", 403),
        ("app.example", "evil.example", 403),
        ("app.example", "app.example.evil.example", 403),
        ("app.example", "evilapp.example", 403),
        ("app.example", "sub.app.example", 403),
        ("*.app.example", "sub.app.example", 200),
        ("*.app.example", "a.b.app.example:80", 200),
        ("*.app.example", "app.example", 403),
        ("*.app.example", "evilapp.example", 403),
        ("localhost,127.0.0.1,[::1]", "127.0.0.1:3000", 200),
        ("localhost,127.0.0.1,[::1]", "[::1]:3000", 200),
        ("localhost,127.0.0.1,::1", "[::1]:3000", 200),
        ("localhost,127.0.0.1,::1", "[0:0::1]:3000", 200),
        ("localhost,127.0.0.1,[::1]", "rebound.example:3000", 403),
        ("127.0.0.1:3000,[::1]:3000", "127.0.0.1:3000", 200),
        ("127.0.0.1:3000,[::1]:3000", "127.0.0.1:3001", 403),
        ("127.0.0.1:3000,[::1]:3000", "[::1]:3000", 200),
        ("127.0.0.1:3000,[::1]:3000", "[::1]:3001", 403),
        ("localhost", "127.0.0.1", 403),
        ("localhost", None, 403),
        ("localhost", "", 403),
        ("localhost", "localhost\x00", 403),
        ("localhost", "localhost, evil.example", 403),
        ("localhost", "user@localhost", 403),
        ("not/a/host", "not/a/host", 403),
    ],
)
def test_a_host_that_is_not_on_the_list_is_refused(allowed: str, host: str | None, status: int) -> None:
    assert status_of(lambda: access(ALLOWED_HOSTS=allowed).check_host(host)) == status


@pytest.mark.parametrize(
    ("origin", "host", "scheme", "status"),
    [
        (None, "app.example", "https", 200),
        (OURS, "elsewhere.example", "https", 200),
        ("HTTPS://APP.example", "elsewhere.example", "https", 200),
        ("http://app.example", "elsewhere.example", "http", 403),
        ("https://app.example:8443", "elsewhere.example", "https", 403),
        ("https://app.example.evil.example", "elsewhere.example", "https", 403),
        ("https://evil.example/https://app.example", "elsewhere.example", "https", 403),
        ("null", "elsewhere.example", "https", 403),
        ("", "elsewhere.example", "https", 403),
        ("*", "elsewhere.example", "https", 403),
        ("https://own.example", "own.example", "https", 200),
        ("https://own.example", "own.example:443", "https", 200),
        ("https://own.example:443", "own.example", "https", 200),
        ("https://own.example", "own.example", "http", 200),  # TLS ends at a proxy
        ("http://own.example", "own.example", "http", 200),
        ("http://own.example", "own.example:80", "http", 200),
        ("http://own.example", "own.example", "https", 403),
        ("http://own.example:3000", "own.example:3001", "http", 403),
        ("http://own.example", None, "http", 403),
        ("file://own.example", "own.example", "http", 403),
        ("own.example", "own.example", "http", 403),
        ("http://own.example\r\nX: y", "own.example", "http", 403),
    ],
)
def test_an_origin_that_is_present_and_not_allowed_is_refused(
    origin: str | None, host: str | None, scheme: str, status: int
) -> None:
    assert status_of(lambda: access(ALLOWED_ORIGINS=OURS).check_origin(origin, host, scheme, "GET")) == status
    assert status_of(lambda: access().check_origin(origin, host, scheme, "GET")) == 200


@pytest.mark.parametrize(
    ("site", "mode", "method", "status"),
    [
        ("cross-site", "no-cors", "GET", 403),
        ("same-site", "no-cors", "GET", 403),
        ("same-origin", "cors", "GET", 200),
        ("none", "navigate", "GET", 200),
        ("cross-site", "navigate", "GET", 200),
        ("cross-site", "navigate", "POST", 403),
        (None, None, "GET", 200),
    ],
)
def test_what_a_browser_loads_for_another_site_without_an_origin_is_refused(
    site: str | None, mode: str | None, method: str, status: int
) -> None:
    def check() -> None:
        access(ALLOWED_ORIGINS=OURS).check_origin(None, "own.example", "https", method, site=site, mode=mode)

    assert status_of(check) == status


def test_only_a_named_origin_gets_credentials() -> None:
    assert access().cors_headers("https://any.example") == {"Vary": "Origin", "Access-Control-Allow-Origin": "*"}
    named = access(ALLOWED_ORIGINS=f"{OURS},https://other.example")
    assert named.cors_headers(OURS) == {
        "Vary": "Origin",
        "Access-Control-Allow-Origin": OURS,
        "Access-Control-Allow-Credentials": "true",
    }
    for stranger in ("https://evil.example", "null", "", "*", None):
        assert named.cors_headers(stranger) == {"Vary": "Origin"}
    assert "Access-Control-Allow-Credentials" not in access().cors_headers("*")


def test_a_preflight_allows_the_headers_that_a_stream_needs_and_a_stranger_nothing() -> None:
    answer = access(ALLOWED_ORIGINS=OURS).preflight_headers(OURS, ["GET", "POST"])
    assert answer["Access-Control-Allow-Methods"] == "GET, POST"
    assert {"Authorization", "Last-Event-ID"} <= set(answer["Access-Control-Allow-Headers"].split(", "))
    assert access(ALLOWED_ORIGINS=OURS).preflight_headers("https://evil.example") == {"Vary": "Origin"}


async def test_while_authentication_is_off_everybody_listens_and_only_this_machine_rules() -> None:
    rules = access()
    assert not rules.authenticates
    assert await rules.authenticate(headers(), method="GET", secure=False) == EVERYONE
    local = await rules.authenticate(headers(), method="GET", secure=False, local=True)
    assert local.is_admin
    assert local.may_share
    await rules.run()


TOKEN = signed(CLAIMS | {"sub": "me"})
BAD = signed({"exp": NOW - 1})
BEARER = ("Authorization", f"Bearer {TOKEN}")
PLAIN = ("Cookie", f"sse_trio={TOKEN}")
SECURE = ("Cookie", f"__Secure-sse_trio={TOKEN}")


@pytest.mark.parametrize(
    ("lines", "method", "secure", "status"),
    [
        pytest.param([BEARER], "GET", False, 200, id="header"),
        pytest.param([BEARER], "POST", True, 200, id="header for anything"),
        pytest.param([("Authorization", f"bEaReR  {TOKEN} ")], "GET", True, 200, id="spelling"),
        pytest.param([], "GET", True, 401, id="nothing"),
        pytest.param([("Authorization", "Basic YTpi")], "GET", True, 401, id="another scheme"),
        pytest.param([("Authorization", TOKEN)], "GET", True, 401, id="no scheme"),
        pytest.param([("Authorization", "Bearer")], "GET", True, 401, id="no token"),
        pytest.param([("Authorization", f"Bearer {BAD}")], "GET", True, 401, id="expired"),
        pytest.param([BEARER, BEARER], "GET", True, 400, id="two headers"),
        pytest.param([PLAIN], "GET", False, 200, id="cookie"),
        pytest.param([PLAIN], "GET", True, 401, id="plain cookie over TLS"),
        pytest.param([SECURE], "GET", True, 200, id="secure cookie"),
        pytest.param([SECURE], "GET", False, 200, id="secure cookie behind a proxy that ends TLS"),
        pytest.param([SECURE, PLAIN], "GET", True, 200, id="both cookies"),
        pytest.param([PLAIN], "POST", False, 401, id="cookie for POST"),
        pytest.param([SECURE], "DELETE", True, 401, id="cookie for DELETE"),
        pytest.param([SECURE], "OPTIONS", True, 401, id="cookie for OPTIONS"),
        pytest.param([SECURE, ("Authorization", f"Bearer {BAD}")], "GET", True, 401, id="bad header, good cookie"),
        pytest.param([SECURE, ("Authorization", "Basic YTpi")], "GET", True, 401, id="other scheme, good cookie"),
        pytest.param([BEARER, ("Cookie", f"__Secure-sse_trio={BAD}")], "POST", True, 200, id="good header, bad cookie"),
        pytest.param([("Cookie", f"a=b; sse_trio={TOKEN}; c=d")], "GET", False, 200, id="among others"),
        pytest.param([("Cookie", f"xsse_trio={TOKEN}")], "GET", False, 401, id="another cookie"),
        pytest.param([("Cookie", "sse_trio=")], "GET", False, 401, id="empty cookie"),
        pytest.param([("Cookie", "=;;=\x7f; sse_trio")], "GET", False, 401, id="broken cookies"),
        pytest.param([("X-Authorization", f"Bearer {TOKEN}")], "GET", False, 401, id="another header"),
    ],
)
async def test_a_token_counts_only_where_it_belongs(
    lines: list[tuple[str, str]], method: str, secure: bool, status: int
) -> None:
    rules = access(JWT_SECRET=SECRET)
    assert rules.authenticates
    sent = headers(*lines)
    if status == 200:
        grant = await rules.authenticate(sent, method=method, secure=secure, local=True)
        assert grant == Grant(subject="me", expires_at=NOW + 60), "being local grants nothing where there are tokens"
        return
    with pytest.raises(Refused) as refusal:
        await rules.authenticate(sent, method=method, secure=secure, local=True)
    assert refusal.value.status == status
    assert ("WWW-Authenticate" in refusal.value.headers) is (status == 401)
    assert TOKEN not in str(refusal.value) + repr(refusal.value.headers)


async def test_a_challenge_says_no_more_than_the_rfc_asks_for() -> None:
    rules = access(JWT_SECRET=SECRET)
    with pytest.raises(Refused) as nothing:
        await rules.authenticate(headers(), method="GET", secure=True)
    assert nothing.value.headers == {"WWW-Authenticate": 'Bearer realm="sse-trio"'}
    with pytest.raises(Refused) as expired:
        await rules.authenticate(headers(Authorization=f"Bearer {BAD}"), method="GET", secure=True)
    assert expired.value.headers == {
        "WWW-Authenticate": (
            'Bearer realm="sse-trio", error="invalid_token", error_description="the token has expired"'
        )
    }
    assert forbidden("no").status == 403
    assert 'error="insufficient_scope"' in forbidden("no").headers["WWW-Authenticate"]


async def test_while_the_keys_have_never_been_read_the_answer_is_to_come_back() -> None:
    rules = access(JWT_JWKS="http://127.0.0.1:9/keys")
    token = signed(CLAIMS, RSA, "RS256", kid="a")
    with pytest.raises(Refused) as refused:
        await rules.authenticate(headers(Authorization=f"Bearer {token}"), method="GET", secure=True)
    assert refused.value.status == 503
    assert refused.value.headers["Retry-After"]


@pytest.mark.parametrize(
    ("peer", "host", "fields", "expected"),
    [
        ("127.0.0.1", "127.0.0.1:3000", {}, True),
        ("127.0.0.1", "localhost:3000", {}, True),
        ("::1", "[::1]:3000", {}, True),
        ("::ffff:127.0.0.1", "localhost", {}, True),
        ("127.0.0.1", "localhost:3000", {"Origin": "http://localhost:3000"}, True),
        ("127.0.0.1", "localhost:3000", {"Origin": "https://localhost:3000"}, True),
        ("127.0.0.1", "localhost:3000", {"Sec_Fetch_Site": "same-origin"}, True),
        ("127.0.0.1", "localhost:3000", {"Sec_Fetch_Site": "none"}, True),
        ("192.0.2.1", "localhost", {}, False),
        ("10.0.0.1", "127.0.0.1", {}, False),
        (None, "localhost", {}, False),
        ("/run/a.sock", "localhost", {}, False),
        ("127.0.0.1", "rebound.example", {}, False),
        ("127.0.0.1", "localhost.example", {}, False),
        ("127.0.0.1", None, {}, False),
        ("127.0.0.1", "localhost", {"X_Forwarded_For": "127.0.0.1"}, False),
        ("127.0.0.1", "localhost", {"X_Forwarded_Proto": "http"}, False),
        ("127.0.0.1", "localhost", {"X_Real_IP": "127.0.0.1"}, False),
        ("127.0.0.1", "localhost", {"Forwarded": "for=127.0.0.1"}, False),
        ("127.0.0.1", "localhost", {"Via": "1.1 proxy"}, False),
        ("127.0.0.1", "localhost:3000", {"Origin": "http://evil.example"}, False),
        ("127.0.0.1", "localhost:3000", {"Origin": "http://localhost:8000"}, False),
        ("127.0.0.1", "localhost:3000", {"Origin": "http://127.0.0.1:3000"}, False),
        ("127.0.0.1", "localhost:3000", {"Origin": "null"}, False),
        ("127.0.0.1", "localhost:3000", {"Sec_Fetch_Site": "cross-site"}, False),
        ("127.0.0.1", "localhost:3000", {"Sec_Fetch_Site": "same-site"}, False),
    ],
)
def test_only_who_asks_directly_on_this_machine_is_local(
    peer: str | None, host: str | None, fields: dict[str, str], expected: bool
) -> None:
    assert access().is_local(peer, host, headers(**fields), fields.get("Origin")) is expected


def test_a_loopback_proxy_is_known_by_what_it_adds_and_not_by_being_trusted() -> None:
    rules = access(TRUSTED_PROXIES="127.0.0.1")
    assert rules.is_local("127.0.0.1", "localhost", headers())
    assert not rules.is_local("127.0.0.1", "localhost", headers(X_Forwarded_For="127.0.0.1"))


XFF, FWD = "X-Forwarded-For", "Forwarded"


@pytest.mark.parametrize(
    ("peer", "lines", "expected"),
    [
        pytest.param("192.0.2.1", [(XFF, "6.6.6.6")], "192.0.2.1", id="a stranger's word is nothing"),
        pytest.param("192.0.2.1", [(FWD, "for=6.6.6.6")], "192.0.2.1", id="nor this one"),
        pytest.param("10.0.0.1", [], "10.0.0.1", id="a proxy that says nothing"),
        pytest.param("10.0.0.1", [(XFF, "192.0.2.1")], "192.0.2.1", id="one hop"),
        pytest.param("::ffff:10.0.0.1", [(XFF, "192.0.2.1")], "192.0.2.1", id="a mapped peer"),
        pytest.param("10.0.0.1", [(XFF, "6.6.6.6, 192.0.2.1")], "192.0.2.1", id="the client made one up"),
        pytest.param("10.0.0.1", [(XFF, "6.6.6.6"), (XFF, "192.0.2.1")], "192.0.2.1", id="on a line of its own"),
        pytest.param("10.0.0.1", [(XFF, "6.6.6.6, 192.0.2.1, 10.0.0.2")], "192.0.2.1", id="two proxies"),
        pytest.param("10.0.0.1", [(XFF, "10.0.0.3, 10.0.0.2")], "10.0.0.3", id="the client is one of us"),
        pytest.param("10.0.0.1", [(XFF, "6.6.6.6, unknown")], "10.0.0.1", id="a hop that hides its client"),
        pytest.param("10.0.0.1", [(XFF, "6.6.6.6, _x, 10.0.0.2")], "10.0.0.2", id="further left nothing counts"),
        pytest.param("10.0.0.1", [(XFF, "")], "10.0.0.1", id="empty"),
        pytest.param("10.0.0.1", [(XFF, ",,,")], "10.0.0.1", id="commas"),
        pytest.param("10.0.0.1", [(XFF, "6.6.6.6,")], "10.0.0.1", id="an empty last hop"),
        pytest.param("10.0.0.1", [(XFF, "192.0.2.1:4711")], "192.0.2.1", id="with a port"),
        pytest.param("10.0.0.1", [(XFF, "[2001:db8::1]:4711")], "2001:db8::1", id="IPv6 with a port"),
        pytest.param("10.0.0.1", [(XFF, "2001:DB8::1")], "2001:db8::1", id="IPv6"),
        pytest.param("10.0.0.1", [(FWD, "for=192.0.2.1")], "192.0.2.1", id="the RFC's header"),
        pytest.param("10.0.0.1", [(FWD, 'for="[2001:db8::1]:4711";proto=https')], "2001:db8::1", id="quoted IPv6"),
        pytest.param("10.0.0.1", [(FWD, "for=6.6.6.6, for=192.0.2.1;by=10.0.0.1")], "192.0.2.1", id="two elements"),
        pytest.param("10.0.0.1", [(FWD, 'for="6.6.6.6, for=192.0.2.1')], "10.0.0.1", id="broken quoting"),
        pytest.param("10.0.0.1", [(FWD, "for=unknown")], "10.0.0.1", id="unknown"),
        pytest.param("10.0.0.1", [(XFF, "192.0.2.1"), (FWD, "for=192.0.2.1")], "192.0.2.1", id="both, and of one mind"),
        pytest.param("10.0.0.1", [(XFF, "192.0.2.1"), (FWD, "for=6.6.6.6")], "10.0.0.1", id="one of them is forged"),
        pytest.param("2001:db8:1::1", [(XFF, "192.0.2.1")], "192.0.2.1", id="an IPv6 proxy"),
        pytest.param("/run/a.sock", [(XFF, "6.6.6.6")], "/run/a.sock", id="a socket's path"),
    ],
)
def test_the_client_is_the_right_most_stranger(peer: str, lines: list[tuple[str, str]], expected: str) -> None:
    rules = access(TRUSTED_PROXIES="10.0.0.0/8, 2001:db8:1::/48")
    assert rules.client_address(peer, headers(*lines)) == expected


def test_without_trusted_proxies_nobody_is_believed() -> None:
    assert access().client_address("127.0.0.1", headers((XFF, "6.6.6.6"))) == "127.0.0.1"


@pytest.mark.parametrize(
    ("peer", "lines", "scheme", "expected"),
    [
        ("192.0.2.1", [], "https", True),
        ("192.0.2.1", [], "http", False),
        ("192.0.2.1", [("X-Forwarded-Proto", "https")], "http", False),
        ("10.0.0.1", [("X-Forwarded-Proto", "https")], "http", True),
        ("10.0.0.1", [("X-Forwarded-Proto", "https, HTTPS")], "http", True),
        ("10.0.0.1", [("X-Forwarded-Proto", "https, http")], "http", False),
        ("10.0.0.1", [("X-Forwarded-Proto", "http")], "http", False),
        ("10.0.0.1", [(FWD, "for=192.0.2.1;proto=https")], "http", True),
        ("10.0.0.1", [(FWD, 'for=192.0.2.1;proto="https"')], "http", True),
        ("10.0.0.1", [(FWD, "for=6.6.6.6;proto=https, for=192.0.2.1;proto=http")], "http", False),
        ("10.0.0.1", [], "http", False),
        (None, [("X-Forwarded-Proto", "https")], "http", False),
    ],
)
def test_tls_is_known_from_the_connection_or_from_a_trusted_proxy(
    peer: str | None, lines: list[tuple[str, str]], scheme: str, expected: bool
) -> None:
    assert access(TRUSTED_PROXIES="10.0.0.0/8").is_secure(peer, headers(*lines), scheme) is expected


def test_streams_are_counted_while_they_run() -> None:
    rules = access(MAX_CONNECTIONS="1")
    with rules.admit("192.0.2.1", None):
        assert rules.statistics().connections == 1
        assert status_of(rules.admit("192.0.2.1", None).__enter__) == 503
    assert rules.statistics().connections == 0
