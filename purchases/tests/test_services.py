import json
import uuid
from datetime import timedelta
from decimal import Decimal
from functools import partial

import pytest
from django.db import connection
from django.db.models import F
from django.utils import timezone

from drops.exceptions import DropCancelled, DropEnded, DropPaused, format_instant
from drops.models import Drop, StockAdjustment
from drops.services import update_drop
from drops.tests.factories import DropFactory
from purchases.audit import audit_stock
from purchases.exceptions import AlreadyRefunded
from purchases.models import Purchase
from purchases.services import (
    latest_paid,
    purchase,
    purchase_many,
    refund_all,
    refund_purchase,
)
from purchases.tests.factories import PurchaseFactory
from realtime.models import Event
from reservations.exceptions import (
    ReservationExpired,
    ReservationNotActive,
    ReservationRequired,
)
from reservations.models import Reservation, ReservationStatus
from reservations.services import Claim, expire_due, release, reserve
from reservations.tests.factories import ReservationFactory, hold_all
from tests.concurrency import at_once
from tests.queries import statements
from users.models import User
from users.tests.factories import UserFactory


def stock(row):
    row.refresh_from_db()
    return row.total_stock, row.available_stock, row.sold_stock


def is_unchanged(hold, *, status="ACTIVE"):
    """Say whether a refused purchase left the reservation, the stock and the log alone."""
    before = stock(hold.drop)
    hold.refresh_from_db()
    return (
        hold.status == status
        and before[2] == 0
        and not Purchase.objects.exists()
        and not Event.objects.filter(type="PURCHASE_COMPLETED").exists()
    )


def test_a_purchase_consumes_the_hold_and_tells(db):
    drop, user = DropFactory(total_stock=10, max_per_user=2), UserFactory()
    hold = reserve(drop.pk, Claim(user.pk, quantity=2))

    bought = purchase(drop.pk, user.pk)

    assert bought.is_new
    assert bought == Purchase.objects.get()
    assert (bought.reservation_id, bought.drop_id, bought.user_id) == (hold.pk, drop.pk, user.pk)
    assert (bought.variant_id, bought.quantity, bought.status) == (hold.variant_id, 2, "paid")
    assert (bought.amount, bought.currency) == (Decimal("398.000"), "USD")
    assert Reservation.objects.get().status == "CONSUMED"
    assert stock(drop) == stock(drop.variants.get()) == (10, 8, 2)

    completed, activity = drop.events.filter(seq__gt=1).order_by("seq")
    at = format_instant(bought.created_at)
    assert (completed.type, completed.seq) == ("PURCHASE_COMPLETED", 2)
    assert completed.data == {
        "dropId": str(drop.pk),
        "username": user.username,
        "purchasedAt": at,
        "qty": 2,
    }
    assert (activity.type, activity.seq) == ("ACTIVITY_UPDATED", 3)
    assert activity.data == {
        "dropId": str(drop.pk),
        "latestPurchasers": [
            {"userId": str(user.pk), "username": user.username, "qty": 2, "createdAt": at}
        ],
        "soldStock": 2,
    }
    assert drop.seq == 3


def test_the_price_is_that_of_the_reservation(db):
    drop, user = DropFactory(price="199.00"), UserFactory()
    reserve(drop.pk, Claim(user.pk))
    update_drop(drop.pk, price=Decimal("250.00"))

    assert purchase(drop.pk, user.pk).amount == Decimal("199.00")


def test_the_highest_price_of_the_most_units_can_be_bought(db):
    most = 2**31 - 1
    drop, user = (
        DropFactory(total_stock=most, price="999999999.999", max_per_user=None),
        UserFactory(),
    )
    reserve(drop.pk, Claim(user.pk, quantity=most))

    assert purchase(drop.pk, user.pk).amount == Decimal("999999999.999") * most
    assert Purchase.objects.get().amount == Decimal("999999999.999") * most


def test_a_repeated_purchase_is_the_same_purchase(db):
    drop, user = DropFactory(), UserFactory()
    reserve(drop.pk, Claim(user.pk))
    first = purchase(drop.pk, user.pk)

    again = purchase(drop.pk, user.pk)

    assert (again.is_new, again.pk) == (False, first.pk)
    assert stock(drop) == (10, 9, 1)
    assert drop.events.count() == 3


