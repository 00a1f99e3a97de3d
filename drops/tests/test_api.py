import uuid
from datetime import timedelta

import pytest
from django.utils import timezone

from drops.models import Drop
from drops.tests.factories import DropFactory
from purchases.services import purchase
from reservations.services import Claim, reserve
from tests.queries import statements
from users.tests.factories import UserFactory

NEW = {"name": "Aurora", "price": "199.00", "total_stock": 5}


@pytest.fixture
def anybody(client_of, db):
    return client_of()


def in_hours(hours):
    return (timezone.now() + timedelta(hours=hours)).isoformat()


def names(response):
    assert response.status_code == 200, response.content
    return [drop["name"] for drop in response.json()["results"]]


def refusals(response):
    """Return {field: code} of a validation error."""
    assert (response.status_code, response.json()["code"]) == (400, "validation_error")
    return {error["field"]: error["code"] for error in response.json()["errors"]}


@pytest.fixture
def one_of_each(db):
    DropFactory(name="draft", draft=True)
    DropFactory(name="upcoming", upcoming=True)
    DropFactory(name="live")
    DropFactory(name="started", status="scheduled", starts_at=in_hours(-1), ends_at=in_hours(1))
    DropFactory(name="paused", status="paused")
    DropFactory(name="over", over=True)
    DropFactory(name="ended", status="ended")
    DropFactory(name="cancelled", status="cancelled")


def test_lists_what_is_open_now_newest_first(anybody, one_of_each):
    assert names(anybody.get("/api/drops")) == ["started", "live"]


@pytest.mark.parametrize(
    ("status", "found"),
    [
        ("scheduled", {"upcoming"}),
        ("live", {"live", "started"}),
        ("paused", {"paused"}),
        ("ended", {"over", "ended"}),
        ("cancelled", {"cancelled"}),
        ("draft", set()),
    ],
)
def test_lists_the_drops_of_a_status(anybody, one_of_each, status, found):
    assert set(names(anybody.get("/api/drops", {"status": status}))) == found


def test_lists_upcoming_drops_in_the_order_of_their_start(anybody):
    for hours in (3, 1, 2):
        DropFactory(name=f"in {hours} h", status="scheduled", starts_at=in_hours(hours))

    response = anybody.get("/api/drops", {"status": "scheduled"})

    assert names(response) == ["in 1 h", "in 2 h", "in 3 h"]


def test_lists_drafts_to_their_creator_and_to_staff_only(client_of, db):
    draft = DropFactory(draft=True)

    seen = [
        len(names(client_of(user).get("/api/drops", {"status": "draft"})))
        for user in (draft.created_by, UserFactory(), UserFactory(staff=True), None)
    ]

    assert seen == [1, 0, 1, 0]


def test_no_cache_keeps_a_list_of_drafts(client_of, db):
    client = client_of(DropFactory(draft=True).created_by)

    drafts = client.get("/api/drops", {"status": "draft"})
    known = client.get("/api/drops", {"status": "draft"}, HTTP_IF_NONE_MATCH=drafts["ETag"])
    live = client.get("/api/drops")

    assert (drafts["Cache-Control"], known.status_code) == ("no-store", 304)
    assert known["Cache-Control"] == "no-store"
    assert "Cache-Control" not in live


def test_pages_through_the_list(anybody):
    for number in range(5):
        DropFactory(name=str(number), created_at=timezone.now() + timedelta(seconds=number))

    first = anybody.get("/api/drops", {"limit": 2})
    second = anybody.get(first.json()["next"])
    third = anybody.get(second.json()["next"])

    assert [names(page) for page in (first, second, third)] == [["4", "3"], ["2", "1"], ["0"]]
    assert {page.json()["count"] for page in (first, second, third)} == {5}
    assert first.json()["previous"] is None
    assert third.json()["next"] is None
    assert names(anybody.get(third.json()["previous"])) == ["2", "1"]


def test_shows_twenty_at_a_time_and_a_hundred_at_most(anybody):
    for _ in range(21):
        DropFactory()

    assert len(names(anybody.get("/api/drops"))) == 20
    assert len(names(anybody.get("/api/drops", {"limit": 100}))) == 21
    assert names(anybody.get("/api/drops", {"offset": 30})) == []


