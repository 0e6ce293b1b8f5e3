"""The settings: read from the environment once, validated, frozen.

Strategy: one frozen model holds every knob under the name that the code uses; the name of its environment variable
is the field's alias. Nothing else in the package reads the environment. `Settings.from_environment()` raises
`SettingsError`, whose text is one line per wrong variable and names it: a typo must never become a default.
"""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

__all__ = ["Network", "Overflow", "Settings", "SettingsError"]

Overflow = Literal["drop-oldest", "drop-newest", "disconnect"]
Network = IPv4Network | IPv6Network


class SettingsError(ValueError):
    """A variable has a value that cannot be used; the text names it and says what it takes."""


def _split(value: object) -> object:
    """A comma-separated list, as environment variables hold it."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _check_nats_url(value: str) -> str:
    parts = urlsplit(value if "//" in value else f"nats://{value}")
    if parts.scheme not in {"nats", "tls", "ws", "wss"} or not parts.hostname:
        # The value is not repeated: it may hold a password.
        raise ValueError("expected nats://host:port or tls://host:port, several separated by commas")
    try:
        _ = parts.port
    except ValueError:
        raise ValueError("the port is not a number from 0 to 65535") from None
    return value if "//" in value else f"nats://{value}"


def _check_origin(value: str) -> str:
    if value == "*":
        return value
    parts = urlsplit(value)
    if parts.scheme not in {"http", "https"} or not parts.netloc or parts.path not in {"", "/"} or parts.query:
        raise ValueError(f"{value!r} is not an origin such as https://example.org")
    return f"{parts.scheme}://{parts.netloc}".lower()


def _check_subject(value: str) -> str:
    tokens = value.split(".")
    wild_tail = ">" in tokens[:-1]
    if any(not token for token in tokens) or wild_tail or any(c.isspace() for c in value):
        raise ValueError(f"{value!r} is not a NATS subject: tokens joined by dots, * for one, > for the rest")
    return value


def _check_stream_name(value: str) -> str:
    if not value or any(c.isspace() or c in ".*>/\\" for c in value):
        raise ValueError(f"{value!r} is not a stream name: no white space, dots, *, >, or slashes")
    return value


def _network(value: object) -> object:
    return ip_network(value, strict=False) if isinstance(value, str) else value


NatsUrl = Annotated[str, AfterValidator(_check_nats_url)]
Origin = Annotated[str, AfterValidator(_check_origin)]
Words = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]


def _variable(name: str, default: Any, **constraints: Any) -> Any:
    return Field(default=default, validation_alias=name, **constraints)


class Settings(BaseSettings):
    """Every knob of sse-trio. Durations are in seconds, sizes in bytes, `retry` in milliseconds."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", populate_by_name=True, env_ignore_empty=True)

    nats_url: Annotated[tuple[NatsUrl, ...], NoDecode, BeforeValidator(_split)] = _variable(
        "NATS_URL", ("nats://127.0.0.1:4222",), min_length=1
    )
    nats_creds: Path | None = _variable("NATS_CREDS", None)
    nats_ca: Path | None = _variable("NATS_CA", None)
    nats_subject: Annotated[str, AfterValidator(_check_subject)] = _variable("NATS_SUBJECT", "discoveries.>")
    nats_durable: Literal["auto", "require", "off"] = _variable("NATS_DURABLE", "auto")
    nats_stream: Annotated[str, AfterValidator(_check_stream_name)] = _variable("NATS_STREAM", "DISCOVERIES")
    nats_stream_max_age: float = _variable("NATS_STREAM_MAX_AGE", 86400.0, ge=0, allow_inf_nan=False)
    nats_stream_max_bytes: int = _variable("NATS_STREAM_MAX_BYTES", 1 << 30, ge=-1)
    nats_stream_replicas: int = _variable("NATS_STREAM_REPLICAS", 1, ge=1, le=5)

    buffer: int = _variable("SSE_BUFFER", 1024, ge=1)
    overflow: Overflow = _variable("SSE_OVERFLOW", "drop-oldest")
    history: int = _variable("SSE_HISTORY", 10000, ge=0)
    history_bytes: int = _variable("SSE_HISTORY_BYTES", 64 << 20, ge=0)
    keepalive_interval: float = _variable("SSE_KEEPALIVE_INTERVAL", 30.0, gt=0, allow_inf_nan=False)
    retry: int = _variable("SSE_RETRY", 3000, ge=0)
    write_timeout: float = _variable("SSE_WRITE_TIMEOUT", 10.0, gt=0, allow_inf_nan=False)
    max_lifetime: float = _variable("SSE_MAX_LIFETIME", 0.0, ge=0, allow_inf_nan=False)
    drain_window: float = _variable("SSE_DRAIN_WINDOW", 5.0, ge=0, allow_inf_nan=False)
    drain_delay: float = _variable("SSE_DRAIN_DELAY", 0.0, ge=0, allow_inf_nan=False)

    max_connections: int = _variable("SSE_MAX_CONNECTIONS", 10000, ge=0)
    max_connections_per_ip: int = _variable("SSE_MAX_CONNECTIONS_PER_IP", 0, ge=0)
    max_connections_per_subject: int = _variable("SSE_MAX_CONNECTIONS_PER_SUBJECT", 0, ge=0)
    connection_rate: float = _variable("SSE_CONNECTION_RATE", 500.0, ge=0, allow_inf_nan=False)
    allowed_origins: Annotated[tuple[Origin, ...], NoDecode, BeforeValidator(_split)] = _variable(
        "SSE_ALLOWED_ORIGINS", ("*",)
    )
    allowed_hosts: Words = _variable("SSE_ALLOWED_HOSTS", ("*",))
    trusted_proxies: Annotated[
        tuple[Annotated[Network, BeforeValidator(_network)], ...], NoDecode, BeforeValidator(_split)
    ] = _variable("SSE_TRUSTED_PROXIES", ())

    jwt_secret: SecretStr | None = _variable("SSE_JWT_SECRET", None, min_length=1)
    jwt_jwks: str | None = _variable("SSE_JWT_JWKS", None)
    jwt_audience: str | None = _variable("SSE_JWT_AUDIENCE", None)
    jwt_issuer: str | None = _variable("SSE_JWT_ISSUER", None)

    log_level: Annotated[
        Literal["debug", "info", "warning", "error", "critical"],
        BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value),
    ] = _variable("LOG_LEVEL", "info")
    log_format: Literal["json", "console", "auto"] = _variable("LOG_FORMAT", "auto")

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
        given = {name: value for name, value in source.items() if name in names and value.strip()}
        try:
            return cls(**given)  # type: ignore[arg-type]  # aliases, which the type checker does not know
        except ValidationError as error:
            raise SettingsError(describe(error)) from None


def describe(error: ValidationError) -> str:
    """One line for each wrong variable, without its value where that may be a secret."""
    lines = []
    for problem in error.errors(include_url=False, include_context=False):
        variable = str(problem["loc"][0]) if problem["loc"] else "settings"
        message = problem["msg"].removeprefix("Value error, ")
        lines.append(f"{variable}: {message[:1].lower()}{message[1:]}")
    return "\n".join(lines)
