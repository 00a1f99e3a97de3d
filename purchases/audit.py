"""Recompute every stock from its rows and name each number that differs."""

import uuid
from dataclasses import asdict, dataclass
from typing import Any

from django.db import connection, transaction

# Each check selects (drop_id, subject, expected, found) for whatever is wrong.
CHECKS: dict[str, str] = {
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
}


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that the rows do not bear out."""

    check: str
    drop_id: uuid.UUID
    subject: str
    expected: str
    found: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"drop_id": str(self.drop_id)}


@dataclass(frozen=True, slots=True)
class Audit:
    """The result of one audit."""

    drops: int
    differences: list[Difference]


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
    return value if isinstance(value, uuid.UUID) else str(value)
