"""A database that ends a session on its own: an outage that passes, and no mistake of ours."""

import time
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from django.db import InternalError, OperationalError, connection, transaction
from django.urls import reverse

from config.problems import Unavailable, to_api_exception
from drops.group_commit import Failure, settle_apart
from drops.services import Wait
from drops.tests.factories import DropFactory
from reservations.management.commands import expire_reservations
from users.tests.factories import UserFactory

pytestmark = pytest.mark.django_db(transaction=True)


@transaction.atomic
def stand_still_in_a_transaction(*args, **options):
    """Do what a process does that is frozen, just before a commit, for too long."""
    with connection.cursor() as cursor:
        cursor.execute("SET LOCAL idle_in_transaction_session_timeout = '20ms'")
        time.sleep(0.3)


@pytest.fixture(autouse=True)
def _new_connection():
    yield
    connection.close()


def test_the_client_is_told_to_try_again():
    with pytest.raises(InternalError) as ended:
        stand_still_in_a_transaction()

    assert isinstance(to_api_exception(ended.value), Unavailable)


def test_the_whole_batch_fails_at_once(caplog):
    batch = {"drop": [SimpleNamespace(request="one"), SimpleNamespace(request="two")]}
    (answered,) = settle_apart(stand_still_in_a_transaction, batch, Wait.BRIEFLY)

    assert [type(answer) for _, answer in answered] == [Failure] * 2
    assert "a batch of 2 failed" in caplog.text
    assert "Traceback" not in caplog.text


def test_the_expiry_loop_goes_on():
    with patch.object(expire_reservations, "expire_due", stand_still_in_a_transaction):
        pause = expire_reservations.Command().step(batch=1)

    assert pause == expire_reservations.PAUSE_WITHOUT_DATABASE_SECONDS


def test_a_database_that_is_no_longer_the_primary_is_an_outage(client_of):
    drop, user = DropFactory(), UserFactory()
    with connection.cursor() as cursor:
        cursor.execute("SET default_transaction_read_only = on")
        answer = client_of(user).post(f"/api/drops/{drop.pk}/reserve")
        # Or who is given this connection next could not write either.
        cursor.execute("RESET default_transaction_read_only")

    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
    assert answer["Retry-After"] == "1"


def write_where_nothing_can_be_written(*args, **options):
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SET TRANSACTION READ ONLY")
        cursor.execute("DELETE FROM drops_drop")


def test_so_it_is_for_a_batch(caplog):
    batch = {"drop": [SimpleNamespace(request="one"), SimpleNamespace(request="two")]}
    (answered,) = settle_apart(write_where_nothing_can_be_written, batch, Wait.BRIEFLY)

    assert [type(answer) for _, answer in answered] == [Failure] * 2
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("page", ["home", "drop", "holds", "admin:index"])
def test_a_page_without_the_database_says_when_to_come_again(admin_client, caplog, page):
    drop = DropFactory()
    address = reverse(page) if page in ("home", "admin:index") else f"/drops/{drop.pk}"
    if page == "holds":
        address += "/holds"

    def refuse(execute, sql, params, many, context):
        raise OperationalError("the server closed the connection unexpectedly")

    # As a server does it, and not the test.
    admin_client.raise_request_exception = False
    with connection.execute_wrapper(refuse):
        answer = admin_client.get(address)

    assert (answer.status_code, answer["Retry-After"]) == (503, "1")
    assert "can't be reached just now" in answer.content.decode()
    assert "Traceback" not in caplog.text
