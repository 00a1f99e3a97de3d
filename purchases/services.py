"""Purchase what one holds: only active reservations, only in time, each once."""

import uuid
from collections.abc import Sequence
from copy import copy
from datetime import timedelta

from django.db import transaction
from django.db.models import Case, IntegerField, When
from rest_framework.exceptions import APIException

from drops.exceptions import format_instant, refusal_unless_live
from drops.models import Drop
from drops.services import LockedDrop, lock_drop
from purchases.models import Purchase
from realtime.models import EventType
from reservations.exceptions import (
    ReservationExpired,
    ReservationNotActive,
    ReservationRequired,
)
from reservations.models import Reservation, ReservationStatus
from reservations.services import raise_refusal
from users.exceptions import UnknownUser

FEED_LENGTH = 3


def purchase(drop_id: uuid.UUID, user_id: uuid.UUID) -> Purchase:
    """Purchase what the user holds of the drop.

    Raises:
        Drop.DoesNotExist: no such drop.
        Refusal: why there is no purchase.
    """
    return raise_refusal(purchase_many(drop_id, [user_id])[0])


@transaction.atomic
def purchase_many(
    drop_id: uuid.UUID, user_ids: Sequence[uuid.UUID]
) -> list[Purchase | APIException]:
    """Turn what each user holds of the drop into a purchase, in the order given.

    The deadline is judged by the database's clock, read after the drop's lock was won;
    whether the expiry loop runs makes no difference. A user who has purchased already and
    holds nothing new gets the same purchase again.

    Returns:
        One ``Purchase`` or refusal per user. A new purchase has ``is_new`` set.
    Raises:
        Drop.DoesNotExist: no such drop.
    """
    locked = lock_drop(drop_id)
    latest = latest_reservations(locked.drop, user_ids)
    availability_before = locked.drop.availability
    bought: dict[uuid.UUID, Purchase] = {}
    outcomes: list[Purchase | APIException] = []
    for user_id in user_ids:
        reservation = latest.get(user_id)
        if reservation is None:
            outcomes.append(ReservationRequired())
        elif not reservation.user.is_active:
            outcomes.append(UnknownUser())
        elif user_id in bought:
            outcomes.append(repeat(bought[user_id]))
        elif reservation.status == ReservationStatus.CONSUMED:
            outcomes.append(reservation.purchase)
        elif refusal := refusal_to_sell(locked.drop, reservation):
            outcomes.append(refusal)
        else:
            bought[user_id] = sell(locked, reservation, number=len(bought))
            outcomes.append(bought[user_id])
    if bought:
        store(locked, list(bought.values()))
        if locked.drop.availability != availability_before:
            # The last held unit was sold: what was "may come back" is now "sold out".
            locked.record_stock()
        locked.save(next(iter(bought.values())).created_at)
    return outcomes


def latest_reservations(drop: Drop, user_ids: Sequence[uuid.UUID]) -> dict[uuid.UUID, Reservation]:
    """Return each user's active reservation of the drop, or else the newest one."""
    active_first = Case(
        When(status=ReservationStatus.ACTIVE, then=0), default=1, output_field=IntegerField()
    )
    rows = (
        Reservation.objects.with_clock()
        .filter(drop=drop, user__in=set(user_ids))
        .select_related("user", "purchase")
        .order_by("user_id", active_first, "-created_at")
        .distinct("user_id")
    )
    latest = {row.user_id: row for row in rows}
    # One moment for all of the batch: the rows' own would follow the order of their reading.
    read_at = [row.read_at for row in latest.values()]
    for row in latest.values():
        row.read_at = max(read_at)
    return latest


def refusal_to_sell(drop: Drop, reservation: Reservation) -> APIException | None:
    if reservation.status == ReservationStatus.EXPIRED:
        return ReservationExpired()
    if reservation.is_overdue_at(reservation.read_at):
        return ReservationExpired()
    if reservation.status != ReservationStatus.ACTIVE:
        return ReservationNotActive()
    return refusal_unless_live(drop, reservation.read_at)


def sell(locked: LockedDrop, reservation: Reservation, *, number: int) -> Purchase:
    """Make the purchase in memory and move its units; ``number`` counts within the batch."""
    purchase = Purchase(
        reservation=reservation,
        drop=locked.drop,
        variant_id=reservation.variant_id,
        user=reservation.user,
        quantity=reservation.quantity,
        amount=reservation.unit_price * reservation.quantity,
        currency=reservation.currency,
        # Keeps the order of the batch visible in the feed, which is sorted by time.
        created_at=reservation.read_at + timedelta(microseconds=number),
    )
    purchase.is_new = True
    locked.move(locked.variants[reservation.variant_id], sold=reservation.quantity)
    locked.record(
        EventType.PURCHASE_COMPLETED,
        {
            "dropId": str(locked.drop.pk),
            "username": reservation.user.username,
            "purchasedAt": format_instant(purchase.created_at),
        },
    )
    return purchase


def store(locked: LockedDrop, purchases: list[Purchase]) -> None:
    Reservation.objects.filter(pk__in=[p.reservation_id for p in purchases]).update(
        status=ReservationStatus.CONSUMED
    )
    Purchase.objects.bulk_create(purchases)
    set_feed(locked, [feed_entry(p) for p in reversed(purchases)] + locked.drop.latest_purchasers)


def set_feed(locked: LockedDrop, entries: list[dict]) -> None:
    """Keep the newest entries on the drop's row, where every reader of the drop finds them."""
    drop = locked.drop
    drop.latest_purchasers = entries[:FEED_LENGTH]
    drop.save(update_fields=["latest_purchasers"])
    locked.record(
        EventType.ACTIVITY_UPDATED,
        {
            "dropId": str(drop.pk),
            "latestPurchasers": [
                {
                    "userId": entry["user_id"],
                    "username": entry["username"],
                    "qty": entry["qty"],
                    "createdAt": entry["created_at"],
                }
                for entry in drop.latest_purchasers
            ],
        },
    )


def feed_entry(purchase: Purchase) -> dict:
    """Return a purchase as the activity feed shows it."""
    return {
        "user_id": str(purchase.user_id),
        "username": purchase.user.username,
        "qty": purchase.quantity,
        "created_at": format_instant(purchase.created_at),
    }


def latest_paid(drop: Drop) -> list[Purchase]:
    """Return the drop's latest paid purchases: reads three rows, however many there are."""
    paid = Purchase.objects.filter(drop=drop, status="paid").select_related("user")
    return list(paid.order_by("-created_at")[:FEED_LENGTH])


def repeat(purchase: Purchase) -> Purchase:
    """Return a copy that says it was found, for a second request in the same batch."""
    again = copy(purchase)
    again.is_new = False
    return again
