"""From samples to tables: medians and spread, ratios within a round, what was aimed at and what was reached.

Strategy: everything is computed from the list of samples that `results.json` holds, so a table can be made
again from it. A ratio is taken within each round (the two ran minutes apart at most) and then its median; the
spread is least–most over the rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

from .contenders import CONTENDERS
from .runs import Sample

Results = dict[str, Any]


@dataclass(frozen=True)
class Spread:
    """The median of several rounds, and between what they lie."""

    middle: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        known = sorted(values)
        return cls(median(known), known[0], known[-1]) if known else None


def number(value: float) -> str:
    """Three digits that count, or a whole number where it has more; thousands apart."""
    if value >= 100:
        return f"{value:,.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def show(spread: Spread | None, unit: str = "") -> str:
    if spread is None:
        return "–"
    if number(spread.least) == number(spread.most):
        return f"{number(spread.middle)}{unit}"
    return f"{number(spread.middle)}{unit} ({number(spread.least)}–{number(spread.most)})"


class Table:
    """The samples, asked by scenario and contender."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.samples: list[Sample] = results["samples"]

    def rows(self, scenario: str, contender: str) -> list[Sample]:
        return [
            sample
            for sample in self.samples
            if sample["scenario"] == scenario and sample["contender"] == contender and "error" not in sample
        ]

    def value(self, scenario: str, contender: str, name: str) -> Spread | None:
        values = (sample.get(name) for sample in self.rows(scenario, contender))
        return Spread.of(value for value in values if value is not None)

    def ratio(self, scenario: str, ours: str, theirs: str, name: str) -> Spread | None:
        """Ours by theirs, round by round."""
        others = {sample["round"]: sample.get(name) for sample in self.rows(scenario, theirs)}
        ratios = []
        for sample in self.rows(scenario, ours):
            mine, other = sample.get(name), others.get(sample["round"])
            if mine is not None and other:
                ratios.append(mine / other)
        return Spread.of(ratios)

    def scenarios(self) -> list[tuple[str, str]]:
        return list(self.results["scenarios"].items())

    def contenders(self, scenario: str) -> list[str]:
        present = {sample["contender"] for sample in self.samples if sample["scenario"] == scenario}
        return [key for key in CONTENDERS if key in present]


def _share(spread: Spread | None) -> str:
    """The worst round's share: what was lost once was lost."""
    if spread is None:
        return "–"
    if spread.least == 1:
        return "all"
    # Never rounded up to "100 %".
    return f"{int(spread.least * 1000) / 10:.1f} %"


