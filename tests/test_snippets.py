"""Every command and every snippet in README and docs is run here, as it stands there.

Strategy: the pages are read for their blocks of code; of shell blocks each command counts by itself. A test takes what it
runs from the page (`shows`), and substitutes ports and folders, nothing else. A snippet that no test has taken fails
the last test. What cannot be run here says why (`not_run`), and is looked at as closely as can be done without.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypercorn.trio.tcp_server
import pytest
import test_proxies
import trio
import yaml  # type: ignore[import-untyped]
from chromium import open_window, run_chromium
from provision import which
from support import BIN, NatsServer, a_discovery, eventually, free_port, listen, payload, run_server
from teardown.lab import Lab
from teardown.test_01_a_client_is_a_with_block import PoliteGoodbye, at_every_step
from test_demo import demo
from test_deployment import DEPLOY, DOCKERFILE, instruction, lint
from trio.testing import MockClock

from sse_trio import sse
from sse_trio.discovery import build
from sse_trio.settings import Settings
from sse_trio.testing import TeardownError

ROOT = Path(__file__).parent.parent
PAGES = [
    str(page.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", "examples/**/*.md", "benchmarks/README.md")
    for page in sorted(ROOT.glob(pattern))
]

SETTINGS = {str(field.validation_alias) for field in Settings.model_fields.values()}
ENDS_WITHIN = 5.0 + 2.0
"""Seconds that a process takes to end by what README says, and what a busy machine may be late."""


@dataclass(frozen=True)
class Snippet:
    """A block of code in a page, or one command of a shell block."""

    page: str
    line: int
    language: str
    text: str


def blocks(page: str) -> Iterator[Snippet]:
    """Fenced blocks; an indented one, which would hide from tests, is of the language "indented"."""
    lines = (ROOT / page).read_text().splitlines()
    opened: tuple[int, str] | None = None
    for number, line in enumerate(lines, 1):
        if fence := re.match(r" *(?:```|~~~)(.*)", line):
            if opened is None:
                opened = number, fence[1].strip()
            else:
                text = "".join(f"{kept}\n" for kept in lines[opened[0] : number - 1])
                yield Snippet(page, *opened, text)
                opened = None
        elif opened is None and line.startswith("    ") and not lines[number - 2].strip():
            yield Snippet(page, number, "indented", line)
    assert opened is None, f"{page}: the block at line {opened} has no end"


def snippets(page: str) -> Iterator[Snippet]:
    """The blocks, those of the shell taken apart into commands; comments are left out."""
    for block in blocks(page):
        if block.language not in {"sh", "bash"}:
            yield block
            continue
        for command in block.text.replace("\\\n", " ").splitlines():
            if text := re.sub(r"(^|\s+)#.*", "", command).strip():
                yield Snippet(page, block.line, block.language, text)


TAKEN: set[Snippet] = set()


def shows(page: str, *starts: str, why: str = "") -> pytest.MarkDecorator:
    """The test is given, one by one, the snippets of `page` that begin so."""
    given = []
    for start in starts:
        there = list(snippets(page))
        found = [snippet for snippet in there if snippet.text == start] or [
            snippet for snippet in there if snippet.text.startswith(start)
        ]
        assert len(found) == 1, f"{page} has {len(found)} snippets that begin with {start!r}"
        TAKEN.add(found[0])
        given.append(pytest.param(found[0].text, id=f"{page}: {start.strip()[:40]}{why and f' (not run: {why})'}"))
    return pytest.mark.parametrize("snippet", given)


def not_run(page: str, *starts: str, why: str) -> pytest.MarkDecorator:
    """As `shows`, for what cannot be run here, and why. The test does what can be done without."""
    return shows(page, *starts, why=why)


def moved(text: str, *changes: tuple[str, object]) -> str:
    """The text with other ports and folders, each of which must find its place."""
    for old, new in changes:
        assert old in text, f"the page no longer says {old!r}"
        text = text.replace(old, str(new))
    return text


SHELL_ENVIRONMENT = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def shell(command: str) -> tuple[str, str, str]:
    """A shell that becomes the command, so that signals reach it; the command may begin with variables."""
    return "/bin/sh", "-c", f"exec env {command}"


async def run_shell(command: str, within: float = 120.0) -> subprocess.CompletedProcess[str]:
    """Run a command as somebody in the repository's root would, with the environment's programs on the PATH."""
    run = partial(
        subprocess.run,
        ["/bin/sh", "-c", command],
        cwd=ROOT,
        env=os.environ | SHELL_ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=within,
    )
    return await trio.to_thread.run_sync(run)


def shape(text: str) -> str:
    """A text with what differs from run to run taken out."""
    text = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "UUID", text)
    text = re.sub(r"^retry: \d+$", "retry: N", text, flags=re.MULTILINE)
    return re.sub(r"^id: [a-z0-9]+-\d+$", "id: ID", text, flags=re.MULTILINE).strip()


# -- README ------------------------------------------------------------------------------------------------------------


@shows("README.md", "make demo")
async def test_the_readmes_first_command_leads_to_a_discovery_of_ones_own_on_the_page(
    snippet: str, tmp_path: Path
) -> None:
    # What it installs is here already: the stamp counts as made.
    stamp = Path(sys.prefix) / "demo.stamp"
    command = ("/bin/sh", "-c", f'exec {snippet} -C {ROOT} -o {stamp} VENV={sys.prefix} DEMO="$*"', "sh")
    with run_chromium() as chromium:
        async with demo(tmp_path, command=command) as shown, open_window(chromium) as window:
            await shown.is_shown()
            printed = dict(re.findall(r"^(The live page|Share one): +(.*)$", shown.output, re.MULTILINE))
            tab = await window.open(printed["The live page"])
            await tab.is_live()
            shared = await run_shell(printed["Share one"])
            assert shared.returncode == 0, shared.stderr
            await tab.shows("#rows tr.discovery:has-text('hello from me')")
            shown.ctrl_c()
            await shown.ends()
            shown.assert_nothing_left([])


@not_run("README.md", "make test", why="it is what runs this")
async def test_the_readmes_second_command_runs_every_check_and_all_tests(snippet: str) -> None:
    said = await run_shell(f"{snippet} --dry-run VENV={sys.prefix}")
    assert said.returncode == 0, said.stderr
    for program in ("mypy", "ruff check", "ruff format --check", "flake8-async", "tests/provision.py", "-m pytest"):
        assert program in said.stdout, program
    assert f"\n{snippet} " in (ROOT / ".ci" / "run").read_text(), "it runs on a clean checkout"


@contextmanager
def curl(command: str, output: Path) -> Iterator[None]:
    """The command, at work until the block ends; what it prints goes to a file."""
    with output.open("wb") as file:
        process = subprocess.Popen(shell(command), stdout=file, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait()


@shows("README.md", "$ curl -N ")
async def test_the_stream_that_curl_prints_is_the_one_in_the_readme(
    snippet: str, nats: NatsServer, tmp_path: Path
) -> None:
    command, _, expected = snippet.removeprefix("$ ").partition("\n")
    async with run_server(tmp_path, nats_url=nats.url) as server:
        await eventually(server.is_live, "the feed is live")
        command = moved(command, (":3000", f":{server.port}"))
        first, again = tmp_path / "first", tmp_path / "again"
        with curl(command, first):
            await eventually(lambda: "connected" in first.read_text(), "curl is connected")
            await nats.publish(("discoveries.insights", payload(content="unusual login pattern")))
            await eventually(lambda: "discovery\n" in first.read_text(), "curl prints the discovery")
        assert shape(first.read_text()) == shape(expected)
        # And with the header that README names, from the id that came first: the same discovery follows.
        (header,) = re.findall(r"`-H '(Last-Event-ID: m8x2k-41)'`", (ROOT / "README.md").read_text())
        cursor, last = re.findall(r"^id: (.*)$", first.read_text(), re.MULTILINE)
        with curl(f"{command} -H '{moved(header, ('m8x2k-41', cursor))}'", again):
            await eventually(lambda: f"id: {last}" in again.read_text(), "curl prints what follows its cursor")
        assert '"resumed":true' in again.read_text()


@shows("README.md", "$ curl 'http")
async def test_the_resource_that_curl_prints_is_the_one_in_the_readme(
    snippet: str, nats: NatsServer, tmp_path: Path
) -> None:
    command, _, expected = snippet.removeprefix("$ ").partition("\n")
    async with run_server(tmp_path, nats_url=nats.url) as server, listen(server.port) as witness:
        await witness.next("connected")
        await nats.publish(("discoveries.insights", payload(content="unusual login pattern")))
        event = await witness.next("discovery")
        answer = await run_shell(moved(command, (":3000", f":{server.port}"), ("m8x2k-42", event.id)))
        assert answer.stdout.strip() == expected.strip()


@shows("README.md", "const source = new EventSource(")
async def test_the_readmes_javascript_logs_what_it_says_in_a_browser(
    snippet: str, core_nats: NatsServer, tmp_path: Path
) -> None:
    """A discovery that the filter lets through, one that it does not, a lost connection, and a gap: every line."""
    logged: list[str] = []
    page = tmp_path / "page.html"
    page.write_text("<!doctype html>")  # from a file: of about:blank, Chromium lets nothing reach a loopback address
    port = free_port()
    quick = {"SSE_RETRY": "100", "SSE_DRAIN_WINDOW": "0"}

    with run_chromium() as chromium:
        async with open_window(chromium) as window:
            async with run_server(tmp_path, nats_url=core_nats.url, env=quick, port=port) as server:
                await eventually(server.is_live, "the feed is live")
                tab = await window.open(page.as_uri())
                await tab.do(lambda shown: shown.on("console", lambda message: logged.append(message.text)))

                async def logs(pattern: str) -> None:
                    """Wait for such a line. Playwright tells of the console only while it is asked something."""
                    await eventually(
                        lambda: tab.do(lambda shown: shown.title() or any(re.fullmatch(pattern, x) for x in logged)),
                        f"the browser logs {pattern}; {logged}",
                    )

                script = moved(snippet, (":3000", f":{port}"))
                await tab.do(lambda shown: shown.add_script_tag(content=script))
                await tab.do(lambda shown: shown.wait_for_function("source.readyState === EventSource.OPEN"))
                kept = build(a_discovery(1, confidence=0.8))
                for fields in ({"confidence": 0.7}, {"confidence": 0.9, "discovery_type": "Insight"}):
                    await core_nats.publish(("discoveries.insights", payload(0, **fields)))
                await core_nats.publish(("discoveries.insights", kept.payload))
                await logs(rf"[a-z0-9]+-3 {re.escape(kept.uri)}")
                assert len(logged) == 1, logged
            await logs("reconnecting")
            async with run_server(tmp_path, nats_url=core_nats.url, env=quick, port=port):
                await logs(r'missing here: \{"reason":"restart","missed":null\}')
                assert "closed" not in logged


@shows("README.md", "import os\n")
async def test_the_readmes_python_shares_and_hears(snippet: str, nats: NatsServer, tmp_path: Path) -> None:
    async with run_server(tmp_path, nats_url=nats.url) as server, listen(server.port, query="&detail=full") as witness:
        await eventually(server.is_live, "the feed is live")
        await witness.next("connected")
        program, printed = tmp_path / "readme.py", tmp_path / "printed"
        program.write_text(moved(snippet, (":4222", f":{nats.port}"), (":3000", f":{server.port}")))
        with curl(f"{sys.executable} -u {program}", printed):
            told = json.loads((await witness.next("discovery")).data)["params"]["_meta"]["discovery"]
            assert (told["agent_id"], told["content"], told["confidence"]) == ("ada", "water is wet", 0.9)

            async def listens() -> bool:
                return "ada" in {client["agent_id"] for client in (await server.get("/clients"))[1]["clients"]}

            await eventually(listens, "the program listens as ada")
            await nats.publish(*(("discoveries.insights", payload(n, agent_id=name)) for n, name in AGENTS))
            await eventually(lambda: "grace" in printed.read_text(), "the program prints what grace shared")
        assert printed.read_text() == "grace unusual login pattern 2\n", "and not what ada did"


AGENTS = ((1, "ada"), (2, "grace"))


@shows("README.md", "NATS_URL=nats://127.0.0.1:4222 sse-trio serve", "NATS_URL=nats://127.0.0.1:4222 hypercorn")
async def test_the_readmes_servers_serve_and_end_as_it_says(snippet: str, nats: NatsServer, tmp_path: Path) -> None:
    await serves(moved(snippet, (":4222", f":{nats.port}")), nats, tmp_path)


@shows("docs/proxies.md", "SSE_TRUSTED_PROXIES=")
async def test_the_server_behind_a_proxy_serves(snippet: str, nats: NatsServer, tmp_path: Path) -> None:
    await serves(snippet, nats, tmp_path)


async def serves(command: str, nats: NatsServer, tmp_path: Path) -> None:
    """The command is a server that a discovery passes through, and that ends with a goodbye, in time and with 0."""
    port = free_port()
    line = shell(moved(command, (":3000", f":{port}")))
    async with run_server(tmp_path, nats_url=nats.url, command=line, port=port, env=SHELL_ENVIRONMENT) as server:
        await eventually(server.is_live, "the feed is live")
        async with listen(port) as client:
            await client.next("connected")
            await nats.publish(("discoveries.insights", payload()))
            await client.next("discovery")
            server.process.send_signal(signal.SIGTERM)
            assert json.loads((await client.next("goodbye")).data) == {"reason": "shutdown"}
            await client.read_to_end()
            assert client.ended
        assert await server.exited(ENDS_WITHIN) == 0, server.output


@not_run("README.md", "pip install .", why="the build backend comes from a registry")
async def test_the_readmes_install_goes_as_far_as_pip_gets_without_a_registry(snippet: str) -> None:
    await asks_the_registry_for(snippet, "hatchling")


async def asks_the_registry_for(command: str, what: str) -> None:
    """pip understands the command and the files that it names, up to where it would ask a registry."""
    done = await run_shell(f"{command} --no-index --dry-run --ignore-installed")
    assert done.returncode == 1
    assert f"No matching distribution found for {what}" in done.stderr, done.stderr


# -- docs: what is said of the stream and of tokens --------------------------------------------------------------------


@shows("docs/events.md", "retry: 3127", "event: discovery", "event: gap", "event: cursor", "retry: 4210")
def test_the_frames_in_the_pages_are_written_so_byte_by_byte(snippet: str) -> None:
    fields = dict(line.split(": ", 1) for line in snippet.splitlines())
    data = json.loads(fields["data"])
    id, retry = fields.get("id", ""), int(fields.get("retry", 0))
    written = {
        "connected": lambda: sse.connected(**data, retry=retry, id=id),
        "discovery": lambda: sse.discovery(build(a_discovery(content="unusual login pattern")).uri, id),
        "gap": lambda: sse.gap(**data, id=id),
        "cursor": lambda: sse.cursor(id),
        "goodbye": lambda: sse.goodbye(**data, retry=retry),
    }[fields["event"]]()
    # 2009-02-13T23:31:30Z, the time in the URI, is what our sample discovery has.
    assert written.decode() == f"{snippet}\n"


@shows("docs/security.md", "import time")
async def test_the_token_of_the_page_opens_what_it_says_and_nothing_else(
    snippet: str, nats: NatsServer, tmp_path: Path
) -> None:
    made: dict[str, Any] = {}
    exec(snippet, made)
    (secret,) = re.findall(r'jwt\.encode\(claims, "(.*?)"', snippet)
    async with run_server(tmp_path, nats_url=nats.url, env={"SSE_JWT_SECRET": secret}) as server:
        bearer = {"Authorization": f"Bearer {made['token']}"}
        async with listen(server.port, "dashboard-7", headers=bearer) as client:
            await client.next("connected")
            assert client.status == 200
        for agent_id, headers, status in (("someone", bearer, 403), ("dashboard-7", {}, 401)):
            async with listen(server.port, agent_id, headers=headers) as client:
                await client.read_until(lambda: bool(client.status), "the refusal")
                assert client.status == status


@shows("docs/architecture.md", "NATS ── nats_feed")
def test_the_names_in_the_picture_of_the_way_are_those_of_the_code(snippet: str) -> None:
    dotted = re.findall(r"\b(\w+)\.(\w+)\b", snippet)
    assert len(dotted) > 5
    for module, name in dotted:
        names = vars(importlib.import_module(f"sse_trio.{module}"))
        classes = [found for found in names.values() if inspect.isclass(found)]
        assert name in names or any(hasattr(found, name) for found in classes), f"{module}.{name}"
    for module in set(re.findall(r"─ (\w+) [─┬]", snippet)):
        importlib.import_module(f"sse_trio.{module}")


# -- docs: proxies, and deploying --------------------------------------------------------------------------------------


@shows("docs/proxies.md", "upstream sse_trio {", "defaults\n", "sse.example.org {")
def test_the_configuration_of_each_proxy_is_what_the_tests_of_proxies_run(snippet: str, tmp_path: Path) -> None:
    languages = {"nginx": "nginx", "haproxy": "haproxy", "caddy": "caddyfile"}
    (name,) = [name for name in test_proxies.PROXIES if test_proxies.snippet(languages[name]) == snippet]
    configured = test_proxies.configuration(name, True, tmp_path, port=1, upstream=2)
    for line in snippet.splitlines():
        if not re.search(r"443|3000|sse\.example\.org", line):
            assert f"{line}\n" in configured


@not_run("docs/deploying.md", "docker build", why="no container engine")
def test_the_image_is_built_of_files_that_exist(snippet: str) -> None:
    words = snippet.split()
    file, tag, context = words[words.index("-f") + 1], words[words.index("-t") + 1], words[-1]
    assert (ROOT / file).samefile(DEPLOY / "Dockerfile")
    assert (ROOT / context / "pyproject.toml").exists(), "the context is the repository"
    assert f" {tag}\n" in f"{(ROOT / 'docs/deploying.md').read_text()}\n"
    lint(BIN / "hadolint", ROOT / file)


@not_run("docs/deploying.md", "docker run", why="no container engine")
def test_the_container_is_run_with_its_port_and_a_setting(snippet: str) -> None:
    words = snippet.split()
    port = words[words.index("-p") + 1].rpartition(":")[2]
    assert instruction("CMD")[-1].endswith(f":{port}")
    assert re.search(rf"^EXPOSE {port}$", DOCKERFILE, re.MULTILINE)
    assert words[words.index("-e") + 1].partition("=")[0] in SETTINGS
    (build_command,) = [found.text for found in snippets("docs/deploying.md") if found.text.startswith("docker build")]
    assert f"-t {words[-1]} " in build_command


@not_run("docs/deploying.md", "SSE_JWT_SECRET=", why="no container engine")
def test_the_compose_file_takes_the_secret_from_the_environment(snippet: str) -> None:
    variable = snippet.partition("=")[0]
    words = snippet.split()
    file = ROOT / words[words.index("-f") + 1]
    environment = yaml.safe_load(file.read_text())["services"]["sse-trio"]["environment"]
    assert variable in SETTINGS
    assert f"${{{variable}" in str(environment[variable])
    lint(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", file)


LOCK = "python -m piptools compile --generate-hashes"
LOCKS = f"{LOCK} --strip-extras", f"{LOCK} --no-emit-options --only-build-deps"


@not_run("docs/deploying.md", *LOCKS, why="it asks a registry")
def test_the_locks_are_what_the_command_would_write(snippet: str) -> None:
    words = snippet.split()
    assert (ROOT / words[-1]).exists()
    lock = (ROOT / words[words.index("-o") + 1]).read_text()
    pins = re.findall(r"^[\w.-]+(?:\[\S+\])?==\S+", lock, re.MULTILINE)
    assert pins
    assert ("--generate-hashes" in words) == ("--hash=sha256:" in lock)
    if "--strip-extras" in words:
        assert not any("[" in pin for pin in pins)
    assert "--no-emit-options" in words
    assert not re.search(r"^--", lock, re.MULTILINE)


@shows("docs/deploying.md", "python3 -m venv /opt/sse-trio")
async def test_the_environment_is_made_where_the_unit_looks_for_it(snippet: str, tmp_path: Path) -> None:
    done = await run_shell(moved(snippet, ("/opt/", f"{tmp_path}/opt/")))
    assert done.returncode == 0, done.stderr
    (program,) = re.findall(r"^ExecStart=(\S+)", (DEPLOY / "sse-trio.service").read_text(), re.MULTILINE)
    assert Path(f"{tmp_path}{program}").parent.joinpath("pip").exists()


@not_run("docs/deploying.md", "/opt/sse-trio/bin/pip install --require-hashes", why="it asks a registry")
async def test_the_lock_installs_as_far_as_pip_gets_without_a_registry(snippet: str) -> None:
    (first, *_) = re.findall(r"^[\w.-]+==[^\s;]+", (DEPLOY / "requirements.txt").read_text(), re.MULTILINE)
    await asks_the_registry_for(moved(snippet, ("/opt/sse-trio/bin/", f"{BIN}/")), first)


@not_run("docs/deploying.md", "/opt/sse-trio/bin/pip install --no-deps .", why="it asks a registry")
async def test_the_package_installs_as_far_as_pip_gets_without_a_registry(snippet: str) -> None:
    await asks_the_registry_for(moved(snippet, ("/opt/sse-trio/bin/", f"{BIN}/")), "hatchling")


@shows("docs/deploying.md", "cp examples/deploy/sse-trio.service")
async def test_the_unit_is_put_where_systemd_finds_and_enables_it(snippet: str, tmp_path: Path) -> None:
    await install_unit(snippet, tmp_path)


async def install_unit(copy: str, root: Path) -> None:
    folder = root / "etc" / "systemd" / "system"
    folder.mkdir(parents=True)
    done = await run_shell(moved(copy, ("/etc/", f"{root}/etc/")))
    assert done.returncode == 0, done.stderr
    assert (folder / "sse-trio.service").read_bytes() == (DEPLOY / "sse-trio.service").read_bytes()


@not_run("docs/deploying.md", "systemctl enable --now", why="no running systemd, so without --now")
async def test_the_unit_is_enabled_by_the_name_it_has(snippet: str, tmp_path: Path) -> None:
    (copy,) = [found.text for found in snippets("docs/deploying.md") if found.text.startswith("cp ")]
    await install_unit(copy, tmp_path)
    assert which("systemctl"), "systemctl is not installed (apt-get install systemd)"
    done = await run_shell(moved(snippet, ("enable --now", f"--root={tmp_path} enable")))
    assert done.returncode == 0, done.stderr
    enabled = [link.name for link in tmp_path.glob("etc/systemd/system/*.wants/*")]
    assert enabled == ["sse-trio.service"]


# -- docs: teardown ----------------------------------------------------------------------------------------------------


class Hub:
    """What the guide's snippets take for granted: a registry, and the latest frame for whoever is in it."""

    def __init__(self) -> None:
        self.clients: dict[int, Any] = {}
        self.frame = b""

    def register(self) -> Any:
        client = Client()
        self.clients[client.id] = client
        return client

    def unregister(self, client: Any) -> None:
        del self.clients[client.id]

    def publish(self, frame: bytes) -> None:
        self.frame = frame

    async def stream_to(self, client: Any, connection: Any) -> None:
        assert client in self.clients.values()
        await connection.send(self.frame)


