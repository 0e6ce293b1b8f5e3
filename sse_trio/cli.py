"""The `sse-trio` command. Errors are one line on standard error; exit codes: 0 ended as asked, 1 failed, 2 misused.

Strategy: a command checks what it was given, opens what it needs, and hands over to the module that does the work.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import click
import trio

import sse_trio
from sse_trio.discovery import DISCOVERY_TYPES, MAX_PAYLOAD
from sse_trio.settings import Settings, SettingsError

__all__ = ["main"]

FAILED, WRONG_USE, INTERRUPTED = 1, 2, 130

TYPE = click.Choice([kind.lower() for kind in DISCOVERY_TYPES], case_sensitive=False)


def fail(message: str, code: int = FAILED) -> NoReturn:
    """End the command with one line on standard error."""
    click.echo(f"sse-trio: {message}", err=True)
    sys.exit(code)


def settings_or_fail(environment: Mapping[str, str] | None = None) -> Settings:
    """The environment's settings; each wrong variable is named, on a line of its own, and ends the command."""
    try:
        return Settings.from_environment(environment)
    except SettingsError as error:
        fail(f"wrong settings\n{error}", WRONG_USE)


def causes(error: BaseException) -> Iterator[BaseException]:
    """What has happened: the exceptions inside groups, and the one for which the server says that its app failed."""
    from hypercorn.utils import LifespanFailureError

    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from causes(part)
    elif isinstance(error, LifespanFailureError) and error.__cause__ is not None:
        yield from causes(error.__cause__)
    else:
        yield error


@contextmanager
def told_in_one_line(*, interrupted: int = INTERRUPTED) -> Iterator[None]:
    """End the command with one line where the body fails of what a person can mend; a bug keeps its traceback.

    After a Ctrl-C that nobody took, the exit code is `interrupted`.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt, BaseExceptionGroup) as error:
        found = list(causes(error))
        if any(isinstance(cause, KeyboardInterrupt) for cause in found):
            sys.exit(interrupted)

        from sse_trio.discovery import InvalidDiscovery
        from sse_trio.embedded_nats import EmbeddedNatsError
        from sse_trio.listener import ListenError, WrongAddress
        from sse_trio.nats_feed import FeedError
        from sse_trio.nats_protocol import NatsError
        from sse_trio.publisher import PublishError
        from sse_trio.server import StartError, WrongBind

        misuse = (InvalidDiscovery, SettingsError, WrongAddress, WrongBind)
        failure = (EmbeddedNatsError, FeedError, ListenError, NatsError, StartError)
        if not all(isinstance(cause, misuse + failure) for cause in found):
            raise
        first, said = found[0], str(found[0])
        if isinstance(first, PublishError) and first.reason == "unreachable" and not first.uncertain:
            said = first.advice
        fail(said, WRONG_USE if isinstance(first, misuse) else FAILED)


def codes(said: str) -> str:
    """The last line of a command's help."""
    return f"Exit codes: {said}; 2 for what it cannot use."


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Settings come from the environment (NATS_URL, SSE_BUFFER, …): docs/operating.md lists them. "
    "Exit codes: 0 it ended as asked; 1 it failed; 2 it was given something that it cannot use.",
)
@click.version_option(sse_trio.__version__, prog_name="sse-trio")
def main() -> None:
    """Stream the discoveries that AI agents share over NATS to web clients, as Server-Sent Events.

    \b
    Try it, with nothing else installed or running:
      sse-trio demo
    Run it beside your NATS:
      NATS_URL=nats://127.0.0.1:4222 sse-trio serve --bind 0.0.0.0:3000
    """


