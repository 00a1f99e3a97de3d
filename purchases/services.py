"""Purchase what one holds: only active reservations, only in time, each once; and refund it."""

import uuid
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from datetime import timedelta
from functools import partial
from typing import Any

from django.db import connection, transaction
from rest_framework.exceptions import APIException

from config.database import Statement, read_clock
from config.ids import new_id
from drops.exceptions import format_instant, refusal_unless_live
from drops.models import Drop, StockAdjustment
from drops.services import LockedDrop, Wait, lock_drop, lock_drops, save_drops
from operations import metrics
from purchases.exceptions import AlreadyRefunded
from purchases.models import Purchase, PurchaseStatus
from realtime.models import EventType
from reservations.exceptions import (
    ReservationExpired,
    ReservationNotActive,
    ReservationRequired,
)
from reservations.models import Reservation, ReservationStatus
from reservations.services import raise_refusal, set_status
from users.exceptions import UnknownUser
from users.identity import public_id
from users.models import User

RESERVATION_COLUMNS = [field.attname for field in Reservation._meta.concrete_fields]
COLUMNS = [field.attname for field in Purchase._meta.concrete_fields]
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
    outcomes = purchase_on_drops({drop_id: user_ids})
    if drop_id not in outcomes:
        raise Drop.DoesNotExist
    return outcomes[drop_id]


# A savepoint in the caller's transaction would be two more round trips, for nothing.
@transaction.atomic(savepoint=False)
def purchase_on_drops(
    user_ids: Mapping[uuid.UUID, Sequence[uuid.UUID]], *, wait: Wait = Wait.AS_LONG_AS_IT_TAKES
) -> dict[uuid.UUID, list[Purchase | APIException]]:
    """Sell what users hold of several drops, of each drop as ``purchase_many`` does.

    Left out are drops that don't exist and, with ``Wait.NOT``, those that somebody else keeps
    locked.
    """
    locked_drops = lock_drops(user_ids, wait)
    latest = latest_reservations((pk, user_id) for pk in locked_drops for user_id in user_ids[pk])
    outcomes = {}
    bought: list[Purchase] = []
    for pk, locked in locked_drops.items():
        availability_before = locked.drop.availability
        outcomes[pk], new = _sell_to(locked, user_ids[pk], latest)
        if new:
            bought += new
            newest_first = list(reversed(new[-FEED_LENGTH:]))
            set_feed(locked, [feed_entry(p) for p in newest_first] + locked.drop.latest_purchasers)
            if locked.drop.availability != availability_before:
                # The last held unit was sold: what was "may come back" is now "sold out".
                locked.record_stock()
    if bought:
        save_drops(locked_drops.values(), bought[0].created_at, insert_purchases(bought))
        ages = [(sold.created_at - sold.reservation.created_at).total_seconds() for sold in bought]
        transaction.on_commit(partial(metrics.hold_age_seconds.of("purchase").observe_all, ages))
    return outcomes


def _sell_to(
    locked: LockedDrop,
    user_ids: Sequence[uuid.UUID],
    latest: Mapping[tuple[uuid.UUID, uuid.UUID], Reservation | None],
) -> tuple[list[Purchase | APIException], list[Purchase]]:
    """Return one outcome per user, and the new purchases among them; nothing is stored yet."""
    bought: dict[uuid.UUID, Purchase] = {}
    outcomes: list[Purchase | APIException] = []
    for user_id in user_ids:
        reservation = latest.get((locked.drop.pk, user_id))
        if (locked.drop.pk, user_id) not in latest:
            outcomes.append(UnknownUser())
        elif reservation is None:
            outcomes.append(ReservationRequired())
        elif user_id in bought:
            outcomes.append(repeat(bought[user_id]))
        elif earlier := earlier_purchase(reservation):
            outcomes.append(earlier)
        elif refusal := refusal_to_sell(locked.drop, reservation):
            outcomes.append(refusal)
        else:
            bought[user_id] = sell(locked, reservation, number=len(bought))
            outcomes.append(bought[user_id])
    return outcomes, list(bought.values())


