"""A real Chromium for the tests of the live page.

Playwright's blocking calls live in one thread of their own: a test hands it functions (`await tab.do(...)`) and
meanwhile the test's Trio run goes on. What a page does not handle (an exception, a breach of the
Content-Security-Policy) fails the test that looked at it. No wait is without Playwright's deadline.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

import trio
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Playwright, expect, sync_playwright
from provision import browser
from support import WITHIN, NatsServer, Server, payload

T = TypeVar("T")

DEADLINE = 1000 * WITHIN


class Chromium:
    """One browser process, and the thread that talks to it."""

    def __init__(self, browser: Browser, thread: ThreadPoolExecutor) -> None:
        self.browser = browser
        self.thread = thread

    async def do(self, function: Callable[[], T]) -> T:
        """Run `function` in the browser's thread; cancelled only between two of them (each has its deadline)."""
        return await trio.to_thread.run_sync(lambda: self.thread.submit(function).result())


def start_playwright() -> Playwright:
    """Playwright on an event loop of asyncio's own; where trio-asyncio was imported, new loops are that one's."""
    policy = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(asyncio.DefaultEventLoopPolicy())
    try:
        return sync_playwright().start()
    finally:
        asyncio.set_event_loop_policy(policy)


@contextmanager
def run_chromium() -> Iterator[Chromium]:
    """The Chromium of this machine, headless; gone when the block ends."""
    program = browser()
    assert program is not None, "a Chromium is needed: tests/provision.py gets it"
    arguments = ["--no-sandbox"] if os.getuid() == 0 else []
    with ThreadPoolExecutor(1, "chromium") as thread:
        playwright = thread.submit(start_playwright).result()
        try:
            chromium = thread.submit(
                lambda: playwright.chromium.launch(executable_path=program, args=arguments)
            ).result()
            try:
                yield Chromium(chromium, thread)
            finally:
                thread.submit(chromium.close).result()
        finally:
            thread.submit(playwright.stop).result()


class Tab:
    """One page of a window, with what a test asks of the live page."""

    def __init__(self, window: Window, page: Page) -> None:
        self.window = window
        self.page = page
        self.faults: list[str] = []
        page.on("pageerror", lambda error: self.faults.append(f"uncaught: {error}"))
        page.on("console", self._note)

    def _note(self, message: ConsoleMessage) -> None:
        if "Content Security Policy" in message.text:
            self.faults.append(message.text)

    async def do(self, function: Callable[[Page], T]) -> T:
        return await self.window.chromium.do(lambda: function(self.page))

    async def close(self) -> None:
        """As a user closes a tab: the page hears of it, nobody waits for it."""
        await self.do(lambda page: page.close(run_before_unload=False))

    async def shows(self, selector: str, count: int | None = None) -> None:
        """Wait until `selector` is visible, or there are exactly `count` of it."""

        def wait(page: Page) -> None:
            if count is None:
                expect(page.locator(selector).first).to_be_visible(timeout=DEADLINE)
            else:
                expect(page.locator(selector)).to_have_count(count, timeout=DEADLINE)

        await self.do(wait)

    async def says(self, selector: str, text: str) -> None:
        """Wait until `selector` has this text."""
        await self.do(lambda page: expect(page.locator(selector)).to_have_text(text, timeout=DEADLINE))

    async def is_live(self) -> None:
        await self.shows("#state[data-state=live]")

    async def texts(self, selector: str) -> list[str]:
        return await self.do(lambda page: page.locator(selector).all_inner_texts())

    async def ids(self) -> list[str]:
        """The event ids of the discoveries in the table, oldest first, whether a search hides them or not."""
        return await self.do(
            lambda page: page.eval_on_selector_all(
                "#rows tr.discovery", "rows => rows.map((row) => row.dataset.eventId).reverse()"
            )
        )

    async def contents(self) -> list[str]:
        """What the rows say, oldest first, once all their resources are read."""
        await self.shows("#rows tr.discovery[data-content=slug]", 0)
        return await self.do(
            lambda page: page.eval_on_selector_all(
                "#rows tr.discovery", "rows => rows.map((row) => row.querySelector('.text').textContent).reverse()"
            )
        )


class Window:
    """A browser profile of its own: its tabs share storage, locks and channels, and nothing with other windows."""

    def __init__(self, chromium: Chromium, context: BrowserContext) -> None:
        self.chromium = chromium
        self.context = context
        self.tabs: list[Tab] = []

    async def open(self, url: str) -> Tab:
        """A new tab that has loaded `url`."""

        def load() -> Tab:
            tab = Tab(self, self.context.new_page())
            tab.page.goto(url)
            return tab

        tab = await self.chromium.do(load)
        self.tabs.append(tab)
        return tab


@asynccontextmanager
async def open_window(chromium: Chromium, *, script: str | None = None, **options: Any) -> AsyncIterator[Window]:
    """A window whose tabs run `script` before the page's own; fails at the end when a page had a fault."""

    def new() -> BrowserContext:
        context = chromium.browser.new_context(**options)
        context.set_default_timeout(DEADLINE)
        if script:
            context.add_init_script(script)
        return context

    window = Window(chromium, await chromium.do(new))
    try:
        yield window
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + WITHIN):
            await chromium.do(window.context.close)
    faults = [fault for tab in window.tabs for fault in tab.faults]
    assert not faults, faults


async def share(nats: NatsServer, *numbers: int, **changes: Any) -> None:
    """Publish discoveries with these numbers in their content."""
    await nats.publish(*(("discoveries.insights", payload(number, **changes)) for number in numbers))


async def clients_of(server: Server) -> list[dict[str, Any]]:
    """What `GET /clients` lists."""
    status, body = await server.get("/clients")
    assert status == 200, body
    listed: list[dict[str, Any]] = body["clients"]
    return listed


def frames(*events: tuple[str, Any, str | None]) -> str:
    """An event stream's body: (event, data, id) each."""
    return "".join(
        f"event: {event}\ndata: {json.dumps(data)}\n" + (f"id: {id}\n\n" if id else "\n") for event, data, id in events
    )
