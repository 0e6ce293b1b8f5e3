"""The live page in a real Chromium, on a real server with a real nats-server: what a person sees and does there.

Each test waits for states of the page (`data-` attributes, rows, texts), never for time to pass.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from chromium import DEADLINE, Chromium, Tab, clients_of, frames, open_window, run_chromium, share
from playwright.sync_api import Page, Route, expect
from provision import node_modules
from support import NatsServer, Server, a_discovery, eventually, run_server

from sse_trio.discovery import Discovery, build

PICTURES = os.environ.get("PICTURES")
"""Where the pictures of the live page go; `PICTURES=docs` makes those of the README and the docs anew."""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    with run_chromium() as browser:
        yield browser


def expected(numbers: range) -> list[str]:
    return [f"unusual login pattern {number}" for number in numbers]


async def test_ten_discoveries_appear_in_order_and_a_closed_tab_is_gone_within_a_second(
    chromium: Chromium, nats: NatsServer, tmp_path: Path
) -> None:
    async with run_server(tmp_path, nats_url=nats.url) as server, open_window(chromium) as window:
        tab = await window.open(server.url)
        await tab.is_live()
        await share(nats, *range(10))
        await tab.shows("#rows tr.discovery", 10)
        assert await tab.contents() == expected(range(10))
        assert await tab.texts("#rows tr.gap") == []
        [client] = await clients_of(server)
        assert client["agent_id"] == (await tab.do(lambda page: page.locator("#agent-id").text_content()))
        await tab.close()
        await eventually(lambda: no_clients(server), "the closed tab is no client any more", within=1)


async def no_clients(server: Server) -> bool:
    return await clients_of(server) == []


async def test_a_row_shows_what_its_resource_says(chromium: Chromium, nats: NatsServer, tmp_path: Path) -> None:
    async with run_server(tmp_path, nats_url=nats.url) as server, open_window(chromium, locale="en-GB") as window:
        tab = await window.open(server.url)
        await tab.is_live()
        await share(nats, 1, agent_id="a/b c", discovery_type="question", confidence=0.5, shade="green")
        await tab.shows("tr.discovery[data-content=full]", 1)
        cells = await tab.texts("tr.discovery td")
        time, agent, role, kind, confidence, content = cells
        assert (agent, role, kind, confidence) == ("a/b c", "Security", "Question", "50%")
        assert "unusual login pattern 1" in content
        assert "Feb 2009" in time
        await tab.do(lambda page: page.click("tr.discovery .more"))
        facts = (await tab.texts(".facts"))[0]
        assert "shade\ngreen" in facts, "keys that we do not know are shown too"
        assert "discovery://agents/a%2Fb%20c/discoveries/1234567890-Question-unusual-login-patter" in facts


async def test_what_was_there_before_the_page_is_shown_beneath(
    chromium: Chromium, nats: NatsServer, tmp_path: Path
) -> None:
    async with run_server(tmp_path, nats_url=nats.url) as server, open_window(chromium) as window:
        await share(nats, *range(3))
        await eventually(lambda: has_listed(server, 3), "three discoveries are listed")
        tab = await window.open(server.url)
        await tab.shows("#rows tr.discovery", 3)
        await share(nats, *range(3, 6))
        await tab.shows("#rows tr.discovery", 6)
        assert await tab.contents() == expected(range(6))


async def has_listed(server: Server, number: int) -> bool:
    return len((await server.get("/discoveries"))[1]["discoveries"]) == number


@pytest.mark.parametrize(
    ("choose", "filter"),
    [
        (lambda page: page.get_by_label("Question", exact=True).check(), {"type": ["Question"]}),
        (lambda page: type_in(page, "#role", "Reviewer"), {"role": ["Reviewer"]}),
        (lambda page: type_in(page, "#agent", "wanted"), {"agent": ["wanted"]}),
        (lambda page: page.locator("#confidence").fill("0.9"), {"min_confidence": 0.9}),
    ],
    ids=["type", "role", "agent", "confidence"],
)
async def test_a_filter_shows_only_what_fits_and_asks_the_server_for_no_more(
    chromium: Chromium,
    nats: NatsServer,
    tmp_path: Path,
    choose: Callable[[Page], Any],
    filter: dict[str, Any],
) -> None:
    fitting = {"discovery_type": "Question", "agent_role": "Reviewer", "agent_id": "wanted", "confidence": 0.95}
    async with run_server(tmp_path, nats_url=nats.url) as server, open_window(chromium) as window:
        tab = await window.open(server.url)
        await tab.is_live()
        await share(nats, 0, 2)
        await share(nats, 1, 3, **fitting)
        await tab.shows("#rows tr.discovery", 4)
        await tab.do(choose)
        await tab.shows("#rows tr.discovery", 2)
        await eventually(lambda: is_asked_for(server, filter), f"the server is asked for {filter}")
        await share(nats, 4)
        await share(nats, 5, **fitting)
        await share(nats, 6)
        await share(nats, 7, **fitting)
        await tab.shows("#rows tr.discovery", 4)
        assert await tab.contents() == [f"unusual login pattern {number}" for number in (1, 3, 5, 7)]
        await tab.do(lambda page: page.click("#clear"))
        await tab.shows("#rows tr.discovery", 8)
        assert await tab.ids() == sorted(await tab.ids(), key=lambda id: int(id.rpartition("-")[2]))
        await share(nats, 8)
        await tab.shows("#rows tr.discovery", 9)
        await tab.says("#missed", "0")


def type_in(page: Page, selector: str, text: str) -> None:
    page.fill(selector, text)
    page.press(selector, "Enter")


async def is_asked_for(server: Server, filter: dict[str, Any]) -> bool:
    return [client["filter"] for client in await clients_of(server)] == [filter]


async def test_a_filter_stands_in_the_address_and_an_agent_in_a_row_can_be_picked(
    chromium: Chromium, nats: NatsServer, tmp_path: Path
) -> None:
    async with run_server(tmp_path, nats_url=nats.url) as server, open_window(chromium) as window:
        tab = await window.open(f"{server.url}/?type=Anomaly&min_confidence=0.5")
        await tab.is_live()
        await share(nats, 0, confidence=0.1)
        await share(nats, 1, agent_id="one")
        await share(nats, 2, agent_id="two")
        await tab.shows("#rows tr.discovery", 2)
        assert await tab.contents() == expected(range(1, 3))
        await tab.do(lambda page: page.get_by_role("button", name="one", exact=True).click())
        await tab.shows("#rows tr.discovery", 1)
        wanted = {"type": ["Anomaly"], "agent": ["one"], "min_confidence": 0.5}
        await eventually(lambda: is_asked_for(server, wanted), "the server is asked for all three")
        assert (await tab.do(lambda page: page.url)).endswith("/?type=Anomaly&agent=one&min_confidence=0.5")
        await tab.do(lambda page: page.get_by_label("Remove agent one from the filter").click())
        await tab.shows("#rows tr.discovery", 2)


async def test_a_pause_holds_rows_back_and_counts_them(chromium: Chromium, nats: NatsServer, tmp_path: Path) -> None:
    async with run_server(tmp_path, nats_url=nats.url) as server, open_window(chromium) as window:
        tab = await window.open(server.url)
        await tab.is_live()
        await share(nats, *range(2))
        await tab.shows("#rows tr.discovery", 2)
        before = await place_of(tab, "#sparkline")
        await tab.do(lambda page: page.click("#pause"))
        await tab.shows("#pause[aria-pressed=true]")
        await tab.says("#state-text", "Paused")
        await share(nats, *range(2, 7))
        await tab.says("#buffered", "5")
        await tab.shows("#rows tr.discovery", 2)
        assert await place_of(tab, "#sparkline") == before
        assert await tab.do(lambda page: page.title()) == "(5) Discoveries"
        await tab.do(lambda page: page.click("#pause"))
        await tab.shows("#rows tr.discovery", 7)
        await tab.says("#state-text", "Live")
        assert await tab.contents() == expected(range(7))
        assert await tab.do(lambda page: page.title()) == "Discoveries"


async def place_of(tab: Tab, selector: str) -> Any:
    return await tab.do(lambda page: page.locator(selector).first.bounding_box())


async def test_on_a_phone_the_button_that_unfolds_a_row_stays_where_it_is(
    chromium: Chromium, core_nats: NatsServer, tmp_path: Path
) -> None:
    async with (
        run_server(tmp_path, nats_url=core_nats.url) as server,
        open_window(chromium, viewport=SIZES["phone"]) as window,
    ):
        tab = await window.open(server.url)
        await tab.is_live()
        await share(core_nats, 1)
        await tab.shows("tr.discovery[data-content=full]", 1)
        folded = await place_of(tab, "tr.discovery .more")
        await tab.do(lambda page: page.click("tr.discovery .more"))
        await tab.shows("tr.discovery .facts", 1)
        assert await place_of(tab, "tr.discovery .more") == folded


async def test_a_search_finds_words_of_contents_agents_and_roles(
    chromium: Chromium, nats: NatsServer, tmp_path: Path
) -> None:
    async with run_server(tmp_path, nats_url=nats.url) as server, open_window(chromium) as window:
        tab = await window.open(server.url)
        await tab.is_live()
        await share(nats, 1, content="The certificates were rotated at NOON, says the log")
        await share(nats, 2, agent_id="noon-watcher")
        await share(nats, 3, agent_role="Planner")
        await tab.shows("#rows tr.discovery", 3)
        shown = "#rows tr.discovery:not([hidden])"
        await tab.do(lambda page: page.fill("#search", "noon"))
        await tab.shows(shown, 2)
        await tab.do(lambda page: page.fill("#search", "noon says"))
        await tab.shows(shown, 1)
        await share(nats, 4, content="noon, says a log, and arrives during the search")
        await tab.shows(shown, 2)
        await share(nats, 5)
        await tab.do(lambda page: page.fill("#search", "planner"))
        await tab.shows(shown, 1)
        await tab.do(lambda page: page.fill("#search", "nothing like it"))
        await tab.says("#empty-lead", "No discovery here matches")
        await tab.do(lambda page: page.fill("#search", ""))
        await tab.shows(shown, 5)


async def test_a_discovery_is_shared_from_the_form_and_wrong_fields_are_named(
    chromium: Chromium, nats: NatsServer, tmp_path: Path
) -> None:
    async with run_server(tmp_path, nats_url=nats.url) as server, open_window(chromium) as window:
        tab = await window.open(server.url)
        await tab.is_live()
        sent: list[str] = []
        await tab.do(lambda page: page.on("request", lambda request: sent.append(request.method)))
        await tab.do(lambda page: page.click("#share"))
        await tab.do(lambda page: page.fill("#share-confidence", "7"))
        await tab.do(lambda page: page.fill("#share-content", "Found by hand\n<b>with two lines</b>"))
        assert "POST" not in sent, "an open form asks nothing of the server"
        await tab.do(lambda page: page.click("#share-submit"))
        await tab.shows("#share-confidence[aria-invalid=true]")
        assert "1" in (await tab.texts("#error-confidence"))[0]
        assert await tab.texts("#error-content") == [""]
        await tab.do(lambda page: page.fill("#share-confidence", "0.7"))
        await tab.do(lambda page: page.click("#share-submit"))
        await tab.shows("#rows tr.discovery", 1)
        assert await tab.contents() == ["Found by hand\n<b>with two lines</b>"]
        await tab.do(lambda page: expect(page.locator("#share-dialog")).to_be_hidden(timeout=DEADLINE))
        # One that is related to it, from its own row.
        await tab.do(lambda page: page.click("tr.discovery .more"))
        await tab.do(lambda page: page.click("tr.discovery .relate"))
        await tab.do(lambda page: page.fill("#share-content", "And here is why"))
        await tab.do(lambda page: page.click("#share-submit"))
        await tab.shows("#rows tr.discovery", 2)
        await tab.says("tr.discovery .replies", "1 related discovery")
        assert "Related to" in (await tab.texts("tr.discovery .links"))[0]
        await tab.do(lambda page: page.click("[data-related-to]"))
        focused = await tab.do(lambda page: page.evaluate("document.activeElement.dataset.eventId"))
        assert focused == (await tab.ids())[0], "the link leads to the row that it names"


async def test_where_nobody_may_share_the_form_says_so(chromium: Chromium, nats: NatsServer, tmp_path: Path) -> None:
    async with (
        run_server(tmp_path, nats_url=nats.url) as server,
        open_window(chromium, extra_http_headers={"X-Forwarded-For": "203.0.113.7"}) as window,
    ):
        tab = await window.open(server.url)
        await tab.is_live()
        await tab.do(lambda page: page.click("#share"))
        await tab.do(lambda page: page.fill("#share-content", "From afar"))
        await tab.do(lambda page: page.click("#share-submit"))
        await tab.shows("#share-fields:disabled")
        assert "you can only watch" in (await tab.texts("#share-notice"))[0]


async def test_a_discovery_that_is_hostile_is_shown_as_text(
    chromium: Chromium, nats: NatsServer, tmp_path: Path
) -> None:
    hostile = [
        '<img src=x onerror="document.title=1"><script>document.title = 1</script>',
        '</script></td></tr></table>"><svg onload=alert(1)>',
        "\u202eright to left override\u202c \u2066 isolate \u200f\u202d",
        "w" * 10_000,
        "line\r\nline\u2028line\x00 data: {}\n\nid: forged-1",
        "javascript:alert(1)",
    ]
    async with (
        run_server(tmp_path, nats_url=nats.url) as server,
        open_window(chromium, viewport={"width": 375, "height": 740}) as window,
    ):
        tab = await window.open(server.url)
        await tab.is_live()
        for text in hostile:
            await share(
                nats, 1, content=text, agent_id=text[:200], agent_role=text[:200], related_to=text[:200], extra=text
            )
        await tab.shows("#rows tr.discovery", len(hostile))
        shown = await tab.contents()
        assert shown[:3] == hostile[:3]
        assert shown[3] == "w" * 1000 + "…"
        assert shown[4:] == hostile[4:]
        for _ in hostile:
            await tab.do(lambda page: page.click("tr.discovery .more[aria-expanded=false]"))
        assert await tab.contents() == hostile, "an opened row shows all of it"
        assert await tab.do(lambda page: page.title()) == "Discoveries"
        assert await tab.do(lambda page: page.locator("main img, main script, main svg[onload]").count()) == 0
        wide = await tab.do(lambda page: page.evaluate("document.documentElement.scrollWidth - innerWidth"))
        assert wide <= 0, "no text makes the page wider than the phone"
        hrefs = await tab.do(
            lambda page: page.eval_on_selector_all("main a", "links => links.map((link) => link.getAttribute('href'))")
        )
        assert all(href.startswith("agents/") for href in hrefs)


async def test_a_flood_leaves_the_tab_responsive_and_the_newest_rows(
    chromium: Chromium, nats: NatsServer, tmp_path: Path
) -> None:
    async with run_server(tmp_path, nats_url=nats.url) as server, open_window(chromium) as window:
        tab = await window.open(server.url)
        await tab.is_live()
        for start in range(0, 3000, 100):
            await share(nats, *range(start, start + 100))
            await tab.do(lambda page: page.locator("#pause").is_enabled())
        await tab.says("#received", "3000")
        await tab.shows("#rows tr.discovery", 500)
        numbers = [int(id.rpartition("-")[2]) for id in await tab.ids()]
        assert numbers == list(range(numbers[0], numbers[0] + 500)), "the newest, in order"
        await tab.says("#missed", "0")
        await tab.shows("tr.discovery[data-content=full]")


async def test_gaps_farewells_and_cursors_are_shown_for_what_they_are(
    chromium: Chromium, nats: NatsServer, tmp_path: Path
) -> None:
    """A stream as a server in trouble would send it: the page gets it from a script in the server's stead."""
    uri = "discovery://agents/security-001/discoveries/1234567890-Anomaly-unusual-login-patter"
    notice = {"jsonrpc": "2.0", "method": "notifications/resources/updated", "params": {"uri": uri}}
    asked: list[str] = []
    body = frames(
        ("connected", {"agent_id": "page", "client_id": "c"}, "e-1"),
        ("discovery", notice, "e-2"),
        ("gap", {"reason": "overflow", "missed": 12}, "e-14"),
        ("gap", {"reason": "expired", "missed": None}, "e-20"),
        ("discovery", notice, "e-21"),
        ("discovery", notice, "e-21"),
        ("discovery", notice, "e-3"),
        ("cursor", {}, "e-40"),
        ("goodbye", {"reason": "lifetime"}, None),
    )

    def answer(route: Route) -> None:
        if route.request.method == "GET":
            asked.append(route.request.url)
        if len(asked) == 1:
            route.fulfill(body=body, content_type="text/event-stream")
        else:
            route.fulfill(status=503)

    async with run_server(tmp_path, nats_url=nats.url) as server, open_window(chromium) as window:
        await chromium.do(lambda: window.context.route("**/discoveries/stream*", answer))
        await chromium.do(lambda: window.context.route("**/health", lambda route: route.abort()))
        tab = await window.open(server.url)
        await tab.shows("#rows tr", 4)
        assert await tab.ids() == ["e-2", "e-21"], "what was taken is not taken twice"
        await tab.shows("tr.gap[data-reason=overflow][data-missed='12']", 1)
        await tab.shows("tr.gap[data-reason=expired][data-missed=unknown]", 1)
        order = await tab.do(
            lambda page: page.eval_on_selector_all("#rows tr", "rows => rows.map((row) => row.classList[0])")
        )
        assert order == ["discovery", "gap", "gap", "discovery"]
        await tab.says("#missed", "at least 12")
        await tab.shows("#state[data-state=reconnecting]")
        await tab.do(lambda page: page.click("#connection summary"))
        assert "ends each connection after a while" in (await tab.texts("#state-detail"))[0]
        # The native reconnect is answered with 503, after which an EventSource never returns by itself.
        await tab.shows("#state[data-state=refused]")
        await eventually(lambda: has_come_back(tab, asked), "the page makes a new EventSource")
        assert asked[2].endswith("&last_event_id=e-40")


