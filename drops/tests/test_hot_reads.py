"""What the hot routes remember of the drops, and how old it can be."""

import asyncio
import gc
import uuid
from collections.abc import Callable, Coroutine
from datetime import timedelta
from decimal import Decimal
from functools import partial
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from django.db import OperationalError
from django.utils import timezone

from drops import asgi
from drops.etags import weak_etag
from drops.models import Drop
from drops.services import adjust_stock, create_drop, update_drop
from drops.tests.factories import DropFactory
from realtime import hub
from realtime.models import Event
from reservations.services import expire_all_due, release
from reservations.tests.factories import ReservationFactory
from tests.hot import Lane, Response, background_work, hot_lane, hub_hears_others
from tests.servers import Process
from users.tests.factories import UserFactory

pytestmark = pytest.mark.django_db(transaction=True)


class Reads:
    """Counts how often a viewset is asked, and lets a test come in between."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.after_reading: Callable[[], Any] = lambda: None
        self._ask_viewset = asgi.ask_viewset
        monkeypatch.setattr(asgi, "ask_viewset", self)

    def __call__(self, *args: Any) -> Any:
        self.count += 1
        data = self._ask_viewset(*args)
        self.after_reading()
        return data


@pytest.fixture
def reads(monkeypatch) -> Reads:
    return Reads(monkeypatch)


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """The clock by which pages grow old; it stands still until ``clock.now`` is set."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(asgi, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def play(scene: Callable[[Lane], Coroutine[Any, Any, Any]], *, hears_others: bool = False) -> Any:
    async def within_time(lane: Lane) -> Any:
        async with asyncio.timeout(20):
            return await scene(lane)

    with hot_lane(hears_others=hears_others) as lane:
        return asyncio.run(within_time(lane))


async def read_list(lane: Lane, query: str = "") -> list[dict[str, Any]]:
    return (await lane.get(f"/api/drops{query}")).json()["results"]


async def read(lane: Lane, drop: Drop) -> dict[str, Any]:
    return (await lane.get(f"/api/drops/{drop.pk}")).json()


