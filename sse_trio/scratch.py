"""Temporary directories of our own: gone when their block ends, and where that could not be, removed by the next run.

Strategy: a directory is locked (`flock` on the directory itself, so that there is no lock file to lose) for as long as
its run lives, and as long as the children do that were given its descriptor. The kernel lets go of the lock however the
run ends: a directory of ours that nobody locks was left by one that was killed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Scratch", "own_directory", "remove_leftovers"]


@dataclass(frozen=True)
class Scratch:
    """A directory of this run."""

    path: Path
    lock: int
    """The descriptor that holds the lock; a child that inherits it keeps the directory from being taken for a dead
    run's while it lives."""


@contextmanager
def own_directory(prefix: str) -> Iterator[Scratch]:
    """A temporary directory, locked for as long as the block runs, and then removed with all that is in it."""
    scratch = _lock_new(prefix)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch.path, ignore_errors=True)
        os.close(scratch.lock)


def _lock_new(prefix: str) -> Scratch:
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix))
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue  # whoever cleans up took it for a dead run's before it was locked
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return Scratch(path, lock)
        os.close(lock)  # the same, a moment later


def remove_leftovers(prefix: str) -> None:
    """Remove our directories of this prefix that nobody holds: those of runs that were killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with suppress(OSError):  # it is locked, or somebody else's, or gone already
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(lock).st_uid == os.getuid():
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)
