import uuid
from datetime import timedelta
from decimal import Decimal
from functools import partial

import pytest
from django.db import connection, transaction
from django.utils import timezone
from rest_framework.exceptions import ValidationError

from config.database import read_clock
from drops.exceptions import StockCommitted
from drops.models import Drop, DropStatus, StockAdjustment, Variant
from drops.serializers import DropSerializer
from drops.services import (
    ALLOWED_STATUS_CHANGES,
    adjust_stock,
    announce_windows,
    create_drop,
    lock_drop,
    lock_drops,
    update_drop,
)
from drops.tests.factories import DropFactory
from realtime.models import Event
from tests.concurrency import another_session, at_once, blocked
from users.tests.factories import UserFactory

HOUR = timedelta(hours=1)


def create(**fields):
    return create_drop(
        UserFactory(),
        **{"name": "Aurora", "price": Decimal("199.00"), "currency": "USD", "total_stock": 5}
        | fields,
    )


def codes(refusal):
    return {field: [e.code for e in errors] for field, errors in refusal.value.detail.items()}


def types(drop):
    return [event.type for event in drop.events.order_by("seq")]


def stock(row):
    row.refresh_from_db()
    return row.total_stock, row.available_stock, row.sold_stock


@pytest.mark.parametrize(
    ("starts_in", "stored", "holds"),
    [(None, "draft", "draft"), (HOUR, "scheduled", "scheduled"), (-HOUR, "live", "live")],
)
def test_the_start_decides_the_status_of_a_new_drop(db, starts_in, stored, holds):
    drop = create(starts_at=starts_in and timezone.now() + starts_in)

    assert drop.status == stored
    assert drop.status_at(drop.read_at) == holds
    assert Drop.objects.get().status == stored


def test_a_window_in_the_past_makes_an_ended_drop(db):
    drop = create(starts_at=timezone.now() - 2 * HOUR, ends_at=timezone.now() - HOUR)

    assert drop.status_at(drop.read_at) == "ended"
    assert Drop.objects.with_status(DropStatus.ENDED).get() == drop


def test_a_drop_without_sizes_has_one_variant_with_all_its_stock(db):
    drop = create(total_stock=5)

    assert stock(drop) == (5, 5, 0)
    variant = drop.variants.get()
    assert variant.label == "One size"
    assert stock(variant) == (5, 5, 0)


def test_sizes_keep_their_order_and_their_stock(db):
    drop = create(
        total_stock=6,
        variants=[
            {"label": "EU 44", "total_stock": 1},
            {"label": "EU 42", "total_stock": 2},
            {"label": "EU 43", "total_stock": 3},
        ],
    )

    assert list(drop.variants.values_list("label", "position", "available_stock")) == [
        ("EU 44", 0, 1),
        ("EU 42", 1, 2),
        ("EU 43", 2, 3),
    ]
    assert stock(drop) == (6, 6, 0)


def test_announces_a_published_drop_with_all_that_clients_see(db):
    drop = create(status="live")

    event = drop.events.get()
    assert (event.type, event.seq) == ("DROP_CREATED", 1)
    loaded = Drop.objects.read_now().get()
    assert loaded.seq == drop.seq == 1
    assert event.data == {"drop": DropSerializer(loaded).data}


def test_announces_a_draft_only_when_it_is_published(db):
    drop = create()
    update_drop(drop.pk, name="Aurora II")
    assert types(drop) == []
    assert Drop.objects.get().seq == 0

    published = update_drop(drop.pk, status="live")

    assert types(drop) == ["DROP_CREATED"]
    assert published.seq == 1
    assert drop.events.get().data["drop"]["name"] == "Aurora II"


def test_announces_each_change_with_the_next_number(db):
    drop = create(status="live")

    update_drop(drop.pk, name="Aurora II")
    updated = update_drop(drop.pk, price=Decimal("5"), status="paused")

    assert types(drop) == ["DROP_CREATED", "DROP_UPDATED", "DROP_UPDATED"]
    assert list(drop.events.order_by("seq").values_list("seq", flat=True)) == [1, 2, 3]
    assert updated.seq == Drop.objects.get().seq == 3
    newest = drop.events.get(seq=3).data["drop"]
    assert (newest["name"], newest["price"], newest["status"], newest["seq"]) == (
        "Aurora II",
        "5.00",
        "paused",
        3,
    )


