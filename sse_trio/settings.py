"""The settings: read from the environment once, validated, frozen.

Strategy: one frozen model holds every knob under the name that the code uses; the name of its environment variable
is the field's alias. Nothing else in the package reads the environment. `Settings.from_environment()` raises
`SettingsError`, whose text is one line per wrong variable and names it: a typo must never become a default.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

__all__ = ["Network", "Overflow", "Settings", "SettingsError"]

Overflow = Literal["drop-oldest", "drop-newest", "disconnect"]
Network = IPv4Network | IPv6Network

MAX_SECONDS = 2_000_000.0
"""23 days: beyond it a timeout in milliseconds does not fit into what the kernel takes."""

MAX_AGE = 3_155_760_000.0
"""Seconds in 100 years: beyond it an age in nanoseconds does not fit into what NATS takes."""


class SettingsError(ValueError):
    """A variable has a value that cannot be used; the text names it and says what it takes."""


def _split(value: object) -> object:
    """A comma-separated list, as environment variables hold it."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _check_nats_url(value: str) -> str:
    # No message repeats the value, nor lets urllib repeat it: it may hold a password.
    url = value if "://" in value else f"nats://{value}"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ValueError("a server is not a URL with a port from 1 to 65535") from None
    if parts.scheme not in {"nats", "tls"} or not host or port == 0:
        raise ValueError("expected nats://host:port or tls://host:port, several separated by commas")
    return url


def _check_origin(value: str) -> str:
    if value == "*":
        return value
    parts = urlsplit(value)
    rest = (parts.path.removeprefix("/"), parts.query, parts.fragment, parts.username)
    if parts.scheme not in {"http", "https"} or not parts.hostname or any(rest):
        raise ValueError(f"{value!r} is not an origin such as https://example.org")
    # As browsers write it: lower case, and no port where it is the scheme's own.
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    own = {"http": 80, "https": 443}[parts.scheme]
    return f"{parts.scheme}://{host}" if parts.port in {None, own} else f"{parts.scheme}://{host}:{parts.port}"


def _star_alone(values: tuple[str, ...]) -> tuple[str, ...]:
    if "*" in values and len(values) > 1:
        raise ValueError("* means all: it stands alone, or not at all")
    return values


def _has_blank(value: str) -> bool:
    return any(c <= " " or c.isspace() or c == "\x7f" for c in value)


def _check_subject(value: str) -> str:
    tokens = value.split(".")
    wild_tail = ">" in tokens[:-1]
    if any(not token for token in tokens) or wild_tail or _has_blank(value):
        raise ValueError(f"{value!r} is not a NATS subject: tokens joined by dots, * for one, > for the rest")
    return value


def _check_stream_name(value: str) -> str:
    if not value or _has_blank(value) or any(c in ".*>/\\" for c in value):
        raise ValueError(f"{value!r} is not a stream name: no white space, dots, *, >, or slashes")
    return value


def _check_file(value: Path) -> Path:
    try:
        with value.open("rb"):
            return value
    except OSError as error:
        raise ValueError(f"{str(value)!r} cannot be read: {error.strerror}") from None


def _network(value: object) -> object:
    return ip_network(value, strict=False) if isinstance(value, str) else value


ReadableFile = Annotated[Path, AfterValidator(_check_file)]
NatsUrl = Annotated[str, AfterValidator(_check_nats_url)]
Origin = Annotated[str, AfterValidator(_check_origin)]
Words = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]


_KEYS = ("SSE_JWT_SECRET", "SSE_JWT_JWKS")

_OURS = re.compile(r"SSE_(?!TRIO_|SERVICE_|PORT(?:_|$))")
"""How our variables begin. Kubernetes makes the others, for a service that is called sse or sse-trio."""


def _variable(name: str, default: Any, **constraints: Any) -> Any:
    return Field(default=default, validation_alias=name, **constraints)


