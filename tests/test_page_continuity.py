"""The live page when things break, and when there are many of it: nothing missing, nothing twice, one connection.

Real Chromium, real server, real nats-server. The rows' event ids are what is judged: with JetStream they are the
stream's sequence numbers, so a hole or a double shows in them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from chromium import DEADLINE, Chromium, Tab, clients_of, open_window, run_chromium, share
from playwright.sync_api import Route, expect
from support import NatsServer, Server, eventually, free_port, run_server


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    with run_chromium() as browser:
        yield browser


async def numbers(tab: Tab) -> list[int]:
    """The stream sequences of the tab's rows, oldest first."""
    return [int(id.rpartition("-")[2]) for id in await tab.ids()]


QUICK = {"SSE_RETRY": "200", "SSE_DRAIN_WINDOW": "0"}


async def test_a_restarted_server_leaves_no_hole_and_no_double(
    chromium: Chromium, nats: NatsServer, tmp_path: Path
) -> None:
    port = free_port()
    async with open_window(chromium) as window:
        async with run_server(tmp_path, nats_url=nats.url, port=port, env=QUICK) as server:
            tab = await window.open(server.url)
            await tab.is_live()
            await share(nats, *range(5))
            await tab.shows("#rows tr.discovery", 5)
        await tab.shows("#state[data-state=reconnecting], #state[data-state=refused]")
        await share(nats, *range(5, 9))
        async with run_server(tmp_path, nats_url=nats.url, port=port, env=QUICK) as server:
            await tab.is_live()
            await share(nats, 9)
            await tab.shows("#rows tr.discovery", 10)
            assert await numbers(tab) == list(range(1, 11))
            assert await tab.contents() == [f"unusual login pattern {number}" for number in range(10)]
            await tab.shows("tr.note[data-note=resumed]", 1)
            await tab.shows("tr.gap", 0)
            await tab.says("#reconnects", "1")
            await tab.says("#resumes", "1")


async def test_a_proxy_that_answers_502_meanwhile_does_not_end_it(
    chromium: Chromium, nats: NatsServer, tmp_path: Path
) -> None:
    """An EventSource gives up after anything but a 200; the page does not."""
    port = free_port()
    async with open_window(chromium) as window:
        async with run_server(tmp_path, nats_url=nats.url, port=port, env=QUICK) as server:
            tab = await window.open(server.url)
            await tab.is_live()
            await share(nats, 0)
            await tab.shows("#rows tr.discovery", 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer_502, port)
            await tab.shows("#state[data-state=refused]")
            nursery.cancel_scope.cancel()
        await share(nats, 1)
        async with run_server(tmp_path, nats_url=nats.url, port=port, env=QUICK):
            await tab.is_live()
            await tab.shows("#rows tr.discovery", 2)
            assert await numbers(tab) == [1, 2]
            await tab.shows("tr.gap", 0)


