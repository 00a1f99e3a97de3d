"""A rehearsal drop: seen by nobody who doesn't ask for its id, and gone without a trace."""

import asyncio
import uuid
from datetime import timedelta

import pytest
from asgiref.sync import sync_to_async
from django.db import DatabaseError, IntegrityError, connection, transaction
from django.urls import reverse

from config.ids import is_rehearsal_id, new_id, new_rehearsal_id
from control.dashboard import figures
from drops.models import Drop, DropStatus, Variant
from drops.services import update_drop
from drops.tests.factories import DropFactory
from operations.rehearsals import create_rehearsal, discard_rehearsal, discard_rehearsals
from purchases.audit import audit_stock
from purchases.models import Purchase
from purchases.services import purchase
from realtime import hub as hub_module
from realtime.models import Event
from realtime.tests.sockets import Socket, in_loop
from reservations import services as reservations
from reservations.models import Reservation
from reservations.services import Claim, expire_due, reserve
from tests.hot import hot_lane
from users.models import User
from users.tests.factories import UserFactory


@pytest.fixture
def rehearsal(db):
    """A rehearsal drop with one purchase and one hold."""
    drop, users = create_rehearsal(stock=5, hold_seconds=7, users=3)
    for user in users[:2]:
        reserve(drop.pk, Claim(user))
    purchase(drop.pk, users[0])
    drop.refresh_from_db()
    return drop


def test_names_of_the_shoppers_give_no_opaque_id_away(db, settings):
    settings.PUBLIC_USER_IDS = "opaque"

    _, users = create_rehearsal(stock=1, hold_seconds=7, users=20)

    names = dict(User.objects.filter(pk__in=users).values_list("pk", "username"))
    assert len(set(names.values())) == 20
    for pk, name in names.items():
        assert name.startswith("rehearsal_")
        assert pk.hex[-8:] not in name


# --- Unseen -----------------------------------------------------------------------------


@pytest.mark.parametrize("status", [*DropStatus])
def test_no_list_of_the_viewset_shows_it(rehearsal, client_of, status):
    Drop.objects.filter(pk=rehearsal.pk).update(status=status)
    if status == DropStatus.SCHEDULED:
        Drop.objects.filter(pk=rehearsal.pk).update(starts_at=rehearsal.created_at + timedelta(9))
    shown = DropFactory(status=status, upcoming=status == DropStatus.SCHEDULED)

    listed = client_of(UserFactory(is_staff=True)).get(f"/api/drops?status={status}").json()

    assert [drop["id"] for drop in listed["results"]] == [str(shown.pk)]
    assert listed["count"] == 1


@pytest.mark.django_db(transaction=True)
def test_the_hot_list_does_not_show_it_but_its_address_does():
    drop, users = create_rehearsal(stock=5, hold_seconds=7, users=1)
    shown = DropFactory()

    async def scene(lane):
        await lane.get("/api/drops")
        await lane.post(f"/api/drops/{drop.pk}/reserve", await User.objects.aget(pk=users[0]))
        return (await lane.get("/api/drops")).json(), (
            await lane.get(f"/api/drops/{drop.pk}")
        ).json()

    with hot_lane() as lane:
        listed, read = asyncio.run(scene(lane))

    assert [drop["id"] for drop in listed["results"]] == [str(shown.pk)]
    assert (read["id"], read["available_stock"]) == (str(drop.pk), 4)


def test_the_viewset_shows_it_by_its_id(rehearsal, client_of):
    assert client_of().get(f"/api/drops/{rehearsal.pk}").json()["available_stock"] == 3


def test_nobody_makes_one_over_the_api(db, client_of):
    body = {"id": str(new_rehearsal_id()), "name": "Mine", "price": "1", "total_stock": 1}
    client = client_of(UserFactory())

    assert client.post("/api/drops", body).status_code == 400
    assert client.post("/api/drops", body | {"hold_seconds": 1}).status_code == 400
    del body["id"]
    assert client.post("/api/drops", body | {"hold_seconds": 1}).status_code == 400
    made = client.post("/api/drops", body).json()
    assert not is_rehearsal_id(made["id"])
    assert Drop.objects.count() == 1


def test_the_shop_does_not_show_it(rehearsal, client):
    home = client.get("/").content.decode()

    assert rehearsal.name not in home
    assert str(rehearsal.pk) not in home
    assert client.get(f"/drops/{rehearsal.pk}").status_code == 404
    assert client.get(reverse("drop-holds", args=[rehearsal.pk])).status_code == 404


def test_the_dashboard_does_not_count_it(rehearsal):
    told = figures()

    assert (told["drops"], told["purchases"], told["rate"]) == ([], [], {})


def test_staff_find_it_by_its_name(rehearsal, admin_client):
    page = admin_client.get(reverse("admin:drops_drop_changelist")).content.decode()

    assert f"Rehearsal of {rehearsal.created_at:%Y-%m-%d %H:%M} UTC" in page


