import os
import socket
import subprocess
import sys

import pytest
from django.conf import settings
from django.core.management import CommandError, call_command
from django.db import connection, transaction

from reservations.tests.factories import ReservationFactory

COMMANDS = {
    "audit_stock": {},
    "expire_reservations": {"once": True},
    "prune": {},
    "prune_events": {},
    "rehearse": {"clean": True},
    "seed": {},
}


UNUSABLE = {
    "before the first migration": (
        "search_path = nowhere",
        r"^There are no tables yet. Run .* migrate",
    ),
    "that takes no changes": (
        "default_transaction_read_only = on",
        r"^The database takes no changes: ",
    ),
}


@pytest.mark.parametrize(("setting", "sentence"), UNUSABLE.values(), ids=UNUSABLE)
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.django_db(transaction=True)
def test_a_command_on_such_a_database_says_what_keeps_it(command, setting, sentence, settings):
    settings.DEBUG = True
    ReservationFactory(overdue=True)
    with connection.cursor() as cursor:
        cursor.execute(f"SET {setting}")
        try:
            with pytest.raises(CommandError, match=sentence) as told:
                call_command(command, **COMMANDS[command])
        finally:
            cursor.execute(f"RESET {setting.split()[0]}")

    # 1 is what audit_stock says of stock that is wrong, and rehearse of what is not ready.
    assert told.value.returncode == 2


@pytest.mark.django_db(transaction=True)
def test_a_command_that_takes_too_long_does_not_say_that_there_is_no_database(monkeypatch):
    @transaction.atomic
    def wait(*args, **options):
        with connection.cursor() as cursor:
            cursor.execute("SET LOCAL statement_timeout = 10")
            cursor.execute("SELECT pg_sleep(10)")

    monkeypatch.setattr("purchases.management.commands.audit_stock.audit_stock", wait)
    with pytest.raises(CommandError, match=r"^The database gave up: .* timeout") as told:
        call_command("audit_stock")

    assert told.value.returncode == 2


@pytest.mark.parametrize(
    "command",
    [["audit_stock"], ["expire_reservations", "--once"], ["rehearse"], ["up", "--port"]],
    ids=" ".join,
)
def test_a_command_without_its_database_says_so_in_a_sentence(command):
    if command[-1] == "--port":
        with socket.create_server(("127.0.0.1", 0)) as probe:
            command = [*command, str(probe.getsockname()[1])]
    environment = os.environ | {"DATABASE_URL": "postgres://nobody@127.0.0.1:1/nothing"}

    ended = subprocess.run(
        [sys.executable, "manage.py", *command],
        cwd=settings.BASE_DIR,
        env=environment,
        capture_output=True,
        text=True,
        timeout=90,
    )

    assert ended.returncode == 2
    assert "CommandError: The database" in ended.stderr
    assert "Traceback" not in ended.stderr
    if command[0] != "up":
        assert ended.stdout == ""
