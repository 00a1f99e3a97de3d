import time
import uuid
from datetime import timedelta
from decimal import Decimal
from functools import partial

import pytest
from django.db import connection
from django.utils import timezone
from rest_framework.exceptions import ValidationError

from drops.exceptions import (
    DropCancelled,
    DropEnded,
    DropNotPublished,
    DropNotStarted,
    DropPaused,
    format_instant,
)
from drops.models import Drop
from drops.services import update_drop
from drops.tests.factories import DropFactory
from purchases.audit import audit_stock
from purchases.services import purchase
from realtime.models import Event
from reservations import services
from reservations.exceptions import (
    AlreadyReserved,
    FullyReserved,
    LimitExceeded,
    ReservationExpired,
    ReservationNotActive,
    SoldOut,
    VariantRequired,
)
from reservations.models import Reservation, ReservationStatus
from reservations.services import (
    MAX_EXPIRED_PER_TRANSACTION,
    Claim,
    cancel_drop,
    expire_all_due,
    expire_due,
    release,
    reserve,
    reserve_many,
    seconds_until_next_deadline,
    void_reservation,
)
from reservations.tests.factories import ReservationFactory, hold_all
from tests.concurrency import another_session, at_once, blocked, lock_timeout
from tests.queries import statements
from users.exceptions import UnknownUser
from users.models import User
from users.tests.factories import UserFactory

MINUTE = timedelta(minutes=1)


def stock(row):
    row.refresh_from_db()
    return row.total_stock, row.available_stock, row.sold_stock


def events(drop):
    """Return the (seq, type) of each event of the drop."""
    return list(drop.events.order_by("seq").values_list("seq", "type"))


def nothing_happened(drop, *, available):
    drop.refresh_from_db()
    return (drop.available_stock, drop.seq, Event.objects.count()) == (available, 0, 0)


# --- Reserve ----------------------------------------------------------------------------


def test_a_hold_takes_a_unit_for_a_minute_and_tells(db):
    drop, user = DropFactory(total_stock=10), UserFactory()
    variant = drop.variants.get()

    hold = reserve(drop.pk, Claim(user.pk))

    assert hold.is_new
    assert hold == Reservation.objects.get()
    assert (hold.drop, hold.variant, hold.user_id) == (drop, variant, user.pk)
    assert (hold.status, hold.quantity) == ("ACTIVE", 1)
    assert (hold.unit_price, hold.currency) == (Decimal("199.000"), "USD")
    assert hold.expires_at - hold.created_at == timedelta(seconds=60)
    assert stock(drop) == stock(variant) == (10, 9, 0)
    event = drop.events.get()
    assert (event.seq, event.type, event.created_at) == (1, "STOCK_UPDATED", hold.created_at)
    assert event.data == {
        "dropId": str(drop.pk),
        "availableStock": 9,
        "availability": "available",
        "soldStock": 0,
        "variants": [{"id": str(variant.pk), "availableStock": 9}],
    }


def test_a_hold_lasts_as_long_as_the_setting_says(db, settings):
    settings.RESERVATION_TTL_SECONDS = 5

    hold = reserve(DropFactory().pk, Claim(UserFactory().pk))

    assert hold.expires_at - hold.created_at == timedelta(seconds=5)


def test_a_hold_ends_with_its_drop(db):
    ends_at = timezone.now() + timedelta(seconds=20)
    drop = DropFactory(ends_at=ends_at)

    assert reserve(drop.pk, Claim(UserFactory().pk)).expires_at == ends_at


def test_who_holds_already_gets_the_same_hold_again(db):
    drop, user = DropFactory(total_stock=10, max_per_user=5), UserFactory()
    first = reserve(drop.pk, Claim(user.pk, quantity=2))

    again = reserve(drop.pk, Claim(user.pk, quantity=3))

    assert not again.is_new
    assert again.pk == first.pk
    assert (again.quantity, again.expires_at) == (2, first.expires_at)
    assert stock(drop) == (10, 8, 0)
    assert events(drop) == [(1, "STOCK_UPDATED")]


def test_the_same_hold_is_shown_again_while_the_drop_is_paused(db):
    hold = ReservationFactory()
    update_drop(hold.drop.pk, status="paused")

    assert reserve(hold.drop.pk, Claim(hold.user.pk)) == hold


