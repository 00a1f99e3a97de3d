"""Reserve, release and expire: every change of a hold, each with its stock and its events."""

import uuid
from collections.abc import Collection, Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, TypeVar

from django.conf import settings
from django.db import OperationalError, connection, transaction
from django.db.models import (
    Case,
    Count,
    Max,
    Min,
    OuterRef,
    Subquery,
    When,
)
from django.db.models.functions import Now
from psycopg.errors import LockNotAvailable
from rest_framework.exceptions import APIException, ErrorDetail, ValidationError

from config.database import ClockTimestamp, read_clock
from config.ids import new_id
from config.problems import Refusal
from drops.exceptions import format_instant, refusal_unless_live
from drops.models import Drop, Variant
from drops.services import LockedDrop, lock_drop
from realtime.models import EventType
from reservations.exceptions import (
    AlreadyReserved,
    Cooldown,
    FullyReserved,
    LimitExceeded,
    ReservationExpired,
    ReservationNotActive,
    SoldOut,
    TooManyHolds,
    VariantRequired,
)
from reservations.models import Reservation, ReservationStatus
from users.exceptions import UnknownUser
from users.models import User

COLUMNS = [field.attname for field in Reservation._meta.concrete_fields]
# What a user has of a drop: held units and bought ones.
COUNTS_AGAINST_LIMIT = (ReservationStatus.ACTIVE, ReservationStatus.CONSUMED)
# Bounds how long one transaction keeps a drop locked.
MAX_EXPIRED_PER_TRANSACTION = 1000

Settled = TypeVar("Settled")


@dataclass(frozen=True, slots=True)
class Claim:
    """A request to reserve, not yet settled. Without a variant, the drop's only one is meant."""

    user_id: uuid.UUID
    variant_id: uuid.UUID | None = None
    quantity: int = 1


@dataclass(slots=True)
class Share:
    """What one claimant already has of the drop."""

    used: int = 0
    hold: Reservation | None = None
    # Read only where a limit asks for them.
    holds_elsewhere: int = 0
    expired: int = 0
    last_expired_at: datetime | None = None

    def expire_hold(self) -> None:
        """Take note that the hold's time was up."""
        assert self.hold is not None  # noqa: S101
        self.used -= self.hold.quantity
        self.expired += 1
        self.last_expired_at = self.hold.expires_at
        self.hold = None


def reserve(drop_id: uuid.UUID, claim: Claim) -> Reservation:
    """Settle one claim.

    Raises:
        Drop.DoesNotExist: no such drop.
        Refusal: why there is no reservation.
    """
    return raise_refusal(reserve_many(drop_id, [claim])[0])


@transaction.atomic
def reserve_many(drop_id: uuid.UUID, claims: Sequence[Claim]) -> list[Reservation | APIException]:
    """Settle ``claims`` on one drop, first come first served.

    Locks the drop for the whole transaction, so claims on one drop never race. A user
    who already holds the variant gets the same reservation again. When stock is short,
    the drop's overdue holds are returned to it first.

    Returns:
        One ``Reservation`` or refusal per claim, in the order given. A new reservation
        has ``is_new`` set.
    Raises:
        Drop.DoesNotExist: no such drop.
    """
    if settings.MAX_ACTIVE_HOLDS:
        lock_claimants(claims)
    locked = lock_drop(drop_id)
    shares, now = read_shares(locked.drop, claims)
    if settings.MAX_ACTIVE_HOLDS:
        read_holds_elsewhere(locked.drop, shares, now)
    if locked.drop.has_cooldown:
        read_expired_holds(locked.drop, shares)
    settlement = Settlement(locked, shares, now)
    outcomes = [settlement.settle(claim) for claim in claims]
    settlement.save()
    return outcomes


