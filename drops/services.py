"""Each use case that changes a drop or its stock: one function, one transaction, its events.

Lock order, kept by every service of the project, so that there are no deadlocks:
idempotency keys → users (with MAX_ACTIVE_HOLDS only) → drop → variants → reservations,
several of one kind by primary key.
"""

import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum, auto
from functools import partial
from typing import Any

import orjson
from django.db import OperationalError, connection, transaction
from psycopg.errors import LockNotAvailable
from rest_framework.exceptions import ErrorDetail, ValidationError

from config.database import Statement, execute_together, read_clock
from config.serializers import LARGEST_INTEGER
from drops.currencies import DECIMALS
from drops.exceptions import StockAdjusted, StockCommitted
from drops.models import FOLLOWS_END, Drop, DropStatus, StockAdjustment, Variant
from drops.serializers import DropSerializer
from realtime.models import EventType
from realtime.publisher import tell_followers
from realtime.services import NewEvent, insert_events, publish_on_commit
from users.models import User

# A published drop can't become a draft again, and a cancelled or ended one stays so:
# clients were told. (An end that only the window brought goes away with a later ends_at.)
_CLOSED = {DropStatus.ENDED, DropStatus.CANCELLED}
ALLOWED_STATUS_CHANGES: dict[str, set[DropStatus]] = {
    DropStatus.DRAFT: {*FOLLOWS_END, DropStatus.CANCELLED},
    DropStatus.SCHEDULED: {*FOLLOWS_END, *_CLOSED},
    DropStatus.LIVE: {*FOLLOWS_END, *_CLOSED},
    DropStatus.PAUSED: {*FOLLOWS_END, *_CLOSED},
    DropStatus.ENDED: {DropStatus.CANCELLED},
    DropStatus.CANCELLED: set(),
}


DROP_COLUMNS = [field.attname for field in Drop._meta.concrete_fields]
VARIANT_COLUMNS = [field.attname for field in Variant._meta.concrete_fields]


class Wait(Enum):
    """How long to wait for drops that somebody else has locked."""

    # Not at all: they are left out.
    NOT = auto()
    # For ``BRIEF_WAIT_MS``: a batch of another process, or of the expiry loop, is done by then.
    BRIEFLY = auto()
    AS_LONG_AS_IT_TAKES = auto()


BRIEF_WAIT_MS = 100


def lock_statement(wait: Wait) -> str:
    """Return how to lock drops, given as an array, with their variants."""
    # In the same statement, for it would be a round trip more. PostgreSQL works it out before
    # it takes the first lock, because all rows are sorted by then.
    timeout = f"set_config('lock_timeout', '{BRIEF_WAIT_MS}ms', true), "
    # The array goes through a subquery, so that PostgreSQL guesses its length. If it looked, one
    # drop would seem so much less work that the statement were planned anew each time, for 0.5 ms.
    return f"""
        SELECT {", ".join(f"drop.{column}" for column in DROP_COLUMNS)},
               {", ".join(f"variant.{column}" for column in VARIANT_COLUMNS)},
               (SELECT count(*) FROM drops_variant WHERE drop_id = drop.id)
        FROM {timeout if wait is Wait.BRIEFLY else ""}drops_drop AS drop
        JOIN drops_variant AS variant ON variant.drop_id = drop.id
        WHERE drop.id = ANY(ARRAY(SELECT unnest(%b::uuid[])))
        ORDER BY drop.id, variant.id
        FOR NO KEY UPDATE OF drop, variant{" SKIP LOCKED" if wait is Wait.NOT else ""}
        """  # noqa: S608 - the columns are the models' own


LOCK_DROPS = {wait: lock_statement(wait) for wait in Wait}