@pytest.mark.parametrize(
    ("query", "field", "code"),
    [
        ({"limit": 101}, "limit", "max_value"),
        ({"limit": 0}, "limit", "min_value"),
        ({"offset": -1}, "offset", "min_value"),
        ({"offset": 1_000_001}, "offset", "max_value"),
        ({"limit": "all"}, "limit", "invalid"),
        ({"status": "open"}, "status", "invalid_choice"),
        ({"status": ""}, "status", "invalid_choice"),
    ],
)
def test_refuses_a_query_out_of_bounds(anybody, query, field, code):
    assert refusals(anybody.get("/api/drops", query)) == {field: code}


def test_a_list_costs_the_same_whatever_its_length(anybody):
    def cost():
        with statements() as made:
            assert anybody.get("/api/drops").status_code == 200
        return len(made)

    DropFactory(sizes={"EU 42": 1, "EU 43": 1})
    with_one = cost()
    for _ in range(14):
        DropFactory(sizes={"EU 42": 1, "EU 43": 1})

    assert with_one == cost() == 3  # the count, the page, its variants


def test_shows_one_drop_in_two_statements(anybody):
    drop = DropFactory(sizes={"EU 42": 1, "EU 43": 1})

    with statements() as made:
        response = anybody.get(f"/api/drops/{drop.pk}")

    assert response.json()["id"] == str(drop.pk)
    assert len(made) == 2


def test_shows_the_stock_of_each_size_and_whether_some_may_come_back(anybody):
    drop = DropFactory(sizes={"EU 42": 1, "EU 43": 1})
    first, second = drop.variants.all()
    one, other = UserFactory(), UserFactory()

    def shown():
        body = anybody.get(f"/api/drops/{drop.pk}").json()
        return (
            body["available_stock"],
            [variant["available_stock"] for variant in body["variants"]],
            body["availability"],
            body["seq"],
        )

    assert shown() == (2, [1, 1], "available", 0)
    reserve(drop.pk, Claim(one.pk, first.pk))
    assert shown() == (1, [0, 1], "available", 1)
    reserve(drop.pk, Claim(other.pk, second.pk))
    assert shown() == (0, [0, 0], "fully_reserved", 2)
    purchase(drop.pk, one.pk)
    assert shown() == (0, [0, 0], "fully_reserved", 4)
    purchase(drop.pk, other.pk)
    assert shown() == (0, [0, 0], "sold_out", 7)


def test_shows_the_three_latest_purchasers_newest_first(anybody):
    drop = DropFactory(max_per_user=2)
    shoppers = UserFactory.create_batch(4)
    for shopper in shoppers:
        reserve(drop.pk, Claim(shopper.pk, quantity=2))
        purchase(drop.pk, shopper.pk)

    feed = anybody.get(f"/api/drops/{drop.pk}").json()["activity_feed"]["latest_purchasers"]

    assert [(entry["user_id"], entry["username"], entry["qty"]) for entry in feed] == [
        (str(shopper.pk), shopper.username, 2) for shopper in shoppers[:0:-1]
    ]
    assert all(entry["created_at"].endswith("Z") for entry in feed)


def test_creates_a_draft_from_the_least_there_is(client_of, db):
    user = UserFactory()

    response = client_of(user).post("/api/drops", NEW)

    assert response.status_code == 201
    drop = Drop.objects.get()
    assert drop.created_by == user
    body = response.json()
    assert body["variants"] == [
        {
            "id": str(drop.variants.get().pk),
            "label": "One size",
            "total_stock": 5,
            "available_stock": 5,
        }
    ]
    assert {name: body[name] for name in body if name not in {"id", "created_at", "variants"}} == {
        "name": "Aurora",
        "description": "",
        "image_url": "",
        "price": "199.00",
        "currency": "USD",
        "total_stock": 5,
        "available_stock": 5,
        "availability": "available",
        "starts_at": None,
        "ends_at": None,
        "status": "draft",
        "max_per_user": 1,
        "hold_cooldown_seconds": None,
        "max_expired_holds": None,
        "seq": 0,
        "activity_feed": {"latest_purchasers": []},
    }