async def has_come_back(tab: Tab, asked: list[str]) -> bool:
    await tab.do(lambda page: page.title())  # gives the route's handler its turn
    return len(asked) > 2


async def test_a_page_that_is_turned_away_says_why_and_tries_again(
    chromium: Chromium, nats: NatsServer, tmp_path: Path
) -> None:
    env = {"SSE_JWT_SECRET": "a secret of thirty-two characters"}
    async with run_server(tmp_path, nats_url=nats.url, env=env) as server, open_window(chromium) as window:
        tab = await window.open(server.url)
        await tab.shows("#state[data-state=refused]")
        await tab.do(lambda page: page.click("#connection summary"))
        await tab.do(
            lambda page: expect(page.locator("#state-detail")).to_contain_text("who you are (401)", timeout=DEADLINE)
        )


async def test_arrow_keys_walk_the_rows_and_tab_enters_one(
    chromium: Chromium, nats: NatsServer, tmp_path: Path
) -> None:
    async with run_server(tmp_path, nats_url=nats.url) as server, open_window(chromium) as window:
        tab = await window.open(server.url)
        await tab.is_live()
        await share(nats, *range(5))
        await tab.shows("tr.discovery[data-content=full]", 5)
        ids = (await tab.ids())[::-1]

        async def focused() -> str:
            return await tab.do(lambda page: page.evaluate("document.activeElement.dataset.eventId ?? ''"))

        async def press(*keys: str) -> None:
            for key in keys:
                await tab.do(partial(press_key, key))

        await press("Tab")
        assert "Skip" in await tab.do(lambda page: page.evaluate("document.activeElement.textContent"))
        await press("Enter", "ArrowDown")
        assert await focused() == ids[0]
        await press("ArrowDown", "ArrowDown", "ArrowUp")
        assert await focused() == ids[1]
        await press("End")
        assert await focused() == ids[4]
        await press("Home", "Enter")
        await tab.shows(f"tr[data-event-id='{ids[0]}'].expanded")
        await press("Tab")
        inside = "document.activeElement.closest('tr').dataset.eventId"
        assert await tab.do(lambda page: page.evaluate(inside)) == ids[0]
        stops = "document.querySelectorAll('#rows tr[tabindex=\"0\"]').length"
        assert await tab.do(lambda page: page.evaluate(stops)) == 1, "a table of 500 rows is one stop for Tab"


