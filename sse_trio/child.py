"""Child processes that die with us, whatever we die of.

Strategy: `PR_SET_PDEATHSIG` makes the kernel signal a child when its parent is gone, kill -9 included; but it means the
parent *thread*, and trio starts processes from worker threads that end after ten idle seconds. So a child is started
here from the thread that runs trio, by a launcher that asks for the signal, makes sure that its parent was not gone
before it had asked, and becomes the child by exec. Elsewhere than on Linux a child outlives a parent that was killed.
The signals of a terminal are for the parent alone: the child has a session of its own, and what reached it before that
is thrown away.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import IO

import trio

__all__ = ["end", "spawn", "wait"]

POLL = 0.02
"""Seconds between two looks whether a child has ended."""

OF_THE_TERMINAL = (signal.SIGINT, signal.SIGHUP)

LAUNCHER = """
import ctypes, os, signal, sys
terminal = {terminal}
for number in terminal:
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_UNBLOCK, terminal)
for number in terminal:
    signal.signal(number, signal.SIG_DFL)
if sys.platform == "linux":
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(1, {signal}, 0, 0, 0) != 0:  # PR_SET_PDEATHSIG
        raise OSError(ctypes.get_errno(), "prctl")
if os.getppid() != {parent}:
    sys.exit(1)
os.execv(sys.argv[1], sys.argv[1:])
"""


def spawn(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    stdout: int | IO[bytes] | None = None,
    stderr: int | IO[bytes] | None = None,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start `command` (an absolute path first) in a session of its own, so that a terminal's Ctrl-C is ours alone.

    It gets SIGTERM when we are gone. Call it from the thread that runs trio.
    """
    program = LAUNCHER.format(
        terminal=[int(number) for number in OF_THE_TERMINAL], signal=int(signal.SIGTERM), parent=os.getpid()
    )
    before = signal.pthread_sigmask(signal.SIG_BLOCK, OF_THE_TERMINAL)
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", program, *command],
            env=None if env is None else dict(env),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            pass_fds=pass_fds,
            start_new_session=True,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


async def wait(process: subprocess.Popen[bytes]) -> int:
    """Its exit code, when it has ended. Cancelling it leaves the process alone."""
    while (code := process.poll()) is None:  # noqa: ASYNC110  # SIGCHLD is not ours to take
        await trio.sleep(POLL)
    return code


async def end(process: subprocess.Popen[bytes], grace: float) -> None:
    """Ask it to end, and after `grace` seconds make it. Not cancelled: it takes `grace` seconds at the most."""
    if process.poll() is None:
        process.terminate()
        with trio.move_on_after(grace, shield=True):
            await wait(process)
    if process.poll() is None:
        process.kill()
    process.wait()
