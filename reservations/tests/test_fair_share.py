"""Limits per user that hold: over all drops, and after holds that nobody used."""

import random
from datetime import timedelta
from functools import partial

import pytest
from django.utils import timezone

from drops.models import Drop
from drops.tests.factories import DropFactory
from purchases.services import purchase
from reservations.exceptions import Cooldown, LimitExceeded, SoldOut, TooManyHolds
from reservations.models import Reservation, ReservationStatus
from reservations.services import Claim, release, reserve, reserve_many, reserve_on_drops
from reservations.tests.factories import ReservationFactory
from tests.concurrency import another_session, at_once, blocked
from tests.queries import statements
from tests.unguarded import read_before_anyone_writes, without_row_locks
from users.tests.factories import UserFactory


def stock_of(drop: Drop) -> int:
    drop.refresh_from_db()
    return drop.available_stock


# --- Over all drops ---------------------------------------------------------------------


@pytest.fixture
def two_holds(settings):
    settings.MAX_ACTIVE_HOLDS = 2


def test_refuses_a_hold_beyond_the_limit_over_all_drops(db, two_holds):
    user, drops = UserFactory(), [DropFactory() for _ in range(3)]
    for drop in drops[:2]:
        reserve(drop.pk, Claim(user.pk))

    with pytest.raises(TooManyHolds) as refused:
        reserve(drops[2].pk, Claim(user.pk))

    assert (refused.value.code, refused.value.members) == (
        "limit_exceeded",
        {"limit": 2, "used": 2},
    )
    assert stock_of(drops[2]) == 10
    assert reserve(drops[2].pk, Claim(UserFactory().pk))


def test_claims_on_several_drops_in_one_transaction_count_together(db, two_holds):
    user, drops = UserFactory(), [DropFactory() for _ in range(4)]

    outcomes = reserve_on_drops({drop.pk: [Claim(user.pk)] for drop in drops})

    kinds = [type(outcome) for (outcome,) in outcomes.values()]
    assert sorted(kinds, key=str) == [TooManyHolds] * 2 + [Reservation] * 2


@pytest.mark.parametrize("way", ["bought", "released", "overdue"])
def test_an_ended_hold_makes_room(db, two_holds, way):
    user, new = UserFactory(), DropFactory()
    ReservationFactory(user=user)
    if way == "overdue":
        ReservationFactory(user=user, overdue=True)
    else:
        hold = reserve(DropFactory().pk, Claim(user.pk))
        purchase(hold.drop_id, user.pk) if way == "bought" else release(hold.pk, user)

    assert reserve(new.pk, Claim(user.pk)).is_new


def test_a_hold_that_exists_is_still_returned(db, two_holds):
    user = UserFactory()
    holds = [reserve(DropFactory().pk, Claim(user.pk)) for _ in range(2)]

    assert reserve(holds[0].drop_id, Claim(user.pk)).pk == holds[0].pk


def test_a_drop_without_stock_says_so_first(db, two_holds):
    user = UserFactory()
    for _ in range(2):
        ReservationFactory(user=user)

    with pytest.raises(SoldOut):
        reserve(DropFactory(total_stock=0).pk, Claim(user.pk))


def test_any_number_of_holds_and_no_lock_without_the_limit(db):
    user = UserFactory()
    for _ in range(3):
        reserve(DropFactory().pk, Claim(user.pk))
    drop = DropFactory()

    with statements() as made:
        reserve(drop.pk, Claim(user.pk))

    assert len(made) == 3
    assert not [sql for sql in made if "users_user" in sql and "FOR NO KEY UPDATE" in sql]


def holds_of(user) -> int:
    return Reservation.objects.active().filter(user=user).count()


def claims_everywhere(user) -> list:
    return [partial(reserve_many, DropFactory().pk, [Claim(user.pk)]) for _ in range(6)]


@pytest.mark.django_db(transaction=True)
def test_the_limit_holds_for_parallel_claims_on_many_drops(two_holds):
    user = UserFactory()

    outcomes = [outcome for (outcome,) in at_once(*claims_everywhere(user))]

    assert sum(isinstance(outcome, Reservation) for outcome in outcomes) == 2
    assert sum(isinstance(outcome, LimitExceeded) for outcome in outcomes) == 4
    assert holds_of(user) == 2


@pytest.mark.django_db(transaction=True)
def test_twin_without_the_lock_exceeds_the_limit(two_holds):
    user = UserFactory()

    with without_row_locks():
        read_before_anyone_writes(*claims_everywhere(user))

    assert holds_of(user) > 2


@pytest.mark.django_db(transaction=True)
def test_a_claim_on_another_drop_waits_for_the_user(two_holds):
    user, drop = UserFactory(), DropFactory()

    with another_session() as other:
        other.execute("SELECT FROM users_user WHERE id = %s FOR NO KEY UPDATE", [user.pk])
        with blocked(lambda: reserve(drop.pk, Claim(user.pk))):
            other.execute("ROLLBACK")
            other.execute("BEGIN")

    assert holds_of(user) == 1


@pytest.mark.django_db(transaction=True)
def test_batches_of_the_same_users_in_any_order_do_not_deadlock(settings):
    settings.MAX_ACTIVE_HOLDS = 3
    users, drops = UserFactory.create_batch(12), [DropFactory(total_stock=100) for _ in range(6)]
    shuffled = [random.Random(seed).sample(users, len(users)) for seed in range(6)]

    batches = at_once(
        *[
            partial(reserve_many, drop.pk, [Claim(user.pk) for user in order])
            for drop, order in zip(drops, shuffled, strict=True)
        ]
    )

    assert not [o for batch in batches for o in batch if type(o) not in (Reservation, TooManyHolds)]
    assert [holds_of(user) for user in users] == [3] * 12