def test_refuses_a_second_hold_of_another_size_and_keeps_the_stock(db):
    drop, user = DropFactory(sizes={"EU 42": 2, "EU 43": 2}, max_per_user=5), UserFactory()
    first, other = drop.variants.all()
    hold = reserve(drop.pk, Claim(user.pk, first.pk))

    with pytest.raises(AlreadyReserved) as refusal:
        reserve(drop.pk, Claim(user.pk, other.pk))

    assert refusal.value.members == {"reservation_id": str(hold.pk)}
    assert (stock(first), stock(other)) == ((2, 1, 0), (2, 2, 0))
    assert Reservation.objects.get() == hold


def test_takes_units_of_the_named_size_only(db):
    drop, user = DropFactory(sizes={"EU 42": 2, "EU 43": 3}, max_per_user=5), UserFactory()
    first, other = drop.variants.all()

    reserve(drop.pk, Claim(user.pk, other.pk, quantity=3))

    assert (stock(first), stock(other), stock(drop)) == ((2, 2, 0), (3, 0, 0), (5, 2, 0))
    assert drop.events.get().data["variants"] == [
        {"id": str(first.pk), "availableStock": 2},
        {"id": str(other.pk), "availableStock": 0},
    ]


def test_the_only_size_need_not_be_named_and_may_be(db):
    drop = DropFactory()
    variant = drop.variants.get()

    named = reserve(drop.pk, Claim(UserFactory().pk, variant.pk))
    unnamed = reserve(drop.pk, Claim(UserFactory().pk))

    assert named.variant_id == unnamed.variant_id == variant.pk


def test_one_of_several_sizes_must_be_named(db):
    drop = DropFactory(sizes={"EU 42": 1, "EU 43": 1})

    with pytest.raises(VariantRequired):
        reserve(drop.pk, Claim(UserFactory().pk))

    assert nothing_happened(drop, available=2)


def test_refuses_a_size_of_another_drop(db):
    drop, other = DropFactory(), DropFactory()

    for variant_id in (other.variants.get().pk, uuid.uuid4()):
        with pytest.raises(ValidationError) as refusal:
            reserve(drop.pk, Claim(UserFactory().pk, variant_id))
        assert refusal.value.detail["variant"][0].code == "does_not_exist"

    assert nothing_happened(drop, available=10)
    assert nothing_happened(other, available=10)


@pytest.mark.parametrize(
    ("state", "refusal"),
    [
        ({"draft": True}, DropNotPublished),
        ({"upcoming": True}, DropNotStarted),
        ({"status": "paused"}, DropPaused),
        ({"over": True}, DropEnded),
        ({"over": True, "status": "paused"}, DropEnded),
        ({"status": "ended"}, DropEnded),
        ({"status": "cancelled"}, DropCancelled),
    ],
)
def test_gives_nothing_of_a_drop_that_is_not_live(db, state, refusal):
    drop = DropFactory(total_stock=10, **state)

    with pytest.raises(refusal) as refused:
        reserve(drop.pk, Claim(UserFactory().pk))

    assert nothing_happened(drop, available=10)
    if refusal is DropNotStarted:
        assert refused.value.members == {"starts_at": format_instant(drop.starts_at)}


def test_a_scheduled_drop_can_be_had_once_its_start_has_passed(db):
    drop = DropFactory(upcoming=True, starts_at=timezone.now() - timedelta(milliseconds=1))

    assert reserve(drop.pk, Claim(UserFactory().pk)).is_new


def test_does_not_find_what_is_not_there(db):
    with pytest.raises(Drop.DoesNotExist):
        reserve(uuid.uuid4(), Claim(UserFactory().pk))


def test_does_not_know_a_user_who_is_not_there(db):
    drop = DropFactory()

    with pytest.raises(UnknownUser):
        reserve(drop.pk, Claim(uuid.uuid4()))

    assert nothing_happened(drop, available=10)


# --- Limits -----------------------------------------------------------------------------


def test_the_limit_counts_what_is_held_and_what_was_bought(db):
    drop, user = DropFactory(max_per_user=5), UserFactory()
    reserve(drop.pk, Claim(user.pk, quantity=2))
    purchase(drop.pk, user.pk)
    reserve(drop.pk, Claim(user.pk, quantity=1))
    purchase(drop.pk, user.pk)

    with pytest.raises(LimitExceeded) as refusal:
        reserve(drop.pk, Claim(user.pk, quantity=3))

    assert refusal.value.members == {"limit": 5, "used": 3}
    assert stock(drop) == (10, 7, 3)
    assert reserve(drop.pk, Claim(user.pk, quantity=2)).is_new


