"""Statements that go out together, and the pool when the database takes its connections away."""

import time

import psycopg
import pytest
from django.db import DataError, connection, transaction
from django.test.utils import CaptureQueriesContext
from psycopg_pool import ConnectionPool

from config.database import Statement, execute_together
from tests.concurrency import plain_parameters
from users.models import User
from users.tests.factories import UserFactory


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


def rename(user, to: str) -> Statement:
    return Statement("UPDATE users_user SET username = %s WHERE id = %s", [to, user.pk])


def names(*users) -> list[str]:
    return [User.objects.get(pk=user.pk).username for user in users]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_statements_go_out_as_one(db, count):
    users = UserFactory.create_batch(count)

    with CaptureQueriesContext(connection) as sent:
        execute_together([rename(user, f"new {index}") for index, user in enumerate(users)])

    assert len(sent) == 1
    assert names(*users) == [f"new {index}" for index in range(count)]


def test_no_statement_costs_nothing(db):
    with CaptureQueriesContext(connection) as sent:
        execute_together([])

    assert len(sent) == 0


def test_all_are_done_or_none(db):
    one, other = UserFactory(username="one"), UserFactory(username="other")

    with pytest.raises(DataError), transaction.atomic():
        execute_together([rename(one, "new"), rename(other, "too long" * 100)])

    assert names(one, other) == ["one", "other"]
