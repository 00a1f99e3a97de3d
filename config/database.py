import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg_pool.base
from django.db import connection
from django.db.models import DateTimeField, Func


class ClockTimestamp(Func):
    """The database's time when the row is read, not when the transaction began."""

    function = "clock_timestamp"
    template = "%(function)s()"
    output_field = DateTimeField()


def read_clock() -> datetime:
    """Return the database's time at this moment, not at the start of the transaction."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT clock_timestamp()")
        return cursor.fetchone()[0]


@dataclass(frozen=True, slots=True)
class Statement:
    """An INSERT or UPDATE without RETURNING and without WITH, and its parameters."""

    sql: str
    parameters: Sequence[Any]


def execute_together(statements: Sequence[Statement]) -> None:
    """Run statements that write different rows as one, in one round trip.

    None sees what another writes, and all are done or none; which is first is undefined.
    """
    if not statements:
        return
    *others, last = statements
    parts = [f"write_{number} AS ({other.sql})" for number, other in enumerate(others)]
    sql = f"WITH {', '.join(parts)} {last.sql}" if parts else last.sql
    with connection.cursor() as cursor:
        cursor.execute(sql, [value for one in statements for value in one.parameters])


def retry_soon() -> None:
    """Have pools try again after 50 ms, 100 ms and so on, where they would after 1 s and 2 s.

    Who is given two dead connections in a row sleeps for that long, and so does a connection
    that could not be made. Where backends are terminated each second, the next ones are dead
    too by then, and nobody was served for twelve.
    """
    # Not an option of the pool's; a version that names it otherwise is found by a test.
    backoff = getattr(psycopg_pool.base, "AttemptWithBackoff", None)
    if backoff is not None:
        backoff.INITIAL_DELAY = 0.05


_caring = threading.Lock()
# By the monotonic clock, when all connections were last replaced, and how soon they may be again.
_replaced_at = float("-inf")
REPLACE_AGAIN_SECONDS = 1.0


def discard_dead_connections() -> None:
    """Have the pool test its idle connections in the background; called after an outage.

    By itself it finds dead ones one by one as they are asked for, and waits longer and
    longer between them: after a restart of the database that takes many seconds.
    """
    _care_for_pool("check")


def replace_connections() -> None:
    """Have the pool make all its connections anew; called where the database takes no changes.

    After a failover they may lead to what was the primary, or is to become it. They live, so
    the pool would hand them out for another hour.
    """
    global _replaced_at
    now = time.monotonic()
    if now - _replaced_at >= REPLACE_AGAIN_SECONDS:
        _replaced_at = now
        _care_for_pool("drain")


def _care_for_pool(how: str) -> None:
    if _caring.acquire(blocking=False):
        threading.Thread(target=_call_pool, args=[how], name=f"pool-{how}", daemon=True).start()


def _call_pool(how: str) -> None:
    try:
        pool = connection.pool  # type: ignore[attr-defined]
        if pool is not None:
            getattr(pool, how)()
    finally:
        _caring.release()
