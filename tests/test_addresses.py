"""Host, Forwarded and addresses: tables of what strangers send, and Hypothesis for what nobody thought of."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sse_trio.addresses import (
    forwarded_for,
    forwarding_header,
    is_loopback_host,
    normalise,
    parse_address,
    split_host,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("192.0.2.1", "192.0.2.1"),
        (" 192.0.2.1 ", "192.0.2.1"),
        ("192.0.2.1:4711", "192.0.2.1"),
        ("2001:DB8::1", "2001:db8::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("[2001:db8::1]:4711", "2001:db8::1"),
        ("[2001:db8::1]:_port", "2001:db8::1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("unknown", None),
        ("_hidden", None),
        ("", None),
        ("1.2.3", None),
        ("1.2.3.4.5", None),
        ("01.2.3.4", None),
        ("[2001:db8::1", None),
        ("[2001:db8::1]x", None),
        ("localhost", None),
        ("1.2.3.4\r\nX: y", None),
    ],
)
def test_an_address_is_read_with_or_without_its_port(text: str, expected: str | None) -> None:
    address = parse_address(text)
    assert (None if address is None else str(address)) == expected


def test_one_address_has_one_name_and_a_socket_path_stays_as_it_is() -> None:
    assert normalise("::FFFF:10.0.0.1") == "10.0.0.1"
    assert normalise("/run/sse-trio.sock") == "/run/sse-trio.sock"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["for=192.0.2.60;proto=http;by=203.0.113.43"], ["192.0.2.60"]),
        (["for=192.0.2.43, for=198.51.100.17"], ["192.0.2.43", "198.51.100.17"]),
        (["for=192.0.2.43", "for=198.51.100.17"], ["192.0.2.43", "198.51.100.17"]),
        (['For="[2001:db8:cafe::17]:4711"'], ["[2001:db8:cafe::17]:4711"]),
        (['FOR="_gazonk"'], ["_gazonk"]),
        (["for=unknown;by=203.0.113.43"], ["unknown"]),
        (["proto=https;by=203.0.113.43"], [""]),
        (['host="a,for=6.6.6.6";for=192.0.2.1'], ["192.0.2.1"]),
        (['host="a\\",for=6.6.6.6";for=192.0.2.1'], ["192.0.2.1"]),
        (['for="192.0.2.1'], [""]),
        (["for=192.0.2.1 for=6.6.6.6"], [""]),
        (['for=192.0.2.1, for="6.6.6.6'], ["192.0.2.1", ""]),
        (["for=192.0.2.1;"], ["192.0.2.1"]),
        ([""], [""]),
        ([], []),
    ],
)
def test_the_hops_of_a_forwarded_header_are_read_as_the_rfc_writes_them(lines: list[str], expected: list[str]) -> None:
    assert forwarded_for(lines) == expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["Host", "Accept", "User-Agent"], False),
        (["Host", "X-Forwarded-For"], True),
        (["x-forwarded-proto"], True),
        (["FORWARDED"], True),
        (["Via"], True),
        (["X-Real-IP"], True),
        (["CF-Connecting-IP"], True),
        ([], False),
    ],
)
def test_a_header_that_only_a_proxy_adds_is_known(names: list[str], expected: bool) -> None:
    assert forwarding_header(names) is expected


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("Example.org", ("example.org", None)),
        ("example.org.", ("example.org", None)),
        ("example.org:3000", ("example.org", 3000)),
        ("127.0.0.1:80", ("127.0.0.1", 80)),
        ("[::1]:3000", ("[::1]", 3000)),
        ("[0:0:0:0:0:0:0:1]", ("[::1]", None)),
        ("example.org:65536", None),
        ("example.org:", None),
        ("example.org:3000:1", None),
        ("::1", None),
        ("[::1", None),
        ("[nonsense]", None),
        ("a b", None),
        ("a/b", None),
        ("user@example.org", None),
        ("", None),
    ],
)
def test_a_host_header_is_split_or_refused(host: str, expected: tuple[str, int | None] | None) -> None:
    assert split_host(host) == expected


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("LOCALHOST:3000", True),
        ("app.localhost", True),
        ("127.0.0.1:3000", True),
        ("127.1.2.3", True),
        ("[::1]:3000", True),
        ("[::ffff:127.0.0.1]", True),
        ("localhost.example.org", False),
        ("evillocalhost", False),
        ("127.0.0.1.example.org", False),
        ("192.168.0.1", False),
        ("0.0.0.0", False),
        ("", False),
        (None, False),
    ],
)
def test_only_this_machine_has_a_loopback_host(host: str | None, expected: bool) -> None:
    assert is_loopback_host(host) is expected


@given(st.text(max_size=80))
def test_no_text_makes_it_raise(text: str) -> None:
    parse_address(text)
    normalise(text)
    split_host(text)
    is_loopback_host(text)
    forwarded_for([text, text])


HOPS = st.text(alphabet='for=";,\\ 0123456789.', max_size=60)


@given(HOPS)
def test_what_a_client_writes_never_becomes_the_right_most_hop(text: str) -> None:
    # A proxy appends to the line that the client sent, or sends a line of its own.
    assert forwarded_for([text, "for=192.0.2.1"])[-1] == "192.0.2.1"
    assert forwarded_for([f"{text}, for=192.0.2.1"])[-1] in {"192.0.2.1", ""}