class Settlement:
    """The state of one ``reserve_many``, claim by claim."""

    def __init__(self, locked: LockedDrop, shares: dict[uuid.UUID, Share], now: datetime) -> None:
        self.locked = locked
        self.drop = locked.drop
        self.shares = shares
        self.now = now
        self.refusal = refusal_unless_live(locked.drop, now)
        self.expires_at = now + timedelta(seconds=settings.RESERVATION_TTL_SECONDS)
        if locked.drop.ends_at:
            # Nothing can be bought after the end, so the deadline says so from the start.
            self.expires_at = min(self.expires_at, locked.drop.ends_at)
        self.new: list[Reservation] = []
        self.has_reclaimed = False
        self.next_release_at: datetime | None = None

    def settle(self, claim: Claim) -> Reservation | APIException:
        share = self.shares.get(claim.user_id)
        if share is None:
            return UnknownUser()
        if share.hold is not None and share.hold.is_overdue_at(self.now):
            self.reclaim()
            share.expire_hold()
        try:
            variant = self.variant_of(claim)
            if share.hold is not None:
                return self.repeat(share.hold, variant)
            self.check(claim, share, variant)
        except (Refusal, ValidationError) as refusal:
            return refusal
        reservation = self.hold(claim, variant)
        share.used += claim.quantity
        share.hold = reservation
        return reservation

    def variant_of(self, claim: Claim) -> Variant:
        variants = self.locked.variants
        if claim.variant_id is not None:
            if claim.variant_id in variants:
                return variants[claim.variant_id]
            unknown = ErrorDetail("This drop has no such variant.", "does_not_exist")
            raise ValidationError({"variant": [unknown]})
        if len(variants) > 1:
            raise VariantRequired
        return next(iter(variants.values()))

    def repeat(self, hold: Reservation, variant: Variant) -> Reservation:
        if hold.variant_id != variant.pk:
            raise AlreadyReserved(reservation_id=str(hold.pk))
        # A copy: within one batch the first claim's reservation is new, the second's is not.
        again = copy(hold)
        again.is_new = False
        return again

    def check(self, claim: Claim, share: Share, variant: Variant) -> None:
        if self.refusal:
            raise self.refusal
        limit = self.drop.max_per_user
        if limit is not None and share.used + claim.quantity > limit:
            raise LimitExceeded(limit=limit, used=share.used)
        if variant.available_stock < claim.quantity:
            self.reclaim()
        if variant.available_stock < claim.quantity:
            raise self.shortage(variant)
        # After the stock, which says the same to everybody (see reservations.memory).
        if 0 < settings.MAX_ACTIVE_HOLDS <= share.holds_elsewhere:
            raise TooManyHolds(limit=settings.MAX_ACTIVE_HOLDS, used=share.holds_elsewhere)
        if seconds := self.cooldown_left(share):
            raise Cooldown(seconds)

    def cooldown_left(self, share: Share) -> float:
        """Return for how many seconds the claimant's expired holds still count against them."""
        allowed, seconds = self.drop.max_expired_holds, self.drop.hold_cooldown_seconds
        if not allowed or not seconds or share.expired < allowed or not share.last_expired_at:
            return 0.0
        return max(0.0, seconds - (self.now - share.last_expired_at).total_seconds())

    def hold(self, claim: Claim, variant: Variant) -> Reservation:
        drop = self.drop
        # In the order of the fields, as if it were read: half the time of keywords, and this
        # runs once for each unit that is held.
        values: tuple[Any, ...] = (
            new_id(),
            drop.pk,
            variant.pk,
            claim.user_id,
            claim.quantity,
            drop.price,
            drop.currency,
            ReservationStatus.ACTIVE.value,
            self.now,
            self.expires_at,
        )
        reservation = Reservation.from_db("default", COLUMNS, values)
        reservation.drop = drop
        reservation.read_at = self.now
        reservation.is_new = True
        self.locked.move(variant, available=-claim.quantity)
        self.new.append(reservation)
        return reservation

    def reclaim(self) -> None:
        """Return the drop's overdue holds to stock, once per transaction."""
        if not self.has_reclaimed:
            self.has_reclaimed = True
            expire_overdue(
                self.locked, self.now, MAX_EXPIRED_PER_TRANSACTION, own_first=self.shares
            )

    def shortage(self, variant: Variant) -> Refusal:
        if variant.held_stock and self.next_release_at is None:
            self.next_release_at = next_release_at(self.drop)
        # Holds of this very transaction are not stored yet; they all end at the same time.
        deadlines = [self.next_release_at, self.expires_at if self.new else None]
        return shortage_of(variant, min(filter(None, deadlines), default=None))

    def save(self) -> None:
        if self.new:
            insert_reservations(self.new)
        if self.locked.has_moved:
            self.locked.record_stock()
        self.locked.save(self.now)


def insert_reservations(new: Sequence[Reservation]) -> None:
    """Store new holds of one drop in one statement.

    ``bulk_create`` spends 40 µs of Python on each row, which is most of what a claim costs;
    what a batch has in common is sent once here. See docs/adr/0003.
    """
    first = new[0]
    with connection.cursor() as cursor:
        cursor.execute(
            """
            INSERT INTO reservations_reservation
                (id, user_id, variant_id, quantity,
                 drop_id, unit_price, currency, status, created_at, expires_at)
            SELECT claim.*, %s::uuid, %s::numeric, %s, %s, %s::timestamptz, %s::timestamptz
            FROM unnest(%b::uuid[], %b::uuid[], %b::uuid[], %b::int[]) AS claim
            """,
            [
                first.drop_id,
                first.unit_price,
                first.currency,
                first.status,
                first.created_at,
                first.expires_at,
                [reservation.pk for reservation in new],
                [reservation.user_id for reservation in new],
                [reservation.variant_id for reservation in new],
                [reservation.quantity for reservation in new],
            ],
        )


