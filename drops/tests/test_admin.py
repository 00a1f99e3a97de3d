import re
from datetime import timedelta
from decimal import Decimal

import pytest
from django.contrib.admin.models import LogEntry
from django.db import connection
from django.urls import reverse
from django.utils import timezone

from config.problems import Busy
from drops.models import Drop, DropStatus, StockAdjustment, Variant
from drops.services import update_drop
from drops.tests.factories import DropFactory
from purchases.services import purchase, refund_purchase
from purchases.tests.factories import PurchaseFactory
from realtime.models import EventType
from reservations.services import Claim, reserve, void_reservation
from tests.admin import act, list_pages, read_page
from users.tests.factories import UserFactory

SIZES = {"EU 42": 3, "EU 43": 4}


def drop_form(drop, **changes):
    """Return what a browser sends when the change form of ``drop`` is saved."""
    fields = {
        "name": drop.name,
        "description": drop.description,
        "image_url": drop.image_url,
        "price": drop.price,
        "status": drop.status,
        "max_per_user": drop.max_per_user or "",
        "variants-TOTAL_FORMS": 0,
        "variants-INITIAL_FORMS": 0,
    }
    for name in ("name", "description", "image_url", "price", "max_per_user"):
        fields[f"initial-{name}"] = fields[name]
    for name in ("starts_at", "ends_at"):
        value = getattr(drop, name)
        fields[f"{name}_0"] = f"{value:%Y-%m-%d}" if value else ""
        fields[f"{name}_1"] = f"{value:%H:%M:%S}" if value else ""
    return fields | changes


def save_drop(client, drop, **changes):
    return client.post(
        reverse("admin:drops_drop_change", args=[drop.pk]), drop_form(drop, **changes)
    )


def add_drop(client, **fields):
    blank = dict.fromkeys(
        ("description", "image_url", "starts_at_0", "starts_at_1", "ends_at_0", "ends_at_1"), ""
    )
    return client.post(
        reverse("admin:drops_drop_add"),
        blank | {"name": "New", "price": "99.00", "currency": "USD", "max_per_user": 1} | fields,
    )


def form_errors(response):
    assert response.status_code == 200
    return response.context["adminform"].errors


def make_drops(count):
    DropFactory.create_batch(count, sizes=SIZES)


def make_adjustments(count):
    for drop in DropFactory.create_batch(count):
        StockAdjustment.objects.create(
            variant=drop.variants.get(), delta=1, reason="Recount", created_by=drop.created_by
        )


def test_the_list_of_drops_takes_the_same_statements_for_5_and_25(admin_client):
    (few_status, few), (many_status, many) = list_pages(admin_client, Drop, make_drops)

    assert (few_status, many_status) == (200, 200)
    assert few == many


def test_the_list_of_adjustments_takes_the_same_statements_for_5_and_25(admin_client):
    pages = list_pages(admin_client, StockAdjustment, make_adjustments)

    assert [status for status, _ in pages] == [200, 200]
    assert pages[0] == pages[1]


def test_the_page_of_a_drop_takes_the_same_statements_for_1_size_and_20(admin_client):
    one, twenty = DropFactory(), DropFactory(sizes={f"EU {size}": 1 for size in range(30, 50)})

    read_page(admin_client, Drop, "change", one.pk)  # fills the cache of content types
    assert read_page(admin_client, Drop, "change", one.pk) == read_page(
        admin_client, Drop, "change", twenty.pk
    )


def test_finds_drops_by_exact_id_and_by_part_of_the_name(admin_client):
    wanted, other = DropFactory(name="Tidewalker"), DropFactory(name="Courier")
    url = reverse("admin:drops_drop_changelist")

    for query in (str(wanted.pk), "tidew"):
        content = admin_client.get(url, {"q": query}).content.decode()
        assert str(wanted.pk) in content
        assert str(other.pk) not in content


