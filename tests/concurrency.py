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
        barrier.wait(timeout=10)
        return _and_disconnect(call)

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def plain_parameters() -> dict[str, Any]:
    """Return what psycopg needs to connect where Django does, past its pool and its settings."""
    parameters = connection.get_connection_params()
    for name in ("pool", "cursor_factory", "context", "server_side_binding", "options"):
        parameters.pop(name, None)
    return parameters


@contextmanager
def blocked(call: Callable[[], Any]) -> Iterator[None]:
    """Run ``call`` in a thread; enter once it waits for a lock, leave once it has returned.

    The body has to let go of what the call waits for.
    """
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(_and_disconnect, call)
        with connection.cursor() as cursor:
            while not is_anybody_waiting(cursor):
                assert not running.done(), "the call did not have to wait"
        yield
        running.result(timeout=10)


def _and_disconnect(call: Callable[[], Any]) -> Any:
    try:
        return call()
    finally:
        connection.close()


def is_anybody_waiting(cursor: CursorWrapper) -> bool:
    cursor.execute(
        "SELECT FROM pg_stat_activity"
        " WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    return cursor.rowcount > 0


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
