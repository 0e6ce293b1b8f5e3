"""What processes cost: processor time and memory of a process and all its descendants, read from /proc.

Strategy: everything is read at the moments when the load client waits for us, so a number belongs to a phase.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Usage:
    """Of a process tree, so far."""

    cpu: float  # seconds, user and system together
    rss: int  # bytes; pages that several processes share count in each


def _stat(pid: int) -> list[str] | None:
    try:
        # The name is in parentheses and may hold anything: what counts stands behind the last one.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def tree(pid: int) -> list[int]:
    """`pid` and its descendants, as they are now."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := _stat(int(entry))) is not None:
            children.setdefault(int(fields[1]), []).append(int(entry))
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found


def usage(pid: int) -> Usage:
    cpu = rss = 0
    for member in tree(pid):
        if (fields := _stat(member)) is not None:
            cpu += int(fields[11]) + int(fields[12])
            rss += int(fields[21])
    return Usage(cpu / _TICKS, rss * _PAGE)


@contextmanager
def running(
    command: Sequence[str], log: Path, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose whole tree is gone when the block ends; what it says goes to `log`."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        # No measurement needs a graceful end, and some contenders have none while clients are connected.
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