@pytest.mark.parametrize("query", ["x" * 300, "'; --", "00000000"])
def test_a_search_for_nonsense_is_no_error(admin_client, query):
    make_adjustments(1)

    for model in (Drop, StockAdjustment):
        assert read_page(admin_client, model, "changelist", q=query)[0] == 200


@pytest.mark.parametrize("status", DropStatus)
def test_finds_drops_by_the_status_that_the_list_shows(admin_client, status):
    for stored in (DropStatus.SCHEDULED, DropStatus.LIVE, DropStatus.PAUSED):
        DropFactory(status=stored, starts_at=hours(-2), ends_at=hours(-1))
        DropFactory(status=stored, starts_at=hours(-1))
        DropFactory(status=stored, starts_at=hours(1))
    for stored in (DropStatus.DRAFT, DropStatus.ENDED, DropStatus.CANCELLED):
        DropFactory(status=stored)

    found = admin_client.get(reverse("admin:drops_drop_changelist"), {"status": status})

    shown = {drop.pk for drop in found.context["cl"].result_list}
    drops = Drop.objects.read_now()
    assert shown == {drop.pk for drop in drops if drop.status_at(drop.read_at) == status}
    assert shown


def test_a_status_that_is_none_is_no_error(admin_client):
    found = admin_client.get(reverse("admin:drops_drop_changelist"), {"status": "sleepy"})

    assert (found.status_code, found.headers["Location"][-4:]) == (302, "?e=1")


def test_an_edit_is_announced(admin_client):
    drop = DropFactory(name="Old")

    response = save_drop(admin_client, drop, name="New", max_per_user="")

    assert response.status_code == 302
    event = drop.events.get()
    assert (event.seq, event.type) == (1, EventType.DROP_UPDATED)
    assert (event.data["drop"]["name"], event.data["drop"]["max_per_user"]) == ("New", None)
    drop.refresh_from_db()
    assert (drop.name, drop.max_per_user, drop.seq) == ("New", None, 1)


def test_saving_an_unchanged_form_announces_nothing(admin_client):
    drop = DropFactory(
        description="Two\nlines",
        starts_at=timezone.now().replace(microsecond=123456),
        price="199.500",
    )

    response = save_drop(admin_client, drop, description="Two\r\nlines")

    assert response.status_code == 302
    assert not drop.events.exists()
    before, after = drop, Drop.objects.get(pk=drop.pk)
    assert (after.description, after.starts_at) == (before.description, before.starts_at)


def test_an_edit_leaves_alone_what_others_changed_since_the_page_was_opened(admin_client):
    drop = DropFactory(price="199.00", max_per_user=1, description="Two\nlines")
    url = reverse("admin:drops_drop_change", args=[drop.pk])
    opened = admin_client.get(url).content.decode()
    initial = dict(re.findall(r'name="(initial-[^"]+)" value="([^"]*)"', opened))
    assert initial["initial-price"] == "199.000"
    sent = drop_form(drop, name="Tidewalker II", description="Two\r\nlines") | initial
    update_drop(drop.pk, price=Decimal("249.00"), max_per_user=2, description="One line")

    assert admin_client.post(url, sent | {"initial-description": "Two\r\nlines"}).status_code == 302

    drop.refresh_from_db()
    assert (drop.name, drop.description) == ("Tidewalker II", "One line")
    assert (drop.price, drop.max_per_user) == (Decimal(249), 2)


def test_an_edit_is_kept_over_a_mistake_in_another_field(admin_client):
    drop = DropFactory(price="199.00")
    url = reverse("admin:drops_drop_change", args=[drop.pk])
    starts_at = {"starts_at_0": "2050-01-01", "starts_at_1": "12:00:00"}

    refused = save_drop(admin_client, drop, price=-1, max_per_user=3, **starts_at)
    again = re.findall(r'name="(initial-[^"]+)" value="([^"]*)"', refused.content.decode())
    sent = drop_form(drop, price="99.00", max_per_user=3, **starts_at) | dict(again)
    assert admin_client.post(url, sent).status_code == 302

    drop.refresh_from_db()
    assert (drop.price, drop.max_per_user) == (Decimal(99), 3)
    assert f"{drop.starts_at:%Y-%m-%d %H}" == "2050-01-01 12"


