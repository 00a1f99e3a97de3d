"""Staff run a drop in the admin, in a real browser."""

import json
import re
from datetime import timedelta

import httpx
import pytest
from django.contrib.admin.models import LogEntry
from django.utils import timezone
from playwright.sync_api import expect

from drops.models import Drop, StockAdjustment
from drops.services import update_drop
from drops.tests.factories import DropFactory
from purchases.audit import audit_stock
from purchases.models import Purchase
from purchases.services import purchase, refund_purchase
from reservations.models import Reservation
from reservations.services import Claim, reserve
from tests.browser.conftest import PATIENCE_MS
from users.tests.factories import UserFactory

pytestmark = pytest.mark.browser


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
        "STOCK_UPDATED",
        *("ACTIVITY_UPDATED", "STOCK_UPDATED", "DROP_UPDATED"),
    ]
    assert list(LogEntry.objects.values_list("user", "change_message").order_by("pk")) == [
        (clerk.pk, "Adjusted EU 42 by +5. Why: A box was found"),
        (clerk.pk, "Voided a hold of 2. Why: A robot"),
        (clerk.pk, "Refunded 1, without restocking. Why: Damaged"),
    ]
    assert not audit_stock().differences


def test_the_dashboard_moves_with_the_stream(open_page, clerk):
    drop = DropFactory(name="Tidewalker", total_stock=10, max_per_user=None)
    buyer = UserFactory(username="grace")
    page = open_page("/admin/", clerk)
    row = page.locator(f"[data-id='{drop.pk}']")
    expect(page.locator("#connection")).to_have_text("Live")
    expect(row.locator("[data-available-text]")).to_have_text("10")

    reserve(drop.pk, Claim(buyer.pk, quantity=3))
    expect(row.locator("[data-held-text]")).to_have_text("3")
    expect(page.locator("#tile-held")).to_have_text("3")

    purchase(drop.pk, buyer.pk)
    expect(row.locator("[data-sold-text]")).to_have_text("3")
    expect(row.locator("[data-held-text]")).to_have_text("0")
    assert row.locator("[data-sold]").evaluate("part => part.style.width") == "30%"
    expect(page.locator("#purchases li").first).to_contain_text("grace")
    expect(page.locator("#tile-rate")).to_have_text("0.3")
    expect(page.locator("#tile-lag")).to_have_text(re.compile(r"\d"))
    expect(page.locator("#tile-sockets")).to_have_text("1")

    refund_purchase(drop.purchases.get().pk, restock=False, reason="Lost", user=clerk)
    expect(row.locator("[data-sold-text]")).to_have_text("0")
    expect(page.locator("#note-sold")).to_contain_text("of 7 units")

    update_drop(drop.pk, status="paused")
    expect(row.locator("[data-status]")).to_have_text("Paused")
    expect(row.locator("[data-action]")).to_have_text("Resume")


def test_the_dashboard_counts_more_drops_than_it_lists(open_page, clerk):
    drops = DropFactory.create_batch(42, total_stock=10)
    page = open_page("/admin/", clerk)
    expect(page.locator("#connection")).to_have_text("Live")

    for drop in drops:
        reserve(drop.pk, Claim(UserFactory().pk))

    expect(page.locator("#tile-held")).to_have_text("42")
    expect(page.locator("#tile-live")).to_have_text("42")
    expect(page.locator("#drops > li")).to_have_count(40)
    expect(page.locator("#more-drops")).to_contain_text("And 2 more.")


def test_the_dashboard_takes_up_a_drop_that_was_over(open_page, clerk):
    drop = DropFactory(name="Comet", total_stock=4)
    buyer = UserFactory()
    reserve(drop.pk, Claim(buyer.pk))
    purchase(drop.pk, buyer.pk)
    update_drop(drop.pk, ends_at=timezone.now() - timedelta(minutes=1))
    page = open_page("/admin/", clerk)
    expect(page.locator("#connection")).to_have_text("Live")
    expect(page.locator("#tile-sockets")).to_have_text("1")
    expect(page.locator("#no-drops")).to_be_visible()

    update_drop(drop.pk, ends_at=None)

    row = page.locator(f"[data-id='{drop.pk}']")
    expect(row.locator("[data-sold-text]")).to_have_text("1")
    expect(row.locator("[data-available-text]")).to_have_text("3")


def test_the_dashboard_says_that_it_hears_no_pulse(open_page, clerk):
    page = open_page("/", clerk)
    pulses = [{"type": "PULSE", "data": {"oldestOverdueSeconds": 0, "sockets": 7}}]
    # Only the first socket says something, and none ends.
    page.route_web_socket(
        "**/ws/control", lambda socket: pulses and socket.send(json.dumps(pulses.pop()))
    )
    page.goto("/admin/")
    expect(page.locator("#tile-sockets")).to_have_text("7")
    expect(page.locator("#note-overdue")).to_have_text("holds end on time")

    expect(page.locator("#tile-sockets")).to_have_text("–", timeout=PATIENCE_MS)
    expect(page.locator("#tile-overdue")).to_have_text("–")
    expect(page.locator("#note-overdue")).to_have_text("not known right now")


def test_no_page_has_a_serious_accessibility_fault(open_page, clerk, serious_faults):
    drop = DropFactory(sizes={"EU 42": 3, "EU 43": 4})
    user = UserFactory()
    reserve(drop.pk, Claim(user.pk, drop.variants.first().pk))
    purchase(drop.pk, user.pk)
    of_drop = f"/admin/drops/drop/{drop.pk}"

    light = open_page("/admin/drops/drop/", clerk)
    faults = serious_faults(light)
    for path in (f"{of_drop}/change/", f"{of_drop}/do/adjust/", "/admin/purchases/purchase/"):
        light.goto(path)
        faults += serious_faults(light)
    dark = open_page("/admin/", clerk, color_scheme="dark")
    expect(dark.locator("#connection")).to_have_text("Live")
    faults += serious_faults(dark)
    dark.goto(f"{of_drop}/timeline/")
    faults += serious_faults(dark)

    assert faults == []