def test_who_may_have_more_can_buy_twice(db):
    drop, user = DropFactory(max_per_user=2), UserFactory()
    bought = []
    for _ in range(2):
        reserve(drop.pk, Claim(user.pk))
        bought.append(purchase(drop.pk, user.pk))

    assert bought[0].pk != bought[1].pk
    assert stock(drop) == (10, 8, 2)


def test_buys_nothing_without_a_reservation(db):
    drop = DropFactory()
    ReservationFactory(drop=drop)

    with pytest.raises(ReservationRequired):
        purchase(drop.pk, UserFactory().pk)

    assert not Purchase.objects.exists()
    assert stock(drop) == (10, 9, 0)


def test_a_reservation_of_another_drop_buys_nothing(db):
    hold = ReservationFactory()

    with pytest.raises(ReservationRequired):
        purchase(DropFactory().pk, hold.user.pk)

    assert is_unchanged(hold)


def test_does_not_find_what_is_not_there(db):
    with pytest.raises(Drop.DoesNotExist):
        purchase(uuid.uuid4(), UserFactory().pk)


def test_comes_too_late_before_and_after_the_sweep_alike(db):
    hold = ReservationFactory(overdue=True)

    with pytest.raises(ReservationExpired):
        purchase(hold.drop.pk, hold.user.pk)
    assert is_unchanged(hold)

    expire_due()
    with pytest.raises(ReservationExpired):
        purchase(hold.drop.pk, hold.user.pk)
    assert is_unchanged(hold, status="EXPIRED")
    assert stock(hold.drop) == (10, 10, 0)


@pytest.mark.parametrize("trait", ["released", "voided"])
def test_buys_nothing_with_a_reservation_that_was_given_up(db, trait):
    reservation = ReservationFactory(**{trait: True})

    with pytest.raises(ReservationNotActive):
        purchase(reservation.drop.pk, reservation.user.pk)

    assert is_unchanged(reservation, status=trait.upper())


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ({"status": "paused"}, DropPaused),
        ({"status": "cancelled"}, DropCancelled),
        ({"status": "ended"}, DropEnded),
        ({"ends_at": timezone.now()}, DropEnded),
    ],
)
def test_buys_nothing_of_a_drop_that_is_not_live_any_more(db, change, refusal):
    hold = ReservationFactory()
    update_drop(hold.drop.pk, **change)

    with pytest.raises(refusal):
        purchase(hold.drop.pk, hold.user.pk)

    assert is_unchanged(hold)


def test_the_newest_reservation_decides_where_none_is_active(db):
    drop, user = DropFactory(max_per_user=2), UserFactory()
    reserve(drop.pk, Claim(user.pk))
    first = purchase(drop.pk, user.pk)
    second = reserve(drop.pk, Claim(user.pk))
    release(second.pk, user)

    with pytest.raises(ReservationNotActive):
        purchase(drop.pk, user.pk)

    assert Purchase.objects.get() == first


def test_the_last_unit_sold_turns_fully_reserved_into_sold_out(db):
    drop, user = DropFactory(total_stock=1), UserFactory()
    reserve(drop.pk, Claim(user.pk))

    purchase(drop.pk, user.pk)

    drop.refresh_from_db()
    assert drop.availability == "sold_out"
    assert [event.type for event in drop.events.order_by("seq")] == [
        "STOCK_UPDATED",
        "PURCHASE_COMPLETED",
        "ACTIVITY_UPDATED",
        "STOCK_UPDATED",
    ]
    assert drop.events.get(seq=4).data["availability"] == "sold_out"


# --- Many at once -----------------------------------------------------------------------


