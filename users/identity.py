"""Who is asking? One answer for viewsets, hot routes and sockets."""

import re
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from django.conf import settings

from users.exceptions import InvalidIdentity, UnknownUser
from users.models import User

# Only the usual form: what uuid.UUID also takes (braces, urn:, no hyphens) would give one
# person several spellings in logs, caches and rate limits.
USUAL_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
NAME_LENGTH = range(3, 51)
NOT_PRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")


@dataclass(frozen=True, slots=True)
class Identity:
    """What the identity headers say, well-formed but not yet looked up."""

    user_id: uuid.UUID
    name: str | None


def read_identity(user_id: str | None, name: str | None) -> Identity | None:
    """Return the identity that the two header values carry, or None without ``X-User-Id``.

    Raises:
        InvalidIdentity: the id is not one UUID in the usual form. Repeated headers
            arrive joined by a comma, so they end here too.
    """
    if user_id is None:
        return None
    if not USUAL_UUID.fullmatch(user_id.strip()):
        raise InvalidIdentity
    parsed = uuid.UUID(user_id.strip())
    if not parsed.int:
        raise InvalidIdentity
    return Identity(parsed, usable_name(name))


def usable_name(name: str | None) -> str | None:
    """Return ``name`` trimmed, without invisible characters, at most 50 long; None if under 3."""
    cleaned = NOT_PRINTABLE.sub("", decode(name or "")).strip()[: NAME_LENGTH.stop - 1].strip()
    return cleaned if len(cleaned) in NAME_LENGTH else None


def decode(header: str) -> str:
    """Read as UTF-8 what servers hand over as Latin-1; keep it where it is no UTF-8."""
    try:
        return header.encode("latin-1").decode()
    except UnicodeError:
        return header


def get_user(identity: Identity) -> User:
    """Return the active user behind ``identity``; in development an unknown one is made.

    Any number of first requests of one UUID may run at once: one row comes of it.

    Raises:
        UnknownUser: there is no such user, or staff switched it off.
    """
    user = User.objects.filter(pk=identity.user_id).first()
    if user is None and settings.CREATE_UNKNOWN_USERS:
        create_users([identity])
        user = User.objects.filter(pk=identity.user_id).first()
    if user is None or not user.is_active:
        raise UnknownUser
    return user


def create_users(identities: Iterable[Identity]) -> None:
    """Make users of those ``identities`` that are none yet; a taken name gets a suffix."""
    missing = {identity.user_id: identity for identity in identities}
    for name_of in NAME_ATTEMPTS:
        for pk in User.objects.filter(pk__in=missing).values_list("pk", flat=True):
            del missing[pk]
        if not missing:
            return
        # Skips a taken name and a twin request's row alike, without failing the transaction.
        User.objects.bulk_create(
            [
                User(pk=pk, username=name_of(identity), password="")
                for pk, identity in missing.items()
            ],
            ignore_conflicts=True,
        )


def wanted_name(identity: Identity) -> str:
    return identity.name or f"user_{identity.user_id.hex[:12]}"


# The second is free as a rule, the third always: it is the id.
NAME_ATTEMPTS: tuple[Callable[[Identity], str], ...] = (
    wanted_name,
    lambda identity: f"{wanted_name(identity)}_{identity.user_id.hex[-6:]}",
    lambda identity: identity.user_id.hex,
)
