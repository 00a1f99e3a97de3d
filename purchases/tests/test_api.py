import uuid

import pytest
from django.utils import timezone

from drops.tests.factories import DropFactory
from purchases.models import Purchase
from purchases.tests.factories import PurchaseFactory
from reservations.tests.factories import ReservationFactory
from tests.queries import statements
from users.tests.factories import UserFactory


def test_buys_what_one_holds_and_shows_it(client_of, db):
    hold = ReservationFactory(quantity=2)
    client = client_of(hold.user)

    response = client.post(f"/api/drops/{hold.drop.pk}/purchase")

    bought = Purchase.objects.get()
    assert response.status_code == 201
    assert response.json() == {
        "id": str(bought.pk),
        "drop_id": str(hold.drop.pk),
        "variant_id": str(hold.variant.pk),
        "reservation_id": str(hold.pk),
        "user_id": str(hold.user.pk),
        "quantity": 2,
        "amount": "398.00",
        "currency": "USD",
        "status": "paid",
        "created_at": bought.created_at.isoformat().replace("+00:00", "Z"),
    }
    assert client.get(f"/api/purchases/{bought.pk}").json() == response.json()


def test_shows_an_amount_with_the_decimals_of_its_currency(client_of, db):
    hold = ReservationFactory(drop=DropFactory(currency="JPY", price="25000"))

    response = client_of(hold.user).post(f"/api/drops/{hold.drop.pk}/purchase")

    assert (response.json()["amount"], response.json()["currency"]) == ("25000", "JPY")


def test_answers_a_repeat_with_the_same_purchase(client_of, db):
    hold = ReservationFactory()
    client = client_of(hold.user)

    first, again = (client.post(f"/api/drops/{hold.drop.pk}/purchase") for _ in "12")

    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json() == again.json()
    hold.drop.refresh_from_db()
    assert hold.drop.sold_stock == 1


@pytest.mark.parametrize("body", [{}, None])
def test_needs_no_body(client_of, db, body):
    hold = ReservationFactory()
    arguments = [] if body is None else [body]

    response = client_of(hold.user).post(f"/api/drops/{hold.drop.pk}/purchase", *arguments)

    assert response.status_code == 201


def test_lists_ones_own_purchases_newest_first(client_of, db):
    user = UserFactory()
    mine = [PurchaseFactory(reservation__user=user, created_at=timezone.now()) for _ in range(2)]
    PurchaseFactory()

    response = client_of(user).get("/api/purchases")

    assert response.json()["count"] == 2
    assert [p["id"] for p in response.json()["results"]] == [str(p.pk) for p in mine[::-1]]


def test_shows_nobody_what_another_bought(client_of, db):
    bought = PurchaseFactory()
    path = f"/api/purchases/{bought.pk}"

    stranger, nobody = client_of(UserFactory()).get(path), client_of().get(path)
    unknown = client_of(bought.user).get(f"/api/purchases/{uuid.uuid4()}")

    assert (stranger.status_code, stranger.json()["code"]) == (404, "not_found")
    assert (nobody.status_code, nobody.json()["code"]) == (401, "identity_required")
    assert (unknown.status_code, unknown.json()["code"]) == (404, "not_found")


def test_a_list_costs_the_same_whatever_its_length(client_of, db):
    user = UserFactory()
    client = client_of(user)

    def cost():
        with statements() as made:
            assert client.get("/api/purchases").status_code == 200
        return len(made)

    PurchaseFactory(reservation__user=user)
    with_one = cost()
    for _ in range(14):
        PurchaseFactory(reservation__user=user)

    assert with_one == cost() == 3  # the user, the count, the page


def test_a_purchase_costs_eight_statements(client_of, db):
    hold = ReservationFactory()
    client = client_of(hold.user)

    with statements() as made:
        assert client.post(f"/api/drops/{hold.drop.pk}/purchase").status_code == 201

    assert len(made) <= 8


@pytest.mark.parametrize("method", ["put", "patch", "delete"])
def test_a_purchase_can_not_be_changed(client_of, db, method):
    bought = PurchaseFactory()

    response = getattr(client_of(bought.user), method)(f"/api/purchases/{bought.pk}", {})

    assert (response.status_code, response.json()["code"]) == (405, "method_not_allowed")
    assert Purchase.objects.get() == bought
