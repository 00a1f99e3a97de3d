"""The audit finds each kind of drift, tells it in three forms, and can pause the drop."""

import json
import uuid
from decimal import Decimal
from io import StringIO
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import connection
from django.urls import reverse

from drops.models import Drop, DropStatus
from drops.services import create_drop, update_drop
from purchases.audit import audit_stock
from purchases.services import purchase
from realtime.models import Event, EventType
from reservations.models import Reservation
from reservations.services import Claim, expire_due, release, reserve
from tests.concurrency import another_session
from tests.unguarded import STOCK_CONSTRAINTS, without_constraints
from users.idempotency import Answer, make_key, store_answers
from users.models import IdempotencyKey, User
from users.tests.factories import UserFactory

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def drop(transactional_db) -> Drop:
    """A drop after a short sale by the services: one hold, one purchase, one expired hold."""
    staff = UserFactory(staff=True)
    drop = create_drop(
        staff, name="Night Owl", price=Decimal("149.00"), total_stock=5, status="live"
    )
    holder, buyer, late = UserFactory.create_batch(3)
    hold = reserve(drop.pk, Claim(late.pk))
    Reservation.objects.filter(pk=hold.pk).update(
        created_at="2020-01-01T00:00Z", expires_at="2020-01-01T00:01Z"
    )
    expire_due()
    reserve(drop.pk, Claim(holder.pk))
    reserve(drop.pk, Claim(buyer.pk))
    purchase(drop.pk, buyer.pk)
    drop.refresh_from_db()
    return drop


def create_live(staff: User, name: str, stock: int = 1) -> Drop:
    price = Decimal("149.00")
    return create_drop(staff, name=name, price=price, total_stock=stock, status="live")