def test_what_came_back_does_not_count(db):
    drop, user = DropFactory(max_per_user=1), UserFactory()
    ReservationFactory(drop=drop, user=user, expired=True)
    ReservationFactory(drop=drop, user=user, voided=True)
    release(reserve(drop.pk, Claim(user.pk)).pk, user)

    assert reserve(drop.pk, Claim(user.pk)).is_new


def test_another_drop_and_another_user_do_not_count(db):
    drop, other, user = DropFactory(), DropFactory(), UserFactory()
    reserve(other.pk, Claim(user.pk))
    reserve(drop.pk, Claim(UserFactory().pk))

    assert reserve(drop.pk, Claim(user.pk)).is_new


def test_without_a_limit_one_user_may_take_all(db):
    drop = DropFactory(total_stock=10, max_per_user=None)

    assert reserve(drop.pk, Claim(UserFactory().pk, quantity=10)).quantity == 10
    assert stock(drop) == (10, 0, 0)


# --- Shortage ---------------------------------------------------------------------------


def test_tells_when_the_first_held_unit_may_come_back(db):
    drop = DropFactory(total_stock=2)
    first = ReservationFactory(drop=drop, expires_at=timezone.now() + timedelta(seconds=30))
    ReservationFactory(drop=drop)

    with pytest.raises(FullyReserved) as refusal:
        reserve(drop.pk, Claim(UserFactory().pk))

    assert refusal.value.members == {
        "available_stock": 0,
        "next_release_at": format_instant(first.expires_at),
    }
    assert nothing_happened(drop, available=0)


def test_is_sold_out_when_every_unit_was_bought(db):
    drop = DropFactory(total_stock=1)
    ReservationFactory(drop=drop, consumed=True)

    with pytest.raises(SoldOut) as refusal:
        reserve(drop.pk, Claim(UserFactory().pk))

    assert refusal.value.members == {"available_stock": 0}
    assert stock(drop) == (1, 0, 1)


def test_a_size_is_sold_out_whatever_the_others_have(db):
    drop = DropFactory(sizes={"EU 42": 1, "EU 43": 5})
    ReservationFactory(drop=drop, consumed=True)
    ReservationFactory(drop=drop, variant=drop.variants.last())

    with pytest.raises(SoldOut):
        reserve(drop.pk, Claim(UserFactory().pk, drop.variants.first().pk))

    assert reserve(drop.pk, Claim(UserFactory().pk, drop.variants.last().pk)).is_new


def test_gives_all_that_was_asked_for_or_nothing(db):
    drop = DropFactory(total_stock=2, max_per_user=None)

    with pytest.raises(SoldOut) as refusal:
        reserve(drop.pk, Claim(UserFactory().pk, quantity=3))

    assert refusal.value.members == {"available_stock": 2}
    assert nothing_happened(drop, available=2)


def test_takes_overdue_units_back_when_stock_is_short(db):
    drop = DropFactory(total_stock=2)
    overdue = ReservationFactory.create_batch(2, drop=drop, overdue=True)

    hold = reserve(drop.pk, Claim(UserFactory().pk))

    assert hold.is_new
    assert {r.status for r in Reservation.objects.exclude(pk=hold.pk)} == {"EXPIRED"}
    assert stock(drop) == stock(drop.variants.get()) == (2, 1, 0)
    log = list(drop.events.order_by("seq"))
    assert [event.type for event in log] == [
        "RESERVATION_EXPIRED",
        "RESERVATION_EXPIRED",
        "STOCK_UPDATED",
    ]
    assert [event.data["reservationId"] for event in log[:2]] == [str(r.pk) for r in overdue]
    assert log[2].data["availableStock"] == 1


def test_takes_nothing_back_while_there_is_enough(db):
    overdue = ReservationFactory(overdue=True)

    reserve(overdue.drop.pk, Claim(UserFactory().pk))

    overdue.refresh_from_db()
    assert overdue.status == "ACTIVE"
    assert stock(overdue.drop) == (10, 8, 0)


def test_keeps_what_it_took_back_even_if_it_is_not_enough(db):
    drop = DropFactory(total_stock=3, max_per_user=None)
    ReservationFactory(drop=drop, overdue=True)
    ReservationFactory(drop=drop, quantity=2)

    with pytest.raises(FullyReserved) as refusal:
        reserve(drop.pk, Claim(UserFactory().pk, quantity=2))

    assert refusal.value.members["available_stock"] == 1
    assert stock(drop) == (3, 1, 0)
    assert events(drop) == [(1, "RESERVATION_EXPIRED"), (2, "STOCK_UPDATED")]