def test_settles_purchases_in_the_order_given_without_one_spoiling_another(db):
    drop = DropFactory(max_per_user=1)
    holders = [ReservationFactory(drop=drop).user for _ in range(4)]
    late = ReservationFactory(drop=drop, overdue=True).user
    stranger = UserFactory()

    outcomes = purchase_many(
        drop.pk, [user.pk for user in (holders[0], stranger, late, *holders[1:], holders[0])]
    )

    assert [type(outcome) for outcome in outcomes] == [
        Purchase,
        ReservationRequired,
        ReservationExpired,
        Purchase,
        Purchase,
        Purchase,
        Purchase,
    ]
    assert [o.is_new for o in outcomes if isinstance(o, Purchase)] == [True] * 4 + [False]
    assert outcomes[-1].pk == outcomes[0].pk
    assert Purchase.objects.count() == 4
    assert stock(drop) == (10, 5, 4)
    assert [event.type for event in drop.events.order_by("seq")] == [
        *["PURCHASE_COMPLETED"] * 4,
        "ACTIVITY_UPDATED",
    ]
    # Newest first, also among those of one batch.
    assert [entry["user_id"] for entry in drop.latest_purchasers] == [
        str(user.pk) for user in holders[:0:-1]
    ]
    assert [p.user_id for p in latest_paid(drop)] == [user.pk for user in holders[:0:-1]]


def test_many_purchases_take_no_more_statements_than_one(db):
    drop = DropFactory(total_stock=100)
    users = [ReservationFactory(drop=drop).user for _ in range(21)]

    with statements() as for_one:
        purchase(drop.pk, users[0].pk)
    with statements() as for_twenty:
        purchase_many(drop.pk, [user.pk for user in users[1:]])

    assert len(for_twenty) == len(for_one) <= 7


@pytest.mark.django_db(transaction=True)
def test_buying_twice_at_once_sells_once():
    hold = ReservationFactory()
    buy = partial(purchase, hold.drop.pk, hold.user.pk)

    first, second = at_once(buy, buy)

    assert first.pk == second.pk
    assert sorted([first.is_new, second.is_new]) == [False, True]
    assert stock(hold.drop) == (10, 9, 1)
    assert hold.drop.events.count() == 2


@pytest.mark.django_db(transaction=True)
def test_buying_and_releasing_at_once_does_one_of_them():
    for _ in range(3):
        hold = ReservationFactory()

        def attempt(action, *arguments):
            try:
                action(*arguments)
            except ReservationNotActive:
                return "refused"
            return "done"

        outcomes = at_once(
            partial(attempt, purchase, hold.drop.pk, hold.user.pk),
            partial(attempt, release, hold.pk, hold.user),
        )

        assert sorted(outcomes) == ["done", "refused"]
        hold.refresh_from_db()
        is_sold = outcomes[0] == "done"
        assert hold.status == ("CONSUMED" if is_sold else "RELEASED")
        assert stock(hold.drop) == ((10, 9, 1) if is_sold else (10, 10, 0))


# --- The feed ---------------------------------------------------------------------------


def test_the_feed_keeps_the_three_latest_and_their_order(db):
    drop = DropFactory()
    users = UserFactory.create_batch(5)
    for user in users:
        reserve(drop.pk, Claim(user.pk))
        purchase(drop.pk, user.pk)

    drop.refresh_from_db()
    assert [entry["username"] for entry in drop.latest_purchasers] == [
        user.username for user in users[:1:-1]
    ]
    assert [p.user.username for p in latest_paid(drop)] == [
        entry["username"] for entry in drop.latest_purchasers
    ]


def test_the_feed_leaves_out_what_was_refunded_and_other_drops(db):
    drop = DropFactory()
    paid = PurchaseFactory(reservation__drop=drop)
    PurchaseFactory(reservation__drop=drop, refunded=True)
    PurchaseFactory()

    assert latest_paid(drop) == [paid]


def plan_nodes(plan):
    yield plan
    for inner in plan.get("Plans", []):
        yield from plan_nodes(inner)


