"""The clients of the soak: thousands that come and go in every way, and check each byte that they hear.

Strategy: what is published is known, so each filter has one body of frames that every client with it must hear, and a
client is a place in that body. What it reads is compared with what stands there, as bytes: one comparison for a read,
however many events it brings. Only what differs is looked at closely: `connected` and `cursor` must name a place where
nothing was skipped, and everything else is a fault. One loop serves all sockets ten times a second.
"""

from __future__ import annotations

import errno
import heapq
import json
import random
import select
import struct
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from socket import SHUT_WR, SO_ERROR, SO_LINGER, SO_RCVBUF, SOL_SOCKET, socket

import trio
from support import Dechunker

from sse_trio.sse import KEEP_ALIVE, Decoder

TICK = 0.1
"""Seconds between two looks at all sockets."""

ARRIVALS = 100
"""Clients that connect in one second, at most: what Hypercorn's backlog holds."""

PATIENCE = 30.0
"""Seconds that `connected` may take, and the end of a stream whose client has half-closed it."""

LATE = 60.0
"""Seconds after which a client that reads must have what was published, on whatever busy machine."""

TRIES = 5
"""How often in a row a client may be turned away before it is answered: a server that others keep from the processor
for longer than Hypercorn waits for a request closes the connection."""

SAID, HOPELESS = 20, 500
"""Faults that are printed at once, and faults that end the run."""

ROLES = ("Scout", "Analyst", "Security", "Builder")
TYPES = ("Pattern", "Anomaly", "Connection", "Solution", "Question", "Insight")

LEAVING = {"close": 8, "reset": 5, "half-close": 3, "idle": 4}
"""How clients leave, and how often. Who is idle reads nothing for a while; then it is gone, or reads on for a little."""


@dataclass(frozen=True)
class Shared:
    """The discovery with a number, and what the contract makes of it."""

    number: int

    @property
    def type(self) -> str:
        return TYPES[self.number % len(TYPES)]

    @property
    def role(self) -> str:
        return ROLES[self.number % len(ROLES)]

    @property
    def agent(self) -> str:
        return f"agent-{self.number % 10}"

    @property
    def confidence(self) -> float:
        return self.number % 8 / 8

    @property
    def subject(self) -> str:
        return "discoveries.questions" if self.type == "Question" else "discoveries.insights"

    @property
    def payload(self) -> str:
        return (
            f'{{"agent_id":"{self.agent}","agent_role":"{self.role}","discovery_type":"{self.type}",'
            f'"content":"number {self.number}","confidence":{self.confidence},'
            '"timestamp":"2009-02-13T23:31:30Z","related_to":null}'
        )

    def frame(self, epoch: str, *, full: bool) -> bytes:
        more = f',"_meta":{{"discovery":{self.payload}}}' if full else ""
        return (
            'event: discovery\ndata: {"jsonrpc":"2.0","method":"notifications/resources/updated","params":{"uri":'
            f'"discovery://agents/{self.agent}/discoveries/1234567890-{self.type}-number-{self.number}"{more}}}}}\n'
            f"id: {epoch}-{self.number}\n\n"
        ).encode()


class Hearing:
    """What clients with one filter must hear, from the first event to the last one published."""

    def __init__(self, share: int, query: str, lets_through: Callable[[Shared], bool]) -> None:
        self.share = share
        """Of a hundred clients."""
        self.query = query
        self.lets_through = lets_through
        self.full = "detail=full" in query
        self.body = bytearray()
        self.ends = array("Q", [0])
        """By number: where the body stands when the event was published."""
        self.counts = array("Q", [0])
        """By number: how many events the body had then."""

    def publish(self, shared: Shared, epoch: str) -> None:
        heard = self.lets_through(shared)
        if heard:
            self.body += shared.frame(epoch, full=self.full)
        self.ends.append(len(self.body))
        self.counts.append(self.counts[-1] + heard)

    def number_at(self, place: int) -> int:
        """The number of the last event before a place."""
        return bisect_left(self.ends, place)


def hearings() -> list[Hearing]:
    return [
        Hearing(70, "", lambda _: True),
        Hearing(8, "&detail=full", lambda _: True),
        Hearing(4, "&type=Question&type=Insight", lambda shared: shared.type in {"Question", "Insight"}),
        Hearing(
            6,
            "&role=Scout&role=Analyst&min_confidence=0.5",
            lambda shared: shared.role in {"Scout", "Analyst"} and shared.confidence >= 0.5,
        ),
        Hearing(4, "&agent=agent-3&agent=agent-7", lambda shared: shared.agent in {"agent-3", "agent-7"}),
        Hearing(4, "&subject=discoveries.q*&subject=*.questions&detail=full", lambda shared: shared.type == "Question"),
        Hearing(4, "&agent=nobody", lambda _: False),
    ]


