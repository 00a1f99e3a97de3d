"""Statements that go out together, and the pool when the database takes its connections away."""

import os
import socket
import threading
import time

import psycopg
import pytest
from django.db import DataError, InternalError, connection, transaction
from django.test.utils import CaptureQueriesContext
from psycopg.conninfo import make_conninfo
from psycopg_pool import ConnectionPool

from config import database
from config.database import Statement, execute_together
from config.problems import Unavailable, to_api_exception
from reservations.management.commands import expire_reservations
from reservations.models import ReservationStatus
from reservations.tests.factories import ReservationFactory
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


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the options are Linux's")
def test_a_database_whose_machine_is_gone_is_given_up_within_seconds():
    # As Linux has it, two hours of silence are not yet a fault.
    options = {
        name: value
        for name, value in connection.settings_dict["OPTIONS"].items()
        if name.startswith(("keepalives", "tcp_"))
    }

    with socket.create_server(("127.0.0.1", 0)) as server:
        conninfo = make_conninfo(host="127.0.0.1", port=server.getsockname()[1], **options)
        connecting = psycopg.pq.PGconn.connect_start(conninfo.encode())
        try:
            with socket.socket(fileno=os.dup(connecting.socket)) as used:
                idle, interval, count, unheard_ms = (
                    used.getsockopt(socket.IPPROTO_TCP, option)
                    for option in (
                        socket.TCP_KEEPIDLE,
                        socket.TCP_KEEPINTVL,
                        socket.TCP_KEEPCNT,
                        socket.TCP_USER_TIMEOUT,
                    )
                )
        finally:
            connecting.finish()

    assert idle + interval * count <= 15
    assert 0 < unheard_ms <= 15_000


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


@pytest.fixture
def old_primary(transactional_db, monkeypatch):
    """Make this thread's connection one that takes no changes."""
    monkeypatch.setattr(database, "_replaced_at", float("-inf"))
    with connection.cursor() as cursor:
        cursor.execute("SET default_transaction_read_only = on")
    yield
    connection.close()


def wait_for_drain() -> None:
    for thread in threading.enumerate():
        if thread.name == "pool-drain":
            thread.join(20)


def test_connections_to_what_is_no_longer_the_primary_are_given_up(old_primary):
    """They live, and the pool would hand them out for an hour."""
    with pytest.raises(InternalError) as refused:
        User.objects.create(username="one")

    assert isinstance(to_api_exception(refused.value), Unavailable)
    wait_for_drain()
    connection.close()
    User.objects.create(username="one")


def test_the_expiry_loop_gives_them_up_too(transactional_db, request, monkeypatch):
    hold = ReservationFactory(overdue=True)
    request.getfixturevalue("old_primary")
    loop = expire_reservations.Command()
    # The pool may have another one.
    monkeypatch.setattr(expire_reservations, "close_old_connections", lambda: None)

    assert loop.step(batch=1) == expire_reservations.PAUSE_WITHOUT_DATABASE_SECONDS
    wait_for_drain()
    connection.close()
    loop.step(batch=1)
    hold.refresh_from_db()
    assert hold.status == ReservationStatus.EXPIRED