@dataclass
class LockedDrop:
    """A drop whose row, and whose variants' rows, this transaction has locked.

    Changes are made in memory, claim by claim, and written by ``save`` in one go:
    the lock is held for few statements however many claims there are.
    """

    drop: Drop
    variants: dict[uuid.UUID, Variant]
    _moves: dict[uuid.UUID, list[int]] = field(default_factory=dict)
    _events: list[NewEvent] = field(default_factory=list)
    _feed: list[dict] | None = None

    def move(self, variant: Variant, *, available: int = 0, sold: int = 0, total: int = 0) -> None:
        """Add to the counters of ``variant`` and of the drop; negative numbers take away."""
        for stock in (variant, self.drop):
            stock.available_stock += available
            stock.sold_stock += sold
            stock.total_stock += total
        moved = self._moves.get(variant.pk)
        if moved is None:
            moved = self._moves[variant.pk] = [0, 0, 0]
        moved[0] += available
        moved[1] += sold
        moved[2] += total

    @property
    def has_moved(self) -> bool:
        return bool(self._moves)

    def record(self, event_type: EventType, data: dict[str, Any]) -> None:
        """Append an event with the drop's next sequence number."""
        self.record_all(event_type, [data])

    def record_all(self, event_type: EventType, data: Sequence[dict[str, Any]]) -> None:
        """Append an event for each of ``data``, in that order."""
        first = self.drop.seq + 1
        self._events += [NewEvent(seq, event_type, one) for seq, one in enumerate(data, first)]
        self.drop.seq += len(data)

    def record_stock(self) -> None:
        """Append the stock as it is now; once per transaction, nobody saw it in between."""
        self.record(
            EventType.STOCK_UPDATED,
            {
                "dropId": str(self.drop.pk),
                "availableStock": self.drop.available_stock,
                "availability": self.drop.availability.value,
                "soldStock": self.drop.sold_stock,
                "variants": [
                    {"id": str(variant.pk), "availableStock": variant.available_stock}
                    for variant in sorted(self.variants.values(), key=lambda v: v.position)
                ],
            },
        )

    def record_drop(self, event_type: EventType) -> None:
        """Append the whole drop, as it will be once ``save`` has written everything."""
        self.record(event_type, {"drop": None})

    def show_purchasers(self, feed: list[dict]) -> None:
        """Keep the activity feed on the drop's row, where every reader of the drop finds it."""
        self.drop.latest_purchasers = self._feed = feed

    def save(self, now: datetime) -> None:
        """Write the moved stock, the feed, the sequence and the events."""
        save_drops([self], now)


def save_drops(
    locked_drops: Iterable[LockedDrop], now: datetime, beside: Sequence[Statement] = ()
) -> None:
    """Write what has changed of several drops, and ``beside``, in one statement.

    Two, when an event tells the whole drop: it is read from what the first has written.
    """
    changed = [locked for locked in locked_drops if locked._moves or locked._events]
    writes = list(_stock_updates(changed))
    for locked in changed:
        for event in locked._events:
            if "drop" in event.data:
                execute_together(writes)
                writes = []
                event.data["drop"] = drop_payload(locked.drop, now) | {"seq": event.seq}
    events = {locked.drop.pk: locked._events for locked in changed if locked._events}
    if events:
        writes.append(insert_events(events, now))
        publish_on_commit(events, now)
    # Last, because PostgreSQL begins with the last: rows are changed in the same order as by
    # those who change a reservation first and save then. (Locked they are already.)
    execute_together([*writes, *beside])


def _stock_updates(changed: Sequence[LockedDrop]) -> Iterator[Statement]:
    """Return how to store what moved, and each drop's feed and sequence.

    Relative, so that the check constraints would stop a move made without the lock.
    """
    moves = [
        (variant_id, *moved) for locked in changed for variant_id, moved in locked._moves.items()
    ]
    if moves:
        yield Statement(
            """
            UPDATE drops_variant v
            SET available_stock = v.available_stock + m.available,
                sold_stock = v.sold_stock + m.sold,
                total_stock = v.total_stock + m.total
            FROM unnest(%b::uuid[], %b::int[], %b::int[], %b::int[])
                AS m(id, available, sold, total)
            WHERE v.id = m.id
            """,
            columns(moves, 4),
        )
    totals = [
        (
            locked.drop.pk,
            *(sum(moved[index] for moved in locked._moves.values()) for index in range(3)),
            len(locked._events),
            None if locked._feed is None else orjson.dumps(locked._feed).decode(),
        )
        for locked in changed
    ]
    if totals:
        yield Statement(
            """
            UPDATE drops_drop d
            SET available_stock = d.available_stock + c.available,
                sold_stock = d.sold_stock + c.sold,
                total_stock = d.total_stock + c.total,
                seq = d.seq + c.events,
                latest_purchasers = coalesce(c.feed::jsonb, d.latest_purchasers)
            FROM unnest(%b::uuid[], %b::int[], %b::int[], %b::int[], %b::int[], %s::text[])
                AS c(id, available, sold, total, events, feed)
            WHERE d.id = c.id
            """,
            columns(totals, 6),
        )


def columns(rows: Sequence[tuple], width: int) -> list[list]:
    """Return ``rows`` as one list per column, which is how a statement takes them."""
    return [[row[index] for row in rows] for index in range(width)]


def lock_drop(drop_id: uuid.UUID) -> LockedDrop:
    """Lock the drop, then its variants, until the end of the transaction.

    Read the database's clock only afterwards: the wait for the lock may be long.

    Raises:
        Drop.DoesNotExist: no such drop.
    """
    locked = lock_drops([drop_id])
    if not locked:
        raise Drop.DoesNotExist
    return locked[drop_id]


