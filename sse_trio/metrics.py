"""What is counted, for Prometheus: rendered from the statistics that the others keep as plain numbers.

Strategy: nothing on the hot path knows Prometheus. The broadcaster, the feed and the limits count in plain integers;
`Metrics.update` carries what has been added since the last time over to prometheus-client's objects, when somebody asks
and, with several workers, once a second. So with `PROMETHEUS_MULTIPROC_DIR` any worker answers for all of them, no more
than a second late for the others.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Iterable, Mapping
from typing import Any, get_args

import trio
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from sse_trio.access import Access
from sse_trio.broadcaster import Broadcaster, Latency
from sse_trio.discovery import Reason
from sse_trio.limits import Limit
from sse_trio.nats_feed import FeedCounters, NatsFeed
from sse_trio.sse import GapReason, GoodbyeReason

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

ENDS = (*get_args(GoodbyeReason), "left", "broken", "stalled", "spoke early", "error")
"""Why a stream ends: with a goodbye, or without one."""

INTERVAL = 1.0
"""Seconds between two updates while other workers may be asked about us."""


class Metrics:
    """The metrics of one process."""

    def __init__(self, broadcaster: Broadcaster, feed: NatsFeed, access: Access, instance: str) -> None:
        self._broadcaster = broadcaster
        self._feed = feed
        self._access = access
        self._shared = "PROMETHEUS_MULTIPROC_DIR" in os.environ
        self._registry = CollectorRegistry()
        self._seen: dict[tuple[str, ...], float] = {}
        speaks_for = Gauge(
            "sse_trio_instance",
            "1 for each process that these metrics speak for.",
            ["instance"],
            registry=self._registry,
            multiprocess_mode="livemax",
        )
        speaks_for.labels(instance).set(1)
        self._clients = self._gauge("sse_trio_clients", "Streams that are open.")
        self._catching_up = self._gauge("sse_trio_catching_up", "Streams that read history, off the live path.")
        self._high_water = self._gauge(
            "sse_trio_queue_high_water", "The most frames that a stream has had queued.", "livemax"
        )
        self._feed_live = self._gauge("sse_trio_feed_live", "1 while the feed is live.", "livemin")
        self._history = self._gauge("sse_trio_history_events", "Events held in memory.", "livemax")
        self._connects = self._counter("sse_trio_connects", "Streams that were opened.")
        self._disconnects = self._counter("sse_trio_disconnects", "Streams that ended, by reason.", "reason", ENDS)
        self._refused = self._counter(
            "sse_trio_refused", "Streams that were refused, by the limit reached.", "limit", get_args(Limit)
        )
        self._events_in = self._counter(
            "sse_trio_events_in",
            "Messages from NATS, by outcome: published, or why not.",
            "outcome",
            ("published", *get_args(Reason), "lost"),
        )
        self._offered = self._counter(
            "sse_trio_events_offered",
            "Events that passed a stream, counted for each: out + dropped + filtered + waiting + undelivered.",
        )
        self._events_out = self._counter("sse_trio_events_out", "Events written to streams.")
        self._bytes_out = self._counter("sse_trio_bytes_out", "Bytes of frames written to streams.")
        self._dropped = self._counter(
            "sse_trio_events_dropped", "Events that a stream was too slow for, and was told of."
        )
        self._filtered = self._counter("sse_trio_events_filtered", "Events that a stream's filter kept out.")
        self._waiting = self._gauge("sse_trio_events_waiting", "Events that wait for a stream.")
        self._undelivered = self._counter(
            "sse_trio_events_undelivered", "Events that still waited for a stream when it ended."
        )
        self._gaps = self._counter(
            "sse_trio_gaps", "Gaps that streams were told of, by reason.", "reason", get_args(GapReason)
        )
        self._resumes = self._counter(
            "sse_trio_resumes",
            "Cursors that streams came with, by where they resume.",
            "source",
            ("memory", "stream", "none"),
        )
        self._attempts = self._counter("sse_trio_feed_attempts", "Connections to NATS that were tried.")
        self._reconnects = self._counter("sse_trio_feed_reconnects", "Times that the feed came back.")
        self._restarts = self._counter("sse_trio_consumer_restarts", "Times that the consumer was created anew.")
        self._reads = self._counter("sse_trio_stream_reads", "Requests that read older events from the stream.")
        self._latency = Histogram(
            "sse_trio_delivery_seconds",
            "From NATS to the socket, for each event delivered.",
            buckets=Latency.BOUNDS,
            registry=self._registry,
        )

    def _gauge(self, name: str, text: str, mode: str = "livesum") -> Gauge:
        return Gauge(name, text, registry=self._registry, multiprocess_mode=mode)  # type: ignore[arg-type]

    def _counter(self, name: str, text: str, label: str | None = None, values: Iterable[str] = ()) -> Counter:
        """One that begins at 0 for each value of its label: Prometheus sees no increase in what was not there."""
        counter = Counter(name, text, [label] if label else [], registry=self._registry)
        for value in values:
            counter.labels(value)
        return counter

    async def run(self) -> None:
        """Keep what other workers tell about us fresh, for ever; returns at once for a single process."""
        if not self._shared:
            return
        try:
            while True:
                self.update()
                await trio.sleep(INTERVAL)
        finally:
            self.update()
            mark_process_dead(os.getpid())  # type: ignore[no-untyped-call]

    def render(self) -> bytes:
        """The metrics in Prometheus' text format: this process's, or all workers'."""
        self.update()
        registry = self._registry
        if self._shared:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)

    def update(self) -> None:
        """Carry over what was counted since the last time."""
        broadcaster, feed = self._broadcaster, self._feed
        here = list(broadcaster.clients.values())
        past = broadcaster.past
        self._clients.set(len(here))
        self._catching_up.set(sum(not client.live for client in here))
        self._high_water.set(max([past["high_water"], *(client.high_water for client in here)]))
        self._feed_live.set(feed.status.live)
        self._history.set(len(broadcaster.history))
        self._add(self._connects, broadcaster.connects)
        self._add_each(self._disconnects, broadcaster.disconnects)
        self._add_each(self._refused, self._access.statistics().refused)
        self._add_each(self._events_in, self._outcomes(feed.counters))
        books = broadcaster.books()
        self._add(self._offered, books.offered)
        self._add(self._events_out, books.out)
        self._add(self._dropped, books.dropped)
        self._add(self._filtered, books.filtered)
        self._waiting.set(books.waiting)
        self._add(self._undelivered, books.undelivered)
        self._add(self._bytes_out, past["bytes"] + sum(client.bytes for client in here))
        overflows = past["overflows"] + sum(client.overflows for client in here)
        self._add_each(self._gaps, broadcaster.gaps + collections.Counter(overflow=overflows))
        self._add_each(self._resumes, broadcaster.resumes)
        self._add(self._attempts, feed.counters.attempts)
        self._add(self._reconnects, feed.counters.reconnects)
        self._add(self._restarts, feed.counters.consumer_restarts)
        self._add(self._reads, feed.counters.stream_reads)
        latency = broadcaster.latency
        for index, count in enumerate(latency.counts):
            # A histogram takes one observation at a time, and we have a million a second.
            self._latency._buckets[index].inc(self._new(("latency", str(index)), count))
        self._latency._sum.inc(self._new(("latency",), latency.sum))

    @staticmethod
    def _outcomes(counters: FeedCounters) -> dict[str, int]:
        return {"published": counters.decoded, **counters.invalid, "lost": counters.lost}

    def _new(self, key: tuple[str, ...], total: float) -> float:
        """What has been added to a total since it was last asked for."""
        added = total - self._seen.get(key, 0)
        self._seen[key] = total
        return added

    def _add(self, counter: Counter, total: float) -> None:
        counter.inc(self._new((counter._name,), total))

    def _add_each(self, counter: Counter, totals: Mapping[Any, int]) -> None:
        for label, total in totals.items():
            counter.labels(label).inc(self._new((counter._name, label), total))