async def test_the_theme_follows_the_system_until_it_is_chosen_and_is_remembered(
    chromium: Chromium, nats: NatsServer, tmp_path: Path
) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    async with (
        run_server(tmp_path, nats_url=nats.url) as server,
        open_window(chromium, color_scheme="dark") as window,
    ):
        tab = await window.open(server.url)
        dark = await tab.do(lambda page: page.evaluate(background))
        await tab.do(lambda page: page.emulate_media(color_scheme="light"))
        light = await tab.do(lambda page: page.evaluate(background))
        assert dark != light
        await tab.do(lambda page: page.click("#theme"))
        assert await tab.do(lambda page: page.evaluate(background)) == dark
        await tab.do(lambda page: page.reload())
        assert await tab.do(lambda page: page.evaluate(background)) == dark


def press_key(key: str, page: Page) -> None:
    page.keyboard.press(key)


SAMPLES = json.loads((Path(__file__).parent / "page_samples.json").read_text())


async def is_drawn_anew(tab: Tab, drawn: str | None) -> bool:
    return await tab.do(lambda page: page.get_attribute("#sparkline .line", "d")) != drawn


async def share_samples(tab: Tab, nats: NatsServer) -> None:
    """A morning's discoveries, over a few seconds; those that follow another one are related to it."""
    uris: list[str] = []
    discoveries: list[Discovery] = []
    for sample in SAMPLES:
        fields = a_discovery(**{key: value for key, value in sample.items() if key != "follows"})
        if "follows" in sample:
            fields["related_to"] = uris[sample["follows"]]
        discovery = build(fields)
        uris.append(discovery.uri)
        discoveries.append(discovery)
    for start, end in ((0, 2), (2, 7), (7, 9), (9, len(SAMPLES))):
        drawn = await tab.do(lambda page: page.get_attribute("#sparkline .line", "d"))
        await nats.publish(*(("discoveries.insights", discovery.payload) for discovery in discoveries[start:end]))
        await tab.shows("#rows tr.discovery", end)
        await eventually(partial(is_drawn_anew, tab, drawn), "the sparkline moves on")