async def answer_502(port: int) -> None:
    """A proxy whose server is away."""

    async def answer(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):  # the browser may give it up
            await stream.receive_some()
            await stream.send_all(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    await trio.serve_tcp(answer, port, host="127.0.0.1")


async def test_on_core_nats_a_restarted_server_shows_as_a_gap(
    chromium: Chromium, core_nats: NatsServer, tmp_path: Path
) -> None:
    port = free_port()
    async with open_window(chromium) as window:
        async with run_server(tmp_path, nats_url=core_nats.url, port=port, env=QUICK) as server:
            tab = await window.open(server.url)
            await tab.is_live()
            await share(core_nats, 0, 1)
            await tab.shows("#rows tr.discovery", 2)
        async with run_server(tmp_path, nats_url=core_nats.url, port=port, env=QUICK):
            await tab.shows("tr.gap[data-reason=restart]", 1)
            await tab.is_live()
            await share(core_nats, 2)
            await tab.shows("#rows tr.discovery", 3)
            order = "rows => rows.map((row) => row.classList[0])"
            assert await tab.do(lambda page: page.eval_on_selector_all("#rows tr", order)) == [
                "discovery",
                "gap",
                "discovery",
                "discovery",
            ]
            await tab.shows("#gaps")


async def test_nats_killed_and_back_is_said_and_on_core_nats_shows_as_a_gap(
    chromium: Chromium, core_nats: NatsServer, tmp_path: Path
) -> None:
    async with run_server(tmp_path, nats_url=core_nats.url) as server, open_window(chromium) as window:
        tab = await window.open(server.url)
        await tab.is_live()
        await tab.shows("#state[data-feed=live]")
        await share(core_nats, 0)
        await tab.shows("#rows tr.discovery", 1)
        core_nats.kill()
        await tab.shows("#state[data-feed=down]")
        await tab.says("#state-text", "No feed")
        await tab.do(
            lambda page: expect(page.locator("#announcer")).to_contain_text("No feed", timeout=DEADLINE)
        )  # screen readers hear it too
        await core_nats.start()
        await tab.shows("tr.gap[data-reason=upstream]", 1)
        await tab.shows("#state[data-feed=live]")
        await share(core_nats, 1)
        await tab.shows("#rows tr.discovery", 2)
        await tab.says("#reconnects", "0")


async def test_nats_killed_and_back_loses_nothing_with_jetstream(
    chromium: Chromium, nats: NatsServer, tmp_path: Path
) -> None:
    async with run_server(tmp_path, nats_url=nats.url) as server, open_window(chromium) as window:
        tab = await window.open(server.url)
        await tab.is_live()
        await share(nats, 0, 1)
        await tab.shows("#rows tr.discovery", 2)
        await nats.restart()
        await share(nats, 2)
        await tab.shows("#rows tr.discovery", 3)
        assert await numbers(tab) == [1, 2, 3]
        await tab.shows("tr.gap", 0)


async def test_eight_tabs_have_one_connection_and_see_the_same(
    chromium: Chromium, nats: NatsServer, tmp_path: Path
) -> None:
    async with run_server(tmp_path, nats_url=nats.url) as server, open_window(chromium) as window:
        tabs = [await window.open(server.url) for _ in range(8)]
        for tab in tabs:
            await tab.is_live()
        await share(nats, *range(6))
        for tab in tabs:
            await tab.shows("#rows tr.discovery", 6)
            assert await numbers(tab) == [1, 2, 3, 4, 5, 6]
            assert await tab.contents() == [f"unusual login pattern {number}" for number in range(6)]
        assert len(await clients_of(server)) == 1
        roles = [await tab.do(lambda page: page.get_attribute("#tabs", "data-tab")) for tab in tabs]
        assert sorted(roles, key=str) == ["follower"] * 7 + ["leader"]


async def find_leader(tabs: list[Tab]) -> Tab | None:
    for tab in tabs:
        if await tab.do(lambda page: page.get_attribute("#tabs", "data-tab")) == "leader":
            return tab
    return None


async def test_when_the_leading_tab_goes_another_takes_over_without_hole_or_double(
    chromium: Chromium, nats: NatsServer, tmp_path: Path
) -> None:
    async with run_server(tmp_path, nats_url=nats.url) as server, open_window(chromium) as window:
        tabs = [await window.open(server.url) for _ in range(4)]
        for tab in tabs:
            await tab.is_live()
        published = 0

        async def share_thirty() -> None:
            nonlocal published
            for _ in range(30):
                await share(nats, published)
                published += 1

        while len(tabs) > 1:
            leader = await eventually(lambda: find_leader(tabs), "a tab leads")
            tabs.remove(leader)
            await share(nats, published)
            published += 1
            await tabs[0].shows("#rows tr.discovery")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(share_thirty)
                nursery.start_soon(leader.close)
        await eventually(lambda: find_leader(tabs), "the last tab leads")
        [last] = tabs
        await last.is_live()
        await eventually(lambda: has_reached(last, server), "the last tab has the last discovery")
        assert await numbers(last) == list(range(1, published + 1))
        await last.shows("tr.gap", 0)
        assert len(await clients_of(server)) == 1


async def has_reached(tab: Tab, server: Server) -> bool:
    head = (await server.health())[1]["head"]
    return bool((await tab.ids())[-1:] == [head])


HANG = """
setTimeout(() => {
  const request = new XMLHttpRequest();
  request.open("GET", "hang", false);
  request.send();
});
0
"""


async def test_a_leading_tab_that_hangs_is_replaced_and_follows_when_it_is_back(
    chromium: Chromium, nats: NatsServer, tmp_path: Path
) -> None:
    """As when the system freezes a tab; here it waits for an answer that the test holds back."""
    held: list[Route] = []
    async with run_server(tmp_path, nats_url=nats.url) as server, open_window(chromium) as window:
        await chromium.do(lambda: window.context.route("**/hang", lambda route: held.append(route)))
        tabs = [await window.open(server.url) for _ in range(3)]
        for tab in tabs:
            await tab.is_live()
        await share(nats, 0)
        for tab in tabs:
            await tab.shows("#rows tr.discovery", 1)
        leader = await eventually(lambda: find_leader(tabs), "a tab leads")
        tabs.remove(leader)
        await leader.do(lambda page: page.evaluate(HANG))
        await eventually(lambda: find_leader(tabs), "another tab takes the lead from the one that hangs")
        await share(nats, 1)
        for tab in tabs:
            await tab.shows("#rows tr.discovery", 2)
        await chromium.do(lambda: held[0].fulfill(status=204))
        await leader.shows("#rows tr.discovery", 2)
        await eventually(lambda: has_clients(server, 1), "the old leader's connection is closed")
        await share(nats, 2)
        for tab in [*tabs, leader]:
            await tab.shows("#rows tr.discovery", 3)
            assert await numbers(tab) == [1, 2, 3]


async def has_clients(server: Server, number: int) -> bool:
    return len(await clients_of(server)) == number


async def test_tabs_with_different_filters_share_one_connection(
    chromium: Chromium, nats: NatsServer, tmp_path: Path
) -> None:
    async with run_server(tmp_path, nats_url=nats.url) as server, open_window(chromium) as window:
        planner = await window.open(f"{server.url}/?role=Planner")
        await planner.is_live()
        sure = await window.open(f"{server.url}/?min_confidence=0.9")
        questions = await window.open(f"{server.url}/?type=Question")
        everything = await window.open(server.url)
        for tab in (sure, questions, everything):
            await tab.is_live()
        wanted = [{"detail": "full"}]
        await eventually(lambda: are_filters(server, wanted), "the connection brings what any of them wants")
        await share(nats, 1, agent_role="Planner")
        await share(nats, 2, confidence=0.95)
        await share(nats, 3, discovery_type="Question")
        await share(nats, 4)
        await everything.shows("#rows tr.discovery", 4)
        for tab, number in ((planner, 1), (sure, 2), (questions, 3)):
            await tab.shows("#rows tr.discovery", 1)
            assert await numbers(tab) == [number]
        await everything.close()
        await sure.close()
        await questions.close()
        await eventually(lambda: are_filters(server, [{"role": ["Planner"]}]), "the connection is narrow again")
        await share(nats, 5, agent_role="Planner")
        await planner.shows("#rows tr.discovery", 2)


async def are_filters(server: Server, wanted: list[dict[str, Any]]) -> bool:
    return [client["filter"] for client in await clients_of(server)] == wanted


async def test_without_web_locks_each_tab_has_a_connection_of_its_own(
    chromium: Chromium, nats: NatsServer, tmp_path: Path
) -> None:
    script = "delete Navigator.prototype.locks"
    async with run_server(tmp_path, nats_url=nats.url) as server, open_window(chromium, script=script) as window:
        tabs = [await window.open(server.url) for _ in range(2)]
        for tab in tabs:
            await tab.is_live()
        await share(nats, 1, 2)
        for tab in tabs:
            await tab.shows("#rows tr.discovery", 2)
        assert len(await clients_of(server)) == 2
