"""The application without its row locks: what a server would do that trusts what it read.

For the twins of the oversell tests only; nothing else imports this.
"""

from django.db.backends.signals import connection_created

from config.asgi import application
from tests.unguarded import take_no_row_locks

connection_created.connect(take_no_row_locks)

__all__ = ["application"]
