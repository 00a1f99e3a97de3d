import asyncio

import pytest

from drops import group_commit
from drops.tests.factories import DropFactory
from reservations.models import Reservation
from tests.concurrency import another_session
from tests.hot import hot_lane
from users.tests.factories import UserFactory

pytestmark = pytest.mark.django_db(transaction=True)


def test_nobody_waits_for_as_long_as_the_database_hangs(monkeypatch):
    monkeypatch.setattr(group_commit, "ANSWER_SECONDS", 0.2)
    drop, user = DropFactory(), UserFactory()
    address = f"/api/drops/{drop.pk}/reserve"

    with asyncio.Runner() as runner, hot_lane() as lane:

        def ask():
            return runner.run(lane.post(address, user, Idempotency_Key="one"))

        with another_session() as other:
            other.execute("SELECT FROM drops_drop WHERE id = %s FOR UPDATE", [drop.pk])
            refused = ask()
            other.execute("ROLLBACK")
        monkeypatch.setattr(group_commit, "ANSWER_SECONDS", 10)
        repeated = ask()

    assert (refused.status, refused.json()["code"]) == (503, "unavailable")
    assert refused.header("retry-after") == "1"
    # Whether or not the first request was settled after all: there is one hold.
    assert repeated.status == 201
    assert str(Reservation.objects.get().pk) == repeated.json()["id"]