def test_stock_and_what_services_keep_cannot_be_written_through_the_form(admin_client):
    drop = DropFactory(sizes=SIZES)
    variant = drop.variants.first()

    response = save_drop(
        admin_client,
        drop,
        **{
            "total_stock": 999,
            "available_stock": 999,
            "sold_stock": 5,
            "seq": 77,
            "currency": "EUR",
            "latest_purchasers": "[1]",
            "status": "cancelled",
            "created_by": "",
            "variants-TOTAL_FORMS": 1,
            "variants-INITIAL_FORMS": 1,
            "variants-0-id": variant.pk,
            "variants-0-drop": drop.pk,
            "variants-0-label": "EU 50",
            "variants-0-total_stock": 999,
            "variants-0-available_stock": 999,
        },
    )

    assert response.status_code == 302
    fields = ("total_stock", "available_stock", "sold_stock")
    kept = ("seq", "status", "currency", "latest_purchasers")
    assert Drop.objects.values_list(*fields, *kept).get() == (7, 7, 0, 0, "live", "USD", [])
    assert list(drop.variants.values_list("label", *fields)) == [
        ("EU 42", 3, 3, 0),
        ("EU 43", 4, 4, 0),
    ]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"price": "1.999"}, "price"),
        ({"price": "-1"}, "price"),
        ({"name": "<b>bold</b>"}, "name"),
        ({"image_url": "javascript:alert(1)"}, "image_url"),
        ({"max_per_user": 0}, "max_per_user"),
        ({"ends_at_0": "1900-01-01", "ends_at_1": "00:00:00"}, "ends_at"),
        (
            {
                "starts_at_0": "2030-01-02",
                "starts_at_1": "00:00:00",
                "ends_at_0": "2030-01-01",
                "ends_at_1": "00:00:00",
            },
            "ends_at",
        ),
    ],
)
def test_a_refused_edit_is_an_error_at_its_field_and_changes_nothing(admin_client, changes, field):
    drop = DropFactory()
    before = Drop.objects.values().get()

    response = save_drop(admin_client, drop, **changes)

    assert list(form_errors(response)) == [field]
    assert Drop.objects.values().get() == before
    assert not drop.events.exists()
    assert not LogEntry.objects.exists()


def test_a_drop_is_added_by_the_service(admin_client, admin_user):
    response = add_drop(admin_client, sizes="EU 42: 3\r\n\r\nEU 43 : 4", currency="EUR")

    assert response.status_code == 302
    drop = Drop.objects.get()
    assert (drop.status, drop.total_stock, drop.available_stock) == (DropStatus.DRAFT, 7, 7)
    assert (drop.currency, drop.created_by, drop.max_per_user) == ("EUR", admin_user, 1)
    assert list(drop.variants.values_list("label", "total_stock", "available_stock")) == [
        ("EU 42", 3, 3),
        ("EU 43", 4, 4),
    ]
    assert LogEntry.objects.get().object_id == str(drop.pk)


def test_a_drop_added_with_a_start_is_announced(admin_client):
    add_drop(
        admin_client,
        total_stock=5,
        max_per_user="",
        starts_at_0="2040-01-01",
        starts_at_1="10:00:00",
    )

    drop = Drop.objects.get()
    assert (drop.status, drop.max_per_user, drop.seq) == (DropStatus.SCHEDULED, None, 1)
    assert drop.variants.get().label == Variant.ONE_SIZE
    assert drop.events.get().type == EventType.DROP_CREATED


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "total_stock"),
        ({"total_stock": -1}, "total_stock"),
        ({"total_stock": 2**31}, "total_stock"),
        ({"total_stock": 4, "sizes": "EU 42: 3"}, "total_stock"),
        ({"sizes": "EU 42"}, "sizes"),
        ({"sizes": "EU 42: many"}, "sizes"),
        ({"sizes": f"EU 42: {'9' * 5000}"}, "sizes"),
        ({"sizes": "EU 42: 3\nEU 42: 3"}, "__all__"),
        ({"sizes": f"{'x' * 51}: 3"}, "__all__"),
        ({"total_stock": 4, "currency": "XXX"}, "currency"),
        ({"total_stock": 4, "currency": "JPY", "price": "1.50"}, "price"),
    ],
)
def test_a_refused_new_drop_is_a_form_error_and_stores_nothing(admin_client, fields, field):
    response = add_drop(admin_client, **fields)

    assert list(form_errors(response)) == [field]
    assert not Drop.objects.exists()
    assert not Variant.objects.exists()


