"""The event log: appended inside the transaction, published after its commit."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

import orjson
from django.db import connection, transaction

from config.database import Statement
from realtime.models import EventType
from realtime.publisher import publish


@dataclass(slots=True)
class NewEvent:
    """An event that its transaction has numbered and not stored yet."""

    seq: int
    type: EventType
    data: dict[str, Any]


def insert_events(events: Mapping[uuid.UUID, Sequence[NewEvent]], now: datetime) -> Statement:
    """Return how to store the events of drops whose rows the caller has locked."""
    rows = [
        {"drop_id": drop_id, "seq": event.seq, "type": event.type, "data": event.data}
        for drop_id, its_events in events.items()
        for event in its_events
    ]
    # One parameter, because an array of JSON texts is escaped twice.
    return Statement(
        """
        INSERT INTO realtime_event (created_at, drop_id, seq, type, data)
        SELECT %s, event.*
        FROM jsonb_to_recordset(%s::jsonb)
            AS event(drop_id uuid, seq bigint, type text, data jsonb)
        """,
        [now, orjson.dumps(rows, default=str).decode()],
    )


def publish_on_commit(events: Mapping[uuid.UUID, Sequence[NewEvent]], now: datetime) -> None:
    transaction.on_commit(partial(publish, events, now))


def prune_events(hours: float, limit: int) -> int:
    """Delete at most ``limit`` events older than ``hours``; return how many.

    The oldest go first, so what is left of each drop's log has no gap. The newest event of a
    drop is old as well, some day, and goes with the others: the drop's row keeps its number.
    """
    with connection.cursor() as cursor:
        # By the primary key, which grows with time: the table needs no index for this. A
        # transaction that took its id early may have committed late, but never an hour.
        cursor.execute(
            """
            DELETE FROM realtime_event
            WHERE id IN (
                SELECT id FROM realtime_event ORDER BY id LIMIT %s
            ) AND created_at < clock_timestamp() - make_interval(secs => %s)
            """,
            [limit, hours * 3600],
        )
        return cursor.rowcount
