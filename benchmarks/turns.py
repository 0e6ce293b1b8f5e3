"""`python -m benchmarks.turns FILE serve …`: sse-trio, with its event loop's longest turn written to a file.

A turn is what a loop does between two looks at its sockets: as long as it lasts, nobody else is served. `/health`, asked
from outside, takes several turns, and waits for its client and for the processor as well.

Strategy: one of Trio's instruments, which is called before and after each look, and eight bytes that this process and
the one that measures both have in memory, so that asking does not disturb. It costs half a microsecond a turn.
"""

from __future__ import annotations

import mmap
import struct
import sys
import time
from functools import partial
from pathlib import Path

import trio

_SECONDS = struct.Struct("d")


class LongestTurn(trio.abc.Instrument):
    """The longest turn of a loop so far, in seconds of the clock: those in which it did not have the processor count."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._shared = mmap.mmap(file.fileno(), _SECONDS.size)
        self._began = time.perf_counter()

    def after_io_wait(self, timeout: float) -> None:
        self._began = time.perf_counter()

    def before_io_wait(self, timeout: float) -> None:
        turn = time.perf_counter() - self._began
        if turn > _SECONDS.unpack_from(self._shared)[0]:
            _SECONDS.pack_into(self._shared, 0, turn)


def reset(path: Path) -> None:
    """Begin again: the file must be there before the loop, and may be reset at any time."""
    with path.open("r+b" if path.exists() else "wb") as file:
        file.write(_SECONDS.pack(0))


def longest(path: Path) -> float:
    """Seconds since the last `reset`; a turn that is not over yet is not in it."""
    seconds: float = _SECONDS.unpack(path.read_bytes())[0]
    return seconds


def main() -> None:
    from sse_trio.cli import main as sse_trio

    path = Path(sys.argv.pop(1))
    # The command makes the loop, and has no other way to give it an instrument.
    trio.run = partial(trio.run, instruments=[LongestTurn(path)])  # type: ignore[assignment]
    sse_trio()


if __name__ == "__main__":
    main()
