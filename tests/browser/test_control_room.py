"""Staff run a drop in the admin, in a real browser."""

import re

import httpx
import pytest
from django.contrib.admin.models import LogEntry
from playwright.sync_api import expect

from drops.models import Drop, StockAdjustment
from drops.tests.factories import DropFactory
from purchases.audit import audit_stock
from purchases.models import Purchase
from purchases.services import purchase
from reservations.models import Reservation
from reservations.services import Claim, reserve
from users.tests.factories import UserFactory


@pytest.fixture
def clerk(site):
    return UserFactory(username="clerk", is_staff=True, is_superuser=True)


def do(page, title, reason, **fields):
    """Take an action on the row's page: say why, continue, confirm."""
    # The names of unfold's icons are text before the title.
    page.get_by_role("link", name=re.compile(f"{title}$")).click()
    for label, value in fields.items():
        if value is True:
            page.get_by_label(label).check()
        else:
            page.get_by_label(label).fill(value)
    page.get_by_label("Why").fill(reason)
    if fields:
        page.get_by_role("button", name="Continue").click()
        page.get_by_role("button", name=re.compile("^Yes, ")).click()
    else:
        page.get_by_role("button", name=title).click()


def test_staff_pause_a_drop_and_the_shop_knows(open_page, site, clerk):
    drop = DropFactory(name="Tidewalker")
    shopper = open_page(f"/drops/{drop.pk}")
    expect(shopper.locator("#badge")).to_have_text("Live")
    page = open_page(f"/admin/drops/drop/{drop.pk}/change/", clerk)

    do(page, "Pause", "A size is missing")

    expect(page.get_by_text("Paused.")).to_be_visible()
    expect(shopper.locator("#headline")).to_have_text("Paused for the moment")
    answer = httpx.get(f"{site.url}/api/drops/{drop.pk}").json()
    assert answer["status"] == "paused"
    assert drop.events.get().type == "DROP_UPDATED"
    do(page, "Resume", "Found it")
    expect(page.get_by_text("Resumed.")).to_be_visible()
    expect(shopper.get_by_role("button", name="Reserve")).to_be_enabled()
    assert drop.events.count() == 2
    assert Drop.objects.get().status == "live"


def test_staff_adjust_void_and_refund_and_the_books_balance(open_page, clerk):
    drop = DropFactory(sizes={"EU 42": 3, "EU 43": 4}, max_per_user=2)
    small = drop.variants.first()
    holder, buyer = UserFactory(username="holder"), UserFactory(username="buyer")
    hold = reserve(drop.pk, Claim(holder.pk, small.pk, 2))
    reserve(drop.pk, Claim(buyer.pk, small.pk))
    bought = purchase(drop.pk, buyer.pk)
    seen = drop.events.count()

    page = open_page(f"/admin/drops/drop/{drop.pk}/change/", clerk)
    do(page, "Adjust stock", "A box was found", **{"EU 42: 0 available": True, "Units": "5"})
    expect(page.get_by_text("Adjusted EU 42 by +5.")).to_be_visible()

    page.goto(f"/admin/reservations/reservation/{hold.pk}/change/")
    do(page, "Void hold", "A robot")
    expect(page.get_by_text("Voided a hold of 2.")).to_be_visible()

    page.goto(f"/admin/purchases/purchase/{bought.pk}/change/")
    do(page, "Refund", "Damaged", **{"are gone": True})
    expect(page.get_by_text("Refunded 1, without restocking.")).to_be_visible()

    drop.refresh_from_db()
    assert (drop.total_stock, drop.available_stock, drop.sold_stock) == (11, 11, 0)
    assert Reservation.objects.get(pk=hold.pk).status == "VOIDED"
    assert Purchase.objects.get().status == "refunded"
    assert list(StockAdjustment.objects.values_list("delta", "reason", "created_by")) == [
        (-1, "Damaged", clerk.pk),
        (5, "A box was found", clerk.pk),
    ]
    events = drop.events.filter(seq__gt=seen).order_by("seq").values_list("type", flat=True)
    assert list(events) == [
        *("STOCK_UPDATED", "DROP_UPDATED"),
        *("RESERVATION_EXPIRED", "STOCK_UPDATED"),
        *("ACTIVITY_UPDATED", "STOCK_UPDATED", "DROP_UPDATED"),
    ]
    assert list(LogEntry.objects.values_list("user", "change_message").order_by("pk")) == [
        (clerk.pk, "Adjusted EU 42 by +5. Why: A box was found"),
        (clerk.pk, "Voided a hold of 2. Why: A robot"),
        (clerk.pk, "Refunded 1, without restocking. Why: Damaged"),
    ]
    assert not audit_stock().differences
