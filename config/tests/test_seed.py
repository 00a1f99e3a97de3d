import io
import itertools
import re
import uuid
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from django.contrib.staticfiles import finders
from django.core.management import CommandError, call_command
from django.db import IntegrityError, connection
from django.db.models import DateTimeField, JSONField, Sum
from django.utils import timezone

from config.ids import new_id
from config.seeding import (
    ADMIN_ID,
    CATALOGUE,
    DEMO_DROP_ID,
    DEMO_USER_ID,
    MODELS,
    SIZES,
    STAFF_IDS,
    DemoData,
)
from drops.models import Availability, Drop, DropStatus, Variant
from drops.services import adjust_stock, update_drop
from drops.tests.factories import DropFactory
from purchases.audit import audit_stock
from purchases.models import Purchase, PurchaseStatus
from purchases.services import feed_entry, latest_paid, purchase, refund_purchase
from realtime.models import Event, EventType
from reservations.models import Reservation, ReservationStatus
from reservations.services import Claim, expire_due, release, reserve, void_reservation
from users.models import IdempotencyKey, User
from users.tests.factories import UserFactory

NOW = datetime(2026, 11, 22, 18, tzinfo=UTC)


def seed(*arguments):
    """Run the command and return what it said."""
    said = io.StringIO()
    call_command("seed", *arguments, stdout=said)
    return said.getvalue()


def count_rows():
    return {model.__name__: model.objects.count() for model in MODELS}


def stored_rows():
    """Return all rows but for their times, which move with the clock."""
    rows = {}
    for model in MODELS:
        fields = [
            field.attname
            for field in model._meta.concrete_fields
            if not isinstance(field, DateTimeField | JSONField) and field.name != "body"
        ]
        rows[model] = list(model.objects.order_by("pk").values_list(*fields))
    return rows


def status_counts():
    drops = Drop.objects.read_now()
    return Counter(drop.status_at(drop.read_at) for drop in drops)


def test_fills_every_table_and_says_with_how_much(db):
    said = seed()

    counts = count_rows()
    assert min(counts.values()) >= 15
    assert dict(re.findall(r"^  (\w+) +(\d+)$", said, re.M)) == {
        name: str(count) for name, count in counts.items()
    }
    assert f"Stored {sum(counts.values())} rows with seed 42:" in said
    assert said.startswith("Emptying the tables\nStoring users\nStoring drops\n")


