"""Real proxies before the real server: nginx, HAProxy and Caddy, as docs/proxies.md configures them and out of the box.

The snippets are read from the documentation; only ports, names and certificates are replaced. Clients speak HTTP/1.1
and HTTP/2 over TLS, and a Chromium stands behind each proxy.
"""

from __future__ import annotations

import json
import re
import signal
import ssl
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import provision
import pytest
import trio
import trustme
from chromium import run_chromium
from http2 import Http2Stream
from support import WITHIN, NatsServer, RawStream, Server, eventually, free_port, payload, run_server
from test_attacks import SECRET, token

DOCUMENTATION = Path(__file__).parents[1] / "docs" / "proxies.md"

CLIENT = "127.0.0.5"
"""Where clients come from; the proxies themselves come from 127.0.0.1."""

LARGEST_DELAY = 1.0
"""Seconds from publishing to reading, on a machine that may be busy. What was measured is in the documentation."""

NOTICED_WITHIN = 10.0
"""Seconds in which a disconnect must be noticed, on a machine that may be busy; without noticing, the next keep-alive
would show it, which is three times as late."""


@cache
def authority() -> trustme.CA:
    return trustme.CA()


def certificate(directory: Path) -> tuple[Path, Path, Path]:
    """Certificate, key, and both in one file, for localhost."""
    issued = authority().issue_cert("localhost")
    chain, key, both = directory / "cert.pem", directory / "key.pem", directory / "both.pem"
    issued.private_key_pem.write_to_path(key)
    issued.private_key_and_cert_chain_pem.write_to_path(both)
    for pem in issued.cert_chain_pems:
        pem.write_to_path(chain, append=True)
    return chain, key, both


def snippet(language: str) -> str:
    """The documentation's one code block in this language."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", DOCUMENTATION.read_text(), re.DOTALL | re.MULTILINE)
    return str(found)


def changed(text: str, *changes: tuple[str, str]) -> str:
    """The text with each replacement made, each of which must find its place."""
    for old, new in changes:
        assert old in text, f"the documentation no longer says {old!r}"
        text = text.replace(old, new)
    return text


@dataclass
class Proxy:
    """A proxy that runs, and how to reach it."""

    port: int
    tls: bool
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://localhost:{self.port}"

    @asynccontextmanager
    async def listen(
        self, *, http2: bool = False, cursor: str | None = None, agent_id: str = "agent-1", **headers: str
    ) -> AsyncIterator[RawStream]:
        """A stream through the proxy; the connection closes with the block."""
        path = f"/discoveries/stream?agent_id={agent_id}"
        fields = {"accept": "text/event-stream"} | {k.replace("_", "-"): v for k, v in headers.items()}
        if cursor is not None:
            fields["last-event-id"] = cursor
        socket = await trio.open_tcp_stream("127.0.0.1", self.port, local_address=CLIENT)
        try:
            stream: Any = socket
            if self.tls:
                context = ssl.create_default_context()
                authority().configure_trust(context)
                context.set_alpn_protocols(["h2" if http2 else "http/1.1"])
                stream = trio.SSLStream(socket, context, server_hostname="localhost", https_compatible=True)
                await stream.do_handshake()
                assert stream.selected_alpn_protocol() in ("h2" if http2 else "http/1.1", None)
            if http2:
                client = Http2Stream(stream)
                await client.request(f"localhost:{self.port}", path, fields)
                yield client
            else:
                lines = "".join(f"{k}: {v}\r\n" for k, v in fields.items())
                await stream.send_all(f"GET {path} HTTP/1.1\r\nHost: localhost:{self.port}\r\n{lines}\r\n".encode())
                yield RawStream(stream)
        finally:
            socket.socket.close()


NGINX = """
daemon off; user root; worker_processes 1; pid {directory}/nginx.pid; error_log {directory}/error.log;
events {{ worker_connections 512; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy; fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi; scgi_temp_path {directory}/scgi;
    {servers}
}}
"""

OUT_OF_THE_BOX = {
    "nginx": "server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://127.0.0.1:{upstream}; }} }}",
    "haproxy": (
        "defaults\n mode http\n timeout connect 5s\n timeout client 60s\n timeout server 60s\n"
        "frontend f\n bind 127.0.0.1:{port}\n default_backend b\nbackend b\n server s 127.0.0.1:{upstream}\n"
    ),
    "caddy": "http://localhost:{port} {{\n reverse_proxy 127.0.0.1:{upstream}\n}}\n",
}


def configuration(name: str, documented: bool, directory: Path, port: int, upstream: int) -> str:
    """The whole configuration file: the documentation's snippet, or the least that the proxy asks for."""
    text = OUT_OF_THE_BOX[name].format(port=port, upstream=upstream)
    if documented:
        chain, key, both = certificate(directory)
        ours = ("127.0.0.1:3000", f"127.0.0.1:{upstream}")
        files = (("/etc/ssl/sse.example.org.crt", str(chain)), ("/etc/ssl/sse.example.org.key", str(key)))
        if name == "nginx":
            text = changed(snippet("nginx"), ours, *files, ("listen 443 ", f"listen 127.0.0.1:{port} "))
        elif name == "haproxy":
            pem = ("/etc/ssl/sse.example.org.pem", str(both))
            text = changed(snippet("haproxy"), ours, pem, ("bind :443 ", f"bind 127.0.0.1:{port} "))
        else:
            text = changed(snippet("caddyfile"), ours, *files, ("sse.example.org {", f"https://localhost:{port} {{"))
    if name == "nginx":
        return NGINX.format(directory=directory, servers=text)
    if name == "caddy":
        return "{\n admin off\n auto_https disable_redirects\n default_bind 127.0.0.1\n}\n" + text
    return text


