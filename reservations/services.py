"""Reserve, release and expire: every change of a hold, each with its stock and its events."""

import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache, partial
from typing import Any, TypeVar

from django.conf import settings
from django.db import IntegrityError, OperationalError, connection, transaction
from django.db.models import (
    Count,
    Field,
    Func,
    Max,
    Min,
    OuterRef,
    Subquery,
    TextField,
)
from django.db.models.base import ModelState
from django.db.models.functions import Cast, Now
from psycopg.errors import LockNotAvailable
from rest_framework.exceptions import APIException, ErrorDetail, ValidationError

from config.database import ClockTimestamp, Statement, read_clock
from config.ids import new_id
from config.problems import Refusal
from drops.exceptions import format_instant, refusal_unless_live
from drops.models import Drop, DropStatus, Variant
from drops.services import (
    BRIEF_WAIT_MS,
    LockedDrop,
    Wait,
    change_drop,
    lock_drop,
    lock_drops,
    save_drops,
)
from operations import metrics
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

logger = logging.getLogger(__name__)

# What a user has of a drop: held units and bought ones.
COUNTS_AGAINST_LIMIT = (ReservationStatus.ACTIVE, ReservationStatus.CONSUMED)
# Bounds how long one transaction keeps a drop locked.
MAX_EXPIRED_PER_TRANSACTION = 400

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
    # Read only where a drop has a cooldown.
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
    outcomes = reserve_on_drops({drop_id: claims})
    if drop_id not in outcomes:
        raise Drop.DoesNotExist
    return outcomes[drop_id]


# A savepoint in the caller's transaction would be two more round trips, for nothing.
@transaction.atomic(savepoint=False)
def reserve_on_drops(
    claims: Mapping[uuid.UUID, Sequence[Claim]], *, wait: Wait = Wait.AS_LONG_AS_IT_TAKES
) -> dict[uuid.UUID, list[Reservation | APIException]]:
    """Settle claims on several drops in one transaction, each drop's as ``reserve_many`` does.

    Left out are drops that don't exist and, with ``Wait.NOT``, those that somebody else keeps
    locked, or one of their claimants.
    """
    if settings.MAX_ACTIVE_HOLDS:
        busy = lock_claimants({claim.user_id for of in claims.values() for claim in of}, wait)
        if busy:
            claims = {
                drop_id: of_drop
                for drop_id, of_drop in claims.items()
                if busy.isdisjoint(claim.user_id for claim in of_drop)
            }
    locked_drops = lock_drops(claims, wait)
    shares, now = read_shares(
        (locked.drop, claim) for pk, locked in locked_drops.items() for claim in claims[pk]
    )
    active_holds = read_active_holds(shares, now) if settings.MAX_ACTIVE_HOLDS else Counter()
    for pk, locked in locked_drops.items():
        if locked.drop.has_cooldown:
            read_expired_holds(locked.drop, shares.get(pk, {}))
    settlements = {
        pk: Settlement(locked, shares.get(pk, {}), now, active_holds)
        for pk, locked in locked_drops.items()
    }
    outcomes = {
        pk: [settlement.settle(claim) for claim in claims[pk]]
        for pk, settlement in settlements.items()
    }
    for locked in locked_drops.values():
        if locked.has_moved:
            locked.record_stock()
    new = [settlement.new for settlement in settlements.values() if settlement.new]
    save_drops(locked_drops.values(), now, [insert_reservations(new)] if new else [])
    return outcomes


