"""Fixtures that every test may ask for. What a test needs to read, it opens itself, from tests/support.py."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support import NatsServer, nats_server

from sse_trio.settings import Settings


def pytest_configure() -> None:
    """Hear signals as at a terminal: what `&` and nohup have a shell ignore, every server started here would, too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    # `SSE_DIRECT_WRITES=off make test` (or single): the whole suite without what it switches off. Servers that tests start
    # read it by themselves.
    if direct_writes := os.environ.get("SSE_DIRECT_WRITES"):
        Settings.model_fields["direct_writes"].default = direct_writes
        Settings.model_rebuild(force=True)


@pytest.fixture
async def nats(tmp_path: Path) -> AsyncIterator[NatsServer]:
    """A real nats-server with JetStream, for this test alone."""
    async with nats_server(tmp_path / "nats") as server:
        yield server


@pytest.fixture
async def core_nats(tmp_path: Path) -> AsyncIterator[NatsServer]:
    """A real nats-server without JetStream, for this test alone."""
    async with nats_server(tmp_path / "nats", jetstream=False) as server:
        yield server
