"""A client of the stream over HTTP/2 and TLS, as small as the tests need: one connection, one stream on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import h2.config
import h2.connection
import h2.events
import trio
from support import RawStream

__all__ = ["Http2Stream"]


class Http2Stream(RawStream):
    """One request on a connection of its own, which reads like any other stream."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
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
                self.dechunker.ended = True
        await self.flush()
        return True
