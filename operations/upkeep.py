"""What a database gathers that nobody will ask for again."""

from collections.abc import Callable, Iterator

from django.contrib.sessions.models import Session
from django.utils import timezone

from realtime.services import prune_events
from realtime.tickets import prune_tickets
from users.idempotency import prune_keys

EVENT_HOURS = 24


def prune_sessions(limit: int) -> int:
    """Delete at most ``limit`` ended sessions of the admin; return how many."""
    ended = Session.objects.filter(expire_date__lt=timezone.now())[:limit]
    return Session.objects.filter(pk__in=list(ended.values_list("pk", flat=True))).delete()[0]


# Each deletes at most so many rows, in one transaction, and returns how many. Signatures that
# were used and counters of rate limits are in Redis, which forgets them by itself.
PRUNERS: dict[str, Callable[[int], int]] = {
    "events": lambda limit: prune_events(EVENT_HOURS, limit),
    "idempotency keys": prune_keys,
    "socket tickets": prune_tickets,
    "sessions": prune_sessions,
}


def prune(kind: str, batch: int, at_most: int) -> Iterator[int]:
    """Delete what is old of ``kind``, a transaction per batch; yield the rows of each.

    Ends when nothing is left or ``at_most`` rows are gone.
    """
    left = at_most
    while left and (deleted := PRUNERS[kind](min(batch, left))):
        left -= deleted
        yield deleted
