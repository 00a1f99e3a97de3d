"""From a request to its batch: new users, keys that are in use, and whoever is locked."""

import asyncio
import threading
import time
import uuid
from collections import Counter
from typing import Any

import pytest
from django.db import IntegrityError, OperationalError

from drops import group_commit, hot_claims
from drops.hot_claims import HotClaim
from drops.models import Drop
from drops.services import Wait
from drops.tests.factories import DropFactory
from reservations import services
from reservations.asgi import settle_reserves
from reservations.models import Reservation
from reservations.services import Claim
from tests.concurrency import another_session, at_once, blocked
from tests.hot import Lane, hot_lane
from users.idempotency import make_key
from users.identity import Identity
from users.models import User
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


# --- New users --------------------------------------------------------------------------


def hot_claim(user_id: uuid.UUID) -> HotClaim:
    return HotClaim(Identity(user_id, None), None, Claim(user_id))


def keyed_claim(user_id: uuid.UUID) -> HotClaim:
    key = make_key(user_id, "POST", "/reserve", "one", b"")
    return HotClaim(Identity(user_id, None), key, Claim(user_id))


@pytest.fixture(params=[True, False], ids=["development", "production"])
def any_mode(request, settings):
    settings.DEBUG = request.param


def test_a_new_user_who_came_first_is_served_first(any_mode):
    drop, known, new = DropFactory(total_stock=1), UserFactory(), uuid.uuid4()
    batch = {drop.pk: [hot_claim(new), hot_claim(known.pk)]}

    first, second = settle_reserves(batch, wait=Wait.BRIEFLY)[drop.pk]

    assert (first.status, second.code) == (201, "fully_reserved")
    assert Reservation.objects.get().user_id == new


def test_a_new_user_who_comes_with_a_key_is_served_in_turn(any_mode):
    drop, known, new = DropFactory(total_stock=1), UserFactory(), uuid.uuid4()
    batch = {drop.pk: [keyed_claim(new), hot_claim(known.pk)]}

    first, second = settle_reserves(batch, wait=Wait.BRIEFLY)[drop.pk]

    assert (first.status, second.code) == (201, "fully_reserved")
    (repeated,) = settle_reserves({drop.pk: [keyed_claim(new)]}, wait=Wait.BRIEFLY)[drop.pk]
    assert (repeated.body, repeated.is_replayed) == (first.body, True)


@pytest.mark.parametrize("error", [OperationalError("gone"), IntegrityError("odd")])
def test_where_new_users_cannot_be_made_nothing_is_committed(any_mode, monkeypatch, error):
    def fail(identities):
        raise error

    drop, known = DropFactory(), UserFactory()
    monkeypatch.setattr(hot_claims, "create_users", fail)
    batch = {drop.pk: [hot_claim(known.pk), hot_claim(uuid.uuid4())]}

    with pytest.raises(type(error)):
        settle_reserves(batch, wait=Wait.BRIEFLY)

    assert not Reservation.objects.exists()


def test_users_who_were_deleted_meanwhile_are_made_again(any_mode, monkeypatch):
    monkeypatch.setattr(hot_claims, "MADE_SECONDS", 0.0)
    user = uuid.uuid4()
    for drop in DropFactory.create_batch(2):
        (answer,) = settle_reserves({drop.pk: [hot_claim(user)]}, wait=Wait.BRIEFLY)[drop.pk]
        assert answer.status == 201
        Reservation.objects.all().delete()
        User.objects.filter(pk=user).delete()


def test_a_user_who_was_switched_off_costs_the_others_one_more_settling_a_second(
    any_mode, monkeypatch
):
    drop, known, off = DropFactory(), UserFactory(), UserFactory(is_active=False)
    batch = {drop.pk: [hot_claim(off.pk), hot_claim(known.pk)]}
    settled = []
    settle = hot_claims._settle
    monkeypatch.setattr(
        hot_claims,
        "_settle",
        lambda *args, **kwargs: settled.append(1) or settle(*args, **kwargs),
    )

    for _ in range(3):
        refusal, answer = settle_reserves(batch, wait=Wait.BRIEFLY)[drop.pk]
        assert refusal.code == "unknown_user"
        assert answer.status in (200, 201)

    assert len(settled) <= 4


