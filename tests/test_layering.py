"""The layers of the package: who may import whom, read from the source with `ast`.

Low layers know nothing of high ones, so each can be read, tested and replaced by who knows only what lies below it.
A new module finds its place in the table here, or this test fails and says so.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sse_trio"

LAYERS: dict[str, str] = {
    "0": "addresses bulk_write deadline discovery nats_protocol settings sse subjects testing",
    "1": "history jwks limits logs nats_client rounds",
    "1, upstairs": "accepting nats_connection row tokens",
    "1, another flight up": "audience",
    "1, under the roof": "client",
    "2": "broadcaster",
    "3": "access backlog connection consumer listener publisher",
    "3, upstairs": "hypercorn_connection jetstream",
    "3, another flight up": "asgi nats_feed",
    "3, under the roof": "metrics collector",
    "4": "reader stream",
    "5": "openapi services",
    "5, upstairs": "resources",
    "5, under the roof": "routes",
    "6": "application",
    "6, upstairs": "app",
    "7": "child sample_agents scratch tail",
    "7, upstairs": "embedded_nats server",
    "7, another flight up": "doctor",
    "7, under the roof": "cli",
    "7, on top of it": "__main__",
}
"""The layers of the package's docstring, from the bottom to the top, with floors where modules of one layer build on
each other. A module may import only from below its own floor."""

RANK = {module: rank for rank, modules in enumerate(LAYERS.values()) for module in modules.split()}

CONFINED = {
    "asyncio": {"nats_client"},
    "nats": {"nats_client"},
    "trio_asyncio": {"nats_client", "nats_connection"},
    "h11": {"hypercorn_connection"},
    "h2": {"hypercorn_connection"},
    "hypercorn": {"application", "asgi", "cli", "connection", "hypercorn_connection", "server"},
    "quart": {"access", "resources", "routes", "services", "stream"},
    "quart_trio": {"application", "asgi", "connection"},
}
"""Libraries that few may know, and who."""


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package, `page` (files only) aside."""
    return {path.stem: ast.parse(path.read_text()) for path in sorted(PACKAGE.glob("*.py")) if path.stem != "__init__"}


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The line and the full name of everything that is imported, wherever in the module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            if node.module == "sse_trio":
                yield from ((node.lineno, f"sse_trio.{alias.name}") for alias in node.names if alias.name in RANK)
            else:
                yield node.lineno, node.module


def test_every_module_has_its_place_in_the_table() -> None:
    assert set(modules()) == set(RANK)


def test_no_module_is_in_two_places() -> None:
    assert len(RANK) == len(" ".join(LAYERS.values()).split())


@pytest.mark.parametrize("module", sorted(RANK))
def test_a_module_imports_only_from_below_its_own_floor(module: str) -> None:
    upward = [
        f"{module}.py:{line} imports {name}"
        for line, name in imports(modules()[module])
        if name.startswith("sse_trio.") and RANK[name.split(".")[1]] >= RANK[module]
    ]
    assert not upward


@pytest.mark.parametrize("library", sorted(CONFINED))
def test_a_library_is_known_only_where_it_belongs(library: str) -> None:
    users = {
        module for module, tree in modules().items() if library in {name.split(".")[0] for _, name in imports(tree)}
    }
    assert users <= CONFINED[library]


def test_the_teardown_harness_depends_on_trio_alone() -> None:
    theirs = {name.split(".")[0] for _, name in imports(modules()["testing"])} - sys.stdlib_module_names
    assert theirs == {"trio"}


def test_importing_the_teardown_harness_loads_nothing_else_of_the_package_or_its_dependencies() -> None:
    script = "import sys, sse_trio.testing; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"quart", "hypercorn", "nats", "pydantic", "structlog", "trio_asyncio"} & set(loaded)
