"""The application without its row locks: what a server would do that trusts what it read.

For the twins of the oversell tests only; nothing else imports this.
"""

from django.db.models import QuerySet

from config.asgi import application
from tests.unguarded import without_lock

QuerySet.select_for_update = without_lock  # type: ignore[method-assign]

__all__ = ["application"]
