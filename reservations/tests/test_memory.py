"""Refusals from memory: how cheap they are, and how soon they end when there is stock again."""

import asyncio
import gc
import logging
import uuid
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from django.db import InterfaceError
from django.utils import timezone

from drops.asgi import close_after
from drops.models import Drop
from drops.services import adjust_stock, update_drop
from drops.tests.factories import DropFactory
from purchases.tests.factories import PurchaseFactory
from realtime import hub
from realtime.models import Event
from reservations import memory
from reservations.memory import ShortageMemory
from reservations.models import Reservation
from reservations.services import Claim, expire_all_due, release
from reservations.tests.factories import ReservationFactory
from tests.hot import Lane, Response, background_work, hot_lane, hub_hears_others
from tests.servers import Process

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """The clock by which the memory fades; it stands still until ``clock.now`` is set."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(memory, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def play(scene: Callable[[Lane], Coroutine[Any, Any, Any]], *, hears_others: bool = False) -> Any:
    async def within_time(lane: Lane) -> Any:
        async with asyncio.timeout(20):
            return await scene(lane)

    with hot_lane(hears_others=hears_others) as lane:
        return asyncio.run(within_time(lane))


async def claim(lane: Lane, drop: Drop, user: Any = None, **body: Any) -> Response:
    """Ask for a unit; as somebody new, where nobody is named."""
    answer = await lane.post(f"/api/drops/{drop.pk}/reserve", user or uuid.uuid4(), body)
    # What a server does between two requests: it lets others go on.
    await asyncio.sleep(0)
    return answer


async def learned(lane: Lane, drop: Drop, **body: Any) -> Response:
    """Be refused, so that the memory knows the drop."""
    answer = await claim(lane, drop, **body)
    assert answer.status == 409
    await background_work("ShortageMemory._learn")
    assert drop.pk in memory_of(lane)._remembered
    return answer


async def change(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a service of this process in a thread, as a viewset would."""
    return await asyncio.to_thread(close_after(partial(function, *args, **kwargs)))


def memory_of(lane: Lane) -> ShortageMemory:
    return lane.application.routes[0].endpoint.memory


@contextmanager
def counted_queries(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """Yield the statements made in the block, in whatever thread."""
    made: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            made.append(record.getMessage())

    handler = Handler()
    logger = logging.getLogger("django.db.backends")
    with caplog.at_level(logging.DEBUG, logger.name):
        logger.addHandler(handler)
        logger.propagate = False
        try:
            yield made
        finally:
            logger.propagate = True
            logger.removeHandler(handler)


def code(answer: Response) -> str:
    return answer.json()["code"]


def sold_out() -> Drop:
    return PurchaseFactory(reservation__drop=DropFactory(total_stock=1)).drop


def fully_reserved() -> Drop:
    return ReservationFactory(drop__total_stock=1).drop


# --- What it costs ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make_drop", "refusal"),
    [
        (sold_out, "sold_out"),
        (fully_reserved, "fully_reserved"),
        (partial(DropFactory, upcoming=True), "drop_not_started"),
        (partial(DropFactory, over=True), "drop_ended"),
        (partial(DropFactory, status="ended"), "drop_ended"),
        (partial(DropFactory, status="paused"), "drop_paused"),
        (partial(DropFactory, status="cancelled"), "drop_cancelled"),
    ],
)
def test_refuses_without_a_query_and_with_the_same_answer(
    make_drop, refusal, clock, settings, caplog
):
    settings.DEBUG = True  # only then are statements logged
    drop = make_drop()

    async def scene(lane):
        first = (await learned(lane, drop)).json()
        with counted_queries(caplog) as queries:
            answers = [(await claim(lane, drop)).json() for _ in range(100)]
        return first, answers, queries

    first, answers, queries = play(scene)

    assert queries == []
    assert first["code"] == refusal
    for document in (first, *answers):
        del document["request_id"]
    assert answers == [first] * 100


@pytest.mark.parametrize("make_drop", [sold_out, fully_reserved])
def test_a_storm_costs_at_most_ten_queries_a_second(make_drop, settings, caplog):
    settings.DEBUG = True
    drop = make_drop()

    async def scene(lane):
        loop = asyncio.get_running_loop()
        await learned(lane, drop)
        statuses = []
        # Up to five times: where other work on the machine delays a renewal beyond the
        # memory's age, the claims of that moment rightly ask the database.
        for _ in range(5):
            with counted_queries(caplog) as queries:
                ends_at = loop.time() + 1
                while loop.time() < ends_at:
                    statuses.append((await claim(lane, drop)).status)
                    # A server waits for its sockets now and then; other threads run meanwhile.
                    await asyncio.sleep(0.0005)
            if len(queries) <= 10:
                break
        return statuses, queries

    statuses, queries = play(scene)

    assert set(statuses) == {409}
    assert len(statuses) > 100
    assert 1 <= len(queries) <= 10
    assert drop.reservations.count() == 1


