"""Take the guards away, so that race tests can show what those keep from happening.

The project keeps each rule twice, by locks and by constraints; a twin test removes both.
"""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from django.db import connection
from django.db.backends.signals import connection_created

from tests.concurrency import at_once

# What would refuse the bad rows. The last one isn't about stock, but two transactions that
# change a drop without its lock also take the same sequence number.
STOCK_CONSTRAINTS = (
    "drop_stock_between_zero_and_total",
    "drops_drop_available_stock_check",
    "variant_stock_between_zero_and_total",
    "drops_variant_available_stock_check",
    "one_event_per_sequence_number",
)
ROW_LOCK = re.compile(r"\sFOR (NO KEY )?UPDATE( OF [^\s,]+(, [^\s,]+)*)?( SKIP LOCKED)?")


def strip_row_locks(execute: Callable[..., Any], sql: str, *args: Any) -> Any:
    """Wrap a connection's execution: rows are read as ever, and locked for nobody."""
    return execute(ROW_LOCK.sub("", sql), *args)


def take_no_row_locks(connection: Any, **signal: Any) -> None:
    """Strip the locks on a new connection; a receiver of ``connection_created``."""
    if strip_row_locks not in connection.execute_wrappers:
        connection.execute_wrappers.append(strip_row_locks)


@contextmanager
def without_row_locks() -> Iterator[None]:
    """Take no locks in the threads that connect during the block."""
    connection_created.connect(take_no_row_locks)
    try:
        yield
    finally:
        connection_created.disconnect(take_no_row_locks)
        # This thread may have connected anew as well, and lives on.
        if strip_row_locks in connection.execute_wrappers:
            connection.execute_wrappers.remove(strip_row_locks)


@contextmanager
def without_constraints(*names: str) -> Iterator[None]:
    """Drop the named constraints and unique indexes; afterwards empty all tables, restore them."""
    definitions = [read_definition(name) for name in names]
    with connection.cursor() as cursor:
        for drop, _ in definitions:
            cursor.execute(drop)
    try:
        yield
    finally:
        with connection.cursor() as cursor:
            cursor.execute(
                "TRUNCATE drops_drop, drops_variant, reservations_reservation,"
                " purchases_purchase, realtime_event, users_user CASCADE"
            )
            for _, restore in definitions:
                cursor.execute(restore)


def read_definition(name: str) -> tuple[str, str]:
    """Return the statements that drop and restore the constraint or index ``name``."""
    with connection.cursor() as cursor:
        cursor.execute(
            """
            SELECT format('ALTER TABLE %%s DROP CONSTRAINT %%I', conrelid::regclass, conname),
                   format('ALTER TABLE %%s ADD CONSTRAINT %%I %%s', conrelid::regclass, conname,
                          pg_get_constraintdef(oid))
            FROM pg_constraint WHERE conname = %(name)s
            UNION ALL
            SELECT format('DROP INDEX %%I', indexname), indexdef
            FROM pg_indexes WHERE indexname = %(name)s
            """,
            {"name": name},
        )
        definition = cursor.fetchone()
    assert definition, f"there is no constraint {name}"
    return definition


def read_before_anyone_writes(
    *calls: Callable[[], Any], patience_seconds: float = 0.3
) -> list[Any]:
    """Run the calls at once, each pausing before its first write until all others got there.

    The worst order there is: whoever is not kept out by a lock decides on what was true
    before. Where a lock keeps the others out, the wait ends after ``patience_seconds``.
    """
    everybody_has_read = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        has_written = False

        def pause_before_first_write(execute, sql, params, many, context):
            nonlocal has_written
            if not has_written and is_write(sql):
                has_written = True
                wait_or_give_up(everybody_has_read, patience_seconds)
            return execute(sql, params, many, context)

        with connection.execute_wrapper(pause_before_first_write):
            try:
                return call()
            finally:
                if not has_written:  # nobody needs to wait for a call that only refuses
                    everybody_has_read.abort()

    return at_once(*(partial(run, call) for call in calls))


def wait_or_give_up(barrier: threading.Barrier, seconds: float) -> None:
    try:
        barrier.wait(seconds)
    except threading.BrokenBarrierError:
        return


def is_write(sql: str) -> bool:
    return sql.lstrip().startswith(("INSERT", "UPDATE", "WITH write_0"))
