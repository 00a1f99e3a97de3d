from datetime import timedelta

import factory
from django.db import connection, transaction
from django.db.models import F
from django.utils import timezone
from factory.django import DjangoModelFactory

from drops.models import Drop, Variant
from drops.tests.factories import DropFactory
from reservations.models import Reservation, ReservationStatus
from users.tests.factories import UserFactory


class ReservationFactory(DjangoModelFactory):
    """An active hold of one unit, taken from stock; traits name the other states.

    The drop's and the variant's rows change underneath: refresh them before a look at the stock.
    """

    class Meta:
        model = Reservation

    drop = factory.SubFactory(DropFactory)
    variant = factory.LazyAttribute(lambda reservation: reservation.drop.variants.first())
    user = factory.SubFactory(UserFactory)
    quantity = 1
    unit_price = factory.SelfAttribute("drop.price")
    currency = factory.SelfAttribute("drop.currency")
    created_at = factory.LazyFunction(timezone.now)
    expires_at = factory.LazyAttribute(lambda hold: hold.created_at + timedelta(minutes=1))

    class Params:
        overdue = factory.Trait(
            created_at=factory.LazyFunction(lambda: timezone.now() - timedelta(minutes=2))
        )
        expired = factory.Trait(overdue=True, status=ReservationStatus.EXPIRED)
        released = factory.Trait(status=ReservationStatus.RELEASED)
        voided = factory.Trait(status=ReservationStatus.VOIDED)
        consumed = factory.Trait(status=ReservationStatus.CONSUMED)

    @classmethod
    @transaction.atomic  # an expiry loop must not see the hold before its stock
    def _create(cls, model_class, *args, **kwargs):
        reservation = super()._create(model_class, *args, **kwargs)
        is_held = reservation.status == ReservationStatus.ACTIVE
        is_sold = reservation.status == ReservationStatus.CONSUMED
        for stock in (
            Drop.objects.filter(pk=reservation.drop_id),
            Variant.objects.filter(pk=reservation.variant_id),
        ):
            stock.update(
                available_stock=F("available_stock") - reservation.quantity * (is_held or is_sold),
                sold_stock=F("sold_stock") + reservation.quantity * is_sold,
            )
        return reservation


def hold_all(drop: Drop) -> None:
    """Let each unit of ``drop``, of one size, be held by a new user; quick also for thousands."""
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute(
            """
            WITH made AS (
                INSERT INTO users_user
                    (id, username, password, email, is_superuser, is_staff, is_active, date_joined)
                SELECT id, id, '', '', false, false, true, now()
                FROM (SELECT gen_random_uuid() AS id FROM generate_series(1, %s)) AS new
                RETURNING id
            )
            INSERT INTO reservations_reservation
                (id, drop_id, variant_id, user_id, quantity, unit_price, currency, status,
                 created_at, expires_at)
            SELECT gen_random_uuid(), %s, %s, id, 1, %s, %s, 'ACTIVE', now(), now() + interval '1h'
            FROM made
            """,
            [drop.available_stock, drop.pk, drop.variants.get().pk, drop.price, drop.currency],
        )
        drop.variants.update(available_stock=0)
        Drop.objects.filter(pk=drop.pk).update(available_stock=0)