ALL_IN_VIEW_ARE_READ = """
[...document.querySelectorAll("#rows tr.discovery")]
  .filter((row) => row.getBoundingClientRect().top < innerHeight)
  .every((row) => row.dataset.content === "full")
"""


async def check_accessibility(tab: Tab) -> None:
    def check(page: Page) -> list[str]:
        page.evaluate((node_modules() / "axe-core" / "axe.min.js").read_text())
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        return [
            f"{violation['id']}: {violation['help']}: {[node['target'] for node in violation['nodes']][:3]}"
            for violation in found["violations"]
        ]

    assert await tab.do(check) == []


SIZES = {"desktop": {"width": 1280, "height": 800}, "phone": {"width": 375, "height": 740}}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("theme", ["light", "dark"])
async def test_axe_finds_nothing_to_complain_about(
    chromium: Chromium, core_nats: NatsServer, tmp_path: Path, theme: Any, size: str
) -> None:
    async with (
        run_server(tmp_path, nats_url=core_nats.url) as server,
        open_window(
            chromium,
            viewport=SIZES[size],
            color_scheme=theme,
            reduced_motion="reduce",
            locale="en-GB",
            timezone_id="UTC",
        ) as window,
    ):
        await chromium.do(lambda: window.context.clock.set_fixed_time("2026-11-24T09:43:40Z"))
        tab = await window.open(server.url)
        await tab.is_live()
        await check_accessibility(tab)
        await share_samples(tab, core_nats)
        await eventually(lambda: tab.do(lambda page: page.evaluate(ALL_IN_VIEW_ARE_READ)), "what is in view is read")
        picture = Path(PICTURES or tmp_path) / f"live-page-{theme}-{size}.png"
        await tab.do(lambda page: page.screenshot(path=picture))
        await core_nats.restart()
        await tab.shows("tr.gap[data-reason=upstream]")
        await tab.do(lambda page: page.locator("tr.discovery .more").first.click())
        await tab.do(lambda page: page.locator("#connection summary").click())
        await check_accessibility(tab)
        await tab.do(lambda page: page.keyboard.press("Escape"))
        if size == "phone":
            await tab.do(lambda page: page.click("#toggle-filters"))
            await check_accessibility(tab)
        await tab.do(lambda page: page.click("#share"))
        await tab.do(lambda page: page.click("#share-submit"))
        await tab.shows("#share-content[aria-invalid=true]")
        await check_accessibility(tab)
