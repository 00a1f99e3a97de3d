"""Two use cases on one unit at once, in the worst order; each with a twin without the guard."""

import itertools
import random
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from django.db import OperationalError, connection, transaction
from django.db.models import F, QuerySet, Sum
from psycopg.errors import DeadlockDetected, LockNotAvailable
from rest_framework.exceptions import APIException

from config.database import read_clock
from drops.exceptions import StockCommitted
from drops.models import Drop, StockAdjustment, Variant
from drops.services import adjust_stock, lock_drop, update_drop
from drops.tests.factories import DropFactory
from purchases.audit import audit_stock
from purchases.models import Purchase
from purchases.services import purchase
from realtime.models import Event, EventType
from reservations.exceptions import (
    FullyReserved,
    LimitExceeded,
    ReservationExpired,
    ReservationNotActive,
    SoldOut,
)
from reservations.models import Reservation, ReservationStatus
from reservations.services import Claim, expire_due, release, reserve, reserve_many
from reservations.tests.factories import ReservationFactory
from tests.concurrency import another_session, at_once, blocked
from tests.unguarded import (
    STOCK_CONSTRAINTS,
    read_before_anyone_writes,
    without_constraints,
    without_row_locks,
)
from users.models import User
from users.tests.factories import UserFactory

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def unguarded(transactional_db):
    """Take away the threads' row locks, and every constraint that would refuse the result."""
    constraints = (
        *STOCK_CONSTRAINTS,
        "one_active_reservation_per_user_and_drop",
        "purchases_purchase_reservation_id_key",
    )
    with without_constraints(*constraints), without_row_locks():
        yield


def race(*calls: Callable[[], Any], **options: float) -> list[Any]:
    """Run the calls in the worst order; return what each returned, refusals included."""
    return read_before_anyone_writes(*(partial(outcome_of, call) for call in calls), **options)