def test_shows_what_it_created(client_of, db):
    client = client_of(UserFactory())
    created = client.post(
        "/api/drops",
        {
            "name": "  Aurora Runner 'Ember' 👟 & more  ",
            "description": "Five hundred pairs.\nOne each.",
            "image_url": "https://example.com/a.svg?x=1&y=2",
            "price": 25000,
            "currency": "JPY",
            "variants": [{"label": "EU 42", "total_stock": 3}, {"label": "حذاء", "total_stock": 0}],
            "starts_at": "2026-01-02T03:04:05.678901+09:00",
            "ends_at": "2099-12-31T23:59:59Z",
            "max_per_user": None,
        },
    ).json()

    shown = client.get(f"/api/drops/{created['id']}").json()

    assert shown == created
    assert shown["name"] == "Aurora Runner 'Ember' 👟 & more"
    assert (shown["price"], shown["currency"], shown["total_stock"]) == ("25000", "JPY", 3)
    assert shown["starts_at"] == "2026-01-01T18:04:05.678901Z"
    assert shown["ends_at"] == "2099-12-31T23:59:59Z"
    assert shown["status"] == "live"
    assert shown["seq"] == 1


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({}, "draft"),
        ({"starts_at": None}, "draft"),
        ({"starts_at": "2099-01-01T00:00:00Z"}, "scheduled"),
        ({"starts_at": "2020-01-01T00:00:00Z"}, "live"),
        ({"starts_at": "2020-01-01T00:00:00Z", "ends_at": "2020-01-02T00:00:00Z"}, "ended"),
        ({"status": "live"}, "live"),
        ({"status": "live", "starts_at": "2099-01-01T00:00:00Z"}, "scheduled"),
        ({"status": "paused"}, "paused"),
        ({"status": "cancelled"}, "cancelled"),
    ],
)
def test_a_new_drop_has_the_status_that_holds(client_of, db, fields, status):
    client = client_of(UserFactory())

    response = client.post("/api/drops", NEW | fields)

    assert (response.status_code, response.json()["status"]) == (201, status)
    assert client.get(f"/api/drops/{response.json()['id']}").json()["status"] == status


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        ({"price": "199"}, "199.00"),
        ({"price": 199.5}, "199.50"),
        ({"price": "0"}, "0.00"),
        ({"price": "-0"}, "0.00"),
        ({"price": -0.0}, "0.00"),
        ({"price": "1e2"}, "100.00"),
        ({"price": "5.125", "currency": "KWD"}, "5.125"),
        ({"price": "5", "currency": "KWD"}, "5.000"),
        ({"price": "999999999.99"}, "999999999.99"),
        ({"price": "25000.00", "currency": "JPY"}, "25000"),
    ],
)
def test_shows_a_price_with_the_decimals_of_its_currency(client_of, db, sent, shown):
    client = client_of(UserFactory())

    response = client.post("/api/drops", NEW | sent)

    assert (response.status_code, response.json()["price"]) == (201, shown)
    assert client.get(f"/api/drops/{response.json()['id']}").json()["price"] == shown


def test_the_total_may_be_given_beside_the_sizes_if_it_is_their_sum(client_of, db):
    client = client_of(UserFactory())
    sizes = {"variants": [{"label": "S", "total_stock": 1}, {"label": "L", "total_stock": 2}]}

    assert client.post("/api/drops", NEW | sizes | {"total_stock": 3}).json()["total_stock"] == 3
    assert refusals(client.post("/api/drops", NEW | sizes)) == {"total_stock": "not_the_sum"}
    assert Drop.objects.count() == 1


def test_names_every_wrong_field_at_once(client_of, db):
    response = client_of(UserFactory()).post(
        "/api/drops",
        {
            "name": "",
            "price": "-1",
            "currency": "usd",
            "variants": [{"label": "S", "total_stock": 1}, {"label": "<b>", "total_stock": -1}],
        },
    )

    assert refusals(response) == {
        "name": "blank",
        "price": "min_value",
        "currency": "unknown_currency",
        "variants[1].label": "markup",
        "variants[1].total_stock": "min_value",
    }
    assert not Drop.objects.exists()


