from datetime import timedelta

import factory
from django.db import transaction
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
