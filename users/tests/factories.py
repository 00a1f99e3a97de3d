import factory
from factory.django import DjangoModelFactory

from users.models import User


class UserFactory(DjangoModelFactory):
    class Meta:
        model = User

    username = factory.Sequence(lambda n: f"shopper_{n}")

    class Params:
        staff = factory.Trait(is_staff=True)