def latest_reservations(
    asked: Iterable[tuple[uuid.UUID, uuid.UUID]],
) -> dict[tuple[uuid.UUID, uuid.UUID], Reservation | None]:
    """Return, by drop and user, the active reservation, or else the newest one, if any.

    Unknown and inactive users are left out. All rows have the same ``read_at``.
    """
    pairs = list(set(asked))
    columns = ", ".join(f"mine.{column}" for column in RESERVATION_COLUMNS)
    with connection.cursor() as cursor:
        # The first row is the clock, as in reservations.services.read_shares; LIMIT 1 within
        # the lateral join keeps the look-up per user in the index.
        cursor.execute(
            f"""
            SELECT NULL, clock_timestamp(), NULL, {", ".join(["NULL"] * len(RESERVATION_COLUMNS))}
            UNION ALL
            SELECT asked.number, NULL, buyer.username, {columns}
            FROM unnest(%b::uuid[], %b::uuid[])
                WITH ORDINALITY AS asked(drop_id, user_id, number)
            JOIN users_user AS buyer ON buyer.id = asked.user_id AND buyer.is_active
            LEFT JOIN LATERAL (
                SELECT *
                FROM reservations_reservation
                WHERE user_id = asked.user_id AND drop_id = asked.drop_id
                ORDER BY status <> %s, created_at DESC
                LIMIT 1
            ) AS mine ON true
            """,  # noqa: S608 - the columns are the model's own
            [
                [drop_id for drop_id, _ in pairs],
                [user_id for _, user_id in pairs],
                ReservationStatus.ACTIVE,
            ],
        )
        now = cursor.fetchone()[1]
        rows = cursor.fetchall()
    latest: dict[tuple[uuid.UUID, uuid.UUID], Reservation | None] = {}
    for number, _, username, *values in rows:
        drop_id, user_id = pairs[number - 1]
        latest[drop_id, user_id] = None
        if values[0] is not None:
            reservation = Reservation.from_db("default", RESERVATION_COLUMNS, values)
            reservation.user = User(pk=user_id, username=username)
            reservation.read_at = now
            latest[drop_id, user_id] = reservation
    return latest


def earlier_purchase(reservation: Reservation) -> Purchase | None:
    """Return the purchase that consumed ``reservation``, even if it was refunded since."""
    if reservation.status not in (ReservationStatus.CONSUMED, ReservationStatus.VOIDED):
        return None
    return Purchase.objects.filter(reservation=reservation).first()


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
    # Keeps the order of the batch visible in the feed, which is sorted by time.
    now = reservation.read_at + timedelta(microseconds=number)
    values: tuple[Any, ...] = (
        new_id(),
        reservation.pk,
        locked.drop.pk,
        reservation.variant_id,
        reservation.user_id,
        reservation.quantity,
        reservation.unit_price * reservation.quantity,
        reservation.currency,
        PurchaseStatus.PAID.value,
        now,
    )
    # In the order of the fields, as if it were read; see reservations.services.
    purchase = Purchase.from_db("default", COLUMNS, values)
    purchase.reservation = reservation
    purchase.user = reservation.user
    purchase.is_new = True
    locked.move(locked.variants[reservation.variant_id], sold=reservation.quantity)
    locked.record(
        EventType.PURCHASE_COMPLETED,
        {
            "dropId": str(locked.drop.pk),
            "username": reservation.user.username,
            "purchasedAt": format_instant(purchase.created_at),
            "qty": purchase.quantity,
        },
    )
    return purchase


def insert_purchases(purchases: Sequence[Purchase]) -> list[Statement]:
    """Return how to store the purchases, and that their reservations are consumed."""
    return [
        Statement(
            """
            INSERT INTO purchases_purchase
                (status, id, reservation_id, drop_id, variant_id, user_id, quantity,
                 amount, currency, created_at)
            SELECT %s, bought.*
            FROM unnest(%b::uuid[], %b::uuid[], %b::uuid[], %b::uuid[], %b::uuid[], %b::int[],
                        %s::numeric[], %s::text[], %s::timestamptz[]) AS bought
            """,
            [
                PurchaseStatus.PAID,
                [purchase.pk for purchase in purchases],
                [purchase.reservation_id for purchase in purchases],
                [purchase.drop_id for purchase in purchases],
                [purchase.variant_id for purchase in purchases],
                [purchase.user_id for purchase in purchases],
                [purchase.quantity for purchase in purchases],
                [purchase.amount for purchase in purchases],
                [purchase.currency for purchase in purchases],
                [purchase.created_at for purchase in purchases],
            ],
        ),
        Statement(
            "UPDATE reservations_reservation SET status = %s WHERE id = ANY(%b::uuid[])",
            [ReservationStatus.CONSUMED, [purchase.reservation_id for purchase in purchases]],
        ),
    ]


