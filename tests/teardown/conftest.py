"""What every file of the lab has."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator

import pytest
import structlog
from teardown.house import COMMANDS, House, house


@pytest.fixture(autouse=True)
def _no_log() -> Iterator[None]:
    """A scenario runs hundreds of times; what it logs is not what is looked at."""
    configured = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.configure(**configured)


@pytest.fixture(
    scope="module",
    params=[(COMMANDS[0], False), (COMMANDS[0], True), (COMMANDS[1], False)],
    ids=lambda kind: f"{kind[0]}, {'TLS' if kind[1] else 'plain'}",
)
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A server for all tests of a file, by each command; under TLS once, which is Hypercorn's affair in both."""
    name, secure = request.param
    with house(tmp_path_factory.mktemp("house"), name, secure=secure) as made:
        yield made


@pytest.fixture
async def server(shared: House) -> AsyncIterator[House]:
    """The server that the file shares; after the test it must be as it was before."""
    assert await shared.clients() == []
    before = await shared.settled()
    yield shared
    await shared.as_before(before)