def test_nobody_creates_nothing(anybody):
    response = anybody.post("/api/drops", NEW)

    assert (response.status_code, response.json()["code"]) == (401, "identity_required")
    assert not Drop.objects.exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"name": "Borealis"}, {"name": "Borealis"}),
        ({"description": ""}, {"description": ""}),
        ({"image_url": "/static/b.svg"}, {"image_url": "/static/b.svg"}),
        ({"price": 5}, {"price": "5.00"}),
        ({"max_per_user": None}, {"max_per_user": None}),
        ({"max_per_user": 3}, {"max_per_user": 3}),
        ({"status": "paused"}, {"status": "paused"}),
        ({"starts_at": "2099-01-01T00:00:00Z"}, {"status": "scheduled"}),
        ({"ends_at": "2020-01-01T00:00:00Z"}, {"status": "ended"}),
    ],
)
def test_its_creator_changes_a_drop(client_of, db, changes, expected):
    drop = DropFactory(description="Ten pairs.")
    client = client_of(drop.created_by)
    before = client.get(f"/api/drops/{drop.pk}").json()

    response = client.patch(f"/api/drops/{drop.pk}", changes)

    assert response.status_code == 200
    after = client.get(f"/api/drops/{drop.pk}").json()
    assert response.json() == after
    changed = {name for name in after if after[name] != before[name]}
    assert changed - set(changes) == ({"seq"} | expected.keys()) - set(changes)
    assert {name: after[name] for name in expected} == expected


def test_an_empty_change_changes_nothing(client_of, db):
    drop = DropFactory()

    response = client_of(drop.created_by).patch(f"/api/drops/{drop.pk}", {})

    assert (response.status_code, response.json()["seq"]) == (200, 0)


def test_staff_change_any_drop_and_others_none(client_of, db):
    drop = DropFactory(name="Aurora")
    path = f"/api/drops/{drop.pk}"

    refused = client_of(UserFactory()).patch(path, {"name": "Mine"})
    nobody = client_of().patch(path, {"name": "Mine"})

    assert (refused.status_code, refused.json()["code"]) == (403, "permission_denied")
    assert (nobody.status_code, nobody.json()["code"]) == (401, "identity_required")
    drop.refresh_from_db()
    assert (drop.name, drop.seq) == ("Aurora", 0)

    assert client_of(UserFactory(staff=True)).patch(path, {"name": "Ours"}).status_code == 200
    drop.refresh_from_db()
    assert (drop.name, drop.seq) == ("Ours", 1)


@pytest.mark.parametrize(
    "field",
    [
        {"total_stock": 50},
        {"available_stock": 50},
        {"variants": [{"label": "EU 42", "total_stock": 50}]},
        {"currency": "EUR"},
        {"seq": 7},
        {"id": str(uuid.uuid4())},
        {"created_by": str(uuid.uuid4())},
    ],
)
def test_stock_and_what_the_server_decides_can_not_be_changed(client_of, db, field):
    drop = DropFactory(total_stock=10)

    response = client_of(drop.created_by).patch(f"/api/drops/{drop.pk}", field | {"name": "X"})

    assert refusals(response) == dict.fromkeys(field, "unknown_field")
    stored = Drop.objects.get()
    assert (stored.name, stored.total_stock, stored.available_stock) == (drop.name, 10, 10)


@pytest.mark.parametrize("path", ["e6dc0000-0000-4000-8000-000000000404", "42", "nothing", "%00"])
def test_does_not_find_what_is_not_there(client_of, db, path):
    client = client_of(UserFactory())

    for response in (
        client.get(f"/api/drops/{path}"),
        client.patch(f"/api/drops/{path}", {"name": "X"}),
    ):
        assert (response.status_code, response.json()["code"]) == (404, "not_found")


def test_an_id_has_one_spelling_but_for_its_case(anybody):
    drop = DropFactory()
    tried = [str(drop.pk), str(drop.pk).upper(), drop.pk.hex, f"{{{drop.pk}}}", drop.pk.urn]

    found = [anybody.get(f"/api/drops/{spelling}").status_code for spelling in tried]

    assert found == [200, 200, 404, 404, 404]
