"""Single-use tickets, with which a browser's socket says whose it is.

A browser can't set headers on a WebSocket, and what stands in an address ends in logs. So
the page asks for a ticket with its usual headers, and sends it as a subprotocol.
"""

import hashlib
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from django.db import connection

from config.database import read_clock
from realtime.models import SocketTicket
from users.identity import Identity
from users.models import User

TICKET_SECONDS = 30
SUBPROTOCOL = "drops.v1"
TICKET_PREFIX = "ticket."


@dataclass(frozen=True, slots=True)
class Ticket:
    value: str
    expires_at: datetime


def issue_ticket(user: User, identity_expires_at: float | None = None) -> Ticket:
    """Store a ticket of ``user``, and forget those that nobody used in time.

    A socket that it opens ends with the identity that got the ticket.
    """
    now = read_clock()
    SocketTicket.objects.filter(expires_at__lt=now).delete()
    ticket = Ticket(secrets.token_urlsafe(32), now + timedelta(seconds=TICKET_SECONDS))
    SocketTicket.objects.create(
        digest=digest_of(ticket.value),
        user=user,
        expires_at=ticket.expires_at,
        identity_expires_at=identity_expires_at,
    )
    return ticket


def use_ticket(value: str) -> Identity | None:
    """Return whose ticket this is, and spend it; None if it is unknown, used or too old.

    One statement, so of any number of sockets in any processes one gets the answer.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            """
            DELETE FROM realtime_socketticket AS ticket
            USING users_user AS owner
            WHERE ticket.digest = %s AND ticket.expires_at > clock_timestamp()
                AND owner.id = ticket.user_id AND owner.is_active
            RETURNING owner.id, ticket.identity_expires_at
            """,
            [digest_of(value)],
        )
        row = cursor.fetchone()
    return Identity(row[0], None, expires_at=row[1]) if row else None


def prune_tickets(limit: int) -> int:
    """Delete at most ``limit`` tickets that nobody used in time; return how many."""
    with connection.cursor() as cursor:
        cursor.execute(
            """
            DELETE FROM realtime_socketticket
            WHERE digest IN (
                SELECT digest FROM realtime_socketticket
                WHERE expires_at < clock_timestamp()
                LIMIT %s
                FOR UPDATE SKIP LOCKED
            )
            """,
            [limit],
        )
        return cursor.rowcount


def digest_of(value: str) -> bytes:
    return hashlib.sha256(value.encode()).digest()


def ticket_in(subprotocols: Iterable[str]) -> str | None:
    """Return the ticket among the subprotocols that a client offers."""
    for offered in subprotocols:
        if offered.startswith(TICKET_PREFIX):
            return offered.removeprefix(TICKET_PREFIX)
    return None
