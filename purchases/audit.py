"""Recompute every stock from its rows and name each number that differs."""

import logging
import uuid
from dataclasses import asdict, dataclass
from typing import Any

from django.db import DatabaseError, connection, transaction
from rest_framework.exceptions import ValidationError

from drops.models import FOLLOWS_START, Drop, DropStatus
from drops.services import update_drop

logger = logging.getLogger(__name__)

# A log that begins with the drop's first event tells everything; one that begins later tells
# of nothing before it.
LOG_IS_WHOLE = """
    EXISTS (SELECT FROM realtime_event AS first
            WHERE first.drop_id = {row}.drop_id AND first.seq = 1 AND first.type = 'DROP_CREATED')
"""

# Each check selects (drop_id, subject, expected, found) for whatever is wrong.
CHECKS: dict[str, str] = {
    "no counter is below zero or above its total": """
        SELECT s.drop_id, s.name, concat('0 to ', s.total_stock),
               concat('available ', s.available_stock, ', sold ', s.sold_stock)
        FROM (
            SELECT id AS drop_id, name, total_stock, available_stock, sold_stock FROM drops_drop
            UNION ALL
            SELECT drop_id, label, total_stock, available_stock, sold_stock FROM drops_variant
        ) s
        WHERE least(s.available_stock, s.sold_stock) < 0
           OR s.available_stock + s.sold_stock > s.total_stock
    """,
    "units of each size: available + held + sold = total": """
        SELECT v.drop_id, v.label,
               concat('available ', v.total_stock - r.held - r.sold, ', sold ', r.sold),
               concat('available ', v.available_stock, ', sold ', v.sold_stock)
        FROM drops_variant v
        CROSS JOIN LATERAL (
            SELECT coalesce((SELECT sum(quantity) FROM reservations_reservation
                             WHERE variant_id = v.id AND drop_id = v.drop_id
                               AND status = 'ACTIVE'), 0) AS held,
                   coalesce((SELECT sum(quantity) FROM purchases_purchase
                             WHERE variant_id = v.id AND drop_id = v.drop_id
                               AND status = 'paid'), 0) AS sold
        ) r
        WHERE (v.available_stock, v.sold_stock) <> (v.total_stock - r.held - r.sold, r.sold)
    """,
    "a drop's counters are the sums of its sizes": """
        SELECT d.id AS drop_id, d.name,
               concat('total ', v.total, ', available ', v.available, ', sold ', v.sold),
               concat('total ', d.total_stock, ', available ', d.available_stock,
                      ', sold ', d.sold_stock)
        FROM drops_drop d
        CROSS JOIN LATERAL (
            SELECT coalesce(sum(total_stock), 0) AS total,
                   coalesce(sum(available_stock), 0) AS available,
                   coalesce(sum(sold_stock), 0) AS sold
            FROM drops_variant WHERE drop_id = d.id
        ) v
        WHERE (d.total_stock, d.available_stock, d.sold_stock)
              <> (v.total, v.available, v.sold)
    """,
    "the event log ends at the drop's seq, without a gap": """
        SELECT d.id AS drop_id, d.name,
               concat(d.seq, ' in a row'),
               concat(e.first, ' to ', e.last, ', ', e.count, ' events')
        FROM drops_drop d
        CROSS JOIN LATERAL (
            SELECT min(seq) AS first, max(seq) AS last, count(*) AS count
            FROM realtime_event WHERE drop_id = d.id
        ) e
        WHERE d.seq <> coalesce(e.last, d.seq)
           OR e.count <> coalesce(e.last - e.first + 1, 0)
    """,
    "a consumed reservation has its paid purchase, a voided one at most a refunded one": """
        SELECT r.drop_id, r.id::text,
               CASE r.status WHEN 'CONSUMED' THEN 'a paid purchase like it'
                             WHEN 'VOIDED' THEN 'no purchase, or a refunded one like it'
                             ELSE 'no purchase' END,
               coalesce(p.status || ' purchase ' || p.id, 'no purchase')
        FROM reservations_reservation r
        LEFT JOIN purchases_purchase p ON p.reservation_id = r.id
        WHERE (r.status = 'CONSUMED') <> (p.id IS NOT NULL AND p.status = 'paid')
           OR (p.status = 'refunded' AND r.status <> 'VOIDED')
           OR (p.drop_id, p.variant_id, p.user_id, p.quantity)
              <> (r.drop_id, r.variant_id, r.user_id, r.quantity)
    """,
    "no purchase was made after its reservation's deadline": """
        SELECT p.drop_id, p.id::text,
               concat('at ', r.expires_at, ' or before'), concat('at ', p.created_at)
        FROM purchases_purchase p
        JOIN reservations_reservation r ON r.id = p.reservation_id
        WHERE p.created_at > r.expires_at + interval '1 millisecond'
    """,
    "a user has at most one active reservation of a drop": """
        SELECT drop_id, concat('user ', user_id), '1 at most', concat(count(*), ' active')
        FROM reservations_reservation
        WHERE status = 'ACTIVE'
        GROUP BY drop_id, user_id
        HAVING count(*) > 1
    """,
    "the newest event that names a drop's stock names what it is": """
        SELECT d.id AS drop_id, d.name,
               concat(d.available_stock, ' available'),
               concat(told.available, ' available in event ', told.seq)
        FROM drops_drop d
        CROSS JOIN LATERAL (
            SELECT seq, coalesce(data ->> 'availableStock', data -> 'drop' ->> 'available_stock')
                        AS available
            FROM realtime_event
            WHERE drop_id = d.id AND type IN ('STOCK_UPDATED', 'DROP_CREATED', 'DROP_UPDATED')
            ORDER BY seq DESC
            LIMIT 1
        ) told
        WHERE told.available <> d.available_stock::text
    """,
    "an expired hold was announced once": f"""
        WITH told AS (
            SELECT drop_id, data ->> 'reservationId' AS id, count(*) AS times
            FROM realtime_event
            WHERE type = 'RESERVATION_EXPIRED'
            GROUP BY 1, 2
        )
        SELECT r.drop_id, r.id::text, '1 event', concat(coalesce(told.times, 0), ' events')
        FROM reservations_reservation r
        LEFT JOIN told ON told.drop_id = r.drop_id AND told.id = r.id::text
        WHERE r.status = 'EXPIRED'
          AND (told.times > 1 OR told.times IS NULL AND {LOG_IS_WHOLE.format(row="r")})
    """,  # noqa: S608 - the constant above
    "only an expired hold was announced as expired": """
        SELECT e.drop_id, concat('event ', e.seq), 'a reservation that is EXPIRED',
               coalesce(r.status, 'none')
        FROM realtime_event e
        LEFT JOIN reservations_reservation r ON r.id::text = e.data ->> 'reservationId'
        WHERE e.type = 'RESERVATION_EXPIRED' AND r.status IS DISTINCT FROM 'EXPIRED'
    """,
    "a purchase was announced once": f"""
        SELECT p.drop_id, 'purchases', concat(p.count, ' events'), concat(e.count, ' events')
        FROM (SELECT drop_id, count(*) FROM purchases_purchase GROUP BY drop_id) p
        CROSS JOIN LATERAL (
            SELECT count(*) FROM realtime_event
            WHERE drop_id = p.drop_id AND type = 'PURCHASE_COMPLETED'
        ) e
        WHERE p.count <> e.count AND {LOG_IS_WHOLE.format(row="p")}
    """,  # noqa: S608 - the constant above
    "a stored answer's effect is stored as well": """
        SELECT (answer.body ->> 'drop_id')::uuid AS drop_id, answer.route,
               coalesce('row ' || (answer.body ->> 'id'), 'an answer'), 'none'
        FROM (
            SELECT route, CASE WHEN status IS NOT NULL THEN body::jsonb END AS body
            FROM users_idempotencykey
        ) answer
        WHERE answer.body IS NULL
           OR answer.route LIKE '%%/reserve' AND NOT EXISTS (
                SELECT FROM reservations_reservation r
                WHERE r.id = (answer.body ->> 'id')::uuid)
           OR answer.route LIKE '%%/purchase' AND NOT EXISTS (
                SELECT FROM purchases_purchase p WHERE p.id = (answer.body ->> 'id')::uuid)
    """,
}


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that the rows do not bear out."""

    check: str
    # None where it is about an answer that names no drop.
    drop_id: uuid.UUID | None
    subject: str
    expected: str
    found: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"drop_id": self.drop_id and str(self.drop_id)}


@dataclass(frozen=True, slots=True)
class Audit:
    """The result of one audit."""

    drops: int
    differences: list[Difference]

    @property
    def drifting_drops(self) -> list[uuid.UUID]:
        """Return the drops that something is wrong with, each once."""
        return sorted({d.drop_id for d in self.differences if d.drop_id is not None})


def audit_stock(drop_id: uuid.UUID | None = None) -> Audit:
    """Check one drop, or all, in a single snapshot; safe and truthful during a sale."""
    # Durable: inside another transaction the snapshot would not be this one's own.
    with transaction.atomic(durable=True), connection.cursor() as cursor:
        cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        cursor.execute("SET LOCAL statement_timeout = 0")
        cursor.execute(
            "SELECT count(*) FROM drops_drop WHERE %(id)s::uuid IS NULL OR id = %(id)s",
            {"id": drop_id},
        )
        drops = cursor.fetchone()[0]
        differences = []
        for name, query in CHECKS.items():
            cursor.execute(
                f"SELECT * FROM ({query}) AS wrong "  # noqa: S608 - the constants above
                "WHERE %(id)s::uuid IS NULL OR drop_id = %(id)s ORDER BY 1, 2",
                {"id": drop_id},
            )
            differences += [Difference(name, *map(_plain, row)) for row in cursor.fetchall()]
    return Audit(drops, differences)


def _plain(value: Any) -> Any:
    return value if isinstance(value, uuid.UUID | None) else str(value)


def pause_drifting(audit: Audit) -> list[Drop]:
    """Pause what may be sold of the drops that ``audit`` found wrong, and announce it.

    What is held already stays held, and ends in time; nothing new is reserved or purchased
    until staff have looked and resumed the drop.

    Returns:
        The drops that are paused now and were not before.
    """
    paused = []
    for drop in Drop.objects.filter(pk__in=audit.drifting_drops, status__in=FOLLOWS_START):
        try:
            paused.append(update_drop(drop.pk, status=DropStatus.PAUSED))
        except (ValidationError, DatabaseError):
            # Staff were faster, or what is wrong stands in the way of the event itself. The
            # others must be paused all the same.
            logger.exception("drop %s drifts and could not be paused", drop.pk)
        else:
            logger.error("drop %s drifts and was paused", drop.pk)
    return paused
