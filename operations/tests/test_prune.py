import threading
from datetime import timedelta
from io import StringIO

import pytest
from django.contrib.sessions.models import Session
from django.core.management import CommandError, call_command
from django.db import connection, transaction

from config.database import read_clock
from drops.tests.factories import DropFactory
from realtime.models import Event, SocketTicket
from realtime.tickets import issue_ticket
from users.idempotency import claim_keys, make_key, prune_keys
from users.models import IdempotencyKey
from users.tests.factories import UserFactory


def prune(*arguments: str) -> list[str]:
    output = StringIO()
    call_command("prune", *arguments, stdout=output)
    return output.getvalue().splitlines()


def key_of(user, name, hours):
    age = timedelta(hours=hours)
    return IdempotencyKey.objects.create(
        user=user, route="POST /api/drops", key=name, status=201, created_at=read_clock() - age
    )


def make_old_and_new():
    """Two old rows of each kind, and one that somebody may still ask for."""
    now, user, drop = read_clock(), UserFactory(), DropFactory(seq=3)
    for seq, hours in ((1, 25), (2, 25), (3, 23)):
        created_at = now - timedelta(hours=hours)
        Event.objects.create(
            drop=drop, seq=seq, type="STOCK_UPDATED", data={}, created_at=created_at
        )
    for name, hours in (("a", 25), ("b", 24.01), ("c", 23.9)):
        key_of(user, name, hours)
    for number, seconds in ((1, -1), (2, -60), (3, 60)):
        expires_at = now + timedelta(seconds=seconds)
        SocketTicket.objects.create(digest=bytes([number]), user=user, expires_at=expires_at)
        Session.objects.create(session_key=f"{number}", session_data="", expire_date=expires_at)


def left():
    return (
        list(Event.objects.values_list("seq", flat=True)),
        list(IdempotencyKey.objects.values_list("key", flat=True)),
        [bytes(digest)[0] for digest in SocketTicket.objects.values_list("digest", flat=True)],
        list(Session.objects.values_list("session_key", flat=True)),
    )


def test_deletes_what_is_old_of_each_kind(db):
    make_old_and_new()

    assert prune() == [
        "2 events deleted.",
        "2 idempotency keys deleted.",
        "2 socket tickets deleted.",
        "2 sessions deleted.",
    ]
    assert left() == ([3], ["c"], [3], ["3"])
    assert prune()[0] == "0 events deleted."


def test_works_in_batches_and_stops_at_the_most(db):
    make_old_and_new()
    for number in range(3):
        key_of(UserFactory(), f"old {number}", 30)

    lines = prune("--batch", "2", "--most", "3", "-v", "2")

    assert [line for line in lines if "keys" in line] == [
        "2 idempotency keys deleted ...",
        "3 idempotency keys deleted ...",
        "3 idempotency keys deleted.",
    ]
    # The oldest went first.
    assert set(IdempotencyKey.objects.values_list("key", flat=True)) == {"a", "b", "c"}


@pytest.mark.parametrize("arguments", [("--batch", "0"), ("--most", "0"), ("--most", "-1")])
def test_refuses_numbers_that_say_nothing(db, arguments):
    make_old_and_new()
    before = left()

    with pytest.raises(CommandError):
        prune(*arguments)

    assert left() == before


@pytest.mark.django_db(transaction=True)
def test_leaves_a_key_that_a_request_is_renewing():
    user = UserFactory()
    old = key_of(user, "again", 25)
    is_pruned = threading.Event()
    pruned = []

    def prune_meanwhile():
        try:
            pruned.append(prune_keys(10))
        finally:
            connection.close()
            is_pruned.set()

    with transaction.atomic():
        assert claim_keys([make_key(user.pk, "POST", "/api/drops", "again", b"")]) == [None]
        thread = threading.Thread(target=prune_meanwhile)
        thread.start()
        # Without waiting for us.
        assert is_pruned.wait(10)
    thread.join()

    assert pruned == [0]
    assert IdempotencyKey.objects.get().pk == old.pk
    assert IdempotencyKey.objects.get().created_at > read_clock() - timedelta(minutes=1)


def test_a_ticket_in_time_can_still_be_used(db):
    ticket = issue_ticket(UserFactory())

    assert prune()[2] == "0 socket tickets deleted."
    assert SocketTicket.objects.get().expires_at == ticket.expires_at