@transaction.atomic
def refund_purchase(purchase_id: uuid.UUID, *, restock: bool, reason: str, user: User) -> Purchase:
    """Take a purchase back; it no longer counts against its buyer's limit.

    With ``restock`` its units are available again. Without, they are gone: the total
    shrinks by them, and an adjustment says by whom and why.

    Raises:
        Purchase.DoesNotExist: no such purchase.
        AlreadyRefunded: there is nothing left to refund.
    """
    # Which drop to lock first never changes, so it may be read without a lock.
    drop_id = Purchase.objects.values_list("drop_id", flat=True).get(pk=purchase_id)
    locked = lock_drop(drop_id)
    refunded = refund(locked, restock, reason, user, pk=purchase_id)
    if not refunded:
        raise AlreadyRefunded
    return refunded[0]


@transaction.atomic
def refund_all(drop_id: uuid.UUID, *, restock: bool, reason: str, user: User) -> list[Purchase]:
    """Take back every paid purchase of a drop, as ``refund_purchase`` does with one.

    Raises:
        Drop.DoesNotExist: no such drop.
    """
    return refund(lock_drop(drop_id), restock, reason, user)


def refund(
    locked: LockedDrop, restock: bool, reason: str, user: User, **which: uuid.UUID
) -> list[Purchase]:
    """Refund the paid purchases ``which`` of a locked drop, and save it."""
    paid = Purchase.objects.filter(drop=locked.drop, status=PurchaseStatus.PAID, **which)
    purchases = list(paid.select_for_update(no_key=True).order_by("pk"))
    if not purchases:
        return []
    with connection.cursor() as cursor:
        # As one array: the ORM sends a parameter per id, of which there can't be 65,536.
        cursor.execute(
            "UPDATE purchases_purchase SET status = %s WHERE id = ANY(%b::uuid[])",
            [PurchaseStatus.REFUNDED, [purchase.pk for purchase in purchases]],
        )
    # Only consumed reservations count against the limit: what each claim reads need not
    # know of refunds.
    set_status([purchase.reservation_id for purchase in purchases], ReservationStatus.VOIDED)
    units: dict[uuid.UUID, int] = {}
    for purchase in purchases:
        purchase.status = PurchaseStatus.REFUNDED
        units[purchase.variant_id] = units.get(purchase.variant_id, 0) + purchase.quantity
    for variant_id, quantity in units.items():
        back = {"available": quantity} if restock else {"total": -quantity}
        locked.move(locked.variants[variant_id], sold=-quantity, **back)
    if not restock:
        StockAdjustment.objects.bulk_create(
            StockAdjustment(variant_id=variant_id, delta=-quantity, reason=reason, created_by=user)
            for variant_id, quantity in units.items()
        )
    feed = [feed_entry(purchase) for purchase in latest_paid(locked.drop)]
    if feed != locked.drop.latest_purchasers:
        set_feed(locked, feed)
    locked.record_stock()
    if not restock:
        # The total is not among what STOCK_UPDATED tells.
        locked.record_drop(EventType.DROP_UPDATED)
    locked.save(read_clock())
    return purchases


def set_feed(locked: LockedDrop, entries: list[dict]) -> None:
    """Show the newest of ``entries`` in the drop's activity feed."""
    locked.show_purchasers(entries[:FEED_LENGTH])
    locked.record(
        EventType.ACTIVITY_UPDATED,
        {
            "dropId": str(locked.drop.pk),
            "latestPurchasers": [
                {
                    "userId": public_id(entry["user_id"]),
                    "username": entry["username"],
                    "qty": entry["qty"],
                    "createdAt": entry["created_at"],
                }
                for entry in locked.drop.latest_purchasers
            ],
            "soldStock": locked.drop.sold_stock,
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
    paid = Purchase.objects.filter(drop=drop, status=PurchaseStatus.PAID).select_related("user")
    return list(paid.order_by("-created_at")[:FEED_LENGTH])


def repeat(purchase: Purchase) -> Purchase:
    """Return a copy that says it was found, for a second request in the same batch."""
    again = copy(purchase)
    again.is_new = False
    return again