class Client:
    id = 1

    def close(self) -> None:
        assert self.id

    def __repr__(self) -> str:
        return "<Client 1>"


class Wire:
    async def send(self, frame: bytes) -> None:
        await trio.lowlevel.checkpoint()


def assert_empty(hub: Hub) -> None:
    assert not hub.clients, "in the registry"


GUIDE = "docs/teardown.md"
TRAP, PATTERN, TEST = "async def serve(hub", "from contextlib import contextmanager", "from sse_trio.testing import"


def of_guide(start: str) -> str:
    (found,) = [snippet.text for snippet in snippets(GUIDE) if snippet.text.startswith(start)]
    return found


async def run_guides_test(hub: type[Hub], serve_one_client: Any, clock: MockClock) -> None:
    """The guide's own test, of this hub and this client."""
    names: dict[str, Any] = {"Hub": hub, "serve_one_client": serve_one_client}
    names |= {"assert_empty": assert_empty, "trio": trio}
    exec(of_guide(TEST), names)
    await names["test_a_client_leaves_nothing"](clock)


@shows(GUIDE, TRAP)
async def test_the_guides_first_trap_is_one_and_the_guides_test_finds_it(
    snippet: str, autojump_clock: MockClock
) -> None:
    names: dict[str, Any] = {}
    exec(snippet, names)

    async def serve_one_client(hub: Hub) -> None:
        await names["serve"](hub, Wire())

    with pytest.raises(TeardownError, match="in the registry"):
        await run_guides_test(Hub, serve_one_client, autojump_clock)


