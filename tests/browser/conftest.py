"""A real browser on a real server: Debian's chromium, driven by Playwright.

Nothing is downloaded. Without chromium the tests here are skipped, and say so.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.core.management import call_command
from playwright.sync_api import Browser, ConsoleMessage, Page, Route, expect, sync_playwright

from benchmarks.pages import CHROMIUM, CHROMIUM_OPTIONS, session_of

AXE = Path(__file__).parent / "vendor" / "axe.min.js"
DESKTOP = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}
# A busy machine may take its time; what is waited for is awaited, not slept for.
PATIENCE_MS = 20_000
expect.set_options(timeout=PATIENCE_MS)


@pytest.fixture
def browser(monkeypatch, tmp_path) -> Iterator[Browser]:
    """A browser of the test's own, with nothing in it.

    Not for the session: as long as Playwright runs, this thread counts as one with a running
    event loop, where neither asyncio.run nor, without the variable, Django's ORM works.
    """
    if CHROMIUM is None:
        pytest.skip("browser tests need chromium (on Debian: apt-get install chromium)")
    monkeypatch.setenv("DJANGO_ALLOW_ASYNC_UNSAFE", "true")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def site(web_servers) -> Any:
    """The server whose pages are looked at, on an empty database.

    It remembers the ids of content types, so they must be the same for all tests.
    """
    call_command("flush", interactive=False, reset_sequences=True, verbosity=0)
    return web_servers[0]


@pytest.fixture
def open_page(browser, site) -> Iterator[Callable[..., Page]]:
    """Return a function that opens a page of the site in a window of its own.

    ``user`` is signed in to the admin; other options are those of Playwright's new_context
    (``color_scheme="dark"``, ``viewport=PHONE``). Whatever the pages complain about, a breach
    of the Content-Security-Policy among it, or load from elsewhere fails the test.
    """
    complaints: list[str] = []

    def note(message: ConsoleMessage) -> None:
        if message.type == "error":
            complaints.append(f"{message.text} ({message.location.get('url')})")

    def stay_here(route: Route) -> None:
        if route.request.url.startswith((site.url, "data:")):
            route.continue_()
        else:
            complaints.append(f"loads {route.request.url}")
            route.abort()

    def open_page(path: str, user: Any = None, **options: Any) -> Page:
        context = browser.new_context(**{"base_url": site.url, "viewport": DESKTOP} | options)
        context.set_default_timeout(PATIENCE_MS)
        context.route("**/*", stay_here)
        if user is not None:
            context.add_cookies([{"url": site.url, "name": "sessionid", "value": session_of(user)}])
        page = context.new_page()
        page.on("console", note)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(path)
        return page

    yield open_page
    assert complaints == []


@pytest.fixture
def serious_faults() -> Callable[[Page], list[str]]:
    """Return a function that lists a page's serious accessibility faults, as axe finds them.

    Source: https://github.com/dequelabs/axe-core/blob/develop/doc/API.md
    """
    script = AXE.read_text()

    def find(page: Page) -> list[str]:
        # Colours are measured: they must have arrived where they are going.
        # A pulse that never ends goes on.
        page.evaluate("""Promise.all(document.getAnimations()
            .filter((move) => move.effect.getComputedTiming().endTime !== Infinity)
            .map((move) => move.finished))""")
        # Not as a script element, which the page's policy would refuse.
        page.evaluate(script)
        found = page.evaluate(
            "axe.run({resultTypes: ['violations'],"
            " runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa']})"
        )
        return [
            f"{fault['id']}: {node['target']} {node['failureSummary']}"
            for fault in found["violations"]
            if fault["impact"] in ("serious", "critical")
            for node in fault["nodes"]
        ]

    return find
