"""What is measured: the loads, and which contenders face each of them.

Strategy: a scenario is listed once, for all modes; `quick` ones are the table's, the rest fills the curves.
"""

from __future__ import annotations

from dataclasses import replace

from .runs import Scenario

CLIENTS = (100, 1_000, 5_000, 10_000)
RATES = (5, 100, 1_000, 3_000)

MAIN = ("floor", "sse-trio", "nchan", "starlette", "baseline")
GRID = ("floor", "sse-trio", "sse-trio-2", "nchan", "starlette", "baseline")
VARIANTS = ("sse-trio", "sse-trio-2", "sse-trio-js", "sse-trio-tls", "sse-trio-h2")


def fanout(clients: int, rate: float, seconds: float, contenders: tuple[str, ...], **more: object) -> Scenario:
    title = f"{clients:,} clients, {rate:,} events/s"
    return Scenario(f"fanout-{clients}x{rate}", title, clients, rate, seconds, contenders, **more)  # type: ignore[arg-type]


def quick() -> list[Scenario]:
    """A few minutes: the table."""
    return [
        fanout(1_000, 5, 4, MAIN),
        fanout(1_000, 1_000, 3, MAIN),
        fanout(1_000, 3_000, 3, MAIN),
        fanout(1_000, 10_000, 2, ("floor", "sse-trio", "nchan")),
        fanout(100, 20_000, 3, ("floor", "sse-trio")),
        fanout(10_000, 10, 4, ("floor", "sse-trio", "sse-trio-2", "nchan"), probe_ms=20),
        fanout(1_000, 100, 3, VARIANTS),
        Scenario("connect", "1,000 clients connect, 64 at a time", 1_000, 0, 0, MAIN),
        Scenario(
            "reconnect",
            "10,000 clients connect at once",
            10_000,
            0,
            0,
            ("floor", "sse-trio", "sse-trio-2", "nchan", "baseline"),
            at_once=0,
            probe_ms=200,
        ),
        Scenario(
            "burst",
            "a burst of 100,000 events in a second, 10 clients",
            10,
            100_000,
            1,
            ("sse-trio", "sse-trio-js"),
            probe_ms=2,
            env={"SSE_HISTORY": "200000", "SSE_HISTORY_BYTES": "268435456"},
        ),
    ]


def curves() -> list[Scenario]:
    """The table, and enough points for every panel of the plot."""
    scenarios = {scenario.key: scenario for scenario in quick()}
    points = [(clients, rate) for clients in CLIENTS for rate in (5, 1_000)] + [(1_000, rate) for rate in RATES]
    for clients, rate in points:
        cell = fanout(clients, rate, 3, MAIN if (clients, rate) != (1_000, 100) else (*MAIN, *VARIANTS[1:]))
        if cell.key not in scenarios or rate == 100:
            scenarios[cell.key] = cell
    return list(scenarios.values())


def full() -> list[Scenario]:
    """The table and the whole grid; about an hour and a half with three rounds."""
    scenarios = {scenario.key: scenario for scenario in quick()}
    for clients in CLIENTS:
        for rate in RATES:
            cell = fanout(clients, rate, 4, GRID if clients != 1_000 or rate != 100 else (*GRID, *VARIANTS[2:]))
            scenarios[cell.key] = cell
    for rate in (5, 1_000, 3_000):
        cell = fanout(1_000, rate, 4, (*GRID, *VARIANTS[2:]))
        scenarios[cell.key] = cell
    for key in ("connect", "reconnect"):
        old = scenarios[key]
        everyone = (*GRID, "sse-trio-tls", "sse-trio-h2")
        scenarios[key] = replace(old, contenders=everyone)
    return list(scenarios.values())


def smoke() -> list[Scenario]:
    """Seconds: whether everything works; its numbers mean nothing."""
    return [
        fanout(50, 50, 1, (*MAIN, *VARIANTS[1:])),
        Scenario("connect", "100 clients connect", 100, 0, 0, MAIN),
    ]