def test_says_nothing_where_nothing_changes(db):
    drop = create(status="live")

    update_drop(drop.pk, name="Aurora", price=Decimal("199"))
    update_drop(drop.pk)

    assert types(drop) == ["DROP_CREATED"]


def test_leaves_what_it_was_not_asked_to_change(db):
    drop = create(status="live", description="Five pairs.", max_per_user=2)

    update_drop(drop.pk, name="Aurora II")

    drop.refresh_from_db()
    assert (drop.description, drop.max_per_user, drop.price) == ("Five pairs.", 2, 199)
    assert stock(drop) == (5, 5, 0)


MAY_BECOME = {
    "draft": {"scheduled", "live", "paused", "cancelled"},
    "scheduled": {"live", "paused", "ended", "cancelled"},
    "live": {"scheduled", "paused", "ended", "cancelled"},
    "paused": {"scheduled", "live", "ended", "cancelled"},
    "ended": {"cancelled"},
    "cancelled": set(),
}
CHANGES = [(before, after) for before in MAY_BECOME for after in MAY_BECOME if before != after]


@pytest.mark.parametrize(("before", "after"), [c for c in CHANGES if c[1] in MAY_BECOME[c[0]]])
def test_a_status_goes_where_it_may(db, before, after):
    drop = DropFactory(status=before, starts_at=timezone.now() + HOUR)

    update_drop(drop.pk, status=after)

    drop.refresh_from_db()
    assert (drop.status, drop.seq) == (after, 1)


@pytest.mark.parametrize(("before", "after"), [c for c in CHANGES if c[1] not in MAY_BECOME[c[0]]])
def test_a_status_goes_nowhere_else(db, before, after):
    drop = DropFactory(status=before, starts_at=timezone.now() + HOUR)

    with pytest.raises(ValidationError) as refusal:
        update_drop(drop.pk, status=after)

    assert codes(refusal) == {"status": ["not_allowed"]}
    drop.refresh_from_db()
    assert (drop.status, drop.seq) == (before, 0)


def test_the_table_of_status_changes_names_every_status():
    assert set(ALLOWED_STATUS_CHANGES) == set(MAY_BECOME) == set(DropStatus)


@pytest.mark.parametrize(
    ("currency", "price"),
    [
        ("USD", "199.00"),
        ("USD", "199.000"),
        ("USD", "0"),
        ("USD", "1E+3"),
        ("JPY", "25000"),
        ("JPY", "25000.00"),
        ("KWD", "5.125"),
    ],
)
def test_a_price_has_the_decimals_of_its_currency(db, currency, price):
    create(currency=currency, price=Decimal(price))

    assert Drop.objects.get().price == Decimal(price)


@pytest.mark.parametrize(("currency", "price"), [("USD", "199.001"), ("JPY", "25000.5")])
def test_a_price_has_no_more_decimals_than_its_currency(db, currency, price):
    with pytest.raises(ValidationError) as refusal:
        create(currency=currency, price=Decimal(price))

    assert codes(refusal) == {"price": ["max_decimal_places"]}
    assert not Drop.objects.exists()


def test_refuses_fields_that_contradict_each_other_all_at_once(db):
    now = timezone.now()
    with pytest.raises(ValidationError) as refusal:
        create(starts_at=now, ends_at=now, price=Decimal("0.001"))

    assert codes(refusal) == {"ends_at": ["not_after_start"], "price": ["max_decimal_places"]}
    assert not Drop.objects.exists()


def test_a_scheduled_drop_needs_a_start(db):
    with pytest.raises(ValidationError) as refusal:
        create(status="scheduled")

    assert codes(refusal) == {"status": ["starts_at_required"]}
    assert not Drop.objects.exists()


def test_an_update_is_checked_against_what_is_stored(db):
    drop = DropFactory(upcoming=True, currency="JPY", price="25000")

    for changes, expected in [
        ({"ends_at": timezone.now()}, {"ends_at": ["not_after_start"]}),
        ({"price": Decimal("1.5")}, {"price": ["max_decimal_places"]}),
        ({"starts_at": None}, {"status": ["starts_at_required"]}),
    ]:
        with pytest.raises(ValidationError) as refusal:
            update_drop(drop.pk, **changes)
        assert codes(refusal) == expected

    stored = Drop.objects.get()
    assert (stored.starts_at, stored.ends_at, stored.price) == (drop.starts_at, None, 25000)
    assert not Event.objects.exists()