class Settlement:
    """The state of one ``reserve_many``, claim by claim."""

    def __init__(
        self,
        locked: LockedDrop,
        shares: dict[uuid.UUID, Share],
        now: datetime,
        active_holds: Counter[uuid.UUID],
    ) -> None:
        self.locked = locked
        self.drop = locked.drop
        self.shares = shares
        self.now = now
        # Of each claimant over all drops, those of this transaction included; counted only
        # where that is limited.
        self.active_holds = active_holds
        self.refusal = refusal_unless_live(locked.drop, now)
        seconds = locked.drop.hold_seconds or settings.RESERVATION_TTL_SECONDS
        self.expires_at = now + timedelta(seconds=seconds)
        if locked.drop.ends_at:
            # Nothing can be bought after the end, so the deadline says so from the start.
            self.expires_at = min(self.expires_at, locked.drop.ends_at)
        self.new: list[Reservation] = []
        self.has_reclaimed = False
        # Sizes of which more may be overdue than was returned.
        self.backlog: set[uuid.UUID] = set()
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
        self.active_holds[claim.user_id] += 1
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
            self.reclaim_size(variant)
        if variant.available_stock < claim.quantity:
            raise self.shortage(variant)
        # After the stock, which says the same to everybody (see reservations.memory).
        holds = self.active_holds[claim.user_id]
        if 0 < settings.MAX_ACTIVE_HOLDS <= holds:
            raise TooManyHolds(limit=settings.MAX_ACTIVE_HOLDS, used=holds)
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
        # As pickle makes one: a fifth of what keywords cost, once for each unit that is held.
        reservation = Reservation.__new__(Reservation)
        reservation._state = ModelState()
        reservation._state.adding = False
        reservation._state.db = "default"
        reservation._state.fields_cache = {"drop": drop}
        reservation.__dict__.update(
            id=new_id(),
            drop_id=drop.pk,
            variant_id=variant.pk,
            user_id=claim.user_id,
            quantity=claim.quantity,
            unit_price=drop.price,
            currency=drop.currency,
            status=ReservationStatus.ACTIVE.value,
            created_at=self.now,
            expires_at=self.expires_at,
            read_at=self.now,
            is_new=True,
        )
        self.locked.move(variant, available=-claim.quantity)
        self.new.append(reservation)
        return reservation

    def reclaim(self) -> None:
        """Return the drop's overdue holds to stock, once per transaction."""
        if not self.has_reclaimed:
            self.has_reclaimed = True
            limit = MAX_EXPIRED_PER_TRANSACTION
            expired = expire_overdue(self.locked, self.now, limit, own_first=self.shares)
            if len(expired) >= limit:
                self.backlog.update(self.locked.variants)

    def reclaim_size(self, variant: Variant) -> None:
        """Return overdue holds of this very size, where others' came first until the limit."""
        if variant.pk in self.backlog:
            self.backlog.remove(variant.pk)
            expire_overdue(self.locked, self.now, MAX_EXPIRED_PER_TRANSACTION, variant=variant)

    def shortage(self, variant: Variant) -> Refusal:
        if variant.held_stock and self.next_release_at is None:
            self.next_release_at = next_release_at(self.drop)
        # Holds of this very transaction are not stored yet; they all end at the same time.
        deadlines = [self.next_release_at, self.expires_at if self.new else None]
        return shortage_of(variant, min(filter(None, deadlines), default=None))


