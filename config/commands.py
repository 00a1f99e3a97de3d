from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.db import OperationalError, ProgrammingError
from psycopg import errors as postgres
from psycopg_pool import PoolTimeout


class DatabaseCommand(BaseCommand):
    """A command that says in a sentence, and exits with 2, when its database keeps it from work."""

    def execute(self, *args: Any, **options: Any) -> str | None:
        try:
            return super().execute(*args, **options)
        except (OperationalError, PoolTimeout, ProgrammingError) as exc:
            if (sentence := sentence_for(exc)) is None:
                raise
            raise CommandError(sentence, returncode=2) from exc


def sentence_for(exc: Exception) -> str | None:
    """Return what to tell an operator of ``exc``; None where it is a mistake of ours."""
    if isinstance(exc, ProgrammingError):
        if isinstance(exc.__cause__, postgres.UndefinedTable):
            return "There are no tables yet. Run manage.py migrate first."
        return None
    if isinstance(exc.__cause__, postgres.LockNotAvailable | postgres.DeadlockDetected):
        return "The tables are in use. Try again in a moment."
    return f"The database can't be reached: {exc}"
