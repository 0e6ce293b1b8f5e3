"""What every file of the lab has."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator

import pytest
import structlog
from teardown.house import House


@pytest.fixture(autouse=True)
def _no_log() -> Iterator[None]:
    """A scenario runs hundreds of times; what it logs is not what is looked at."""
    configured = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.configure(**configured)


@pytest.fixture
async def server(shared: House) -> AsyncIterator[House]:
    """The server that the file shares; after the test it must be as it was before."""
    assert await shared.clients() == []
    before = await shared.settled()
    yield shared
    await shared.as_before(before)
