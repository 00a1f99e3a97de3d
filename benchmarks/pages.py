"""The pages that people look at: the shop in a browser, the admin after a season."""

import http.client
import shutil
import statistics
import time
from collections.abc import Iterator
from typing import Any

from playwright.sync_api import Browser, sync_playwright

from benchmarks.data import sell
from benchmarks.load import GeneratorError
from benchmarks.results import Goal, Result, Run
from benchmarks.runs import FIRST_USER, Bench
from benchmarks.stack import WebServer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CHROMIUM_OPTIONS = [
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# When the page's scripts, which wait for the whole document, have run.
INTERACTIVE = "performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd"
PURCHASES = {False: 100_000, True: 10_000}  # by whether it must be quick
LOOKS = 5
LISTS = (
    "drops_drop",
    "reservations_reservation",
    "purchases_purchase",
    "realtime_event",
    "users_user",
)


def shop(bench: Bench) -> Result:
    (hot, *_) = bench.stack.fresh(6)
    slowest: list[float] = []

    def run() -> Run:
        if CHROMIUM is None:
            raise GeneratorError("The shop is looked at in chromium: apt-get install chromium.")
        # With DEBUG the server has the static files without a collectstatic.
        with bench.stack.web(DEBUG="true") as web, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_OPTIONS)
            site = f"http://127.0.0.1:{web.port}"
            medians = [open_newly(browser, site + path) for path in ("/", f"/drops/{hot.drop_id}")]
            browser.close()
        slowest.append(max(medians))
        return Run(p50_ms=statistics.median(medians), p99_ms=slowest[-1])

    rows = bench.take_turns("shop", {"uvicorn": run})
    return Result(
        name="shop",
        title="Pages of the shop",
        method=(
            "The list of six drops and the page of one, in chromium with an empty cache, on one "
            "uvicorn process. From the beginning of the navigation until the page's scripts have "
            f"run; of each page the median of {LOOKS} visits. p99 is the slower page."
        ),
        rows=rows,
        goals=[Goal("the slower page is interactive", slowest, "at most", 1000, unit=" ms")],
        problems=bench.take_problems(),
    )


def open_newly(browser: Browser, url: str) -> float:
    """Return after how many ms the page was interactive: the median of visits by newcomers."""
    times = []
    for _ in range(LOOKS):
        context = browser.new_context()
        page = context.new_page()
        page.goto(url)
        times.append(float(page.evaluate(INTERACTIVE)))
        context.close()
    return statistics.median(times)


def admin(bench: Bench) -> Result:
    purchases = PURCHASES[bench.is_quick]
    (hot,) = bench.stack.fresh()
    sell(bench.stack, hot, FIRST_USER, purchases)
    bench.stack.execute("VACUUM ANALYZE")
    from users.models import User

    cookie = f"sessionid={session_of(User.objects.create_superuser('benchmarks'))}"
    pages = dict(pages_of(hot.drop_id, search=f"user_{FIRST_USER}", page=90))
    slowest: list[float] = []
    by_page: dict[str, list[float]] = {name: [] for name in pages}

    def run() -> Run:
        with bench.stack.web() as web:
            medians = {name: look(bench, web, url, cookie) for name, url in pages.items()}
        for name, median in medians.items():
            by_page[name].append(median)
        slowest.append(max(medians.values()))
        return Run(p50_ms=statistics.median(medians.values()), p99_ms=slowest[-1])

    rows = bench.take_turns("admin", {"uvicorn": run})
    bench.audit()
    each = ", ".join(f"{name} {statistics.median(ms):.0f}" for name, ms in by_page.items())
    return Result(
        name="admin",
        title="Pages of the admin",
        method=(
            f"The dashboard, a drop, its timeline, every list, a search and a page far behind, "
            f"with {purchases:,} purchases of one drop; one uvicorn process, one request at a "
            f"time. Of each page the median of {LOOKS} looks, after a first one; p50 and p99 are "
            "the middle one and the slowest of the pages."
        ),
        rows=rows,
        goals=[Goal("the slowest page", slowest, "at most", 300, unit=" ms")],
        notes=[f"Each page, in ms: {each}."],
        problems=bench.take_problems(),
    )


def pages_of(drop_id: object, search: str, page: int) -> Iterator[tuple[str, str]]:
    """Return what is looked at: its name, and its address."""
    from django.urls import reverse

    yield "dashboard", reverse("admin:index")
    yield "its figures", reverse("admin:figures")
    yield "drop", reverse("admin:drops_drop_change", args=[drop_id])
    yield "timeline", reverse("admin:drops_drop_timeline", args=[drop_id])
    for name in LISTS:
        yield name.partition("_")[2] + "s", reverse(f"admin:{name}_changelist")
    for name in ("reservations_reservation", "purchases_purchase"):
        title, address = name.partition("_")[2] + "s", f"admin:{name}_changelist"
        yield f"{title} of a user", reverse(address, query={"q": search})
        far_behind = {"drop__id__exact": drop_id, "p": page}
        yield f"page {page} of {title}", reverse(address, query=far_behind)


def session_of(user: Any) -> str:
    """Return the key of a new session in which ``user`` is signed in."""
    from django.test import Client

    client: Any = Client()
    client.force_login(user)
    return str(client.cookies["sessionid"].value)


def look(bench: Bench, web: WebServer, url: str, cookie: str) -> float:
    """Return the median of the times that the page takes, in ms."""
    connection = http.client.HTTPConnection("127.0.0.1", web.port, timeout=60)
    times = []
    for _ in range(1 + LOOKS):
        started = time.perf_counter()
        connection.request("GET", url, headers={"Cookie": cookie})
        answer = connection.getresponse()
        answer.read()
        times.append((time.perf_counter() - started) * 1000)
        if answer.status != 200:
            bench.problems.append(f"{url}: {answer.status}")
    connection.close()
    return statistics.median(times[1:])