def test_who_let_a_hold_run_out_may_hold_anew(db):
    overdue = ReservationFactory(overdue=True, drop=DropFactory(total_stock=1))

    hold = reserve(overdue.drop.pk, Claim(overdue.user.pk))

    assert hold.is_new
    assert hold.pk != overdue.pk
    overdue.refresh_from_db()
    assert overdue.status == "EXPIRED"
    assert stock(overdue.drop) == (1, 0, 0)


def test_who_let_a_hold_run_out_may_hold_another_size(db):
    drop = DropFactory(sizes={"EU 42": 1, "EU 43": 1})
    first, other = drop.variants.all()
    overdue = ReservationFactory(overdue=True, drop=drop, variant=first)

    assert reserve(drop.pk, Claim(overdue.user.pk, other.pk)).variant_id == other.pk
    assert (stock(first), stock(other)) == ((1, 1, 0), (1, 0, 0))


def test_takes_overdue_units_of_a_size_back_behind_a_long_backlog_of_another(db, monkeypatch):
    monkeypatch.setattr(services, "MAX_EXPIRED_PER_TRANSACTION", 3)
    drop = DropFactory(sizes={"EU 42": 5, "EU 43": 2})
    long, short = drop.variants.all()
    ReservationFactory.create_batch(5, overdue=True, drop=drop, variant=long)
    later = timezone.now() - 1.5 * MINUTE
    ReservationFactory.create_batch(2, created_at=later, drop=drop, variant=short)

    outcomes = reserve_many(
        drop.pk, [Claim(user.pk, short.pk) for user in UserFactory.create_batch(3)]
    )

    assert [type(outcome) for outcome in outcomes] == [Reservation, Reservation, FullyReserved]
    assert (stock(long), stock(short)) == ((5, 3, 0), (2, 0, 0))
    assert stock(drop) == (7, 3, 0)
    types = [event_type for _, event_type in events(drop)]
    assert types == ["RESERVATION_EXPIRED"] * 5 + ["STOCK_UPDATED"]


def test_who_let_a_hold_run_out_may_hold_anew_behind_a_long_backlog(db):
    """One transaction takes back a limited number, the claimants' own before the others'."""
    backlog = MAX_EXPIRED_PER_TRANSACTION
    drop = DropFactory(total_stock=backlog + 1)
    long_ago = timezone.now() - timedelta(hours=1)
    drop.available_stock = 1
    drop.save()
    variant = drop.variants.get()
    variant.available_stock = 1
    variant.save()
    Reservation.objects.bulk_create(
        ReservationFactory.build(
            drop=drop, variant=variant, user=user, created_at=long_ago, unit_price=1
        )
        for user in User.objects.bulk_create(UserFactory.build_batch(backlog))
    )
    overdue = ReservationFactory(overdue=True, drop=drop)

    assert reserve(drop.pk, Claim(overdue.user.pk)).is_new
    overdue.refresh_from_db()
    assert overdue.status == "EXPIRED"
    assert stock(drop) == (backlog + 1, backlog - 1, 0)


# --- Many at once -----------------------------------------------------------------------


def test_settles_claims_in_the_order_given(db):
    drop = DropFactory(total_stock=3, max_per_user=2)
    users = UserFactory.create_batch(4)

    outcomes = reserve_many(
        drop.pk,
        [
            Claim(users[0].pk, quantity=2),
            Claim(users[1].pk, quantity=2),
            Claim(users[2].pk, quantity=1),
            Claim(users[3].pk, quantity=1),
        ],
    )

    assert [type(outcome) for outcome in outcomes] == [
        Reservation,
        FullyReserved,
        Reservation,
        FullyReserved,
    ]
    assert outcomes[1].members["available_stock"] == 1
    # Nobody else holds anything: the first to come back is a hold of this very batch.
    assert outcomes[3].members == {
        "available_stock": 0,
        "next_release_at": format_instant(outcomes[0].expires_at),
    }
    assert [r.user_id for r in (outcomes[0], outcomes[2])] == [users[0].pk, users[2].pk]
    assert Reservation.objects.count() == 2
    assert stock(drop) == stock(drop.variants.get()) == (3, 0, 0)
    assert events(drop) == [(1, "STOCK_UPDATED")]