def test_does_not_find_what_is_not_there(db):
    with pytest.raises(Drop.DoesNotExist):
        update_drop(uuid.uuid4(), name="Aurora")
    with pytest.raises(Variant.DoesNotExist):
        adjust_stock(uuid.uuid4(), 1, reason="Found", user=UserFactory())


@pytest.mark.parametrize(("delta", "after"), [(3, 13), (-10, 0)])
def test_staff_add_and_withdraw_units_of_one_size(db, delta, after):
    drop = DropFactory(sizes={"EU 42": 10, "EU 43": 4})
    small, large = drop.variants.all()

    adjustment = adjust_stock(small.pk, delta, reason="Recount", user=UserFactory(staff=True))

    assert stock(small) == (after, after, 0)
    assert stock(large) == (4, 4, 0)
    assert stock(drop) == (after + 4, after + 4, 0)
    assert StockAdjustment.objects.get() == adjustment
    assert types(drop) == ["STOCK_UPDATED", "DROP_UPDATED"]
    moved, updated = drop.events.order_by("seq")
    assert moved.data["availableStock"] == after + 4
    assert moved.data["variants"] == [
        {"id": str(small.pk), "availableStock": after},
        {"id": str(large.pk), "availableStock": 4},
    ]
    shown = updated.data["drop"]
    assert (shown["total_stock"], shown["available_stock"]) == (after + 4, after + 4)
    assert [v["total_stock"] for v in shown["variants"]] == [after, 4]
    assert (shown["seq"], drop.seq) == (2, 2)


def test_staff_can_not_withdraw_more_than_is_available(db):
    drop = DropFactory(sizes={"EU 42": 2, "EU 43": 4})
    small = drop.variants.first()

    with pytest.raises(StockCommitted):
        adjust_stock(small.pk, -3, reason="Recount", user=UserFactory(staff=True))

    assert stock(small) == (2, 2, 0)
    assert stock(drop) == (6, 6, 0)
    assert not StockAdjustment.objects.exists()
    assert not Event.objects.exists()


@pytest.mark.parametrize("delta", [0, 2**31 - 6])
def test_staff_can_not_change_the_stock_by_nothing_or_beyond_what_can_be_stored(db, delta):
    drop = DropFactory(sizes={"EU 42": 2, "EU 43": 4})

    with pytest.raises(ValidationError) as refusal:
        adjust_stock(drop.variants.first().pk, delta, reason="Typo", user=UserFactory(staff=True))

    assert codes(refusal) == {"delta": ["invalid"]}
    assert stock(drop) == (6, 6, 0)
    assert not StockAdjustment.objects.exists()


def test_the_stock_of_a_draft_changes_without_an_event(db):
    drop = DropFactory(draft=True, total_stock=5)

    adjust_stock(drop.variants.get().pk, 1, reason="Found", user=UserFactory(staff=True))

    assert stock(drop) == (6, 6, 0)
    assert not Event.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_changes_at_once_are_all_kept_and_numbered_without_a_gap():
    drop, staff = DropFactory(total_stock=0), UserFactory(staff=True)
    variant = drop.variants.get()
    add_one = partial(adjust_stock, variant.pk, 1, reason="Found", user=staff)

    at_once(*[add_one] * 4, partial(update_drop, drop.pk, name="Aurora II"))

    assert stock(variant) == (4, 4, 0)
    assert stock(drop) == (4, 4, 0)
    assert drop.name == "Aurora II"
    # Two events for each change of the stock, one for the name.
    assert list(drop.events.order_by("seq").values_list("seq", flat=True)) == list(range(1, 10))


ROWS = {"drops_drop": "id = %s", "drops_variant": "drop_id = %s"}


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    ("held", "other", "other_is_free"),
    [("drops_variant", "drops_drop", False), ("drops_drop", "drops_variant", True)],
)
def test_locks_the_drop_before_its_variants(held, other, other_is_free):
    drop = DropFactory()
    with another_session() as holder, another_session() as third:
        holder.execute(f"SELECT FROM {held} WHERE {ROWS[held]} FOR UPDATE", [drop.pk])
        with blocked(partial(update_drop, drop.pk, name="Aurora II")):
            third.execute(
                f"SELECT FROM {other} WHERE {ROWS[other]} FOR UPDATE SKIP LOCKED", [drop.pk]
            )
            assert (third.rowcount == 1) == other_is_free
            third.execute("ROLLBACK")
            holder.execute("ROLLBACK")

    drop.refresh_from_db()
    assert drop.name == "Aurora II"