@main.command(epilog=codes("0 after a signal; 1 when start-up fails, a worker dies, or the feed dies of a bug"))
@click.option(
    "--bind", default="127.0.0.1:3000", show_default=True, help="host:port, [v6]:port, port, unix:path or fd://N."
)
@click.option("--workers", type=click.IntRange(1, 256), default=1, show_default=True, help="Processes on one socket.")
@click.option("--certfile", type=click.Path(exists=True, dir_okay=False), help="Certificate chain (PEM): serve TLS.")
@click.option("--keyfile", type=click.Path(exists=True, dir_okay=False), help="Its private key (PEM).")
@click.option(
    "--keep-alive",
    type=click.FloatRange(0, 86400, min_open=True),
    default=30.0,
    show_default=True,
    help="Seconds that a connection may wait for its next request; more than a proxy in front keeps its own.",
)
def serve(bind: str, workers: int, certfile: str | None, keyfile: str | None, keep_alive: float) -> None:
    """Serve the stream.

    Ends on SIGINT, SIGTERM or SIGHUP, after every client was told when to come back.

    \b
    Examples:
      sse-trio serve
      NATS_URL=tls://nats.example.org:4222 NATS_CREDS=sse.creds sse-trio serve --bind 0.0.0.0:443 \\
          --certfile chain.pem --keyfile key.pem --workers 2
    """
    if (certfile is None) != (keyfile is None):
        fail("--certfile and --keyfile belong together", WRONG_USE)
    settings = settings_or_fail()

    from sse_trio.application import create_app
    from sse_trio.logs import configure_logging
    from sse_trio.server import GRACE, listening, run_app, run_workers, stop_on_signals

    async def serve_alone(bound: socket.socket) -> None:
        app = create_app(settings, owns_process=True)
        async with stop_on_signals(app, settings.drain_delay) as stop, trio.open_nursery() as nursery:
            run = partial(run_app, app, bound, stop, certfile=certfile, keyfile=keyfile, keep_alive=keep_alive)
            url = await nursery.start(run)
            if not stop.is_set():
                click.echo(f"sse-trio serves {url}", err=True)

    with told_in_one_line(), listening(bind) as bound:
        if workers == 1:
            trio.run(serve_alone, bound)
        else:
            configure_logging(settings)
            options = ["--keep-alive", str(keep_alive)]
            if certfile is not None and keyfile is not None:
                options += ["--certfile", certfile, "--keyfile", keyfile]
            sys.exit(trio.run(run_workers, workers, bound, options, settings.drain_delay + GRACE + 5))


@main.command(epilog=codes("0 after Ctrl-C; 1 when it cannot start"))
@click.option("--bind", default="127.0.0.1:3000", show_default=True, help="host:port of the server.")
def demo(bind: str) -> None:
    """Show everything on this machine, with nothing else needed.

    Starts a nats-server, the server, and three agents who share discoveries; prints the address of a live page.
    Ctrl-C ends all of it, and no file is left.

    \b
    Examples:
      sse-trio demo
      sse-trio demo --bind 127.0.0.1:8080
    """
    from sse_trio.application import create_app
    from sse_trio.discovery import build
    from sse_trio.embedded_nats import embedded_nats
    from sse_trio.nats_protocol import NatsError
    from sse_trio.sample_agents import sample_agents
    from sse_trio.server import listening, run_app, stop_on_signals

    settings = settings_or_fail(demo_environment(os.environ))

    async def show(bound: socket.socket) -> None:
        async with stop_on_signals() as stop, embedded_nats() as nats, trio.open_nursery() as nursery:
            app = create_app(settings.model_copy(update={"nats_url": (nats.url,)}), owns_process=True)

            async def share(fields: Mapping[str, Any]) -> str:
                discovery = build(fields)
                try:
                    await app.services.publisher.publish(discovery)
                except NatsError:
                    pass  # the page says so; the next one is tried again
                return discovery.uri

            url = await nursery.start(partial(run_app, app, bound, stop, grace=1.0))  # a person waits
            if not stop.is_set():
                click.echo(
                    f"The live page:  {url}/\n"
                    f"The stream:     curl -N '{url}/discoveries/stream?agent_id=me'\n"
                    f"Follow it:      {own_name()} tail {url}\n"
                    f"Share one:      NATS_URL={nats.url} {own_name()} share 'hello from me'\n"
                    "Ctrl-C ends it."
                )
            async with trio.open_nursery() as beside:
                beside.start_soon(nats.watch)
                beside.start_soon(sample_agents, share)
                await stop.wait()
                beside.cancel_scope.cancel()

    with told_in_one_line(), worded_for_make(), listening(bind) as bound:
        trio.run(show, bound)


@contextmanager
def worded_for_make() -> Iterator[None]:
    """Another address, where the body says to choose one, as `make demo` takes it, where that runs us."""
    from sse_trio.server import StartError

    try:
        yield
    except StartError as error:
        if not os.environ.get("MAKELEVEL"):
            raise
        raise type(error)(re.sub(r"--bind \S+", r"make demo DEMO='\g<0>'", str(error))) from None


def own_name() -> str:
    """What one types to run this command from here."""
    if shutil.which("sse-trio") is not None:
        return "sse-trio"
    program = [sys.argv[0]] if Path(sys.argv[0]).name == "sse-trio" else [sys.executable, "-m", "sse_trio"]
    return shlex.join(program)


def demo_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The demo's: for loopback only and quiet, unless that is said otherwise; its NATS is always its own."""
    given = {name: value for name, value in environment.items() if value.strip() and not name.startswith("NATS_")}
    quiet = {"SSE_ALLOWED_HOSTS": "localhost,127.0.0.1,[::1]", "LOG_LEVEL": "warning"}
    return quiet | given | {"NATS_STREAM_MAX_BYTES": str(64 << 20)}  # fits into any temporary directory