def next_release_at(drop: Drop) -> datetime | None:
    """Return when the first of the drop's holds ends, if nobody buys it before."""
    holds = Reservation.objects.active().filter(drop=drop)
    return holds.aggregate(first=Min("expires_at"))["first"]


def shortage_of(variant: Variant, next_release_at: datetime | None) -> Refusal:
    """Return how to say that ``variant`` has not as many units available as were asked for."""
    available = variant.available_stock
    if variant.held_stock:
        return FullyReserved(
            available_stock=available, next_release_at=format_instant(next_release_at)
        )
    if available:
        return SoldOut(f"Only {available} left.", available_stock=available)
    return SoldOut(available_stock=0)


def read_shares(drop: Drop, claims: Iterable[Claim]) -> tuple[dict[uuid.UUID, Share], datetime]:
    """Return what the claimants have of ``drop``, and the time by the database's clock.

    Unknown and inactive users are not among the shares.
    """
    shares: dict[uuid.UUID, Share] = {}
    now = None
    with connection.cursor() as cursor:
        # One row per claimant and reservation, and at least one per claimant, so the clock
        # of this statement, which runs after the lock was won, is there as a rule. OFFSET 0
        # keeps the look-up per user in the index: as a plain join, and before the first
        # ANALYZE of a new drop, PostgreSQL reads all of its reservations for each batch.
        cursor.execute(
            """
            SELECT claimant.id, clock_timestamp(), mine.*
            FROM users_user AS claimant
            LEFT JOIN LATERAL (
                SELECT id, status, variant_id, quantity, unit_price, currency,
                       created_at, expires_at
                FROM reservations_reservation
                WHERE user_id = claimant.id AND drop_id = %s AND status = ANY(%s)
                OFFSET 0
            ) AS mine ON true
            WHERE claimant.id = ANY(%b::uuid[]) AND claimant.is_active
            """,
            [drop.pk, list(COUNTS_AGAINST_LIMIT), list({claim.user_id for claim in claims})],
        )
        for user_id, now, *reservation in cursor:
            share = shares.setdefault(user_id, Share())
            pk, status, variant_id, quantity, price, currency, made, ends = reservation
            if pk is None:
                continue
            share.used += quantity
            if status == ReservationStatus.ACTIVE:
                share.hold = Reservation(
                    pk=pk,
                    drop=drop,
                    variant_id=variant_id,
                    user_id=user_id,
                    quantity=quantity,
                    unit_price=price,
                    currency=currency,
                    status=status,
                    created_at=made,
                    expires_at=ends,
                )
                share.hold.read_at = now
    return shares, now or read_clock()


def lock_claimants(claims: Iterable[Claim]) -> None:
    """Let nobody else reserve for these users until the end of the transaction.

    Without that, two drops could each count a hold less than the user will have. Taken
    before any drop's lock, and by id, so that nobody waits in a circle (docs/adr/0011).
    """
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT FROM users_user WHERE id = ANY(%b::uuid[]) ORDER BY id FOR NO KEY UPDATE",
            [list({claim.user_id for claim in claims})],
        )


def read_holds_elsewhere(drop: Drop, shares: dict[uuid.UUID, Share], now: datetime) -> None:
    """Add to ``shares`` how many holds the claimants have on other drops."""
    holds = (
        Reservation.objects.active()
        .filter(user__in=list(shares), expires_at__gt=now)
        .exclude(drop=drop)
        .order_by()
    )
    for row in holds.values("user_id").annotate(count=Count("pk")):
        shares[row["user_id"]].holds_elsewhere = row["count"]


def read_expired_holds(drop: Drop, shares: dict[uuid.UUID, Share]) -> None:
    """Add to ``shares`` how many holds of ``drop`` the claimants let expire, and the last time."""
    expired = Reservation.objects.filter(
        drop=drop, user__in=list(shares), status=ReservationStatus.EXPIRED
    ).order_by()
    for row in expired.values("user_id").annotate(count=Count("pk"), last=Max("expires_at")):
        share = shares[row["user_id"]]
        share.expired, share.last_expired_at = row["count"], row["last"]


def release(reservation_id: uuid.UUID, user: User) -> Reservation:
    """Give up a hold of ``user``: its units are available again.

    Raises:
        Reservation.DoesNotExist: no such reservation of this user.
        ReservationExpired, ReservationNotActive: there is nothing left to give up.
    """
    return _end_hold(reservation_id, ReservationStatus.RELEASED, user_id=user.pk)