def run(sql: str, **parameters: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute(sql, parameters)


def broken_checks() -> set[str]:
    return {difference.check for difference in audit_stock().differences}


def drift(drop: Drop) -> None:
    run("UPDATE drops_variant SET available_stock = available_stock - 1")


def test_finds_nothing_wrong_after_a_sale(drop):
    assert audit_stock().differences == []


CORRUPTIONS = {
    "units of each size: available + held + sold = total": (
        "UPDATE drops_variant SET available_stock = available_stock - 1"
    ),
    "a drop's counters are the sums of its sizes": (
        "UPDATE drops_drop SET sold_stock = sold_stock + 1"
    ),
    "the event log ends at the drop's seq, without a gap": (
        "DELETE FROM realtime_event WHERE seq = 3"
    ),
    "a consumed reservation has its paid purchase, a voided one at most a refunded one": (
        "UPDATE purchases_purchase SET quantity = 2"
    ),
    "no purchase was made after its reservation's deadline": (
        "UPDATE purchases_purchase SET created_at = created_at + interval '1 hour'"
    ),
    "the newest event that names a drop's stock names what it is": (
        "UPDATE drops_drop SET available_stock = available_stock - 1"
    ),
    "an expired hold was announced once": (
        "UPDATE realtime_event SET type = 'STOCK_UPDATED', data = '{}'"
        " WHERE type = 'RESERVATION_EXPIRED'"
    ),
    "only an expired hold was announced as expired": (
        "UPDATE reservations_reservation SET status = 'RELEASED' WHERE status = 'EXPIRED'"
    ),
    "a purchase was announced once": (
        "UPDATE realtime_event SET type = 'PURCHASE_COMPLETED' WHERE type = 'ACTIVITY_UPDATED'"
    ),
}


@pytest.mark.parametrize("check", CORRUPTIONS)
def test_finds_what_somebody_changed_by_hand(drop, check):
    run(CORRUPTIONS[check])

    assert check in broken_checks()


def test_finds_what_only_a_missing_constraint_lets_happen(drop):
    with without_constraints(*STOCK_CONSTRAINTS, "one_active_reservation_per_user_and_drop"):
        run("UPDATE drops_drop SET available_stock = -1")
        run(
            "INSERT INTO reservations_reservation SELECT gen_random_uuid(), quantity, unit_price,"
            " currency, status, created_at, expires_at, drop_id, user_id, variant_id"
            " FROM reservations_reservation WHERE status = 'ACTIVE'"
        )

        assert broken_checks() >= {
            "no counter is below zero or above its total",
            "a user has at most one active reservation of a drop",
        }


def test_finds_a_stored_answer_without_its_effect(drop):
    bought = Reservation.objects.get(status="CONSUMED")
    route = f"/api/drops/{drop.pk}/reserve"
    for number in ("one", "two"):
        key = make_key(bought.user_id, "POST", route, number, b"")
        IdempotencyKey.objects.create(
            user_id=key.user_id,
            route=key.route,
            key=key.key,
            fingerprint=key.fingerprint,
            created_at=drop.created_at,
        )
        body = json.dumps({"id": str(bought.pk), "drop_id": str(drop.pk)})
        store_answers([(key, Answer(201, body))])
    assert audit_stock().differences == []

    missing = "00000000-0000-4000-8000-000000000001"
    IdempotencyKey.objects.filter(key="one").update(
        body=json.dumps({"id": missing, "drop_id": str(drop.pk)})
    )
    IdempotencyKey.objects.filter(key="two").update(status=None)

    found = audit_stock().differences
    assert {d.check for d in found} == {"a stored answer's effect is stored as well"}
    assert [(d.drop_id, d.expected) for d in found] == [
        (drop.pk, f"row {missing}"),
        (None, "an answer"),
    ]


def test_sees_one_moment_only_while_a_sale_goes_on(drop):
    with another_session() as other:
        other.execute("UPDATE drops_variant SET available_stock = available_stock - 1")
        assert audit_stock().differences == []
    hold = Reservation.objects.active().get()
    release(hold.pk, hold.user)
    assert audit_stock().differences == []


def test_the_command_tells_what_is_wrong_and_fails(drop):
    drift(drop)
    table, document = StringIO(), StringIO()

    with pytest.raises(SystemExit) as exit_of_table:
        call_command("audit_stock", stdout=table)
    with pytest.raises(SystemExit) as exit_of_json:
        call_command("audit_stock", "--json", f"--drop={drop.pk}", stdout=document)

    assert (exit_of_table.value.code, exit_of_json.value.code) == (1, 1)
    assert "2 differences in 1 drops" in table.getvalue()
    told = json.loads(document.getvalue())
    assert (told["drops"], told["paused"]) == (1, [])
    assert {row["drop_id"] for row in told["differences"]} == {str(drop.pk)}
    drop.refresh_from_db()
    assert drop.status == DropStatus.LIVE


def test_the_command_succeeds_where_nothing_is_wrong(drop):
    output = StringIO()
    call_command("audit_stock", stdout=output)

    assert output.getvalue() == "1 drops audited: every unit is accounted for.\n"


def test_the_command_takes_a_drop_that_is_none_for_no_difference(db):
    with pytest.raises(CommandError, match=r"^There is no drop ") as refused:
        call_command("audit_stock", f"--drop={uuid.uuid4()}")

    assert refused.value.returncode == 2


def test_a_setting_pauses_a_drop_that_drifts_and_no_other(drop, settings):
    settings.PAUSE_DRIFTING_DROPS = True
    fine = create_drop(
        drop.created_by, name="Fine", price=Decimal("1.00"), total_stock=1, status="live"
    )
    run("UPDATE drops_drop SET sold_stock = sold_stock + 1 WHERE id = %(id)s", id=drop.pk)
    output = StringIO()

    with pytest.raises(SystemExit):
        call_command("audit_stock", stdout=output)

    drop.refresh_from_db()
    fine.refresh_from_db()
    assert (drop.status, fine.status) == (DropStatus.PAUSED, DropStatus.LIVE)
    assert f"Paused: Night Owl ({drop.pk})" in output.getvalue()
    newest = Event.objects.filter(drop=drop).latest("seq")
    assert (newest.type, newest.data["drop"]["status"]) == (EventType.DROP_UPDATED, "paused")


def test_a_drop_that_cannot_be_paused_does_not_keep_others_from_it(drop, settings):
    settings.PAUSE_DRIFTING_DROPS = True
    other = create_drop(
        drop.created_by, name="Other", price=Decimal("1.00"), total_stock=1, status="live"
    )
    update_drop(other.pk, name="Another")
    # Its next event would have a number that is taken.
    run("UPDATE drops_drop SET seq = seq - 1 WHERE id = %(id)s", id=drop.pk)
    run("UPDATE drops_drop SET available_stock = 0 WHERE id = %(id)s", id=other.pk)

    with pytest.raises(SystemExit):
        call_command("audit_stock", stdout=StringIO())

    drop.refresh_from_db()
    other.refresh_from_db()
    assert (drop.status, other.status) == (DropStatus.LIVE, DropStatus.PAUSED)


def test_staff_see_what_is_wrong_on_a_page(drop, admin_client, client):
    assert "every unit is accounted for" in admin_client.get(reverse("audit")).content.decode()
    drift(drop)

    page = admin_client.get(reverse("audit")).content.decode()

    assert "2 differences in 1 drops" in page
    assert reverse("admin:drops_drop_change", args=[drop.pk]) in page
    assert client.get(reverse("audit")).status_code == 302