def test_one_user_twice_in_a_batch_has_one_hold(db):
    drop, user = DropFactory(total_stock=10), UserFactory()

    first, second = reserve_many(drop.pk, [Claim(user.pk), Claim(user.pk)])

    assert (first.is_new, second.is_new) == (True, False)
    assert first.pk == second.pk == Reservation.objects.get().pk
    assert stock(drop) == (10, 9, 0)


def test_one_user_with_two_sizes_in_a_batch_has_the_first(db):
    drop, user = DropFactory(sizes={"EU 42": 1, "EU 43": 1}, max_per_user=2), UserFactory()
    small, large = drop.variants.all()

    first, second = reserve_many(drop.pk, [Claim(user.pk, small.pk), Claim(user.pk, large.pk)])

    assert isinstance(second, AlreadyReserved)
    assert second.members == {"reservation_id": str(first.pk)}
    assert (stock(small), stock(large)) == ((1, 0, 0), (1, 1, 0))


def test_a_refusal_in_a_batch_spoils_no_other_claim(db):
    drop = DropFactory(sizes={"EU 42": 5, "EU 43": 5})
    size = drop.variants.first().pk
    good, greedy, vague, lost = UserFactory.create_batch(4)

    outcomes = reserve_many(
        drop.pk,
        [
            Claim(greedy.pk, size, quantity=2),
            Claim(vague.pk),
            Claim(lost.pk, uuid.uuid4()),
            Claim(uuid.uuid4(), size),
            Claim(good.pk, size),
        ],
    )

    assert [type(outcome) for outcome in outcomes] == [
        LimitExceeded,
        VariantRequired,
        ValidationError,
        UnknownUser,
        Reservation,
    ]
    assert Reservation.objects.get().user == good
    assert stock(drop) == (10, 9, 0)


def test_no_claims_change_nothing(db):
    drop = DropFactory()

    assert reserve_many(drop.pk, []) == []
    assert nothing_happened(drop, available=10)


def test_a_reservation_takes_few_statements_and_many_take_no_more(db):
    drop = DropFactory(total_stock=100)
    users = UserFactory.create_batch(51)

    with statements() as for_one:
        reserve(drop.pk, Claim(users[0].pk))
    with statements() as for_fifty:
        reserve_many(drop.pk, [Claim(user.pk) for user in users[1:]])

    assert len(for_one) <= 6
    assert len(for_fifty) == len(for_one)
    assert stock(drop) == (100, 49, 0)


# --- Release ----------------------------------------------------------------------------


def test_releasing_gives_the_units_back(db):
    drop, user = DropFactory(max_per_user=3), UserFactory()
    hold = reserve(drop.pk, Claim(user.pk, quantity=3))

    released = release(hold.pk, user)

    assert (released.pk, released.status) == (hold.pk, "RELEASED")
    assert Reservation.objects.get().status == "RELEASED"
    assert stock(drop) == stock(drop.variants.get()) == (10, 10, 0)
    assert events(drop) == [(1, "STOCK_UPDATED"), (2, "STOCK_UPDATED")]
    assert drop.events.get(seq=2).data["availableStock"] == 10


@pytest.mark.parametrize(
    ("trait", "refusal"),
    [
        ("overdue", ReservationExpired),
        ("expired", ReservationExpired),
        ("released", ReservationNotActive),
        ("voided", ReservationNotActive),
        ("consumed", ReservationNotActive),
    ],
)
def test_nothing_is_left_to_release(db, trait, refusal):
    reservation = ReservationFactory(**{trait: True})
    before = stock(reservation.drop)

    with pytest.raises(refusal):
        release(reservation.pk, reservation.user)

    status = reservation.status
    reservation.refresh_from_db()
    assert reservation.status == status
    assert stock(reservation.drop) == before
    assert not Event.objects.exists()


def test_nobody_releases_what_another_holds(db):
    hold = ReservationFactory()

    for pk, user in ((hold.pk, UserFactory()), (uuid.uuid4(), hold.user)):
        with pytest.raises(Reservation.DoesNotExist):
            release(pk, user)

    hold.refresh_from_db()
    assert hold.status == "ACTIVE"
    assert nothing_happened(hold.drop, available=9)


def test_a_hold_of_a_cancelled_drop_can_still_be_released(db):
    hold = ReservationFactory()
    update_drop(hold.drop.pk, status="cancelled")

    assert release(hold.pk, hold.user).status == "RELEASED"
    assert stock(hold.drop) == (10, 10, 0)


