"""The settings: every variable of the contract, what it takes, and what is said of a value that it does not take."""

from __future__ import annotations

import os
from ipaddress import ip_network
from pathlib import Path

import pytest
from pydantic import ValidationError

from sse_trio.settings import Settings, SettingsError

# The table of the contract: variable, field, default, another value as text, and what that is read as.
TABLE: list[tuple[str, str, object, str, object]] = [
    ("NATS_URL", "nats_url", ("nats://127.0.0.1:4222",), "a:1, tls://u:p@b", ("nats://a:1", "tls://u:p@b")),
    ("NATS_SUBJECT", "nats_subject", "discoveries.>", "team.*.found", "team.*.found"),
    ("NATS_DURABLE", "nats_durable", "auto", "require", "require"),
    ("NATS_STREAM", "nats_stream", "DISCOVERIES", "OTHER", "OTHER"),
    ("NATS_STREAM_MAX_AGE", "nats_stream_max_age", 86400.0, "60.5", 60.5),
    ("NATS_STREAM_MAX_BYTES", "nats_stream_max_bytes", 1073741824, "-1", -1),
    ("NATS_STREAM_REPLICAS", "nats_stream_replicas", 1, "3", 3),
    ("SSE_BUFFER", "buffer", 1024, "1", 1),
    ("SSE_OVERFLOW", "overflow", "drop-oldest", "disconnect", "disconnect"),
    ("SSE_HISTORY", "history", 10000, "0", 0),
    ("SSE_HISTORY_BYTES", "history_bytes", 67108864, "0", 0),
    ("SSE_KEEPALIVE_INTERVAL", "keepalive_interval", 30.0, "0.5", 0.5),
    ("SSE_RETRY", "retry", 3000, " 0 ", 0),
    ("SSE_WRITE_TIMEOUT", "write_timeout", 10.0, "2", 2.0),
    ("SSE_MAX_LIFETIME", "max_lifetime", 0.0, "600", 600.0),
    ("SSE_DRAIN_WINDOW", "drain_window", 5.0, "0", 0.0),
    ("SSE_DRAIN_DELAY", "drain_delay", 0.0, "1.5", 1.5),
    ("SSE_DIRECT_WRITES", "direct_writes", os.environ.get("SSE_DIRECT_WRITES", "together"), "off", "off"),
    ("SSE_MAX_CONNECTIONS", "max_connections", 10000, "0", 0),
    ("SSE_MAX_CONNECTIONS_PER_IP", "max_connections_per_ip", 0, "10", 10),
    ("SSE_MAX_CONNECTIONS_PER_SUBJECT", "max_connections_per_subject", 0, "10", 10),
    ("SSE_CONNECTION_RATE", "connection_rate", 1000.0, "2.5", 2.5),
    (
        "SSE_ALLOWED_ORIGINS",
        "allowed_origins",
        ("*",),
        "https://A.example/,http://b:81",
        ("https://a.example", "http://b:81"),
    ),
    ("SSE_ALLOWED_HOSTS", "allowed_hosts", ("*",), "a.example, [::1]", ("a.example", "[::1]")),
    ("SSE_TRUSTED_PROXIES", "trusted_proxies", (), "10.0.0.1/8,::1", (ip_network("10.0.0.0/8"), ip_network("::1"))),
    ("SSE_JWT_JWKS", "jwt_jwks", None, "/keys.json", "/keys.json"),
    ("SSE_JWT_AUDIENCE", "jwt_audience", None, "sse", "sse"),
    ("SSE_JWT_ISSUER", "jwt_issuer", None, "me", "me"),
    ("LOG_LEVEL", "log_level", "info", "DEBUG", "debug"),
    ("LOG_FORMAT", "log_format", "auto", "json", "json"),
]


@pytest.mark.parametrize(("variable", "field", "default", "text", "value"), TABLE, ids=[row[0] for row in TABLE])
def test_a_variable_has_its_default_and_is_read(
    variable: str, field: str, default: object, text: str, value: object
) -> None:
    assert getattr(Settings(), field) == default
    assert getattr(Settings.from_environment({}), field) == default
    assert getattr(Settings.from_environment({variable: text}), field) == value
    if field != "jwt_jwks":
        assert getattr(Settings.from_environment({variable: ""}), field) == default, "empty is unset"
        assert getattr(Settings.from_environment({variable: " "}), field) == default, "blank is unset"