@shows(GUIDE, PATTERN, TEST)
async def test_the_guides_pattern_leaves_nothing_by_the_guides_own_test(
    snippet: str, autojump_clock: MockClock
) -> None:
    names: dict[str, Any] = {"Client": Client}
    exec(of_guide(PATTERN), names)

    class Patterned(Hub):
        subscribe = names["subscribe"]

    entered = []

    async def serve_one_client(hub: Any) -> None:
        with hub.subscribe() as client:
            entered.append(client)
            assert list(hub.clients.values()) == [client]
            await hub.stream_to(client, Wire())

    await run_guides_test(Patterned, serve_one_client, autojump_clock)
    assert len(entered) > 2, "cancelled at several steps, and once not at all"


@shows(GUIDE, "TeardownError:")
async def test_what_the_guide_quotes_is_what_the_harness_says_of_the_same_trap_in_the_lab(
    snippet: str, autojump_clock: MockClock
) -> None:
    """`…` stands for anything; the numbers of steps and lines may move."""
    with pytest.raises(TeardownError) as raised:
        await at_every_step(Lab(stream=PoliteGoodbye))
    said = f"TeardownError: {raised.value}\n".replace(f"{ROOT}/", "")
    quoted = re.escape(snippet).replace("…", r"(?s:.*?)")
    assert re.match(re.sub(r"\b(step|line)\\ \d+", r"\1\\ \\d+", quoted), said), said


