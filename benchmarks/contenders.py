"""The contenders: how each server is started, where it is published to, and how one speaks to it.

Strategy: a contender is data: a command line, an environment, and options for the load client. All of them that
hear NATS hear the same core NATS server, started anew for each run; nchan is published to directly, which spares
it a hop. Each queues up to 1,024 events for a client and is otherwise as its documentation sets it up.
"""

from __future__ import annotations

import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from string import Template

from .needs import Tools
from .procs import running
from .turns import reset

ROOT = Path(__file__).parent.parent
HERE = Path(__file__).parent
STARTS_WITHIN = 20.0  # seconds


@dataclass(frozen=True)
class Setting:
    """Where one run takes place."""

    tools: Tools
    directory: Path
    port: int
    nats_port: int
    certificate: Path | None
    turns: Path | None = None  # where to write the event loop's longest turn, if the contender can tell


@dataclass(frozen=True)
class Contender:
    key: str
    label: str
    command: Callable[[Setting], list[str]]
    env: Mapping[str, str] = field(default_factory=dict)
    speak: tuple[str, ...] = ()  # options for the load client
    source: str = "nats"
    jetstream: bool = False
    ready: str | None = "connected"  # the event that says a client is listening
    path: str = "/discoveries/stream?agent_id=load-{n}"
    health: str | None = "/health"  # None: it has no such route

    @property
    def is_tls(self) -> bool:
        return "--tls" in self.speak


@dataclass(frozen=True)
class Running:
    """A contender that answers."""

    contender: Contender
    setting: Setting
    pid: int
    log: Path

    @property
    def source_port(self) -> int:
        return self.setting.nats_port if self.contender.source == "nats" else self.setting.port


def _sse_trio(workers: int) -> Callable[[Setting], list[str]]:
    def command(setting: Setting) -> list[str]:
        options = ["--bind", f"127.0.0.1:{setting.port}", "--workers", str(workers)]
        tls = []
        if setting.certificate is not None:
            tls = ["--certfile", str(setting.certificate), "--keyfile", str(setting.certificate)]
        instrument = ["benchmarks.turns", str(setting.turns)] if setting.turns and workers == 1 else ["sse_trio"]
        return [sys.executable, "-m", *instrument, "serve", *options, *tls]

    return command


def _baseline(setting: Setting) -> list[str]:
    bind = ["-b", f"127.0.0.1:{setting.port}", "--backlog", "4096", "--keep-alive", "60"]
    return [sys.executable, "-m", "hypercorn", "benchmarks.baseline:app", "--worker-class", "trio", *bind]


def _starlette(setting: Setting) -> list[str]:
    options = ["--port", str(setting.port), "--loop", "uvloop", "--backlog", "4096", "--log-level", "warning"]
    return [sys.executable, "-m", "uvicorn", "benchmarks.starlette_app:app", *options]