def test_no_setting_is_missing_here() -> None:
    assert {row[1] for row in TABLE} | {"nats_creds", "nats_ca", "jwt_secret"} == set(Settings.model_fields)


def test_files_are_read_where_they_are(tmp_path: Path) -> None:
    file = tmp_path / "it"
    file.write_text("x")
    settings = Settings.from_environment({"NATS_CREDS": f"{file} ", "NATS_CA": str(file)})
    assert (settings.nats_creds, settings.nats_ca) == (file, file)
    assert (Settings().nats_creds, Settings().nats_ca) == (None, None)


def test_a_secret_is_taken_to_the_letter_and_shown_nowhere() -> None:
    settings = Settings.from_environment({"SSE_JWT_SECRET": " s3cret ", "NATS_URL": "nats://me:hush@a"})
    assert settings.jwt_secret is not None
    assert settings.jwt_secret.get_secret_value() == " s3cret "
    assert "s3cret" not in repr(settings) + str(settings)
    assert "hush" not in repr(settings) + str(settings)


WRONG: list[tuple[str, str, str]] = [
    ("NATS_URL", "http://a", "expected nats://host:port"),
    ("NATS_URL", "nats://", "expected nats://host:port"),
    ("NATS_URL", "nats://a:hush", "a port from 1 to 65535"),
    ("NATS_URL", "a:65536", "a port from 1 to 65535"),
    ("NATS_URL", "a:0", "expected nats://host:port"),
    ("NATS_URL", "nats://me:hush@[::1", "a port from 1 to 65535"),
    ("NATS_URL", "nats://me:hush@\u2100.example", "a port from 1 to 65535"),
    ("NATS_URL", ",", "at least 1 item"),
    ("NATS_CREDS", "/nowhere/at/all", "cannot be read: No such file"),
    ("NATS_CA", "/", "cannot be read: Is a directory"),
    ("NATS_SUBJECT", "a..b", "is not a NATS subject"),
    ("NATS_SUBJECT", "a.>.b", "is not a NATS subject"),
    ("NATS_SUBJECT", "a b", "is not a NATS subject"),
    ("NATS_SUBJECT", "a\tb", "is not a NATS subject"),
    ("NATS_SUBJECT", ".", "is not a NATS subject"),
    ("NATS_DURABLE", "yes", "'auto', 'require' or 'off'"),
    ("NATS_STREAM", "a.b", "is not a stream name"),
    ("NATS_STREAM", "a*", "is not a stream name"),
    ("NATS_STREAM", "a/b", "is not a stream name"),
    ("NATS_STREAM_MAX_AGE", "-1", "greater than or equal to 0"),
    ("NATS_STREAM_MAX_AGE", "inf", "less than or equal to"),
    ("NATS_STREAM_MAX_AGE", "nan", "less than or equal to"),
    ("NATS_STREAM_MAX_BYTES", "-2", "greater than or equal to -1"),
    ("NATS_STREAM_MAX_BYTES", "9223372036854775808", "less than"),
    ("NATS_STREAM_REPLICAS", "0", "greater than or equal to 1"),
    ("NATS_STREAM_REPLICAS", "6", "less than or equal to 5"),
    ("SSE_BUFFER", "0", "greater than or equal to 1"),
    ("SSE_BUFFER", "many", "'many' is no whole number"),
    ("SSE_BUFFER", "1.5", "'1.5' is no whole number"),
    ("SSE_BUFFER", "true", "'true' is no whole number"),
    ("SSE_OVERFLOW", "drop", "'drop-oldest', 'drop-newest' or 'disconnect'"),
    ("SSE_HISTORY", "-1", "greater than or equal to 0"),
    ("SSE_HISTORY_BYTES", "64M", "'64M' is no whole number"),
    ("SSE_KEEPALIVE_INTERVAL", "0", "greater than or equal to 0.01"),
    ("SSE_KEEPALIVE_INTERVAL", "nan", "less than or equal to"),
    ("SSE_KEEPALIVE_INTERVAL", "inf", "less than or equal to"),
    ("SSE_KEEPALIVE_INTERVAL", "30s", "'30s' is no number"),
    ("SSE_RETRY", "-1", "greater than or equal to 0"),
    ("SSE_RETRY", "2147483648", "less than 2147483648"),
    ("SSE_WRITE_TIMEOUT", "0", "greater than or equal to 0.01"),
    ("SSE_WRITE_TIMEOUT", "1e12", "less than or equal to"),
    ("SSE_MAX_LIFETIME", "-1", "greater than or equal to 0"),
    ("SSE_DRAIN_WINDOW", "nan", "less than or equal to"),
    ("SSE_DRAIN_DELAY", "-0.1", "greater than or equal to 0"),
    ("SSE_MAX_CONNECTIONS", "-1", "greater than or equal to 0"),
    ("SSE_MAX_CONNECTIONS_PER_IP", "x", "'x' is no whole number"),
    ("SSE_ALLOWED_ORIGINS", "example.org", "is not an origin"),
    ("SSE_ALLOWED_ORIGINS", "https://example.org/path", "is not an origin"),
    ("SSE_ALLOWED_ORIGINS", "https://me@example.org", "is not an origin"),
    ("SSE_ALLOWED_ORIGINS", "https://example.org?x", "is not an origin"),
    ("SSE_ALLOWED_ORIGINS", "ftp://example.org", "is not an origin"),
    ("SSE_ALLOWED_ORIGINS", "https://", "is not an origin"),
    ("SSE_ALLOWED_ORIGINS", "https://a:b", "port"),
    ("SSE_ALLOWED_ORIGINS", "*, https://example.org", "stands alone"),
    ("SSE_ALLOWED_HOSTS", "*,a.example", "stands alone"),
    ("SSE_TRUSTED_PROXIES", "10.0.0.0/33", "does not appear to be an IPv4 or IPv6 network"),
    ("SSE_TRUSTED_PROXIES", "proxy", "does not appear to be an IPv4 or IPv6 network"),
    ("SSE_JWT_SECRET", "", "set but empty"),
    ("SSE_JWT_SECRET", "  ", "set but empty"),
    ("SSE_JWT_JWKS", "", "set but empty"),
    ("LOG_LEVEL", "loud", "'debug', 'info', 'warning', 'error' or 'critical'"),
    ("LOG_FORMAT", "xml", "'json', 'console' or 'auto'"),
]