@shows(GUIDE, "with trio.move_on_after(30) as scope:")
@pytest.mark.parametrize(("asked", "thrown_away"), [("cancel_called", True), ("cancelled_caught", False)])
async def test_a_frame_that_comes_just_in_time_is_lost_by_the_guides_trap_and_kept_by_its_pattern(
    snippet: str, asked: str, thrown_away: bool, autojump_clock: MockClock
) -> None:
    kept_alive = []

    async def receive() -> str:
        """A frame that arrives at the deadline, when the receive is past being cancelled."""
        with trio.CancelScope(shield=True):
            await trio.sleep(30)
        return "a frame"

    async def send_keep_alive() -> None:
        kept_alive.append(True)

    names: dict[str, Any] = {"trio": trio, "channel": SimpleNamespace(receive=receive)}
    names["send_keep_alive"] = send_keep_alive
    code = textwrap.indent(moved(snippet, ("cancel_called", asked)), "    ")
    exec(f"async def trap():\n{code}    return frame\n", names)
    assert await names["trap"]() == "a frame"
    assert bool(kept_alive) is thrown_away


@shows(GUIDE, "async with self.send_lock:")
def test_the_lines_of_hypercorn_that_the_guide_quotes_are_in_it(snippet: str) -> None:
    source = inspect.getsource(hypercorn.trio.tcp_server)
    assert any(textwrap.indent(snippet, depth * " ") in source for depth in range(4, 20, 4))


# -- the benchmark -----------------------------------------------------------------------------------------------------


@shows("benchmarks/README.md", "python -m benchmarks --smoke")
async def test_the_benchmarks_smoke_run_measures_and_writes(snippet: str, tmp_path: Path) -> None:
    done = await run_shell(f"{snippet} --no-install --contenders floor sse-trio --out {tmp_path}", within=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout
    measured = {sample["contender"] for sample in json.loads((tmp_path / "results.json").read_text())["samples"]}
    assert measured == {"floor", "sse-trio"}


LONG = "python -m benchmarks", "python -m benchmarks --curves", "python -m benchmarks --full"


@not_run("benchmarks/README.md", *LONG, why="a quarter of an hour to hours")
async def test_the_long_runs_of_the_benchmark_have_a_plan(snippet: str, tmp_path: Path) -> None:
    done = await run_shell(f"{snippet} --no-install --only nothing --out {tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "results.json").read_text())["mode"] == (snippet.partition(" --")[2] or "quick")


def test_every_snippet_of_every_page_is_run() -> None:
    """One that nobody has taken is new: give it a test, from the page (`shows`)."""
    unknown = [found for page in PAGES for found in snippets(page) if found not in TAKEN]
    assert unknown == []
