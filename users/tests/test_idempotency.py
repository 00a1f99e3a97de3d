from datetime import timedelta
from functools import partial

import pytest
from django.db import OperationalError, connection
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.test import APIRequestFactory

from drops.models import Drop
from drops.tests.factories import DropFactory
from reservations.models import Reservation
from reservations.services import Claim, reserve
from tests.concurrency import another_session, at_once, lock_timeout
from users.idempotency import idempotent
from users.models import IdempotencyKey
from users.tests.factories import UserFactory

KEY = {"HTTP_IDEMPOTENCY_KEY": "order-1"}
NEW_DROP = {"name": "Aurora", "price": "199.00", "total_stock": 5}

BAD_KEYS = {
    "empty": "",
    "256 characters": "k" * 256,
    "10 kB": "k" * 10_000,
    "a tab": "order\t1",
    "a NUL": "order\x00",
    "a line break": "order\n",
    "an accent": "\u00e9",
    "an accent in UTF-8": "\u00e9".encode().decode("latin-1"),
    "DEL": "order\x7f",
}


@pytest.fixture
def user(db):
    return UserFactory()


@pytest.fixture
def client(client_of, user):
    return client_of(user)


def stock(drop):
    drop.refresh_from_db()
    return drop.available_stock


def test_answers_a_repeated_request_with_the_first_answer(client, user):
    drop = DropFactory()
    first = client.post(f"/api/drops/{drop.pk}/reserve", **KEY)
    # The answer of now would be another one.
    client.delete(f"/api/reservations/{first.json()['id']}")

    again = client.post(f"/api/drops/{drop.pk}/reserve", **KEY)

    assert (first.status_code, again.status_code) == (201, 201)
    assert again.content == first.content
    assert again["Content-Type"] == first["Content-Type"] == "application/json"
    assert "Idempotent-Replayed" not in first
    assert again["Idempotent-Replayed"] == "true"
    assert Reservation.objects.get().status == "RELEASED"
    assert stock(drop) == 10


def test_makes_no_second_drop(client):
    answers = [client.post("/api/drops", NEW_DROP, **KEY) for _ in range(3)]

    assert len({answer.content for answer in answers}) == 1
    assert Drop.objects.count() == 1


def test_without_a_key_each_request_counts(client):
    for _ in range(3):
        client.post("/api/drops", NEW_DROP)

    assert Drop.objects.count() == 3
    assert not IdempotencyKey.objects.exists()


def test_replays_a_purchase(client):
    drop = DropFactory()
    client.post(f"/api/drops/{drop.pk}/reserve")

    first = client.post(f"/api/drops/{drop.pk}/purchase", **KEY)
    again = client.post(f"/api/drops/{drop.pk}/purchase", **KEY)

    # Without the key the second answer is 200.
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.content == first.content


def test_the_last_slash_makes_no_other_route(client):
    first = client.post("/api/drops", NEW_DROP, **KEY)
    again = client.post("/api/drops/", NEW_DROP, **KEY)

    assert again.content == first.content
    assert again["Idempotent-Replayed"] == "true"


def test_refuses_the_key_with_another_body(client):
    client.post("/api/drops", NEW_DROP, **KEY)

    response = client.post("/api/drops", NEW_DROP | {"total_stock": 6}, **KEY)

    assert (response.status_code, response.json()["code"]) == (422, "idempotency_key_reused")
    assert Drop.objects.get().total_stock == 5
    assert IdempotencyKey.objects.count() == 1


def test_another_users_same_key_is_independent(client, client_of):
    mine = client.post("/api/drops", NEW_DROP, **KEY)
    theirs = client_of(UserFactory()).post("/api/drops", NEW_DROP, **KEY)

    assert theirs.status_code == 201
    assert theirs.json()["id"] != mine.json()["id"]
    assert "Idempotent-Replayed" not in theirs


def test_another_routes_same_key_is_independent(client):
    one, other = DropFactory(), DropFactory()

    answers = [client.post(f"/api/drops/{drop.pk}/reserve", **KEY) for drop in (one, other)]

    assert [answer.json()["drop_id"] for answer in answers] == [str(one.pk), str(other.pk)]


def test_a_refusal_is_not_stored_and_can_succeed_later(client):
    drop = DropFactory(total_stock=1)
    rival = reserve(drop.pk, Claim(UserFactory().pk))

    refused = client.post(f"/api/drops/{drop.pk}/reserve", **KEY)

    assert (refused.status_code, refused.json()["code"]) == (409, "fully_reserved")
    assert not IdempotencyKey.objects.exists()

    Reservation.objects.filter(pk=rival.pk).update(
        created_at=rival.created_at - timedelta(hours=1), expires_at=rival.created_at
    )
    assert client.post(f"/api/drops/{drop.pk}/reserve", **KEY).status_code == 201
    assert IdempotencyKey.objects.get().key == "order-1"


