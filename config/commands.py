from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.db import Error
from psycopg import errors as postgres
from psycopg_pool import PoolTimeout

from config.problems import is_outage


class DatabaseCommand(BaseCommand):
    """A command that says in a sentence, and exits with 2, when its database keeps it from work."""

    def execute(self, *args: Any, **options: Any) -> str | None:
        try:
            return super().execute(*args, **options)
        except (Error, PoolTimeout) as exc:
            if (sentence := sentence_for(exc)) is None:
                raise
            raise CommandError(sentence, returncode=2) from exc


def sentence_for(exc: Exception) -> str | None:
    """Return what to tell an operator of ``exc``; None where it is a mistake of ours."""
    cause = exc.__cause__
    if isinstance(cause, postgres.UndefinedTable):
        return "There are no tables yet. Run manage.py migrate first."
    if isinstance(cause, postgres.LockNotAvailable | postgres.DeadlockDetected):
        return "The tables are in use. Try again in a moment."
    if isinstance(cause, postgres.ReadOnlySqlTransaction):
        return f"The database takes no changes: {exc}. Is it the primary?"
    if isinstance(cause, postgres.QueryCanceled):
        return f"The database gave up: {exc}"
    return f"The database can't be reached: {exc}" if is_outage(exc) else None
