import pytest
from django.contrib.admin.models import LogEntry
from django.urls import reverse

from reservations.models import Reservation, ReservationStatus
from reservations.tests.factories import ReservationFactory
from tests.admin import act, list_pages, read_page


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


def test_a_hold_is_voided_and_logged(admin_client, admin_user):
    hold = ReservationFactory()
    url = reverse("admin:reservations_reservation_act", args=[hold.pk, "void"])

    asked = admin_client.get(url)
    assert f"{hold.user.username} loses 1 ×" in asked.content.decode()
    assert not LogEntry.objects.exists()
    assert act(admin_client, hold, "void", reason="A robot").status_code == 302

    hold.refresh_from_db()
    assert hold.status == ReservationStatus.VOIDED
    assert hold.drop.events.get().type == "STOCK_UPDATED"
    entry = LogEntry.objects.get()
    assert (entry.user, entry.object_id) == (admin_user, str(hold.pk))
    assert entry.change_message == "Voided a hold of 1. Why: A robot"


@pytest.mark.parametrize("trait", ["overdue", "expired", "released", "voided", "consumed"])
def test_what_is_no_hold_cannot_be_voided(admin_client, trait):
    reservation = ReservationFactory(**{trait: True})
    before = reservation.status

    page = reverse("admin:reservations_reservation_change", args=[reservation.pk])
    assert "/do/void/" not in admin_client.get(page).content.decode()
    assert act(admin_client, reservation, "void").status_code == 302
    reservation.refresh_from_db()
    assert reservation.status == before
    assert not LogEntry.objects.exists()


def test_cancelling_says_before_what_becomes_of_holds_and_purchases(admin_client):
    drop = ReservationFactory().drop
    ReservationFactory(drop=drop, consumed=True)
    url = reverse("admin:drops_drop_act", args=[drop.pk, "cancel"])

    said = admin_client.get(url).content.decode()
    assert "Held units, 1 now, go back to stock" in said
    assert "Purchased units, 1 now, stay purchased until they are refunded" in said
    assert act(admin_client, drop, "cancel", reason="Rust").status_code == 302

    drop.refresh_from_db()
    assert (drop.status, drop.available_stock, drop.sold_stock) == ("cancelled", 9, 1)
    assert LogEntry.objects.get().change_message == "Cancelled; 1 holds voided. Why: Rust"
