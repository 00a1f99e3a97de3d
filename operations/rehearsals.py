"""Rehearsal drops: made for one rehearsal, seen by nobody else, and gone without a trace.

Drop and users have ids of a range of their own (``config.ids``), by which every reader leaves
them out, and by which whatever a killed rehearsal left behind is found. See docs/adr/0018.
"""

import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal

from django.db import connection, transaction
from django.db.models.functions import Now

from config.database import read_clock
from config.ids import REHEARSAL_IDS, is_rehearsal_id, new_rehearsal_id
from drops.models import Drop, DropQuerySet, DropStatus
from drops.services import create_drop, lock_drop
from purchases.models import Purchase, PurchaseStatus
from reservations.models import Reservation, ReservationStatus
from users.identity import Identity, public_hex
from users.models import User

SETTLED_POLL_SECONDS = 0.25
# Longer than a rehearsal with usual options takes.
MAY_RUN_FOR = timedelta(minutes=10)
# Referring rows first, as their constraints demand it.
DELETE_DROP = (
    "DELETE FROM realtime_event WHERE drop_id = %s",
    "DELETE FROM purchases_purchase WHERE drop_id = %s",
    "DELETE FROM reservations_reservation WHERE drop_id = %s",
    "DELETE FROM drops_stockadjustment"
    " WHERE variant_id IN (SELECT id FROM drops_variant WHERE drop_id = %s)",
    "DELETE FROM drops_variant WHERE drop_id = %s",
    "DELETE FROM drops_drop WHERE id = %s",
)


def running_rehearsals() -> DropQuerySet:
    """Return the rehearsals that began so lately that they may still be going on."""
    return Drop.objects.filter(pk__range=REHEARSAL_IDS, created_at__gt=Now() - MAY_RUN_FOR)


@transaction.atomic
def create_rehearsal(stock: int, hold_seconds: int, users: int) -> tuple[Drop, list[uuid.UUID]]:
    """Store a live rehearsal drop and ``users`` synthetic users; return it and their ids."""
    ids = [new_rehearsal_id() for _ in range(users)]
    owner = new_rehearsal_id()
    User.objects.bulk_create(
        [User(pk=pk, username=name_of(pk), password="") for pk in (owner, *ids)],
        batch_size=1000,
    )
    drop = create_drop(
        User.objects.get(pk=owner),
        id=new_rehearsal_id(),
        name=f"Rehearsal of {read_clock():%Y-%m-%d %H:%M} UTC",
        price=Decimal(100),
        total_stock=stock,
        hold_seconds=hold_seconds,
        status=DropStatus.LIVE,
    )
    return drop, ids


def name_of(user_id: uuid.UUID) -> str:
    """Return a name that gives no hidden id away; who knows the drop's id reads it in the feed."""
    return f"rehearsal_{public_hex(Identity(user_id, None))[-19:]}"


@transaction.atomic
def discard_rehearsal(drop_id: uuid.UUID) -> None:
    """Delete a rehearsal drop with all that belongs to it; who waits for its lock finds nothing.

    Raises:
        ValueError: it is a real drop, and those are kept for ever.
        Drop.DoesNotExist: no such drop.
    """
    if not is_rehearsal_id(drop_id):
        raise ValueError(f"{drop_id} is no rehearsal")
    lock_drop(drop_id)
    with connection.cursor() as cursor:
        for statement in DELETE_DROP:
            cursor.execute(statement, [drop_id])


def discard_users() -> int:
    """Delete the synthetic users whom no drop and no row refers to; return how many."""
    with transaction.atomic(), connection.cursor() as cursor:
        unused = """
            FROM users_user u WHERE u.id BETWEEN %s AND %s
            AND NOT EXISTS (SELECT FROM drops_drop WHERE created_by_id = u.id)
            AND NOT EXISTS (SELECT FROM reservations_reservation WHERE user_id = u.id)
            AND NOT EXISTS (SELECT FROM purchases_purchase WHERE user_id = u.id)
        """
        for table in ("users_idempotencykey", "realtime_socketticket"):
            cursor.execute(
                f"DELETE FROM {table} WHERE user_id IN (SELECT u.id {unused})",  # noqa: S608
                REHEARSAL_IDS,
            )
        cursor.execute(
            f"DELETE FROM users_user WHERE id IN (SELECT u.id {unused})",  # noqa: S608
            REHEARSAL_IDS,
        )
        return cursor.rowcount


def discard_rehearsals() -> int:
    """Delete every rehearsal there is, also what a killed one left; return how many drops."""
    drops = list(Drop.objects.filter(pk__range=REHEARSAL_IDS).values_list("pk", flat=True))
    for drop_id in drops:
        discard_rehearsal(drop_id)
    discard_users()
    return len(drops)


@dataclass(frozen=True)
class Rows:
    """What the database has of a rehearsal: the status of each row by its id."""

    drop: Drop
    reservations: dict[str, str]
    purchases: dict[str, str]

    @property
    def held(self) -> int:
        return sum(status == ReservationStatus.ACTIVE for status in self.reservations.values())

    @property
    def sold(self) -> int:
        return sum(status == PurchaseStatus.PAID for status in self.purchases.values())


def read_rows(drop_id: uuid.UUID) -> Rows:
    """Read a rehearsal, of which each row is of one unit."""

    def statuses(model: type[Reservation] | type[Purchase]) -> dict[str, str]:
        rows = model._default_manager.filter(drop=drop_id).values_list("pk", "status")
        return {str(pk): status for pk, status in rows}

    return Rows(Drop.objects.get(pk=drop_id), statuses(Reservation), statuses(Purchase))


def wait_until_settled(drop_id: uuid.UUID, at_most_seconds: float) -> int:
    """Return the drop's newest ``seq`` once nothing of it is held, or time is up."""
    deadline = time.monotonic() + at_most_seconds
    try:
        while True:
            drop = Drop.objects.get(pk=drop_id)
            if not drop.held_stock or time.monotonic() > deadline:
                return drop.seq
            time.sleep(SETTLED_POLL_SECONDS)
    finally:
        connection.close()