def _nchan(workers: int) -> Callable[[Setting], list[str]]:
    def command(setting: Setting) -> list[str]:
        conf = setting.directory / "nginx.conf"
        template = Template((HERE / "nchan.conf").read_text())
        words = {
            "module": str(setting.tools.nchan),
            "directory": str(setting.directory),
            "workers": str(workers),
            "files": str(resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
            "port": str(setting.port),
        }
        conf.write_text(template.safe_substitute(words))
        return ["nginx", "-p", str(setting.directory), "-c", str(conf)]

    return command


def _floor(setting: Setting) -> list[str]:
    return [str(setting.tools.floor), str(setting.port), str(setting.nats_port)]


# SSE_MAX_CONNECTIONS: the 10,000th client must be let in beside a health check.
_CORE = {"NATS_DURABLE": "off", "SSE_MAX_CONNECTIONS": "0", "LOG_LEVEL": "warning"}
_DURABLE = _CORE | {"NATS_DURABLE": "require"}

CONTENDERS = {
    contender.key: contender
    for contender in (
        Contender("sse-trio", "sse-trio", _sse_trio(1), _CORE),
        Contender("sse-trio-2", "sse-trio, 2 workers", _sse_trio(2), _CORE),
        Contender("sse-trio-js", "sse-trio, JetStream", _sse_trio(1), _DURABLE, jetstream=True),
        Contender("sse-trio-tls", "sse-trio, TLS", _sse_trio(1), _CORE, speak=("--tls",)),
        Contender("sse-trio-h2", "sse-trio, HTTP/2 over TLS", _sse_trio(1), _CORE, speak=("--tls", "--http2")),
        Contender(
            "nchan",
            "nginx + nchan",
            _nchan(1),
            source="nchan",
            ready=None,
            path="/discoveries/stream",
        ),
        Contender("starlette", "sse-starlette, uvicorn, uvloop", _starlette),
        Contender("baseline", "Quart-Trio, a generator per client", _baseline),
        Contender("floor", "bare send() loop in C", _floor, path="/", health=None),
    )
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def available(tools: Tools) -> dict[str, Contender]:
    """The contenders that can run here; `tools.missing` says why the others cannot."""
    missing = " ".join(tools.missing)
    out: set[str] = set()
    if tools.nchan is None:
        out.add("nchan")
    if "sse-starlette" in missing:
        out.add("starlette")
    if not tools.has_tls or "trustme" in missing:
        out |= {key for key, contender in CONTENDERS.items() if contender.is_tls}
    return {key: contender for key, contender in CONTENDERS.items() if key not in out}


@contextmanager
def serving(
    contender: Contender,
    tools: Tools,
    directory: Path,
    env: Mapping[str, str] | None = None,
    *,
    watched: bool = False,
) -> Iterator[Running]:
    """The contender, started and answering, with a nats-server of its own; both are gone after the block.

    `watched`: the turns of its event loop are, if it is one that can tell.
    """
    directory.mkdir(parents=True, exist_ok=True)
    turns = directory / "turns" if watched else None
    if turns is not None:
        reset(turns)
    certificate = _certificate(directory) if contender.is_tls else None
    setting = Setting(tools, directory, free_port(), free_port(), certificate, turns)
    environment = dict(contender.env) | dict(env or {})
    environment |= {"NATS_URL": f"nats://127.0.0.1:{setting.nats_port}", "NATS_PORT": str(setting.nats_port)}
    nats = [str(tools.nats_server), "-a", "127.0.0.1", "-p", str(setting.nats_port)]
    if contender.jetstream:
        nats += ["-js", "-sd", str(directory / "store")]
    log = directory / f"{contender.key}.log"
    with ExitStack() as stack:
        if contender.source == "nats":
            stack.enter_context(running(nats, directory / "nats.log"))
            _wait(lambda: _accepts(setting.nats_port), "nats-server", directory / "nats.log")
        process = stack.enter_context(running(contender.command(setting), log, environment, ROOT))

        def answers() -> bool:
            if process.poll() is not None:
                raise RuntimeError(f"{contender.label} ended with {process.returncode}:\n{log.read_text()}")
            return _accepts(setting.port) and (contender.health is None or _is_healthy(setting, contender))

        _wait(answers, contender.label, log)
        yield Running(contender, setting, process.pid, log)


def _wait(condition: Callable[[], bool], what: str, log: Path) -> None:
    deadline = time.monotonic() + STARTS_WITHIN
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} does not answer within {STARTS_WITHIN:g} s:\n{log.read_text()}")
        time.sleep(0.02)


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _is_healthy(setting: Setting, contender: Contender) -> bool:
    if contender.is_tls:
        import ssl
        from http.client import HTTPSConnection

        context = ssl.create_default_context(cafile=str(setting.certificate))
        context.check_hostname = False
        connection: HTTPConnection = HTTPSConnection("127.0.0.1", setting.port, timeout=2, context=context)
    else:
        connection = HTTPConnection("127.0.0.1", setting.port, timeout=2)
    try:
        connection.request("GET", contender.health or "/")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def _certificate(directory: Path) -> Path:
    """A certificate for 127.0.0.1 with its key and its issuer, in one file."""
    import trustme

    issuer = trustme.CA()
    issued = issuer.issue_cert("127.0.0.1")
    path = directory / "certificate.pem"
    issued.private_key_and_cert_chain_pem.write_to_path(str(path))
    issuer.cert_pem.write_to_path(str(path), append=True)
    os.chmod(path, 0o600)
    return path