@pytest.mark.django_db(transaction=True)
def test_the_lock_lets_rows_refer_to_the_drop():
    drop = DropFactory()
    with transaction.atomic():
        lock_drop(drop.pk)
        with another_session() as other:
            # What an insert that refers to the drop takes.
            other.execute("SELECT FROM drops_drop WHERE id = %s FOR KEY SHARE NOWAIT", [drop.pk])
            assert other.rowcount == 1


# --- Windows ----------------------------------------------------------------------------


def in_seconds(seconds: float):
    return read_clock() + timedelta(seconds=seconds)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"status": "scheduled", "starts_at": -1}, 1),
        ({"status": "live", "starts_at": -1}, 1),
        ({"status": "live", "ends_at": -1}, 1),
        ({"status": "paused", "ends_at": -1}, 1),
        ({"status": "live", "starts_at": -2, "ends_at": -1}, 1),
        ({"status": "scheduled", "starts_at": 60}, 0),
        ({"status": "live", "ends_at": 60}, 0),
        ({"status": "paused", "starts_at": -1}, 0),
        ({"status": "draft", "starts_at": -1}, 0),
        ({"status": "cancelled", "ends_at": -1}, 0),
        ({"status": "live", "starts_at": -20, "ends_at": 60}, 0),
        ({"status": "live"}, 0),
    ],
)
def test_announces_a_window_that_opened_or_closed_once(db, fields, told):
    moments = {k: in_seconds(v) for k, v in fields.items() if k != "status"}
    drop = DropFactory(status=fields["status"], **moments, window_told_at=in_seconds(-10))

    assert [announce_windows(), announce_windows()] == [told, 0]

    events = list(drop.events.values_list("seq", "type"))
    assert events == [(1, "DROP_UPDATED")] * told
    if told:
        shown = drop.events.get().data["drop"]
        assert shown["status"] == Drop.objects.read_now().get().status_at(read_clock())


def test_what_was_announced_with_a_change_is_not_announced_again(db):
    drop = DropFactory(status="scheduled", starts_at=in_seconds(60))

    update_drop(drop.pk, starts_at=in_seconds(-1))
    assert announce_windows() == 0
    update_drop(drop.pk, ends_at=in_seconds(3600))
    Drop.objects.update(window_told_at=in_seconds(-10), ends_at=in_seconds(-0.5))
    assert announce_windows() == 1
    assert list(drop.events.values_list("type", flat=True)) == ["DROP_UPDATED"] * 3


@pytest.mark.django_db(transaction=True)
def test_any_number_of_loops_announce_each_window_once():
    for _ in range(10):
        DropFactory(starts_at=in_seconds(-1), window_told_at=in_seconds(-10))

    assert sum(at_once(*[announce_windows] * 4)) == 10

    assert [drop.events.count() for drop in Drop.objects.all()] == [1] * 10


@pytest.mark.django_db(transaction=True)
def test_a_change_of_stock_touches_no_index():
    drop = DropFactory(starts_at=in_seconds(60), ends_at=in_seconds(120))
    variant, staff = drop.variants.get(), UserFactory(staff=True)
    before = updates_within_the_page()

    for _ in range(20):
        adjust_stock(variant.pk, 1, reason="count", user=staff)

    # Not all, because now and then a page is full until it is tidied up.
    assert updates_within_the_page() - before > 15


def updates_within_the_page() -> int:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_stat_force_next_flush()")
        cursor.execute("SELECT n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'drops_drop'")
        return cursor.fetchone()[0]


@pytest.mark.parametrize("count", [1, 3])
def test_the_statement_that_locks_drops_is_planned_once(db, count):
    drop_ids = [drop.pk for drop in DropFactory.create_batch(count)]

    # psycopg prepares it in the 6th, PostgreSQL keeps a plan from the 6th of those on.
    for _ in range(15):
        lock_drops(drop_ids)

    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT max(generic_plans) FROM pg_prepared_statements WHERE statement LIKE %s",
            ["%FOR NO KEY UPDATE OF drop, variant%"],
        )
        assert cursor.fetchone()[0] > 0
