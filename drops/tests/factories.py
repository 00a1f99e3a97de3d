from datetime import timedelta

import factory
from django.utils import timezone
from factory.django import DjangoModelFactory

from drops.models import Drop, DropStatus, Variant
from users.tests.factories import UserFactory


class DropFactory(DjangoModelFactory):
    """A live drop of ten pairs in one size; ``sizes={"EU 42": 3, "EU 43": 4}`` gives it sizes."""

    class Meta:
        model = Drop
        skip_postgeneration_save = True

    name = factory.Sequence(lambda n: f"Drop {n}")
    price = "199.00"
    status = DropStatus.LIVE
    total_stock = 10
    available_stock = factory.SelfAttribute("total_stock")
    created_by = factory.SubFactory(UserFactory)
    created_at = factory.LazyFunction(timezone.now)

    class Params:
        draft = factory.Trait(status=DropStatus.DRAFT)
        upcoming = factory.Trait(
            status=DropStatus.SCHEDULED,
            starts_at=factory.LazyFunction(lambda: timezone.now() + timedelta(hours=1)),
        )
        over = factory.Trait(
            starts_at=factory.LazyFunction(lambda: timezone.now() - timedelta(hours=2)),
            ends_at=factory.LazyFunction(lambda: timezone.now() - timedelta(hours=1)),
        )

    @classmethod
    def _create(cls, model_class, *args, sizes=None, **kwargs):
        if sizes:
            kwargs["total_stock"] = kwargs["available_stock"] = sum(sizes.values())
        drop = super()._create(model_class, *args, **kwargs)
        for position, (label, units) in enumerate(
            (sizes or {Variant.ONE_SIZE: drop.total_stock}).items()
        ):
            Variant.objects.create(
                drop=drop, label=label, position=position, total_stock=units, available_stock=units
            )
        return drop
