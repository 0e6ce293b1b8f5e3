"""The plot: latency, throughput and cost, over the number of clients and over the event rate.

Strategy: one panel for each question, one line for each contender, median with least and most as a band; a
point where events were lost is hollow.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from .contenders import CONTENDERS
from .plan import CLIENTS, RATES
from .report import Results, Table, rounds

_COLORS = {
    "floor": "#555555",
    "sse-trio": "#0b6e4f",
    "sse-trio-2": "#3aa17e",
    "sse-trio-js": "#74c69d",
    "sse-trio-tls": "#2a6fbb",
    "sse-trio-h2": "#7fb2e5",
    "nchan": "#c1121f",
    "starlette": "#e08e0b",
    "baseline": "#8e44ad",
}


def draw(results: Results, path: Path) -> None:
    """Write the plot as a PNG. Panels without a single measurement stay away."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    table = Table(results)
    by_clients = [[(n, f"fanout-{n}x{rate}") for n in CLIENTS] for rate in (5, 100, 1_000)]
    by_rate = [[(rate, f"fanout-{n}x{rate}") for rate in RATES] for n in (1_000, 10_000)]
    panels = [
        ("p50 from publish to read, 5 events/s", "ms", "p50_ms", by_clients[0], "clients"),
        ("p50 from publish to read, 100 events/s", "ms", "p50_ms", by_clients[1], "clients"),
        ("p50 from publish to read, 1,000 clients", "ms", "p50_ms", by_rate[0], "events/s"),
        ("Deliveries/s, 1,000 events/s", "deliveries/s", "deliveries_per_s", by_clients[2], "clients"),
        ("Deliveries/s, 1,000 clients", "deliveries/s", "deliveries_per_s", by_rate[0], "events/s"),
        ("Deliveries/s, 10,000 clients", "deliveries/s", "deliveries_per_s", by_rate[1], "events/s"),
        ("Server CPU per delivery, 5 events/s", "µs", "cpu_us_per_delivery", by_clients[0], "clients"),
        ("Server CPU per delivery, 1,000 events/s", "µs", "cpu_us_per_delivery", by_clients[2], "clients"),
        ("RSS per idle client", "KB", "rss_per_client_kb", by_clients[0], "clients"),
    ]
    figure, axes = pyplot.subplots(3, 3, figsize=(16, 13), layout="constrained")
    for axis, (title, unit, name, points, across) in zip(axes.flat, panels, strict=True):
        if not _panel(axis, table, name, points):
            axis.set_axis_off()
            continue
        axis.set(title=title, xlabel=across, ylabel=unit, xscale="log", yscale="log")
        axis.set_xticks([x for x, _ in points], [f"{x:,}" for x, _ in points])
        axis.minorticks_off()
        axis.grid(visible=True, alpha=0.3)
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    machine = results["machine"]
    figure.suptitle(
        f"{machine['processor']}, {machine['cores']} cores shared by load client, server and nats-server; "
        f"{rounds(results)}, median and spread; hollow: events were lost or late"
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panel(axis: Any, table: Table, name: str, points: list[tuple[int, str]]) -> bool:
    """Draw one question; whether there was anything to draw."""
    drawn = False
    for key, contender in CONTENDERS.items():
        found = [(x, scenario, spread) for x, scenario in points if (spread := table.value(scenario, key, name))]
        # What is next to nothing (memory that the floor does not take) would make the logarithmic axis endless.
        found = [(x, scenario, spread) for x, scenario, spread in found if spread.middle >= 0.05]
        if not found:
            continue
        drawn = True
        xs = [x for x, _, _ in found]
        color = _COLORS[key]
        axis.plot(xs, [spread.middle for _, _, spread in found], color=color, label=contender.label)
        axis.fill_between(
            xs,
            [s.least for _, _, s in found],
            [s.most for _, _, s in found],
            color=color,
            alpha=0.15,
            linewidth=0,
        )
        for x, scenario, spread in found:
            share = table.value(scenario, key, "share")
            lost = share is not None and share.least < 1
            axis.plot(x, spread.middle, "o", color=color, markerfacecolor="white" if lost else color)
    return drawn
