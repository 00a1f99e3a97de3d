import uuid
from datetime import timedelta

import pytest
from django.conf import settings
from django.utils import timezone

from drops.tests.factories import DropFactory
from reservations.models import Reservation
from reservations.tests.factories import ReservationFactory
from tests.queries import statements
from users.tests.factories import UserFactory


def instant(value):
    return value.isoformat().replace("+00:00", "Z")


def test_reserves_and_shows_the_hold(client_of, db):
    drop, user = DropFactory(sizes={"EU 42": 5, "EU 43": 5}, max_per_user=3), UserFactory()
    size = drop.variants.last()

    response = client_of(user).post(
        f"/api/drops/{drop.pk}/reserve", {"variant": str(size.pk), "quantity": 3}
    )

    hold = Reservation.objects.get()
    assert response.status_code == 201
    assert response.json() == {
        "id": str(hold.pk),
        "drop_id": str(drop.pk),
        "variant_id": str(size.pk),
        "user_id": str(user.pk),
        "quantity": 3,
        "unit_price": "199.00",
        "currency": "USD",
        "status": "ACTIVE",
        "created_at": instant(hold.created_at),
        "expires_at": instant(hold.created_at + timedelta(seconds=60)),
        "expires_in": 60.0,
        "drop": {"id": str(drop.pk), "name": drop.name, "available_stock": 7},
    }


def test_answers_a_repeat_with_the_same_hold(client_of, db):
    drop, user = DropFactory(), UserFactory()
    client = client_of(user)

    first, again = (client.post(f"/api/drops/{drop.pk}/reserve") for _ in "12")

    assert (first.status_code, again.status_code) == (201, 200)
    ticking = {"expires_in"}
    assert {k: v for k, v in again.json().items() if k not in ticking} == {
        k: v for k, v in first.json().items() if k not in ticking
    }
    assert 59 < again.json()["expires_in"] <= 60
    drop.refresh_from_db()
    assert drop.available_stock == 9


def test_a_reservation_costs_six_statements(client_of, db):
    drop, user = DropFactory(), UserFactory()
    client = client_of(user)

    with statements() as made:
        assert client.post(f"/api/drops/{drop.pk}/reserve").status_code == 201

    assert len(made) <= 6


def test_counts_the_seconds_down(client_of, db):
    user = UserFactory()
    now = timezone.now()
    running = ReservationFactory(user=user, expires_at=now + timedelta(seconds=30))
    overdue = ReservationFactory(user=user, overdue=True)
    released = ReservationFactory(user=user, released=True)
    client = client_of(user)

    def expires_in(reservation):
        return client.get(f"/api/reservations/{reservation.pk}").json()["expires_in"]

    assert 28 < expires_in(running) <= 30
    assert expires_in(overdue) == 0
    assert expires_in(released) == 0


def test_releases_a_hold_and_shows_the_stock_back(client_of, db):
    hold = ReservationFactory()
    client = client_of(hold.user)

    response = client.delete(f"/api/reservations/{hold.pk}")

    assert response.status_code == 200
    assert response.json()["id"] == str(hold.pk)
    assert (response.json()["status"], response.json()["expires_in"]) == ("RELEASED", 0)
    assert response.json()["drop"]["available_stock"] == 10
    assert client.get(f"/api/reservations/{hold.pk}").json() == response.json()


@pytest.mark.parametrize(
    ("trait", "code"),
    [
        ("overdue", "reservation_expired"),
        ("expired", "reservation_expired"),
        ("released", "reservation_not_active"),
        ("consumed", "reservation_not_active"),
    ],
)
def test_refuses_to_release_what_is_no_hold_any_more(client_of, db, trait, code):
    reservation = ReservationFactory(**{trait: True})

    response = client_of(reservation.user).delete(f"/api/reservations/{reservation.pk}")

    assert (response.status_code, response.json()["code"]) == (409, code)
    status = reservation.status
    reservation.refresh_from_db()
    assert reservation.status == status


def test_shows_nobody_what_another_holds(client_of, db):
    hold = ReservationFactory()
    path = f"/api/reservations/{hold.pk}"
    stranger = client_of(UserFactory())

    for response in (stranger.get(path), stranger.delete(path)):
        assert (response.status_code, response.json()["code"]) == (404, "not_found")
    assert client_of().get(path).status_code == 401
    assert stranger.get("/api/reservations").json()["count"] == 0
    hold.refresh_from_db()
    assert hold.status == "ACTIVE"


def test_lists_ones_own_reservations_newest_first(client_of, db):
    user = UserFactory()
    mine = [ReservationFactory(user=user, created_at=timezone.now()) for _ in range(3)]
    ReservationFactory()

    body = client_of(user).get("/api/reservations").json()

    assert body["count"] == 3
    assert [r["id"] for r in body["results"]] == [str(r.pk) for r in mine[::-1]]


def test_lists_by_status_and_by_drop(client_of, db):
    user = UserFactory()
    active = ReservationFactory(user=user)
    released = ReservationFactory(user=user, released=True)
    elsewhere = ReservationFactory(user=user, drop=active.drop, expired=True)
    client = client_of(user)

    def found(**query):
        return {r["id"] for r in client.get("/api/reservations", query).json()["results"]}

    assert found(status="ACTIVE") == {str(active.pk)}
    assert found(status="RELEASED") == {str(released.pk)}
    assert found(drop=active.drop.pk) == {str(active.pk), str(elsewhere.pk)}
    assert found(drop=active.drop.pk, status="EXPIRED") == {str(elsewhere.pk)}
    assert found(drop=uuid.uuid4()) == set()


def test_a_list_costs_the_same_whatever_its_length(client_of, db):
    user = UserFactory()
    client = client_of(user)

    def cost():
        with statements() as made:
            assert client.get("/api/reservations").status_code == 200
        return len(made)

    ReservationFactory(user=user)
    with_one = cost()
    for _ in range(14):
        ReservationFactory(user=user)

    assert with_one == cost() == 3  # the user, the count, the page with its drops


def test_expires_all_that_is_due_when_asked(client_of, db):
    drop, other = DropFactory(), DropFactory()
    overdue = ReservationFactory.create_batch(2, drop=drop, overdue=True)
    overdue += [ReservationFactory(drop=other, overdue=True)]
    ReservationFactory(drop=drop)

    response = client_of().post("/api/internal/expire-now")

    body = response.json()
    assert response.status_code == 200
    assert body["expired_count"] == 3
    assert sorted(body["drops"], key=str) == sorted(
        [
            {"drop_id": str(drop.pk), "available_stock": 9},
            {"drop_id": str(other.pk), "available_stock": 10},
        ],
        key=str,
    )
    assert sorted(body["reservations"], key=str) == sorted(
        [{"reservation_id": str(r.pk), "drop_id": str(r.drop.pk)} for r in overdue], key=str
    )
    types = list(drop.events.order_by("seq").values_list("type", flat=True))
    assert types == ["RESERVATION_EXPIRED", "RESERVATION_EXPIRED", "STOCK_UPDATED"]


def test_expires_nothing_where_nothing_is_due(client_of, db):
    response = client_of().post("/api/internal/expire-now")

    assert response.json() == {"expired_count": 0, "drops": [], "reservations": []}


def test_the_tests_run_as_development_does():
    """The route above exists in DEBUG only; ``reservations.urls`` leaves it out otherwise."""
    assert settings.DEBUG
