"""Read the event log, and the snapshots that it continues."""

from datetime import datetime
from typing import Any

from django.db import connection, transaction

from config.database import read_clock
from drops.models import Drop, DropStatus
from drops.serializers import DropSerializer
from realtime.limits import LARGEST_SEQ
from realtime.models import Event

# (seq, type, time, data)
LoggedEvent = tuple[int, str, datetime, dict[str, Any]]

EVENTS_PER_READ = 1000


def current_seqs() -> dict[str, int]:
    """Return the newest sequence number of every drop that has events, by drop id."""
    return {str(pk): seq for pk, seq in Drop.objects.filter(seq__gt=0).values_list("pk", "seq")}


def current_drop_ids() -> list[str]:
    """Return the drops that a visitor may wait for or buy, those with events."""
    return [str(pk) for pk in Drop.objects.current().filter(seq__gt=0).values_list("pk", flat=True)]


def published_seq(drop_id: str) -> int:
    """Return the newest sequence number of a drop that is no draft.

    Raises:
        Drop.DoesNotExist: clients don't know such a drop.
    """
    drops = Drop.objects.exclude(status=DropStatus.DRAFT)
    return drops.values_list("seq", flat=True).get(pk=drop_id)


def missed_events(drop_id: str, seq: int, limit: int) -> list[LoggedEvent] | None:
    """Return the drop's events after ``seq``, at most ``limit``, or None if they are gone.

    Events are pruned after a while, and a client may know a past that was replaced.
    """
    events = events_after(drop_id, seq, limit)
    if not events:
        if Drop.objects.filter(pk=drop_id, seq=seq).exists():
            return []
        # Without the second look, an event of this moment would count as a gap.
        events = events_after(drop_id, seq, limit)
    return events if events and events[0][0] == seq + 1 else None


def events_after(drop_id: str, seq: int, limit: int = EVENTS_PER_READ) -> list[LoggedEvent]:
    """Return the drop's events after ``seq``, oldest first, at most ``limit``."""
    rows = Event.objects.filter(drop_id=drop_id, seq__gt=seq).order_by("seq")
    return list(rows.values_list("seq", "type", "created_at", "data")[:limit])


def snapshot(drop_id: str | None) -> tuple[list[dict[str, Any]], datetime]:
    """Return the drop, or all current drops without an id, and the database's time.

    Each drop's row carries its ``seq``, so state and number always belong together; the
    variants are read in the same REPEATABLE READ snapshot.

    Raises:
        Drop.DoesNotExist: there is no drop with this id.
    """
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        drops = Drop.objects.read_now()
        rows = [drops.get(pk=drop_id)] if drop_id else list(drops.current().order_by("created_at"))
        now = rows[0].read_at if rows else read_clock()
        return [dict(DropSerializer(drop).data) for drop in rows], now


def is_seq(value: object) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_SEQ


def read_seq(text: str) -> int | None:
    """Return the sequence number that ``text`` is, in decimal digits, or None."""
    is_short_number = text.isascii() and text.isdigit() and len(text) <= len(str(LARGEST_SEQ))
    return int(text) if is_short_number and is_seq(int(text)) else None
