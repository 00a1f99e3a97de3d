"""A database clock that stands still until a test moves it.

The product asks PostgreSQL for the time by ``clock_timestamp()``, ``statement_timestamp()`` and
``now()``. Functions of the same names in ``public``, which the search path puts first, answer
instead: the product's code is the one that runs in production.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from django.db import connection
from django.db.backends.signals import connection_created

# What is left of the window between two settings of the clock, in which readings differ.
WINDOW = timedelta(milliseconds=1)

# Each reading of the clock is a microsecond later than the one before, so that an order by
# time is the order of the readings.
STOP_THE_CLOCK = """
    CREATE TABLE public.test_clock (at timestamptz NOT NULL);
    CREATE SEQUENCE public.test_clock_readings;
    CREATE FUNCTION public.clock_timestamp() RETURNS timestamptz VOLATILE LANGUAGE sql AS $$
        SELECT at + nextval('public.test_clock_readings') * interval '1 microsecond'
        FROM public.test_clock
    $$;
    CREATE FUNCTION public.statement_timestamp() RETURNS timestamptz STABLE LANGUAGE sql AS $$
        SELECT at + last_value * interval '1 microsecond'
        FROM public.test_clock, public.test_clock_readings
    $$;
    CREATE FUNCTION public.now() RETURNS timestamptz STABLE LANGUAGE sql AS
        'SELECT public.statement_timestamp()'
"""
LET_IT_RUN = """
    DROP FUNCTION public.now(), public.statement_timestamp(), public.clock_timestamp();
    DROP SEQUENCE public.test_clock_readings;
    DROP TABLE public.test_clock
"""


class Clock:
    """The database's time, as its readings are from now on."""

    def __init__(self) -> None:
        self.at = datetime(2030, 1, 1, tzinfo=UTC)
        _run("INSERT INTO public.test_clock VALUES (%s)", self.at)

    def move_to(self, at: datetime) -> None:
        """Set the clock; readings are later than ``at`` by less than ``WINDOW``."""
        self.at = at
        _run("UPDATE public.test_clock SET at = %s", at)
        _run("SELECT setval('public.test_clock_readings', 1, false)")

    def move(self, by: timedelta) -> None:
        self.move_to(self.at + by)


@contextmanager
def stopped_clock() -> Iterator[Clock]:
    """Stop the database's clock for connections that begin within the block."""
    _connect_anew()
    connection_created.connect(_look_at_the_stopped_clock)
    try:
        _run(STOP_THE_CLOCK)
        try:
            yield Clock()
        finally:
            _run(LET_IT_RUN)
    finally:
        connection_created.disconnect(_look_at_the_stopped_clock)
        _connect_anew()


def _look_at_the_stopped_clock(connection: Any, **signal: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SET search_path = public, pg_catalog")


def _connect_anew() -> None:
    # Prepared statements remember which function they meant.
    connection.close()
    connection.close_pool()


def _run(sql: str, *parameters: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute(sql, parameters or None)