def test_shows_a_bar_per_table_on_a_terminal(db, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    call_command("seed", stdout=Terminal())

    assert capsys.readouterr().out.count("100%") == len(MODELS)


def test_has_drops_in_every_state(db):
    seed()

    assert status_counts().keys() == set(DropStatus)
    live = [drop for drop in Drop.objects.with_status(DropStatus.LIVE)]
    assert {drop.availability for drop in live} == set(Availability)
    for sizes in (list(SIZES), [Variant.ONE_SIZE]):
        states = {
            (drop.status_at(timezone.now()), drop.availability)
            for drop in Drop.objects.prefetch_related("variants")
            if [variant.label for variant in drop.variants.all()] == sizes
        }
        assert states >= {
            (DropStatus.DRAFT, Availability.AVAILABLE),
            (DropStatus.SCHEDULED, Availability.AVAILABLE),
            (DropStatus.LIVE, Availability.AVAILABLE),
            (DropStatus.LIVE, Availability.FULLY_RESERVED),
            (DropStatus.LIVE, Availability.SOLD_OUT),
            (DropStatus.ENDED, Availability.AVAILABLE),
            (DropStatus.PAUSED, Availability.AVAILABLE),
            (DropStatus.CANCELLED, Availability.AVAILABLE),
        }
        assert any(
            1 <= drop.available_stock <= 3 and drop.sold_stock > 10
            for drop in live
            if [variant.label for variant in drop.variants.all()] == sizes
        )


def test_has_prices_in_several_currencies_with_their_decimals(db, client):
    seed()

    prices = {}
    for status in DropStatus.values:
        answer = client.get(f"/api/drops?status={status}").json()
        prices |= {drop["currency"]: drop["price"] for drop in answer["results"]}
    assert {"USD", "EUR", "JPY", "KWD"} < prices.keys()
    assert re.fullmatch(r"\d+", prices["JPY"])
    assert re.fullmatch(r"\d+\.\d\d", prices["EUR"])
    assert re.fullmatch(r"\d+\.\d{3}", prices["KWD"])


def test_has_reservations_and_purchases_in_every_status(db):
    seed()

    assert set(Reservation.objects.values_list("status", flat=True)) == set(ReservationStatus)
    assert set(Purchase.objects.values_list("status", flat=True)) == set(PurchaseStatus)
    refunded = Purchase.objects.filter(status=PurchaseStatus.REFUNDED)
    assert set(refunded.values_list("reservation__status", flat=True)) == {ReservationStatus.VOIDED}
    assert Variant.objects.filter(adjustments__delta__lt=0).exists()


def test_some_holds_expire_while_somebody_looks_and_some_last(db):
    seed()

    left = [
        (hold.expires_at - timezone.now()).total_seconds() for hold in Reservation.objects.active()
    ]
    assert min(left) > 0
    assert sum(seconds < 300 for seconds in left) >= 8
    assert sum(seconds > 600 for seconds in left) >= 8


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("number", [42, 7])
def test_the_audit_finds_no_difference(number):
    seed("--seed", str(number))

    audit = audit_stock()
    assert audit.drops == len(CATALOGUE) + 1
    assert audit.differences == []


def test_every_counter_follows_from_the_rows(db):
    seed()

    for variant in Variant.objects.all():
        held = variant.reservations.active().aggregate(n=Sum("quantity", default=0))["n"]
        paid = variant.purchases.filter(status=PurchaseStatus.PAID)
        assert variant.held_stock == held
        assert variant.sold_stock == paid.aggregate(n=Sum("quantity", default=0))["n"]
        assert min(variant.available_stock, variant.held_stock, variant.sold_stock) >= 0
    for drop in Drop.objects.all():
        sums = drop.variants.aggregate(
            total_stock=Sum("total_stock"),
            available_stock=Sum("available_stock"),
            sold_stock=Sum("sold_stock"),
        )
        assert sums == {name: getattr(drop, name) for name in sums}
        assert drop.latest_purchasers == [feed_entry(bought) for bought in latest_paid(drop)]


def test_every_purchase_is_like_its_reservation_and_in_time(db):
    seed()

    for bought in Purchase.objects.select_related("reservation"):
        held = bought.reservation
        is_paid = bought.status == PurchaseStatus.PAID
        assert held.status == (ReservationStatus.CONSUMED if is_paid else ReservationStatus.VOIDED)
        assert (bought.drop_id, bought.variant_id, bought.user_id, bought.quantity) == (
            *(held.drop_id, held.variant_id, held.user_id),
            held.quantity,
        )
        assert bought.amount == held.unit_price * held.quantity
        assert held.created_at < bought.created_at < held.expires_at


def test_nobody_has_more_of_a_drop_than_allowed_or_bought_outside_its_window(db):
    seed()

    for drop in Drop.objects.all():
        used = Counter()
        for held in drop.reservations.all():
            if held.status in {ReservationStatus.ACTIVE, ReservationStatus.CONSUMED}:
                used[held.user_id] += held.quantity
            assert held.created_at > (drop.starts_at or drop.created_at)
            assert held.created_at < min(drop.ends_at or timezone.now(), timezone.now())
        assert drop.max_per_user is None or max(used.values(), default=0) <= drop.max_per_user


def test_the_event_log_is_gap_free_and_ends_with_what_the_rows_say(db):
    seed()

    for drop in Drop.objects.read_now():
        events = list(drop.events.order_by("seq"))
        assert [event.seq for event in events] == list(range(1, drop.seq + 1))
        if drop.status == DropStatus.DRAFT:
            assert events == []
            continue
        assert events[0].type == EventType.DROP_CREATED
        assert [e.created_at for e in events] == sorted(e.created_at for e in events)
        last = {event.type: event.data for event in events}
        assert last[EventType.STOCK_UPDATED] == {
            "dropId": str(drop.pk),
            "availableStock": drop.available_stock,
            "availability": drop.availability,
            "soldStock": last[EventType.STOCK_UPDATED]["soldStock"],
            "variants": [
                {"id": str(variant.pk), "availableStock": variant.available_stock}
                for variant in drop.variants.all()
            ],
        }
        for event in events:
            if event.type == EventType.STOCK_UPDATED:
                units = [variant["availableStock"] for variant in event.data["variants"]]
                assert min(units) >= 0
                assert sum(units) == event.data["availableStock"] <= drop.total_stock
            if "drop" in event.data:
                assert event.data["drop"]["seq"] == event.seq
        sold = [event.data["soldStock"] for event in events if "soldStock" in event.data]
        assert sold[-1] == drop.sold_stock
        bought = [event for event in events if event.type == EventType.PURCHASE_COMPLETED]
        assert len(bought) == drop.purchases.count()
        expired = [e.data["reservationId"] for e in events if e.type == "RESERVATION_EXPIRED"]
        ids = drop.reservations.filter(status="EXPIRED").values_list("pk", flat=True)
        assert set(expired) == {str(pk) for pk in ids}
        assert len(expired) == len(ids)
        if drop.latest_purchasers:
            assert last[EventType.ACTIVITY_UPDATED]["latestPurchasers"] == [
                {
                    "userId": entry["user_id"],
                    "username": entry["username"],
                    "qty": entry["qty"],
                    "createdAt": entry["created_at"],
                }
                for entry in drop.latest_purchasers
            ]


def shapes(events):
    """Return the members of each type's data, and of what it holds, as dotted paths."""
    paths = {}
    for event in events:
        found = paths.setdefault(event.type, set())
        for name, value in event.data.items():
            found.add(name)
            for inner in value if isinstance(value, list) else [value]:
                found |= {f"{name}.{key}" for key in inner} if isinstance(inner, dict) else set()
    return paths


def transactions(events):
    """Return which types were recorded together, in their order."""
    together = {}
    for event in events:
        together.setdefault((event.drop_id, event.created_at), []).append(event.type)
    return {tuple(types) for types in together.values()}


def test_events_are_those_that_the_services_make(db):
    seed()
    seeded = list(Event.objects.order_by("drop", "seq"))
    demo, user = Drop.objects.get(pk=DEMO_DROP_ID), User.objects.get(pk=DEMO_USER_ID)
    reserve(demo.pk, Claim(user.pk))
    purchase(demo.pk, user.pk)
    release(reserve(demo.pk, Claim(user.pk)).pk, user)
    void_reservation(reserve(demo.pk, Claim(user.pk)).pk)
    latest = Purchase.objects.get(drop=demo, user=user)
    refund_purchase(latest.pk, restock=True, reason="Wrong size", user=user)
    Reservation.objects.filter(drop=demo, status="ACTIVE").update(
        created_at=timezone.now() - timedelta(2), expires_at=timezone.now() - timedelta(1)
    )
    expire_due()
    update_drop(demo.pk, status=DropStatus.PAUSED)
    adjust_stock(demo.variants.get().pk, 1, reason="Recount", user=user)
    update_drop(DropFactory(draft=True).pk, status=DropStatus.LIVE)
    made = list(Event.objects.order_by("id")[len(seeded) :])

    assert shapes(seeded) == shapes(made)
    # The last held unit of a seeded drop was bought too, and old purchases were refunded.
    assert transactions(seeded) - transactions(made) <= {
        ("PURCHASE_COMPLETED", "ACTIVITY_UPDATED", "STOCK_UPDATED"),
        ("RESERVATION_EXPIRED", "STOCK_UPDATED"),
    }


def test_no_event_gives_an_opaque_id_away(db, settings):
    settings.PUBLIC_USER_IDS = "opaque"

    seed()

    told = str(list(Event.objects.values_list("data", flat=True)))
    buyers = Purchase.objects.values_list("user_id", flat=True)
    assert not {pk for pk in buyers if str(pk) in told}


def test_a_stored_answer_is_what_the_request_was_told(db):
    seed()

    routes = Counter()
    for key in IdempotencyKey.objects.select_related("user"):
        action = key.route.rpartition("/")[2]
        routes[action] += 1
        model = {"reserve": Reservation, "purchase": Purchase}[action]
        row = model.objects.get(
            user=key.user, drop=key.route.split("/")[3], created_at=key.created_at
        )
        assert f'"id":"{row.pk}"' in key.body
        assert key.status == 201
        assert key.created_at > timezone.now() - timedelta(hours=24)
    assert routes == {"reserve": 12, "purchase": 12}


def test_the_demo_user_can_reserve_the_demo_drop(db, client_of):
    seed()
    drop, user = Drop.objects.get(pk=DEMO_DROP_ID), User.objects.get(username="demo")

    assert user.pk == DEMO_USER_ID
    assert user.purchases.exists()
    assert not user.reservations.filter(drop=drop).exists()
    assert not user.reservations.active().exists()
    assert (drop.variants.get().label, drop.max_per_user) == (Variant.ONE_SIZE, 5)
    assert drop.available_stock > 400
    answer = client_of(user).post(f"/api/drops/{drop.pk}/reserve")
    assert answer.status_code == 201
    newest = client_of().get("/api/drops").json()["results"][0]
    assert newest["id"] == str(DEMO_DROP_ID)


def test_the_admin_account_can_sign_in(db, client):
    seed()

    assert client.login(username="admin", password="admin")
    assert client.get("/admin/drops/drop/").status_code == 200


def test_pictures_are_small_files_of_the_storefront_that_refer_to_nothing_else(db):
    seed()

    paths = set(Drop.objects.exclude(image_url="").values_list("image_url", flat=True))
    assert len(paths) >= 6
    assert Drop.objects.filter(image_url="").exists()
    for path in paths:
        content = Path(finders.find(path.removeprefix("/static/"))).read_text()
        assert len(content) < 4000
        assert not re.search(r"href|<script|<image|style|url\((?!#)", content)


def test_the_same_seed_makes_the_same_data_and_another_one_other_data():
    def rows(number):
        data = DemoData(number, NOW, admin_login=True)
        return {
            model: [
                {f.attname: getattr(row, f.attname) for f in model._meta.concrete_fields}
                for row in made
            ]
            for model, made in data.rows.items()
        }

    first = rows(7)
    assert rows(7) == first
    ids = {model: {row["id"] for row in made} for model, made in first.items()}
    for model, made in rows(8).items():
        shared = ids[model] & {row["id"] for row in made} - {None}
        assert shared <= {DEMO_USER_ID, DEMO_DROP_ID, ADMIN_ID, *STAFF_IDS.values()}


@pytest.mark.django_db(transaction=True)
def test_seeding_again_replaces_everything_by_the_same_rows():
    seed("--seed", "7")
    first = stored_rows()
    DropFactory()

    seed("--seed", "7")

    assert stored_rows() == first
    assert Event.objects.order_by("pk").first().pk == 1


@pytest.mark.parametrize("model", [Reservation, Purchase])
def test_ids_sort_by_time_and_come_before_those_of_real_rows(db, model):
    seed()

    times = list(model.objects.order_by("pk").values_list("created_at", flat=True))
    as_ids_tell = timedelta(milliseconds=1)
    assert all(later > earlier - as_ids_tell for earlier, later in itertools.pairwise(times))
    assert model.objects.order_by("-pk").values_list("pk", flat=True)[0] < new_id()


def test_a_failure_leaves_the_database_as_it_was(db, monkeypatch):
    drop = DropFactory()
    connection.check_constraints()

    def fail(*args, **kwargs):
        raise IntegrityError

    monkeypatch.setattr(Event._meta.default_manager, "bulk_create", fail)
    with pytest.raises(IntegrityError):
        seed()

    assert list(Drop.objects.all()) == [drop]


@pytest.mark.django_db(transaction=True)
def test_no_reset_appends_a_part_of_its_own_each_time():
    seed()
    first, first_counts = stored_rows(), count_rows()
    seed("--no-reset")
    seed("--no-reset")

    added = {name: count - first_counts[name] for name, count in count_rows().items()}
    assert added["Drop"] == 2 * len(CATALOGUE)
    assert added["User"] == 2 * (first_counts["User"] - 5)
    assert all(count >= 2 * 15 for count in added.values())
    assert Drop.objects.filter(name="Brindlewick Courier 3 'Ember'").count() == 1
    for model, rows in stored_rows().items():
        assert set(first[model]) <= set(rows)
    assert audit_stock().differences == []
    third = stored_rows()

    seed()
    assert stored_rows() == first
    seed("--no-reset")
    seed("--no-reset")
    assert stored_rows() == third


def test_no_reset_leaves_alone_who_has_the_names_already(db):
    admin = UserFactory(username="admin")
    demo = UserFactory(username="demo")
    taken = DemoData(42, NOW, admin_login=True).shoppers[0].username
    UserFactory(username=taken)

    seed("--no-reset")

    assert User.objects.get(username="admin") == admin
    assert not User.objects.filter(is_staff=True).exists()
    assert Drop.objects.get(pk=DEMO_DROP_ID).created_by == admin
    assert User.objects.get(username="demo") == demo
    assert User.objects.get(pk=DEMO_USER_ID).username == "demo_000001"
    assert User.objects.filter(username__startswith=f"{taken}_").count() == 1


def test_no_reset_knows_its_admin_by_another_name(db):
    seed()
    User.objects.filter(pk=ADMIN_ID).update(username="boss")

    seed("--no-reset")

    added = Drop.objects.get(name="Brindlewick Courier 2 'Ember'")
    assert added.created_by.username == "boss"


def test_refuses_without_debug(db, settings):
    settings.DEBUG = False
    drop = DropFactory()

    with pytest.raises(CommandError, match="^seed fills development databases; DEBUG is off"):
        seed("--no-reset")

    assert list(Drop.objects.all()) == [drop]


def test_forced_without_debug_it_makes_no_account_that_anybody_could_use(db, settings):
    settings.DEBUG = False

    seed("--force")

    assert Drop.objects.count() == len(CATALOGUE) + 1
    assert not User.objects.filter(is_staff=True).exists()
    assert not User.objects.filter(is_superuser=True).exists()
    assert not any(user.has_usable_password() for user in User.objects.exclude(password=""))
    assert not User.objects.get(username="admin").check_password("admin")


@pytest.mark.django_db(transaction=True)
def test_says_so_when_the_tables_are_in_use():
    drop = DropFactory()
    with connection.cursor() as cursor:
        cursor.execute("SET lock_timeout = '50ms'")
    parameters = connection.get_connection_params()
    wanted = ("dbname", "user", "host", "port", "password")
    with psycopg.connect(**{k: v for k, v in parameters.items() if k in wanted}) as other:
        other.execute("LOCK TABLE drops_variant IN ACCESS SHARE MODE")
        with pytest.raises(CommandError, match="^The tables are in use"):
            seed()
    with connection.cursor() as cursor:
        cursor.execute("RESET lock_timeout")

    assert list(Drop.objects.all()) == [drop]


@pytest.mark.django_db(transaction=True)
def test_the_fixture_fills_an_empty_database_consistently(client_of):
    call_command("loaddata", "demo", verbosity=0)

    assert (User.objects.count(), Drop.objects.count(), Variant.objects.count()) == (2, 3, 5)
    assert audit_stock().differences == []
    assert status_counts() == {DropStatus.LIVE: 2, DropStatus.SCHEDULED: 1}
    for drop in Drop.objects.read_now():
        created = drop.events.get()
        assert (created.seq, created.type) == (drop.seq, EventType.DROP_CREATED)
        seen = client_of().get(f"/api/drops/{drop.pk}").json()
        assert created.data == {"drop": seen}
        assert finders.find(drop.image_url.removeprefix("/static/"))
    sized = Drop.objects.get(pk=uuid.UUID("00000000-0000-4000-8000-0000000fd001"))
    user = User.objects.get(username="theo")
    assert reserve(sized.pk, Claim(user.pk, sized.variants.first().pk)).is_new


@pytest.mark.django_db(transaction=True)
def test_the_fixture_goes_beside_the_seed():
    seed()
    before = count_rows()

    call_command("loaddata", "demo", verbosity=0)

    assert Drop.objects.count() == before["Drop"] + 3
    assert audit_stock().differences == []


def test_there_are_staff_for_each_role_who_can_sign_in(db, client):
    seed()

    for role in ("viewer", "operator", "manager"):
        assert client.login(username=role, password=role)
        user = User.objects.get(username=role)
        assert user.is_staff
        assert not user.is_superuser
        assert list(user.groups.values_list("name", flat=True)) == [role]