class Fault(Exception):
    """A client heard what it should not have, or not what it should."""


@dataclass(eq=False)
class Client:
    """One client, from its first connection over all its resumes."""

    number: int
    hearing: Hearing
    place: int = 0
    """How much of the body it has heard, in bytes."""
    begun: int = 0
    """The number after which it hears everything."""
    cursor: int | None = None
    """What it comes back with; None for one that is new."""
    connection: int = 0
    """Which of all connections is its own now."""
    socket: socket | None = None
    state: str = "away"
    """away, connecting, waiting (for `connected`), listening, idle, half-closed"""
    since: float = 0.0
    """When it came into this state."""
    leaves: str = "close"
    has_idled: bool = False
    turned_away: int = 0
    head: bytes | None = b""
    dechunker: Dechunker = field(default_factory=Dechunker)


class Crowd:
    """All of them: `run` serves them until cancelled."""

    def __init__(self, port: int, epoch: str, size: int, life: float, draw: random.Random) -> None:
        """`size` clients are connected at any time; each stays `life` seconds in the mean."""
        self.port = port
        self.epoch = epoch
        self.size = size
        self.life = life
        self.draw = draw
        self.published = 0
        self.hearings = hearings()
        self.here: dict[int, Client] = {}
        """By the number of the file."""
        self.timers: list[tuple[float, int, str, Client]] = []
        self.away: list[tuple[float, int, Client]] = []
        self.finishing = False
        """Nobody new comes, nobody is away or idle: all hear what they have not heard yet."""
        self.dismissed = False
        self.events: Counter[str] = Counter()
        self.delivered = 0
        """Events that clients who are gone for good have heard."""
        self.faults: list[str] = []
        self.epoll = select.epoll()
        self._made = self._connections = 0
        self._allowance = 0.0

    # -- what is published -------------------------------------------------------------------------------------------

    def publish(self) -> Shared:
        """The next discovery; from now on it is expected."""
        self.published += 1
        shared = Shared(self.published)
        for hearing in self.hearings:
            hearing.publish(shared, self.epoch)
        return shared

    # -- the loop ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve the clients until cancelled; their sockets are closed then."""
        try:
            while True:
                now = trio.current_time()
                self._let_go(now)
                self._let_in(now)
                for index, (fd, _) in enumerate(self.epoll.poll(0, 2 * self.size + 100)):
                    if (client := self.here.get(fd)) is not None:
                        self._attend(client, now)
                    if index % 50 == 49:
                        await trio.lowlevel.checkpoint()
                await trio.sleep_until(now + TICK)
        finally:
            for client in list(self.here.values()):
                self._close(client)
            self.epoll.close()

    def finish(self) -> None:
        """Have all hear the rest, those who are away included."""
        self.finishing = True
        for client in list(self.here.values()):
            if client.state == "idle":
                self._read_on(client)

    @property
    def unfinished(self) -> int:
        """Clients that have not heard everything yet."""
        return len(self.away) + sum(
            client.state != "listening" or client.place < len(client.hearing.body) for client in self.here.values()
        )

    def dismiss(self) -> None:
        """Have everybody leave for good."""
        self.dismissed = True
        for client in list(self.here.values()):
            self._leave(client)

    def count_late(self, published_then: int) -> int:
        """Note who has been reading for long and has not got what was published `LATE` seconds ago; how many."""
        now = trio.current_time()
        late = [
            client
            for client in self.here.values()
            if client.state == "listening"
            and now - client.since > 2 * LATE
            and client.place < client.hearing.ends[published_then]
        ]
        for client in late:
            self._fault(client, f"has not got {published_then} after {LATE:g} s")
        return len(late)

    def _attend(self, client: Client, now: float) -> None:
        try:
            if client.state == "connecting":
                self._request(client, now)
            else:
                self._read(client)
        except Fault as fault:
            self._fault(client, str(fault))

    def _fault(self, client: Client, text: str) -> None:
        heard = client.hearing.number_at(client.place)
        where = f"client {client.number} ({client.hearing.query or 'everything'}), {client.state}, at {heard}"
        self.faults.append(f"{where}: {text}")
        if len(self.faults) <= SAID:
            print(f"WRONG: {self.faults[-1]}", flush=True)
        assert len(self.faults) < HOPELESS, "too much is wrong to go on"
        self._account(client)
        self._close(client)

    # -- coming ------------------------------------------------------------------------------------------------------

    def _let_in(self, now: float) -> None:
        self._allowance = min(self._allowance + ARRIVALS * TICK, ARRIVALS * TICK * 2)
        while self._allowance >= 1:
            if self.away and (self.finishing or (self.away[0][0] <= now and len(self.here) < self.size)):
                _, _, client = heapq.heappop(self.away)
            elif len(self.here) < self.size and not self.finishing:
                self._made += 1
                hearing = self.draw.choices(self.hearings, [hearing.share for hearing in self.hearings])[0]
                client = Client(self._made, hearing)
            else:
                return
            self._allowance -= 1
            self._connect(client, now)

    def _connect(self, client: Client, now: float) -> None:
        client.leaves = self.draw.choices(list(LEAVING), list(LEAVING.values()))[0]
        self._connections += 1
        client.connection, client.has_idled = self._connections, False
        client.head, client.dechunker = b"", Dechunker()
        client.state, client.since = "connecting", now
        client.socket = sock = socket()
        sock.setblocking(False)
        if client.leaves == "idle":
            sock.setsockopt(SOL_SOCKET, SO_RCVBUF, 65536)  # or the kernel would read for it for long
        error = sock.connect_ex(("127.0.0.1", self.port))
        self.here[sock.fileno()] = client
        self.epoll.register(sock.fileno(), select.EPOLLOUT)
        self._remind(now + PATIENCE, "connected", client)
        if error not in {0, errno.EINPROGRESS}:
            self._fault(client, f"cannot connect: {errno.errorcode[error]}")

    def _request(self, client: Client, now: float) -> None:
        sock = client.socket
        assert sock is not None
        if error := sock.getsockopt(SOL_SOCKET, SO_ERROR):
            raise Fault(f"cannot connect: {errno.errorcode[error]}")
        target, header = f"/discoveries/stream?agent_id=soak-{client.number}{client.hearing.query}", ""
        if client.cursor is not None:
            if self.draw.random() < 0.7:
                header = f"Last-Event-ID: {self.epoch}-{client.cursor}\r\n"
            else:
                target += f"&last_event_id={self.epoch}-{client.cursor}"
        sock.send(f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n{header}\r\n".encode())
        client.state, client.since = "waiting", now
        self.epoll.modify(sock.fileno(), select.EPOLLIN)

    def _connected(self, client: Client, data: str, id: str) -> None:
        resumed = json.loads(data).get("resumed")
        client.turned_away = 0
        number = self._number(id)
        if client.cursor is None:
            client.begun = client.cursor = number
            client.place = client.hearing.ends[number]
            self.events["new"] += 1
        elif resumed is not True or number != client.cursor:
            raise Fault(f"came back with {client.cursor} and is told {data} {id}")
        else:
            self.events["resumed"] += 1
        client.state, client.since = "listening", trio.current_time()
        self._remind(client.since + self.draw.expovariate(1 / self.life), "leave", client)

    # -- listening ---------------------------------------------------------------------------------------------------

    def _read(self, client: Client) -> None:
        assert client.socket is not None
        try:
            data = client.socket.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError as error:
            self._ended(client, errno.errorcode[error.errno or 0])
            return
        if not data:
            self._ended(client, "the end")
            return
        if client.head is not None:
            client.head += data
            head, blank, data = client.head.partition(b"\r\n\r\n")
            if not blank:
                return
            if not head.startswith(b"HTTP/1.1 200 ") or b"transfer-encoding: chunked" not in head.lower():
                raise Fault(f"is answered {head[:200]!r}")
            client.head = None
        body = client.dechunker.feed(data)
        client.dechunker.chunks.clear()
        if client.state != "waiting" and client.hearing.body.startswith(body, client.place):
            client.place += len(body)
        else:
            self._look_closely(client, body)
        if client.dechunker.ended:
            self._ended(client, "the last chunk")

    def _look_closely(self, client: Client, body: bytes) -> None:
        while body:
            if body.startswith(KEEP_ALIVE):
                body = body[len(KEEP_ALIVE) :]
                self.events["keep-alive"] += 1
                continue
            end = body.find(b"\n\n") + 2
            frame, body = body[:end], body[end:]
            if end == 1:
                raise Fault(f"hears half a frame: {body[:200]!r}")
            if client.state in {"listening", "half-closed"} and client.hearing.body.startswith(frame, client.place):
                client.place += len(frame)
                continue
            events = Decoder().feed(frame)
            if not events:
                raise Fault(f"hears {frame!r}")
            (told,) = events
            if told.event == "connected" and client.state == "waiting":
                self._connected(client, told.data, told.id)
            elif told.event == "cursor" and client.state in {"listening", "half-closed"}:
                number = self._number(told.id)
                if client.hearing.ends[number] != client.place:
                    raise Fault(f"is told a cursor that skips something: {told.id}")
                client.cursor = number
                self.events["cursor"] += 1
            else:
                raise Fault(f"hears {frame!r}")

    def _number(self, id: str) -> int:
        epoch, _, number = id.rpartition("-")
        if epoch != self.epoch or not number.isdigit() or int(number) > self.published:
            raise Fault(f"is told the id {id!r}")
        return int(number)

    def _ended(self, client: Client, how: str) -> None:
        """The server has ended it: as asked, or because it did not read."""
        if client.state == "half-closed" and how in {"the end", "the last chunk"}:
            self._gone(client, "half-close")
        elif client.has_idled and how == "ECONNRESET":
            self._gone(client, "evicted", comes_back=True)
        elif client.head == b"" and client.turned_away < TRIES:
            client.turned_away += 1
            self._gone(client, "turned away", comes_back=True)
        else:
            raise Fault(f"is cut off: {how}")

    # -- leaving -----------------------------------------------------------------------------------------------------

    def _remind(self, at: float, what: str, client: Client) -> None:
        heapq.heappush(self.timers, (at, client.connection, what, client))

    def _let_go(self, now: float) -> None:
        while self.timers and self.timers[0][0] <= now:
            _, connection, what, client = heapq.heappop(self.timers)
            if client.socket is None or client.connection != connection:
                continue  # of a connection that is gone
            if what == "connected" and client.state in {"connecting", "waiting"}:
                self._fault(client, f"is not connected after {PATIENCE:g} s")
            elif what == "ended" and client.state == "half-closed":
                self._fault(client, f"is not ended after {PATIENCE:g} s")
            elif what == "leave" and client.state == "listening" and not self.finishing:
                self._leave(client)
            elif what == "awake" and client.state == "idle":
                if self.draw.random() < 0.5:
                    self._gone(client, "idle")
                else:
                    self._read_on(client)

    def _leave(self, client: Client) -> None:
        assert client.socket is not None
        now = trio.current_time()
        if client.leaves == "half-close":
            client.socket.shutdown(SHUT_WR)
            client.state, client.since = "half-closed", now
            self._remind(now + PATIENCE, "ended", client)
        elif client.leaves == "idle" and not self.dismissed:
            self.epoll.unregister(client.socket.fileno())
            client.state, client.since = "idle", now
            self._remind(now + self.draw.uniform(0.1, 0.5) * self.life, "awake", client)
        else:
            if client.leaves == "reset":
                client.socket.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
            self._gone(client, client.leaves)

    def _read_on(self, client: Client) -> None:
        assert client.socket is not None
        self.epoll.register(client.socket.fileno(), select.EPOLLIN)
        client.state, client.since = "listening", trio.current_time()
        client.leaves, client.has_idled = "close", True
        self._remind(client.since + 0.2 * self.life, "leave", client)

    def _gone(self, client: Client, how: str, *, comes_back: bool | None = None) -> None:
        self.events[how] += 1
        self._close(client)
        if comes_back is None:
            comes_back = not self.dismissed and self.draw.random() < 0.5
        if not comes_back:
            self._account(client)
            return
        if client.cursor is not None:
            client.cursor = max(client.cursor, client.hearing.number_at(client.place))
        # Most are back while memory holds what they missed, some when only the stream does.
        away = self.draw.choice([0.02, 0.1, 1.5]) * self.draw.expovariate(1 / self.life)
        heapq.heappush(self.away, (trio.current_time() + min(away, 4 * self.life), client.connection, client))

    def _account(self, client: Client) -> None:
        counts = client.hearing.counts
        heard = max(client.begun, client.hearing.number_at(client.place))
        self.delivered += counts[heard] - counts[client.begun]

    def _close(self, client: Client) -> None:
        assert client.socket is not None
        del self.here[client.socket.fileno()]
        client.socket.close()  # and epoll has forgotten it
        client.socket, client.state = None, "away"