# --- Who has something already ----------------------------------------------------------


def test_who_holds_or_bought_something_is_never_refused_from_memory(clock):
    drop = DropFactory(total_stock=2)
    hold, bought = ReservationFactory(drop=drop), PurchaseFactory(reservation__drop=drop)

    async def scene(lane):
        await learned(lane, drop)
        return await claim(lane, drop, hold.user), await claim(lane, drop, bought.user)

    again, another = play(scene)

    assert (again.status, again.json()["id"]) == (200, str(hold.pk))
    assert (code(another), another.json()["used"]) == ("limit_exceeded", 1)


def test_a_drop_with_too_many_claimants_is_not_read_again_and_again(clock, monkeypatch):
    monkeypatch.setattr(memory, "MAX_CLAIMANTS", 2)
    drop, readings = DropFactory(total_stock=3), []
    holds = ReservationFactory.create_batch(3, drop=drop)

    def read_state(drop_id: uuid.UUID) -> Any:
        readings.append(drop_id)
        return ask_database(drop_id)

    ask_database = memory.read_state
    monkeypatch.setattr(memory, "read_state", read_state)

    async def scene(lane):
        for _ in range(5):
            assert code(await claim(lane, drop)) == "fully_reserved"
            await background_work("ShortageMemory._learn")
        clock.now += 60.0
        await claim(lane, drop)
        await background_work("ShortageMemory._learn")
        return (await claim(lane, drop, holds[0].user)).status

    assert play(scene) == 200
    assert readings == [drop.pk] * 2


# --- It never accepts -------------------------------------------------------------------


def test_a_unit_that_the_memory_still_believes_in_is_not_given_away(clock):
    drop = DropFactory(sizes={"EU 42": 1, "EU 43": 1})
    small, large = drop.variants.all()
    ReservationFactory(drop=drop, variant=small)

    async def scene(lane):
        await learned(lane, drop, variant=str(small.pk))
        # Behind the back of the memory, which read that there is one left.
        await change(ReservationFactory, drop=drop, variant=large)
        return await claim(lane, drop, variant=str(large.pk))

    assert code(play(scene)) == "fully_reserved"
    assert Reservation.objects.count() == 2


def test_the_memory_only_ever_refuses(clock):
    drop = DropFactory(sizes={"EU 42": 1, "EU 43": 5}, max_per_user=3)
    small, large = (variant.pk for variant in drop.variants.all())
    ReservationFactory(drop=drop, variant=drop.variants.first())
    known = {
        Claim(uuid.uuid4(), small): "fully_reserved",
        Claim(uuid.uuid4(), small, 3): "fully_reserved",
        Claim(uuid.uuid4(), small, 4): None,
        Claim(uuid.uuid4(), large): None,
        Claim(uuid.uuid4(), large, 3): None,
        Claim(uuid.uuid4()): None,
        Claim(uuid.uuid4(), uuid.uuid4()): None,
        Claim(drop.reservations.get().user_id, small): None,
    }

    async def scene(lane):
        await learned(lane, drop, variant=str(small))
        return [memory_of(lane).refusal(drop.pk, claim) for claim in known]

    refusals = play(scene)

    assert [refusal and refusal.code for refusal in refusals] == list(known.values())


# --- When there is stock again ----------------------------------------------------------


def give_back_by_release(hold: Reservation) -> None:
    release(hold.pk, hold.user)


def give_back_by_expiry(hold: Reservation) -> None:
    make_overdue(hold)
    expire_all_due()


def give_more(hold: Reservation) -> None:
    adjust_stock(hold.variant.pk, 1, reason="found", user=hold.user)


def make_overdue(hold: Reservation) -> None:
    long_ago = timezone.now() - timedelta(minutes=2)
    Reservation.objects.filter(pk=hold.pk).update(
        created_at=long_ago, expires_at=long_ago + timedelta(minutes=1)
    )


