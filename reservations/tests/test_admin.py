import pytest
from django.urls import reverse

from reservations.models import Reservation, ReservationStatus
from reservations.tests.factories import ReservationFactory
from tests.admin import list_pages, read_page


def test_the_list_takes_the_same_statements_for_5_and_25(admin_client):
    pages = list_pages(admin_client, Reservation, ReservationFactory.create_batch)

    assert [status for status, _ in pages] == [200, 200]
    assert pages[0] == pages[1]


def test_a_page_opens_and_offers_nothing_to_change(admin_client):
    reservation = ReservationFactory()

    assert read_page(admin_client, Reservation, "change", reservation.pk)[0] == 200
    assert admin_client.get(reverse("admin:reservations_reservation_add")).status_code == 403
    for page in ("change", "delete"):
        url = reverse(f"admin:reservations_reservation_{page}", args=[reservation.pk])
        assert admin_client.post(url, {"status": "VOIDED", "post": "yes"}).status_code == 403
    assert Reservation.objects.get().status == ReservationStatus.ACTIVE


@pytest.mark.parametrize("path", ["pk", "drop_id", "user_id", "user.username", "drop.name"])
def test_finds_reservations_by_exact_ids_and_by_names(admin_client, path):
    wanted, other = ReservationFactory(drop__name="Tidewalker"), ReservationFactory()
    query = wanted
    for name in path.split("."):
        query = getattr(query, name)

    response = admin_client.get(
        reverse("admin:reservations_reservation_changelist"), {"q": str(query)}
    )

    assert str(wanted.pk) in response.content.decode()
    assert str(other.pk) not in response.content.decode()
