import pytest
from django.contrib.admin.models import LogEntry
from django.urls import reverse

from drops.models import Drop
from drops.tests.factories import DropFactory
from purchases.models import Purchase, PurchaseStatus
from purchases.tests.factories import PurchaseFactory
from tests.admin import act, list_pages, read_page


def test_the_list_takes_the_same_statements_for_5_and_25(admin_client):
    pages = list_pages(admin_client, Purchase, PurchaseFactory.create_batch)

    assert [status for status, _ in pages] == [200, 200]
    assert pages[0] == pages[1]


def test_a_page_opens_and_offers_nothing_to_change(admin_client):
    purchase = PurchaseFactory()

    assert read_page(admin_client, Purchase, "change", purchase.pk)[0] == 200
    assert admin_client.get(reverse("admin:purchases_purchase_add")).status_code == 403
    for page in ("change", "delete"):
        url = reverse(f"admin:purchases_purchase_{page}", args=[purchase.pk])
        assert admin_client.post(url, {"status": "refunded", "post": "yes"}).status_code == 403
    assert Purchase.objects.get().status == PurchaseStatus.PAID


@pytest.mark.parametrize("path", ["pk", "reservation_id", "drop_id", "user_id", "user.username"])
def test_finds_purchases_by_exact_ids_and_by_names(admin_client, path):
    wanted, other = PurchaseFactory(), PurchaseFactory()
    query = wanted
    for name in path.split("."):
        query = getattr(query, name)

    response = admin_client.get(reverse("admin:purchases_purchase_changelist"), {"q": str(query)})

    assert str(wanted.pk) in response.content.decode()
    assert str(other.pk) not in response.content.decode()


@pytest.mark.parametrize(("restock", "stock"), [("yes", (10, 10, 0)), ("no", (9, 9, 0))])
def test_a_refund_asks_for_the_units_and_then_whether_that_is_right(
    admin_client, admin_user, restock, stock
):
    bought = PurchaseFactory()

    asked = act(admin_client, bought, "refund", confirmed="", restock=restock)
    assert asked.context["is_preview"]
    assert Purchase.objects.get().status == PurchaseStatus.PAID
    assert act(admin_client, bought, "refund", restock=restock).status_code == 302

    assert Purchase.objects.get().status == PurchaseStatus.REFUNDED
    drop = Drop.objects.get()
    assert (drop.total_stock, drop.available_stock, drop.sold_stock) == stock
    entry = LogEntry.objects.get()
    assert (entry.user, entry.object_id) == (admin_user, str(bought.pk))
    how = "with" if restock == "yes" else "without"
    assert entry.change_message == f"Refunded 1, {how} restocking. Why: Asked for"


def test_a_refund_has_to_say_what_becomes_of_the_units(admin_client):
    bought = PurchaseFactory()

    response = act(admin_client, bought, "refund")

    assert list(response.context["form"].errors) == ["restock"]
    assert Purchase.objects.get().status == PurchaseStatus.PAID


def test_what_was_refunded_cannot_be_refunded(admin_client):
    bought = PurchaseFactory(refunded=True)

    assert act(admin_client, bought, "refund", restock="yes").status_code == 302
    assert not LogEntry.objects.exists()
    assert not bought.drop.events.exists()


def test_all_purchases_of_a_cancelled_drop_are_refunded_at_once(admin_client):
    drop = DropFactory(status="cancelled")
    PurchaseFactory.create_batch(3, reservation__drop=drop)
    other = PurchaseFactory()

    assert act(admin_client, drop, "refund-all", restock="yes").status_code == 302

    assert set(drop.purchases.values_list("status", flat=True)) == {PurchaseStatus.REFUNDED}
    other.refresh_from_db()
    assert other.status == PurchaseStatus.PAID
    assert LogEntry.objects.get().change_message.startswith("Refunded 3 purchases, with")