def test_a_drop_cannot_be_deleted(admin_client):
    drop = DropFactory()

    assert admin_client.post(reverse("admin:drops_drop_delete", args=[drop.pk])).status_code == 403
    admin_client.post(
        reverse("admin:drops_drop_changelist"),
        {"action": "delete_selected", "_selected_action": drop.pk, "post": "yes"},
    )
    assert Drop.objects.get() == drop


def test_shows_the_latest_purchasers_as_text(admin_client):
    entry = {"user_id": "1", "username": "<ada>", "qty": 2, "created_at": "2026-11-22T18:00:00Z"}
    drop = DropFactory(latest_purchasers=[entry])

    page = admin_client.get(reverse("admin:drops_drop_change", args=[drop.pk])).content.decode()

    assert "2 × &lt;ada&gt;, 2026-11-22T18:00:00Z" in page


@pytest.mark.django_db(transaction=True)
def test_a_drop_that_stays_locked_is_a_form_error_and_changes_nothing(admin_client):
    drop = DropFactory(name="Old")
    other = connection.copy()
    with connection.cursor() as cursor:
        cursor.execute("SET lock_timeout = '50ms'")
    try:
        with other.cursor() as cursor:
            cursor.execute("BEGIN")
            cursor.execute("SELECT FROM drops_drop FOR UPDATE")
            response = save_drop(admin_client, drop, name="New")
            cursor.execute("ROLLBACK")
    finally:
        other.close()
        with connection.cursor() as cursor:
            cursor.execute("RESET lock_timeout")

    assert form_errors(response) == {"__all__": [Busy.default_detail]}
    assert Drop.objects.values_list("name", "seq").get() == ("Old", 0)


def test_lists_and_pages_open(admin_client):
    make_adjustments(1)
    adjustment = StockAdjustment.objects.get()

    for model in (Drop, StockAdjustment):
        assert read_page(admin_client, model, "changelist")[0] == 200
    assert read_page(admin_client, Drop, "add")[0] == 200
    assert read_page(admin_client, StockAdjustment, "change", adjustment.pk)[0] == 200


def test_adjustments_can_be_neither_added_changed_nor_deleted_on_their_pages(admin_client):
    make_adjustments(1)
    adjustment = StockAdjustment.objects.get()

    assert admin_client.post(reverse("admin:drops_stockadjustment_add")).status_code == 403
    for page in ("change", "delete"):
        url = reverse(f"admin:drops_stockadjustment_{page}", args=[adjustment.pk])
        assert admin_client.post(url, {"delta": 5}).status_code == 403
    assert StockAdjustment.objects.values_list("delta").get() == (1,)


# --- Running a drop ---------------------------------------------------------------------


def hours(number):
    return timezone.now() + timedelta(hours=number)