@transaction.atomic
def _end_hold(
    reservation_id: uuid.UUID, status: ReservationStatus, **owner: uuid.UUID
) -> Reservation:
    # Which drop to lock first never changes, so it may be read without a lock.
    drop_id = Reservation.objects.values_list("drop_id", flat=True).get(pk=reservation_id, **owner)
    locked = lock_drop(drop_id)
    reservation = (
        Reservation.objects.with_clock().select_for_update(no_key=True).get(pk=reservation_id)
    )
    now = reservation.read_at
    if reservation.status == ReservationStatus.EXPIRED or reservation.is_overdue_at(now):
        raise ReservationExpired
    if reservation.status != ReservationStatus.ACTIVE:
        raise ReservationNotActive
    reservation.status = status
    reservation.save(update_fields=["status"])
    reservation.drop = locked.drop
    locked.move(locked.variants[reservation.variant_id], available=reservation.quantity)
    locked.record_stock()
    locked.save(now)
    return reservation


def expire_overdue(
    locked: LockedDrop, now: datetime, limit: int, own_first: Collection[uuid.UUID] = ()
) -> list[uuid.UUID]:
    """Return at most ``limit`` overdue holds of a locked drop to its stock.

    Those of the users ``own_first`` come before the others': who claims anew must not find
    the old hold still active behind a long backlog. The caller saves ``locked``.

    Returns:
        The ids of the reservations that expired.
    """
    is_own = [Case(When(user__in=list(own_first), then=0), default=1)] if own_first else []
    overdue = list(
        Reservation.objects.overdue(now)
        .filter(drop=locked.drop)
        # Whoever holds one of these rows is about to settle it; the drop's lock makes
        # that impossible within the project, and a foreign lock must not stop the rest.
        .select_for_update(skip_locked=True, no_key=True)
        .order_by(*is_own, "expires_at", "pk")
        .values_list("pk", "variant_id", "quantity")[:limit]
    )
    ids = [pk for pk, _, _ in overdue]
    if ids:
        Reservation.objects.filter(pk__in=ids).update(status=ReservationStatus.EXPIRED)
    for pk, variant_id, quantity in overdue:
        locked.move(locked.variants[variant_id], available=quantity)
        locked.record(
            EventType.RESERVATION_EXPIRED,
            {"dropId": str(locked.drop.pk), "reservationId": str(pk)},
        )
    return ids


@dataclass(frozen=True, slots=True)
class ExpiredHolds:
    """What one sweep returned to a drop's stock."""

    drop_id: uuid.UUID
    available_stock: int
    reservation_ids: list[uuid.UUID]


def expire_due(batch: int = MAX_EXPIRED_PER_TRANSACTION) -> list[ExpiredHolds]:
    """Expire overdue holds: of each drop at most ``batch``, in a transaction per drop.

    Any number may run at once; each hold expires once. A drop that somebody keeps locked
    is left for the next call.
    """
    swept = []
    for drop_id in (
        Drop.objects.annotate(due_at=_first_deadline())
        .filter(due_at__lte=Now())
        .order_by("due_at")
        .values_list("pk", flat=True)
    ):
        try:
            swept.append(_expire_drop(drop_id, batch))
        except OperationalError as exc:
            if not isinstance(exc.__cause__, LockNotAvailable):
                raise
    return [holds for holds in swept if holds.reservation_ids]


def expire_all_due(batch: int = MAX_EXPIRED_PER_TRANSACTION) -> list[ExpiredHolds]:
    """Expire every overdue hold there is, batch after batch."""
    swept: list[ExpiredHolds] = []
    while more := expire_due(batch):
        swept += more
    return swept


@transaction.atomic
def _expire_drop(drop_id: uuid.UUID, batch: int) -> ExpiredHolds:
    # Waits for the drop like everybody else: with skip_locked a crowd of buyers, who keep
    # the row locked without a pause, would starve the holds that should come back to them.
    locked = lock_drop(drop_id)
    now = read_clock()
    ids = expire_overdue(locked, now, batch)
    if ids:
        locked.record_stock()
        locked.save(now)
    return ExpiredHolds(drop_id, locked.drop.available_stock, ids)


def seconds_until_next_deadline() -> float | None:
    """Return how long until the next active hold is due (0 if overdue), None without holds."""
    next_deadline = (
        Drop.objects.annotate(due_at=_first_deadline())
        .filter(due_at__isnull=False)
        .aggregate(first=Min("due_at"), now=Max(ClockTimestamp()))
    )
    if next_deadline["first"] is None:
        return None
    return max(0.0, (next_deadline["first"] - next_deadline["now"]).total_seconds())


def _first_deadline() -> Subquery:
    """Return the drop's first deadline: one step in the index of active holds per drop."""
    return Subquery(
        Reservation.objects.active()
        .filter(drop=OuterRef("pk"))
        .order_by("expires_at")
        .values("expires_at")[:1]
    )


def raise_refusal(outcome: "Settled | APIException") -> "Settled":
    """Return ``outcome``, or raise it where it is a refusal."""
    if isinstance(outcome, APIException):
        raise outcome
    return outcome
