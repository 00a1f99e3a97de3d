import pytest
from django.db import IntegrityError, transaction

from purchases.models import Purchase
from purchases.tests.factories import PurchaseFactory


@pytest.mark.parametrize(
    ("bad", "constraint"),
    [
        ({"quantity": 0}, "purchase_quantity_is_positive"),
        ({"amount": "-0.001"}, "purchase_amount_not_negative"),
        ({"status": "PAID"}, "purchase_status_is_known"),
    ],
)
def test_the_database_refuses_a_bad_purchase(db, bad, constraint):
    PurchaseFactory()

    with pytest.raises(IntegrityError) as refusal, transaction.atomic():
        Purchase.objects.update(**bad)

    assert refusal.value.__cause__.diag.constraint_name == constraint
    stored = Purchase.objects.get()
    assert (stored.quantity, stored.amount, stored.status) == (1, 199, "paid")


def test_the_database_allows_one_purchase_per_reservation(db):
    first = PurchaseFactory()

    with pytest.raises(IntegrityError) as refusal, transaction.atomic():
        PurchaseFactory(reservation=first.reservation)

    name = refusal.value.__cause__.diag.constraint_name
    assert name == "purchases_purchase_reservation_id_key"
    assert Purchase.objects.get() == first