def outcome_of(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except APIException as refusal:
        return refusal


def stock_of(drop: Drop) -> tuple[int, int, int]:
    """Return available, held and sold units: held and sold from the rows, not the counters."""
    drop.refresh_from_db()
    held = Reservation.objects.active().filter(drop=drop).aggregate(n=Sum("quantity", default=0))
    sold = Purchase.objects.filter(drop=drop).aggregate(n=Sum("quantity", default=0))
    return drop.available_stock, held["n"], sold["n"]


def nothing_is_wrong() -> bool:
    return audit_stock().differences == []


def wait_for_deadline(hold: Reservation) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_sleep_until(%s)", [hold.expires_at])


# --- Two users, one unit ----------------------------------------------------------------


def reserve_the_last_unit() -> tuple[Drop, list[Any]]:
    drop = DropFactory(total_stock=1)
    claims = [Claim(user.pk) for user in UserFactory.create_batch(2)]
    return drop, race(*(partial(reserve, drop.pk, claim) for claim in claims))


def test_one_of_two_users_gets_the_last_unit():
    drop, outcomes = reserve_the_last_unit()

    assert {type(outcome) for outcome in outcomes} == {Reservation, FullyReserved}
    assert stock_of(drop) == (0, 1, 0)
    assert nothing_is_wrong()


def test_without_the_guard_both_users_get_the_last_unit(unguarded):
    drop, _ = reserve_the_last_unit()

    assert stock_of(drop) == (-1, 2, 0)


# --- One user, twice --------------------------------------------------------------------


def reserve_twice() -> tuple[Drop, list[Any]]:
    drop, user = DropFactory(total_stock=5), UserFactory()
    return drop, race(*(partial(reserve, drop.pk, Claim(user.pk)),) * 2)


def test_a_user_who_reserves_twice_at_once_gets_one_hold():
    drop, (first, second) = reserve_twice()

    assert first == second
    assert sorted([first.is_new, second.is_new]) == [False, True]
    assert stock_of(drop) == (4, 1, 0)
    assert nothing_is_wrong()


def test_without_the_guard_a_user_who_reserves_twice_at_once_gets_two_holds(unguarded):
    drop, _ = reserve_twice()

    assert stock_of(drop) == (3, 2, 0)


def reserve_what_the_limit_allows_once() -> tuple[Drop, list[Any]]:
    drop, user = DropFactory(total_stock=5, max_per_user=2), UserFactory()
    reserve(drop.pk, Claim(user.pk))
    purchase(drop.pk, user.pk)

    def reserve_and_purchase() -> Any:
        reserve(drop.pk, Claim(user.pk))
        return purchase(drop.pk, user.pk)

    return drop, race(reserve_and_purchase, reserve_and_purchase)


def test_a_user_who_buys_twice_at_once_stays_within_the_limit():
    drop, outcomes = reserve_what_the_limit_allows_once()

    assert {type(outcome) for outcome in outcomes} <= {Purchase, LimitExceeded}
    assert stock_of(drop) == (3, 0, 2)
    assert nothing_is_wrong()


def test_without_the_guard_a_user_who_buys_twice_at_once_exceeds_the_limit(unguarded):
    drop, _ = reserve_what_the_limit_allows_once()

    _, held, sold = stock_of(drop)
    assert held + sold > 2


def test_a_crowd_of_one_user_stays_within_the_limit():
    drop, user = DropFactory(total_stock=50, max_per_user=3), UserFactory()

    def buy_again_and_again() -> None:
        for _ in range(5):
            outcome_of(partial(reserve, drop.pk, Claim(user.pk)))
            outcome_of(partial(purchase, drop.pk, user.pk))

    at_once(*[buy_again_and_again] * 6)

    assert stock_of(drop) == (47, 0, 3)
    assert nothing_is_wrong()


# --- One hold, two ends -----------------------------------------------------------------


def purchase_twice() -> tuple[Drop, list[Any]]:
    drop, user = DropFactory(total_stock=5), UserFactory()
    reserve(drop.pk, Claim(user.pk))
    return drop, race(*(partial(purchase, drop.pk, user.pk),) * 2)


def test_two_purchases_of_one_hold_at_once_are_one():
    drop, (first, second) = purchase_twice()

    assert first == second
    assert sorted([first.is_new, second.is_new]) == [False, True]
    assert stock_of(drop) == (4, 0, 1)
    assert Event.objects.filter(type=EventType.PURCHASE_COMPLETED).count() == 1
    assert nothing_is_wrong()


def test_without_the_guard_two_purchases_of_one_hold_at_once_are_two(unguarded):
    drop, _ = purchase_twice()

    assert stock_of(drop) == (4, 0, 2)


def release_and_purchase() -> tuple[Drop, list[Any]]:
    drop, user = DropFactory(total_stock=1), UserFactory()
    hold = reserve(drop.pk, Claim(user.pk))
    return drop, race(partial(release, hold.pk, user), partial(purchase, drop.pk, user.pk))


@pytest.mark.parametrize("round_number", range(3))
def test_a_hold_is_either_released_or_purchased(round_number):
    drop, (released, bought) = release_and_purchase()

    if isinstance(bought, Purchase):
        assert isinstance(released, ReservationNotActive)
        assert stock_of(drop) == (0, 0, 1)
    else:
        assert isinstance(bought, ReservationNotActive)
        assert released.status == ReservationStatus.RELEASED
        assert stock_of(drop) == (1, 0, 0)
    assert nothing_is_wrong()


def test_without_the_guard_a_hold_is_released_and_purchased(unguarded):
    drop, _ = release_and_purchase()

    assert stock_of(drop) == (1, 0, 1)


def expire_and_purchase_at_the_deadline() -> tuple[Drop, list[Any]]:
    """Let the purchase begin just before the deadline and the sweep just after it."""
    drop, user = DropFactory(total_stock=1), UserFactory()
    hold = reserve(drop.pk, Claim(user.pk))
    hold.expires_at = read_clock() + timedelta(seconds=1)
    Reservation.objects.update(expires_at=hold.expires_at)

    def expire_after_the_deadline() -> Any:
        wait_for_deadline(hold)
        return expire_due()

    bought = partial(purchase, drop.pk, user.pk)
    return drop, race(bought, expire_after_the_deadline, patience_seconds=3)


def test_a_purchase_begun_in_time_is_not_expired_under_way():
    drop, (bought, swept) = expire_and_purchase_at_the_deadline()

    assert isinstance(bought, Purchase)
    assert swept == []
    assert stock_of(drop) == (0, 0, 1)
    assert nothing_is_wrong()


def test_without_the_guard_a_purchase_begun_in_time_is_also_expired(unguarded):
    drop, _ = expire_and_purchase_at_the_deadline()

    assert stock_of(drop) == (1, 0, 1)


def test_a_purchase_that_waited_past_the_deadline_comes_too_late():
    hold = ReservationFactory()
    outcomes: list[Any] = []

    with another_session() as other:
        other.execute("SELECT FROM drops_drop WHERE id = %s FOR UPDATE", [hold.drop_id])
        buy = partial(purchase, hold.drop_id, hold.user_id)
        with blocked(lambda: outcomes.append(outcome_of(buy))):
            # The purchase began in time; the deadline passes while it waits for the lock.
            Reservation.objects.update(expires_at=read_clock())
            other.execute("ROLLBACK")

    assert [type(outcome) for outcome in outcomes] == [ReservationExpired]
    assert stock_of(hold.drop) == (9, 1, 0)


def test_around_the_deadline_a_hold_is_either_expired_or_purchased():
    drop = DropFactory(total_stock=20)
    holds = [reserve(drop.pk, Claim(user.pk)) for user in UserFactory.create_batch(20)]
    # One deadline every three milliseconds, while purchases come as fast as they can.
    start = read_clock() + timedelta(milliseconds=30)
    for number, hold in enumerate(holds):
        hold.expires_at = start + number * timedelta(milliseconds=3)
    Reservation.objects.bulk_update(holds, ["expires_at"])
    outcomes: list[Any] = []

    def buy() -> None:
        for hold in holds:
            outcomes.append(outcome_of(partial(purchase, drop.pk, hold.user_id)))

    def sweep() -> None:
        while Reservation.objects.active().exists():
            expire_due()

    at_once(buy, sweep, sweep)

    sold = [outcome for outcome in outcomes if isinstance(outcome, Purchase)]
    refused = [outcome for outcome in outcomes if isinstance(outcome, ReservationExpired)]
    assert len(sold) + len(refused) == 20
    assert stock_of(drop) == (len(refused), 0, len(sold))
    expired = Event.objects.filter(type=EventType.RESERVATION_EXPIRED)
    assert expired.count() == len(refused)
    assert nothing_is_wrong()


# --- Two sweeps, one backlog ------------------------------------------------------------


def expire_twice() -> tuple[Drop, list[Any]]:
    drop = DropFactory(total_stock=30)
    reserve_many(drop.pk, [Claim(user.pk) for user in UserFactory.create_batch(30)])
    past = timedelta(hours=1)
    Reservation.objects.update(created_at=F("created_at") - past, expires_at=F("expires_at") - past)
    return drop, race(partial(expire_due, 10), partial(expire_due, 10))


def test_two_sweeps_at_once_expire_nothing_twice():
    drop, sweeps = expire_twice()

    expired = [pk for sweep in sweeps for holds in sweep for pk in holds.reservation_ids]
    assert len(expired) == len(set(expired)) == 20
    assert stock_of(drop) == (20, 10, 0)
    told = Event.objects.filter(type=EventType.RESERVATION_EXPIRED).values_list("data", flat=True)
    assert {event["reservationId"] for event in told} == {str(pk) for pk in expired}
    assert len(told) == 20
    assert nothing_is_wrong()


def test_without_the_guard_two_sweeps_at_once_return_units_twice(unguarded):
    drop, _ = expire_twice()

    assert stock_of(drop) == (20, 20, 0)


# --- Staff and shoppers -----------------------------------------------------------------


def withdraw_and_reserve_the_last_unit() -> tuple[Drop, list[Any]]:
    drop, user = DropFactory(total_stock=1), UserFactory()
    withdraw = partial(
        adjust_stock, drop.variants.get().pk, -1, reason="damaged", user=UserFactory(staff=True)
    )
    return drop, race(withdraw, partial(reserve, drop.pk, Claim(user.pk)))


@pytest.mark.parametrize("round_number", range(3))
def test_the_last_unit_is_either_withdrawn_or_reserved(round_number):
    drop, (withdrawn, reserved) = withdraw_and_reserve_the_last_unit()

    if isinstance(withdrawn, StockAdjustment):
        assert isinstance(reserved, SoldOut)
        assert stock_of(drop) == (0, 0, 0)
        assert drop.total_stock == 0
    else:
        assert isinstance(withdrawn, StockCommitted)
        assert stock_of(drop) == (0, 1, 0)
        assert drop.total_stock == 1
    assert nothing_is_wrong()


def test_without_the_guard_the_last_unit_is_withdrawn_and_reserved(unguarded):
    drop, _ = withdraw_and_reserve_the_last_unit()

    assert stock_of(drop) == (-1, 1, 0)
    assert drop.total_stock == 0


# --- The order of the locks -------------------------------------------------------------


def is_locked(rows: QuerySet) -> bool:
    try:
        with transaction.atomic():
            rows.select_for_update(no_key=True, nowait=True).get()
    except OperationalError as exc:
        if not isinstance(exc.__cause__, LockNotAvailable):
            raise
        return True
    return False


def lock_and_let_go(drop: Drop) -> None:
    with transaction.atomic():
        lock_drop(drop.pk)


def test_the_drop_is_locked_before_its_variants():
    drop = DropFactory(sizes={"EU 42": 1, "EU 43": 1})
    first, second = Variant.objects.filter(drop=drop).order_by("pk")

    with another_session() as other:
        other.execute("SELECT FROM drops_variant WHERE id = %s FOR UPDATE", [first.pk])
        with blocked(partial(lock_and_let_go, drop)):
            assert is_locked(Drop.objects.filter(pk=drop.pk))
            assert not is_locked(Variant.objects.filter(pk=second.pk))
            other.execute("ROLLBACK")


def test_the_variants_are_free_while_the_drop_is_waited_for():
    drop = DropFactory(sizes={"EU 42": 1, "EU 43": 1})

    with another_session() as other:
        other.execute("SELECT FROM drops_drop WHERE id = %s FOR UPDATE", [drop.pk])
        with blocked(partial(lock_and_let_go, drop)):
            for variant in Variant.objects.filter(drop=drop):
                assert not is_locked(Variant.objects.filter(pk=variant.pk))
            other.execute("ROLLBACK")


def test_one_who_waited_for_the_lock_sees_the_last_commit():
    drop, user = DropFactory(sizes={"EU 42": 1, "EU 43": 1}), UserFactory()
    small, large = drop.variants.all()
    outcomes: list[Any] = []

    with another_session() as other:
        other.execute("SELECT FROM drops_drop WHERE id = %s FOR UPDATE", [drop.pk])
        claim = Claim(user.pk, large.pk)
        with blocked(lambda: outcomes.append(outcome_of(partial(reserve, drop.pk, claim)))):
            for table, pk in (("drops_variant", large.pk), ("drops_drop", drop.pk)):
                other.execute(
                    f"UPDATE {table} SET available_stock = available_stock - 1,"
                    " sold_stock = sold_stock + 1 WHERE id = %s",
                    [pk],
                )
            other.execute("COMMIT")

    assert isinstance(outcomes[0], SoldOut)


@contextmanager
def deadlocks_counted():
    """Yield a function that returns how many deadlocks there were since."""

    def count() -> int:
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
            )
            return cursor.fetchone()[0]

    before = count()
    yield lambda: count() - before


