"""What the dashboard begins with; from then on it follows the event stream."""

from datetime import datetime
from typing import Any

from django.contrib.admin.models import LogEntry
from django.db import connection
from django.db.models import F, QuerySet

from drops.exceptions import format_instant
from drops.models import Drop
from purchases.models import PurchaseStatus
from reservations.services import seconds_overdue

# How far the moving charts look back.
CHART_SECONDS = 120
LAST_PURCHASES = 12


def figures() -> dict[str, Any]:
    """Return the state of the sale: five statements, however much was sold."""
    drops = list(watched_drops())
    ids = [drop.pk for drop in drops]
    now = drops[0].read_at if drops else None
    return {
        "now": format_instant(now),
        "drops": [drop_figures(drop) for drop in drops],
        "purchases": recent_purchases(ids),
        "rate": purchases_per_second(ids),
        "oldestOverdueSeconds": seconds_overdue(),
    }


def watched_drops() -> QuerySet[Drop]:
    """Return the drops that are on sale or paused, and what is to start: all that count."""
    current = Drop.objects.current().read_now().prefetch_related(None)
    return current.order_by(F("starts_at").asc(nulls_first=True), "created_at")


def drop_figures(drop: Drop) -> dict[str, Any]:
    return {
        "id": str(drop.pk),
        "name": drop.name,
        "status": drop.status_at(drop.read_at).value,
        "seq": drop.seq,
        "total": drop.total_stock,
        "available": drop.available_stock,
        "sold": drop.sold_stock,
    }


def recent_purchases(drop_ids: list[Any]) -> list[dict[str, Any]]:
    """Return the newest paid purchases of these drops; a few rows of each drop's index."""
    with connection.cursor() as cursor:
        cursor.execute(
            """
            SELECT latest.id, latest.drop_id, buyer.username, latest.quantity, latest.created_at
            FROM unnest(%s::uuid[]) AS watched(id)
            CROSS JOIN LATERAL (
                SELECT id, drop_id, user_id, quantity, created_at
                FROM purchases_purchase
                WHERE drop_id = watched.id AND status = %s
                ORDER BY created_at DESC
                LIMIT %s
            ) AS latest
            JOIN users_user AS buyer ON buyer.id = latest.user_id
            ORDER BY latest.created_at DESC
            LIMIT %s
            """,
            [drop_ids, PurchaseStatus.PAID, LAST_PURCHASES, LAST_PURCHASES],
        )
        return [
            {
                "id": str(pk),
                "dropId": str(drop_id),
                "username": username,
                "qty": quantity,
                "at": format_instant(at),
            }
            for pk, drop_id, username, quantity, at in cursor.fetchall()
        ]


def purchases_per_second(drop_ids: list[Any]) -> dict[int, int]:
    """Return how many units were purchased in each of the last seconds, by Unix time."""
    with connection.cursor() as cursor:
        cursor.execute(
            """
            SELECT floor(extract(epoch FROM created_at))::bigint AS second, sum(quantity)
            FROM purchases_purchase
            WHERE drop_id = ANY(%s::uuid[]) AND created_at > now() - make_interval(secs => %s)
            GROUP BY second
            """,
            [drop_ids, CHART_SECONDS],
        )
        return dict(cursor.fetchall())


def sell_through(drop: Drop, opened_at: datetime) -> list[tuple[int, int]]:
    """Return how many units were sold in each second of a drop's sale that sold any.

    Seconds count from ``opened_at``. Refunded purchases are among them: they were sold then.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            """
            SELECT greatest(0, floor(extract(epoch FROM created_at - %s)))::int AS second,
                   sum(quantity)::int
            FROM purchases_purchase
            WHERE drop_id = %s
            GROUP BY second ORDER BY second
            """,
            [opened_at, drop.pk],
        )
        return cursor.fetchall()


def recent_staff_work() -> QuerySet[LogEntry]:
    return LogEntry.objects.select_related("user", "content_type")[:8]
