"""The server as a process of our own: Hypercorn with good defaults, signals, and exit codes that tell the truth.

Strategy: one worker is Hypercorn's trio server in a nursery of ours. The listening socket is opened first, so that a
taken port is an error before anything else has begun. A signal begins the drain: `/health` says no for
`SSE_DRAIN_DELAY` seconds (a second signal cuts that short), then the listener closes and every stream ends. Several
workers are several such processes on one socket, each started by the same command; when one of them dies by itself,
so do the others, and the exit code says so.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from typing import Any

import structlog
import trio
from hypercorn.config import Config, Sockets
from hypercorn.trio.run import worker_serve
from hypercorn.utils import wrap_app

from sse_trio import child
from sse_trio.application import App
from sse_trio.deadline import STOPPING
from sse_trio.scratch import own_directory, remove_leftovers

__all__ = ["GRACE", "StartError", "WrongBind", "bind_socket", "listening", "run_app", "run_workers", "stop_on_signals"]

log = structlog.get_logger("sse_trio.server")

KEEP_ALIVE = 30.0
"""Seconds that a connection may wait for its request, the first or the next. Where ten thousand come at once and the
backlog is full, the kernel drops requests, and the peer's next copy comes seconds later: Hypercorn's 5 would close what
it has just accepted. (A proxy that keeps connections open longer than this sends requests to closed ones.)"""

BACKLOG = 4096
"""Connections that wait to be accepted: after a redeploy all clients come back at once."""

GRACE = STOPPING + 1
"""Seconds that Hypercorn gives its connections when it stops: no write takes longer than `STOPPING` then."""

HANDSHAKE = 10.0
"""Seconds in which a client has to say who it is over TLS; Hypercorn's own 60 let the silent hold a file for long."""

METRICS = "sse-trio-metrics-"
"""What the names of the directories begin with in which workers count."""

ECHO = 0.5
"""Seconds within which a second signal is the first once more: a supervisor's, passed on, and the whole group's."""


class StartError(Exception):
    """The server cannot start; the text is one line."""


class WrongBind(StartError):
    """What is to be listened on is no address: no other moment and no other machine would change that."""


def bind_socket(bind: str) -> socket.socket:
    """A listening socket for `host:port`, `[v6]:port`, `port` (of 127.0.0.1), `unix:path` or `fd://number`.

    Raises:
        WrongBind: it is none of these.
        StartError: it cannot be had; the text names the address, and the next one where it is taken.
    """
    try:
        with ExitStack() as on_failure:
            if bind.startswith("fd://"):
                bound = on_failure.enter_context(socket.socket(fileno=int(bind.removeprefix("fd://"))))
            else:
                family, address = _address_of(bind)
                bound = on_failure.enter_context(socket.socket(family, socket.SOCK_STREAM))
                if family != socket.AF_UNIX:
                    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                bound.bind(address)
            bound.listen(BACKLOG)
            bound.setblocking(False)
            on_failure.pop_all()
    except (ValueError, OverflowError):
        raise WrongBind(f"cannot listen on {bind}: expected host:port, for example 127.0.0.1:3000") from None
    except OSError as error:
        reason = error.strerror or str(error)
        host, _, port = bind.rpartition(":")
        is_taken = error.errno == errno.EADDRINUSE and port.isdecimal() and int(port) < 65535
        hint = f"; choose another: --bind {host or '127.0.0.1'}:{int(port) + 1}" if is_taken else ""
        raise StartError(f"cannot listen on {bind}: {reason[:1].lower()}{reason[1:]}{hint}") from None
    return bound


def _address_of(bind: str) -> tuple[socket.AddressFamily, Any]:
    if bind.startswith("unix:"):
        path = bind.removeprefix("unix:")
        if os.path.exists(path) and stat.S_ISSOCK(os.stat(path).st_mode):
            os.unlink(path)  # left by a server that was killed
        return socket.AF_UNIX, path
    host, _, port = bind.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise ValueError
    found = socket.getaddrinfo(host.strip("[]") or "127.0.0.1", int(port), type=socket.SOCK_STREAM)
    family, _, _, _, address = found[0]
    return family, address


@contextmanager
def listening(bind: str) -> Iterator[socket.socket]:
    """`bind_socket` that closes the socket, and removes its file where it has one.

    Raises:
        StartError: it cannot be had, see `bind_socket`.
    """
    with bind_socket(bind) as bound:
        try:
            yield bound
        finally:
            if bind.startswith("unix:"):
                with suppress(OSError):
                    os.unlink(bind.removeprefix("unix:"))


class _Errors(logging.Handler):
    """What Hypercorn says of requests that failed, said our way. Its other lines are ours to say."""

    def emit(self, record: logging.LogRecord) -> None:
        log.error("a request failed", detail=record.getMessage(), exc_info=record.exc_info)


def _errors() -> logging.Logger:
    logger = logging.Logger("hypercorn", logging.ERROR)
    logger.addHandler(_Errors())
    return logger