# --- Void, and cancel the drop ----------------------------------------------------------


def test_a_voided_hold_gives_its_units_back_and_tells(db):
    drop = DropFactory(total_stock=10, max_per_user=3)
    hold = reserve(drop.pk, Claim(UserFactory().pk, quantity=3))

    assert void_reservation(hold.pk).status == "VOIDED"

    hold.refresh_from_db()
    assert hold.status == "VOIDED"
    assert stock(drop) == stock(drop.variants.get()) == (10, 10, 0)
    assert events(drop) == [(1, "STOCK_UPDATED"), (2, "STOCK_UPDATED")]
    assert drop.events.get(seq=2).data["availableStock"] == 10


@pytest.mark.parametrize(
    ("trait", "refusal"),
    [
        ("expired", ReservationExpired),
        ("overdue", ReservationExpired),
        ("released", ReservationNotActive),
        ("voided", ReservationNotActive),
        ("consumed", ReservationNotActive),
    ],
)
def test_nothing_is_left_to_void(db, trait, refusal):
    reservation = ReservationFactory(**{trait: True})
    before = stock(reservation.drop)

    with pytest.raises(refusal):
        void_reservation(reservation.pk)

    status = reservation.status
    reservation.refresh_from_db()
    assert reservation.status == status
    assert stock(reservation.drop) == before
    assert not Event.objects.exists()


def test_a_cancelled_drop_has_no_holds_and_keeps_its_purchases(db):
    drop = DropFactory(sizes={"EU 42": 3, "EU 43": 4})
    small, large = drop.variants.all()
    buyer, *holders = UserFactory.create_batch(4)
    reserve(drop.pk, Claim(buyer.pk, small.pk))
    purchase(drop.pk, buyer.pk)
    holds = [reserve(drop.pk, Claim(user.pk, large.pk)) for user in holders]
    holds.append(reserve(DropFactory().pk, Claim(buyer.pk)))
    seen = drop.events.count()

    assert cancel_drop(drop.pk) == 3

    for hold, status in zip(holds, ["VOIDED"] * 3 + ["ACTIVE"], strict=True):
        hold.refresh_from_db()
        assert hold.status == status
    assert (stock(drop), stock(small), stock(large)) == ((7, 6, 1), (3, 2, 1), (4, 4, 0))
    assert drop.status == "cancelled"
    told, changed = drop.events.filter(seq__gt=seen).order_by("seq")
    assert (told.type, told.data["availableStock"]) == ("STOCK_UPDATED", 6)
    assert changed.type == "DROP_UPDATED"
    assert changed.data["drop"]["status"] == "cancelled"
    assert changed.data["drop"]["available_stock"] == 6


def test_cancelling_takes_the_same_statements_for_one_hold_and_for_20(db):
    counts = []
    for holders in (1, 20):
        drop = DropFactory(total_stock=20)
        ReservationFactory.create_batch(holders, drop=drop)
        with statements() as made:
            cancel_drop(drop.pk)
        counts.append(len(made))

    assert counts[0] == counts[1]


@pytest.mark.slow
def test_a_drop_with_more_holds_than_a_statement_has_parameters_is_cancelled(db):
    drop = DropFactory(total_stock=2**16)
    hold_all(drop)

    assert cancel_drop(drop.pk) == 2**16

    assert stock(drop) == (2**16, 2**16, 0)
    assert Reservation.objects.filter(status="VOIDED").count() == 2**16


def test_a_drop_is_cancelled_once(db):
    drop = DropFactory(status="cancelled")

    with pytest.raises(ValidationError):
        cancel_drop(drop.pk)

    assert nothing_happened(drop, available=10)


@pytest.mark.django_db(transaction=True)
def test_cancelling_while_somebody_buys_loses_neither():
    drop, user = DropFactory(total_stock=1), UserFactory()
    hold = reserve(drop.pk, Claim(user.pk))

    def buy():
        try:
            return purchase(drop.pk, user.pk).status
        except (DropCancelled, ReservationNotActive) as refusal:
            return refusal.code

    _, bought = at_once(partial(cancel_drop, drop.pk), buy)

    hold.refresh_from_db()
    if bought == "paid":
        assert (hold.status, stock(drop)) == ("CONSUMED", (1, 0, 1))
    else:
        assert (hold.status, stock(drop)) == ("VOIDED", (1, 1, 0))
    assert not audit_stock().differences


