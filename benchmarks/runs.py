"""One run: one contender, one load, one row of numbers.

Strategy: the load client stops between its steps and waits for a line; in between the server's processor time
and memory are read, so that connecting, idling and delivering are measured apart.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import turns
from .contenders import Contender, Running, serving
from .needs import Tools
from .procs import usage

Sample = dict[str, Any]


@dataclass(frozen=True)
class Scenario:
    """A load. Rate 0: connect, and measure what idle clients cost."""

    key: str
    title: str
    clients: int
    rate: float
    seconds: float
    contenders: tuple[str, ...]
    at_once: int = 64  # connections in the making at a time; 0: all
    patience: float = 60.0  # seconds until all must be listening
    probe_ms: float = 0  # how often /health is asked meanwhile, and the loop's turns are watched; 0: never
    env: Mapping[str, str] = field(default_factory=dict)


class LoadFailed(Exception):
    """The load client gave up; the text is what it said."""


def run(scenario: Scenario, contender: Contender, tools: Tools, directory: Path) -> Sample:
    """Start the contender, put the load on it, stop it; one that breaks gives a row with its error."""
    sample: Sample = {
        "scenario": scenario.key,
        "contender": contender.key,
        "clients": scenario.clients,
        "rate": scenario.rate,
    }
    try:
        with serving(contender, tools, directory, scenario.env, watched=scenario.probe_ms > 0) as server:
            sample |= measure(scenario, server, tools.load)
    except (RuntimeError, LoadFailed) as error:
        sample["error"] = str(error)
    return sample


def measure(scenario: Scenario, server: Running, load: Path) -> Sample:
    """Put the load on a server that answers."""
    before = usage(server.pid)
    _watch_turns(server)
    process = subprocess.Popen(
        [str(load), *_options(scenario, server)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            connected = _step(process)
            time.sleep(1.0 if scenario.clients > 1000 else 0.3)  # what connecting has left over is done with
            idle = usage(server.pid)
            if scenario.rate:
                _watch_turns(server)
            _go_on(process)
            done = _step(process)
            after = usage(server.pid)
            longest = turns.longest(server.setting.turns) if server.setting.turns is not None else 0.0
            _go_on(process)
        except BaseException:
            process.kill()
            raise
    ready = max(connected["ready"], 1)
    delivered = done["delivered"]
    asked = round(scenario.rate * scenario.seconds) * scenario.clients
    sample: Sample = {
        "ready": connected["ready"],
        "failures": connected["failures"],
        "connect_seconds": connected["seconds"],
        "connects_per_s": connected["ready"] / connected["seconds"],
        "connect_ms": connected["ready_ms"],
        "connect_cpu_us": (idle.cpu - before.cpu) * 1e6 / ready,
        "rss_start_kb": before.rss / 1024,
        "rss_per_client_kb": (idle.rss - before.rss) / 1024 / ready,
        "rss_loaded_kb": after.rss / 1024,
        "cpu_seconds": after.cpu - idle.cpu,
        "done": done,
    }
    if asked:
        sample |= {
            "asked": asked,
            "delivered": delivered,
            "share": delivered / asked,
            "wrong": done["doubled"] + done["out_of_order"] + done["foreign"],
            "deliveries_per_s": delivered / done["seconds"] if delivered else 0.0,
            "p50_ms": done["latency_ms"]["p50"],
            "p99_ms": done["latency_ms"]["p99"],
            "max_ms": done["latency_ms"]["max"],
            "cpu_us_per_delivery": (after.cpu - idle.cpu) * 1e6 / delivered if delivered else None,
        }
    probed = done if scenario.rate else connected
    if scenario.probe_ms and "probe_ms" in probed:
        sample["probe_ms"] = probed["probe_ms"]
        sample["probe_failed"] = probed["probe_failed"]
    if longest:  # 0: not watched, or not one that can tell
        sample["longest_turn_ms"] = longest * 1e3
    return sample


def _watch_turns(server: Running) -> None:
    if server.setting.turns is not None:
        turns.reset(server.setting.turns)


def _options(scenario: Scenario, server: Running) -> list[str]:
    contender = server.contender
    options: dict[str, Any] = {
        "--port": server.setting.port,
        "--path": contender.path,
        "--clients": scenario.clients,
        "--at-once": scenario.at_once,
        "--patience": scenario.patience,
        "--rate": scenario.rate,
        "--seconds": scenario.seconds,
        "--source": contender.source,
        "--source-port": server.source_port,
    }
    if contender.ready is not None:
        options["--ready"] = contender.ready
    if scenario.probe_ms and contender.health is not None and not contender.is_tls:
        options |= {"--probe": contender.health, "--probe-interval": scenario.probe_ms}
    return [*contender.speak, *(str(part) for option in options.items() for part in option)]


def _step(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    assert process.stderr is not None
    line = process.stdout.readline()
    if not line:
        raise LoadFailed(process.stderr.read().strip() or f"the load client ended with {process.wait()}")
    step: dict[str, Any] = json.loads(line)
    return step


def _go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write("\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it has failed: the next step says how