@pytest.mark.parametrize("give_back", [give_back_by_release, give_back_by_expiry, give_more])
def test_stock_that_comes_back_in_this_process_is_given_at_once(give_back, clock):
    hold = ReservationFactory(drop__total_stock=1)

    async def scene(lane):
        await learned(lane, hold.drop)
        refused = await claim(lane, hold.drop)
        await change(give_back, hold)
        return refused, await claim(lane, hold.drop), await claim(lane, hold.drop)

    refused, won, too_late = play(scene)

    assert (code(refused), won.status, code(too_late)) == ("fully_reserved", 201, "fully_reserved")


def test_a_drop_that_is_resumed_in_this_process_is_open_at_once(clock):
    drop = DropFactory(status="paused")

    async def scene(lane):
        await learned(lane, drop)
        await change(update_drop, drop.pk, status="live")
        return await claim(lane, drop)

    assert play(scene).status == 201


def test_what_was_read_before_a_change_is_not_remembered(monkeypatch, clock):
    hold = ReservationFactory(drop__total_stock=1)
    ask_database = memory.read_state

    def read_state_and_then_release(drop_id: uuid.UUID) -> Any:
        state = ask_database(drop_id)
        close_after(release)(hold.pk, hold.user)
        return state

    monkeypatch.setattr(memory, "read_state", read_state_and_then_release)

    async def scene(lane):
        refused = await claim(lane, hold.drop)
        await background_work("ShortageMemory._learn")
        return refused, await claim(lane, hold.drop)

    refused, won = play(scene)

    assert (code(refused), won.status) == ("fully_reserved", 201)


async def storm_until_won(lane: Lane, drop: Drop) -> datetime:
    """Claim without a pause until one claim is won; return when that was."""
    while (answer := await claim(lane, drop)).status == 409:
        pass
    assert answer.status == 201
    return datetime.fromisoformat(answer.json()["created_at"])


async def expire_elsewhere(start_expiry: Callable[..., Process]) -> None:
    process = start_expiry("--once")
    assert await asyncio.to_thread(process.wait) == 0, process.log


async def seconds_from_expiry_to_win(lane: Lane, start_expiry: Any) -> float:
    hold = await change(ReservationFactory, drop__total_stock=1)
    await learned(lane, hold.drop)
    # The memory still expects the hold to last for a minute.
    await change(make_overdue, hold)
    expiry = asyncio.create_task(expire_elsewhere(start_expiry))
    won_at = await storm_until_won(lane, hold.drop)
    await expiry
    expired = await change(Event.objects.filter(type="RESERVATION_EXPIRED").get)
    return (won_at - expired.created_at).total_seconds()


def test_a_unit_that_another_process_expired_is_given_by_the_news(start_expiry, monkeypatch):
    # Nothing else can bring it: neither is read again in the time of this test.
    monkeypatch.setattr(memory, "RENEW_AFTER_SECONDS", 60.0)
    monkeypatch.setattr(memory, "MAX_AGE_SECONDS", 60.0)
    monkeypatch.setattr(hub, "CATCH_UP_SECONDS", 60.0)

    async def scene(lane):
        await hub_hears_others()
        return await seconds_from_expiry_to_win(lane, start_expiry)

    assert 0 <= play(scene, hears_others=True) < 15


def test_a_unit_that_another_process_expired_is_given_in_time_without_redis(servers, start_expiry):
    if servers is None:
        pytest.skip("an outside Redis can't be stopped")

    async def scene(lane):
        return await seconds_from_expiry_to_win(lane, start_expiry)

    servers.stop_valkey()
    try:
        # A quarter of a second, and what a busy machine adds.
        assert 0 <= play(scene, hears_others=True) < 3
    finally:
        servers.start_valkey()


# --- What happens by the mere passing of time -------------------------------------------


@pytest.fixture
def only_deadlines_count(monkeypatch) -> None:
    """Let the memory last for a minute, unless something else ends it."""
    monkeypatch.setattr(memory, "RENEW_AFTER_SECONDS", 60.0)
    monkeypatch.setattr(memory, "MAX_AGE_SECONDS", 60.0)


ON_TIME = timedelta(seconds=5)  # rather than after a minute


def test_a_unit_is_given_as_soon_as_its_hold_is_due(only_deadlines_count):
    expires_at = timezone.now() + timedelta(seconds=1)
    hold = ReservationFactory(drop__total_stock=1, expires_at=expires_at)

    async def scene(lane):
        await learned(lane, hold.drop)
        return await storm_until_won(lane, hold.drop)

    assert timedelta(0) <= play(scene) - expires_at < ON_TIME