@asynccontextmanager
async def proxy(name: str, directory: Path, upstream: int, *, documented: bool = True) -> AsyncIterator[Proxy]:
    """The proxy before the server on port `upstream`; gone when the block ends."""
    program = provision.which(name)
    assert program, f"{name} is not installed (apt-get install {name})"
    directory.mkdir()
    port = free_port()
    file = directory / "proxy.conf"
    file.write_text(configuration(name, documented, directory, port, upstream))
    command = {
        "nginx": [program, "-c", str(file), "-e", str(directory / "error.log")],
        "haproxy": [program, "-db", "-q", "-f", str(file)],
        "caddy": [program, "run", "--config", str(file), "--adapter", "caddyfile"],
    }[name]
    log = directory / "output.log"
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(directory), "XDG_DATA_HOME": str(directory)}
    environment["XDG_CONFIG_HOME"] = str(directory)
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)

    async def is_up() -> bool:
        assert process.poll() is None, f"{name} ended:\n{log.read_text()}\n{file.read_text()}"
        try:
            await (await trio.open_tcp_stream("127.0.0.1", port)).aclose()
        except OSError:
            return False
        return True

    try:
        await eventually(is_up, f"{name} listens")
        yield Proxy(port, documented, process)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


PROXIES = ["nginx", "haproxy", "caddy"]
WAYS = [
    pytest.param(name, documented, http2, id=f"{name}-{'documented' if documented else 'as-it-comes'}-{version}")
    for name in PROXIES
    for documented, http2, version in ((True, True, "http2-tls"), (True, False, "http1-tls"), (False, False, "http1"))
]
TRUSTED = {"SSE_TRUSTED_PROXIES": "127.0.0.1"}


async def streams_of(server: Server) -> list[dict[str, Any]]:
    """Who is connected, asked past the proxy."""
    status, body = await server.get("/clients")
    assert status == 200, body
    return list(body["clients"])


async def nobody_is_there(server: Server) -> bool:
    return not await streams_of(server)


@pytest.mark.parametrize(("name", "documented", "http2"), WAYS)
async def test_events_come_one_by_one_and_a_disconnect_is_noticed(
    nats: NatsServer, tmp_path: Path, name: str, documented: bool, http2: bool
) -> None:
    async with (
        run_server(tmp_path, nats_url=nats.url, env=TRUSTED) as server,
        proxy(name, tmp_path / name, server.port, documented=documented) as front,
    ):
        await eventually(server.is_live, "the feed is live")
        async with front.listen(http2=http2, x_forwarded_for="6.6.6.6", forwarded="for=6.6.6.6") as client:
            await client.next("connected")
            assert client.status == 200
            assert client.headers["content-type"] == "text/event-stream"
            assert "content-encoding" not in client.headers
            delays = []
            for number in range(20):
                began = trio.current_time()
                await nats.publish(("discoveries.insights", payload(number)))
                await client.next("discovery")
                delays.append(trio.current_time() - began)
            assert max(delays) < LARGEST_DELAY, delays
            (known,) = await streams_of(server)
            if documented:
                assert known["address"] == CLIENT, (
                    "the proxy says who it is, and what the client made up is not believed"
                )
        left = trio.current_time()

        async def is_noticed() -> bool:
            if name == "haproxy" and not documented:
                # Without `option abortonclose` it looks at its client only when it has something to write.
                await nats.publish(("discoveries.insights", payload()))
            return not await streams_of(server)

        await eventually(is_noticed, "the disconnect is noticed", within=NOTICED_WITHIN)
        noticed = trio.current_time() - left
    print(f"\n{name} documented={documented} http2={http2}: largest delay {max(delays) * 1000:.1f} ms, ", end="")
    print(f"disconnect noticed after {noticed * 1000:.0f} ms")


