"""Logging, set up once by whoever owns the process: structured lines on standard error.

Strategy: everything is logged through structlog under a name of ours; a library that embeds the app keeps its own
configuration, because nothing here runs at import.
"""

from __future__ import annotations

import logging
import sys
import time

import structlog

from sse_trio.settings import Settings

__all__ = ["configure_logging"]


def configure_logging(settings: Settings) -> None:
    """Send every line at or above `LOG_LEVEL` to standard error, as JSON or for people (`LOG_FORMAT`)."""
    as_json = settings.log_format == "json" or (settings.log_format == "auto" and not sys.stderr.isatty())
    people = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    renderer: structlog.typing.Processor = structlog.processors.JSONRenderer() if as_json else people
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info if as_json else _keep,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(settings.log_level.upper())),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )
    accepting = logging.getLogger("trio.serve_listeners")
    if not any(isinstance(handler, _Accepting) for handler in accepting.handlers):
        accepting.addHandler(_Accepting())
        accepting.propagate = False


class _Accepting(logging.Handler):
    """What Trio says when a connection cannot be accepted (no file is left): one line every `INTERVAL` seconds.

    It says it ten times a second, each time with a traceback.
    """

    INTERVAL = 10.0

    def __init__(self) -> None:
        super().__init__()
        self._next = float("-inf")

    def emit(self, record: logging.LogRecord) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self.INTERVAL
            structlog.get_logger("sse_trio.server").error("connections cannot be accepted", reason=record.getMessage())


def _keep(
    logger: structlog.typing.WrappedLogger, name: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    return event  # the console renderer prints tracebacks itself