def test_a_hold_that_is_due_before_the_reading_is_not_waited_for(clock, monkeypatch):
    hold = ReservationFactory(drop__total_stock=1)
    read_state = memory.read_state

    def read_late(drop_id):
        long_ago = timezone.now() - timedelta(minutes=2)
        due = Reservation.objects.filter(pk=hold.pk)
        due.update(created_at=long_ago, expires_at=timezone.now() - timedelta(milliseconds=2))
        return read_state(drop_id)

    monkeypatch.setattr(memory, "read_state", read_late)

    async def scene(lane):
        refused = await learned(lane, hold.drop)
        return refused.status, (await claim(lane, hold.drop)).status

    assert play(scene) == (409, 201)


def test_a_change_while_the_reading_is_stored_is_not_missed(clock, monkeypatch):
    hold = ReservationFactory(drop__total_stock=1)
    forget_unasked = ShortageMemory._forget_unasked

    def change_meanwhile(self, now):
        forget_unasked(self, now)
        self.forget(str(hold.drop.pk))

    monkeypatch.setattr(ShortageMemory, "_forget_unasked", change_meanwhile)

    async def scene(lane):
        await claim(lane, hold.drop)
        await background_work("ShortageMemory._learn")
        return memory_of(lane)._remembered

    assert play(scene) == {}


@pytest.mark.parametrize("error", [InterfaceError("gone"), Drop.DoesNotExist()])
def test_a_reading_that_fails_is_no_unhandled_error(clock, monkeypatch, error):
    hold = ReservationFactory(drop__total_stock=1)

    def fail(drop_id):
        raise error

    monkeypatch.setattr(memory, "read_state", fail)

    async def scene(lane):
        unhandled = []
        asyncio.get_running_loop().set_exception_handler(lambda _, found: unhandled.append(found))
        refused = await claim(lane, hold.drop)
        await background_work("ShortageMemory._learn")
        gc.collect()
        return refused.status, (await claim(lane, hold.drop)).status, unhandled

    assert play(scene) == (409, 409, [])


def test_a_drop_opens_on_time(only_deadlines_count):
    starts_at = timezone.now() + timedelta(seconds=1)
    drop = DropFactory(status="scheduled", starts_at=starts_at)

    async def scene(lane):
        assert code(await learned(lane, drop)) == "drop_not_started"
        return await storm_until_won(lane, drop)

    assert timedelta(0) <= play(scene) - starts_at < ON_TIME


def test_a_drop_that_ends_says_so_on_time(only_deadlines_count):
    ends_at = timezone.now() + timedelta(seconds=1)
    sold = PurchaseFactory(reservation__drop=DropFactory(total_stock=1, ends_at=ends_at))

    async def scene(lane):
        await learned(lane, sold.drop)
        while code(await claim(lane, sold.drop)) == "sold_out":
            pass
        ended = timezone.now()
        return ended, code(await claim(lane, sold.drop))

    ended, refusal = play(scene)

    assert refusal == "drop_ended"
    assert timedelta(0) <= ended - ends_at < ON_TIME


def test_nothing_is_remembered_for_longer_than_a_quarter_of_a_second(clock, monkeypatch):
    hold = ReservationFactory(drop__total_stock=1)

    async def scene(lane):
        await learned(lane, hold.drop)
        # As another process would: nobody here is told.
        monkeypatch.setattr("realtime.services.publish", lambda events, at: None)
        await change(release, hold.pk, hold.user)
        clock.now += 0.1
        early = await claim(lane, hold.drop)
        clock.now += 0.151
        return early, await claim(lane, hold.drop)

    early, late = play(scene)

    assert (code(early), late.status) == ("fully_reserved", 201)


# --- Its size ---------------------------------------------------------------------------


def test_drops_that_nobody_asks_for_any_more_are_forgotten(clock):
    drops = [fully_reserved() for _ in range(3)]

    async def scene(lane):
        for drop in drops[:2]:
            await learned(lane, drop)
        clock.now += 0.3
        await learned(lane, drops[2])
        return list(memory_of(lane)._remembered)

    assert play(scene) == [drops[2].pk]


def test_odd_quantities_take_no_space_without_end(clock):
    hold = ReservationFactory(drop__total_stock=1, drop__max_per_user=None)

    async def scene(lane):
        await learned(lane, hold.drop)
        for quantity in range(1, 3000):
            refusal = memory_of(lane).refusal(hold.drop.pk, Claim(uuid.uuid4(), None, quantity))
            assert refusal.code == "fully_reserved"
        return len(memory_of(lane)._remembered[hold.drop.pk].refusals)

    assert play(scene) <= 1000
