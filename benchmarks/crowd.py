"""`python -m benchmarks.crowd`: clients that come back with their cursor, as many as asked for, in one process.

Strategy: one epoll loop over bare sockets, and hardly any parsing. Whole frames are cut out of what was read, their ids
are compared with the numbers that must follow, and only what differs is looked at closely. A connection that ends is
opened again when its `retry:` says so, with the last id as `Last-Event-ID`. So every client has books of its own: what
was lost, doubled or out of order is known by the event.

Commands come as lines on stdin: `go CURSOR` (connect, where that was held back), `fast` (read what comes, whatever the
pace was), `books` (say them now, and forget the latencies), `live` (say them when every client is live), `until N` (say them
when every client has got to N, and end). Each answer is one line of JSON; the first line comes by itself when all
clients are connected.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import select
import socket
import sys
import time
from dataclasses import dataclass, field
from typing import Any

FRAME = re.compile(rb"event: (\w+)\ndata: ([^\n]*)\n(?:id: ([^\n]*)\n)?\n")
STAMP = re.compile(rb"//agents/bench-(\d+)-(\d+)/")
RETRY = re.compile(rb"retry: (\d+)\n")

FRESH = 0.5
"""A client is live (again) when it reads an event that was published no more seconds ago."""

READ_BYTES = 1 << 18


def number_of(frame: bytes) -> int | None:
    """The number that its publisher gave the discovery that this announces."""
    found = STAMP.search(frame)
    return None if found is None else int(found[1])


@dataclass
class Books:
    """What one client heard."""

    delivered: int = 0
    lost: int = 0
    disordered: int = 0
    """Doubled, or out of order."""
    foreign: int = 0
    """Not the event that has this place in the stream."""
    gaps: int = 0
    cursors: int = 0
    connects: int = 0
    refused: int = 0


@dataclass
class Reader:
    """One client."""

    cursor: str | None
    books: Books = field(default_factory=Books)
    socket: socket.socket | None = None
    buffer: bytes = b""
    connected: bool = False
    last: int = -1
    """The sequence up to which it has everything; -1 until it is known where it begins."""
    retry: float = 1.0
    again_at: float = 0.0
    live_at: float | None = None


class Crowd:
    """All of them."""

    def __init__(self, options: Any) -> None:
        self.options = options
        self.readers = [Reader(options.cursor) for _ in range(options.clients)]
        self.latencies: list[int] = []
        self.paced = options.pace is not None
        self.held = options.hold
        self.asked_live = False
        self.until: int | None = None
        self.by_fd: dict[int, Reader] = {}
        self.epoll = select.epoll()
        self.commands = b""
        self.said_ready = False
        self.began = time.monotonic()
        self.expected: list[bytes] = []
        """The sequences as they stand in ids, by their number."""

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *_: object) -> None:
        self.epoll.close()

    # -- connections -------------------------------------------------------------------------------------------------

    def connect(self, number: int, reader: Reader) -> None:
        reader.socket = sock = socket.socket()
        if self.options.rcvbuf:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.options.rcvbuf)
        # On this machine it is answered at once, by the listener's backlog or by nobody.
        try:
            sock.connect(("127.0.0.1", self.options.port))
            cursor = "" if reader.cursor is None else f"Last-Event-ID: {reader.cursor}\r\n"
            target = f"/discoveries/stream?agent_id=crowd-{number}{self.options.query}"
            head = f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n{cursor}\r\n"
            sock.sendall(head.encode())
        except OSError:
            reader.books.refused += 1
            self.lost(reader)
            return
        sock.setblocking(False)
        reader.books.connects += 1
        self.by_fd[sock.fileno()] = reader
        if not self.paced:
            self.epoll.register(sock.fileno(), select.EPOLLIN)

    def lost(self, reader: Reader) -> None:
        assert reader.socket is not None
        self.by_fd.pop(reader.socket.fileno(), None)
        reader.socket.close()
        reader.socket = None
        reader.buffer = b""
        reader.connected = False
        reader.live_at = None
        reader.again_at = time.monotonic() + reader.retry

    def read(self, reader: Reader, limit: int) -> None:
        assert reader.socket is not None
        try:
            data = reader.socket.recv(limit)
        except OSError as error:
            if error.errno == errno.EAGAIN:
                return
            data = b""
        if data:
            self.heard(reader, data)
        else:
            self.lost(reader)

    # -- what they hear ----------------------------------------------------------------------------------------------

    def heard(self, reader: Reader, data: bytes) -> None:
        data = reader.buffer + data
        end = data.rfind(b"\n\n") + 2
        if end == 1:
            reader.buffer = data
            return
        whole, reader.buffer = data[:end], data[end:]
        if reader.connected and not self.options.filtered and whole.count(b"event: ") == whole.count(b"event: disc"):
            first, *rest = whole.split(b"\nid: ")
            prefix, _, _ = rest[0].partition(b"\n")[0].rpartition(b"-")
            skip = len(prefix) + 1
            ids = [piece[skip : piece.index(b"\n")] for piece in rest]
            begin = reader.last + 1
            while len(self.expected) < begin + len(ids):
                self.expected.append(b"%d" % len(self.expected))
            if ids == self.expected[begin : begin + len(ids)]:
                reader.last += len(ids)
                reader.books.delivered += len(ids)
                reader.cursor = f"{prefix.decode()}-{reader.last}"
                last = rest[-2] if len(ids) > 1 else first
                reader.books.foreign += number_of(last) != reader.last
                self.stamped(reader, whole, last)
                return
        for found in FRAME.finditer(whole):
            self.frame(reader, *found.groups())
        if not reader.connected and (retry := RETRY.search(whole)):
            reader.retry = int(retry[1]) / 1000
        reader.connected = True
        self.stamped(reader, whole, whole)

    def frame(self, reader: Reader, event: bytes, data: bytes, id: bytes | None) -> None:
        books = reader.books
        if id is None:
            return
        sequence = int(id.rpartition(b"-")[2])
        if event == b"discovery":
            books.delivered += 1
            books.foreign += number_of(data) != sequence
            if sequence <= reader.last:
                books.disordered += 1
            elif not self.options.filtered:
                books.lost += sequence - reader.last - 1
        elif event == b"gap":
            books.gaps += 1
        elif event == b"cursor":
            books.cursors += 1
            if not self.options.filtered:
                books.foreign += 1
        elif event == b"connected" and reader.last not in {-1, sequence}:
            books.disordered += 1
        reader.last = max(reader.last, sequence)
        reader.cursor = id.decode()

    def stamped(self, reader: Reader, whole: bytes, last: bytes) -> None:
        """Look at when the events were published: each of them where latencies are asked for, else the last one."""
        now = time.monotonic_ns()
        found = STAMP.findall(whole if self.options.latencies else last)
        if not found:
            return
        stamp = found[-1][1]
        if reader.live_at is None and now - int(stamp) < FRESH * 1e9:
            reader.live_at = now / 1e9
        if self.options.latencies:
            self.latencies += [now - int(stamp) for _, stamp in found]

    # -- what they are asked -----------------------------------------------------------------------------------------

    def command(self, line: bytes) -> None:
        match line.split():
            case [b"go", cursor]:
                self.held = False
                for reader in self.readers:
                    reader.cursor = cursor.decode()
            case [b"fast"]:
                if self.paced:
                    self.paced = False
                    for fd in self.by_fd:
                        self.epoll.register(fd, select.EPOLLIN)
            case [b"live"]:
                self.asked_live = True
            case [b"until", number]:
                self.until = int(number)
            case _:
                self.say()

    def say(self) -> None:
        latencies = sorted(self.latencies)
        self.latencies = []
        live = [reader.live_at for reader in self.readers if reader.live_at is not None]
        answer: dict[str, Any] = {
            name: sum(getattr(reader.books, name) for reader in self.readers) for name in Books.__dataclass_fields__
        }
        answer |= {
            "clients": len(self.readers),
            "connected": sum(reader.connected for reader in self.readers),
            "reached": min(reader.last for reader in self.readers),
            "cursor": self.readers[0].cursor,
            "live_at": max(live, default=None),
            "seconds": time.monotonic() - self.began,
            "latencies": len(latencies),
        }
        if latencies:
            for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
                answer[name] = latencies[min(len(latencies) - 1, int(len(latencies) * share))] / 1e9
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()

    def run(self) -> None:
        """Until they have got to where they were asked to, or nobody asks any more."""
        self.epoll.register(0, select.EPOLLIN)
        while True:
            now = time.monotonic()
            missing = False
            for number, reader in enumerate(self.readers):
                if reader.socket is None and not self.held:
                    missing = True
                    if now >= reader.again_at:
                        self.connect(number, reader)
            if not self.said_ready and all(reader.connected for reader in self.readers):
                self.said_ready = True
                self.say()
            if self.asked_live and all(reader.live_at is not None for reader in self.readers):
                self.asked_live = False
                self.say()
            if self.until is not None and all(reader.last >= self.until for reader in self.readers):
                self.say()
                return
            timeout = self.options.every if self.paced else 0.02 if missing else 1.0
            for fd, _ in self.epoll.poll(timeout):
                if fd == 0:
                    data = os.read(0, 4096)
                    if not data:
                        return
                    *lines, self.commands = (self.commands + data).split(b"\n")
                    for line in lines:
                        self.command(line)
                elif (ready := self.by_fd.get(fd)) is not None:
                    self.read(ready, READ_BYTES)
            if self.paced:
                for reader in list(self.by_fd.values()):
                    # The head is read at once, and `connected` with it: from then on the pace is kept.
                    limit = self.options.pace if reader.connected else 1024
                    if limit:
                        self.read(reader, limit)


def arguments(given: list[str] | None = None) -> Any:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crowd")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--query", default="", help="what follows agent_id=…, such as &role=Rare")
    parser.add_argument("--cursor", help="the first Last-Event-ID")
    parser.add_argument("--rcvbuf", type=int, help="SO_RCVBUF")
    parser.add_argument("--pace", type=int, help="bytes to read at a time; 0: read nothing once connected")
    parser.add_argument("--every", type=float, default=1.0, help="seconds between two such reads")
    parser.add_argument("--hold", action="store_true", help="connect when told to, with the cursor that is told")
    parser.add_argument("--filtered", action="store_true", help="what is not for them is not missed")
    parser.add_argument("--latencies", action="store_true", help="take the time of every event")
    return parser.parse_args(given)


def main() -> None:
    with Crowd(arguments()) as crowd:
        crowd.run()


if __name__ == "__main__":
    main()
