"""When Python's garbage collector looks at what, in a process that is ours.

The problem: a full collection looks at every object that can be in a cycle, and a stream is about 180 of them: with
10,000 streams it stops the loop for most of a second, while connecting again and again. And it finds next to nothing,
because streams are built so that they are freed by counting references (`hypercorn_connection.contain_failures`).

Strategy: full collections by themselves are switched off. A few times a second the young are collected, and what lives on is
put out of the collector's sight (`gc.freeze`): one pass over what is new, none over what is old. What dies in a cycle
out of sight stays in memory until a full collection is due: after as many departures as there are streams, but at least
`DEPARTURES`.

The C library keeps what is free between what is used, and buffers of all sizes come and go with clients that read
history: 2,000 of them made a process grow by half a megabyte a minute. So some time after streams have ended it is told
to give that back.
"""

from __future__ import annotations

import ctypes
import gc
import math
from collections.abc import Callable

import trio

from sse_trio.broadcaster import Broadcaster

__all__ = ["DEPARTURES", "Collector"]

INTERVAL = 0.25
"""Seconds between two looks at the young. What a page of history leaves is young, too: while somebody reads from far back,
one look takes 1.5 ms at this pace and 6 ms once a second, which is one event in a hundred that is late."""

DEPARTURES = 5000
"""Streams that must have ended since the last full collection: at most 10 KB each are waiting for it."""

TRIM_INTERVAL = 10.0
"""Seconds between two times that free memory is given back, at least. Once takes half a millisecond at this pace; once a
minute left up to 10 MB lying between."""

THRESHOLDS = (10_000, 10, 1_000_000)
"""For the young and the middle-aged, as gc.set_threshold takes them; never by itself for the old."""


def _find_trim() -> Callable[[int], int]:
    """glibc's `malloc_trim`; where there is another C library, nothing."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return lambda padding: 0
    return trim


trim = _find_trim()
"""Give free memory back to the system, keeping so many bytes at the end; 1 when some was given back."""


class Collector:
    """Takes over the collector of this process while `run` runs, and gives it back as it was."""

    def __init__(self, broadcaster: Broadcaster) -> None:
        self._broadcaster = broadcaster
        self._ended_at_last = 0
        self._ended_at_trim = 0
        self._trim_at = -math.inf
        self.full = 0
        """Full collections that were made."""

    async def run(self) -> None:
        """Collect, for ever."""
        thresholds = gc.get_threshold()
        gc.set_threshold(*THRESHOLDS)
        try:
            while True:
                self.collect()
                await trio.sleep(INTERVAL)
        finally:
            gc.unfreeze()
            gc.set_threshold(*thresholds)

    def collect(self) -> None:
        """Collect the young and put the living out of sight; everything, when enough streams have ended.

        And give free memory back, when it is time to.
        """
        here = len(self._broadcaster.clients)
        ended = self._broadcaster.connects - here
        if ended - self._ended_at_last >= max(DEPARTURES, here):
            self._ended_at_last = ended
            self.full += 1
            gc.unfreeze()
            gc.collect()
        else:
            gc.collect(1)
        gc.freeze()
        now = trio.current_time()
        if ended != self._ended_at_trim and now >= self._trim_at:
            self._ended_at_trim, self._trim_at = ended, now + TRIM_INTERVAL
            trim(0)
