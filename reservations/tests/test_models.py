from datetime import timedelta
from functools import partial

import pytest
from django.db import IntegrityError, transaction
from django.db.models import F

from reservations.models import Reservation
from reservations.tests.factories import ReservationFactory


@pytest.mark.parametrize(
    ("bad", "constraint"),
    [
        ({"quantity": 0}, "reservation_quantity_is_positive"),
        ({"unit_price": "-0.001"}, "reservation_price_not_negative"),
        ({"status": "active"}, "reservation_status_is_known"),
        ({"expires_at": F("created_at")}, "reservation_expires_after_it_was_made"),
    ],
)
def test_the_database_refuses_a_bad_reservation(db, bad, constraint):
    reservation = ReservationFactory()

    with pytest.raises(IntegrityError) as refusal, transaction.atomic():
        Reservation.objects.update(**bad)

    assert refusal.value.__cause__.diag.constraint_name == constraint
    stored = Reservation.objects.get()
    assert (stored.quantity, stored.status) == (1, "ACTIVE")
    assert stored.expires_at == reservation.expires_at


@pytest.mark.parametrize("trait", ["consumed", "expired", "released", "voided"])
def test_the_database_allows_one_active_reservation_per_user_and_drop(db, trait):
    active = ReservationFactory()
    again = partial(ReservationFactory, drop=active.drop, user=active.user)

    again(**{trait: True})
    with pytest.raises(IntegrityError) as refusal, transaction.atomic():
        again()

    name = refusal.value.__cause__.diag.constraint_name
    assert name == "one_active_reservation_per_user_and_drop"
    assert Reservation.objects.active().get() == active


def test_a_hold_is_overdue_from_its_deadline_on(db):
    hold = ReservationFactory()
    instant = timedelta(microseconds=1)

    assert not hold.is_overdue_at(hold.expires_at - instant)
    assert hold.is_overdue_at(hold.expires_at)
    assert not Reservation.objects.overdue(hold.expires_at - instant).exists()
    assert Reservation.objects.overdue(hold.expires_at).get() == hold


@pytest.mark.parametrize("trait", ["consumed", "expired", "released", "voided"])
def test_only_an_active_reservation_can_be_overdue(db, trait):
    reservation = ReservationFactory(**{trait: True})

    assert not reservation.is_overdue_at(reservation.expires_at + timedelta(days=1))
    assert not Reservation.objects.overdue(reservation.expires_at + timedelta(days=1)).exists()