def fanout_table(table: Table, scenario: str) -> list[str]:
    lines = [
        "| | arrived | p50 | p99 | deliveries/s | CPU per delivery | p50 ÷ nchan's | deliveries ÷ nchan's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key in table.contenders(scenario):
        cells = [
            CONTENDERS[key].label,
            _share(table.value(scenario, key, "share")),
            show(table.value(scenario, key, "p50_ms"), " ms"),
            show(table.value(scenario, key, "p99_ms"), " ms"),
            show(table.value(scenario, key, "deliveries_per_s")),
            show(table.value(scenario, key, "cpu_us_per_delivery"), " µs"),
            show(table.ratio(scenario, key, "nchan", "p50_ms"), "×"),
            show(table.ratio(scenario, key, "nchan", "deliveries_per_s"), "×"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def connect_table(table: Table, scenario: str) -> list[str]:
    lines = [
        "| | listening | time for all | connects/s | CPU per connect | RSS per idle client | rate ÷ generator's |",
        "|---|---|---|---|---|---|---|",
    ]
    for key in table.contenders(scenario):
        rows = table.rows(scenario, key)
        listening = min((row["ready"] for row in rows), default=0)
        clients = rows[0]["clients"] if rows else 0
        cells = [
            CONTENDERS[key].label,
            "all" if rows and listening == clients else f"{listening:,} of {clients:,}",
            show(table.value(scenario, key, "connect_seconds"), " s"),
            show(table.value(scenario, key, "connects_per_s")),
            show(table.value(scenario, key, "connect_cpu_us"), " µs"),
            show(table.value(scenario, key, "rss_per_client_kb"), " KB"),
            show(table.ratio(scenario, key, "baseline", "connects_per_s"), "×"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def probe_lines(table: Table, scenario: str) -> list[str]:
    """What /health had to wait while the scenario ran."""
    lines = []
    for key in table.contenders(scenario):
        probes = [row["probe_ms"] for row in table.rows(scenario, key) if row.get("probe_ms")]
        if probes:
            failed = sum(row.get("probe_failed", 0) for row in table.rows(scenario, key))
            answered = [probe for probe in probes if probe["count"]]
            p99 = show(Spread.of(probe["p99"] for probe in answered), " ms")
            longest = show(Spread.of(probe["max"] for probe in answered), " ms")
            times = f"p99 {p99}, longest {longest}, {failed} failed" if answered else f"all {failed} failed"
            turn = table.value(scenario, key, "longest_turn_ms")
            inside = f" Longest turn of the event loop, from inside: {show(turn, ' ms')}." if turn else ""
            lines.append(f"* {CONTENDERS[key].label}: `/health` meanwhile {times}.{inside}")
    return lines


@dataclass(frozen=True)
class Target:
    """Something aimed at: what to compute, and when it counts as reached."""

    at: str
    aim: str
    compute: Callable[[Table], Spread | None]
    is_met: Callable[[Spread], bool] | None  # None: it is only to be stated
    unit: str = "×"


def _ratio(scenario: str, theirs: str, name: str, ours: str = "sse-trio") -> Callable[[Table], Spread | None]:
    return lambda table: table.ratio(scenario, ours, theirs, name)


def _all(scenario: str, ours: str = "sse-trio") -> Callable[[Table], Spread | None]:
    def arrived(table: Table) -> Spread | None:
        share = table.value(scenario, ours, "share")
        return share and Spread(share.middle * 100, share.least * 100, share.most * 100)

    return arrived


def _value(scenario: str, name: str, ours: str = "sse-trio") -> Callable[[Table], Spread | None]:
    return lambda table: table.value(scenario, ours, name)


def _probe(scenario: str, name: str, ours: str = "sse-trio") -> Callable[[Table], Spread | None]:
    """One that was not answered has waited for ever."""
    return lambda table: Spread.of(
        math.inf if row.get("probe_failed") else row["probe_ms"][name]
        for row in table.rows(scenario, ours)
        if row.get("probe_ms")
    )


def _everyone(spread: Spread) -> bool:
    return spread.least == 100


TARGETS = (
    Target(
        "1,000 clients, 5/s",
        "p50 ≤ 0.6× nchan's",
        _ratio("fanout-1000x5", "nchan", "p50_ms"),
        lambda s: s.middle <= 0.6,
    ),
    Target(
        "",
        "p50 ≤ 1.5× the send() loop's",
        _ratio("fanout-1000x5", "floor", "p50_ms"),
        lambda s: s.middle <= 1.5,
    ),
    Target("1,000 clients, 1,000/s", "every event delivered", _all("fanout-1000x1000"), _everyone, " %"),
    Target(
        "",
        "deliveries/s ≥ 9× nchan's",
        _ratio("fanout-1000x1000", "nchan", "deliveries_per_s"),
        lambda s: s.middle >= 9,
    ),
    Target("1,000 clients, 3,000/s", "every event delivered", _all("fanout-1000x3000"), _everyone, " %"),
    Target(
        "",
        "deliveries/s ≥ 20× nchan's",
        _ratio("fanout-1000x3000", "nchan", "deliveries_per_s"),
        lambda s: s.middle >= 20,
    ),
    Target("100 clients, 20,000/s", "every event delivered", _all("fanout-100x20000"), _everyone, " %"),
    Target(
        "10,000 clients, 10/s",
        "p50 ≤ 0.15× nchan's",
        _ratio("fanout-10000x10", "nchan", "p50_ms"),
        lambda s: s.middle <= 0.15,
    ),
    Target(
        "",
        "RSS per client ≤ 25 KB",
        _value("fanout-10000x10", "rss_per_client_kb"),
        lambda s: s.middle <= 25,
        " KB",
    ),
    Target("", "`/health` p99 < 50 ms", _probe("fanout-10000x10", "p99"), lambda s: s.middle < 50, " ms"),
    Target(
        "1,000 connect, 64 at a time",
        "≥ 1.5× the generator's rate",
        _ratio("connect", "baseline", "connects_per_s"),
        lambda s: s.middle >= 1.5,
    ),
    Target(
        "10,000 connect at once",
        "all, 1 worker",
        _value("reconnect", "ready"),
        lambda s: s.least == 10_000,
        "",
    ),
    Target("", "time, 1 worker", _value("reconnect", "connect_seconds"), None, " s"),
    Target(
        "",
        "≥ 1.5× the generator's rate",
        _ratio("reconnect", "baseline", "connects_per_s"),
        lambda s: s.middle >= 1.5,
    ),
    Target("", "all, 2 workers", _value("reconnect", "ready", "sse-trio-2"), lambda s: s.least == 10_000, ""),
    Target("", "time, 2 workers", _value("reconnect", "connect_seconds", "sse-trio-2"), None, " s"),
    Target(
        "against sse-starlette",
        "deliveries/s ≥ 40× (1,000 × 3,000/s)",
        _ratio("fanout-1000x3000", "starlette", "deliveries_per_s"),
        lambda s: s.middle >= 40,
    ),
    Target(
        "",
        "p50 ≤ 0.25× (1,000 × 5/s)",
        _ratio("fanout-1000x5", "starlette", "p50_ms"),
        lambda s: s.middle <= 0.25,
    ),
    Target(
        "TLS, 1,000 × 100/s",
        "every event delivered",
        _all("fanout-1000x100", "sse-trio-tls"),
        _everyone,
        " %",
    ),
    Target(
        "HTTP/2, 1,000 × 100/s",
        "every event delivered",
        _all("fanout-1000x100", "sse-trio-h2"),
        _everyone,
        " %",
    ),
    Target("burst of 100,000 in 1 s", "every event delivered", _all("burst"), _everyone, " %"),
    Target("", "longest turn of the loop ≤ 50 ms", _value("burst", "longest_turn_ms"), lambda s: s.most <= 50, " ms"),
    Target("", "longest wait of `/health` ≤ 50 ms", _probe("burst", "max"), lambda s: s.middle <= 50, " ms"),
)


def target_table(table: Table) -> list[str]:
    lines = ["| at | aim | measured | |", "|---|---|---|---|"]
    for target in TARGETS:
        spread = target.compute(table)
        if spread is None:
            verdict = "not measured"
        elif target.is_met is None:
            verdict = ""
        else:
            verdict = "reached" if target.is_met(spread) else "**missed**"
        lines.append(f"| {target.at} | {target.aim} | {show(spread, target.unit)} | {verdict} |")
    return lines


def overview_table(table: Table) -> list[str]:
    """One line for each contender: what one wants to know first."""
    lines = [
        "| | 1,000 clients, 5/s: p50 | 1,000/s: arrived, deliveries/s | 3,000/s: arrived, deliveries/s "
        "| 10,000 clients, 10/s: p50 | RSS per client | connects/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for key in ("sse-trio", "nchan", "starlette", "baseline", "floor"):
        cells = [CONTENDERS[key].label, show(table.value("fanout-1000x5", key, "p50_ms"), " ms")]
        for scenario in ("fanout-1000x1000", "fanout-1000x3000"):
            share = _share(table.value(scenario, key, "share"))
            cells.append(f"{share}, {show(table.value(scenario, key, 'deliveries_per_s'))}")
        cells.append(show(table.value("fanout-10000x10", key, "p50_ms"), " ms"))
        cells.append(show(table.value("connect", key, "rss_per_client_kb"), " KB"))
        cells.append(show(table.value("connect", key, "connects_per_s")))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def summary(results: Results) -> str:
    """The report's first table, in Markdown, and the plot where there are curves: for the project's README."""
    lines = [_circumstances(results), "", *overview_table(Table(results)), ""]
    if has_curves(results):
        lines += ["![Latency, throughput and cost over clients and event rate](benchmarks/plot.png)", ""]
    more = (
        "What was aimed at and what was reached, TLS, HTTP/2 and the rest: [benchmarks](benchmarks/README.md#results)."
    )
    return "\n".join([*lines, more, ""])


def has_curves(results: Results) -> bool:
    """Whether enough was measured for the plot to say something."""
    return results["mode"] in {"curves", "full"}


def _circumstances(results: Results) -> str:
    """On what, when, and how it was measured."""
    machine = results["machine"]
    return (
        f"Measured {results['started']} on {machine['processor']}, {machine['cores']} cores, "
        f"{machine['memory']}, {machine['kernel']}; load client, server and nats-server share the cores. "
        f"{rounds(results)}, contenders in turn; {results['seconds'] / 60:.0f} minutes. Median "
        "(least–most); ratios are taken within a round; “arrived” is the worst round's."
    )


def _header(results: Results) -> list[str]:
    """The circumstances, and which versions."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return [_circumstances(results), "", f"Versions: {versions}.", ""]


def rounds(results: Results) -> str:
    """How often each contender had its turn, in words."""
    number = results["rounds"]
    return f"{number} round{'s' if number != 1 else ''}"


def document(results: Results) -> str:
    """The whole report, in Markdown."""
    table = Table(results)
    lines = [*_header(results), *overview_table(table), ""]
    lines += [f"* Left out: {what}: {why}." for what, why in results["missing"].items()]
    for sample in table.samples:
        if "error" in sample:
            first = sample["error"].strip().splitlines()[-1][:200]
            lines.append(f"* Failed: {sample['contender']} at {sample['scenario']}: {first}")
    lines += ["### Aims", "", *target_table(table), ""]
    for key, title in table.scenarios():
        lines += [f"### {title[0].upper()}{title[1:]}", ""]
        is_fanout = any("share" in row for row in table.samples if row["scenario"] == key)
        lines += fanout_table(table, key) if is_fanout else connect_table(table, key)
        lines += ["", *probe_lines(table, key), ""]
    return "\n".join(lines).replace("\n\n\n", "\n\n").rstrip() + "\n"