# --- After holds that nobody used -------------------------------------------------------


def drop_with_cooldown(**fields) -> Drop:
    return DropFactory(**{"max_expired_holds": 2, "hold_cooldown_seconds": 300} | fields)


def expired_hold(drop, user, seconds_ago: float, **fields) -> Reservation:
    at = timezone.now() - timedelta(seconds=seconds_ago)
    return ReservationFactory(
        **{"drop": drop, "user": user, "expires_at": at, "created_at": at - timedelta(minutes=1)}
        | {"status": ReservationStatus.EXPIRED}
        | fields
    )


def test_waits_after_too_many_expired_holds(db):
    drop, user = drop_with_cooldown(), UserFactory()
    expired_hold(drop, user, 500)
    expired_hold(drop, user, 100)

    with pytest.raises(Cooldown) as refused:
        reserve(drop.pk, Claim(user.pk))

    assert refused.value.code == "cooldown"
    assert 150 < refused.value.retry_after_seconds <= 200
    assert stock_of(drop) == 10


def test_counts_the_hold_whose_time_was_up_just_now(db):
    drop, user = drop_with_cooldown(), UserFactory()
    expired_hold(drop, user, 500)
    expired_hold(drop, user, 10, status=ReservationStatus.ACTIVE)

    with pytest.raises(Cooldown) as refused:
        reserve(drop.pk, Claim(user.pk))

    assert 240 < refused.value.retry_after_seconds <= 290


@pytest.mark.parametrize(
    ("seconds_ago", "fields"),
    [
        ((500, 301), {}),
        ((100,), {}),
        ((200, 100), {"hold_cooldown_seconds": 0}),
        ((200, 100), {"hold_cooldown_seconds": None}),
        ((200, 100), {"max_expired_holds": None}),
        ((200, 100), {"max_expired_holds": 3}),
    ],
)
def test_may_hold_again(db, seconds_ago, fields):
    drop, user = drop_with_cooldown(**fields), UserFactory()
    for seconds in seconds_ago:
        expired_hold(drop, user, seconds)

    assert reserve(drop.pk, Claim(user.pk)).is_new


def test_only_own_holds_on_this_drop_that_expired_count(db):
    drop, user = drop_with_cooldown(), UserFactory()
    for status in (ReservationStatus.RELEASED, ReservationStatus.VOIDED):
        expired_hold(drop, user, 100, status=status)
    for _ in range(3):
        expired_hold(drop, UserFactory(), 100)
        expired_hold(drop_with_cooldown(), user, 100)

    assert reserve(drop.pk, Claim(user.pk)).is_new


def test_a_batch_judges_each_of_its_users(db):
    drop, patient, hasty = drop_with_cooldown(), UserFactory(), UserFactory()
    for _ in range(2):
        expired_hold(drop, hasty, 10)

    first, second = reserve_many(drop.pk, [Claim(hasty.pk), Claim(patient.pk)])

    assert isinstance(first, Cooldown)
    assert isinstance(second, Reservation)


def test_costs_one_statement_where_it_is_on(db):
    drop, user = drop_with_cooldown(), UserFactory()

    with statements() as made:
        reserve(drop.pk, Claim(user.pk))

    assert len(made) == 4


@pytest.mark.django_db(transaction=True)
def test_the_cooldown_holds_for_parallel_claims():
    drop, user = drop_with_cooldown(max_expired_holds=1), UserFactory()
    expired_hold(drop, user, 5, status=ReservationStatus.ACTIVE)

    outcomes = at_once(*[partial(reserve_many, drop.pk, [Claim(user.pk)]) for _ in range(6)])

    assert {type(outcome) for (outcome,) in outcomes} == {Cooldown}
    assert stock_of(drop) == 10


def test_the_answer_says_when_to_come_back(client_of, db):
    drop, user = drop_with_cooldown(), UserFactory()
    for _ in range(2):
        expired_hold(drop, user, 10)

    response = client_of(user).post(f"/api/drops/{drop.pk}/reserve")

    assert (response.status_code, response.json()["code"]) == (409, "cooldown")
    assert 240 < int(response["Retry-After"]) <= 290


def test_creator_and_staff_change_the_limits_and_nobody_else(client_of, db):
    drop = DropFactory()
    limits = {"max_per_user": 3, "hold_cooldown_seconds": 60, "max_expired_holds": 1}
    path = f"/api/drops/{drop.pk}"

    assert client_of(UserFactory()).patch(path, limits).status_code == 403
    assert client_of(drop.created_by).patch(path, limits).json().items() >= limits.items()
    off = {"max_per_user": None, "hold_cooldown_seconds": None, "max_expired_holds": None}
    answer = client_of(UserFactory(is_staff=True)).patch(path, off)
    assert answer.json().items() >= off.items()


def test_a_drop_is_created_with_its_limits(client_of, db):
    body = {"name": "Aurora", "price": 1, "total_stock": 1}
    limits = {"hold_cooldown_seconds": 60, "max_expired_holds": 1}

    answer = client_of(UserFactory()).post("/api/drops", body | limits)

    assert answer.json().items() >= limits.items()
    assert client_of(UserFactory()).post("/api/drops", body).json()["max_expired_holds"] is None