@pytest.mark.django_db(transaction=True)
def test_the_socket_of_all_drops_is_not_told_of_it(monkeypatch):
    monkeypatch.setattr(hub_module, "HEARTBEAT_SECONDS", 0.3)
    real = DropFactory()
    # A drop is known to heartbeats by its first event.
    update_drop(real.pk, name="Before")

    async def scenario():
        everything = Socket("/ws/drops")
        assert [d["id"] for d in (await everything.next())["data"]["drops"]] == [str(real.pk)]
        drop, users = await sync_to_async(create_rehearsal)(5, 7, 1)
        one = Socket(f"/ws/drops/{drop.pk}")
        assert (await one.next())["type"] == "SNAPSHOT"
        await sync_to_async(reserve)(drop.pk, Claim(users[0]))
        told = await one.next()
        assert (told["type"], told["data"]["availableStock"]) == ("STOCK_UPDATED", 4)
        # What comes next on the other socket is of the real drop, which changed later.
        await sync_to_async(update_drop)(real.pk, name="After")
        assert (await everything.next())["dropId"] == str(real.pk)
        beat = await heartbeat_of(everything)
        assert set(beat["data"]["seqs"]) == {str(real.pk)}
        late = Socket("/ws/drops")
        assert [d["id"] for d in (await late.next())["data"]["drops"]] == [str(real.pk)]
        for socket in (everything, one, late):
            await socket.leave()

    in_loop(scenario)


async def heartbeat_of(socket):
    while True:
        frame = await asyncio.wait_for(socket._frames.get(), 5)
        if frame["type"] == "HEARTBEAT":
            return frame


# --- Its own rules ----------------------------------------------------------------------


def test_its_holds_last_as_long_as_it_says(rehearsal, settings):
    settings.RESERVATION_TTL_SECONDS = 60

    hold = Reservation.objects.active().get(drop=rehearsal)

    assert hold.expires_at - hold.created_at == timedelta(seconds=7)


def test_a_real_drop_has_no_hold_seconds(db):
    with pytest.raises(IntegrityError, match="drop_only_rehearsals_have_hold_seconds"):
        DropFactory(hold_seconds=7)


@pytest.mark.django_db(transaction=True)
def test_the_audit_covers_it():
    drop, users = create_rehearsal(stock=5, hold_seconds=7, users=1)
    reserve(drop.pk, Claim(users[0]))
    assert audit_stock().drops == 1
    assert audit_stock().differences == []

    Variant.objects.filter(drop=drop).update(available_stock=5)

    assert audit_stock().drifting_drops == [drop.pk]


def test_only_its_own_ids_are_rehearsals():
    made = [new_rehearsal_id() for _ in range(100)]

    assert len(set(made)) == 100
    assert all(is_rehearsal_id(pk) and is_rehearsal_id(str(pk)) for pk in made)
    assert {(pk.version, pk.variant) for pk in made} == {(8, uuid.RFC_4122)}
    assert not is_rehearsal_id(new_id())
    assert not is_rehearsal_id(uuid.uuid4())


# --- Gone -------------------------------------------------------------------------------


def test_discarding_leaves_nothing_of_it_and_all_of_the_rest(rehearsal):
    real, shopper = DropFactory(), UserFactory()
    reserve(real.pk, Claim(shopper.pk))
    purchase(real.pk, shopper.pk)
    events = Event.objects.filter(drop=real).count()

    assert discard_rehearsals() == 1

    assert list(Drop.objects.values_list("pk", flat=True)) == [real.pk]
    assert Variant.objects.count() == 1
    assert (Reservation.objects.count(), Purchase.objects.count()) == (1, 1)
    assert Event.objects.count() == events
    assert set(User.objects.values_list("pk", flat=True)) == {real.created_by_id, shopper.pk}


def test_a_synthetic_user_with_rows_of_a_real_drop_stays(rehearsal):
    real = DropFactory()
    user = Reservation.objects.filter(drop=rehearsal).first().user
    reserve(real.pk, Claim(user.pk))

    discard_rehearsals()

    assert User.objects.filter(pk=user.pk).exists()
    assert Reservation.objects.filter(drop=real).count() == 1


def test_a_real_drop_is_never_discarded(db):
    drop = DropFactory()

    with pytest.raises(ValueError, match="no rehearsal"):
        discard_rehearsal(drop.pk)
    for table, column in (("drops_variant", "drop_id"), ("drops_drop", "id")):
        with (
            pytest.raises(DatabaseError, match="kept for ever"),
            transaction.atomic(),
            connection.cursor() as cursor,
        ):
            cursor.execute(f"DELETE FROM {table} WHERE {column} = %s", [drop.pk])

    assert Variant.objects.filter(drop=drop).count() == 1


def test_the_expiry_loop_goes_on_when_a_rehearsal_is_gone(rehearsal, monkeypatch):
    Reservation.objects.filter(status="ACTIVE").update(
        created_at=rehearsal.created_at - timedelta(hours=1),
        expires_at=rehearsal.created_at - timedelta(minutes=1),
    )
    expire = reservations._expire_drop

    def discard_first(drop_id, batch):
        discard_rehearsal(drop_id)
        return expire(drop_id, batch)

    monkeypatch.setattr(reservations, "_expire_drop", discard_first)

    assert expire_due() == []