@pytest.mark.parametrize("name", PROXIES)
async def test_a_stream_that_is_left_on_a_connection_that_stays_is_noticed(
    nats: NatsServer, tmp_path: Path, name: str
) -> None:
    async with (
        run_server(tmp_path, nats_url=nats.url) as server,
        proxy(name, tmp_path / name, server.port) as front,
        front.listen(http2=True) as client,
    ):
        assert isinstance(client, Http2Stream)
        await client.next("connected")
        await client.leave()
        await eventually(lambda: nobody_is_there(server), "the disconnect is noticed", within=NOTICED_WITHIN)


@pytest.mark.parametrize(("name", "documented", "http2"), WAYS)
async def test_a_drain_reaches_the_client_and_it_resumes_at_the_next_server_without_loss(
    nats: NatsServer, tmp_path: Path, name: str, documented: bool, http2: bool
) -> None:
    port = free_port()
    async with proxy(name, tmp_path / name, port, documented=documented) as front:
        async with (
            run_server(tmp_path, nats_url=nats.url, port=port) as first,
            front.listen(http2=http2) as client,
        ):
            await client.next("connected")
            await eventually(first.is_live, "the feed is live")
            for number in range(3):
                await nats.publish(("discoveries.insights", payload(number)))
            seen = [(await client.next("discovery")).id for _ in range(3)]
            first.process.send_signal(signal.SIGTERM)
            goodbye = await client.next("goodbye")
            assert json.loads(goodbye.data) == {"reason": "shutdown"}
            assert client.decoder.retry is not None
            await client.read_to_end()
            assert await first.exited() == 0
        for number in range(3, 6):
            await nats.publish(("discoveries.insights", payload(number)))
        async with (
            run_server(tmp_path, nats_url=nats.url, port=port) as second,
            front.listen(http2=http2, cursor=seen[-1]) as client,
        ):
            await eventually(second.is_live, "the feed is live again")
            connected = await client.next("connected")
            assert json.loads(connected.data)["resumed"] is not False
            seen += [(await client.next("discovery")).id for _ in range(3)]
    epochs, numbers = zip(*(cursor.rsplit("-", 1) for cursor in seen), strict=True)
    assert len(set(epochs)) == 1
    assert [int(number) for number in numbers] == list(range(int(numbers[0]), int(numbers[0]) + 6))


@pytest.mark.parametrize("name", PROXIES)
async def test_a_stream_asked_for_while_the_server_is_away_is_never_refused(
    nats: NatsServer, tmp_path: Path, name: str
) -> None:
    port = free_port()
    async with proxy(name, tmp_path / name, port) as front, front.listen(http2=True) as client:
        if name == "nginx":  # it cannot wait; it says when to come back
            assert json.loads((await client.next("goodbye")).data) == {"reason": "shutdown"}
            assert client.decoder.retry == 3000
            assert client.status == 200
            return
        async with run_server(tmp_path, nats_url=nats.url, port=port):
            await client.next("connected")
            assert client.status == 200


PAGE = """
url => {
    const seen = window.seen = {events: [], opened: 0, errors: 0, closed: 0};
    const source = window.source = new EventSource(url);
    source.onopen = () => { seen.opened += 1; };
    source.onerror = () => { seen.errors += 1; if (source.readyState === EventSource.CLOSED) seen.closed += 1; };
    source.addEventListener("discovery", event => seen.events.push([event.lastEventId, Date.now() / 1000]));
}
"""


