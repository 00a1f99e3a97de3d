import threading
from datetime import datetime

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


_checking = threading.Lock()


def discard_dead_connections() -> None:
    """Have the pool test its idle connections in the background; called after an outage.

    By itself it finds dead ones one by one as they are asked for, and waits longer and
    longer between them: after a restart of the database that takes many seconds.
    """
    if _checking.acquire(blocking=False):
        threading.Thread(target=_check_pool, name="pool-check", daemon=True).start()


def _check_pool() -> None:
    try:
        pool = connection.pool  # type: ignore[attr-defined]
        if pool is not None:
            pool.check()
    finally:
        _checking.release()