def test_a_new_user_who_reserves_twice_at_once_passes_no_limit(settings, monkeypatch):
    settings.DEBUG, settings.MAX_ACTIVE_HOLDS = False, 1
    slow, quick, user = DropFactory(), DropFactory(), uuid.uuid4()
    slow_is_locked, quick_is_judged, slow_is_stored = (threading.Event() for _ in range(3))
    lock_drops, save_drops = services.lock_drops, services.save_drops

    def lock_and_wait(drop_ids, wait):
        locked = lock_drops(drop_ids, wait)
        if slow.pk in locked:
            slow_is_locked.set()
            quick_is_judged.wait(0.5)
        return locked

    def wait_and_save(locked_drops, now, beside):
        if beside and quick.pk in [locked.drop.pk for locked in locked_drops]:
            quick_is_judged.set()
            slow_is_stored.wait(0.5)
        save_drops(locked_drops, now, beside)

    def reserve(drop):
        batch = {drop.pk: [hot_claim(user)]}
        return settle_reserves(batch, wait=Wait.AS_LONG_AS_IT_TAKES)[drop.pk][0]

    def reserve_slowly():
        answer = reserve(slow)
        slow_is_stored.set()
        return answer

    def reserve_quickly():
        slow_is_locked.wait(5)
        return reserve(quick)

    monkeypatch.setattr(services, "lock_drops", lock_and_wait)
    monkeypatch.setattr(services, "save_drops", wait_and_save)

    first, second = at_once(reserve_slowly, reserve_quickly)

    assert (first.status, second.status_code) == (201, 409)
    assert Reservation.objects.count() == 1


# --- What one request waits for, and the others don't -----------------------------------


async def timed(lane: Lane, drop: Drop, user: Any, **headers: str) -> tuple[int, float]:
    began = time.monotonic()
    answer = await lane.post(f"/api/drops/{drop.pk}/reserve", user, {}, **headers)
    return answer.status, time.monotonic() - began


def test_a_key_that_stays_in_use_fails_its_request_alone():
    drop, users = DropFactory(total_stock=100), UserFactory.create_batch(40)
    waiting = users[25]

    async def scene(lane):
        return await asyncio.gather(
            *(
                timed(lane, drop, user, **({"Idempotency_Key": "one"} if user is waiting else {}))
                for user in users
            )
        )

    with another_session() as other:
        other.execute(
            "INSERT INTO users_idempotencykey"
            " (user_id, route, key, fingerprint, body, created_at)"
            " VALUES (%s, %s, 'one', '', '', now())",
            [waiting.pk, f"POST /api/drops/{drop.pk}/reserve"],
        )
        with hot_lane() as lane:
            answers = asyncio.run(scene(lane))

    assert answers.pop(25)[0] == 409
    assert Counter(status for status, _ in answers) == {201: 39}
    # Who came before it doesn't wait for it.
    assert max(seconds for _, seconds in answers[:20]) < 1.5


def test_claims_with_keys_wait_for_a_locked_drop_as_long_as_others_do():
    drop, users = DropFactory(), UserFactory.create_batch(2)
    batch = {drop.pk: [keyed_claim(user.pk) for user in users]}
    answers: list[Any] = []

    def settle():
        answers.extend(settle_reserves(batch, wait=Wait.AS_LONG_AS_IT_TAKES)[drop.pk])

    with another_session() as other:
        other.execute("SELECT FROM drops_drop WHERE id = %s FOR UPDATE", [drop.pk])
        with blocked(settle):
            # Far longer than a key in use is waited for.
            time.sleep(0.3)
            other.execute("ROLLBACK")

    assert [answer.status for answer in answers] == [201, 201]


def test_a_user_who_stays_locked_keeps_up_no_other_drop(settings):
    settings.MAX_ACTIVE_HOLDS = 5
    drops, users = DropFactory.create_batch(3), UserFactory.create_batch(3)

    async def scene(lane):
        return await asyncio.gather(
            *(timed(lane, drop, user) for drop, user in zip(drops, users, strict=True))
        )

    with another_session() as other:
        other.execute("SELECT FROM users_user WHERE id = %s FOR UPDATE", [users[0].pk])
        with hot_lane() as lane:
            (locked, _), *others = asyncio.run(scene(lane))

    assert locked == 503
    assert [status for status, _ in others] == [201, 201]
    assert max(seconds for _, seconds in others) < 1.5


def test_who_comes_to_a_locked_drop_that_still_waits_for_a_thread_is_told_at_once():
    drops, user = DropFactory.create_batch(2 * group_commit.MAX_DROPS_APART + 1), UserFactory()

    async def scene(lane):
        first = asyncio.gather(*(timed(lane, drop, user) for drop in drops))
        await asyncio.sleep(group_commit.MAX_WAIT_SECONDS + 0.7)
        group = lane.application.routes[0].endpoint.group
        waiting = next(pk for pk, apart in group._apart.items() if not apart.in_flight)
        answer = await timed(lane, Drop(pk=waiting), user)
        await first
        return answer

    with another_session() as other:
        for drop in drops:
            other.execute("SELECT FROM drops_drop WHERE id = %s FOR UPDATE", [drop.pk])
        with hot_lane() as lane:
            status, seconds = asyncio.run(scene(lane))

    assert status == 503
    assert seconds < 1
