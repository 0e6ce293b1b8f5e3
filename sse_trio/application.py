"""The application: what is there once per process, and the one nursery in which it runs.

Strategy: the ASGI lifespan is the process's life. Its nursery holds the feed, the keys' refresher, and, once the first
request has shown the server's worker, the watcher that ends all streams when the server stops. A task of ours that
fails ends the lifespan with `LifespanFailureError`, which is the one error that Hypercorn does not swallow: the worker
dies of it, and does not go on answering 200 without a feed.

`create_app` makes one; the module `app` holds the one that `hypercorn sse_trio.app:app` serves.
"""

from __future__ import annotations

import os
import secrets
import signal
import threading

import structlog
import trio
from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, LifespanScope
from hypercorn.utils import LifespanFailureError
from quart_trio import QuartTrio

from sse_trio.access import Access, effective_max_connections
from sse_trio.asgi import ASGIConnection, RefusedWebSocket
from sse_trio.broadcaster import Broadcaster
from sse_trio.collector import Collector
from sse_trio.connection import Worker
from sse_trio.hypercorn_connection import accept_eagerly, contain_failures
from sse_trio.logs import configure_logging
from sse_trio.metrics import Metrics
from sse_trio.nats_feed import NatsFeed
from sse_trio.publisher import Publisher
from sse_trio.reader import Reader
from sse_trio.routes import create_blueprint
from sse_trio.services import Services
from sse_trio.settings import Settings

__all__ = ["App", "create_app"]

log = structlog.get_logger("sse_trio.app")

START_TIMEOUT = 5.0
"""Seconds that start-up waits for the feed's first attempt, so that early clients find it live."""


class Lifespan:
    """One run of the application, from the server's start to its end."""

    def __init__(self, app: App, scope: LifespanScope) -> None:
        self.app = app

    async def __call__(self, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        """Start, serve until the server says shutdown, and leave no task behind.

        Raises:
            LifespanFailureError: start-up failed, or a task failed later; the cause is its own exception.
        """
        await receive()
        stage = "startup"
        try:
            async with trio.open_nursery() as nursery:
                await self.app.begin(nursery)
                stage = "running"
                await send({"type": "lifespan.startup.complete"})
                await receive()
                nursery.cancel_scope.cancel()
        except (Exception, BaseExceptionGroup) as error:
            _, failures = error.split(trio.Cancelled) if isinstance(error, BaseExceptionGroup) else (None, error)
            if failures is None:
                raise
            cause = innermost(failures)
            log.critical("the application failed", stage=stage, error=f"{type(cause).__name__}: {cause}")
            raise LifespanFailureError(stage, str(cause)) from failures
        finally:
            self.app.end()
        await send({"type": "lifespan.shutdown.complete"})


def innermost(error: BaseException) -> BaseException:
    """The one exception inside groups of one."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


class App(QuartTrio):
    """The Quart application with what it serves. One run at a time; it can be run again."""

    asgi_http_class = ASGIConnection  # type: ignore[mutable-override]  # a subclass of Quart-Trio's
    asgi_websocket_class = RefusedWebSocket  # type: ignore[assignment]  # the same shape, another class
    asgi_lifespan_class = Lifespan  # type: ignore[assignment]  # the same shape, another class

    def __init__(self, settings: Settings, *, owns_process: bool = False, owns_signals: bool = False) -> None:
        """With `owns_process` a run also configures logging and tunes the garbage collector, with `owns_signals` it
        treats SIGTERM as a drain."""
        super().__init__("sse_trio", static_folder=None)
        self.settings = settings
        self.owns_process = owns_process
        self.owns_signals = owns_signals
        self.config["SSE_WRITE_TIMEOUT"] = settings.write_timeout
        self.config["MAX_CONTENT_LENGTH"] = 1 << 20
        self.config["BODY_TIMEOUT"] = 10  # seconds; 64 KiB take no longer, and a slow sender holds a socket
        self.config["PROVIDE_AUTOMATIC_OPTIONS"] = True
        self.broadcaster = Broadcaster(settings)
        self.feed = NatsFeed(settings, self.broadcaster)
        self.limit_warning: str | None = None
        max_connections: int | None = None
        if owns_process:
            max_connections, self.limit_warning = effective_max_connections(settings)
        access = Access(settings, max_connections=max_connections)
        instance = f"{os.uname().nodename}-{os.getpid()}-{secrets.token_hex(3)}"
        self.services = Services(
            settings=settings,
            broadcaster=self.broadcaster,
            feed=self.feed,
            publisher=Publisher(settings.nats_url, creds=settings.nats_creds, ca=settings.nats_ca),
            access=access,
            metrics=Metrics(self.broadcaster, self.feed, access, instance),
            reader=Reader(self.broadcaster, self.feed.backlog),
            backlog=self.feed.backlog,
            instance=instance,
        )
        self.register_blueprint(create_blueprint(self.services))
        self._worker: Worker | None = None

    async def begin(self, nursery: trio.Nursery) -> None:
        """Start what runs in the nursery; returns when the feed has been live or has failed once."""
        self.nursery = nursery
        contain_failures()
        accept_eagerly()
        self.broadcaster.stopping = None
        self._worker = None
        if self.owns_process:
            configure_logging(self.settings)
            nursery.start_soon(Collector(self.broadcaster).run)
        if self.owns_signals and threading.current_thread() is threading.main_thread():
            await nursery.start(self._drain_on_sigterm)
        if self.limit_warning:
            log.warning(self.limit_warning)
        if self.settings.unknown:
            log.warning("there are no such settings", names=list(self.settings.unknown))
        await nursery.start(self.services.access.run)
        nursery.start_soon(self.services.metrics.run)
        nursery.start_soon(self.services.publisher.run)
        nursery.start_soon(self.feed.run)
        with trio.move_on_after(START_TIMEOUT):
            await self.feed.first_attempt.wait()

    def end(self) -> None:
        """The run is over: nobody listens any more."""
        self._worker = None

    def drain(self) -> None:
        """Say goodbye to every stream, and to all that still come. Idempotent, synchronous."""
        if self.broadcaster.stopping is None:
            log.info("draining", clients=len(self.broadcaster.clients))
            self.broadcaster.drain("shutdown")

    def server_found(self, worker: Worker) -> None:
        """A request has shown which worker serves us: when that stops, the streams must end first."""
        self._worker = worker
        self.nursery.start_soon(self._drain_when_stopping, worker)

    async def _drain_when_stopping(self, worker: Worker) -> None:
        await worker.stopping.wait()
        self.drain()

    async def _drain_on_sigterm(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """SIGTERM to a worker of Hypercorn kills it without a word; to us it means: drain, then stop."""
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            task_status.started()
            async for _ in signals:
                self.drain()
                if self._worker is None:
                    break  # nobody was ever served
                await self._worker.stop()
        signal.raise_signal(signal.SIGTERM)


def create_app(settings: Settings | None = None, *, owns_process: bool = False, owns_signals: bool = False) -> App:
    """An ASGI application that serves discoveries by these settings (without: by the environment's).

    Run it with Hypercorn's trio worker; it connects to NATS when the server starts it.

    Raises:
        SettingsError: a variable of the environment cannot be used.
    """
    found = settings if settings is not None else Settings.from_environment()
    return App(found, owns_process=owns_process, owns_signals=owns_signals)