def test_the_feed_reads_three_purchases_of_thousands(db):
    drops = [DropFactory(total_stock=2000) for _ in range(2)]
    now = timezone.now()
    users = User.objects.bulk_create(UserFactory.build_batch(1000))
    for drop in drops:
        variant = drop.variants.get()
        reservations = Reservation.objects.bulk_create(
            ReservationFactory.build(
                drop=drop,
                variant=variant,
                user=user,
                status=ReservationStatus.CONSUMED,
                created_at=now,
            )
            for user in users
        )
        Purchase.objects.bulk_create(
            PurchaseFactory.build(reservation=row, created_at=now + timedelta(seconds=number))
            for number, row in enumerate(reservations)
        )
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE purchases_purchase, users_user")
    with statements() as made:
        latest = latest_paid(drops[0])

    assert [p.user for p in latest] == users[:-4:-1]
    assert len(made) == 1
    with connection.cursor() as cursor:
        cursor.execute(f"EXPLAIN (ANALYZE, FORMAT JSON) {made[0]}")
        (answer,) = cursor.fetchone()
    (explained,) = json.loads(answer) if isinstance(answer, str) else answer
    nodes = list(plan_nodes(explained["Plan"]))
    assert not [node for node in nodes if node["Node Type"] == "Seq Scan"]
    (scan,) = [node for node in nodes if node.get("Relation Name") == "purchases_purchase"]
    assert (scan["Node Type"], scan["Index Name"]) == ("Index Scan", "purchase_by_drop")
    assert scan["Actual Rows"] == 3
    assert scan.get("Rows Removed by Filter", 0) == 0


# --- Refund -----------------------------------------------------------------------------


def buy(drop, *, quantity=1, variant=None):
    user = UserFactory()
    reserve(drop.pk, Claim(user.pk, variant, quantity))
    return purchase(drop.pk, user.pk)


def news(drop, after):
    return list(drop.events.filter(seq__gt=after).order_by("seq").values_list("type", "data"))


def test_a_refund_with_restocking_gives_the_units_back_and_tells(db):
    drop = DropFactory(total_stock=10, max_per_user=2)
    bought, clerk = buy(drop, quantity=2), UserFactory()
    drop.refresh_from_db()
    before = drop.seq

    refunded = refund_purchase(bought.pk, restock=True, reason="Wrong size", user=clerk)

    assert refunded.status == Purchase.objects.get().status == "refunded"
    assert Reservation.objects.get().status == "VOIDED"
    assert stock(drop) == stock(drop.variants.get()) == (10, 10, 0)
    assert drop.latest_purchasers == []
    (feed, feed_data), (units, units_data) = news(drop, before)
    assert (feed, feed_data["latestPurchasers"]) == ("ACTIVITY_UPDATED", [])
    assert (units, units_data["availableStock"]) == ("STOCK_UPDATED", 10)
    assert not StockAdjustment.objects.exists()


def test_a_refund_without_restocking_takes_the_units_out_of_the_total(db):
    drop = DropFactory(sizes={"EU 42": 3, "EU 43": 4})
    variant, clerk = drop.variants.last(), UserFactory()
    bought = buy(drop, variant=variant.pk)
    drop.refresh_from_db()
    before = drop.seq

    refund_purchase(bought.pk, restock=False, reason="Came back damaged", user=clerk)

    assert (stock(drop), stock(variant)) == ((6, 6, 0), (3, 3, 0))
    adjustment = StockAdjustment.objects.get()
    assert (adjustment.variant, adjustment.delta, adjustment.created_by) == (variant, -1, clerk)
    assert adjustment.reason == "Came back damaged"
    (feed, _), (units, units_data), (update, data) = news(drop, before)
    assert (feed, units, update) == ("ACTIVITY_UPDATED", "STOCK_UPDATED", "DROP_UPDATED")
    assert (units_data["availableStock"], units_data["soldStock"]) == (6, 0)
    assert (data["drop"]["total_stock"], data["drop"]["available_stock"]) == (6, 6)


def test_a_refund_of_an_old_purchase_leaves_the_feed_alone(db):
    drop = DropFactory()
    oldest, *latest = [buy(drop) for _ in range(4)]
    drop.refresh_from_db()
    before = drop.seq

    refund_purchase(oldest.pk, restock=True, reason="Asked for", user=UserFactory())

    drop.refresh_from_db()
    assert [entry["username"] for entry in drop.latest_purchasers] == [
        bought.user.username for bought in reversed(latest)
    ]
    assert [kind for kind, _ in news(drop, before)] == ["STOCK_UPDATED"]


def test_the_feed_is_filled_up_again_after_a_refund(db):
    drop = DropFactory()
    purchases = [buy(drop) for _ in range(4)]

    refund_purchase(purchases[-1].pk, restock=True, reason="Asked for", user=UserFactory())

    drop.refresh_from_db()
    assert [entry["username"] for entry in drop.latest_purchasers] == [
        bought.user.username for bought in reversed(purchases[:3])
    ]