async def run_app(
    app: App,
    bound: socket.socket,
    stop: trio.Event,
    *,
    certfile: str | None = None,
    keyfile: str | None = None,
    grace: float = GRACE,
    keep_alive: float = KEEP_ALIVE,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve `app` on a listening socket until `stop`, then drain. Starts (`task_status`) with the URL it serves.

    A `stop` that comes during start-up ends that at once. Requests that are under way have `grace` seconds to end, and
    connections without one are closed after `keep_alive` seconds. The socket is closed in any case.

    Raises:
        LifespanFailureError: start-up failed, or a task of the application did.
        StartError: the certificate or its key cannot be used.
    """
    with bound:
        url = url_of(bound, "https" if certfile else "http")
        config = Config()
        config.graceful_timeout = grace
        config.keep_alive_timeout = keep_alive
        config.certfile, config.keyfile = certfile, keyfile
        config.ssl_handshake_timeout = HANDSHAKE
        config.errorlog = _errors()
        try:
            config.create_ssl_context()
        except (OSError, ValueError) as error:
            raise StartError(f"cannot use {certfile} with {keyfile}: {error}") from None
        sockets = Sockets([bound], [], []) if certfile else Sockets([], [bound], [])
        async with trio.open_nursery() as nursery:

            async def serve(*, task_status: trio.TaskStatus[list[str]]) -> None:
                await worker_serve(
                    wrap_app(app, config.wsgi_max_body_size, "asgi"),
                    config,
                    sockets=sockets,
                    shutdown_trigger=stop.wait,
                    task_status=task_status,
                )
                nursery.cancel_scope.cancel()

            async def drain(starting: trio.CancelScope) -> None:
                # The streams learn of the end from us: before the first request, nothing has shown the app its worker.
                await stop.wait()
                starting.cancel()
                app.drain()

            with trio.CancelScope() as starting:
                nursery.start_soon(drain, starting)
                await nursery.start(serve)
            task_status.started(url)


def url_of(bound: socket.socket, scheme: str) -> str:
    """Where a browser on this machine finds a listening socket."""
    address = bound.getsockname()
    if bound.family not in {socket.AF_INET, socket.AF_INET6}:
        return f"unix:{address}"
    host: str = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address[0], address[0])
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{address[1]}"


def stop_signals() -> list[signal.Signals]:
    """The signals that ask us to end. A closed terminal is one, unless `nohup` has said otherwise."""
    asked = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        asked.append(signal.SIGHUP)
    return asked


@asynccontextmanager
async def stop_on_signals(app: App | None = None, delay: float = 0.0) -> AsyncIterator[trio.Event]:
    """An event that a signal to end sets; with a `delay`, `/health` of `app` says no for so many seconds before."""
    stop = trio.Event()
    with trio.open_signal_receiver(*stop_signals()) as signals:
        async with trio.open_nursery() as nursery:

            async def watch(*, task_status: trio.TaskStatus[None]) -> None:
                task_status.started()
                await anext(signals)
                if app is not None and delay > 0:
                    app.services.draining = True
                    log.info("draining soon", seconds=delay)
                    first = trio.current_time()
                    with trio.move_on_after(delay):
                        async for _ in signals:
                            if trio.current_time() - first > ECHO:
                                break
                stop.set()
                async for _ in signals:
                    pass  # asked again: it is under way

            await nursery.start(watch)
            yield stop
            nursery.cancel_scope.cancel()


@contextmanager
def shared_metrics() -> Iterator[tuple[dict[str, str], list[int]]]:
    """The environment in which several workers count together, and the descriptors that they must inherit.

    They count in a directory of their own, unless one is given.
    """
    if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        yield dict(os.environ), []
        return
    remove_leftovers(METRICS)
    with own_directory(METRICS) as directory:
        yield os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(directory.path)}, [directory.lock]


async def run_workers(count: int, bound: socket.socket, options: list[str], grace: float) -> int:
    """Serve on one socket with `count` processes, until a signal or until one of them ends; the exit code.

    Every signal to end is passed on, so that a second one shortens the drain. `grace` is the number of seconds that a
    worker may take to end.
    """
    command = [sys.executable, "-m", "sse_trio", "serve", "--bind", f"fd://{bound.fileno()}", *options]
    stopping = False
    with trio.open_signal_receiver(*stop_signals()) as signals, shared_metrics() as (environment, locks):
        workers = [child.spawn(command, env=environment, pass_fds=[bound.fileno(), *locks]) for _ in range(count)]
        try:
            async with trio.open_nursery() as nursery:

                async def pass_on() -> None:
                    nonlocal stopping
                    async for _ in signals:
                        if not stopping:
                            nursery.cancel_scope.deadline = trio.current_time() + grace
                        stopping = True
                        for worker in workers:
                            worker.terminate()

                async def wait_for(worker: subprocess.Popen[bytes]) -> None:
                    await child.wait(worker)
                    if not stopping:
                        log.critical("a worker ended by itself", pid=worker.pid, code=worker.returncode)
                        nursery.cancel_scope.cancel()

                nursery.start_soon(pass_on)
                async with trio.open_nursery() as waiting:
                    for worker in workers:
                        waiting.start_soon(wait_for, worker)
                nursery.cancel_scope.cancel()
        finally:
            for worker in workers:
                if worker.poll() is None and not stopping:
                    worker.terminate()
            async with trio.open_nursery() as nursery:
                for worker in workers:
                    nursery.start_soon(child.end, worker, 0.0 if stopping else grace)
    if not stopping:
        return 1
    # One that was asked before it listened to signals ended as it was asked to.
    return 1 if any(worker.returncode not in {0, -signal.SIGTERM} for worker in workers) else 0
