import pytest
from django.urls import reverse

from purchases.models import Purchase, PurchaseStatus
from purchases.tests.factories import PurchaseFactory
from tests.admin import list_pages, read_page


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