def test_a_body_that_was_refused_may_be_corrected_under_the_same_key(client):
    refused = client.post("/api/drops", NEW_DROP | {"price": "-1"}, **KEY)
    corrected = client.post("/api/drops", NEW_DROP, **KEY)

    assert (refused.status_code, corrected.status_code) == (400, 201)
    assert Drop.objects.count() == 1


@pytest.mark.parametrize("key", BAD_KEYS.values(), ids=BAD_KEYS.keys())
def test_refuses_a_key_that_is_not_printable_ascii(client, key):
    response = client.post("/api/drops", NEW_DROP, HTTP_IDEMPOTENCY_KEY=key)

    assert response.status_code == 400
    assert response.json()["code"] == "validation_error"
    assert [error["field"] for error in response.json()["errors"]] == ["Idempotency-Key"]
    assert not Drop.objects.exists()
    assert not IdempotencyKey.objects.exists()


@pytest.mark.parametrize("key", ["k", "k" * 255, "a b", "".join(map(chr, range(0x21, 0x7F)))])
def test_takes_any_printable_ascii_up_to_255(client, key):
    first, again = (client.post("/api/drops", NEW_DROP, HTTP_IDEMPOTENCY_KEY=key) for _ in "12")

    assert first.status_code == 201
    assert again["Idempotent-Replayed"] == "true"


@pytest.mark.parametrize("drop_id", ["x" * 500, "%00", "a%0ab"])
def test_a_key_for_what_can_not_exist_is_not_found(client, drop_id):
    response = client.post(f"/api/drops/{drop_id}/reserve", **KEY)

    assert (response.status_code, response.json()["code"]) == (404, "not_found")
    assert not IdempotencyKey.objects.exists()


@pytest.mark.parametrize(("age_hours", "drops"), [(23.9, 1), (24.1, 2)])
def test_forgets_the_answer_after_24_hours(client, age_hours, drops):
    client.post("/api/drops", NEW_DROP, **KEY)
    row = IdempotencyKey.objects.get()
    IdempotencyKey.objects.update(created_at=row.created_at - timedelta(hours=age_hours))

    response = client.post("/api/drops", NEW_DROP, **KEY)

    assert response.status_code == 201
    assert Drop.objects.count() == drops
    assert ("Idempotent-Replayed" in response) == (drops == 1)


def test_an_expired_key_takes_another_body_and_then_keeps_it(client):
    client.post("/api/drops", NEW_DROP, **KEY)
    IdempotencyKey.objects.update(
        created_at=IdempotencyKey.objects.get().created_at - timedelta(hours=25)
    )

    other = client.post("/api/drops", NEW_DROP | {"name": "Borealis"}, **KEY)
    again = client.post("/api/drops", NEW_DROP | {"name": "Borealis"}, **KEY)
    reused = client.post("/api/drops", NEW_DROP, **KEY)

    assert other.json()["name"] == "Borealis"
    assert again.content == other.content
    assert reused.status_code == 422
    assert IdempotencyKey.objects.count() == 1


@pytest.mark.django_db(transaction=True)
def test_two_at_once_make_one_effect(client):
    create = partial(client.post, "/api/drops", NEW_DROP, **KEY)

    answers = at_once(create, create)

    assert [answer.status_code for answer in answers] == [201, 201]
    assert answers[0].content == answers[1].content
    assert sorted("Idempotent-Replayed" in answer for answer in answers) == [False, True]
    assert Drop.objects.count() == 1


@pytest.mark.django_db(transaction=True)
def test_two_at_once_without_a_key_make_two_effects(client):
    create = partial(client.post, "/api/drops", NEW_DROP)

    assert [answer.status_code for answer in at_once(create, create)] == [201, 201]
    assert Drop.objects.count() == 2


@pytest.mark.django_db(transaction=True)
def test_tells_that_the_first_request_is_still_being_worked_on(client, user):
    with another_session() as session:
        session.execute(
            "INSERT INTO users_idempotencykey (user_id, route, key, fingerprint, body, created_at)"
            " VALUES (%s, 'POST /api/drops', 'order-1', '', '', now())",
            [user.pk],
        )
        with lock_timeout(50):
            response = client.post("/api/drops", NEW_DROP, **KEY)

    assert (response.status_code, response.json()["code"]) == (409, "idempotency_in_progress")
    assert response["Retry-After"] == "1"
    assert not Drop.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_a_crash_leaves_neither_the_key_nor_the_effect(user):
    drop = DropFactory()
    done = []

    @idempotent
    def reserve_and_lose_the_database(view, request):
        done.append(reserve(drop.pk, Claim(user.pk)))
        with another_session() as session:
            session.execute(
                "SELECT pg_terminate_backend(%s)", [connection.connection.info.backend_pid]
            )
        return Response({})

    request = Request(APIRequestFactory().post("/api/drops", {}, **KEY))
    request.user = user
    with pytest.raises(OperationalError):
        reserve_and_lose_the_database(None, request)

    connection.close()
    assert len(done) == 1
    assert stock(drop) == 10
    assert not Reservation.objects.exists()
    assert not IdempotencyKey.objects.exists()