@pytest.mark.django_db(transaction=True)
def test_releasing_twice_at_once_gives_back_once():
    hold = ReservationFactory()

    def attempt():
        try:
            return release(hold.pk, hold.user).status
        except ReservationNotActive:
            return "refused"

    assert sorted(at_once(attempt, attempt)) == ["RELEASED", "refused"]
    assert stock(hold.drop) == (10, 10, 0)


@pytest.mark.django_db(transaction=True)
def test_locks_the_drop_before_the_reservation():
    hold = ReservationFactory()
    drop_row = "SELECT FROM drops_drop WHERE id = %s FOR UPDATE SKIP LOCKED"
    reservation_row = "SELECT FROM reservations_reservation WHERE id = %s FOR UPDATE SKIP LOCKED"
    with another_session() as holder, another_session() as third:
        holder.execute(drop_row, [hold.drop.pk])
        with blocked(partial(release, hold.pk, hold.user)):
            third.execute(reservation_row, [hold.pk])
            assert third.rowcount == 1
            third.execute("ROLLBACK")
            holder.execute("ROLLBACK")

    hold = ReservationFactory()
    with another_session() as holder, another_session() as third:
        holder.execute(reservation_row, [hold.pk])
        with blocked(partial(release, hold.pk, hold.user)):
            third.execute(drop_row, [hold.drop.pk])
            assert third.rowcount == 0
            third.execute("ROLLBACK")
            holder.execute("ROLLBACK")


# --- Expire -----------------------------------------------------------------------------


def test_expires_what_is_overdue_and_nothing_else(db):
    drop = DropFactory(sizes={"EU 42": 5, "EU 43": 5})
    small, large = drop.variants.all()
    overdue = ReservationFactory(drop=drop, variant=small, overdue=True, quantity=2)
    others = [
        ReservationFactory(drop=drop, variant=large),
        # Their time is up as well, but that no longer matters.
        ReservationFactory(drop=drop, overdue=True, consumed=True),
        ReservationFactory(drop=drop, overdue=True, released=True),
    ]

    (swept,) = expire_due()

    assert (swept.drop_id, swept.available_stock) == (drop.pk, 8)
    assert swept.reservation_ids == [overdue.pk]
    overdue.refresh_from_db()
    assert overdue.status == "EXPIRED"
    assert [(r.status) for r in others] == ["ACTIVE", "CONSUMED", "RELEASED"]
    for other in others:
        status = other.status
        other.refresh_from_db()
        assert other.status == status
    assert (stock(small), stock(large), stock(drop)) == ((5, 4, 1), (5, 4, 0), (10, 8, 1))
    assert events(drop) == [(1, "RESERVATION_EXPIRED"), (2, "STOCK_UPDATED")]
    assert drop.events.get(seq=1).data == {
        "dropId": str(drop.pk),
        "reservationId": str(overdue.pk),
    }


def test_a_second_sweep_finds_nothing(db):
    hold = ReservationFactory(overdue=True)

    assert len(expire_due()) == 1
    assert expire_due() == []
    assert stock(hold.drop) == (10, 10, 0)
    assert events(hold.drop) == [(1, "RESERVATION_EXPIRED"), (2, "STOCK_UPDATED")]


def test_expires_holds_of_drops_in_any_state(db):
    for status in ("paused", "cancelled", "ended"):
        ReservationFactory(drop=DropFactory(status=status), overdue=True)

    assert len(expire_due()) == 3
    assert {drop.available_stock for drop in Drop.objects.all()} == {10}


def test_expires_the_longest_overdue_first_a_batch_at_a_time(db):
    drop = DropFactory(total_stock=10)
    long_ago = timezone.now() - timedelta(hours=1)
    late = ReservationFactory.create_batch(2, drop=drop, overdue=True)
    later = ReservationFactory.create_batch(2, drop=drop, created_at=long_ago)

    first, second = expire_due(batch=3), expire_due(batch=3)

    assert set(first[0].reservation_ids) == {r.pk for r in later} | {late[0].pk}
    assert (first[0].available_stock, second[0].available_stock) == (9, 10)
    assert second[0].reservation_ids == [late[1].pk]
    assert expire_due(batch=3) == []


def test_clears_a_backlog_batch_after_batch(db):
    drop, other = DropFactory(), DropFactory()
    ReservationFactory.create_batch(5, drop=drop, overdue=True)
    ReservationFactory.create_batch(2, drop=other, overdue=True)

    swept = expire_all_due(batch=2)

    assert [len(holds.reservation_ids) for holds in swept] == [2, 2, 2, 1]
    assert (stock(drop), stock(other)) == ((10, 10, 0), (10, 10, 0))


