"""A deploy in mid-sale: what was confirmed is there, once, and whoever failed got it in the end.

The long form is ``python -m tests.torture --only deploy``.
"""

import time
from decimal import Decimal

import pytest
from django.db import connection
from django.db.models import F

from benchmarks.stack import Hot
from drops.models import Variant
from drops.services import create_drop
from purchases.audit import audit_stock
from tests.torture.deploy import running_fleet
from tests.torture.sale import Sale
from users.tests.factories import UserFactory

pytestmark = [pytest.mark.slow, pytest.mark.servers, pytest.mark.django_db(transaction=True)]


class TestDatabase:
    """The test's database, in the place of the stack that a sale usually has."""

    def fresh(self, drops: int, stock: int) -> list[Hot]:
        creator = UserFactory()
        made = [
            create_drop(
                creator, name=f"Drop {n}", price=Decimal(120), total_stock=stock, status="live"
            )
            for n in range(drops)
        ]
        variants = dict(Variant.objects.values_list(F("drop_id"), F("pk")))
        return [Hot(str(drop.pk), str(variants[drop.pk])) for drop in made]

    def execute(self, query: str, **parameters: object) -> list[tuple]:
        with connection.cursor() as cursor:
            cursor.execute(query, parameters)
            return cursor.fetchall() if cursor.description else []

    def audit(self) -> list[str]:
        return [str(difference) for difference in audit_stock().differences]


@pytest.mark.parametrize("server", ["daphne", "uvicorn"])
def test_a_rolling_restart_loses_and_doubles_nothing(server):
    with running_fleet(server) as fleet:
        sale = Sale(TestDatabase(), lambda: fleet.ports, customers=20, seed=1, pause_seconds=0.1)
        with sale.open():
            for _ in range(2):
                assert fleet.restart_next() == ""
            sale.wait_for_success(fleet.ports, time.monotonic())

    verdict = sale.verdict()
    assert (verdict.lost, verdict.doubled, verdict.oversold, verdict.unanswered) == (0, 0, 0, 0)
    assert verdict.problems == []
    assert verdict.confirmed > 50
