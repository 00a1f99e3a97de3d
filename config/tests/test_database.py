"""What the pool does when the database takes its connections away."""

import time

import psycopg
import pytest
from psycopg_pool import ConnectionPool

from tests.concurrency import plain_parameters


@pytest.mark.django_db(transaction=True)
def test_who_is_given_one_dead_connection_after_the_other_hardly_waits():
    parameters = plain_parameters()
    with (
        psycopg.connect(**parameters, autocommit=True) as other,
        ConnectionPool(
            kwargs=parameters, min_size=4, timeout=5, check=ConnectionPool.check_connection
        ) as pool,
    ):
        pool.wait(10)
        taken = [pool.getconn() for _ in range(4)]
        pids = [conn.info.backend_pid for conn in taken]
        for conn in taken:
            pool.putconn(conn)
        other.execute("SELECT pg_terminate_backend(pid) FROM unnest(%s::int[]) AS pid", [pids])

        started = time.monotonic()
        with pool.connection() as conn:
            assert conn.execute("SELECT 1").fetchone() == (1,)
        # Asleep for 0, 1, 2 and 4 seconds, it would wait in vain.
        assert time.monotonic() - started < 0.9