@pytest.mark.parametrize("restock", [True, False])
def test_a_refunded_unit_no_longer_counts_against_the_limit(db, restock):
    drop = DropFactory(total_stock=3, max_per_user=1)
    bought = buy(drop)
    refund_purchase(bought.pk, restock=restock, reason="Asked for", user=UserFactory())

    again = reserve(drop.pk, Claim(bought.user_id))

    assert again.is_new
    assert purchase(drop.pk, bought.user_id).reservation_id == again.pk


def test_a_repeat_after_the_refund_gets_the_same_purchase(db):
    drop = DropFactory()
    bought = buy(drop)
    refund_purchase(bought.pk, restock=True, reason="Asked for", user=UserFactory())

    again = purchase(drop.pk, bought.user_id)

    assert (again.pk, again.status, again.is_new) == (bought.pk, "refunded", False)


def test_a_purchase_is_refunded_once(db):
    drop = DropFactory()
    bought = buy(drop)
    refund_purchase(bought.pk, restock=True, reason="Asked for", user=UserFactory())
    drop.refresh_from_db()
    before = drop.seq

    with pytest.raises(AlreadyRefunded):
        refund_purchase(bought.pk, restock=False, reason="Again", user=UserFactory())

    assert stock(drop) == (10, 10, 0)
    assert drop.seq == before
    assert not StockAdjustment.objects.exists()


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("restock", [True, False])
def test_all_refunds_of_a_drop_leave_the_books_balanced(restock):
    drop, clerk = DropFactory(sizes={"EU 42": 5, "EU 43": 5}, max_per_user=2), UserFactory()
    for variant in drop.variants.all():
        for quantity in (1, 2):
            buy(drop, variant=variant.pk, quantity=quantity)
    reserve(drop.pk, Claim(UserFactory().pk, drop.variants.first().pk))

    assert len(refund_all(drop.pk, restock=restock, reason="Cancelled", user=clerk)) == 4
    assert refund_all(drop.pk, restock=restock, reason="Cancelled", user=clerk) == []

    assert stock(drop) == ((10, 9, 0) if restock else (4, 3, 0))
    assert not audit_stock().differences


def buy_all_that_is_held(drop):
    """Quick also for thousands; the drop has one size."""
    with connection.cursor() as cursor:
        cursor.execute(
            """
            WITH sold AS (
                UPDATE reservations_reservation SET status = 'CONSUMED'
                WHERE drop_id = %s AND status = 'ACTIVE' RETURNING *
            )
            INSERT INTO purchases_purchase
                (id, reservation_id, drop_id, variant_id, user_id, quantity, amount, currency,
                 status, created_at)
            SELECT gen_random_uuid(), id, drop_id, variant_id, user_id, quantity,
                   quantity * unit_price, currency, 'paid', created_at
            FROM sold
            """,
            [drop.pk],
        )
        sold = {"sold_stock": F("total_stock") - F("available_stock")}
        drop.variants.update(**sold)
        Drop.objects.filter(pk=drop.pk).update(**sold)


@pytest.mark.slow
def test_more_purchases_than_a_statement_has_parameters_are_refunded(db):
    drop = DropFactory(total_stock=2**16)
    hold_all(drop)
    buy_all_that_is_held(drop)

    refunded = refund_all(drop.pk, restock=True, reason="Cancelled", user=UserFactory())

    assert len(refunded) == 2**16
    assert stock(drop) == (2**16, 2**16, 0)
    assert Purchase.objects.filter(status="refunded").count() == 2**16
    assert Reservation.objects.filter(status="VOIDED").count() == 2**16


@pytest.mark.django_db(transaction=True)
def test_refunding_twice_at_once_gives_back_once():
    drop, clerk = DropFactory(), UserFactory()
    bought = buy(drop)

    def attempt():
        try:
            return refund_purchase(bought.pk, restock=True, reason="Race", user=clerk).status
        except AlreadyRefunded as refusal:
            return refusal.code

    assert sorted(at_once(attempt, attempt)) == ["already_refunded", "refunded"]
    assert stock(drop) == (10, 10, 0)
    assert not audit_stock().differences