def test_everything_at_once_makes_no_deadlock_and_no_wrong_stock(settings):
    settings.RESERVATION_TTL_SECONDS = 1
    drops = [
        DropFactory(sizes={"EU 42": 4, "EU 43": 3, "EU 44": 5}, max_per_user=3) for _ in range(2)
    ]
    variants = list(Variant.objects.all())
    users = UserFactory.create_batch(12)

    def shop(seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(15):
            drop, user = choose.choice(drops), choose.choice(users)
            claims = [
                Claim(choose.choice(users).pk, choose.choice(variants).pk, choose.choice((1, 1, 2)))
                for _ in range(4)
            ]
            reserve_many(drop.pk, claims)
            outcome_of(partial(purchase, drop.pk, user.pk))
            if hold := Reservation.objects.active().filter(user=user).first():
                outcome_of(partial(release, hold.pk, user))

    def sweep() -> None:
        for _ in range(40):
            expire_due(batch=2)

    def restock(staff: User) -> None:
        for delta, variant in itertools.product((1, -1), variants):
            adjust = partial(adjust_stock, variant.pk, delta, reason="count", user=staff)
            outcome_of(adjust)

    def edit() -> None:
        for number in range(10):
            for drop in drops:
                update_drop(drop.pk, name=f"Edition {number}")

    staff = UserFactory(staff=True)
    with deadlocks_counted() as deadlocks:
        at_once(*(partial(shop, seed) for seed in range(4)), sweep, sweep, edit)
        at_once(*(partial(shop, seed) for seed in range(4, 8)), sweep, partial(restock, staff))
        assert deadlocks() == 0

    assert nothing_is_wrong()
    for drop in drops:
        drop.refresh_from_db()
        seqs = list(drop.events.order_by("seq").values_list("seq", flat=True))
        assert seqs == list(range(1, drop.seq + 1))


def test_in_another_order_the_locks_would_deadlock():
    drop = DropFactory(total_stock=1)
    outcomes: list[Any] = []

    def lock_in_order() -> None:
        try:
            lock_and_let_go(drop)
        except OperationalError as exc:
            outcomes.append(exc.__cause__)

    with deadlocks_counted() as deadlocks:
        with another_session() as other:
            other.execute("SELECT FROM drops_variant WHERE drop_id = %s FOR UPDATE", [drop.pk])
            with blocked(lock_in_order):
                try:
                    other.execute("SELECT FROM drops_drop WHERE id = %s FOR UPDATE", [drop.pk])
                except OperationalError as exc:
                    outcomes.append(exc.__cause__)
                other.execute("ROLLBACK")
        assert deadlocks() == 1

    assert [type(cause) for cause in outcomes] == [DeadlockDetected]
