from datetime import timedelta
from functools import partial

import pytest
from django.db import IntegrityError, connection, transaction
from django.db.models import F
from django.utils import timezone

from drops.models import Drop, DropStatus, StockAdjustment, Variant
from drops.tests.factories import DropFactory
from purchases.services import purchase
from reservations.services import Claim, reserve
from users.models import User
from users.tests.factories import UserFactory

NOW = timezone.now()


def violated(write):
    """Return the name of the constraint that refuses ``write``, which then changes nothing."""
    with pytest.raises(IntegrityError) as refusal, transaction.atomic():
        write()
    return refusal.value.__cause__.diag.constraint_name


@pytest.mark.parametrize(
    ("bad", "constraint"),
    [
        ({"available_stock": 11}, "drop_stock_between_zero_and_total"),
        ({"available_stock": -1}, "drop_stock_between_zero_and_total"),
        ({"sold_stock": 1}, "drop_stock_between_zero_and_total"),
        ({"sold_stock": -1}, "drop_stock_between_zero_and_total"),
        ({"total_stock": 9}, "drop_stock_between_zero_and_total"),
        ({"price": "-0.001"}, "drop_price_not_negative"),
        ({"currency": "usd"}, "drop_currency_has_three_capitals"),
        ({"currency": "US"}, "drop_currency_has_three_capitals"),
        ({"currency": "U$D"}, "drop_currency_has_three_capitals"),
        ({"currency": ""}, "drop_currency_has_three_capitals"),
        ({"status": "open"}, "drop_status_is_known"),
        ({"status": "LIVE"}, "drop_status_is_known"),
        ({"starts_at": NOW, "ends_at": NOW}, "drop_ends_after_it_starts"),
        ({"starts_at": NOW, "ends_at": NOW - timedelta(hours=1)}, "drop_ends_after_it_starts"),
        ({"max_per_user": 0}, "drop_limit_per_user_is_positive"),
    ],
)
def test_the_database_refuses_a_bad_drop(db, bad, constraint):
    drop = DropFactory(total_stock=10)

    assert violated(partial(Drop.objects.filter(pk=drop.pk).update, **bad)) == constraint
    drop.refresh_from_db()
    assert (drop.total_stock, drop.available_stock, drop.sold_stock) == (10, 10, 0)
    assert (drop.status, drop.currency, drop.max_per_user) == ("live", "USD", 1)


@pytest.mark.parametrize(
    ("bad", "constraint"),
    [
        ({"available_stock": 11}, "variant_stock_between_zero_and_total"),
        ({"available_stock": F("available_stock") - 11}, "drops_variant_available_stock_check"),
        ({"sold_stock": 1}, "variant_stock_between_zero_and_total"),
        ({"total_stock": 9}, "variant_stock_between_zero_and_total"),
    ],
)
def test_the_database_refuses_bad_stock_of_a_variant(db, bad, constraint):
    variant = DropFactory(total_stock=10).variants.get()

    assert violated(partial(Variant.objects.filter(pk=variant.pk).update, **bad)) == constraint
    variant.refresh_from_db()
    assert (variant.total_stock, variant.available_stock, variant.sold_stock) == (10, 10, 0)


def test_the_database_refuses_a_label_twice_in_one_drop(db):
    drop = DropFactory(sizes={"EU 42": 1})
    twin = Variant(drop=drop, label="EU 42", position=1, total_stock=1, available_stock=1)

    assert violated(twin.save) == "variant_label_once_per_drop"
    assert drop.variants.count() == 1
    assert DropFactory(sizes={"EU 42": 1}).variants.count() == 1


def test_the_database_refuses_an_adjustment_of_nothing(db):
    adjustment = StockAdjustment(
        variant=DropFactory().variants.get(), delta=0, reason="Typo", created_by=UserFactory()
    )

    assert violated(adjustment.save) == "adjustment_changes_something"
    assert not StockAdjustment.objects.exists()


