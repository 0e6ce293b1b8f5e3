"""The soak: clients come and go for half an hour, and the server is at the end what it was at the beginning.

    make soak                                                        30 minutes, 2,000 clients, 200 discoveries a second
    make soak SOAK='--minutes 1 --clients 500 --rate 100 --seed 7'

One server, as users start it, and one nats-server with JetStream. Clients with filters and without connect, leave in
every way, idle, and come back with their cursor (see soak_crowd.py); each byte that they hear is compared with what was
published. Meanwhile the server process is looked at: memory, files, tasks, threads. Before the time begins to count,
everybody is connected, the history in memory is full, the pages of the stream that are kept (sse_trio/backlog.py) are as
many as they become, and as many streams have ended as end between two collections of garbage (sse_trio/collector.py):
from then on nothing has a reason to grow.

Flat means: the median of the last fifth of the samples is not above that of the second fifth by more than 2 % and 1 MB
(memory), 1 % and 5 (files, tasks), nothing (threads); and when all have left, files and tasks are as many as before the
first one came. The exit code is 0 when that holds, every event is accounted for, the server's own figures say the same,
and its log has no error.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import trio

sys.path.insert(0, str(Path(__file__).parent))

from soak_crowd import ARRIVALS, LATE, TICK, Crowd
from support import WITHIN, eventually, nats_server, run_server, unless_terminated
from teardown.house import COUNTING, House, count_descriptors

from sse_trio.collector import DEPARTURES
from sse_trio.nats_connection import Inbox, NatsConnection, open_connection

HISTORY = 10_000
"""Events that the server keeps in memory: its default."""

SAMPLES = 360
"""How often the server is looked at, at most every `QUICKEST` seconds."""

QUICKEST = 0.25

LINES = 60
"""Lines of the table that is printed."""


@dataclass(frozen=True)
class Sample:
    """The server process at one moment."""

    seconds: float
    rss: float
    """MB"""
    files: int
    tasks: int
    threads: int
    cpu: float
    """Seconds of processor time that it has used."""
    clients: int
    published: int
    sent: int


FLAT: dict[str, tuple[float, float]] = {"rss": (0.02, 1.0), "files": (0.01, 5), "tasks": (0.01, 5), "threads": (0, 0)}
"""What may be added between the second fifth and the last one: a share, and so much besides."""


def verdicts(samples: Sequence[Sample]) -> list[tuple[str, float, float, bool]]:
    """For each figure that must be flat: its medians in the second fifth and in the last one, and whether it is."""
    fifth = len(samples) // 5
    assert fifth > 0, "too few samples to say anything"
    found = []
    for name, (share, besides) in FLAT.items():
        values = [getattr(sample, name) for sample in samples]
        early, late = median(values[fifth : 2 * fifth]), median(values[-fifth:])
        found.append((name, early, late, late <= early * (1 + share) + besides))
    return found


class World:
    """The parts of one run."""

    def __init__(self, house: House, connection: NatsConnection, crowd: Crowd, rate: float) -> None:
        self.house = house
        self.connection = connection
        self.crowd = crowd
        self.rate = rate
        self.acknowledged = 0
        self.stop_publishing = False
        self.samples: list[Sample] = []
        self.faults: list[str] = []
        self.began = self.said = time.monotonic()

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:7.1f} s  {text}", flush=True)

    # -- publishing --------------------------------------------------------------------------------------------------

    async def publish(self, inbox: Inbox) -> None:
        """Share discoveries at a steady rate until told to stop; what falls behind is made up for."""
        began, first = trio.current_time(), self.crowd.published
        while not self.stop_publishing:
            due = first + int((trio.current_time() - began) * self.rate)
            while self.crowd.published < due:
                shared = self.crowd.publish()
                self.connection.publish_nowait(shared.subject, shared.payload.encode(), reply=inbox.subject)
            await trio.sleep(max(1 / self.rate, 0.002))

    async def count_acknowledgements(self, inbox: Inbox) -> None:
        """The stream takes each discovery once, and gives it its own number as sequence."""
        while True:
            for message in await inbox.take():
                answer = json.loads(message.payload)
                self.acknowledged += 1
                assert answer.get("seq") == self.acknowledged, answer
                assert not answer.get("duplicate"), answer

    # -- looking -----------------------------------------------------------------------------------------------------

    async def metrics(self) -> Mapping[str, float]:
        """The server's metrics, those with a label summed up."""
        status, body = await self.house.server.get("/metrics")
        assert status == 200, body
        found: defaultdict[str, float] = defaultdict(float)
        for line in body.decode().splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                bare = name.partition("{")[0]
                found[bare] += float(value)
        return found

    async def sample(self, pid: int) -> Sample:
        metrics, tasks = await self.metrics(), await self.house.tasks()
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return Sample(
            seconds=time.monotonic() - self.began,
            rss=int(status["VmRSS"].split()[0]) / 1000,
            files=count_descriptors(pid),
            tasks=tasks,
            threads=int(status["Threads"]),
            cpu=(int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK"),
            clients=int(metrics["sse_trio_clients"]),
            published=self.crowd.published,
            sent=int(metrics["sse_trio_events_out_total"]),
        )

    async def watch(self, pid: int, seconds: float) -> None:
        """Sample for so long; say some of it."""
        interval = max(seconds / SAMPLES, QUICKEST)
        count = round(seconds / interval)
        every = max(1, count // LINES)
        head = ["rss MB", "files", "tasks", "threads", "cpu %", "clients", "events", "delivered/s", "faults"]
        self.say("".join(f"{name:>12}" for name in head))
        began = trio.current_time()
        last = await self.sample(pid)
        for index in range(1, count + 1):
            await trio.sleep_until(began + index * interval)
            self.samples.append(now := await self.sample(pid))
            long_ago = [sample.published for sample in self.samples if sample.seconds < now.seconds - LATE]
            if long_ago:
                self.crowd.count_late(long_ago[-1])
            if index % every == 0:
                passed = now.seconds - last.seconds
                cpu, sent = (now.cpu - last.cpu) / passed * 100, (now.sent - last.sent) / passed
                cells = [f"{now.rss:.1f}", now.files, now.tasks, now.threads, f"{cpu:.0f}", now.clients, now.published]
                cells += [f"{sent:,.0f}", len(self.crowd.faults)]
                self.say("".join(f"{cell:>12}" for cell in cells))
                last = now

    def check(self, fault: bool, text: str) -> None:
        """Note a fault."""
        if fault:
            self.faults.append(text)
            self.say(f"WRONG: {text}")

    # -- the whole of it ---------------------------------------------------------------------------------------------

    async def run(self, seconds: float, history: int, warm: int) -> None:
        pid = await self.house.worker()
        crowd = self.crowd
        files = await self.house.settled()
        tasks = await self.house.tasks()
        inbox = await self.connection.subscribe(self.connection.new_inbox())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.count_acknowledgements, inbox)
            nursery.start_soon(crowd.run)
            async with trio.open_nursery() as publishing:
                publishing.start_soon(self.publish, inbox)
                self.say(f"{crowd.size} clients arrive, {warm} streams end, {history} events fill the memory")
                within = WITHIN + 3 * (crowd.size / ARRIVALS + warm * crowd.life / crowd.size + history / self.rate)
                await eventually(lambda: self._is_warm(history, warm), "it is warm", within)
                await self._page_back()
                await self.watch(pid, seconds)
                self.stop_publishing = True
            self.say("no more is published; all hear the rest")
            await eventually(lambda: self.acknowledged == crowd.published, "the stream has it all")
            crowd.finish()
            await self._until(lambda: crowd.unfinished == 0, "all have heard the rest", 180)
            self.say("all have heard all; all leave")
            crowd.dismiss()
            await self._until(lambda: not crowd.here, "all have left", 60)
            nursery.cancel_scope.cancel()
        await self._check_end(pid, files, tasks)

    async def _page_back(self) -> None:
        """Read all that was published, newest first: the server keeps pages of the stream, from now on as many as ever."""
        path, read = "/discoveries?limit=500", 0
        while path:
            status, answer = await self.house.server.get(path)
            assert status == 200, answer
            read += len(answer["discoveries"])
            path = f"/discoveries?limit=500&before={answer['next']}" if answer["next"] else ""
        self.say(f"{read:,} events were read back, to the first")

    async def _is_warm(self, history: int, warm: int) -> bool:
        await trio.sleep(TICK)
        metrics = await self.metrics()
        arrived = metrics["sse_trio_connects_total"] >= self.crowd.size
        ended = metrics["sse_trio_disconnects_total"] >= warm
        if time.monotonic() > self.said + 20:
            self.said = time.monotonic()
            here, gone = metrics["sse_trio_clients"], metrics["sse_trio_disconnects_total"]
            self.say(f"{here:,.0f} clients are here, {gone:,.0f} streams have ended")
        return arrived and ended and metrics["sse_trio_history_events"] >= history

    async def _until(self, condition: Callable[[], object], what: str, within: float) -> None:
        """As `eventually`, and what is not reached is one fault among others."""
        try:
            await eventually(condition, what, within)
        except AssertionError as error:
            self.check(True, str(error))

    async def _check_end(self, pid: int, files: int, tasks: int) -> None:
        crowd, house = self.crowd, self.house

        async def tasks_are_gone() -> bool:
            return await house.tasks() <= tasks

        await self._until(lambda: count_descriptors(pid) <= files, "files are as few as before", 2 * WITHIN)
        await self._until(tasks_are_gone, "tasks are as few as before", 2 * WITHIN)
        after = await self.metrics()
        self.check(bool(crowd.faults), f"{len(crowd.faults)} clients heard what they should not have, or too little")
        came = crowd.events["new"] + crowd.events["resumed"]
        for name, wrong in {
            "events in": after["sse_trio_events_in_total"] != crowd.published,
            "events out": after["sse_trio_events_out_total"] < crowd.delivered,
            "events dropped": after["sse_trio_events_dropped_total"] != 0,
            "gaps": after["sse_trio_gaps_total"] != 0,
            "connects": after["sse_trio_connects_total"] != came,
            "disconnects": after["sse_trio_disconnects_total"] != came,
            "resumes": after["sse_trio_resumes_total"] != crowd.events["resumed"],
            "clients": after["sse_trio_clients"] != 0,
        }.items():
            self.check(wrong, f"the server's own figure of {name} is another")
        left = f"{await house.settled()} files, {await house.tasks()} tasks"
        self.say(f"after all have left: {left}; before the first came: {files} and {tasks}")
        self._check_log()
        for name, early, late, flat in verdicts(self.samples):
            self.say(f"{name:8} {early:10,.1f} in the second fifth, {late:10,.1f} in the last")
            self.check(not flat, f"{name} is not flat")

    def _check_log(self) -> None:
        warnings: Counter[str] = Counter()
        for line in self.house.server.output.splitlines():
            said = json.loads(line) if line.startswith("{") else {}
            warnings[said.get("event", "")] += said.get("level") == "warning"
            self.check("Traceback" in line or said.get("level") in {"error", "critical"}, f"the log says {line[:300]}")
        self.say(f"warnings in the log: {dict(+warnings)}")

    def summary(self) -> str:
        crowd, first, last = self.crowd, self.samples[0], self.samples[-1]
        passed = last.seconds - first.seconds
        comings = crowd.events["new"] + crowd.events["resumed"]
        return (
            f"{passed:,.0f} s: {crowd.published:,} published, {crowd.delivered:,} delivered and compared "
            f"({(last.sent - first.sent) / passed:,.0f}/s), {comings:,} connections "
            f"({crowd.events['resumed']:,} with a cursor), {dict(crowd.events)}; "
            f"{len(self.faults)} faults; server {(last.cpu - first.cpu) / passed:.0%} of a processor"
        )


async def soak(seconds: float, seed: int, clients: int, rate: float, *, life: float, history: int, warm: int) -> bool:
    """One run; whether everything was as it must be. Clients stay `life` seconds in the mean.

    The time begins to count when `warm` streams have ended, and `history` events are in memory.
    """
    directory = Path(tempfile.mkdtemp(prefix="sse-trio-soak-"))
    print(f"seed {seed}, {seconds:g} s, {clients} clients, {rate:g} discoveries a second", flush=True)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit[1], limit[1]))
    (directory / "sitecustomize.py").write_text(COUNTING)
    path = os.pathsep.join(filter(None, [str(directory), os.getcwd(), os.environ.get("PYTHONPATH", "")]))
    env = {"PYTHONPATH": path, "LOG_FORMAT": "json", "SSE_HISTORY": str(history)}
    good = False
    try:
        async with AsyncExitStack() as stack:
            nats = await stack.enter_async_context(nats_server(directory / "nats"))
            server = await stack.enter_async_context(run_server(directory, nats_url=nats.url, env=env))
            await eventually(server.is_live, "the feed is live", WITHIN)
            connection = await stack.enter_async_context(open_connection(nats.url, name="soak"))
            _, health = await server.health()
            crowd = Crowd(server.port, health["epoch"], clients, life, random.Random(seed))
            world = World(House("hypercorn", nats, server), connection, crowd, rate)
            await world.run(seconds, history, warm)
            server.process.terminate()
            code = await server.exited()
            world.check(code != 0, f"the server ended with {code}")
            print(world.summary(), flush=True)
            good = not world.faults
    finally:
        if good:
            shutil.rmtree(directory, ignore_errors=True)
        else:
            print(f"logs are in {directory}")
    print("everything is accounted for, and the server is as it was" if good else "it is NOT as it must be", flush=True)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=200.0, help="discoveries a second")
    parser.add_argument("--life", type=float, default=50.0, help="seconds that a connection lasts, in the mean")
    parser.add_argument("--history", type=int, default=HISTORY, help="SSE_HISTORY")
    parser.add_argument("--warm", type=int, default=DEPARTURES, help="streams that have ended before the time counts")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31))
    options = parser.parse_args()
    run = partial(
        soak,
        options.minutes * 60,
        options.seed,
        options.clients,
        options.rate,
        life=options.life,
        history=options.history,
        warm=options.warm,
    )
    return 0 if trio.run(unless_terminated, run) else 1


if __name__ == "__main__":
    sys.exit(main())