@pytest.mark.parametrize(("variable", "text", "said"), WRONG, ids=[f"{row[0]}={row[1]}" for row in WRONG])
def test_a_value_that_a_variable_does_not_take_is_refused_in_one_line_that_names_it(
    variable: str, text: str, said: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_environment({variable: text})
    message = str(caught.value)
    assert message.startswith(f"{variable}: ")
    assert said in message
    assert "\n" not in message
    assert "hush" not in message, "it may be a password"
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_every_wrong_variable_is_named_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_environment({"SSE_BUFFER": "0", "LOG_LEVEL": "loud", "SSE_HISTORY": "5"})
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == ["SSE_BUFFER", "LOG_LEVEL"]


def test_other_variables_and_other_spellings_are_nobodys_business() -> None:
    assert Settings.from_environment({"SSE_TRIO_PORT": "tcp://10.0.0.1:80", "sse_buffer": "7"}) == Settings()


def test_variables_that_are_named_like_ours_and_are_not_are_kept_to_be_told() -> None:
    others = {"SSE_SERVICE_HOST": "10.0.0.1", "SSE_PORT": "tcp://10.0.0.1:80", "SSE_TRIO_TOKEN": "x", "HOME": "/"}
    given = Settings.from_environment({"SSE_HISTROY": "0", "SSE_BUFER": "10", "SSE_BUFFER": "20"} | others)
    assert given.unknown == ("SSE_BUFER", "SSE_HISTROY")
    assert given.model_copy(update={"nats_url": ("nats://a:1",)}).unknown == given.unknown
    assert Settings().unknown == ()


def test_without_a_mapping_the_environment_of_the_process_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSE_BUFFER", "77")
    assert Settings.from_environment().buffer == 77
    assert Settings().buffer == 1024, "and only when asked to"


def test_an_origin_is_written_as_browsers_write_it() -> None:
    given = "https://Example.ORG:443,http://a:80,http://b:443,http://[::1]:8080,https://[::1]:443"
    assert Settings.from_environment({"SSE_ALLOWED_ORIGINS": given}).allowed_origins == (
        "https://example.org",
        "http://a",
        "http://b:443",
        "http://[::1]:8080",
        "https://[::1]",
    )


def test_settings_can_be_given_by_the_names_of_their_fields() -> None:
    assert Settings(buffer=5, nats_url=("nats://a",)).buffer == 5
    with pytest.raises(ValidationError, match="buffer"):
        Settings(buffer=0)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().buffer = 5