@pytest.mark.parametrize(
    ("action", "before", "after", "event"),
    [
        ("publish", {"draft": True}, "live", "DROP_CREATED"),
        ("publish", {"draft": True, "starts_at": hours(2)}, "scheduled", "DROP_CREATED"),
        ("pause", {}, "paused", "DROP_UPDATED"),
        ("pause", {"upcoming": True}, "paused", "DROP_UPDATED"),
        ("resume", {"status": "paused"}, "live", "DROP_UPDATED"),
        ("resume", {"status": "paused", "starts_at": hours(2)}, "scheduled", "DROP_UPDATED"),
        ("end", {}, "ended", "DROP_UPDATED"),
        ("end", {"status": "paused"}, "ended", "DROP_UPDATED"),
    ],
)
def test_an_action_is_announced_and_logged(admin_client, admin_user, action, before, after, event):
    drop = DropFactory(**before)

    response = act(admin_client, drop, action, reason="Because")

    assert response.status_code == 302
    drop.refresh_from_db()
    assert drop.status == after
    told = drop.events.get()
    assert (told.type, told.data["drop"]["status"]) == (event, after)
    entry = LogEntry.objects.get()
    assert (entry.user, entry.object_id) == (admin_user, str(drop.pk))
    assert entry.change_message.endswith("Why: Because")


@pytest.mark.parametrize(
    ("action", "state", "said"),
    [
        ("publish", {"draft": True}, "and 10 units are on sale now."),
        ("publish", {"draft": True, "starts_at": hours(2)}, "and 10 units are on sale from "),
        ("publish", {"draft": True, "over": True}, "nothing of it is on sale, because its end"),
        ("resume", {"status": "paused"}, "goes on: 10 units are on sale now."),
        ("resume", {"status": "paused", "starts_at": hours(2)}, ": 10 units are on sale from "),
    ],
)
def test_who_opens_a_drop_is_told_when_it_is_on_sale(admin_client, action, state, said):
    page = act(admin_client, DropFactory(**state), action, reason="").content.decode()

    assert said in page


def test_an_action_needs_a_reason(admin_client):
    drop = DropFactory()

    response = act(admin_client, drop, "pause", reason=" ")

    assert response.context["form"].errors == {"reason": ["This field is required."]}
    assert nothing_was_done(drop, status="live")


def nothing_was_done(drop, *, status):
    drop.refresh_from_db()
    return (
        (drop.status, drop.seq) == (status, 0)
        and not drop.events.exists()
        and not LogEntry.objects.exists()
        and not StockAdjustment.objects.exists()
    )


NONSENSE = {
    "publish": ({}, {"upcoming": True}, {"status": "paused"}),
    "schedule": ({}, {"status": "paused"}, {"over": True}),
    "pause": ({"draft": True}, {"status": "paused"}, {"over": True}),
    "resume": ({}, {"draft": True}, {"status": "ended"}),
    "end": ({"draft": True}, {"status": "ended"}, {"over": True}),
    "adjust": ({"status": "cancelled"}, {"over": True}),
    "cancel": ({"status": "cancelled"},),
    "refund-all": ({"status": "cancelled"},),
}


@pytest.mark.parametrize("action", NONSENSE)
def test_what_makes_no_sense_is_not_done(admin_client, action):
    for state in NONSENSE[action]:
        drop = DropFactory(**state)
        assert act(admin_client, drop, action).status_code == 302
        assert nothing_was_done(drop, status=drop.status)


def test_a_page_offers_what_the_state_of_the_drop_allows(admin_client):
    offers = {
        "draft": "publish schedule adjust cancel",
        "scheduled": "schedule pause end adjust cancel",
        "live": "pause end adjust cancel",
        "paused": "resume end adjust cancel",
        "ended": "cancel",
        "cancelled": "",
    }
    for status, expected in offers.items():
        drop = DropFactory(status=status, starts_at=hours(2) if status == "scheduled" else None)
        offered = re.findall(r"/do/([a-z-]+)/", page_of(admin_client, drop))
        assert offered == expected.split()


def page_of(client, drop):
    url = reverse("admin:drops_drop_change", args=[drop.pk])
    return client.get(url).content.decode()


def test_an_unknown_action_or_row_is_not_found(admin_client):
    assert act(admin_client, DropFactory(), "destroy").status_code == 404
    assert act(admin_client, DropFactory.build(), "pause").status_code == 404