def insert_reservations(new: Sequence[Sequence[Reservation]]) -> Statement:
    """Return how to store new holds, a list per drop, all made at the same moment.

    ``bulk_create`` spends 40 µs of Python on each row, which is most of what a claim costs;
    what the holds of a drop have in common is sent once here. See docs/adr/0003.
    """
    holds = [(number, hold) for number, of_drop in enumerate(new, 1) for hold in of_drop]
    firsts = [of_drop[0] for of_drop in new]
    return Statement(
        """
        INSERT INTO reservations_reservation
            (id, user_id, variant_id, quantity,
             drop_id, unit_price, currency, expires_at, status, created_at)
        SELECT hold.id, hold.user_id, hold.variant_id, hold.quantity,
               common.drop_id, common.unit_price, common.currency, common.expires_at, %s, %s
        FROM unnest(%b::int[], %b::uuid[], %b::uuid[], %b::uuid[], %b::int[])
            AS hold(number, id, user_id, variant_id, quantity)
        JOIN unnest(%b::uuid[], %s::numeric[], %s::text[], %s::timestamptz[])
            WITH ORDINALITY AS common(drop_id, unit_price, currency, expires_at, number)
            USING (number)
        """,
        [
            firsts[0].status,
            firsts[0].created_at,
            [number for number, _ in holds],
            [hold.id for _, hold in holds],
            [hold.user_id for _, hold in holds],
            [hold.variant_id for _, hold in holds],
            [hold.quantity for _, hold in holds],
            [first.drop_id for first in firsts],
            [first.unit_price for first in firsts],
            [first.currency for first in firsts],
            [first.expires_at for first in firsts],
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


def read_shares(
    claims: Iterable[tuple[Drop, Claim]],
) -> tuple[dict[uuid.UUID, dict[uuid.UUID, Share]], datetime]:
    """Return what the claimants have of each drop, by user, and the time by the database's clock.

    Unknown and inactive users are not among the shares.
    """
    asked = list({(drop.pk, claim.user_id): drop for drop, claim in claims}.items())
    shares: dict[uuid.UUID, dict[uuid.UUID, Share]] = {}
    with connection.cursor() as cursor:
        # The first row is the clock, which runs after the lock was won; then one row per
        # claimant and reservation, and at least one per claimant. OFFSET 0 keeps the look-up
        # per user in the index: as a plain join, and before the first ANALYZE of a new drop,
        # PostgreSQL reads all of its reservations for each batch.
        cursor.execute(
            """
            SELECT NULL, clock_timestamp(), NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL
            UNION ALL
            SELECT asked.number, NULL, mine.*
            FROM unnest(%b::uuid[], %b::uuid[])
                WITH ORDINALITY AS asked(drop_id, user_id, number)
            JOIN users_user AS claimant ON claimant.id = asked.user_id AND claimant.is_active
            LEFT JOIN LATERAL (
                SELECT id, status, variant_id, quantity, unit_price, currency,
                       created_at, expires_at
                FROM reservations_reservation
                WHERE user_id = asked.user_id AND drop_id = asked.drop_id AND status = ANY(%s)
                OFFSET 0
            ) AS mine ON true
            """,
            [
                [drop_id for (drop_id, _), _ in asked],
                [user_id for (_, user_id), _ in asked],
                list(COUNTS_AGAINST_LIMIT),
            ],
        )
        now: datetime = cursor.fetchone()[1]
        for number, _, pk, status, variant_id, quantity, price, currency, made, ends in cursor:
            (drop_id, user_id), drop = asked[number - 1]
            share = shares.setdefault(drop_id, {}).setdefault(user_id, Share())
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
    return shares, now


def lock_claimants(users: set[uuid.UUID], wait: Wait) -> set[uuid.UUID]:
    """Let nobody else reserve for ``users`` until the end of the transaction.

    Without that, two drops could each count a hold less than the user will have. Taken
    before any drop's lock, and by id, so that nobody waits in a circle (docs/adr/0011).

    Returns:
        With ``Wait.NOT``, those whom somebody else keeps locked.
    Raises:
        OperationalError: by ``LockNotAvailable``, with ``Wait.BRIEFLY``: one is kept locked.
    """
    with connection.cursor() as cursor:
        if wait is Wait.BRIEFLY:
            cursor.execute(f"SET LOCAL lock_timeout = {BRIEF_WAIT_MS}")
        skip = "SKIP LOCKED" if wait is Wait.NOT else ""
        cursor.execute(
            f"""
            SELECT id FROM users_user WHERE id = ANY(%b::uuid[])
            ORDER BY id FOR NO KEY UPDATE {skip}
            """,  # noqa: S608 - one of two constants
            [list(users)],
        )
        missing = users - {pk for (pk,) in cursor.fetchall()}
        if wait is not Wait.NOT or not missing:
            return set()
        # Those who don't exist need no lock.
        cursor.execute("SELECT id FROM users_user WHERE id = ANY(%b::uuid[])", [list(missing)])
        return {pk for (pk,) in cursor.fetchall()}


def read_active_holds(
    shares: Mapping[uuid.UUID, Mapping[uuid.UUID, Share]], now: datetime
) -> Counter[uuid.UUID]:
    """Return how many holds the claimants have, over all drops."""
    users = {user_id for of_drop in shares.values() for user_id in of_drop}
    holds = Reservation.objects.active().filter(user__in=users, expires_at__gt=now).order_by()
    rows = holds.values_list("user_id").annotate(count=Count("pk"))
    return Counter(dict(rows))


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


def void_reservation(reservation_id: uuid.UUID) -> Reservation:
    """Take a hold back from its user, who is told: its units are available again.

    Raises:
        Reservation.DoesNotExist: no such reservation.
        ReservationExpired, ReservationNotActive: there is nothing left to take back.
    """
    return _end_hold(reservation_id, ReservationStatus.VOIDED)


@transaction.atomic
def cancel_drop(drop_id: uuid.UUID) -> int:
    """Cancel a drop and void what is held of it; what was purchased stays purchased.

    One transaction, however many holds: nobody waits for a drop that is cancelled. That
    its holds are void follows from the drop's own event, so there is none for each.

    Returns:
        How many holds were voided.
    Raises:
        Drop.DoesNotExist: no such drop.
        ValidationError: it is cancelled already.
    """
    locked = lock_drop(drop_id)
    now = read_clock()
    if locked.drop.status == DropStatus.CANCELLED:
        error = ErrorDetail("This drop is cancelled already.", "not_allowed")
        raise ValidationError({"status": [error]})
    holds = list(
        Reservation.objects.active()
        .filter(drop=locked.drop)
        .select_for_update(no_key=True)
        .order_by("pk")
    )
    set_status([hold.pk for hold in holds], ReservationStatus.VOIDED)
    for hold in holds:
        locked.move(locked.variants[hold.variant_id], available=hold.quantity)
    if holds:
        locked.record_stock()
    change_drop(locked, {"status": DropStatus.CANCELLED}, now)
    locked.save(now)
    return len(holds)


def set_status(reservation_ids: Sequence[uuid.UUID], status: ReservationStatus) -> None:
    """Change reservations that are locked, or whose drop is."""
    with connection.cursor() as cursor:
        # As one array: the ORM sends a parameter per id, of which there can't be 65,536.
        cursor.execute(
            "UPDATE reservations_reservation SET status = %s WHERE id = ANY(%b::uuid[])",
            [status, list(reservation_ids)],
        )


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
    locked: LockedDrop,
    now: datetime,
    limit: int,
    own_first: Collection[uuid.UUID] = (),
    variant: Variant | None = None,
) -> list[str]:
    """Return about ``limit`` overdue holds of a locked drop, or of one size, to its stock.

    Those of the users ``own_first`` all come first: who claims anew must not find the old
    hold still active behind a long backlog. The caller saves ``locked``.

    Returns:
        The ids of the reservations that expired, as texts.
    """
    holds = _locked_holds().overdue(now).filter(drop=locked.drop)
    if variant is not None:
        holds = holds.filter(variant=variant)
    own = list(holds.filter(user__in=own_first)) if own_first else []
    others = holds.exclude(pk__in=[pk for pk, *_ in own]) if own else holds
    overdue = own + list(others[: max(0, limit - len(own))])
    if not overdue:
        return []
    ids, variant_ids, quantities, created_at, expires_at = zip(*overdue, strict=True)
    with connection.cursor() as cursor:
        # As one text: the ORM sends, and PostgreSQL plans, a parameter per id.
        cursor.execute(
            "UPDATE reservations_reservation SET status = %s WHERE id = ANY(%s::uuid[])",
            [ReservationStatus.EXPIRED, f"{{{','.join(ids)}}}"],
        )
    at = now.timestamp()
    ages = [at - one for one in created_at]
    delays = [at - one for one in expires_at]
    transaction.on_commit(partial(measure_expired, ages, delays))
    drop_id = str(locked.drop.pk)
    locked.record_all(
        EventType.RESERVATION_EXPIRED,
        [{"dropId": drop_id, "reservationId": pk} for pk in ids],
    )
    units: Counter[uuid.UUID] = Counter()
    for variant_id, quantity in zip(variant_ids, quantities, strict=True):
        units[variant_id] += quantity
    for variant_id, quantity in units.items():
        locked.move(locked.variants[variant_id], available=quantity)
    return list(ids)


@cache
def _locked_holds() -> Any:
    """Return what ``expire_overdue`` narrows down; put together once, as it takes a millisecond.

    A ``ReservationQuerySet`` of tuples: id, variant's id, quantity, made and due at, in seconds.
    """
    return (
        Reservation.objects
        # Whoever holds one of these rows is about to settle it; the drop's lock makes
        # that impossible within the project, and a foreign lock must not stop the rest.
        .select_for_update(skip_locked=True, no_key=True)
        # By the deadline alone, as the index has them: thousands may share one.
        .order_by("expires_at")
        .values_list(
            Cast("pk", TextField()),
            "variant_id",
            "quantity",
            seconds_of("created_at"),
            seconds_of("expires_at"),
        )
    )


def seconds_of(column: str) -> Func:
    """Return a time as seconds since 1970: to read two times a hold took a sixth of a sweep."""
    template = "EXTRACT(EPOCH FROM %(expressions)s)::float8"
    # A ``FloatField`` would have each number converted to what it is already.
    return Func(column, template=template, output_field=Field())


def measure_expired(ages: Sequence[float], delays: Sequence[float]) -> None:
    metrics.hold_age_seconds.of("expiry").observe_all(ages)
    metrics.expiry_delay_seconds.observe_all(delays)


@dataclass(frozen=True, slots=True)
class ExpiredHolds:
    """What one sweep returned to a drop's stock."""

    drop_id: uuid.UUID
    available_stock: int
    reservation_ids: list[uuid.UUID]


def expire_due(
    batch: int = MAX_EXPIRED_PER_TRANSACTION, meanwhile: Callable[[], None] | None = None
) -> list[ExpiredHolds]:
    """Expire overdue holds: of each drop at most ``batch``, in a transaction per drop.

    Any number may run at once; each hold expires once. A drop that somebody keeps locked
    is left for the next call, and one whose counters contradict its holds for ten seconds.

    Args:
        meanwhile: is called between the drops, of which there may be hundreds.
    """
    due = (
        Drop.objects.annotate(due_at=_first_deadline())
        .filter(due_at__lte=Now())
        .order_by("due_at")
        .values_list("pk", flat=True)
    )
    return expire_drops(due, batch, meanwhile)


# Drops whose counters contradict their holds, and when (``time.monotonic``) to try again.
_contradictory: dict[uuid.UUID, float] = {}
CONTRADICTORY_SECONDS = 10.0


def expire_drops(
    drop_ids: Iterable[uuid.UUID], batch: int, meanwhile: Callable[[], None] | None = None
) -> list[ExpiredHolds]:
    """Expire what is overdue of these drops, as ``expire_due`` does of all."""
    swept = []
    for drop_id in drop_ids:
        if meanwhile is not None:
            meanwhile()
        if time.monotonic() < _contradictory.get(drop_id, 0.0):
            continue
        try:
            swept.append(_expire_drop(drop_id, batch))
            _contradictory.pop(drop_id, None)
        except IntegrityError:
            # Somebody has changed rows past the services. The other drops must not wait until
            # that is repaired.
            logger.exception("holds of drop %s can't expire; run audit_stock", drop_id)
            _contradictory[drop_id] = time.monotonic() + CONTRADICTORY_SECONDS
        except Drop.DoesNotExist:
            continue  # A rehearsal that was discarded meanwhile.
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
    return ExpiredHolds(drop_id, locked.drop.available_stock, [uuid.UUID(pk) for pk in ids])


def seconds_until_next_deadline() -> float | None:
    """Return how long until the next active hold is due (0 if overdue), None without holds."""
    seconds = _seconds_to_first_deadline()
    return None if seconds is None else max(0.0, seconds)


def seconds_overdue() -> float:
    """Return how long the oldest overdue hold has been waiting for an expiry loop."""
    return max(0.0, -(_seconds_to_first_deadline() or 0.0))


def _seconds_to_first_deadline() -> float | None:
    deadlines = (
        Drop.objects.annotate(due_at=_first_deadline())
        .filter(due_at__isnull=False)
        .aggregate(first=Min("due_at"), now=Max(ClockTimestamp()))
    )
    if deadlines["first"] is None:
        return None
    return (deadlines["first"] - deadlines["now"]).total_seconds()


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
