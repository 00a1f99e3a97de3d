"""Count the statements that do something; transactions and savepoints are not among them."""

from collections.abc import Iterator
from contextlib import contextmanager

from django.db import connection
from django.test.utils import CaptureQueriesContext

FRAME = ("BEGIN", "COMMIT", "ROLLBACK", "SAVEPOINT", "RELEASE SAVEPOINT")


@contextmanager
def statements() -> Iterator[list[str]]:
    """Fill the yielded list, at the end of the block, with the statements made in it."""
    made: list[str] = []
    with CaptureQueriesContext(connection) as captured:
        yield made
    made += [q["sql"] for q in captured.captured_queries if not q["sql"].startswith(FRAME)]
