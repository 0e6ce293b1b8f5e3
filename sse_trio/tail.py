"""What `sse-trio tail` shows of a stream: one line for an event, for people or for pipes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

import click

from sse_trio.listener import Follower, Interruption
from sse_trio.sse import ServerSentEvent, compact

__all__ = ["render", "render_json", "tail"]

COLOURS = {
    "Pattern": "blue",
    "Anomaly": "red",
    "Connection": "magenta",
    "Solution": "green",
    "Question": "yellow",
    "Insight": "cyan",
}


async def tail(follower: Follower, out: TextIO, *, as_json: bool, colours: bool) -> None:
    """Write what `follower` gives to `out`, and its interruptions to standard error, until it ends.

    Raises:
        ListenError: the server refuses, and would go on refusing.
    """
    try:
        async for told in follower:
            if isinstance(told, Interruption):
                click.echo(f"-- {told.reason}: {told.detail}; back in {told.delay:.1f} s", err=True)
                continue
            line = render_json(told) if as_json else render(told, style(colours))
            if line is not None:
                out.write(line + "\n")
                out.flush()
    except BrokenPipeError:
        # Whoever read us has gone. Python would say so once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def style(colours: bool) -> Callable[..., str]:
    """`click.style`, or what leaves a text as it is."""
    return click.style if colours else lambda text, **_: str(text)


def render_json(event: ServerSentEvent) -> str:
    """`{"event","id","data"}` on one line."""
    return compact({"event": event.event, "id": event.id, "data": _data(event)})


def render(event: ServerSentEvent, styled: Callable[..., str]) -> str | None:
    """The event as a line for people; None for what only moves the cursor."""
    data = _data(event)
    if event.event == "discovery":
        return _discovery(data, styled)
    if event.event == "gap":
        missed = "an unknown number of" if data.get("missed") is None else data["missed"]
        return styled(f"-- gap: {missed} discoveries are missing here ({data.get('reason')})", fg="yellow")
    if event.event == "connected":
        resumed = {True: ", resumed", False: ", not resumed"}.get(data.get("resumed", None), "")
        return styled(f"-- connected as {printable(data.get('agent_id'))}{resumed}", dim=True)
    if event.event == "goodbye":
        return styled(f"-- the server says goodbye ({data.get('reason')})", dim=True)
    return None


def _discovery(data: Any, styled: Callable[..., str]) -> str:
    params = data.get("params", {})
    found = params.get("_meta", {}).get("discovery")
    if not isinstance(found, dict):
        return printable(params.get("uri"))
    kind = str(found.get("discovery_type", "")).capitalize()
    when = printable(found.get("timestamp"))[11:19]
    agent = printable(found.get("agent_id"))
    content = printable(found.get("content"))
    confidence = f"{found.get('confidence', 0):4.0%}"
    coloured = styled(f"{kind:<10}", fg=COLOURS.get(kind))
    return f"{styled(when, dim=True)} {coloured} {confidence} {styled(agent, bold=True)}  {content}"


def printable(value: object) -> str:
    """A text from outside, without what would command a terminal."""
    return "".join(c if c.isprintable() else " " for c in str(value if value is not None else ""))


def _data(event: ServerSentEvent) -> Any:
    try:
        return json.loads(event.data)
    except ValueError:
        return {"text": event.data}