@pytest.mark.django_db(transaction=True)
def test_two_sweeps_at_once_expire_nothing_twice():
    drops = [DropFactory(), DropFactory()]
    for drop in drops:
        ReservationFactory.create_batch(4, drop=drop, overdue=True)

    swept = sum(at_once(expire_due, expire_due), [])

    expired = [pk for holds in swept for pk in holds.reservation_ids]
    assert len(expired) == len(set(expired)) == 8
    for drop in drops:
        assert stock(drop) == (10, 10, 0)
        assert [kind for _, kind in events(drop)] == ["RESERVATION_EXPIRED"] * 4 + ["STOCK_UPDATED"]


@pytest.mark.django_db(transaction=True)
def test_a_sweep_leaves_a_locked_drop_for_the_next_time():
    stuck, free = ReservationFactory(overdue=True), ReservationFactory(overdue=True)
    with another_session() as session:
        session.execute("SELECT FROM drops_drop WHERE id = %s FOR UPDATE", [stuck.drop.pk])
        with lock_timeout(50):
            swept = expire_due()

    assert [holds.drop_id for holds in swept] == [free.drop.pk]
    assert stock(stuck.drop) == (10, 9, 0)
    assert [holds.drop_id for holds in expire_due()] == [stuck.drop.pk]


def test_a_drop_that_contradicts_itself_keeps_up_no_other(db, caplog, monkeypatch):
    broken, sound = ReservationFactory(overdue=True), ReservationFactory(overdue=True)
    Drop.objects.filter(pk=broken.drop.pk).update(available_stock=10)

    assert [holds.drop_id for holds in expire_due()] == [sound.drop.pk]
    assert expire_due() == []

    assert [record.args for record in caplog.records] == [(broken.drop.pk,)]
    broken.refresh_from_db()
    assert broken.status == ReservationStatus.ACTIVE
    Drop.objects.filter(pk=broken.drop.pk).update(available_stock=9)
    monkeypatch.setattr(services, "_contradictory", {broken.drop.pk: time.monotonic()})
    assert [holds.drop_id for holds in expire_due()] == [broken.drop.pk]


@pytest.mark.django_db(transaction=True)
def test_a_sweep_and_a_claim_at_once_expire_nothing_twice():
    drop = DropFactory(total_stock=1)
    overdue = ReservationFactory(drop=drop, overdue=True)
    user = UserFactory()

    _, hold = at_once(expire_due, partial(reserve, drop.pk, Claim(user.pk)))

    assert hold.is_new
    assert stock(drop) == (1, 0, 0)
    expired = drop.events.filter(type="RESERVATION_EXPIRED").get()
    assert expired.data["reservationId"] == str(overdue.pk)


def test_knows_how_long_nothing_will_be_due(db):
    assert seconds_until_next_deadline() is None

    ReservationFactory(consumed=True, expires_at=timezone.now() + timedelta(seconds=1))
    assert seconds_until_next_deadline() is None

    ReservationFactory(expires_at=timezone.now() + timedelta(hours=2))
    ReservationFactory(expires_at=timezone.now() + timedelta(hours=1))
    assert 3590 < seconds_until_next_deadline() <= 3600

    ReservationFactory(overdue=True)
    assert seconds_until_next_deadline() == 0


def test_a_sweep_reads_no_settled_reservations(db):
    """With 2,000 of them around, finding what is due takes steps in the index of active ones."""
    drop = DropFactory()
    settled = ReservationFactory.build(
        drop=drop, variant=drop.variants.get(), user=UserFactory(), expired=True, unit_price=1
    )
    Reservation.objects.bulk_create(
        Reservation(
            drop=drop,
            variant=settled.variant,
            user=settled.user,
            quantity=1,
            unit_price=1,
            currency="USD",
            status="EXPIRED",
            created_at=settled.created_at,
            expires_at=settled.expires_at,
        )
        for _ in range(2000)
    )
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE reservations_reservation")
    with statements() as made:
        assert expire_due() == []

    with connection.cursor() as cursor:
        cursor.execute(f"EXPLAIN (FORMAT TEXT) {made[0]}")
        plan = "\n".join(line for (line,) in cursor)
    assert "active_reservation_by_deadline" in plan
    assert "Seq Scan on reservations_reservation" not in plan
