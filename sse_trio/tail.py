"""What `sse-trio tail` shows of a stream: one line for an event, for people or for pipes.

Strategy: what was shared goes to standard output, and so does a gap, since it stands where something is missing; what
happens to the connection goes to standard error. Everything comes from strangers, by way of a server that may be one
too: no character of it reaches a terminal that could command it, and no shape of it is an error.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from typing import Any, TextIO

import click

from sse_trio.discovery import Discovery, InvalidDiscovery, decode
from sse_trio.listener import Follower, Interruption
from sse_trio.sse import ServerSentEvent, compact

__all__ = ["remark", "render", "render_json", "tail"]

COLOURS = {
    "Pattern": "blue",
    "Anomaly": "red",
    "Connection": "magenta",
    "Solution": "green",
    "Question": "yellow",
    "Insight": "cyan",
}

Styled = Callable[..., str]
"""`click.style`, or what leaves a text as it is."""


async def tail(follower: Follower, out: TextIO, *, as_json: bool) -> None:
    """Write what `follower` gives to `out`, and what happens to the connection to standard error, until it ends.

    It ends, too, when whoever reads `out` has gone. Colours are for terminals whose owner did not set `NO_COLOR`.

    Raises:
        ListenError: the server refuses, and would go on refusing.
    """
    if isinstance(out, io.TextIOWrapper):
        out.reconfigure(errors="backslashreplace")  # for terminals that know fewer characters than people write
    styled = click.style if out.isatty() and not os.environ.get("NO_COLOR") else _plain
    try:
        async for told in follower:
            if isinstance(told, Interruption):
                _note(f"{told.reason}: {told.detail}; back in {told.delay:.1f} s")
            elif as_json:
                _write(out, render_json(told))
            elif (line := render(told, styled)) is not None:
                _write(out, line)
            elif (note := remark(told)) is not None:
                _note(note)
    except BrokenPipeError:
        # Python would say so once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())


def _write(out: TextIO, line: str) -> None:
    out.write(line + "\n")
    out.flush()


def _note(text: str) -> None:
    click.echo(f"-- {_printable(text)}", err=True)


def render_json(event: ServerSentEvent) -> str:
    """`{"event","id","data"}` on one line of ASCII; `data` is a string where it is no JSON."""
    return compact({"event": event.event, "id": event.id, "data": _data(event)})


def render(event: ServerSentEvent, styled: Styled) -> str | None:
    """A discovery or a gap as a line for people; None for the other events."""
    if event.event == "gap":
        data = _object(_data(event))
        missed = "an unknown number of" if data.get("missed") is None else data["missed"]
        return styled(f"-- gap: {_printable(missed)} discoveries are missing here ({_reason(data)})", fg="yellow")
    if event.event != "discovery":
        return None
    params = _object(_object(_data(event)).get("params"))
    try:
        discovery = decode(compact(_object(params.get("_meta")).get("discovery")).encode())
    except InvalidDiscovery:
        return _printable(params.get("uri", event.data))
    when = styled(_local_time(discovery), dim=True)
    kind = styled(f"{discovery.discovery_type:<10}", fg=COLOURS[discovery.discovery_type])
    agent = styled(_printable(discovery.agent_id), bold=True)
    return f"{when} {kind} {discovery.confidence:4.0%} {agent}  {_printable(discovery.content)}"


def remark(event: ServerSentEvent) -> str | None:
    """What an event says of the connection; None where it says nothing."""
    data = _object(_data(event))
    if event.event == "connected":
        resumed = {"True": ", resumed", "False": ", not resumed"}.get(str(data.get("resumed")), "")
        return f"connected as {data.get('agent_id')}{resumed}"
    if event.event == "goodbye":
        return f"the server says goodbye ({_reason(data)})"
    return None


def _plain(text: str, **_: Any) -> str:
    return text


def _local_time(discovery: Discovery) -> str:
    try:
        return f"{discovery.timestamp.astimezone():%H:%M:%S}"
    except (OverflowError, ValueError, OSError):  # a moment at the ends of the calendar
        return f"{discovery.timestamp:%H:%M:%S}"


def _printable(value: object) -> str:
    """A text from outside, without what would command a terminal or reorder its line."""
    return "".join(c if c.isprintable() else " " for c in str(value))


def _reason(data: dict[str, Any]) -> str:
    return _printable(data.get("reason", "no reason given"))


def _data(event: ServerSentEvent) -> Any:
    try:
        value = json.loads(event.data)
        compact(value)
    except (ValueError, RecursionError):
        return event.data
    return value


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