def lock_drops(
    drop_ids: Iterable[uuid.UUID], wait: Wait = Wait.AS_LONG_AS_IT_TAKES
) -> dict[uuid.UUID, LockedDrop]:
    """Lock several drops with their variants, in the order of their ids.

    Left out are drops that don't exist and, with ``Wait.NOT``, those that somebody else
    keeps locked.

    Raises:
        OperationalError: by ``LockNotAvailable``, with ``Wait.BRIEFLY``.
    """
    with connection.cursor() as cursor:
        # One statement locks both, in the order of the OF clause, and after a wait re-reads
        # both, so the counters are those of the last commit. NO KEY, because a plain FOR
        # UPDATE would also block each insert that refers to these rows.
        cursor.execute(LOCK_DROPS[wait], [list(drop_ids)])
        rows = cursor.fetchall()
    width = len(DROP_COLUMNS)
    locked: dict[uuid.UUID, LockedDrop] = {}
    counts: dict[uuid.UUID, int] = {}
    for *row, count in rows:
        variant = Variant.from_db("default", VARIANT_COLUMNS, row[width:])
        if variant.drop_id not in locked:
            drop = Drop.from_db("default", DROP_COLUMNS, row[:width])
            # JSON arrives as text, because this is not a query of the ORM.
            drop.latest_purchasers = orjson.loads(drop.latest_purchasers)
            locked[drop.pk] = LockedDrop(drop, {})
            counts[drop.pk] = count
        variant.drop = locked[variant.drop_id].drop
        locked[variant.drop_id].variants[variant.pk] = variant
    # Whoever has locked a single variant keeps the whole drop.
    return {pk: drop for pk, drop in locked.items() if len(drop.variants) == counts[pk]}


@transaction.atomic
def create_drop(user: User, *, variants: list[dict] | None = None, **fields: Any) -> Drop:
    """Store a drop with its variants; unless it is a draft, announce it.

    Args:
        variants: ``{label, total_stock}`` each; without, one variant holds ``total_stock``.
        fields: the other fields of ``DropCreateSerializer``. Without ``status`` the start
            decides: none → draft, future → scheduled, else live.
    Raises:
        ValidationError: the fields contradict each other.
    """
    now = read_clock()
    if "status" not in fields:
        fields["status"] = status_by_start(fields.get("starts_at"), now)
    drop = Drop(
        created_by=user,
        created_at=now,
        window_told_at=now,
        available_stock=fields["total_stock"],
        **fields,
    )
    drop.read_at = now
    check_drop(drop)
    drop.save(force_insert=True)
    sizes = variants or [{"label": Variant.ONE_SIZE, "total_stock": drop.total_stock}]
    rows = [
        Variant(drop=drop, position=position, available_stock=size["total_stock"], **size)
        for position, size in enumerate(sizes)
    ]
    Variant.objects.bulk_create(rows)
    if drop.status != DropStatus.DRAFT:
        created = LockedDrop(drop, {row.pk: row for row in rows})
        created.record_drop(EventType.DROP_CREATED)
        created.save(now)
    return drop


def status_by_start(starts_at: datetime | None, now: datetime) -> DropStatus:
    if starts_at is None:
        return DropStatus.DRAFT
    return DropStatus.SCHEDULED if starts_at > now else DropStatus.LIVE


@transaction.atomic
def update_drop(drop_id: uuid.UUID, **changes: Any) -> Drop:
    """Change what ``DropInputSerializer`` allows; announce it unless the drop stays a draft.

    A draft that gets another status is announced as created.

    Raises:
        Drop.DoesNotExist: no such drop.
        ValidationError: the result would contradict itself, or the status can't follow.
    """
    locked = lock_drop(drop_id)
    now = read_clock()
    change_drop(locked, changes, now)
    locked.save(now)
    return locked.drop


def change_drop(locked: LockedDrop, changes: dict[str, Any], now: datetime) -> None:
    """Change a locked drop, as ``update_drop`` does; the caller saves ``locked``.

    Raises:
        ValidationError: the result would contradict itself, or the status can't follow.
    """
    drop = locked.drop
    drop.read_at = now
    before = {name: getattr(drop, name) for name in changes}
    if before == changes:
        return
    status_before = drop.status
    for name, value in changes.items():
        setattr(drop, name, value)
    check_drop(drop, status_before)
    # What is announced here says what the window did up to now.
    drop.window_told_at = now
    drop.save(update_fields=[*changes, "window_told_at"])
    if drop.status != DropStatus.DRAFT:
        is_published = status_before != DropStatus.DRAFT
        locked.record_drop(EventType.DROP_UPDATED if is_published else EventType.DROP_CREATED)
    else:
        tell_of_draft(drop)