class Settings(BaseSettings):
    """Every knob of sse-trio. Durations are in seconds, sizes in bytes, `retry` in milliseconds."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", populate_by_name=True, env_ignore_empty=True)

    nats_url: Annotated[tuple[NatsUrl, ...], NoDecode, BeforeValidator(_split)] = _variable(
        "NATS_URL", ("nats://127.0.0.1:4222",), min_length=1, repr=False
    )
    nats_creds: ReadableFile | None = _variable("NATS_CREDS", None)
    nats_ca: ReadableFile | None = _variable("NATS_CA", None)
    nats_subject: Annotated[str, AfterValidator(_check_subject)] = _variable("NATS_SUBJECT", "discoveries.>")
    nats_durable: Literal["auto", "require", "off"] = _variable("NATS_DURABLE", "auto")
    nats_stream: Annotated[str, AfterValidator(_check_stream_name)] = _variable("NATS_STREAM", "DISCOVERIES")
    nats_stream_max_age: float = _variable("NATS_STREAM_MAX_AGE", 86400.0, ge=0, le=MAX_AGE)
    nats_stream_max_bytes: int = _variable("NATS_STREAM_MAX_BYTES", 1 << 30, ge=-1, lt=1 << 63)
    nats_stream_replicas: int = _variable("NATS_STREAM_REPLICAS", 1, ge=1, le=5)

    buffer: int = _variable("SSE_BUFFER", 1024, ge=1)
    overflow: Overflow = _variable("SSE_OVERFLOW", "drop-oldest")
    history: int = _variable("SSE_HISTORY", 10000, ge=0)
    history_bytes: int = _variable("SSE_HISTORY_BYTES", 64 << 20, ge=0)
    keepalive_interval: float = _variable("SSE_KEEPALIVE_INTERVAL", 30.0, ge=0.01, le=MAX_SECONDS)
    retry: int = _variable("SSE_RETRY", 3000, ge=0, lt=1 << 31)
    write_timeout: float = _variable("SSE_WRITE_TIMEOUT", 10.0, ge=0.01, le=MAX_SECONDS)
    max_lifetime: float = _variable("SSE_MAX_LIFETIME", 0.0, ge=0, le=MAX_SECONDS)
    drain_window: float = _variable("SSE_DRAIN_WINDOW", 5.0, ge=0, le=MAX_SECONDS)
    drain_delay: float = _variable("SSE_DRAIN_DELAY", 0.0, ge=0, le=MAX_SECONDS)

    direct_writes: Literal["together", "single", "off"] = _variable("SSE_DIRECT_WRITES", "together")

    max_connections: int = _variable("SSE_MAX_CONNECTIONS", 10000, ge=0)
    max_connections_per_ip: int = _variable("SSE_MAX_CONNECTIONS_PER_IP", 0, ge=0)
    max_connections_per_subject: int = _variable("SSE_MAX_CONNECTIONS_PER_SUBJECT", 0, ge=0)
    connection_rate: float = _variable("SSE_CONNECTION_RATE", 1000.0, ge=0, allow_inf_nan=False)
    allowed_origins: Annotated[tuple[Origin, ...], NoDecode, BeforeValidator(_split), AfterValidator(_star_alone)] = (
        _variable("SSE_ALLOWED_ORIGINS", ("*",))
    )
    allowed_hosts: Annotated[Words, AfterValidator(_star_alone)] = _variable("SSE_ALLOWED_HOSTS", ("*",))
    trusted_proxies: Annotated[
        tuple[Annotated[Network, BeforeValidator(_network)], ...], NoDecode, BeforeValidator(_split)
    ] = _variable("SSE_TRUSTED_PROXIES", ())

    jwt_secret: SecretStr | None = _variable("SSE_JWT_SECRET", None, min_length=1)
    jwt_jwks: str | None = _variable("SSE_JWT_JWKS", None, min_length=1, repr=False)
    jwt_audience: str | None = _variable("SSE_JWT_AUDIENCE", None)
    jwt_issuer: str | None = _variable("SSE_JWT_ISSUER", None)

    log_level: Annotated[
        Literal["debug", "info", "warning", "error", "critical"],
        BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value),
    ] = _variable("LOG_LEVEL", "info")
    log_format: Literal["json", "console", "auto"] = _variable("LOG_FORMAT", "auto")

    _unknown: tuple[str, ...] = PrivateAttr(())

    @property
    def unknown(self) -> tuple[str, ...]:
        """Variables of the environment that are named as ours are, and that no setting has: most likely slips."""
        return self._unknown

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Keyword arguments only: reading the environment is `from_environment`'s, and only its, business."""
        return (init_settings,)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """The settings that the process's environment (or the given mapping) describes.

        Raises:
            SettingsError: a variable's value cannot be used; the text names each such variable.
        """
        import os

        source = os.environ if environment is None else environment
        names = {str(field.validation_alias) for field in cls.model_fields.values()}
        given = {
            name: value if name == "SSE_JWT_SECRET" else value.strip()
            for name, value in source.items()
            if name in names and value.strip()
        }
        # Empty is unset, but not where that would switch authentication off without a word.
        if empty := [name for name in _KEYS if name in source and not source[name].strip()]:
            raise SettingsError("\n".join(f"{name}: it is set but empty" for name in empty))
        try:
            settings = cls(**given)  # type: ignore[arg-type]  # aliases, which the type checker does not know
        except ValidationError as error:
            raise SettingsError(describe(error)) from None
        settings._unknown = tuple(sorted(name for name in source if _OURS.match(name) and name not in names))
        return settings


_NUMBERS = {"int_parsing": "no whole number", "int_from_float": "no whole number", "float_parsing": "no number"}


def describe(error: ValidationError) -> str:
    """One line for each wrong variable, without its value where that may be a secret."""
    lines: dict[str, str] = {}
    for problem in error.errors(include_url=False, include_context=False):
        variable = str(problem["loc"][0]) if problem["loc"] else "settings"
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] in _NUMBERS:
            message = f"{problem['input']!r} is {_NUMBERS[problem['type']]}"
        # Of several the first: what follows is said of a list whose wrong parts were left out.
        lines.setdefault(variable, f"{variable}: {message[:1].lower()}{message[1:]}")
    return "\n".join(lines.values())
