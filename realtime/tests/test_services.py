from unittest.mock import patch

import pytest
from django.db import transaction

from drops.tests.factories import DropFactory
from realtime import publisher
from realtime.models import Event
from reservations.services import Claim, reserve
from users.tests.factories import UserFactory


class Cancelled(Exception):
    pass


def test_what_is_rolled_back_is_not_published(db):
    drop, user = DropFactory(), UserFactory()
    heard = []

    def reserve_and_cancel():
        with transaction.atomic():
            reserve(drop.pk, Claim(user.pk))
            raise Cancelled

    with (
        patch.object(publisher, "_followers", [lambda *news: heard.append(news)]),
        pytest.raises(Cancelled),
    ):
        reserve_and_cancel()

    assert heard == []
    assert not Event.objects.exists()