def test_scheduling_asks_when_and_then_whether_that_is_right(admin_client):
    drop = DropFactory(draft=True)
    starts_at = {"starts_at": "2040-01-02T18:00"}

    asked = act(admin_client, drop, "schedule", confirmed="", **starts_at)

    assert asked.context["is_preview"]
    assert "2 January 2040, 18:00 UTC" in asked.content.decode()
    assert nothing_was_done(drop, status="draft")

    assert act(admin_client, drop, "schedule", **starts_at).status_code == 302
    drop.refresh_from_db()
    assert (drop.status, f"{drop.starts_at:%F %R}") == ("scheduled", "2040-01-02 18:00")
    assert drop.events.get().type == EventType.DROP_CREATED


@pytest.mark.parametrize("when", ["2020-01-01T00:00", "soon", ""])
def test_a_start_that_is_none_is_an_error(admin_client, when):
    drop = DropFactory(draft=True)

    response = act(admin_client, drop, "schedule", starts_at=when)

    assert list(response.context["form"].errors) == ["starts_at"]
    assert nothing_was_done(drop, status="draft")


def test_an_adjustment_is_previewed_then_moves_the_stock_and_tells(admin_client, admin_user):
    drop = DropFactory(sizes={"EU 42": 10, "EU 43": 1})
    variant = drop.variants.first()
    given = {"variant": variant.pk, "delta": -4, "reason": "Damaged"}

    asked = act(admin_client, drop, "adjust", confirmed="", **given)

    assert "EU 42: 10 units in all become 6." in asked.content.decode()
    assert nothing_was_done(drop, status="live")

    assert act(admin_client, drop, "adjust", **given).status_code == 302
    drop.refresh_from_db()
    variant.refresh_from_db()
    assert (drop.total_stock, drop.available_stock) == (7, 7)
    assert (variant.total_stock, variant.available_stock) == (6, 6)
    stock, update = drop.events.order_by("seq")
    assert (stock.type, stock.data["availableStock"]) == (EventType.STOCK_UPDATED, 7)
    assert (update.type, update.data["drop"]["total_stock"]) == (EventType.DROP_UPDATED, 7)
    adjustment = StockAdjustment.objects.get()
    assert (adjustment.delta, adjustment.reason) == (-4, "Damaged")
    assert adjustment.created_by == admin_user
    assert LogEntry.objects.get().change_message == "Adjusted EU 42 by -4. Why: Damaged"


def test_who_confirms_an_adjustment_twice_adjusts_once(admin_client):
    drop = DropFactory(sizes={"EU 42": 10})
    given = {"variant": drop.variants.get().pk, "delta": 5, "reason": "Delivery"}
    asked = act(admin_client, drop, "adjust", confirmed="", **given).content.decode()
    given |= dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]+)"', asked))

    first = act(admin_client, drop, "adjust", **given)
    second = act(admin_client, drop, "adjust", **given)

    assert first.status_code == 302
    assert second.context["form"].errors == {
        "__all__": ["This size has been adjusted since you looked. Look at its stock again."]
    }
    assert Variant.objects.get().total_stock == 15
    # Who does it again means it.
    del given["confirmed"]
    asked = act(admin_client, drop, "adjust", confirmed="", **given).content.decode()
    assert "EU 42: 15 units in all become 20." in asked
    assert 'name="seen_total" value="15"' in asked


@pytest.mark.parametrize(
    ("delta", "field", "message"),
    [
        (-11, "delta", "Only 10 are available to be withdrawn."),
        (0, "delta", "Must not be 0 or exceed 2147483647 in all."),
        (2**31 - 1, "delta", "Must not be 0 or exceed 2147483647 in all."),
        (10**30, "delta", "Must not be 0 or exceed 2147483647 in all."),
        ("many", "delta", "Enter a whole number."),
    ],
)
def test_a_refused_adjustment_is_an_error_and_changes_nothing(admin_client, delta, field, message):
    drop = DropFactory(total_stock=10)

    response = act(admin_client, drop, "adjust", variant=drop.variants.get().pk, delta=delta)

    assert response.context["form"].errors == {field: [message]}
    for stock in (Drop.objects.get(), Variant.objects.get()):
        assert (stock.total_stock, stock.available_stock) == (10, 10)
    assert nothing_was_done(drop, status="live")