# What staff decided, when the window opens and closes (hours from now), what holds now.
STATUSES = [
    ("draft", None, None, "draft"),
    ("draft", -2, None, "draft"),
    ("draft", 1, 2, "draft"),
    ("draft", -2, -1, "draft"),
    ("scheduled", 1, None, "scheduled"),
    ("scheduled", 1, 2, "scheduled"),
    ("scheduled", -1, None, "live"),
    ("scheduled", -1, 1, "live"),
    ("scheduled", -2, -1, "ended"),
    ("live", None, None, "live"),
    ("live", None, 1, "live"),
    ("live", None, -1, "ended"),
    ("live", -1, None, "live"),
    ("live", -1, 1, "live"),
    ("live", -2, -1, "ended"),
    ("live", 1, None, "scheduled"),
    ("live", 1, 2, "scheduled"),
    ("paused", None, None, "paused"),
    ("paused", -1, 1, "paused"),
    ("paused", 1, 2, "paused"),
    ("paused", None, -1, "ended"),
    ("paused", -2, -1, "ended"),
    ("ended", None, None, "ended"),
    ("ended", 1, 2, "ended"),
    ("ended", -1, 1, "ended"),
    ("cancelled", None, None, "cancelled"),
    ("cancelled", -1, 1, "cancelled"),
    ("cancelled", -2, -1, "cancelled"),
]


@pytest.mark.parametrize(("decided", "starts", "ends", "holds"), STATUSES)
def test_the_row_and_the_query_agree_on_the_status(db, decided, starts, ends, holds):
    starts_at, ends_at = (
        hours and timezone.now() + timedelta(hours=hours) for hours in (starts, ends)
    )
    DropFactory(status=decided, starts_at=starts_at, ends_at=ends_at)

    drop = Drop.objects.read_now().get()

    assert drop.status_at(drop.read_at) == holds
    found = [s.value for s in DropStatus if Drop.objects.with_status(s).exists()]
    assert found == [holds]
    assert Drop.objects.current().exists() == (holds in {"scheduled", "live", "paused"})


def test_the_window_includes_its_start_and_not_its_end():
    drop = Drop(status="scheduled", starts_at=NOW, ends_at=NOW + timedelta(hours=1))
    instant = timedelta(microseconds=1)

    assert drop.status_at(NOW - instant) == "scheduled"
    assert drop.status_at(NOW) == "live"
    assert drop.status_at(drop.ends_at - instant) == "live"
    assert drop.status_at(drop.ends_at) == "ended"


@pytest.mark.parametrize(
    ("total", "available", "sold", "held", "availability"),
    [
        (10, 10, 0, 0, "available"),
        (10, 1, 5, 4, "available"),
        (10, 0, 0, 10, "fully_reserved"),
        (10, 0, 9, 1, "fully_reserved"),
        (10, 0, 10, 0, "sold_out"),
        (0, 0, 0, 0, "sold_out"),
    ],
)
def test_tells_held_units_from_sold_ones(total, available, sold, held, availability):
    drop = Drop(total_stock=total, available_stock=available, sold_stock=sold)

    assert (drop.held_stock, drop.availability) == (held, availability)


def updates_of(*tables):
    """Return (all, HOT) updates of each table so far, this session's included."""
    with connection.cursor() as cursor:
        # Takes effect when the statement's transaction ends, so the next one sees it.
        cursor.execute("SELECT pg_stat_force_next_flush()")
        cursor.execute(
            "SELECT relname, n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables"
            " WHERE relname = ANY(%s)",
            [list(tables)],
        )
        return {table: (updates, hot) for table, updates, hot in cursor}


@pytest.mark.django_db(transaction=True)
def test_updates_of_the_hot_rows_stay_in_their_page():
    drop = DropFactory(sizes={"EU 42": 200, "EU 43": 200}, max_per_user=1)
    sizes = list(drop.variants.all())
    shoppers = User.objects.bulk_create(UserFactory.build_batch(100))
    before = updates_of("drops_drop", "drops_variant")

    for number, shopper in enumerate(shoppers):
        reserve(drop.pk, Claim(shopper.pk, sizes[number % 2].pk))
        purchase(drop.pk, shopper.pk)

    after = updates_of("drops_drop", "drops_variant")
    for table, least in {"drops_drop": 200, "drops_variant": 200}.items():
        updates, hot = (now - then for now, then in zip(after[table], before[table], strict=True))
        assert updates >= least
        assert hot / updates >= 0.95, f"{table}: {hot} of {updates}"
