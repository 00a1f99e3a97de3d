import factory
from django.utils import timezone
from factory.django import DjangoModelFactory

from purchases.models import Purchase, PurchaseStatus
from reservations.tests.factories import ReservationFactory


class PurchaseFactory(DjangoModelFactory):
    """A paid purchase with the reservation that it consumed.

    Goes past the services: the drop's activity feed and its events don't know of it.
    """

    class Meta:
        model = Purchase

    reservation = factory.SubFactory(ReservationFactory, consumed=True)
    drop = factory.SelfAttribute("reservation.drop")
    variant = factory.SelfAttribute("reservation.variant")
    user = factory.SelfAttribute("reservation.user")
    quantity = factory.SelfAttribute("reservation.quantity")
    amount = factory.LazyAttribute(lambda p: p.reservation.unit_price * p.reservation.quantity)
    currency = factory.SelfAttribute("reservation.currency")
    created_at = factory.LazyFunction(timezone.now)

    class Params:
        refunded = factory.Trait(
            status=PurchaseStatus.REFUNDED,
            reservation=factory.SubFactory(ReservationFactory, voided=True),
        )