def test_a_size_of_another_drop_cannot_be_adjusted(admin_client):
    drop, other = DropFactory(), DropFactory()

    response = act(admin_client, drop, "adjust", variant=other.variants.get().pk, delta=1)

    assert list(response.context["form"].errors) == ["variant"]
    assert nothing_was_done(other, status="live")


# --- A drop's timeline ------------------------------------------------------------------


def read_timeline(client, drop, **query):
    return client.get(reverse("admin:drops_drop_timeline", args=[drop.pk]), query)


def test_the_timeline_tells_the_events_newest_first_and_goes_back(admin_client):
    drop = DropFactory(draft=True, sizes=SIZES)
    update_drop(drop.pk, status=DropStatus.LIVE)
    for number in range(60):
        update_drop(drop.pk, name=f"Renamed <{number}>")

    newest = read_timeline(admin_client, drop)
    older = read_timeline(admin_client, drop, before=newest.context["older"])

    assert [event.seq for event, _ in newest.context["events"]] == list(range(61, 11, -1))
    assert [event.seq for event, _ in older.context["events"]] == list(range(11, 0, -1))
    assert older.context["older"] is None
    words = [words for _, words in older.context["events"]]
    assert words[-2:] == ["Changed: live, 7 units", "Published, live"]


def test_the_timeline_says_where_the_log_no_longer_reaches_back(admin_client):
    drop = DropFactory(draft=True)
    assert "Nothing yet: drafts are silent." in read_timeline(admin_client, drop).content.decode()
    update_drop(drop.pk, status=DropStatus.LIVE)
    update_drop(drop.pk, name="Renamed")
    whole = read_timeline(admin_client, drop).content.decode()

    drop.events.filter(seq=1).delete()
    rest = read_timeline(admin_client, drop).content.decode()
    drop.events.all().delete()
    nothing = read_timeline(admin_client, drop).content.decode()

    cut = ["no longer in the log" in page for page in (whole, rest, nothing)]
    assert cut == [False, True, True]
    assert "drafts are silent" not in nothing


def test_every_kind_of_event_has_words(admin_client):
    drop, user = DropFactory(), UserFactory(username="<ada>")
    reserve(drop.pk, Claim(user.pk))
    purchase(drop.pk, user.pk)
    void_reservation(reserve(drop.pk, Claim(UserFactory().pk)).pk)
    refund_purchase(drop.purchases.get().pk, restock=True, reason="Late", user=user)

    page = read_timeline(admin_client, drop)

    words = [words for _, words in page.context["events"]]
    assert words[::-1] == [
        "9 available",
        "<ada> purchased",
        "Latest: <ada>",
        "8 available",
        "9 available",
        "No purchases any more",
        "10 available",
    ]
    assert "&lt;ada&gt; purchased" in page.content.decode()


def test_the_sell_through_counts_units_by_second_of_the_sale(admin_client):
    opened = timezone.now().replace(microsecond=0) - timedelta(hours=1)
    drop = DropFactory(starts_at=opened)
    for second, quantity in ((3, 1), (3.9, 2), (4.1, 1), (70, 3)):
        at = opened + timedelta(seconds=second)
        PurchaseFactory(
            reservation__drop=drop, reservation__quantity=quantity, amount=1, created_at=at
        )

    sales = read_timeline(admin_client, drop).context["sales"]

    assert sales["seconds"] == [(3, 3), (4, 1), (70, 3)]


@pytest.mark.parametrize("before", ["x", "-1", "9" * 30, "9" * 5000, "²"])
def test_a_timeline_from_nonsense_is_no_error(admin_client, before):
    assert read_timeline(admin_client, DropFactory(), before=before).status_code == 200
