"""A client of the stream over HTTP/2 and TLS, as small as the tests need: one connection, one stream on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import h2.config
import h2.connection
import h2.events
import trio
from support import WITHIN, fail_within

from sse_trio.sse import Decoder, ServerSentEvent

__all__ = ["Http2Stream"]


@dataclass
class Http2Stream:
    """One request on a connection of its own; reads like `support.RawStream`."""

    stream: trio.SSLStream[trio.SocketStream]
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    events: list[ServerSentEvent] = field(default_factory=list)
    ended: bool = False
    closed: bool = False
    decoder: Decoder = field(default_factory=Decoder)
    _taken: int = 0

    def __post_init__(self) -> None:
        self.protocol = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))

    async def request(self, authority: str, path: str, headers: Mapping[str, str], method: str = "GET") -> None:
        """Send the request; the answer comes with reading."""
        self.protocol.initiate_connection()
        fields = {":method": method, ":scheme": "https", ":authority": authority, ":path": path} | dict(headers)
        self.protocol.send_headers(1, list(fields.items()), end_stream=True)
        await self.flush()

    async def flush(self) -> None:
        await self.stream.send_all(self.protocol.data_to_send())

    async def leave(self) -> None:
        """End this one stream (RST_STREAM) and keep the connection, as a browser does."""
        self.protocol.reset_stream(1, error_code=8)
        await self.flush()

    async def read_some(self) -> bool:
        """Read once; False when the peer has closed."""
        try:
            data = await self.stream.receive_some(65536)
        except trio.BrokenResourceError:
            data = b""
        if not data:
            self.closed = True
            return False
        for event in self.protocol.receive_data(data):
            if isinstance(event, h2.events.ResponseReceived):
                self.headers = {str(name): str(value) for name, value in event.headers or []}
                self.status = int(self.headers[":status"])
            elif isinstance(event, h2.events.DataReceived):
                self.body += event.data
                self.events += self.decoder.feed(event.data)
                self.protocol.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id)
            elif isinstance(event, h2.events.StreamEnded | h2.events.StreamReset):
                self.ended = True
        await self.flush()
        return True

    async def read_until(self, condition: Callable[[], bool], what: str, within: float = WITHIN) -> None:
        with fail_within(within, f"{what}; got {self.status} {self.body[-2000:]!r}"):
            while not condition():
                if not await self.read_some():
                    assert condition(), f"the stream closed before: {what}; got {self.status} {self.body!r}"

    async def next(self, name: str | None = None, within: float = WITHIN) -> ServerSentEvent:
        """The next event that was not taken yet; with `name`, the next of that name."""
        while True:
            await self.read_until(lambda: len(self.events) > self._taken, f"an event {name or ''}", within)
            event = self.events[self._taken]
            self._taken += 1
            if name is None or event.event == name:
                return event

    async def read_to_end(self, within: float = WITHIN) -> None:
        with fail_within(within, "the stream ends"):
            while not self.ended and await self.read_some():
                pass
