"""The server as a process of our own: Hypercorn with good defaults, signals, and exit codes that tell the truth.

Strategy: one worker is Hypercorn's trio server in a nursery of ours. The listening socket is opened first, so that a
taken port is an error before anything else has begun. A signal begins the drain: `/health` says no for
`SSE_DRAIN_DELAY` seconds (a second signal cuts that short), then the listener closes and every stream ends. Several
workers are several such processes on one socket, each started by the same command; when one of them dies by itself,
so do the others, and the exit code says so.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any

import structlog
import trio
from hypercorn.config import Config
from hypercorn.trio import serve as hypercorn_serve

from sse_trio import child
from sse_trio.application import App
from sse_trio.deadline import STOPPING

__all__ = ["GRACE", "StartError", "bind_socket", "run_app", "run_workers", "stop_on_signals"]

log = structlog.get_logger("sse_trio.server")

BACKLOG = 4096
"""Connections that wait to be accepted: after a redeploy all clients come back at once."""

GRACE = STOPPING + 1
"""Seconds that Hypercorn gives its connections when it stops: no write takes longer than `STOPPING` then."""


class StartError(Exception):
    """The server cannot start; the text is one line."""


def bind_socket(bind: str) -> socket.socket:
    """A listening socket for `host:port`, `[v6]:port`, `unix:path` or `fd://number`.

    Raises:
        StartError: it cannot be had; the text names the address.
    """
    config = Config()
    config.bind = [bind]
    try:
        bound = config.create_sockets().insecure_sockets[0]
        bound.listen(BACKLOG)
    except (OSError, ValueError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise StartError(f"cannot listen on {bind}: {reason}") from None
    return bound


async def run_app(
    app: App,
    bound: socket.socket,
    stop: trio.Event,
    *,
    certfile: str | None = None,
    keyfile: str | None = None,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve `app` on a listening socket until `stop`, then drain. Starts (`task_status`) with the URL it serves.

    Raises:
        LifespanFailureError: start-up failed, or a task of the application did.
    """
    config = Config()
    config.bind = [f"fd://{bound.fileno()}"]
    config.backlog = BACKLOG
    config.graceful_timeout = GRACE
    config.certfile, config.keyfile = certfile, keyfile
    config.errorlog = None
    async with trio.open_nursery() as nursery:
        # No listener before the first request does the walk to the worker: the streams learn of the end from us too.
        nursery.start_soon(_drain_when, stop, app)
        await hypercorn_serve(
            app,
            config,
            shutdown_trigger=stop.wait,
            task_status=_Renamed(task_status, bound, "https" if certfile else "http"),
        )
        nursery.cancel_scope.cancel()


async def _drain_when(stop: trio.Event, app: App) -> None:
    await stop.wait()
    app.drain()


class _Renamed:
    """Hypercorn starts with the names of its file descriptors; people want an address."""

    def __init__(self, task_status: trio.TaskStatus[str], bound: socket.socket, scheme: str) -> None:
        self._task_status = task_status
        self._url = url_of(bound, scheme)

    def started(self, value: Any = None) -> None:
        self._task_status.started(self._url)


def url_of(bound: socket.socket, scheme: str) -> str:
    """Where a browser on this machine finds a listening socket."""
    address = bound.getsockname()
    if bound.family not in {socket.AF_INET, socket.AF_INET6}:
        return f"unix:{address}"
    host: str = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address[0], address[0])
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{address[1]}"


@asynccontextmanager
async def stop_on_signals(app: App | None = None, delay: float = 0.0) -> AsyncIterator[trio.Event]:
    """An event that SIGINT or SIGTERM sets; with a `delay`, `/health` of `app` says no for so many seconds before."""
    stop = trio.Event()
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:

            async def watch(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
                task_status.started()
                await anext(aiter(signals))
                if app is not None and delay > 0:
                    app.services.draining = True
                    log.info("draining soon", seconds=delay)
                    with trio.move_on_after(delay):
                        await anext(aiter(signals))
                stop.set()

            await nursery.start(watch)
            yield stop
            nursery.cancel_scope.cancel()


@contextmanager
def shared_metrics() -> Iterator[dict[str, str]]:
    """The environment in which several workers count together: a directory of their own, unless one is given."""
    if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        yield dict(os.environ)
        return
    with tempfile.TemporaryDirectory(prefix="sse-trio-metrics-") as directory:
        yield dict(os.environ) | {"PROMETHEUS_MULTIPROC_DIR": directory}


async def run_workers(count: int, bound: socket.socket, options: list[str], grace: float) -> int:
    """Serve on one socket with `count` processes, until a signal or until one of them ends; the exit code.

    `grace` is the number of seconds that a worker may take to end.
    """
    command = [sys.executable, "-m", "sse_trio", "serve", "--bind", f"fd://{bound.fileno()}", *options]
    with shared_metrics() as environment:
        async with stop_on_signals() as stop:
            workers = [child.spawn(command, env=environment, pass_fds=[bound.fileno()]) for _ in range(count)]
            try:
                async with trio.open_nursery() as nursery:

                    async def stop_when_ended(worker: Any) -> None:
                        await child.wait(worker)
                        if not stop.is_set():
                            log.critical("a worker ended by itself", pid=worker.pid, code=worker.returncode)
                        nursery.cancel_scope.cancel()

                    for worker in workers:
                        nursery.start_soon(stop_when_ended, worker)
                    await stop.wait()
                    nursery.cancel_scope.cancel()
            finally:
                for worker in workers:
                    if worker.poll() is None:
                        worker.terminate()
                async with trio.open_nursery() as nursery:
                    for worker in workers:
                        nursery.start_soon(partial(child.end, worker, grace))
    codes = [worker.returncode for worker in workers]
    return next((code if code > 0 else 1 for code in codes if code), 0 if stop.is_set() else 1)
