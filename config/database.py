import threading
from datetime import datetime

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
