from datetime import timedelta

import pytest
from django.apps import apps
from django.contrib.contenttypes.models import ContentType
from django.db import connection
from django.urls import reverse
from django.utils import timezone

from benchmarks.pages import pages_of
from control.dashboard import figures
from drops.models import Drop
from drops.tests.factories import DropFactory
from purchases.models import Purchase
from purchases.tests.factories import PurchaseFactory
from realtime.models import Event
from reservations.models import Reservation
from reservations.tests.factories import ReservationFactory
from tests.queries import statements
from users.models import User
from users.tests.factories import UserFactory


def test_the_figures_are_those_of_drops_on_sale_and_soon(db):
    live = DropFactory(total_stock=10)
    ReservationFactory(drop=live)
    bought = PurchaseFactory(reservation__drop=live)
    DropFactory(upcoming=True)
    DropFactory(draft=True)
    PurchaseFactory(reservation__drop=DropFactory(over=True))
    live.refresh_from_db()

    told = figures()

    assert [drop["status"] for drop in told["drops"]] == ["live", "scheduled"]
    assert told["drops"][0] == {
        "id": str(live.pk),
        "name": live.name,
        "status": "live",
        "seq": 0,
        "total": 10,
        "available": 8,
        "sold": 1,
    }
    assert [purchase["id"] for purchase in told["purchases"]] == [str(bought.pk)]
    assert sum(told["rate"].values()) == 1
    assert told["oldestOverdueSeconds"] == 0


def test_the_figures_are_of_all_drops_however_many(db):
    DropFactory.create_batch(41)

    assert len(figures()["drops"]) == 41


def test_the_figures_know_the_oldest_overdue_hold(db):
    ReservationFactory(overdue=True)
    ReservationFactory(created_at=timezone.now() - timedelta(minutes=3))

    assert figures()["oldestOverdueSeconds"] == pytest.approx(120, abs=60)


def test_the_dashboard_opens_and_carries_the_figures(admin_client):
    drop = DropFactory(name="</script><b>")

    page = admin_client.get(reverse("admin:index"))

    assert page.context["figures"]["drops"][0]["id"] == str(drop.pk)
    assert "</script><b>" not in page.content.decode()


def test_an_empty_shop_has_a_dashboard_too(admin_client):
    assert admin_client.get(reverse("admin:index")).status_code == 200
    assert figures()["now"] is None


def test_admin_pages_have_a_policy_of_their_own(admin_client, client):
    for answer in (
        admin_client.get(reverse("admin:index")),
        admin_client.get(reverse("admin:drops_drop_changelist")),
        client.get(reverse("admin:login")),
    ):
        policy = answer["Content-Security-Policy"]
        assert "script-src 'self' 'unsafe-eval';" in policy
        assert "'unsafe-inline'" not in policy.partition("script-src")[2].partition(";")[0]


@pytest.fixture
def crowd(db):
    """A drop of which 100,000 units were bought, one by one, by a hundred users."""
    drop = DropFactory(total_stock=200_000, created_at=timezone.now() - timedelta(days=1))
    variant = drop.variants.get()
    users = User.objects.bulk_create(UserFactory.build_batch(100))
    with connection.cursor() as cursor:
        cursor.execute("SET LOCAL statement_timeout = 0")  # a busy machine takes its time
        cursor.execute(
            """
            WITH held AS (
                INSERT INTO reservations_reservation
                    (id, user_id, drop_id, variant_id, quantity, unit_price, currency, status,
                     created_at, expires_at)
                SELECT gen_random_uuid(), (%(users)s::uuid[])[n %% 100 + 1], %(drop)s, %(variant)s,
                       1, 199, 'USD', 'CONSUMED', now() - n * interval '1 second', now()
                FROM generate_series(1, 100000) AS n
                RETURNING id, user_id, created_at
            ), bought AS (
                INSERT INTO purchases_purchase
                    (id, reservation_id, drop_id, variant_id, user_id, quantity, amount,
                     currency, status, created_at)
                SELECT gen_random_uuid(), id, %(drop)s, %(variant)s, user_id, 1, 199, 'USD',
                       'paid', created_at
                FROM held
                RETURNING created_at
            )
            INSERT INTO realtime_event (drop_id, seq, type, data, created_at)
            SELECT %(drop)s, row_number() OVER (ORDER BY created_at), 'PURCHASE_COMPLETED',
                   '{"username": "shopper"}', created_at
            FROM bought
            """,
            {"drop": drop.pk, "variant": variant.pk, "users": [user.pk for user in users]},
        )
        for model in (Reservation, Purchase, Event):
            cursor.execute(f"ANALYZE {model._meta.db_table}")
    Drop.objects.filter(pk=drop.pk).update(seq=100_000, sold_stock=100_000, available_stock=100_000)
    drop.variants.update(sold_stock=100_000, available_stock=100_000)
    return drop


@pytest.mark.slow
def test_pages_take_the_same_statements_for_one_purchase_and_100_000(admin_client, request):
    few = PurchaseFactory().drop
    ContentType.objects.get_for_models(*apps.get_models())  # remembered for good

    def counts(drop):
        made = {}
        for _, url in pages_of(drop.pk, search="shopper", page=900):
            with statements() as made[url.replace(str(drop.pk), "")]:
                assert admin_client.get(url).status_code == 200
        return {url: len(sql) for url, sql in made.items()}

    before = counts(few)
    assert counts(request.getfixturevalue("crowd")) == before
