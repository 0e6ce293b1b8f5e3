"""The same bytes to many sockets, with one system call.

Strategy: Linux's `io_submit` takes a list of writes and does each as `write` would. On a socket that does not block,
all are over when it returns: taken, cut, or refused. So the loop over the sockets of a round is the kernel's, and costs
what the kernel's `send` costs. Nothing is under way when `write` has returned.

What always holds: a descriptor in the list is open. Who closes it takes it out first, for the kernel gives its number to
the next connection.

The list's format is that of linux/aio_abi.h, the calls are those of io_setup(2), io_submit(2) and io_getevents(2), by
their numbers, since the C library has no functions for them.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys
import threading
from array import array

__all__ = ["MOST", "BulkWrite"]

MOST = 128
"""Sockets that one list holds at most."""

WORDS = 8
"""A write in the list (`struct iocb`), and what became of it (`struct io_event`): so many, and half as many, words."""
IDENTITY, OPERATION, ADDRESS, LENGTH = 0, 2, 3, 4
RESULT = 2
PWRITE = 1

_CALLS = {"x86_64": (206, 209, 208), "aarch64": (0, 2, 4)}
"""The numbers of io_setup, io_submit and io_getevents."""


class _Queue:
    """What the kernel hands results back through (`aio_context_t`)."""

    def __init__(self) -> None:
        """Raises OSError where the kernel, or what confines the process, does not have it."""
        if sys.platform != "linux" or sys.byteorder != "little" or sys.maxsize < 1 << 32:
            raise OSError(errno.ENOSYS, "io_submit is Linux's, and the format here that of its 64-bit machines")
        if platform.machine() not in _CALLS:
            raise OSError(errno.ENOSYS, f"the numbers of io_submit on {platform.machine()} are not known")
        setup, self._submit_call, self._results_call = _CALLS[platform.machine()]
        number, size, place = ctypes.c_long, ctypes.c_long, ctypes.c_void_p
        library = ctypes.CDLL(None, use_errno=True)
        prototype = ctypes.CFUNCTYPE(ctypes.c_long, number, size, place, use_errno=True)
        context = ctypes.c_ulong(0)
        if prototype(("syscall", library))(setup, MOST, ctypes.addressof(context)) < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        self._context = context.value
        prototype = ctypes.CFUNCTYPE(ctypes.c_long, number, ctypes.c_ulong, size, place, use_errno=True)
        self._submit = prototype(("syscall", library))
        prototype = ctypes.CFUNCTYPE(ctypes.c_long, number, ctypes.c_ulong, size, size, place, place, use_errno=True)
        self._results = prototype(("syscall", library))
        self._events = array("q", bytes(MOST * WORDS // 2 * 8))
        self._events_at = self._events.buffer_info()[0]

    def submit(self, writes: int, count: int) -> int:
        """Do the writes that `count` pointers at the address `writes` point to; how many the kernel accepted."""
        return max(0, int(self._submit(self._submit_call, self._context, count, writes)))

    def results(self, count: int) -> array[int]:
        """What has become of `count` writes: in every four words the third is how much was taken, or minus an errno."""
        found = self._results(self._results_call, self._context, count, count, self._events_at, None)
        if found != count:
            raise OSError(ctypes.get_errno(), "io_getevents: what has become of writes is not known")
        return self._events[: count * WORDS // 2]

    def try_out(self) -> None:
        """Raises OSError where only a part of all this is allowed."""
        with open(os.devnull, "wb") as nowhere:
            write = array("Q", (0, 0, PWRITE | nowhere.fileno() << 32, 0, 0, 0, 0, 0))
            pointer = array("Q", (write.buffer_info()[0],))
            if self.submit(pointer.buffer_info()[0], 1) != 1:
                raise OSError(ctypes.get_errno(), "io_submit does not take a write")
            self.results(1)


_own = threading.local()
os.register_at_fork(after_in_child=lambda: vars(_own).clear())  # what the kernel has is not the child's


def _queue() -> _Queue | None:
    """This thread's; None where there is none to be had."""
    if not hasattr(_own, "queue"):
        try:
            _own.queue = _Queue()
            _own.queue.try_out()
        except OSError:
            _own.queue = None
    return _own.queue  # type: ignore[no-any-return]


class BulkWrite:
    """A list of at most `MOST` descriptors of non-blocking sockets, which are written to together."""

    __slots__ = ("_pointers", "_writes")

    def __init__(self) -> None:
        self._writes = array("Q")
        self._pointers: array[int] | None = None

    @staticmethod
    def works() -> bool:
        """Whether this system has what it takes. Where it does not, `write` is a loop."""
        return _queue() is not None

    def __len__(self) -> int:
        return len(self._writes) // WORDS

    def add(self, descriptor: int) -> None:
        """Put a descriptor at the end of the list.

        Raises:
            ValueError: the list is full.
        """
        if len(self) == MOST:
            raise ValueError(f"a list takes {MOST} descriptors")
        self._writes.extend((len(self), 0, PWRITE | descriptor << 32, 0, 0, 0, 0, 0))
        self._pointers = None

    def remove(self, index: int) -> None:
        """Take a descriptor out of the list; the last one takes its place."""
        last = self._writes[-WORDS:]
        del self._writes[-WORDS:]
        if index < len(self):
            last[IDENTITY] = index
            self._writes[index * WORDS : (index + 1) * WORDS] = last
        self._pointers = None

    def write(self, data: bytes) -> list[tuple[int, int]]:
        """Write `data` to all of them, without waiting.

        The indexes of those that did not take all of it, each with the number of bytes that were taken, or minus an
        errno: EAGAIN where there was no room.
        """
        queue, count = _queue(), len(self)
        address = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value
        assert address is not None
        self._writes[ADDRESS::WORDS] = array("Q", (address,)) * count
        self._writes[LENGTH::WORDS] = array("Q", (len(data),)) * count
        if self._pointers is None:
            start = self._writes.buffer_info()[0]
            self._pointers = array("Q", range(start, start + count * WORDS * 8, WORDS * 8))
        pointers = self._pointers.buffer_info()[0]
        whole = array("q", (len(data),))
        short: list[tuple[int, int]] = []
        done = 0
        while done < count:
            if queue is not None and (accepted := queue.submit(pointers + done * 8, count - done)):
                events = queue.results(accepted)
                results = events[RESULT :: WORDS // 2]
                if results != whole * accepted:
                    short += [pair for pair in zip(events[:: WORDS // 2], results, strict=True) if pair[1] != len(data)]
                done += accepted
            if done < count:  # refused at the door: a write by itself is told why
                if (taken := self._write_one(done, data)) != len(data):
                    short.append((done, taken))
                done += 1
        return short

    def _write_one(self, index: int, data: bytes) -> int:
        try:
            return os.write(self._writes[index * WORDS + OPERATION] >> 32, data)
        except OSError as error:
            return -(error.errno or errno.EIO)