async def change(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a service of this process in a thread, as a viewset would."""
    return await asyncio.to_thread(asgi.close_after(partial(function, *args, **kwargs)))


def test_a_read_without_a_body_waits_for_none(reads):
    drop = DropFactory()

    async def scene(lane):
        async def never(scope, receive, send):
            await lane_application(scope, asyncio.Event().wait, send)

        await read_list(lane)
        await read(lane, drop)
        lane_application, lane.application = lane.application, never
        return await read_list(lane), await read(lane, drop)

    listed, one = play(scene)
    assert listed == [one]
    assert reads.count == 2


# --- One's own writes -------------------------------------------------------------------


def test_a_reservation_of_this_process_is_seen_at_once(reads):
    DropFactory()
    drop = DropFactory(sizes={"EU 42": 3, "EU 43": 4})
    users = UserFactory.create_batch(3)
    variant = str(drop.variants.last().pk)

    async def scene(lane):
        seen = []
        await read_list(lane)
        await read(lane, drop)
        for user in users:
            body = {"variant": variant}
            held = await lane.post(f"/api/drops/{drop.pk}/reserve", user, body)
            assert held.status == 201
            listed, _ = await read_list(lane)
            assert listed == await read(lane, drop)
            seen.append((listed["available_stock"], listed["variants"][1]["available_stock"]))
        return seen

    assert play(scene) == [(6, 3), (5, 2), (4, 1)]
    assert reads.count == 2


@pytest.mark.parametrize("how", ["changed", "adjusted"])
def test_a_draft_that_is_changed_in_this_process_is_seen_at_once(how, reads):
    draft = DropFactory(draft=True, name="Old", total_stock=5)
    variant_id = draft.variants.get().pk

    async def scene(lane):
        before = await lane.get(f"/api/drops/{draft.pk}")
        if how == "changed":
            await change(update_drop, draft.pk, name="New")
        else:
            await change(adjust_stock, variant_id, 2, reason="Found", user=draft.created_by)
        etag = before.header("etag")
        return await lane.get(f"/api/drops/{draft.pk}", **{"If-None-Match": etag})

    after = play(scene)

    assert after.status == 200
    assert (after.json()["name"], after.json()["total_stock"]) == (
        ("New", 5) if how == "changed" else ("Old", 7)
    )


def test_a_purchase_of_this_process_is_seen_at_once(reads):
    hold = ReservationFactory(drop__total_stock=1)

    async def scene(lane):
        before = await read(lane, hold.drop)
        await read_list(lane)
        bought = await lane.post(f"/api/drops/{hold.drop.pk}/purchase", hold.user)
        (listed,) = await read_list(lane)
        assert listed == await read(lane, hold.drop)
        return before, bought.json(), listed

    before, bought, after = play(scene)

    assert (before["availability"], before["activity_feed"]["latest_purchasers"]) == (
        "fully_reserved",
        [],
    )
    assert after["availability"] == "sold_out"
    assert after["activity_feed"]["latest_purchasers"] == [
        {
            "user_id": str(hold.user.pk),
            "username": hold.user.username,
            "qty": 1,
            "created_at": bought["created_at"],
        }
    ]
    assert reads.count == 2


def test_units_that_came_back_are_seen_at_once(reads):
    drop = DropFactory(total_stock=5)
    hold = ReservationFactory(drop=drop)
    overdue = ReservationFactory(drop=drop, overdue=True)

    async def scene(lane):
        stock = [(await read(lane, drop))["available_stock"]]
        await change(release, hold.pk, hold.user)
        stock.append((await read(lane, drop))["available_stock"])
        swept = await change(expire_all_due)
        stock.append((await read(lane, drop))["available_stock"])
        assert swept[0].reservation_ids == [overdue.pk]
        return stock

    assert play(scene) == [3, 4, 5]
    assert reads.count == 1


def test_a_change_of_a_drop_is_seen_at_once():
    drop = DropFactory(name="Aurora")
    variant, staff = drop.variants.get(), UserFactory(staff=True)

    async def scene(lane):
        await read_list(lane)
        await read(lane, drop)
        await change(update_drop, drop.pk, name="Borealis", price=Decimal(5))
        await change(adjust_stock, variant.pk, 3, reason="found", user=staff)
        (listed,) = await read_list(lane)
        assert listed == await read(lane, drop)
        return listed

    seen = play(scene)

    assert (seen["name"], seen["price"]) == ("Borealis", "5.00")
    assert (seen["total_stock"], seen["available_stock"]) == (13, 13)
    assert seen["variants"][0]["total_stock"] == 13
    assert seen["seq"] == 3


def test_lists_follow_each_publication_and_pause_at_once():
    creator = UserFactory()
    draft = DropFactory(draft=True, created_by=creator)

    async def scene(lane):
        async def lists() -> list[list[str]]:
            live, paused = await read_list(lane), await read_list(lane, "?status=paused")
            return [[drop["id"] for drop in live], [drop["id"] for drop in paused]]

        seen = [await lists()]
        for status in ("live", "paused", "live", "cancelled"):
            await change(update_drop, draft.pk, status=status)
            seen.append(await lists())
        fields = {"name": "New", "price": Decimal(1), "total_stock": 1, "status": "live"}
        new = await change(create_drop, creator, **fields)
        seen.append(await lists())
        return seen, str(new.pk)

    seen, new = play(scene)

    mine = str(draft.pk)
    assert seen == [
        [[], []],
        [[mine], []],
        [[], [mine]],
        [[mine], []],
        [[], []],
        [[new], []],
    ]


@pytest.mark.parametrize("query", ["", "?status=live&limit=5"])
def test_a_list_that_was_being_read_while_a_drop_was_published_is_read_again(reads, query):
    """Whoever asks after the publication must not get what was read before it."""
    draft = DropFactory(draft=True)

    async def scene(lane):
        has_read, may_go_on = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()

        def pause() -> None:
            loop.call_soon_threadsafe(has_read.set)
            asyncio.run_coroutine_threadsafe(may_go_on.wait(), loop).result(10)

        reads.after_reading = pause
        early = asyncio.create_task(read_list(lane, query))
        await has_read.wait()
        await change(update_drop, draft.pk, status="live")
        late = asyncio.create_task(read_list(lane, query))
        await asyncio.sleep(0)
        may_go_on.set()
        await early
        return [drop["id"] for drop in await late]

    assert play(scene) == [str(draft.pk)]


def test_stock_that_changed_while_it_was_being_read_is_not_lost(reads):
    drop, user = DropFactory(), UserFactory()

    async def scene(lane):
        loop = asyncio.get_running_loop()
        held = []

        def reserve_meanwhile() -> None:
            reads.after_reading = lambda: None
            claim = lane.post(f"/api/drops/{drop.pk}/reserve", user)
            held.append(asyncio.run_coroutine_threadsafe(claim, loop).result(10).status)

        reads.after_reading = reserve_meanwhile
        return await read(lane, drop), await read(lane, drop), held

    first, second, held = play(scene)

    assert held == [201]
    assert (first["available_stock"], first["seq"]) == (9, 1)
    assert second == first
    assert reads.count == 1


# --- Others' writes ---------------------------------------------------------------------


async def expire_elsewhere(start_expiry: Callable[..., Process]) -> None:
    process = start_expiry("--once")
    assert await asyncio.to_thread(process.wait) == 0, process.log


async def seconds_until_seen(lane: Lane, drop: Drop, available_stock: int) -> float:
    """Ask without a pause until list and detail show the stock; return how late that was."""
    while True:
        # What a server does between two requests: it lets others go on.
        await asyncio.sleep(0.001)
        (listed,), shown = await read_list(lane), await read(lane, drop)
        if listed["available_stock"] == shown["available_stock"] == available_stock:
            seen_at = timezone.now()
            event = await change(Event.objects.latest, "created_at")
            return (seen_at - event.created_at).total_seconds()


async def seconds_until_expiry_is_seen(lane: Lane, start_expiry: Any) -> float:
    hold = await change(ReservationFactory, overdue=True)
    (listed,), shown = await read_list(lane), await read(lane, hold.drop)
    assert listed["available_stock"] == shown["available_stock"] == 9
    expiry = asyncio.create_task(expire_elsewhere(start_expiry))
    seconds = await seconds_until_seen(lane, hold.drop, 10)
    await expiry
    return seconds


def test_what_another_process_expired_is_seen_by_the_news(start_expiry, reads, monkeypatch):
    # Nothing else can bring it: neither is read again in the time of this test.
    monkeypatch.setattr(asgi, "RENEW_AFTER_SECONDS", 60.0)
    monkeypatch.setattr(asgi, "MAX_AGE_SECONDS", 60.0)
    monkeypatch.setattr(hub, "CATCH_UP_SECONDS", 60.0)

    async def scene(lane):
        await hub_hears_others()
        return await seconds_until_expiry_is_seen(lane, start_expiry)

    assert play(scene, hears_others=True) < 15


def test_what_another_process_expired_is_seen_within_a_second_without_redis(servers, start_expiry):
    if servers is None:
        pytest.skip("an outside Redis can't be stopped")

    async def scene(lane):
        return await seconds_until_expiry_is_seen(lane, start_expiry)

    servers.stop_valkey()
    try:
        # A second, and what a busy machine adds.
        assert play(scene, hears_others=True) < 5
    finally:
        servers.start_valkey()


def test_a_start_that_has_come_is_seen_within_a_second():
    starts_at = timezone.now() + timedelta(seconds=1)
    drop = DropFactory(status="scheduled", starts_at=starts_at)

    async def scene(lane):
        assert await read_list(lane) == []
        assert (await read(lane, drop))["status"] == "scheduled"
        while not await read_list(lane) or (await read(lane, drop))["status"] != "live":
            assert timezone.now() < starts_at + timedelta(seconds=5)
        return timezone.now()

    assert play(scene) >= starts_at


# --- How often is read ------------------------------------------------------------------


def test_a_crowd_that_comes_at_once_reads_once(reads):
    DropFactory()

    async def scene(lane):
        answers = await asyncio.gather(*(lane.get("/api/drops") for _ in range(50)))
        return {answer.body for answer in answers}

    assert len(play(scene)) == 1
    assert reads.count == 1


def test_a_page_is_renewed_in_the_background_and_never_served_when_over_a_second_old(reads, clock):
    drop = DropFactory(name="Aurora")

    async def scene(lane):
        names = []

        async def look_at(age: float) -> None:
            clock.now = 1000.0 + age
            names.append((await read(lane, drop))["name"])

        await look_at(0.0)
        # As another process would: nobody here is told.
        await change(Drop.objects.filter(pk=drop.pk).update, name="Borealis")
        await look_at(0.55)
        await look_at(0.65)
        await background_work("DropReads._load")
        await look_at(0.7)
        await change(Drop.objects.filter(pk=drop.pk).update, name="Corona")
        await look_at(1.7)
        return names

    assert play(scene) == ["Aurora", "Aurora", "Aurora", "Borealis", "Corona"]
    assert reads.count == 3


# --- ETags ------------------------------------------------------------------------------


def test_the_etag_is_new_with_each_change_and_only_then(reads, clock):
    drop, users = DropFactory(total_stock=2), UserFactory.create_batch(2)

    async def scene(lane):
        async def look(*, etag: str) -> Response:
            return await lane.get(f"/api/drops/{drop.pk}", **{"If-None-Match": etag})

        etags, statuses = [], []

        async def look_twice() -> None:
            known = etags[-1] if etags else '""'
            for _ in range(2):
                answer = await look(etag=known)
                known = answer.header("etag")
                statuses.append(answer.status)
            etags.append(known)

        await look_twice()
        for user in users:
            for call in ("reserve", "purchase"):
                assert (await lane.post(f"/api/drops/{drop.pk}/{call}", user)).status == 201
                await look_twice()
        # Read again from the rows, it is the same as what came of the events.
        clock.now += 1.1
        again = await look(etag=etags[-1])
        return etags, statuses, again

    etags, statuses, again = play(scene)

    assert len(set(etags)) == 5
    assert statuses == [200, 304] * 5
    assert (again.status, again.body, again.header("etag")) == (304, b"", etags[-1])
    assert reads.count == 2


# --- Errors -----------------------------------------------------------------------------


def test_an_error_is_not_remembered(reads):
    later = uuid.uuid4()

    async def scene(lane):
        before = await lane.get(f"/api/drops/{later}")
        wrong = await lane.get("/api/drops?status=open")
        await change(DropFactory, pk=later)
        after = await lane.get(f"/api/drops/{later}")
        return before.status, wrong.status, after.status, len(pages_of(lane))

    assert play(scene) == (404, 400, 200, 1)


def test_an_outage_is_told_and_over_with_the_next_request(monkeypatch):
    drop = DropFactory()
    ask_viewset = asgi.ask_viewset

    def fail(*args: Any) -> None:
        raise OperationalError("the server closed the connection unexpectedly")

    async def scene(lane):
        monkeypatch.setattr(asgi, "ask_viewset", fail)
        during = [await lane.get(f"/api/drops/{drop.pk}") for _ in range(2)]
        monkeypatch.setattr(asgi, "ask_viewset", ask_viewset)
        return during, await lane.get(f"/api/drops/{drop.pk}")

    during, after = play(scene)

    assert [(answer.status, answer.json()["code"]) for answer in during] == [
        (503, "unavailable"),
        (503, "unavailable"),
    ]
    assert during[0].header("retry-after") == "1"
    assert after.status == 200


def test_a_renewal_that_fails_in_the_background_is_no_traceback(monkeypatch, clock, caplog):
    drop = DropFactory()

    def fail(*args: Any) -> None:
        raise OperationalError("the server closed the connection unexpectedly")

    async def scene(lane):
        await read(lane, drop)
        monkeypatch.setattr(asgi, "ask_viewset", fail)
        clock.now += 0.7
        remembered = await lane.get(f"/api/drops/{drop.pk}")
        await asyncio.wait([page.loading for page in pages_of(lane).values()])
        gc.collect()
        return remembered.status

    assert play(scene) == 200
    assert [record for record in caplog.records if record.name == "asyncio"] == []


# --- Memory -----------------------------------------------------------------------------


def reads_of(lane: Lane) -> asgi.DropReads:
    return lane.application.routes[-1].endpoint.__self__


def pages_of(lane: Lane) -> dict[Any, asgi.Page]:
    return reads_of(lane)._pages


def test_no_more_pages_are_remembered_than_allowed(monkeypatch):
    monkeypatch.setattr(asgi, "MAX_REMEMBERED", 20)
    drops = DropFactory.create_batch(3)

    async def scene(lane):
        for number in range(50):
            assert (await lane.get(f"/api/drops?limit={number + 1}")).status == 200
            assert len(pages_of(lane)) <= 20
        for drop in drops:
            await read(lane, drop)
        await lane.get("/api/drops?" + "a" * 101)
        return [len(page.drops) for page in pages_of(lane).values()]

    assert play(scene) == [3] * 17 + [1] * 3


def test_no_more_drops_are_remembered_than_allowed(monkeypatch):
    monkeypatch.setattr(asgi, "MAX_REMEMBERED_DROPS", 20)
    DropFactory.create_batch(7)

    async def scene(lane):
        for number in range(30):
            assert len(await read_list(lane, f"?limit={number % 7 + 1}&{number}")) == number % 7 + 1
            assert sum(len(page.drops) for page in pages_of(lane).values()) <= 20

    play(scene)


def test_who_has_asked_is_remembered_for_a_while_and_not_without_end(monkeypatch, clock):
    monkeypatch.setattr(asgi, "MAX_REMEMBERED_USERS", 5)
    DropFactory()
    users = UserFactory.create_batch(12)

    async def scene(lane):
        async def status_for(user: Any) -> int:
            return (await lane.get("/api/drops", **{"X-User-Id": str(user.pk)})).status

        for user in users:
            assert await status_for(user) == 200
            assert len(reads_of(lane)._users) <= 5
        await change(type(user).objects.filter(pk=user.pk).update, is_active=False)
        soon = await status_for(user)
        clock.now += 10.1
        return soon, await status_for(user)

    assert play(scene) == (200, 401)


def test_a_page_is_encoded_drop_by_drop_and_reads_as_if_it_were_whole():
    def drop_with(units: int) -> dict[str, Any]:
        variants = [{"id": "v", "size": "one", "available_stock": units}]
        known = {"id": str(units), "seq": 1, "available_stock": units, "variants": variants}
        return known | {"availability": "available"}

    for count in (0, 1, 3):
        page = asgi.Page()
        data = {"count": count, "next": None, "results": [drop_with(n) for n in range(count)]}
        page.replace(data)
        for units in (9, 8) if count else ():
            page.encode()
            told = {"variants": [{"id": "v", "availableStock": units}], "availability": "held"}
            stock = {"availableStock": units, **told}
            page.fold("0", [(page.drops[0]["seq"] + 1, "STOCK_UPDATED", stock)])
        answer, whole = page.encode(), data | {"results": page.drops}
        assert answer.body == orjson.dumps(whole)
        assert answer.headers == ((b"etag", weak_etag(whole).encode()),)
        assert page.encode() is answer
        assert [drop["available_stock"] for drop in page.drops[:1]] == ([8] if count else [])