@pytest.mark.parametrize("name", PROXIES)
async def test_a_browser_behind_the_proxy_lives_through_a_restart_of_the_server_without_loss(
    nats: NatsServer, tmp_path: Path, name: str
) -> None:
    port = free_port()
    quick = {"SSE_RETRY": "200", "SSE_DRAIN_WINDOW": "0"}

    async def seen() -> dict[str, Any]:
        return dict(await chromium.do(lambda: page.evaluate("() => window.seen")))

    async def has_seen(count: int) -> bool:
        return len((await seen())["events"]) >= count

    async def is_open() -> bool:
        return bool((await seen())["opened"])

    with run_chromium() as chromium:
        page = await chromium.do(lambda: chromium.browser.new_context(ignore_https_errors=True).new_page())
        async with proxy(name, tmp_path / name, port) as front:
            async with run_server(tmp_path, nats_url=nats.url, port=port, env=quick) as first:
                await eventually(first.is_live, "the feed is live")
                await chromium.do(lambda: page.goto(f"{front.url}/livez"))
                await chromium.do(lambda: page.evaluate(PAGE, "/discoveries/stream?agent_id=browser"))
                await eventually(is_open, "the browser is connected")
                published = []
                for number in range(5):
                    published.append(time.time())
                    await nats.publish(("discoveries.insights", payload(number)))
                    await eventually(partial(has_seen, number + 1), "the event is there")
                first.process.send_signal(signal.SIGTERM)
                assert await first.exited() == 0
            for number in range(5, 10):
                await nats.publish(("discoveries.insights", payload(number)))
            async with run_server(tmp_path, nats_url=nats.url, port=port, env=quick):
                await eventually(partial(has_seen, 10), "the browser is back and has what it missed", 2 * WITHIN)
                at_last = await seen()
                await chromium.do(lambda: page.evaluate("() => window.source.close()"))
    assert at_last["closed"] == 0, "EventSource never gave up"
    delays = [arrived - sent for sent, (_, arrived) in zip(published, at_last["events"], strict=False)]
    assert max(delays) < LARGEST_DELAY, delays
    print(f"\n{name} to Chromium: largest delay {max(delays) * 1000:.1f} ms")
    numbers = [int(cursor.rsplit("-", 1)[1]) for cursor, _ in at_last["events"]]
    assert numbers == list(range(numbers[0], numbers[0] + 10))


@pytest.mark.parametrize("name", PROXIES)
async def test_a_browser_presents_its_token_in_the_secure_cookie_and_gets_nothing_without(
    nats: NatsServer, tmp_path: Path, name: str
) -> None:
    env = TRUSTED | {"SSE_JWT_SECRET": SECRET, "SSE_ALLOWED_ORIGINS": "https://app.example"}
    cookie = {"name": "__Secure-sse_trio", "secure": True, "httpOnly": True, "sameSite": "Strict"}
    stream = "/discoveries/stream?agent_id=a-1"

    async def seen() -> dict[str, Any]:
        return dict(await chromium.do(lambda: page.evaluate("() => window.seen")))

    async def is_refused() -> bool:
        return bool((await seen())["closed"])

    async def has_an_event() -> bool:
        return bool((await seen())["events"])

    with run_chromium() as chromium:
        window = await chromium.do(lambda: chromium.browser.new_context(ignore_https_errors=True))
        page = await chromium.do(window.new_page)
        async with (
            run_server(tmp_path, nats_url=nats.url, env=env) as server,
            proxy(name, tmp_path / name, server.port) as front,
        ):
            await eventually(server.is_live, "the feed is live")
            await chromium.do(lambda: page.goto(f"{front.url}/livez"))
            await chromium.do(lambda: page.evaluate(PAGE, stream))
            await eventually(is_refused, "who has no token is refused")
            value = token(agent_ids=["a-*"], subjects=["discoveries.insights"])
            given: Any = [cookie | {"value": value, "url": front.url}]
            await chromium.do(lambda: window.add_cookies(given))
            await chromium.do(lambda: page.evaluate(PAGE, stream))
            await eventually(lambda: "client connected" in server.output, "the browser is connected")
            await nats.publish(("discoveries.questions", payload(1)), ("discoveries.insights", payload(2)))
            await eventually(has_an_event, "it hears what it may")
            # Its own page may share, but not with the cookie: that counts for GET only.
            share = (
                "body => fetch('/discoveries', {method: 'POST', headers: {'Content-Type': 'application/json'}, body})"
            )
            status = await chromium.do(lambda: page.evaluate(f"async body => (await ({share})(body)).status", "{}"))
            assert status == 401
            assert len((await seen())["events"]) == 1
            assert value not in server.output