@main.command(epilog=codes("0 when it is shared; 1 when NATS does not take it; 130 after Ctrl-C"))
@click.argument("content")
@click.option("--agent", "agent_id", default="human", show_default=True, help="Who shares it.")
@click.option("--role", "agent_role", default="Human", show_default=True, help="In which role.")
@click.option(
    "--type",
    "kind",
    type=TYPE,
    default="insight",
    show_default=True,
    help="What it is.",
)
@click.option("--confidence", type=click.FloatRange(0, 1), default=0.5, show_default=True, help="From 0 to 1.")
@click.option("--related-to", help="The URI of the discovery that it belongs to.")
def share(content: str, agent_id: str, agent_role: str, kind: str, confidence: float, related_to: str | None) -> None:
    """Share one discovery, and print its URI.

    It goes to NATS (NATS_URL). CONTENT may be - for standard input.

    \b
    Examples:
      sse-trio share "disk of db-3 fills up on Mondays" --type pattern --confidence 0.8
      uptime | sse-trio share - --agent ops-1 --role Operations
    """
    from sse_trio.publisher import open_publisher

    settings = settings_or_fail()
    if content == "-":
        given = sys.stdin.buffer.read(MAX_PAYLOAD + 1)
        if len(given) > MAX_PAYLOAD:
            fail(f"standard input is oversized: more than the {MAX_PAYLOAD} bytes allowed", WRONG_USE)
        try:
            content = given.decode().rstrip("\n")
        except UnicodeDecodeError:
            fail("what comes in on standard input is not UTF-8", WRONG_USE)
    if not content.strip():
        fail("CONTENT is empty", WRONG_USE)
    if related_to is not None and not related_to.startswith("discovery://"):
        fail(f"--related-to {related_to}: expected discovery://…, as share and tail --json print it", WRONG_USE)

    async def main() -> str:
        async with open_publisher(
            settings.nats_url,
            agent_id=agent_id,
            agent_role=agent_role,
            creds=settings.nats_creds,
            ca=settings.nats_ca,
        ) as publisher:
            return (await publisher.share(kind, content, confidence, related_to=related_to)).uri

    with told_in_one_line():
        click.echo(trio.run(main))


@main.command(epilog=codes("0 after Ctrl-C, or when nobody reads its output any more; 1 when the server refuses"))
@click.argument("url", default="http://127.0.0.1:3000")
@click.option("--agent-id", default="tail", show_default=True, help="Who listens.")
@click.option("--type", "types", type=TYPE, multiple=True, help="Only this type; repeatable.")
@click.option("--role", "roles", multiple=True, help="Only agents of this role; repeatable.")
@click.option("--agent", "agents", multiple=True, help="Only this agent; repeatable.")
@click.option("--subject", "subjects", multiple=True, help="Only NATS subjects matching this; repeatable.")
@click.option("--min-confidence", type=click.FloatRange(0, 1), help="Only at or above.")
@click.option("--last-event-id", default="", help="Resume after this event.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on each line, for pipes.")
@click.option("--token", envvar="SSE_TRIO_TOKEN", help="Bearer token (or SSE_TRIO_TOKEN).")
def tail(url: str, as_json: bool, last_event_id: str, token: str | None, agent_id: str, **filters: Any) -> None:
    """Follow a running server from a terminal.

    Reconnects and resumes by itself. Discoveries go to standard output, interruptions to standard error. Ctrl-C ends it.

    \b
    Examples:
      sse-trio tail
      sse-trio tail https://sse.example.org --type anomaly --min-confidence 0.8
      sse-trio tail --json | jq -r 'select(.event == "discovery") | .data.params.uri'
    """
    from sse_trio.listener import follow
    from sse_trio.tail import tail as tail_stream

    async def main() -> None:
        async with follow(
            url, agent_id=agent_id, full=True, last_event_id=last_event_id, token=token, **filters
        ) as follower:
            await tail_stream(follower, sys.stdout, as_json=as_json)

    with told_in_one_line(interrupted=0):
        trio.run(main)


@main.command(epilog=codes("0 when the server can do its work; 1 when something must be mended before"))
@click.option("--bind", default="127.0.0.1:3000", show_default=True, help="Where the server is going to listen.")
def doctor(bind: str) -> None:
    """Check what the server needs, and say what to do.

    Looks at NATS, JetStream, the stream, permissions, the port, the limit of open files, and how it can write.

    \b
    Examples:
      sse-trio doctor
      NATS_URL=nats://nats.example.org:4222 sse-trio doctor --bind 0.0.0.0:3000
    """
    from sse_trio.doctor import examine

    settings = settings_or_fail()
    with told_in_one_line():
        findings = trio.run(examine, settings, bind)
    for finding in findings:
        click.echo(f"{finding.verdict:<4}  {finding.subject}: {finding.detail}")
    sys.exit(FAILED if any(finding.verdict == "FAIL" for finding in findings) else 0)
