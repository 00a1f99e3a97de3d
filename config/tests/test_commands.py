import os
import subprocess
import sys

import pytest
from django.conf import settings
from django.core.management import CommandError, call_command
from django.db import connection

COMMANDS = ["audit_stock", "prune", "prune_events", "seed"]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.django_db(transaction=True)
def test_a_command_before_the_first_migration_says_what_to_do(command, settings):
    settings.DEBUG = True
    with connection.cursor() as cursor:
        cursor.execute("SET search_path = nowhere")
        with pytest.raises(CommandError, match=r"^There are no tables yet. Run .* migrate") as told:
            call_command(command)
        cursor.execute("RESET search_path")

    # 1 is what audit_stock says of stock that is wrong.
    assert told.value.returncode == 2


def test_a_command_without_its_database_says_so_in_a_sentence():
    environment = os.environ | {"DATABASE_URL": "postgres://nobody@127.0.0.1:1/nothing"}

    ended = subprocess.run(
        [sys.executable, "manage.py", "audit_stock"],
        cwd=settings.BASE_DIR,
        env=environment,
        capture_output=True,
        text=True,
        timeout=90,
    )

    assert ended.returncode == 2
    assert "CommandError: The database" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""
