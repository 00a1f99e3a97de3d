"""Calls that run at the same moment, and a second session whose locks get in their way."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from django.db import connection
from django.db.backends.utils import CursorWrapper


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """Run each call in a thread of its own, all let go together; return what they returned.

    Needs ``transaction=True``: the threads' connections see only what is committed.
    """
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        try:
            barrier.wait(timeout=10)
            return call()
        finally:
            connection.close()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


@contextmanager
def another_session() -> Iterator[CursorWrapper]:
    """Yield the cursor of a second connection, in a transaction that is rolled back at the end."""
    other = connection.copy()
    try:
        with other.cursor() as cursor:
            cursor.execute("BEGIN")
            yield cursor
            cursor.execute("ROLLBACK")
    finally:
        other.close()


@contextmanager
def lock_timeout(milliseconds: int) -> Iterator[None]:
    """Let this thread's statements give up on a lock sooner than in production."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT set_config('lock_timeout', %s, false)", [str(milliseconds)])
    try:
        yield
    finally:
        with connection.cursor() as cursor:
            cursor.execute("RESET lock_timeout")