def tell_of_draft(drop: Drop) -> None:
    """Have what this process remembers of a draft read anew: its changes are no events."""
    transaction.on_commit(partial(tell_followers, str(drop.pk), []))


def status_on_sale(drop: Drop, now: datetime) -> DropStatus:
    """Return the status that puts ``drop`` on sale, at once or from its start."""
    is_early = drop.starts_at is not None and drop.starts_at > now
    return DropStatus.SCHEDULED if is_early else DropStatus.LIVE


def announce_windows() -> int:
    """Tell the clients of each drop whose window has opened or closed; return of how many.

    Any number may run at once; each opening and closing is announced once. A drop that
    somebody keeps locked is left for the next call.
    """
    told = 0
    for drop_id in Drop.objects.window_due().order_by("pk").values_list("pk", flat=True):
        try:
            told += _announce_window(drop_id)
        except OperationalError as exc:
            if not isinstance(exc.__cause__, LockNotAvailable):
                raise
    return told


@transaction.atomic
def _announce_window(drop_id: uuid.UUID) -> bool:
    locked = lock_drop(drop_id)
    if not Drop.objects.window_due().filter(pk=drop_id).exists():
        # Another loop was quicker, or staff has moved the window.
        return False
    now = read_clock()
    locked.drop.window_told_at = now
    locked.drop.save(update_fields=["window_told_at"])
    locked.record_drop(EventType.DROP_UPDATED)
    locked.save(now)
    return True


def check_drop(drop: Drop, status_before: str | None = None) -> None:
    """Check the rules between a drop's fields.

    Raises:
        ValidationError: with one entry per field that breaks a rule.
    """
    errors: dict[str, list[ErrorDetail]] = {}
    if drop.starts_at and drop.ends_at and drop.ends_at <= drop.starts_at:
        errors["ends_at"] = [ErrorDetail("Must be after starts_at.", "not_after_start")]
    if decimals_of(drop.price) > DECIMALS[drop.currency]:
        errors["price"] = [
            ErrorDetail(
                f"{drop.currency} has {DECIMALS[drop.currency]} decimals.", "max_decimal_places"
            )
        ]
    if drop.status == DropStatus.SCHEDULED and not drop.starts_at:
        errors["status"] = [ErrorDetail("A scheduled drop needs starts_at.", "starts_at_required")]
    if status_before not in (None, drop.status) and (
        drop.status not in ALLOWED_STATUS_CHANGES[str(status_before)]
    ):
        errors["status"] = [
            ErrorDetail(f"A {status_before} drop can't become {drop.status}.", "not_allowed")
        ]
    if errors:
        raise ValidationError(errors)


def decimals_of(price: Any) -> int:
    return max(0, -price.normalize().as_tuple().exponent)


@transaction.atomic
def adjust_stock(
    variant_id: uuid.UUID, delta: int, *, reason: str, user: User, seen_total: int | None = None
) -> StockAdjustment:
    """Add ``delta`` units to a variant, or withdraw them, and keep a record of it.

    Args:
        seen_total: the variant's total that was to be adjusted, so that a repeat is none.
    Raises:
        Variant.DoesNotExist: no such variant.
        StockAdjusted: its total is not ``seen_total`` any more.
        StockCommitted: more would be withdrawn than is available.
        ValidationError: nothing would change, or the drop's total would not be storable.
    """
    drop_id = Variant.objects.values_list("drop_id", flat=True).get(pk=variant_id)
    locked = lock_drop(drop_id)
    variant = locked.variants[variant_id]
    if seen_total not in (None, variant.total_stock):
        raise StockAdjusted(total_stock=variant.total_stock)
    if variant.available_stock + delta < 0:
        raise StockCommitted(available_stock=variant.available_stock)
    if not delta or locked.drop.total_stock + delta > LARGEST_INTEGER:
        error = ErrorDetail(f"Must not be 0 or exceed {LARGEST_INTEGER} in all.", "invalid")
        raise ValidationError({"delta": [error]})
    locked.move(variant, available=delta, total=delta)
    if locked.drop.status != DropStatus.DRAFT:
        locked.record_stock()
        # The total is not among what STOCK_UPDATED tells.
        locked.record_drop(EventType.DROP_UPDATED)
    else:
        tell_of_draft(locked.drop)
    adjustment = StockAdjustment.objects.create(
        variant=variant, delta=delta, reason=reason, created_by=user
    )
    locked.save(read_clock())
    return adjustment


def drop_payload(drop: Drop, now: datetime) -> dict[str, Any]:
    """Return ``drop`` as clients see it at ``now``, in plain JSON types."""
    drop.read_at = now
    return dict(DropSerializer(drop).data)
